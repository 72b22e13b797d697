"""Comparing runs: what the table, the CSV and the figures of a folder of results say of them."""

import json
import re
import shutil
from collections import Counter
from functools import partial

import numpy as np
import pytest
from conftest import TINY
from test_page import published, write_records
from test_records import ARGV, GELU, change, edited, page, rows_of
from test_statistics import welch_interval

import ex3_convnet
import utils

ROTATION = ('augmentation = "none"', 'augmentation = "rotation"')
SGD = ("torch.optim.Adam(", "torch.optim.SGD(")
CHANNELS = ("class ConvNet(", "CHANNELS = (16, *CHANNELS[1:])\n\n\nclass ConvNet(")
EDITS = {  # how a run is named: the edit of the script
    "norm_flag True": ("norm_flag = False", "norm_flag = True"),
    "dropout 0.3": ("dropout = 0 ", "dropout = 0.3 "),
    "augmentation rotation": ROTATION, "layers.2: GELU": GELU, "optimizer SGD": SGD,
    "layers.0 out_channels: 16": CHANNELS}

def table(out):
    """The rows of the last table of runs in an output, {heading: cell} each."""
    lines = out.rpartition("The runs in ")[2].splitlines()[1:]
    headings, *rows = [re.split("  +", line) for line in lines if "  " in line]
    return [dict(zip(headings, row)) for row in rows]

def test_each_run_is_named_by_what_distinguishes_it(small, monkeypatch, capsys):
    """The baseline, too; those that ran last stand last."""
    for edits in (), *((edit,) for edit in EDITS.values()):
        edited(small, *edits).main(ARGV)
    rotation = partial(utils.rotate, degrees=10)
    monkeypatch.setitem(utils.AUGMENTATIONS, "rotation", rotation)
    edited(small, ROTATION).main(ARGV)
    rows = table(capsys.readouterr().out)
    baseline, *names = [row["run"].split(", ") for row in rows]
    for words, name in zip([*EDITS, "augmentation rotation degrees: 10"], names, strict=True):
        assert words in name
        assert words not in baseline
    assert baseline[0]
    assert len({row["run"] for row in rows}) == len(rows)

@pytest.mark.parametrize(("first", "second", "words"), [
    *(([], [edit], words) for words, edit in EDITS.items()),
    ([SGD], [SGD, ("fused=True", "fused=True, momentum=0.9")], "momentum: 0.9"),
    ([("fused=True", "fused=True, amsgrad=True")], [], "amsgrad: True"),
    ([], [("nn.ReLU(inplace=True)", "nn.ReLU()")], "inplace: True"),
    ([], [("fused=True", "fused=True, betas=(0.8, 0.999)")], "betas 0: 0.8")])
def test_of_two_runs_the_difference_tells_them_apart(small, capsys, first, second, words):
    """It is the name of the run, whichever ran first."""
    for order in (first, second), (second, first):
        shutil.rmtree(small / "figures", ignore_errors=True)
        for edits in order:
            edited(small, *edits).main(ARGV)
        names = [row["run"] for row in table(capsys.readouterr().out)]
        assert sum(words in name for name in names) == 1
        assert words not in EDITS or words in names

def test_runs_that_share_their_first_difference_are_told_apart_by_their_ids(small, capsys):
    for beta in 0.8, 0.9:
        for eps in 1e-7, 1e-8:
            options = f"fused=True, betas=({beta}, 0.99), eps={eps}"
            edited(small, ("fused=True", options)).main(ARGV)
    names = [row["run"] for row in table(capsys.readouterr().out)]
    assert len(set(names)) == 4
    assert all(re.search(r"\([0-9a-f]{8}\)$", name) for name in names)

@pytest.mark.parametrize(("before", "last", "words"), [
    ((70, 71, 72), (80, 81, 82), "a real difference"),
    ((80, 81, 82), (70, 71, 72), "a real difference"),
    ((79, 81, 83), (80, 81, 82), "could be due to chance"),
    ((70, 70, 70), (80, 80, 80), "+10.0 points of test accuracy, the same"),
    ((70, 71), (80, 81, 82), "ConvNet lacks --seed=2 --seeds=1."),
    ((70, 71, 72), (80, 81), "norm_flag True lacks --seed=2 --seeds=1."),
    ((70,), (80,), "ConvNet lacks --seed=1 --seeds=2.")])
