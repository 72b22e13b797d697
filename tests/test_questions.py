"""Questions: what is run, what is not run again, and that tables and figures show the records."""

import json
import re
from functools import partial

import numpy as np
import pytest
from conftest import TINY, change_record, page_table, parse
from PIL import Image

import ex3_convnet
import ex3_pretrained
import utils


@pytest.fixture
def small(few, folder, small_convnet, trainings):
    """A small convnet on few images. The list of its trainings."""
    return trainings


def planned(script, *argv):
    return utils.plan(parse(*argv, script=script), script.QUESTIONS)


def numbers(cell):
    return [float(number.replace(",", "")) for number in re.findall(r"[+-]?[\d,]*\.?\d+", cell)]


# ---------------------------------------------- plan ----------------------------------------------


def test_the_questions_run_what_the_report_ran():
    plan = planned(ex3_convnet, "--question=all")
    assert {question: len(runs) for question, runs in plan.items()} == {
        "1": 1, "2a": 2, "2b": 2, "3a": 9, "3b": 13}
    assert [run.norm_flag for run in plan["2a"].values()] == [False, True]
    assert all((run.num_epochs, run.patience, run.earlystop) == (50, 10, True)
               for run in plan["2b"].values())
    assert [run.augmentation for run in plan["3a"].values()] == ["none", *utils.AUGMENTATIONS]
    assert [(run.norm_flag, run.dropout) for run in plan["3b"].values()] == [
        *[(True, i / 10) for i in range(10)], (False, 0.5), (False, 0.7), (False, 0.9)]
    assert all(run.norm_flag for run in plan["3a"].values())
    assert all(run.num_epochs == 20 for q in ("3a", "3b") for run in plan[q].values())
    plan = planned(ex3_pretrained, "--question=all")
    assert [run.frozen_norm for run in plan["4a"].values()] == ["eval", "train"]
    assert not any(run.fine_tune for run in plan["4a"].values())
    assert [run.pretrained for run in plan["4b"].values()] == [True, False]


def test_a_given_flag_counts_for_all_runs():
    plan = planned(ex3_convnet, "--question=2b", "--num_epochs=3", "--num_training=100")
    assert {(run.num_epochs, run.num_training) for run in plan["2b"].values()} == {(3, 100)}
    plan = planned(ex3_convnet, "--question=3a", "--norm_flag=False")
    assert not any(run.norm_flag for run in plan["3a"].values())


def test_a_given_flag_leaves_alone_the_run_that_differs_in_it():
    plan = planned(ex3_pretrained, "--question=4b", "--pretrained=w.pth")
    assert [run.pretrained for run in plan["4b"].values()] == ["w.pth", False]


def test_an_edited_setting_does_not_change_what_a_question_compares(monkeypatch):
    monkeypatch.setattr(ex3_convnet, "norm_flag", True)
    monkeypatch.setattr(ex3_convnet, "augmentation", "rotation")
    assert [run.norm_flag for run in planned(ex3_convnet, "--question=2a")["2a"].values()] == [
        False, True]
    assert planned(ex3_convnet, "--question=3a")["3a"]["no augmentation"].augmentation == "none"


@pytest.mark.parametrize(("question", "argument"), [
    ("3b", "--dropout=0.3"), ("3a", "--augmentation=none"), ("2a", "--norm_flag"),
    ("3b", "--norm_flag"), ("9", "--seed=1"), ("4a", "--seed=1")])
def test_what_makes_no_sense_in_a_question_is_refused(question, argument):
    with pytest.raises(utils.Problem) as problem:
        planned(ex3_convnet, f"--question={question}", argument)
    assert problem.value.status == 2


@pytest.mark.parametrize(("script", "question", "flag"), [
    (ex3_convnet, "2b", "earlystop=False"), (ex3_pretrained, "4a", "fine_tune"),
    (ex3_pretrained, "4b", "fine_tune=False")])
def test_no_row_of_a_table_is_another_run_than_it_says(script, question, flag):
    with pytest.raises(utils.Problem, match=f"{flag.split('=')[0]} is set by the runs of question "
                                            f"{question}: leave it out"):
        planned(script, f"--question={question}", f"--{flag}")


def test_two_rows_of_a_table_are_never_the_same_run():
    with pytest.raises(utils.Problem, match="Model 1 .* and Model 2 .* of question 4b would"):
        planned(ex3_pretrained, "--question=4b", "--pretrained=False")


@pytest.mark.parametrize(("seed", "seeds", "expected"), [
    (0, "3", [0, 1, 2]), (5, "2", [5, 6]), (0, "1", [0]), (0, "7,0,5", [7, 0, 5])])
