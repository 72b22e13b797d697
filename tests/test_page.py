"""The page of a data set, its results.csv, and the figures of the classes, from made-up records."""

import csv
import json
import re

import numpy as np
import pytest
from conftest import made_record

import ex3_convnet
import ex3_pretrained
import utils

REDRAW = ["--question=all", "--redraw"]
SIZES = {"train": 300, "val": 100, "test": 400}


@pytest.fixture(autouse=True)
def nothing_drawn(folder, no_drawing):
    """An empty folder; the figures are files whose content is not the point."""


@pytest.fixture
def page(folder):
    """A function that gives the text of the page as it is now."""
    return lambda: (folder / "figures/cifar-10/README.md").read_text(encoding="utf-8")


def make_record(script, flags, accuracy, classes=utils.CIFAR10_CLASSES):
    """A record as Run.record makes it, of a run that has this share of the images right."""
    facts = {"data": {"fingerprint": "0123456789abcdef", "classes": list(classes), **SIZES},
             "batch_norm_shards": None}
    if script is ex3_pretrained:
        facts["pretrained"] = "bbd30ac9" if flags.pretrained else None
    run = script.experiment(flags, facts)
    random = np.random.default_rng([flags.seed, *run.title.encode()])
    kinds = {"reported": ("val", "test"), "latest": ("val", "test")}
    kinds |= {"augmented": ("val",)} if flags.augmentation != "none" else {}
    kinds |= {"recalibrated": ("val",)} if vars(flags).get("norm_flag") else {}
    labels = {part: np.arange(SIZES[part]) % len(classes) for part in ("val", "test")}
    predictions = {kind: {part: np.where(
        random.random(SIZES[part]) < accuracy, labels[part],
        (labels[part] + random.integers(1, len(classes), SIZES[part])) % len(classes))
        for part in parts} for kind, parts in kinds.items()}
    right = {(kind, part): float((of == labels[part]).mean())
             for kind, parts in predictions.items() for part, of in parts.items()}
    val = right["reported", "val"]
    result = {"epoch": 1, "best_epoch": 1 if flags.earlystop else None, "model_size": 7_678_474,
              "val_accuracy_augmented": right.get(("augmented", "val"), val), "val_accuracy": val,
              "train_accuracy": 0.9, "latest_train_accuracy": 0.9,
              "latest_val_accuracy": right["latest", "val"],
              "test_accuracy": right["reported", "test"],
              "test_accuracy_first_1000": right["reported", "test"],
              "latest_test_accuracy": right["latest", "test"]}
    if "recalibrated" in predictions:
        result["val_accuracy_recalibrated"] = right["recalibrated", "val"]
    history = {"train_loss": [1.0], "val_loss": [1.0], "train_accuracy": [0.9],
               "val_accuracy": [val], "seconds": [5.0]}
    return {
        "title": run.title, "data": "CIFAR-10", "seed": flags.seed, "precision": "float32",
        "recipe": run.recipe, "result": result, "history": history, "seconds": 1800.0,
        "device": "CPU, fast", "code": {"commit": "a" * 40, "changed": ["a.py", "b.py"]},
        "finished": "2024-01-01 00:00:00", "versions": {"torch": "2.9"},
        "labels": {part: utils.pack(of) for part, of in labels.items()},
        "predictions": {kind: {part: utils.pack(of) for part, of in parts.items()}
                        for kind, parts in predictions.items()}}


def record_all(script, accuracies=None, seeds=1, questions=None, **options):
    """Write records of a script's questions; accuracies: {run: accuracy}, 0.7 of the others.

    Returns the records by their question and run: {(question, run): [record, ...]}; a run that
    questions share has the accuracy of the first.
    """
    flags, made, shared = utils.parse_flags(vars(script), []), {}, {}
    for name in questions or script.QUESTIONS:
        planned = utils.plan(flags.replace(question=name), script.QUESTIONS)[name]
        for run, one in planned.items():
            for seed in range(seeds):
                what = script.describe(one), seed
                if what not in shared:
                    shared[what] = make_record(script, one.replace(seed=seed),
                                               (accuracies or {}).get(run, 0.7), **options)
                    utils.save_record(shared[what], utils.results_folder(one))
                made.setdefault((name, run), []).append(shared[what])
    return made


