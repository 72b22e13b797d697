"""Page, tables and figures: drawn from records, of any number of rows, names and classes."""

import json
import re
import shlex
import shutil
import statistics

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, parse

import ex3_convnet
import ex3_pretrained
import utils
from utils import Question, Row

PUBLISHED = ROOT / "figures/published"
FOLDERS = sorted(str(path.parent.relative_to(PUBLISHED))
                 for path in PUBLISHED.glob("*/*/README.md"))
SCRIPTS = {"ex3_convnet": ex3_convnet, "ex3_pretrained": ex3_pretrained}

def published(*titles):
    """The convnet's records on CIFAR-10 with these titles (all without one), sorted by seed."""
    records = utils.load_records(PUBLISHED / "cifar-10/ex3_convnet/records")
    return [record for record in records if not titles or record["title"] in titles]

def write_records(folder, records):
    place = folder / "figures/cifar-10/ex3_convnet/records"
    place.mkdir(parents=True)
    for i, record in enumerate(records):
        (place / f"{i:02}.json").write_text(json.dumps(record))

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

def read_page(name):
    """The lines of a published page, and the flags that its first one has."""
    lines = (PUBLISHED / name / "README.md").read_text(encoding="utf-8").splitlines()
    return lines, shlex.split(lines[0].partition(".py")[2])

def test_three_folders_are_published():
    assert len(FOLDERS) == 3

@pytest.mark.parametrize("name", FOLDERS)
def test_published_pages_are_those_of_the_records_byte_by_byte(folder, name):
    place = folder / "published" / name
    shutil.copytree(PUBLISHED / name, place)
    for path in place.glob("*.*"):
        if path.name != "figure_6_techniques.png":  # needs the images
            path.unlink()
    lines, flags = read_page(name)
    questions = [line.split()[-1] for line in lines if line.startswith("## Question ")]
    question = questions[0] if len(questions) == 1 else "all"
    data, script = name.split("/")
    SCRIPTS[script].main(["--results=published", f"--dataset={data.replace('-', '')}", "--redraw",
                          f"--question={question}", *flags])
    pictures = re.findall(r"!\[.*?\]\((.+?)\)", "\n".join(lines))
    assert sorted(pictures) == sorted(path.name for path in place.glob("*.png"))
    assert {path.name for path in (PUBLISHED / name).iterdir()} == {
        "README.md", "results.csv", "records", *pictures}
    for text in "README.md", "results.csv":
        assert (place / text).read_bytes() == (PUBLISHED / name / text).read_bytes(), text

@pytest.mark.parametrize("name", FOLDERS)
def test_every_number_of_a_published_table_is_that_of_the_records(name):
    """Means and standard deviations over the seeds to the last digit, and the report's numbers."""
    lines, flags = read_page(name)
    script = SCRIPTS[name.split("/")[1]]
    records = utils.load_records(PUBLISHED / name / "records")
    settings = parse(*flags, "--question=all", script=script)
    found = utils.find_results(settings, script.QUESTIONS, records, [])
    places = [i for i, line in enumerate(lines) if line.startswith("**Table")]
    shown = re.findall("## Question (.+)", "\n".join(lines))
    assert len(places) == len([number for number in shown if script.QUESTIONS[number].columns])
    for i in places:
        number = re.findall("## Question (.+)", "\n".join(lines[:i]))[-1]
        question = script.QUESTIONS[number]
        table = [line.strip("| ").split(" | ") for line in lines[i + 4:i + 4 + len(found[number])]]
        for (row, *cells, seeds), records in zip(table, found[number].values(), strict=True):
            assert found[number][row] == records
            assert int(seeds) == len(records)
            report, = (known.report for known in question.rows if known.name == row)
            for key, cell in zip(question.columns.values(), cells, strict=True):
                scale, half_a_digit = (100, 0.0501) if "accuracy" in key else (1, 0.501)
                values = [scale * record["result"][key] for record in records
                          if key in record["result"]]
                expected = [statistics.mean(values)] if values else []
                if len(values) > 1 and key != "model_size":
                    expected.append(statistics.stdev(values))
                if key in report and name.startswith("cifar-10"):
                    expected.append(report[key])
                numbers = [float(text) for text in re.findall(r"[\d.]+", cell.replace(",", ""))]
                assert numbers == pytest.approx(expected, abs=half_a_digit)

@pytest.mark.parametrize(("changes", "beside"), [
    ({}, True), ({"train": 48_000}, False), ({"val": 500}, False),
    ({"fingerprint": "12"}, False)])
