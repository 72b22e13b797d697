"""What a call leaves behind: records, figures, page and CSV, as a user meets them."""

import csv
import hashlib
import json
import re
import shutil
from datetime import UTC, datetime, timedelta
from functools import partial

import numpy as np
import pytest
from conftest import ROOT, TINY, records_in
from test_records import ARGV, GELU, change, edited, page

import ex3_convnet
import ex3_pretrained
import utils

TWO_A = [*ARGV, "--question=2a"]
LINE = " ".join(ARGV)

# runs command lines on few images, each as Python runs a script, and edits it first by "old=>new|"
DRIVER = """
import pathlib, runpy, sys
import utils
drawn = utils.draw_synthetic(80, 100)
utils.draw_synthetic = lambda: (*drawn[:3], (60, 20, 100))
for command in sys.argv[1:]:
    *edits, command = command.split("|")
    sys.argv = command.split()
    script = pathlib.Path(sys.argv[0])
    for old, new in (edit.split("=>") for edit in edits):
        assert old in script.read_text("utf-8")
        script.write_text(script.read_text("utf-8").replace(old, new), "utf-8")
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        print("exit code 0")
    except SystemExit as end:
        print("exit code", end.code)
"""


def rows_of(folder):
    return [*csv.DictReader((folder / "results.csv").read_text(encoding="utf-8").splitlines())]


def files_in(folder):
    return {path: path.read_bytes() for path in folder.rglob("*.*") if path.is_file()}


@pytest.fixture
def trainings(monkeypatch):
    """A list that grows by each epoch that is trained."""
    epochs, seed_epoch = [], utils.seed_epoch
    monkeypatch.setattr(utils, "seed_epoch", lambda *of: (epochs.append(of), seed_epoch(*of))[1])
    return epochs


def test_plain_things_leave_each_their_own_results_and_nothing_that_git_sees(project):
    """README's first command, sweeps by flags and by edits, a copy of the script with another
    network, a question, and settings that match no record."""
    shutil.copy(project.folder / "ex3_convnet.py", project.folder / "mine.py")
    done = project(
        "-c", DRIVER, f"ex3_convnet.py {LINE} --norm_flag --learning_rate=0.0005",
        *(f"ex3_convnet.py {LINE} --seed=3 --learning_rate={rate}" for rate in (0.1, 0.01, 0.001)),
        f"ex3_convnet.py {LINE}", f"rate = 2e-3=>rate = .01|ex3_convnet.py {LINE}",
        f"rate = .01=>rate = 0.1|ex3_convnet.py {LINE}",
        f"{'=>'.join(GELU)}|mine.py {LINE} --question=2a", f"ex3_convnet.py {LINE} --question=2a",
        "ex3_convnet.py --redraw", f"ex3_pretrained.py {LINE} --redraw",
        "ex3_convnet.py --redraw --results=figures/published --reg=0.3")
    assert "Traceback" not in done.stderr, done.stderr
    assert re.findall("exit code (.*)", done.stdout) == [*9 * "0", *3 * "1"]
    assert [line[-18:] for line in done.stderr.splitlines()] == 3 * ["has these settings"]
    assert project.status().split() == ["M", "ex3_convnet.py", "??", "mine.py"]
    place, own = (project.folder / "figures/synthetic-60" / of for of in ("ex3_convnet", "mine"))
    assert sorted((row["seed"], row["learning_rate"], row["norm_flag"],
                   row["commit"].endswith("-dirty")) for row in rows_of(place)) == [
        ("0", "0.0005", "True", False), ("0", "0.002", "", False), ("0", "0.01", "", True),
        ("0", "0.1", "", True), ("0", "0.1", "True", True), ("3", "0.001", "", False),
        ("3", "0.01", "", False), ("3", "0.1", "", False)]
    for kind in "curves", "filters", "classes":
        assert len([*place.glob(f"*_{kind}.png")]) == 7
    for folder, script, records in (place, "ex3_convnet", 8), (own, "mine", 2):
        assert f"{script}.py" in (folder / "README.md").read_text(encoding="utf-8")
        assert (folder / "figure_3_4.png").exists()
        assert len([*folder.glob("records/*")]) == len(rows_of(folder)) == records