def table(text, title):
    """The cells of a table in Markdown: {first cell: {heading: cell}}."""
    lines = text[text.index(title):].split("\n\n")[1].splitlines()
    header, rule, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    assert set(rule) == {"---"}
    assert {len(row) for row in (rule, *rows)} == {len(header)}
    return {row[0]: dict(zip(header, row)) for row in rows}


def claims(text, script):
    """The rows of what the report claimed: [(question, claim, ours, verdict)]."""
    lines = text[text.index(f"## Did the report hold up? ({script})"):].split("\n\n")[1]
    return [tuple(line.strip("| ").split(" | ")) for line in lines.splitlines()[2:]]


def paired(a, b):
    """The difference of two records on the test images and its interval, by the formula."""
    (a, b), n = ([utils.unpack(r["predictions"]["reported"]["test"])
                  == utils.unpack(r["labels"]["test"]) for r in (a, b)]), SIZES["test"]
    b, c = (a & ~b).sum(), (b & ~a).sum()
    middle, half = 100 * (b - c) / n, 196 * (b + c - (b - c) ** 2 / n) ** 0.5 / n
    return f"{middle:+.1f} [{middle - half:+.1f}, {middle + half:+.1f}] (of one seed each)"


# --------------------------------------------- tables ---------------------------------------------


def test_a_table_compares_the_test_accuracy_with_the_baseline(page):
    made = record_all(ex3_convnet, {"no augmentation": 0.6, "rotation": 0.9}, questions=["3a"])
    ex3_convnet.main(REDRAW)
    rows = table(page(), "**Table 3**")
    cells = {run: row['Test accuracy against "no augmentation"'] for run, row in rows.items()}
    assert list(cells) == [run for run, *_ in ex3_convnet.QUESTIONS["3a"].rows]
    assert cells.pop("no augmentation") == "–"
    for run, cell in cells.items():
        assert cell == paired(made["3a", run][0], made["3a", "no augmentation"][0])
    assert page().count("of a difference") == 1  # the legend


def test_a_table_without_baseline_or_its_records_compares_nothing(page):
    record_all(ex3_convnet, questions=["2b", "3b"])
    for path in utils.FOLDER.rglob("convnet-batch-norm_*.json"):
        path.unlink()  # "no dropout"
    ex3_convnet.main(REDRAW)
    assert not any("against" in heading for heading in table(
        page(), "**Table 2**")["with batch norm"])
    rows = table(page(), "**Table 4**")
    assert {row['Test accuracy against "no dropout"'] for row in rows.values()} == {"–"}
    assert rows["no dropout"]["Train accuracy"] == "not run"
    assert rows["dropout 0.9"]["Seeds"] == "1"
    assert "of a difference" not in page()


def test_one_seed_has_wilsons_interval_and_several_their_deviation(page):
    one = record_all(ex3_convnet, questions=["2a"])["2a", "with batch norm"][0]["result"]
    ex3_convnet.main(REDRAW)
    cells = table(page(), "**Table 1**")["with batch norm"]
    for heading, key, part in (("Validation accuracy", "val_accuracy", "val"),
                               ("Test accuracy", "test_accuracy", "test"),
                               ("Test accuracy, first 1,000", "test_accuracy", "test")):
        low, high = (100 * limit for limit in utils.wilson(one[key], SIZES[part]))
        assert cells[heading].startswith(f"{100 * one[key]:.1f} [{low:.1f}, {high:.1f}] (8")
    assert cells["Train accuracy"] == "90.0 (98.1, -8.1)"  # it is no sample of other images
    assert cells["Model size"] == "7,678,474 (7,682,826, -4,352)"

    records = record_all(ex3_convnet, seeds=3, questions=["2a"])
    ex3_convnet.main(REDRAW)
    rows = table(page(), "**Table 1**")
    x, y = ([100 * r["result"]["test_accuracy"] for r in records["2a", run]]
            for run in ("with batch norm", "without batch norm"))
    cells = rows["with batch norm"]
    assert cells["Test accuracy"] == (
        f"{np.mean(x):.1f} ± {np.std(x, ddof=1):.1f} (81.9, {round(np.mean(x), 1) - 81.9:+.1f})")
    samples = [utils.right_answers(records["2a", run], "reported", "test")
               for run in ("with batch norm", "without batch norm")]
    assert cells['Test accuracy against "without batch norm"'] == utils.points(
        utils.difference_of(*samples), *samples)
    assert [len(sample) for sample in samples] == [3, 3]
    assert cells["Seeds"] == "3"