def test_the_reports_numbers_stand_beside_full_cifar_10_only(folder, figures, changes, beside):
    records = published("ConvNet", "ConvNet, batch norm")
    for record in records:
        record["identity"]["data"] |= changes
    write_records(folder, records)
    ex3_convnet.main(["--redraw", "--question=2a"])
    page = (folder / "figures/cifar-10/ex3_convnet/README.md").read_text(encoding="utf-8")
    words = ("(report ", "Report: test 79.9")
    assert [word in page for word in words] == [beside] * 2
    lines = [line for figure in figures for axis in figure.axes for line in axis.lines]
    assert ("D" in [line.get_marker() for line in lines]) == beside

@pytest.mark.parametrize(("rows", "name"), [
    (1, "{}"), (2, "a $5 100 % \\frac$ a|b {}"),
    (12, "holiday photos of 2019 to 2024, all cameras and all trips, {}")])
def test_figures_grow_with_their_rows(folder, figures, monkeypatch, rows, name):
    """Whatever their names: one seed and epoch, several, early stopping, and no batch norm."""
    kinds = [published("ConvNet, batch norm, rotation")[:1], published("ConvNet, batch norm")[:3],
             published("ConvNet, early stopping")[:2], published("ConvNet, dropout 0.5")[:1]]
    for record in sum(kinds, []):
        record["data"] = name.format("data")
    first = kinds[0][0]
    first["history"] = {key: values[:1] for key, values in first["history"].items()}
    runs = {name.format(i): kinds[i % 4] for i in range(rows)}
    questions = {number: Question("?", [Row(run, {}) for run in runs])
                 for number in ("2b", "3a", "3b")}
    monkeypatch.setattr(ex3_convnet, "QUESTIONS", questions)
    claims = [utils.Claim("3a", f"{run} is better", run, constant=10.0, above=0) for run in runs]
    verdicts = [utils.judge(claim, {"3a": runs}) for claim in claims]
    with utils.plt.style.context(utils.STYLE):
        for number in questions:
            ex3_convnet.draw(number, runs, folder, None)
        utils.plot_learning_curves(runs, name.format("title"), folder)
        utils.plot_runs(runs, folder, "script")
        utils.plot_summary({run: ("3a", run) for run in runs}, questions, {"3a": runs}, folder)
        utils.plot_conclusions(verdicts, folder, with_report=False)
    assert len(figures) == (6 if rows == 1 else 7)  # one row is no summary
    axes = [axis for figure in figures for axis in figure.axes]
    lines = [line for axis in axes if axis.get_xlabel() == "epoch" for line in axis.lines]
    assert rows > 1 or {line.get_marker() for line in lines} == {"o"}  # a single epoch is seen
    for axis in axes:
        box, (width, height) = axis.get_window_extent(), axis.figure.bbox.size
        assert 0 <= box.x0 <= box.x0 + 50 < box.x1 <= width
        assert 0 <= box.y0 <= box.y0 + 50 < box.y1 <= height

def test_an_early_stop_is_marked_only_where_a_run_has_stopped(folder, figures):
    records = published("ConvNet, early stopping")[:2]
    records[1]["settings"]["num_epochs"] = len(records[1]["history"]["val_loss"])
    ex3_convnet.draw("2b", {"early stopping, with batch norm": records}, folder, None)
    squares = [line for line in figures[0].axes[0].lines if line.get_marker() == "s"]
    assert [line.get_xdata()[0] for line in squares] == [len(records[0]["history"]["val_loss"])]

def test_ten_panels_in_three_columns_have_the_epochs_below_each_column():
    _, axes = utils.new_figure(10, 3, 2, 2, sharex=True, sharey=True)
    for axis in axes[-3:]:
        assert axis.xaxis.get_major_ticks()[0].label1.get_visible()

def test_a_flat_loss_is_not_on_the_frame_and_other_data_fill_the_zoom(folder, figures):
    records = published("ConvNet, batch norm")[:1]
    records[0]["history"] |= dict.fromkeys(("train_loss", "val_loss"), [2.3] * 20)
    records[0]["identity"]["data"]["train"] = 500
    utils.plot_learning_curves({"": records}, "", folder)
    low, high = figures[0].axes[0].get_ylim()
    assert low < 2.2 < 2.35 < high
    ex3_convnet.draw("3b", {"no dropout": records}, folder, None)
    assert figures[1].axes[1].get_ylim() == (0, 101)

def test_a_class_name_that_the_font_lacks_is_a_code_that_the_output_explains(
        folder, figures, capsys):
    record, = published("ConvNet")[:1]
    record["classes"][3:5] = "猫", "犬"
    utils.plot_classes([record], folder, "")
    labels = [label.get_text() for label in figures[0].axes[0].get_yticklabels()]
    assert labels[2:6] == ["bird", r"\u732b", r"\u72ac", "dog"]
    assert capsys.readouterr().out == "In the figure, \\u732b is 猫, \\u72ac is 犬\n"