def test_seeds_are_a_number_or_a_list(seed, seeds, expected):
    flags = parse(f"--seed={seed}", f"--seeds={seeds}")
    assert [run.seed for run in utils.each_seed(flags)] == expected


# ------------------------------------- what is not run again -------------------------------------


def test_what_is_recorded_is_not_run_again(small, capsys):
    ex3_convnet.main([*TINY, "--question=2a"])
    assert small == [("ConvNet", 0), ("ConvNet, batch norm", 0)]
    ex3_convnet.main([*TINY, "--question=1"])  # shares its run with 2a
    assert len(small) == 2
    assert "ConvNet, seed 0, on synthetic: recorded already, not run again" in (
        capsys.readouterr().out)
    ex3_convnet.main([*TINY, "--question=1", "--reg=0.1"])
    ex3_convnet.main([*TINY, "--question=1", "--seeds=2"])
    assert small[2:] == [("ConvNet", 0), ("ConvNet", 1)]
    ex3_convnet.main([*TINY, "--question=1", "--rerun"])
    assert small[4:] == [("ConvNet", 0)]


def test_an_interrupted_question_goes_on_where_it_was(small, monkeypatch):
    def interrupted(run, data, train=ex3_convnet.train):
        if run.flags.norm_flag:
            raise KeyboardInterrupt
        return train(run, data)

    with monkeypatch.context() as patch:
        patch.setattr(ex3_convnet, "train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ex3_convnet.main([*TINY, "--question=2a"])
    ex3_convnet.main([*TINY, "--question=2a"])
    assert small == [("ConvNet", 0), ("ConvNet, batch norm", 0)]


def test_a_run_that_questions_share_is_run_once_even_by_rerun(small, monkeypatch):
    questions = {name: ex3_convnet.QUESTIONS[name] for name in ("1", "2a")}
    monkeypatch.setattr(ex3_convnet, "QUESTIONS", questions)
    ex3_convnet.main([*TINY, "--question=1"])
    ex3_convnet.main([*TINY, "--question=all", "--rerun"])
    assert small[1:] == [("ConvNet", 0), ("ConvNet, batch norm", 0)]


def test_a_single_experiment_is_run_again(small):
    for _ in range(2):
        ex3_convnet.main(TINY)
    assert len(small) == 2


# --------------------------------------- tables and figures ---------------------------------------


def figures(folder):
    return {path.name for path in (folder / "figures/synthetic-60").glob("figure_*.png")}


@pytest.fixture
def like_cifar10(few):
    """Few images whose classes are those of CIFAR-10, so that the report's numbers are shown."""
    few.classes = list(utils.CIFAR10_CLASSES)


def check_table(text, results, question):
    """Each cell holds the mean over the records, the report's number, and their difference."""
    report = {run: dict(zip(question.columns, numbers)) for run, _, *numbers in question.rows}
    header, _, *rows = [line.strip("|").split("|") for line in text.splitlines()
                        if line.startswith("|")]
    columns = [name.strip() for name in header][1:-1]
    assert [row[0].strip() for row in rows] == list(report)
    for row in rows:
        records = results[row[0].strip()]
        assert int(row[-1]) == len(records)
        for column, cell in zip(columns, row[1:-1]):
            if column.startswith("Test accuracy against"):
                assert (cell.strip() == "–") == (row[0].strip() == question.baseline)
                if cell.strip() != "–":
                    own, base = (np.mean([100 * record["result"]["test_accuracy"] for record in of])
                                 for of in (records, results[question.baseline]))
                    assert numbers(cell)[0] == pytest.approx(own - base, abs=0.051)
                continue
            if "recalibrated" in column and "no batch norm" in row[0]:
                assert cell.strip() == "–"
                continue
            ours = np.mean([expected(record, column) for record in records])
            theirs = report[row[0].strip()][column]
            assert numbers(cell)[0] == pytest.approx(ours, abs=0.051)
            if theirs is not None:
                inside = numbers(cell[cell.index("("):])
                assert inside == [theirs, pytest.approx(ours - theirs, abs=0.051)]
            else:
                assert "(" not in cell


def expected(record, column):
    """The number of a column, from the JSON of a record."""
    history, epoch = record["history"], record["result"]["epoch"] - 1
    if column == "Model size":
        return record["result"]["model_size"]
    if column == "Early stop checkpoint":
        return 1 + history["val_accuracy"].index(max(history["val_accuracy"]))
    if column.startswith("Test"):
        return 100 * record["result"]["test_accuracy" + "_first_1000" * ("first" in column)]
    if "recalibrated" in column:
        return 100 * record["result"]["val_accuracy_recalibrated"]
    if column.startswith("Augmented"):
        return 100 * history.get("val_accuracy_augmented", history["val_accuracy"])[epoch]
    key = "train_accuracy" if "rain" in column else "val_accuracy"
    return 100 * history[key][-1 if column.startswith("Latest") else epoch]


def drawn(monkeypatch, what):
    """A list that grows by what(figure) with each figure, which is not saved."""
    found = []
    monkeypatch.setattr(utils, "save_figure", lambda figure, *_: found.append(what(figure)))
    return found


def read_back(folder, results):
    """The records that were returned, as they are in the files."""
    files = utils.load_records(folder / "figures/synthetic-60")
    for runs in results.values():
        for records in runs.values():
            assert all(record in files for record in records)
    return results


def test_every_question_of_the_convnet(like_cifar10, small, folder, capsys, monkeypatch):
    results = read_back(folder, ex3_convnet.main([*TINY, "--question=all"]))
    assert len(small) == 1 + 1 + 2 + 8 + 12  # 27: 1 and 2a share one; 2a, 3a and 3b one
    place, output = folder / "figures/synthetic-60", capsys.readouterr().out
    for table, question in enumerate(("2a", "2b", "3a", "3b"), start=1):
        text = page_table(place, f"Table {table}")
        check_table(text, results[question], ex3_convnet.QUESTIONS[question])
        assert "synthetic, 60 training images, seed 0, 1 epochs" in text
        assert "95 % intervals" in text
        assert text in output
    assert figures(folder) == {
        "figure_1_2_filters.png", "figure_3.png", "figure_4.png", "figure_5.png", "figure_6.png",
        "figure_6_techniques.png", "figure_7.png"}
    for name in figures(folder):
        with Image.open(place / name) as image:
            assert len(image.convert("RGB").getcolors(2**24)) > 50

    # all of it but the picture of the techniques can be drawn again from the records alone
    before = {path.name: path.read_bytes() for path in [*place.glob("*.md"), *place.glob("*.csv")]}
    assert before.keys() == {"README.md", "results.csv"}
    drawn = figures(folder)
    for path in [*place.glob("*.md"), *place.glob("*.csv"), *place.glob("*.png")]:
        if path.name != "figure_6_techniques.png":
            path.unlink()
    monkeypatch.setattr(utils, "load_data", None)
    monkeypatch.setattr(ex3_convnet, "train", None)
    ex3_convnet.main([*TINY, "--question=all", "--redraw"])
    assert {name: (place / name).read_bytes() for name in before} == before
    assert figures(folder) == drawn


def test_a_run_without_record_leaves_no_empty_axes(small, folder, monkeypatch):
    results = ex3_convnet.main([*TINY, "--question=2b"])
    titles = drawn(monkeypatch, lambda figure: [axis.get_title() for axis in figure.axes])
    ex3_convnet.plot_early_stopping(results["2b"], None)
    del results["2b"]["with batch norm"]
    ex3_convnet.plot_early_stopping(results["2b"], None)
    assert titles == [["without batch norm", "with batch norm"], ["without batch norm"]]


def test_every_question_of_the_pretrained_network(like_cifar10, folder, weights_file):
    results = read_back(folder, ex3_pretrained.main([
        *TINY, "--question=all", f"--pretrained={weights_file}"]))
    for table, question in (5, "4a"), (6, "4b"):
        text = page_table(folder / "figures/synthetic-60", f"Table {table}")
        check_table(text, results[question], ex3_pretrained.QUESTIONS[question])
        assert "eval mode on clean images" in text
    assert figures(folder) == {f"figure_{name}{kind}.png" for kind in ("", "_filters") for name in (
        "8_part_4a", "8_part_4a_frozen_norm_train", "9_part_4b_1", "10_part_4b_2")}


def test_a_question_has_the_same_figures_with_every_seed(like_cifar10, folder, weights_file):
    ex3_pretrained.main([*TINY, "--question=4b", "--seed=5", f"--pretrained={weights_file}"])
    assert figures(folder) == set(ex3_pretrained.QUESTIONS["4b"].figures)


def test_an_experiment_draws_its_filters_curves_and_classes(small, folder, weights_file):
    ex3_convnet.main(TINY)
    ex3_pretrained.main([*TINY, f"--pretrained={weights_file}"])
    assert {path.name for path in folder.rglob("*.png")} == {
        "convnet_filters.png", "convnet_learning_curves.png", "convnet_classes.png",
        "figure_9_part_4b_1_filters.png", "figure_9_part_4b_1.png", "part_4b_1_classes.png"}


def test_several_seeds_show_mean_and_deviation(like_cifar10, small, folder):
    results = ex3_convnet.main([*TINY, "--question=2a", "--seeds=3"])
    text = page_table(folder / "figures/synthetic-60", "Table 1")
    check_table(text, results["2a"], ex3_convnet.QUESTIONS["2a"])
    accuracies = [100 * r["result"]["val_accuracy"] for r in results["2a"]["with batch norm"]]
    assert f"{np.mean(accuracies):.1f} ± {np.std(accuracies, ddof=1):.1f} (82.9" in text
    assert "3 seeds" in text


def test_redrawing_without_records_is_an_error(folder):
    with pytest.raises(utils.Problem, match="there is no record of question 2a"):
        ex3_convnet.main([*TINY, "--question=2a", "--redraw"])


def test_a_table_tells_which_run_is_missing(small, folder, capsys):
    ex3_convnet.main([*TINY, "--question=1"])
    ex3_convnet.main([*TINY, "--question=2a", "--redraw"])
    output = capsys.readouterr()
    assert "| with batch norm | not run |" in output.out
    assert "Question 2a: no record with these flags of with batch norm" in output.err


def test_redrawing_all_leaves_out_a_question_without_records(small, folder, capsys):
    ex3_convnet.main([*TINY, "--question=1"])
    results = ex3_convnet.main([*TINY, "--question=all", "--redraw"])
    assert list(results) == ["1"]  # and 2a has no other record than that of 1
    assert "Question 3b: no record with these flags of no dropout; drop" in capsys.readouterr().err
    with pytest.raises(utils.Problem, match="no record of question 1, 2a, 2b, 3a, 3b with"):
        ex3_convnet.main([*TINY, "--question=all", "--redraw", "--reg=0.5"])


def test_an_older_record_without_recalibrated_accuracy_can_be_drawn(small, folder, capsys):
    ex3_convnet.main([*TINY, "--norm_flag"])
    path = next(folder.rglob("*.json"))
    change_record(path, lambda record: record["result"].pop("val_accuracy_recalibrated") and None)
    ex3_convnet.main([*TINY, "--question=3b", "--redraw"])
    row = next(line for line in capsys.readouterr().out.splitlines()
               if line.startswith("| no dropout |"))
    assert row.endswith("| – | – | 1 |")  # and the baseline is not compared with itself
    assert numbers(row)[1] == pytest.approx(
        100 * json.loads(path.read_text())["result"]["val_accuracy"], abs=0.051)


def test_figures_are_drawn_of_few_runs_too(small, folder):
    ex3_convnet.main([*TINY, "--dropout=0.5"])
    assert list(ex3_convnet.main([*TINY, "--question=3b", "--redraw"])["3b"]) == [
        "dropout 0.5, no batch norm"]
    ex3_convnet.main([*TINY, "--norm_flag", "--augmentation=rotation"])
    assert list(ex3_convnet.main([*TINY, "--question=3a", "--redraw"])["3a"]) == ["rotation"]
    assert {"figure_6.png", "figure_7.png"} <= figures(folder)


def test_a_row_without_a_number_for_each_column_is_refused():
    for numbers in ((1.0,), (1.0, 2.0, 3.0), ()):
        with pytest.raises(ValueError, match=f"mine: {len(numbers)} numbers for 2 columns"):
            utils.Question(title="Table 9", rows=[("mine", {}, *numbers)], columns={
                "Train accuracy": "train_accuracy", "Test accuracy": "test_accuracy"})
    assert utils.Question(rows=[("mine", {})]).columns == {}


def test_a_ninth_technique_is_an_entry_and_a_row(like_cifar10, small, folder, monkeypatch):
    """It trains, and stands in Table 3, Figure 6 and the picture of the techniques."""
    monkeypatch.setitem(utils.AUGMENTATIONS, "half_turn", partial(utils.rotate, degrees=180))
    question = ex3_convnet.QUESTIONS["3a"]
    monkeypatch.setattr(question, "rows", [
        question.rows[0], ("half turn", {"augmentation": "half_turn"}, None, 12.3)])
    figures = drawn(monkeypatch, lambda figure: [
        axis.get_title() or axis.get_ylabel() for axis in figure.axes])
    results = ex3_convnet.main([*TINY, "--question=3a"])
    assert small == [("ConvNet, batch norm", 0), ("ConvNet, batch norm, half_turn", 0)]
    check_table(page_table(folder / "figures/synthetic-60", "Table 3"), results["3a"], question)
    assert [title.split(":")[0] for title in figures[0]] == ["no augmentation", "half turn"]
    assert figures[1] == ["original", "half_turn"]
    record = results["3a"]["half turn"][0]
    assert record["recipe"]["augmentation"] == {"half_turn": {"function": "rotate", "degrees": 180}}
    assert parse("--augmentation=half_turn+rotation").augmentation == "half_turn+rotation"