def test_the_first_1000_test_images_have_an_interval_of_1000_images():
    record = {"recipe": {"data": {"val": 500, "test": 10_000}},
              "result": {"test_accuracy": 0.8, "test_accuracy_first_1000": 0.8,
                         "latest_val_accuracy": 0.8}}
    for key, images in (("test_accuracy", 10_000), ("test_accuracy_first_1000", 1000),
                        ("latest_val_accuracy", 500)):
        low, high = utils.wilson(0.8, images)
        assert utils.summarize([record], key) == (80, 100 * low, 100 * high)


def test_a_number_that_one_of_two_records_has_is_shown_as_that_of_one_seed():
    new, old = made_record(0), made_record(1)
    del old["result"]["val_accuracy"]
    assert utils.table_cell([new, old], "val_accuracy", None) == (
        utils.table_cell([new], "val_accuracy", None))
    assert "[" in utils.table_cell([new, old], "val_accuracy", None)
    assert "±" in utils.table_cell([new, made_record(1)], "val_accuracy", None)


@pytest.mark.parametrize(("ours", "theirs", "words"), [
    ((0,), (), "seed 0"), ((0,), (0,), "seed 0"), ((0,), (10,), "seed 0 or 10"),
    ((0, 1), (0, 1), "2 seeds"), ((0, 1, 2), (0,), "1 to 3 seeds")])
def test_a_caption_tells_how_many_seeds_the_runs_have(ours, theirs, words):
    records = [*(made_record(seed) for seed in ours),
               *(made_record(seed, run_flags={"reg": 0.5}) for seed in theirs)]
    assert utils.caption(records) == f"photos, 900 training images, {words}"


# ---------------------------------------------- page ----------------------------------------------


def test_the_page_has_the_questions_in_order_with_their_tables(page):
    record_all(ex3_convnet)
    record_all(ex3_pretrained)
    ex3_pretrained.main(REDRAW)  # in whatever order the scripts run
    ex3_convnet.main(REDRAW)
    assert re.findall(r"^#+ .*", page(), re.MULTILINE) == [
        "# Results on CIFAR-10, 300 training images",
        "## Did the report hold up? (ex3_convnet.py)",
        *(f"## Question {name}" for name, question in ex3_convnet.QUESTIONS.items()
          if question.columns),  # Question 1 has figures only, and drawing is off here
        "## Did the report hold up? (ex3_pretrained.py)",
        *(f"## Question {name}" for name in ex3_pretrained.QUESTIONS), "## Behind these numbers"]
    assert re.findall(r"^\*\*(.*?)\*\*", page(), re.MULTILINE) == [
        f"Table {i}" for i in range(1, 7)]
    for script in (ex3_convnet, ex3_pretrained):
        for question in script.QUESTIONS.values():
            if question.columns:
                assert list(table(page(), f"**{question.title}**")) == [
                    run for run, *_ in question.rows]


def test_the_page_names_the_settings_of_its_runs(page, monkeypatch):
    """Given as a flag or edited: a trial is not taken for the report's recipe."""
    for name, value in ("reg", 0.25), ("batch_size", 100):
        monkeypatch.setattr(ex3_convnet, name, value)
    record_all(ex3_convnet, questions=["2a"])
    monkeypatch.setattr(ex3_convnet, "reg", 1e-3)
    ex3_convnet.main([*REDRAW, "--reg=0.25"])
    line, = re.findall(r"^Settings of ex3_convnet.py, .*", page(), re.MULTILINE)
    assert " batch_size 100, " in line
    assert " reg 0.25, " in line
    assert "resume" not in line


