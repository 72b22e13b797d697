"""Comparing runs: what the table, the CSV and the figures of a folder of results say of them."""

import csv
import json
import re
import shutil
import statistics
from collections import Counter
from datetime import datetime
from functools import partial

import pytest
from conftest import TINY, records_in
from test_page import published
from test_records import ARGV, GELU, change, edited
from test_statistics import welch_interval

import ex3_convnet
import utils

ROTATION = ('augmentation = "none"', 'augmentation = "rotation"')
SGD = ("torch.optim.Adam(", "torch.optim.SGD(")
CHANNELS = ("class ConvNet(", "CHANNELS = (16, *CHANNELS[1:])\n\n\nclass ConvNet(")
EDITS = {  # how a run is named: the edit of the script
    "norm_flag True": ("norm_flag = False", "norm_flag = True"),
    "dropout 0.3": ("dropout = 0 ", "dropout = 0.3 "),
    "augmentation rotation": ROTATION, "layers.2: GELU": GELU, "optimizer: SGD": SGD,
    "layers.0 out_channels: 16": CHANNELS}


def table(out):
    """The rows of the last table of runs in an output, {heading: cell} each."""
    lines = out.rpartition("The runs in ")[2].splitlines()[1:]
    headings, *rows = [re.split("  +", line) for line in lines if "  " in line]
    return [dict(zip(headings, row)) for row in rows]


def results_of(folder):
    place, = folder.glob("figures/*/ex3_convnet")
    return place