def test_torchrun_shares_the_runs_of_a_question(project, photos, monkeypatch, capsys):
    """Each is done once, nobody draws; what is missing is done by a second call."""
    argv = [*TWO_A, f"--dataset={photos}", "--num_training=16", "--num_validation=4", "--seeds=2"]
    done = project("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                   "ex3_convnet.py", *argv, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    place = next(project.folder.glob("figures/*/ex3_convnet"))
    assert [path.name for path in place.iterdir()] == ["records"]
    assert len(records_in(project.folder)) == 4
    assert [done.stdout.count(of) for of in ("Run 1 of 2", "Run 2 of 2", "--redraw")] == [2, 2, 2]
    for title in "ConvNet, seed", "ConvNet, batch norm, seed":
        assert [done.stdout.count(f": {title} {i}\n") for i in range(3)] == [1, 1, 0]
    monkeypatch.setattr(utils, "FOLDER", project.folder)
    monkeypatch.setattr(ex3_convnet, "CHANNELS", (8, 8, 8, 8, 8))
    (missing := next(place.glob("records/convnet_*_seed1*"))).unlink()
    monkeypatch.setenv("WORLD_SIZE", "5")  # more than there are runs
    for rank in range(5):
        monkeypatch.setenv("RANK", str(rank))
        assert ex3_convnet.main(argv) == []
    assert missing.exists()
    assert capsys.readouterr().out.count("recorded already") == 3
    monkeypatch.delenv("WORLD_SIZE")
    assert len(ex3_convnet.main([*argv, "--redraw"])) == 4
    assert (place / "figure_3_4.png").exists()


def test_a_question_trains_though_its_results_are_published(
        small_convnet, no_figures, folder, monkeypatch, trainings):
    """On the images of CIFAR-10 (here others in their place)."""
    shutil.copytree(ROOT / "figures/published", folder / "figures/published")
    before = files_in(folder)
    drawn = utils.draw_synthetic(num_train=80, num_test=100)
    monkeypatch.setattr(utils, "load_cifar10", lambda _: drawn[1:3])
    monkeypatch.setattr(utils, "CIFAR10_SIZES", (60, 20, 100))
    digest = hashlib.sha256(drawn[1].tobytes() + drawn[2].tobytes()).hexdigest()
    monkeypatch.setattr(utils, "CIFAR10_FINGERPRINT", digest[:16])
    shown = ex3_convnet.main(["--question=2a", "--num_epochs=1", "--precision=float32"])
    assert len(shown) == len(trainings) == 2
    assert len([*folder.glob("figures/cifar-10/ex3_convnet/records/*")]) == 2
    assert before.items() <= files_in(folder).items()


def test_what_is_recorded_is_skipped_and_run_again_only_on_demand(small, trainings, capsys):
    ex3_convnet.main([*TWO_A, "--seeds=2"])
    first = files_in(next(small.glob("figures/*/*/records")))
    assert sorted(path.name[-10:] for path in first) == 2 * ["seed0.json"] + 2 * ["seed1.json"]
    assert len(trainings) == 4
    capsys.readouterr()
    assert len(ex3_convnet.main([*TWO_A, "--seeds=3"])) == 6
    out = capsys.readouterr().out
    assert (len(trainings), out.count("recorded already")) == (6, 4)
    assert [line for line in out.splitlines() if line.startswith("Run ")] == [
        f"Run {i + 1} of 6: ConvNet{', batch norm' * (i > 2)}, seed {i % 3}" for i in range(6)]
    assert first.items() <= files_in(small).items()
    ex3_convnet.main([*TWO_A, "--rerun"])
    assert (len(trainings), len(records_in(small))) == (8, 6)


def test_a_redrawn_question_shows_the_runs_with_its_settings(small):
    for flag in "--reg=0.1", "--dropout=0.2", "--question=1", "--learning_rate=0.01":
        ex3_convnet.main([*ARGV, flag])
    for reg in 0.001, 0.1:
        record, = ex3_convnet.main([*ARGV, "--question=1", "--redraw", f"--reg={reg}"])
        assert record["identity"]["settings"]["reg"] == reg
    before = files_in(small)
    with pytest.raises(utils.Problem, match="no record in .*/synthetic-60/ex3_convnet has"):
        ex3_convnet.main([*ARGV, "--question=1", "--redraw", "--reg=0.2"])
    assert files_in(small) == before


def test_a_page_names_its_flags_and_shows_what_was_asked_or_compares_something(small):
    for rate, number in ("0.01", "3a"), ("0.02", "2a"), ("0.01", "2a"):
        ex3_convnet.main([*ARGV, f"--question={number}", f"--learning_rate={rate}"])
        place = small / "figures/synthetic-60/ex3_convnet"
        page = (place / "README.md").read_text(encoding="utf-8")
        assert f" --learning_rate={rate}" in page.splitlines()[0]
        assert ("## Question 3a" in page, "## Question 1" in page) == (rate == "0.01", False)
        assert page.count("| horizontal_flip |") == (rate == "0.01")


def test_a_run_that_fails_draws_no_older_one_of_its_settings(small):
    ex3_convnet.main(ARGV)
    before = files_in(small / "figures")
    path, = small.rglob("*.ckpt")
    path.write_bytes(b"")
    with pytest.raises(utils.Problem, match="damaged"):
        ex3_convnet.main([*ARGV, "--resume"])
    assert files_in(small / "figures") == before


def test_main_returns_the_records_that_it_shows(small, weights_file, capsys):
    """With keys that say what they are, a number for each epoch, and no word about others."""
    shown = ex3_convnet.main([*TINY, "--seed=4", "--augmentation=rotation"])
    for weights in weights_file, "none":
        shown += ex3_pretrained.main([*TINY, f"--pretrained={weights}", "--seeds=2"])
    assert capsys.readouterr().err == ""
    assert [(record["title"], record["seed"]) for record in shown] == [
        ("ConvNet, rotation", 4), *((f"VGG11-BN {of}", seed) for of in (
            "fine-tuned, weights weights", "from scratch") for seed in (0, 1))]
    for record in shown:
        assert {"title", "data", "classes", "seed", "identity", "result", "history", "confusion",
                "precision", "device", "torch", "commit", "finished"} <= record.keys()
        assert {"train_loss", "train_accuracy", "val_loss", "val_accuracy",
                "seconds"} <= record["history"].keys()
        finished = datetime.fromisoformat(record["finished"])
        assert finished.utcoffset() == timedelta(0)
        assert abs(datetime.now(UTC) - finished) < timedelta(minutes=5)
        assert {len(values) for values in record["history"].values()} == {2}
        confusion, result = np.array(record["confusion"]), record["result"]
        assert confusion.sum() == 100
        assert result["test_accuracy"] == pytest.approx(confusion.trace() / 100)
        assert result["val_accuracy"] == record["history"]["val_accuracy"][result["epoch"] - 1]
    assert records_in(small) == json.loads(json.dumps(shown))


def test_a_ninth_technique_is_a_function_and_a_row(folder, few, monkeypatch):
    """Without the report's numbers; it runs, is drawn and counts in what is the best."""
    monkeypatch.setitem(utils.AUGMENTATIONS, "negative", partial(
        lambda images, generator, ground: 1 - images, ground="white"))
    last = '("scaling", {"augmentation": "scaling"}, None, 76.7),'
    script = edited(folder, (last, f'{last} ("negative", {{"augmentation": "negative"}}),'))
    argv = [*ARGV, "--question=3a"]
    assert len(script.main(argv)) == 10
    assert "| negative | " in page(folder)
    for path in folder.glob("figures/*/*/records/*"):
        change(path, result={**json.loads(path.read_text())["result"],
                             "test_accuracy": 0.5 + 0.4 * ("negative" in path.name)})
    script.main([*argv, "--redraw"])
    line = next(line for line in page(folder).splitlines() if "is the best technique" in line)
    assert "50.0 % against 90.0 (negative)" in line
    assert {path.name for path in folder.glob("figures/*/*/*.png")} == {
        "figure_6.png", "figure_6_techniques.png", "same_conclusions.png"}