def test_the_page_shows_the_figures_that_are_there(page, folder):
    record_all(ex3_convnet, questions=["2a", "2b"])
    (folder / "figures/cifar-10/figure_4.png").touch()
    (folder / "figures/cifar-10/figure_9.png").touch()
    ex3_convnet.main(REDRAW)
    assert re.findall(r"!\[(.*)\]\((.*)\)", page()) == [("figure_4.png", "figure_4.png")]
    assert page().index("**Table 1**") < page().index("figure_4.png") < page().index("Question 2b")


def test_a_question_that_is_run_leaves_the_others_on_the_page(page):
    record_all(ex3_convnet, questions=["2a", "2b"])
    ex3_convnet.main(["--question=2a", "--redraw"])
    assert "## Question 2a" in page()
    assert "## Question 2b" in page()


def test_the_part_of_the_other_script_stays(page):
    record_all(ex3_convnet, questions=["2a"])
    ex3_convnet.main(REDRAW)
    part = page()[page().index("<!-- ex3_convnet.py -->"):page().index("## Behind")]
    record_all(ex3_pretrained, {"frozen": 0.5})
    ex3_pretrained.main(REDRAW)
    assert part in page()
    assert "## Question 4b" in page()
    record_all(ex3_pretrained, {"frozen": 0.2})
    ex3_pretrained.main(REDRAW)
    assert part in page()
    assert page().count("## Question 4b") == page().count("## Question 2a") == 1
    record_all(ex3_convnet, {"without batch norm": 0.1}, questions=["2a"])
    ex3_convnet.main(REDRAW)
    assert part not in page()
    assert page().count("## Question 4b") == page().count("## Question 2a") == 1


def test_the_page_judges_the_claims_by_the_records(page):
    made = record_all(ex3_convnet, {"with batch norm": 0.9, "dropout 0.9": 0.05})
    made |= record_all(ex3_pretrained, {"frozen": 0.4, "Model 1 (fine-tuned)": 0.9})
    ex3_convnet.main(REDRAW)
    ex3_pretrained.main(REDRAW)
    rows = claims(page(), "ex3_convnet.py")
    assert [row[:3] for row in rows] == [(c.question, c.claim, c.report)
                                         for c in ex3_convnet.CLAIMS]
    verdicts = {claim: (ours, verdict.strip("*")) for _, claim, _, ours, verdict in rows}
    a, b = (made["2a", run][0] for run in ("with batch norm", "without batch norm"))
    assert verdicts["batch norm is better"] == (paired(a, b), "holds")
    ours, verdict = verdicts["at 0.9 the network is at chance"]
    assert verdict == "holds"
    share = made["3b", "dropout 0.9"][0]["result"]["test_accuracy"]
    assert ours.startswith(f"{100 * share:.1f} % [")
    assert not any("not measured" in row for row in rows)
    rows = claims(page(), "ex3_pretrained.py")
    assert rows[0][3:] == (
        paired(made["4b", "Model 1 (fine-tuned)"][0], made["4a", "frozen"][0]), "**holds**")


def test_a_claim_without_records_is_not_measured_though_another_question_has_such_a_run(page):
    """2a and 2b both have a run without batch norm: only 2b's has trained past its best epoch."""
    record_all(ex3_convnet, questions=["2a"])
    ex3_convnet.main(REDRAW)
    rows = [row for row in claims(page(), "ex3_convnet.py") if row[0] == "2b"]
    assert len(rows) == 2
    assert {row[3:] for row in rows} == {("–", "**not measured**")}


def test_other_classes_than_cifar10s_are_not_compared_with_the_report(page):
    record_all(ex3_convnet, questions=["2a"], classes=["cat", "dog"])
    ex3_convnet.main(REDRAW)
    assert "Did the report hold up" not in page()
    assert "the report's" not in page()
    assert re.fullmatch(r"[\d.]+ \[[\d.]+, [\d.]+\]",
                        table(page(), "**Table 1**")["with batch norm"]["Test accuracy"])