def test_the_caption_names_the_settings_that_all_runs_share():
    records = published("ConvNet, batch norm, dropout 0.5", "ConvNet, batch norm, dropout 0.7")
    assert ", norm_flag True, " in utils.caption(records)
    assert "dropout" not in utils.caption(records)
    assert ", dropout 0.5, norm_flag True, " in utils.caption(records[:1])

def test_a_page_shows_no_picture_of_other_runs(small):
    ex3_convnet.main([*TINY, "--question=1"])
    place, = small.glob("figures/*/*")
    (place / "summary.png").write_bytes(b"a picture of Question 2a")
    ex3_convnet.main([*TINY, "--question=1", "--redraw"])
    assert "summary.png" not in (place / "README.md").read_text(encoding="utf-8")

def test_the_caption_says_that_seeds_ran_on_different_code():
    records = published("ConvNet")[:3]
    for record, commit in zip(records, ("a", "b", "a")):
        record["commit"] = commit
    assert utils.caption(records).endswith(", 3 runs, 2 versions of the code")
    assert "versions" not in utils.caption([records[0], records[2]])

def test_curves_show_the_numbers_of_a_record(folder, figures):
    record = published("ConvNet")[0]
    utils.plot_learning_curves({"": [record]}, "", folder)
    for axis, quantity, factor in zip(figures[0].axes, ("loss", "accuracy"), (1, 100)):
        shown = {line.get_label(): list(line.get_ydata()) for line in axis.lines}
        for label, key in ("train", f"train_{quantity}"), ("validation", f"val_{quantity}"):
            expected = [factor * value for value in record["history"][key]]
            assert shown[label] == pytest.approx(expected)

def test_the_confusion_matrix_is_in_percent_of_the_true_class(folder, figures):
    record = published("ConvNet")[0]
    record["confusion"] = (8 * np.eye(10, dtype=int)).tolist()
    record["confusion"][0][1] = 24  # of 32 images of class 0
    utils.plot_classes([record], folder, "")
    shown = figures[0].axes[0].images[0].get_array()
    assert shown[0, :2].tolist() == [25, 75]
    assert shown[1, 1] == 100

def test_dots_and_intervals_are_those_of_the_records(folder, figures):
    records = published("ConvNet, batch norm")
    accuracies = [100 * record["result"]["test_accuracy"] for record in records]
    utils.plot_runs({"a": records}, folder, "script")
    shown = {line.get_label(): line.get_xdata() for line in figures[0].axes[1].lines}
    assert list(shown["one seed"]) == pytest.approx(accuracies)
    assert shown["mean"][0] == pytest.approx(statistics.mean(accuracies))
    claim = utils.Claim("2a", "", "a", constant=10.0, above=0)
    verdict = utils.judge(claim, {"2a": {"a": records}})
    utils.plot_conclusions([verdict], folder, with_report=False)
    shown = {line.get_label(): line.get_xdata() for line in figures[1].axes[0].lines}
    assert list(shown["95 % interval"]) == [verdict.difference.low, verdict.difference.high]
    assert shown["ours"][0] == pytest.approx(statistics.mean(accuracies) - 10)

def test_a_figure_compares_the_last_six_runs(folder, figures):
    experiments = utils.group_experiments(published())
    utils.plot_runs(experiments, folder / "runs.png", "script")
    _, dots = figures[0].axes
    legend, = figures[0].legends
    labels = [text.get_text().replace("\n", " ") for text in legend.get_texts()]
    assert labels == list(experiments)[-6:]
    assert len(dots.get_yticks()) == 6

def test_beside_the_matrix_stand_the_mistakes(folder, few, figures, small_convnet):
    """Each picture is a test image that the network in the checkpoint takes for another class."""
    ex3_convnet.main(TINY)
    path, = folder.rglob("*.ckpt")
    model = ex3_convnet.build_model(parse(), 10).eval()
    model.load_state_dict(utils.load_checkpoint(path)["model"])
    name, classes, images, labels, sizes = utils.make_synthetic()
    figure = next(figure for figure in figures if "mistakes" in figure.get_suptitle())
    for axis in figure.axes[1:]:
        pixels = axis.images[0].get_array()
        index, = (images == pixels).all((1, 2, 3)).nonzero()[0]
        assert index >= sizes["train"] + sizes["val"]
        logits = model(torch.tensor(pixels).permute(2, 0, 1)[None] / 127.5 - 1)
        probability, predicted = logits.softmax(1).max(1)
        assert predicted != labels[index]
        words, _, percent = axis.get_title().rpartition(" with ")
        assert words == f"{classes[labels[index]]}, taken for\n{classes[predicted]}"
        assert float(percent.strip("%")) == pytest.approx(100 * probability.item(), abs=0.06)
    assert len(figure.axes) == 9
