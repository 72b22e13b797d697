"""What a call leaves behind: records, figures, page and CSV, as a user meets them."""

import json
import re
import shutil
from datetime import UTC, datetime, timedelta
from functools import partial

import matplotlib
import numpy as np
import pytest
from conftest import TINY, parse, records_in
from test_records import ARGV, change, edited, page, rows_of

import ex3_convnet
import ex3_pretrained
import utils

TWO_A = [*ARGV, "--question=2a"]
LINE = " ".join(ARGV)
RECORDED = "recorded already"

# runs command lines on few images, each as Python runs a script
DRIVER = """
import runpy, sys
import utils
*made, _ = utils.make_synthetic(80, 100)
utils.make_synthetic = lambda: (*made, {"train": 60, "val": 20, "test": 100})
for command in sys.argv[1:]:
    sys.argv = command.split()
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        print("exit code 0")
    except SystemExit as end:
        print("exit code", end.code)
"""

def files_in(folder):
    return {path: path.read_bytes() for path in folder.rglob("*.*") if path.is_file()}

def epochs_in(output):
    """How many epochs were trained, by what was printed."""
    return len(re.findall(r"^epoch +\d+/", output, re.MULTILINE))

def test_plain_things_leave_each_their_own_results_and_nothing_that_git_sees(project):
    """README's first command, a sweep, a copy of the script, a question, settings that match no
    record, and a wrong one."""
    shutil.copy(project.folder / "ex3_convnet.py", project.folder / "mine.py")
    done = project(
        "-c", DRIVER, f"ex3_convnet.py {LINE} --norm_flag --learning_rate=0.0005",
        *(f"ex3_convnet.py {LINE} --seed=3 --learning_rate={rate}" for rate in (0.1, 0.01)),
        f"mine.py {LINE} --question=2a", f"ex3_convnet.py {LINE} --question=2a",
        "ex3_convnet.py --redraw", f"ex3_pretrained.py {LINE} --redraw",
        "ex3_convnet.py --redraw --question=all --results=figures/published --reg=0.3",
        "ex3_convnet.py --dropout=2", PYTHONIOENCODING="ascii")  # a terminal without a ±
    assert "Traceback" not in done.stderr, done.stderr
    assert re.findall("exit code (.*)", done.stdout) == [*5 * "0", *3 * "1", "2"]
    *lines, last = done.stderr.splitlines()
    assert [re.search(r"\.py: there are no records in .*figures|no record has these settings", line)
            is not None for line in lines] == [True, True, True]
    assert re.fullmatch(r"ex3_convnet\.py: .*--dropout.*0 to 0\.99.*", last)
    assert project.status().split() == ["??", "mine.py"]
    for script, runs in ("ex3_convnet", 5), ("mine", 2):
        place = project.folder / "figures/synthetic-60" / script
        assert f"{script}.py" in (place / "README.md").read_text(encoding="utf-8")
        assert (place / "figure_3_4.png").exists()
        assert len([*place.glob("records/*")]) == runs

def test_the_page_compares_all_runs_and_shows_figures_of_the_last(
        folder, few, small_convnet, capsys):
    """One set for its seeds. --redraw makes the comparison anew from the records."""
    ex3_convnet.main([*ARGV, "--dropout=0.3"])
    place, = folder.glob("figures/*/*")
    first = {path.name for path in place.glob("*.png")}
    capsys.readouterr()
    shown = ex3_convnet.main([*ARGV, "--norm_flag", "--seeds=3"])
    assert [record["seed"] for record in shown] == [0, 1, 2]
    second = {path.name for path in place.glob("*.png")} - first
    for names in first - {"runs.png"}, second:
        assert sorted(name.split("_")[-1] for name in names) == [
            "classes.png", "curves.png", "filters.png"]
    for text in capsys.readouterr().out, page(folder):
        rows = re.findall(r"^(?:\| )?(dropout .*?|norm_flag .*?)[ |]{2,}(\d) ", text, re.MULTILINE)
        assert rows == [("dropout 0.3, norm_flag False", "1"), ("norm_flag True", "3")]
    assert {*re.findall(r"\((.*?\.png)\)", page(folder))} == {"runs.png", *second}
    cells = []
    for name in "train_accuracy", "val_accuracy", "test_accuracy":
        values = [100 * record["result"][name] for record in shown]
        cells.append(f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}")
    assert f"| {' | '.join(cells)} |" in page(folder)
    rows, records = rows_of(folder), records_in(folder)
    for name in "runs.png", "README.md", "results.csv":
        (place / name).unlink()
    assert len(ex3_convnet.main([*TINY, "--redraw"])) == 4
    assert (rows_of(folder), records_in(folder)) == (rows, records)
    assert "![Runs](runs.png)" in page(folder)
    assert (place / "runs.png").exists()