def test_the_page_ends_with_what_is_behind_its_numbers(page):
    record_all(ex3_convnet, questions=["2a"])
    ex3_convnet.main(REDRAW)
    assert page().split("## Behind these numbers\n\n")[1] == (
        "- Data: fingerprint 0123456789abcdef\n- Runs: 2, 1.0 hours; float32 (2 runs)\n"
        "- Machine: CPU, fast (2 runs)\n- PyTorch: 2.9 (2 runs)\n"
        "- Code: commit aaaaaaa with changes in a.py and b.py (2 runs)\n")


def test_markdown_takes_no_part_of_the_page_for_something_else(page, folder):
    """Blank lines around headings, tables and figures; no link where brackets are intervals."""
    record_all(ex3_convnet)
    for question in ex3_convnet.QUESTIONS.values():
        for name in question.figures:
            (folder / "figures/cifar-10" / name).touch()
    ex3_convnet.main(REDRAW)
    lines = page().splitlines()
    kinds = ["blank" if not line else "comment" if line.startswith("<!--") else "table" if (
        line[0] == "|") else "item" if line.startswith("- ") else "text" for line in lines]
    for (line, kind), after in zip(zip(lines, kinds), kinds[1:]):
        if kind in ("text", "table", "item"):
            assert after == "blank" or after == kind != "text", line
    assert set(re.findall(r"\]\((.*?)\)", page())) == {
        name for question in ex3_convnet.QUESTIONS.values() for name in question.figures}
    assert all(line == line.rstrip() for line in lines)
    assert "\n\n\n" not in page()
    assert page().endswith("\n")


# ------------------------------------------ csv, redraw ------------------------------------------


