"""Page, tables and figures: drawn from records, of any number of rows, names and classes."""

import json
import re
import shutil
import statistics

import pytest
from conftest import ROOT, parse

import ex3_convnet
import ex3_pretrained
import utils

PUBLISHED = ROOT / "figures/published/cifar-10"
SCRIPTS = {"ex3_convnet": ex3_convnet, "ex3_pretrained": ex3_pretrained}


def published(script="ex3_convnet"):
    return [json.loads(path.read_text()) for path in (PUBLISHED / script / "records").iterdir()]


@pytest.fixture
def figures(monkeypatch):
    """A list that grows by each figure that is drawn, without its file."""
    found = []

    def keep(figure, title, *_, **__):
        figure.suptitle(title)
        figure.canvas.draw()
        found.append(figure)
        utils.plt.close(figure)

    monkeypatch.setattr(utils, "save_figure", keep)
    return found


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_is_published_is_drawn_from_the_records_byte_by_byte(folder, name):
    place = folder / "figures/published/cifar-10" / name
    shutil.copytree(PUBLISHED / name, place)
    for path in place.glob("*.*"):
        if path.name != "figure_6_techniques.png":  # needs the images
            path.unlink()
    SCRIPTS[name].main(["--results=figures/published", "--redraw"])
    for path in (PUBLISHED / name).glob("*.*"):
        assert (place / path.name).exists(), path.name
        if path.suffix != ".png":
            assert (place / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_published_number_is_that_of_the_records_and_claims_are_sorted(name):
    lines = (PUBLISHED / name / "README.md").read_text(encoding="utf-8").splitlines()
    plan = utils.make_plan(parse("--redraw", script=SCRIPTS[name]), SCRIPTS[name].QUESTIONS)
    for number, runs in utils.find_results(plan, published(name)).items():
        question = SCRIPTS[name].QUESTIONS[number]
        for row, _, *report in question.rows if question.columns else ():
            cells = [row]
            for key, theirs in zip(question.columns.values(), [*report, *[None] * 9]):
                form, scale = (",.1f", 100) if "accuracy" in key else (",.0f", 1)
                values = [scale * record["result"][key] for record in runs[row]
                          if key in record["result"]]
                cell = f"{statistics.mean(values):{form}}" if values else "–"
                if len(values) > 1 and key != "model_size":
                    cell += f" ± {statistics.stdev(values):{form}}"
                cells.append(cell + ("" if theirs is None else f" (report {theirs:,})"))
            assert f"| {' | '.join(cells)} | {len(runs[row])} |" in lines
    for part in "\n".join(lines).split("## Question")[1:]:
        words = re.findall(r"^- . \*\*.*: (.*)\.\*\*", part, re.MULTILINE)
        order = ["holds", "does not hold", "undecided", "too few seeds"]
        assert words == sorted(words, key=order.index)


@pytest.mark.parametrize(("changes", "beside"), [
    ({}, True), ({"train": 48_000}, False), ({"val": 500}, False),
    ({"fingerprint": "12"}, False)])
def test_the_reports_numbers_stand_beside_full_cifar_10_only(folder, figures, changes, beside):
    place = folder / "figures/cifar-10/ex3_convnet"
    for i, record in enumerate(published()):
        record["identity"]["data"] |= changes
        (place / "records").mkdir(parents=True, exist_ok=True)
        (place / "records" / f"{i}.json").write_text(json.dumps(record))
    ex3_convnet.main(["--redraw", "--question=2a"])
    page = (place / "README.md").read_text(encoding="utf-8")
    assert [words in page for words in ("(report ", "same_numbers.png")] == [beside, beside]
    lines = [line for figure in figures for axis in figure.axes for line in axis.lines]
    assert ("D" in [line.get_marker() for line in lines]) == beside


@pytest.mark.parametrize(("rows", "name"), [
    (1, "{}"), (2, "a $5 100 % \\frac$ {}"),
    (12, "holiday photos of 2019 to 2024, all cameras and all trips, {}")])
def test_figures_grow_with_their_rows(folder, figures, monkeypatch, rows, name):
    """Whatever their names: one seed and epoch, several, early stopping, and no batch norm."""
    titles = {"ConvNet, batch norm, rotation": 1, "ConvNet, batch norm": 3,
              "ConvNet, early stopping": 2, "ConvNet, dropout 0.5": 1}
    records = [{**record, "data": name.format("data")} for record in published()]
    kinds = [[record for record in records if record["title"] == title][:seeds]
             for title, seeds in titles.items()]
    kinds[0][0]["history"] = {key: of[:1] for key, of in kinds[0][0]["history"].items()}
    runs = {name.format(i): kinds[i % 4] for i in range(rows)}
    monkeypatch.setattr(ex3_convnet, "QUESTIONS", {
        number: utils.Question("?", [(run, {}) for run in runs]) for number in ("2b", "3a", "3b")})
    for number in ex3_convnet.QUESTIONS:
        ex3_convnet.draw(number, runs, None, folder, None)
    utils.plot_learning_curves(runs, name.format("title"), folder / "curves.png")
    claims = [utils.Claim("3a", f"{run} is better", run, [10.0], above=0) for run in runs]
    utils.plot_conclusions([(claim, utils.judge(claim, {"3a": runs})) for claim in claims],
                           folder / "conclusions.png", False)
    assert len(figures) == 5
    for axis in (axis for figure in figures for axis in figure.axes):
        box, (width, height) = axis.get_window_extent(), axis.figure.bbox.size
        assert 0 <= box.x0 <= box.x0 + 50 < box.x1 <= width
        assert 0 <= box.y0 <= box.y0 + 50 < box.y1 <= height


@pytest.mark.parametrize(("classes", "texts"), [(2, 4), (10, 100), (20, 0)])
def test_a_matrix_of_many_classes_has_no_numbers(folder, figures, classes, texts):
    record = {**published()[0], "classes": [f"class {i}" for i in range(classes)],
              "confusion": [[3] * classes, *[[0] * classes] * (classes - 1)]}
    utils.plot_confusion(record, folder / "classes.png", "title")
    axis, = figures[0].axes
    assert len(axis.get_xticklabels()) == (classes if texts else 0)
    shown = [text.get_text() for text in axis.texts]
    assert shown == [*[f"{100 / classes:.0f}"] * classes, *["0"] * (classes**2 - classes)][:texts]
