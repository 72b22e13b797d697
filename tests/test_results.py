"""The published results: pages, tables and figures are those that the records here give."""

import shutil

import pytest
from conftest import ROOT, parse
from test_readme import README

import ex3_convnet
import ex3_pretrained
import utils

PUBLISHED = [path.parent for path in sorted(ROOT.glob("figures/cifar-10*/records"))]
WEIGHTS = "--pretrained=vgg11_bn-tiny-imagenet32.pth"
JPEG = "--dataset=CIFAR-10 (JPEG)"
REDRAW = [("ex3_convnet.py",), ("ex3_pretrained.py", WEIGHTS), ("ex3_convnet.py", JPEG),
          ("ex3_pretrained.py", JPEG, WEIGHTS)]


def test_all_that_is_published_is_redrawn_from_the_records(project):
    """Pages and CSV byte for byte; of the figures, that they are drawn."""
    for folder in PUBLISHED:
        place = project.folder / folder.relative_to(ROOT)
        shutil.copytree(folder / "records", place / "records")
        for picture in folder.glob("figure_6_techniques.png"):  # needs the images
            shutil.copy(picture, place)
    for call in REDRAW:
        done = project(*call, "--question=all", "--redraw")
        assert done.returncode == 0, done.stderr
    texts, figures = 0, 0
    for folder in PUBLISHED:
        for path in folder.glob("*.*"):
            again = project.folder / path.relative_to(ROOT)
            assert again.exists(), path
            if path.suffix != ".png":
                assert again.read_text() == path.read_text(), path
            texts, figures = texts + (path.suffix != ".png"), figures + (path.suffix == ".png")
    assert texts >= 2 * len(PUBLISHED)
    assert figures > len(PUBLISHED)


@pytest.mark.parametrize(("script", "argv"), [(ex3_convnet, []), (ex3_pretrained, [WEIGHTS])])
def test_the_readme_shows_the_verdicts_as_the_records_give_them(script, argv, capsys):
    flags = parse("--question=all", "--redraw", *argv, script=script)
    results = utils.find_results(utils.plan(flags, script.QUESTIONS), script.experiment)
    lines = [line for line in utils.claims_table(script.CLAIMS, script.QUESTIONS, results)
             if line.startswith("|")]
    assert len(lines) == 2 + len(script.CLAIMS)
    assert [line for line in lines if line not in README.splitlines()] == []


def test_every_page_is_linked_from_the_readme():
    for folder in PUBLISHED:
        assert f"({folder.relative_to(ROOT)}/README.md)" in README