def test_torchrun_shares_the_runs_of_a_question(project, photos):
    """Each is done once, and nobody draws."""
    argv = [*TWO_A, f"--dataset={photos}", "--num_training=16", "--num_validation=4", "--seeds=2"]
    done = project("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                   "ex3_convnet.py", *argv, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    place = next(project.folder.glob("figures/*/ex3_convnet"))
    assert [path.name for path in place.iterdir()] == ["records"]
    assert len(records_in(project.folder)) == 4
    assert [done.stdout.count(of) for of in ("Run 1 of 2", "Run 2 of 2", "--redraw")] == [2, 2, 2]
    for title in "ConvNet, seed", "ConvNet, batch norm, seed":
        assert [done.stdout.count(f"{title} {i}: ") for i in range(3)] == [1, 1, 0]

def test_each_process_of_torchrun_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "99")
    with pytest.raises(utils.UserError, match="^--device=cuda:99 cannot be used"):
        utils.choose_device(parse("--device=cuda"))

@pytest.mark.parametrize(("rank", "runs"), [("0", 1), ("1", 0)])
def test_a_single_experiment_under_torchrun_leaves_its_figures(
        folder, few, small_convnet, monkeypatch, rank, runs):
    """By the process that has run it; the other one ends well."""
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert len(ex3_convnet.main(ARGV)) == runs
    assert len([*folder.glob("figures/*/*/*_curves.png")]) == runs

@pytest.mark.parametrize("variables", [
    {"RANK": "1"}, {"RANK": ""}, {"RANK": "", "WORLD_SIZE": "", "LOCAL_RANK": ""},
    {"RANK": "1", "WORLD_SIZE": ""}, {"WORLD_SIZE": "2"}])
def test_variables_that_do_not_tell_a_process_its_share_change_nothing(
        small, monkeypatch, variables):
    """As a container or a batch system may leave them behind."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert len(ex3_convnet.main(TWO_A)) == 2
    assert (small / "figures/synthetic-60/ex3_convnet/README.md").exists()

def test_what_is_recorded_is_skipped_and_replaced_only_on_demand(small, capsys):
    ex3_convnet.main([*TWO_A, "--seeds=2"])
    first = files_in(next(small.glob("figures/*/*/records")))
    assert epochs_in(capsys.readouterr().out) == 4
    assert len(ex3_convnet.main([*TWO_A, "--seeds=3"])) == 6
    out = capsys.readouterr().out
    assert (epochs_in(out), out.count(RECORDED)) == (2, 4)
    assert re.findall(r"Run (\d of \d)\n(ConvNet.*?): ", out) == [
        (f"{i + 1} of 6", f"ConvNet{', batch norm' * (i > 2)}, seed {i % 3}") for i in range(6)]
    assert first.items() <= files_in(small).items()
    assert "replaces the record" not in out
    assert out.count("(--rerun trains it again") == 4
    path, = small.glob("figures/*/*/records/convnet_*seed0.json")
    result = json.loads(path.read_text())["result"]
    change(path, result={**result, "test_accuracy": 1}, finished="2001-02-03T00:00:00+00:00")
    ex3_convnet.main([*TWO_A, "--rerun"])
    out = capsys.readouterr().out
    assert (epochs_in(out), len(records_in(small))) == (2, 6)
    assert f"of 2001-02-03: test 100.0% -> {result['test_accuracy']:.1%}" in out

@pytest.mark.parametrize("place", ["figures", "figures/synthetic-60/ex3_convnet", "checkpoints"])
def test_a_folder_that_cannot_be_written_is_told_before_the_training(small, capsys, place):
    """Here since a file is in its place."""
    (small / place).parent.mkdir(parents=True, exist_ok=True)
    (small / place).write_text("")
    with pytest.raises(utils.UserError, match=f"{small}/{place}.* cannot be written"):
        ex3_convnet.main(ARGV)
    assert epochs_in(capsys.readouterr().out) == 0
    assert files_in(small).keys() <= {small / place}

def test_a_full_disk_is_one_sentence(capsys):
    def main():
        raise OSError(28, "No space left on device")

    with pytest.raises(SystemExit) as end:
        utils.run_script(main)
    assert end.value.code == 1
    assert capsys.readouterr().err.endswith("No space left on device\n")

def test_a_redrawn_question_shows_the_runs_with_its_settings(small):
    """Or says which settings there are."""
    for flag in "--reg=0.1", "--dropout=0.2", "--question=1", "--learning_rate=0.01":
        ex3_convnet.main([*ARGV, flag])
    for reg in 0.001, 0.1:
        record, = ex3_convnet.main([*ARGV, "--question=1", "--redraw", f"--reg={reg}"])
        assert record["identity"]["settings"]["reg"] == reg
    before = files_in(small)
    for number in "1", "2a":
        with pytest.raises(utils.UserError, match="^no record has these") as error:
            ex3_convnet.main([*ARGV, f"--question={number}", "--redraw", "--reg=0.2"])
        for words in "reg 0.1", "dropout 0.2", "learning_rate 0.01":
            assert words in str(error.value)
    assert files_in(small) == before

def test_missing_runs_of_a_question_are_named_and_what_is_there_is_drawn(small):
    ex3_convnet.main([*TWO_A, "--seeds=2"])
    for seed, words in (1, "without batch norm, seed 1"), (0, "without batch norm"):
        next(small.glob(f"figures/*/*/records/convnet_*seed{seed}.json")).unlink()
        with pytest.raises(utils.UserError, match=f"^question 2a lacks .*: {words}$") as error:
            ex3_convnet.main([*TWO_A, "--seeds=2", "--redraw"])
        assert error.value.exit_code == 1
        assert "| with batch norm |" in page(small)
    assert "| without batch norm |" not in page(small)

def test_a_page_names_its_flags_and_shows_what_was_asked_or_compares_something(small):
    for rate, number in ("0.01", "3a"), ("0.02", "2a"), ("0.01", "2a"):
        ex3_convnet.main([*ARGV, f"--question={number}", f"--learning_rate={rate}"])
        text = page(small)
        assert f" --learning_rate={rate}" in text.splitlines()[0]
        assert ("## Question 3a" in text, "## Question 1" in text) == (rate == "0.01", False)
        assert text.count("| horizontal_flip |") == (rate == "0.01")

def test_a_row_that_changes_what_is_no_setting_is_a_wrong_setting(small, monkeypatch):
    row = utils.Row("a|b", {"norm_flg": True})
    monkeypatch.setitem(ex3_convnet.QUESTIONS, "5", utils.Question("?", [row]))
    with pytest.raises(utils.UserError, match="^there is no setting norm_flg$") as error:
        ex3_convnet.main([*ARGV, "--question=5"])
    assert error.value.exit_code == 2

def test_a_run_that_fails_draws_no_older_one_of_its_settings(small):
    ex3_convnet.main(ARGV)
    path, = small.rglob("*.ckpt")
    path.write_bytes(b"")
    drawn, = small.glob("figures/*/*/README.md")
    drawn.unlink()
    with pytest.raises(utils.UserError, match="damaged"):
        ex3_convnet.main([*ARGV, "--resume"])
    assert not drawn.exists()

def test_main_returns_the_records_that_it_shows(small, weights_file, capsys):
    """With keys that say what they are, a number for each epoch; not those of another seed."""
    for seed in 5, 4:
        shown = ex3_convnet.main([*TINY, f"--seed={seed}", "--augmentation=rotation"])
    for weights in weights_file, "none":
        shown += ex3_pretrained.main([*TINY, f"--pretrained={weights}", "--seeds=2"])
    assert capsys.readouterr().err == ""
    assert [(record["title"], record["seed"]) for record in shown] == [
        ("ConvNet, rotation", 4), *((f"VGG11-BN {of}", seed) for of in (
            "fine-tuned, weights weights", "from scratch") for seed in (0, 1))]
    paths = {path.stem: path for path in small.glob("figures/*/*/records/*")}
    assert len(paths) == 1 + len(shown)
    for record in shown:
        kept = json.loads(paths[record["name"]].read_text())
        assert kept.items() <= json.loads(json.dumps(record)).items()
        assert {"data", "classes", "identity", "precision", "device", "torch", "commit"} <= {*kept}
        finished = datetime.fromisoformat(record["finished"])
        assert finished.utcoffset() == timedelta(0)
        assert abs(datetime.now(UTC) - finished) < timedelta(minutes=5)
        history, result = record["history"], record["result"]
        assert {len(values) for values in history.values()} == {2}
        confusion = np.array(record["confusion"])
        assert result["test_accuracy"] == pytest.approx(confusion.trace() / 100)
        assert result["val_accuracy"] == history["val_accuracy"][result["epoch"] - 1]

def test_a_ninth_technique_is_a_function_and_a_row(folder, few, monkeypatch):
    """Without the report's numbers; it runs, is drawn and counts in what is the best."""
    monkeypatch.setitem(utils.AUGMENTATIONS, "negative", partial(
        lambda images, generator, ground: 1 - images, ground="white"))
    first = 'Row("no augmentation", {"augmentation": "none"}),'
    script = edited(folder, (first, f'{first} Row("negative", {{"augmentation": "negative"}}),'))
    argv = [*ARGV, "--question=3a"]
    assert len(script.main(argv)) == 10
    assert "| negative | " in page(folder)
    for path in folder.glob("figures/*/*/records/*"):
        result = json.loads(path.read_text())["result"]
        change(path, result={**result, "test_accuracy": 0.5 + 0.4 * ("negative" in path.name)})
    script.main([*argv, "--redraw"])
    line = next(line for line in page(folder).splitlines() if "is the best technique" in line)
    assert "50.0 % against 90.0 (negative)" in line
    assert len([*folder.glob("figures/*/*/figure_6*.png")]) == 2

def test_an_own_question_gets_a_table_and_curves(folder, few, small_convnet, monkeypatch):
    rows = [utils.Row(f"rate {rate}", {"learning_rate": rate}) for rate in (0.1, 0.01)]
    monkeypatch.setitem(ex3_convnet.QUESTIONS, "5", utils.Question("How fast?", rows))
    records = ex3_convnet.main([*ARGV, "--question=5"])
    assert "|  | train | validation | test | seeds |" in page(folder)
    for row, record in zip(rows, records):
        numbers = [f"{100 * record['result'][key]:.1f}"
                   for key in ("train_accuracy", "val_accuracy", "test_accuracy")]
        assert f"| {row.name} | {' | '.join(numbers)} | 1 |" in page(folder)
    assert "](question_5.png)" in page(folder)
    assert not [*folder.rglob("figure_5.png")]  # which is that of Question 2b

def test_a_users_own_matplotlibrc_does_not_break_a_run(folder, few, small_convnet, monkeypatch):
    (folder / "matplotlibrc").write_text("text.usetex: True\nfigure.figsize: 1, 1\n")
    monkeypatch.setenv("PATH", "")  # there is no LaTeX
    for argv in ARGV, [*ARGV, "--question=1"]:
        with matplotlib.rc_context(fname=folder / "matplotlibrc"):
            assert len(ex3_convnet.main(argv)) == 1

@pytest.mark.parametrize(("flags", "broken"), [
    ([], "plot_runs"), (["--question=1"], "plot_filters")])
def test_a_figure_that_fails_costs_neither_record_nor_page(small, monkeypatch, flags, broken):
    def fail(*arguments):
        raise ValueError("no such colour")

    monkeypatch.setattr(utils, broken, fail)
    with pytest.raises(ValueError, match="no such colour"):
        ex3_convnet.main([*ARGV, *flags])
    assert len([*small.glob("figures/*/*/records/*.json")]) == 1
    assert "ConvNet" in page(small) or "Question 1" in page(small)
    assert [*small.glob("figures/*/*/results.csv")]