def rows_of_csv(folder):
    text = (results_of(folder) / "results.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


def write_records(folder, records):
    place = folder / "figures/cifar-10/ex3_convnet/records"
    place.mkdir(parents=True)
    for i, record in enumerate(records):
        (place / f"{i:02}.json").write_text(json.dumps(record))


def test_each_run_is_named_by_what_distinguishes_it(small, monkeypatch, capsys):
    """The baseline, too; those that ran last stand last."""
    for edits in (), *((edit,) for edit in EDITS.values()):
        edited(small, *edits).main(ARGV)
    rotation = partial(utils.rotate, degrees=10)
    monkeypatch.setitem(utils.AUGMENTATIONS, "rotation", rotation)
    edited(small, ROTATION).main(ARGV)
    rows = table(capsys.readouterr().out)
    baseline, *names = [row["run"].split(", ") for row in rows]
    for words, name in zip([*EDITS, "rotation degrees: 10"], names, strict=True):
        assert words in name
        assert words not in baseline
    assert "rotation degrees: 45" in names[2]
    assert baseline[0]
    assert len({row["run"] for row in rows}) == len(rows)
    lines = (results_of(small) / "README.md").read_text(encoding="utf-8").splitlines()
    of_page = [line.strip("| ").split(" | ")[0] for line in lines if line.startswith("| ")]
    assert of_page == ["run", *(row["run"] for row in rows)]


@pytest.mark.parametrize("words", EDITS)
def test_of_two_runs_the_difference_is_the_name(small, capsys, words):
    ex3_convnet.main(ARGV)
    edited(small, EDITS[words]).main(ARGV)
    baseline, other = [row["run"] for row in table(capsys.readouterr().out)]
    assert other == words
    assert baseline.split()[:-1] == other.split()[:-1]
    assert baseline != other


@pytest.mark.parametrize(("first", "second", "words"), [
    ([SGD], [SGD, ("fused=True", "fused=True, momentum=0.9")], "momentum: 0.9"),
    ([("fused=True", "fused=True, amsgrad=True")], [], "amsgrad: True"),
    ([], [("nn.ReLU(inplace=True)", "nn.ReLU()")], "inplace: True"),
    ([], [("fused=True", "fused=True, betas=(0.8, 0.999)")], "betas 0: 0.8")])
def test_what_only_one_of_two_runs_has_or_does_tells_them_apart(small, capsys, first, second,
                                                                words):
    """In an optimizer or a layer of the same kind, whichever of the two ran first."""
    for order in (first, second), (second, first):
        shutil.rmtree(small / "figures", ignore_errors=True)
        for edits in order:
            edited(small, *edits).main(ARGV)
        names = [row["run"] for row in table(capsys.readouterr().out)]
        assert sum(words in name for name in names) == 1


def test_means_and_deviations_in_the_table_are_those_of_the_records(folder, no_figures, capsys):
    write_records(folder, published())
    ex3_convnet.main(["--redraw"])
    groups = {}
    for record in published():
        groups.setdefault(json.dumps(record["identity"], sort_keys=True), []).append(record)
    ends = {key: max(datetime.fromisoformat(record["finished"]) for record in group)
            for key, group in groups.items()}
    rows = table(capsys.readouterr().out)
    for row, key in zip(rows, sorted(groups, key=ends.get), strict=True):
        results = [record["result"] for record in groups[key]]
        assert int(row["seeds"]) == len(results)
        for heading, name in {"train": "train_accuracy", "validation": "val_accuracy",
                              "test": "test_accuracy"}.items():
            values = [100 * result[name] for result in results]
            expected = [statistics.mean(values)]
            if len(values) > 1:
                expected.append(statistics.stdev(values))
            numbers = [float(number) for number in row[heading].split(" ± ")]
            assert numbers == pytest.approx(expected, abs=0.0501)


@pytest.mark.parametrize(("before", "last", "words"), [
    ((70, 71, 72), (80, 81, 82), "more than chance"), ((80, 81, 82), (70, 71, 72), "more than"),
    ((79, 81, 83), (80, 81, 82), "may be chance"), ((70, 71), (80, 81, 82), "3 seeds of each"),
    ((70, 71, 72), (80, 81), "3 seeds of each"), ((70,), (80,), "3 seeds of each")])
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
    assert sentence in (results_of(folder) / "README.md").read_text(encoding="utf-8")
    numbers = [float(number) for number in re.findall(r"[+-]\d+\.\d", sentence)]
    if min(len(before), len(last)) >= 3:
        assert numbers == pytest.approx(welch_interval(last, before), abs=0.0501)
        assert sentence.startswith("norm_flag True against ")
    else:
        assert numbers == []


def test_several_seeds_draw_one_set_of_figures_and_redraw_the_comparison(folder, few,
                                                                         small_convnet):
    assert [record["seed"] for record in ex3_convnet.main([*ARGV, "--seeds=3"])] == [0, 1, 2]
    place = results_of(folder)
    kinds = [path.stem.rpartition("_")[2] for path in place.glob("*.png")]
    assert sorted(kinds) == ["classes", "curves", "filters", "runs"]
    pictures = re.findall(r"\]\((.+)\)", (place / "README.md").read_text(encoding="utf-8"))
    assert sorted(pictures) == sorted(path.name for path in place.glob("*.png"))
    records, comparison = records_in(folder), (place / "results.csv").read_bytes()
    for name in "runs.png", "README.md", "results.csv":
        (place / name).unlink()
    assert len(ex3_convnet.main([*TINY, "--redraw"])) == 3
    assert (place / "results.csv").read_bytes() == comparison
    assert "![Runs](runs.png)" in (place / "README.md").read_text(encoding="utf-8")
    assert (place / "runs.png").exists()
    assert records_in(folder) == records


def test_a_note_changes_no_identity(small, capsys):
    """It stands in the record, its file name and the CSV."""
    ex3_convnet.main([*ARGV, "--note=Anna B., laptop"])
    ex3_convnet.main([*ARGV, "--seed=1"])
    noted, plain = sorted(records_in(small), key=lambda record: record["seed"])
    assert (noted["note"], plain["note"]) == ("Anna B., laptop", "none")
    assert noted["identity"] == plain["identity"]
    paths = sorted(path.name for path in small.rglob("records/*"))
    assert ["anna-b" in path for path in paths] == [True, False]
    rows = rows_of_csv(small)
    assert [row["note"] for row in rows] == ["Anna B., laptop", "none"]
    assert rows[0]["run"] == rows[1]["run"]
    assert [row["seeds"] for row in table(capsys.readouterr().out)] == ["2"]


def test_the_csv_has_a_line_for_each_record_and_a_value_for_each_setting(small):
    """Also where a record is older than a setting of one's own; a commit is never a number."""
    ex3_convnet.main([*ARGV, "--seeds=2"])
    own = ("# --- training recipe", 'mixup = 0.2\nschool = "north"\n# --- training recipe')
    edited(small, own, EDITS["norm_flag True"]).main([*ARGV, "--seeds=3"])
    records = {path.stem: json.loads(path.read_text()) for path in small.rglob("records/*")}
    rows = rows_of_csv(small)
    assert sorted(row["name"] for row in rows) == sorted(records)
    for row in rows:
        record = records[row["name"]]
        settings = record["settings"]
        for name, value in settings.items():
            assert row[name] == str(value)
        assert float(row["mixup"]) == settings.get("mixup", 0)
        assert row["school"] == settings.get("school", "none")
        assert float(row["test_accuracy"]) == record["result"]["test_accuracy"]
        assert row["seed"] == str(record["seed"])
        assert row["commit"].startswith("g")
    seeds = Counter((row["run"], row["mixup"]) for row in rows)
    assert sorted(seeds.values()) == [2, 3]


def test_pandas_reads_the_csv(small):
    pandas = pytest.importorskip("pandas")
    ex3_convnet.main([*ARGV, "--seeds=2"])
    ex3_convnet.main([*ARGV, "--norm_flag"])
    for path in small.rglob("records/*"):
        change(path, commit="1234e56")
    ex3_convnet.main([*TINY, "--redraw"])
    frame = pandas.read_csv(results_of(small) / "results.csv")
    assert len(frame) == 3
    assert frame["norm_flag"].dtype == bool
    assert set(frame["commit"]) == {"g1234e56"}
    assert sorted(frame.groupby("run")["seed"].count()) == [1, 2]
    settings = records_in(small)[0]["settings"]
    assert not frame[[*settings]].isna().any().any()


def test_pooled_records_of_a_class(small, capsys):
    """Forty files: one of another network, one of another learning rate, one a seed twice, one
    damaged. What can be pooled is, and what is left out is named."""
    question = [*ARGV, "--question=2a"]
    ex3_convnet.main(question)
    place = results_of(small) / "records"
    for path in list(place.glob("*.json")):
        for seed in range(1, 20):
            copy = place / path.name.replace("seed0", f"seed{seed}")
            shutil.copy(path, copy)
            change(copy, seed=seed, note=f"student {seed}")
    edited(small, GELU).main([*ARGV, "--norm_flag", "--seed=5"])
    ex3_convnet.main([*ARGV, "--norm_flag", "--learning_rate=0.01", "--seed=6"])
    plain = {seed: next(place.glob(f"convnet_*_seed{seed}.json")) for seed in range(20)}
    plain[5].unlink()
    plain[6].unlink()
    change(plain[7], seed=8, finished="2099-01-01T00:00:00+00:00")
    plain[9].write_text(plain[9].read_text()[:1000])
    assert len(list(place.iterdir())) == 40
    capsys.readouterr()
    assert len(ex3_convnet.main([*question, "--redraw"])) == 16 + 20
    lines = (place.parent / "README.md").read_text(encoding="utf-8").splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| with")]
    assert [(row[0], row[-1]) for row in rows] == [
        ("without batch norm", "16"), ("with batch norm", "20")]
    told = capsys.readouterr()
    for path in plain[9], plain[8]:
        assert f"{path.name} is left out" in told.err
    assert len(re.findall("1 run with .*GELU left out", told.out)) == 1

    ex3_convnet.main([*TINY, "--redraw"])
    rows = table(capsys.readouterr().out)
    assert sorted(row["seeds"] for row in rows) == ["1", "1", "16", "20"]
    assert sum("GELU" in row["run"] for row in rows) == 1
    assert sum("learning_rate 0.01" in row["run"] for row in rows) == 1


def test_a_figure_compares_the_last_six_runs(folder, monkeypatch, capsys):
    write_records(folder, published())
    drawn = []
    monkeypatch.setattr(utils, "save_figure", lambda figure, *_, **__: drawn.append(figure))
    ex3_convnet.main(["--redraw"])
    names = [row["run"] for row in table(capsys.readouterr().out)]
    curves, dots = drawn[0].axes
    labels = [text.get_text().replace("\n", " ") for text in curves.get_legend().get_texts()]
    assert labels == names[-6:]
    assert len(dots.get_yticks()) == 6
    utils.plt.close(drawn[0])


def test_a_single_epoch_is_seen_in_the_curves(folder, few, small_convnet, monkeypatch):
    """A line through a single point would be nothing."""
    drawn = []
    monkeypatch.setattr(utils, "save_figure", lambda figure, *_, **__: drawn.append(figure))
    ex3_convnet.main([*ARGV, "--seeds=2"])
    axes = [axis for figure in drawn for axis in figure.axes if axis.get_xlabel() == "epoch"]
    lines = [line for axis in axes for line in axis.lines]
    assert len(axes) == 3
    assert len(lines) >= 3 + 6 + 6  # a mean beside two seeds; training, too, in the last two axes
    assert {line.get_marker() for line in lines} == {"o"}
    for figure in drawn:
        utils.plt.close(figure)