def test_the_csv_has_a_line_for_each_run_and_seed(folder):
    record_all(ex3_convnet, seeds=2, questions=["1", "2a", "2b"])
    ex3_convnet.main(REDRAW)
    files = {(r["title"], r["seed"]): r for r in map(json.loads, (
        path.read_text() for path in folder.rglob("*.json")))}
    with open(folder / "figures/cifar-10/results.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(files) == 2 * 4  # questions 1 and 2a share a run
    assert {(row["run"], int(row["seed"])) for row in rows} == set(files)
    for row in rows:
        record = files[row["run"], int(row["seed"])]
        result = record["result"]
        assert None not in row
        assert None not in row.values()
        for key, value in result.items():
            assert row[key] == ("" if value is None else str(value))
        if "val_accuracy_recalibrated" not in result:
            assert row["val_accuracy_recalibrated"] == ""
        assert {part: int(row[f"{part}_images"]) for part in SIZES} == SIZES
        assert (row["epochs"], row["seconds"], row["precision"]) == ("1", "1800", "float32")
        assert row["device"] == "CPU, fast"  # with its comma
        assert row["code"] == "commit aaaaaaa with changes in a.py and b.py"


def test_redrawing_makes_page_and_csv_from_the_records_alone(folder, monkeypatch):
    record_all(ex3_convnet, {"rotation": 0.4}, seeds=2)
    record_all(ex3_pretrained)
    monkeypatch.setattr(utils, "load_data", None)
    place, found = folder / "figures/cifar-10", []
    for _ in range(2):
        for script in (ex3_convnet, ex3_pretrained):
            script.main(REDRAW)
        found.append([(place / name).read_bytes() for name in ("README.md", "results.csv")])
        for name in ("README.md", "results.csv"):
            (place / name).unlink()
    assert found[0] == found[1]
    assert sorted(path.name for path in place.iterdir()) == ["records"]


# -------------------------------------------- classes --------------------------------------------


def drawn(monkeypatch, plot, *arguments):
    """The axes of the figures that are drawn."""
    figures = []
    monkeypatch.setattr(utils, "save_figure", lambda figure, *_: figures.append(figure.axes))
    plot(*arguments, utils.FOLDER / "figure.png")
    return figures


def bars(axis):
    """The middles and the limits of the one row of error bars in the axes, from left to right."""
    (line, _, (segments,)), = axis.containers
    return np.column_stack([line.get_xdata(),
                            [segment[:, 0] for segment in segments.get_segments()]])


def a_record(accuracy, seed=0, *, norm=False, classes=utils.CIFAR10_CLASSES):
    flags = utils.parse_flags(vars(ex3_convnet), [])
    return make_record(ex3_convnet, flags.replace(seed=seed, norm_flag=norm), accuracy, classes)


def test_the_confusion_matrix_is_that_of_the_predictions(monkeypatch):
    record = a_record(0.6)
    labels, predicted = (utils.unpack(of["test"]).tolist() for of in (
        record["labels"], record["predictions"]["reported"]))
    confusion = np.zeros((10, 10))
    for label, prediction in zip(labels, predicted):
        confusion[label, prediction] += 1
    confusion *= 100 / 40  # images of each class

    (left, right), = drawn(monkeypatch, utils.plot_classes, record)
    assert 100 * np.asarray(left.images[0].get_array()) == pytest.approx(confusion)
    assert {text.get_position()[::-1]: text.get_text() for text in left.texts} == {
        place: f"{share:.0f}" for place, share in np.ndenumerate(confusion)}
    assert (left.get_xlabel(), left.get_ylabel()) == ("predicted", "true class")
    expected = [[share, *(100 * limit for limit in utils.wilson(share / 100, 40))]
                for share in confusion.diagonal()]
    assert bars(right) == pytest.approx(np.array(expected))
    assert right.containers[0][0].get_ydata() == pytest.approx(range(10))
    for axis in (left, right):  # both have the first class at the top
        assert [tick.get_text() for tick in axis.get_yticklabels()] == list(utils.CIFAR10_CLASSES)
        assert axis.get_ylim() == (9.5, -0.5)


@pytest.mark.parametrize(("count", "names", "texts"), [(15, 15, 225), (16, 16, 0), (31, 0, 0)])
def test_of_many_classes_the_matrix_has_no_numbers_and_no_names(monkeypatch, count, names, texts):
    record = a_record(0.6, classes=[f"class {i}" for i in range(count)])
    (left, right), = drawn(monkeypatch, utils.plot_classes, record)
    assert len(left.texts) == texts
    assert len(left.get_xticks()) == len(left.get_yticks()) == names
    assert len(right.get_yticks()) == min(count, 30)  # the weakest


@pytest.mark.parametrize("seeds", [1, 3])
def test_class_by_class_two_runs_are_compared_all_classes_together(monkeypatch, seeds):
    a, b = ([a_record(accuracy, seed, norm=norm) for seed in range(seeds)]
            for accuracy, norm in ((0.8, True), (0.5, False)))
    expected = []
    for i in range(10):
        samples = [{}, {}]
        for sample, records in zip(samples, (a, b)):
            for record in records:
                labels, predicted = (utils.unpack(of["test"]) for of in (
                    record["labels"], record["predictions"]["reported"]))
                sample[record["seed"]] = predicted[labels == i] == i
        expected.append(utils.difference_of(*samples, level=0.995))  # Bonferroni, ten classes
    (axis,), = drawn(monkeypatch, utils.plot_class_differences, a, b, "a against b")
    assert bars(axis) == pytest.approx(np.array(expected))
    assert [tick.get_text() for tick in axis.get_yticklabels()] == list(utils.CIFAR10_CLASSES)
    assert axis.yaxis_inverted()


def test_records_without_predictions_have_no_figures_of_the_classes(monkeypatch):
    older = {key: value for key, value in a_record(0.6).items()
             if key not in ("labels", "predictions")}
    assert drawn(monkeypatch, utils.plot_classes, older) == []
    assert drawn(monkeypatch, utils.plot_class_differences, [older], [a_record(0.6)], "") == []
    newer = a_record(0.6, 1)
    (axis,), = drawn(monkeypatch, utils.plot_class_differences, [older, newer], [newer], "")
    assert bars(axis) == pytest.approx(np.zeros((10, 3)))  # the newer one with itself