def test_a_sentence_says_whether_the_last_two_differ(folder, no_figures, capsys, before, last,
                                                     words):
    """Not an earlier one. By Welch's interval, where there are three seeds of each."""
    records = published("ConvNet, dropout 0.5")
    records[0]["finished"] = "2025-12-31T00:00:00+00:00"
    for title, accuracies, day in (("ConvNet", before, "2026-01-01"),
                                   ("ConvNet, batch norm", last, "2026-01-02")):
        for record, accuracy in zip(published(title), accuracies):
            record["result"]["test_accuracy"] = accuracy / 100
            record["finished"] = f"{day}T00:00:00+00:00"
            records.append(record)
    write_records(folder, records)
    ex3_convnet.main(["--redraw"])
    sentence, = (line for line in capsys.readouterr().out.splitlines() if words in line)
    assert sentence in page(folder)
    numbers = [float(number) for number in re.findall(r"[+-]\d+\.\d", sentence)]
    expected = []
    if "lacks" not in words:
        assert sentence.startswith("norm_flag True against ")
        expected = [10] if np.ptp(last) == 0 else welch_interval(last, before)
    assert numbers == pytest.approx(expected, abs=0.0501)

def test_the_csv_has_a_line_for_each_record_and_a_value_for_each_setting(small):
    """Also where a record is older than a setting of one's own, or this is called like another
    column; a commit is never a number."""
    ex3_convnet.main([*ARGV, "--seeds=2"])
    for path in small.rglob("records/*"):
        change(path, commit="1234e56")
    own = 'mixup = 0.2\nschool = "north"\nnetwork = "A"\n'
    edits = [("# --- training", f"{own}# --- training"), EDITS["norm_flag True"]]
    edited(small, *edits).main([*ARGV, "--seeds=3", "--note=Zoë's PC"])
    records = {path.stem: json.loads(path.read_text()) for path in small.rglob("records/*")}
    rows = rows_of(small)
    assert sorted(row["name"] for row in rows) == sorted(records)
    for row in rows:
        record = records[row["name"]]
        settings = record["settings"]
        assert row["network (setting)"] == settings.pop("network", "none")
        assert row["network"] == "ConvNet"
        for name, value in settings.items():
            assert row[name] == str(value)
        assert float(row["mixup"]) == settings.get("mixup", 0)
        assert row["school"] == settings.get("school", "none")
        assert float(row["test_accuracy"]) == record["result"]["test_accuracy"]
        assert row["seed"] == str(record["seed"])
        assert row["note"] == record["note"]
        assert row["name"].endswith("_zoë-s-pc") == (row["note"] == "Zoë's PC")
    runs = Counter((row["run"], row["mixup"], row["note"], row["commit"]) for row in rows)
    assert sorted((*run[2:], seeds) for run, seeds in runs.items()) == [
        ("Zoë's PC", "gnone", 3), ("none", "g1234e56", 2)]

def test_pooled_records_of_a_class_stand_in_one_row(small, capsys):
    """Of several machines, without a precision by name; one of another learning rate in its own."""
    argv = [*ARGV, "--precision=auto"]
    ex3_convnet.main([*argv, "--question=2a"])
    for path in [*small.glob("figures/*/*/records/*")]:
        same = json.loads(path.read_text())["identity"]
        same["settings"] = dict(reversed(same["settings"].items()))  # in another process
        for seed in range(1, 6):
            copy = shutil.copy(path, path.with_name(path.name.replace("seed0", f"seed{seed}")))
            change(copy, seed=seed, device=f"GPU {seed % 2}", precision="float16", torch="2.11.0",
                   commit="abc1234", compile=True, identity=same, note=f"student {seed}")
    ex3_convnet.main([*argv, "--norm_flag", "--learning_rate=0.01", "--seed=6"])
    assert len(ex3_convnet.main([*argv, "--question=2a", "--redraw"])) == 12
    lines = page(small).splitlines()
    assert [line[-5:] for line in lines if line.startswith("| with")] == ["| 6 |", "| 6 |"]
    caption = next(line for line in lines if "Accuracies are in %" in line)
    for words in ", 12 runs", "float16", "CPU", "GPU 0", "GPU 1":
        assert words in caption
    ex3_convnet.main([*TINY, "--redraw"])
    rows = table(capsys.readouterr().out)
    assert sorted(row["seeds"] for row in rows) == ["1", "6", "6"]
    assert sum("learning_rate 0.01" in row["run"] for row in rows) == 1
