"""Records: what makes two runs the same experiment, and what is read from a folder of records."""

import copy
import json
import os
import shutil
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    TINY,
    change_record,
    page_table,
    parse,
    random_weights,
    records_in,
    tiny_features,
)
from PIL import Image

import ex3_convnet
import ex3_pretrained
import utils

TWO_A = [*TINY, "--question=2a"]
ONE = [*TINY, "--question=1"]
NETWORK = ("layers += [nn.MaxPool2d(kernel_size=2), nn.ReLU(inplace=True)]",
           "layers += [nn.MaxPool2d(kernel_size=2), nn.GELU()]")
OPTIMIZER = ("torch.optim.Adam(model.parameters(), flags.learning_rate,\n"
             "                                 weight_decay=flags.reg, fused=True)",
             "torch.optim.SGD(model.parameters(), flags.learning_rate)")


@pytest.fixture
def small(few, folder, small_convnet, no_drawing, trainings):
    """A small convnet on few images, which draws nothing. The list of its trainings."""
    return trainings


def trains(trainings, main, argv):
    """The number of trainings of a call of a script's main."""
    before = len(trainings)
    main(argv)
    return len(trainings) - before


# -------------------------------------- the same experiment --------------------------------------


def test_what_is_computed_anew_depends_on_nothing_of_where_and_how_to_run(small, monkeypatch):
    assert trains(small, ex3_convnet.main, ONE) == 1
    for flags in (["--channels_last=False"], ["--device=cpu"], ["--deterministic"], ["--resume"],
                  ["--parallel=runs"], ["--compile"]):
        assert trains(small, ex3_convnet.main, [*ONE, *flags]) == 0, flags
    monkeypatch.setattr(ex3_convnet, "show", True)
    assert trains(small, ex3_convnet.main, ONE) == 0


@pytest.mark.parametrize("flags", [
    ["--dropout=0.1"], ["--reg=0.5"], ["--num_epochs=2"], ["--batch_size=30"], ["--seed=1"],
    ["--augmentation=rotation"], ["--earlystop"], ["--learning_rate_decay=0.9"]])
def test_another_setting_or_seed_is_another_experiment(small, flags):
    assert trains(small, ex3_convnet.main, ONE) == 1
    assert trains(small, ex3_convnet.main, [*ONE, *flags]) == 1
    assert trains(small, ex3_convnet.main, ONE) == 0
    assert trains(small, ex3_convnet.main, [*ONE, *flags]) == 0


def test_edited_channels_train_anew(small, folder, monkeypatch):
    assert trains(small, ex3_convnet.main, ONE) == 1
    monkeypatch.setattr(ex3_convnet, "CHANNELS", (32, 8, 8, 8, 8))
    assert trains(small, ex3_convnet.main, ONE) == 1
    assert trains(small, ex3_convnet.main, ONE) == 0
    assert len(records_in(folder)) == 2


def test_a_copy_with_another_network_does_not_take_the_records_of_the_original(
        few, folder, small_convnet, trainings, edited):
    """In a folder with the original's records: it neither draws them nor counts them as its own."""
    other = edited(NETWORK)
    ex3_convnet.main(TWO_A)
    place = folder / "figures/synthetic-60"
    original = page_table(place, "Table 1")
    with pytest.raises(utils.Problem, match="there is no record of question 2a"):
        other.main([*TWO_A, "--redraw"])
    assert page_table(place, "Table 1") == original
    assert trains(trainings, other.main, TWO_A) == 2
    mine = page_table(place, "Table 1")
    assert len(records_in(folder)) == 4
    ex3_convnet.main([*TWO_A, "--redraw"])
    assert page_table(place, "Table 1") == original
    other.main([*TWO_A, "--redraw"])
    assert page_table(place, "Table 1") == mine


def test_another_optimizer_makes_other_records_and_the_old_code_finds_the_old(
        small, folder, edited):
    sgd = edited(OPTIMIZER)
    sgd.draw = lambda *_: None
    first = ex3_convnet.main(ONE)["1"]
    second = sgd.main(ONE)["1"]
    assert first != second
    assert [record["recipe"]["optimizer"][0]["name"] for record in records_in(folder)].count(
        "SGD") == 1
    for main, found in (ex3_convnet.main, first), (sgd.main, second):
        assert trains(small, main, ONE) == 0
        assert main([*ONE, "--redraw"])["1"] == found


def test_a_frozen_layer_makes_other_records(small, edited):
    """Though the layers are the same, and the optimizer has the same settings."""
    network = "return ConvNet(flags.norm_flag, flags.dropout, num_classes, flags.image_size)"
    other = edited((network, network.replace("return", "model =")
                    + "\n    model.layers[0].requires_grad_(False)\n    return model"))
    other.draw = lambda *_: None
    assert trains(small, ex3_convnet.main, ONE) == 1
    assert trains(small, other.main, ONE) == 1


def test_another_schedule_makes_other_records(small, edited):
    other = edited(("ExponentialLR(optimizer, flags.learning_rate_decay)",
                    "StepLR(optimizer, 5, flags.learning_rate_decay)"))
    other.draw = lambda *_: None
    assert trains(small, ex3_convnet.main, ONE) == 1
    assert trains(small, other.main, ONE) == 1


def test_changed_parameters_of_an_augmentation_make_other_records(small, monkeypatch):
    argv = [*ONE, "--augmentation=rotation"]
    assert trains(small, ex3_convnet.main, argv) == 1
    monkeypatch.setitem(utils.AUGMENTATIONS, "rotation", partial(utils.rotate, degrees=15))
    assert trains(small, ex3_convnet.main, argv) == 1
    monkeypatch.setitem(utils.AUGMENTATIONS, "scaling", partial(utils.scale, low=0.5, high=0.7))
    assert trains(small, ex3_convnet.main, argv) == 0  # it is not used


@pytest.mark.parametrize(("name", "value"), [("MEAN", (0.5, 0.5, 0.4)), ("STD", (0.5, 0.2, 0.5))])
def test_another_normalization_makes_other_records(small, monkeypatch, name, value):
    assert trains(small, ex3_convnet.main, ONE) == 1
    monkeypatch.setattr(ex3_convnet, name, value)
    assert trains(small, ex3_convnet.main, ONE) == 1


def test_other_data_or_another_split_makes_other_records(small, few, monkeypatch):
    assert trains(small, ex3_convnet.main, ONE) == 1
    for change in ({"fingerprint": "0" * 16}, {"train": few.train[:50]}, {"val": few.val[:10]},
                   {"test": few.test[:50]}, {"classes": [*"abcdefghij"]}):
        data = copy.copy(few)
        vars(data).update(change)
        monkeypatch.setattr(utils, "load_data", lambda *_, data=data: data)
        assert trains(small, ex3_convnet.main, ONE) == 1, change
        assert trains(small, ex3_convnet.main, ONE) == 0, change


def test_other_pretrained_weights_in_a_file_of_the_same_name_make_other_records(
        few, folder, no_drawing, trainings, weights_file):
    argv = [*TINY, "--question=4b", f"--pretrained={weights_file}"]
    assert trains(trainings, ex3_pretrained.main, argv) == 2
    assert trains(trainings, ex3_pretrained.main, argv) == 0
    torch.save(random_weights(tiny_features(), seed=2), weights_file)
    assert trains(trainings, ex3_pretrained.main, argv) == 1  # not that from scratch
    assert len(records_in(folder)) == 3


def test_what_the_optimizer_of_an_older_pytorch_lacks_counts_as_off(small, folder):
    assert trains(small, ex3_convnet.main, ONE) == 1
    path, = folder.glob("figures/*/records/*")
    record = json.loads(path.read_text())
    assert record["recipe"]["optimizer"][0].pop("maximize") is False
    del record["sha256"]
    path.write_text(json.dumps(record))
    assert trains(small, ex3_convnet.main, ONE) == 0


def test_weights_are_found_wherever_they_are(
        few, folder, no_drawing, trainings, weights_file, tmp_path):
    argv = [*TINY, "--question=4b"]
    assert trains(trainings, ex3_pretrained.main, [*argv, f"--pretrained={weights_file}"]) == 2
    moved = tmp_path / "elsewhere" / weights_file.name
    moved.parent.mkdir()
    weights_file.rename(moved)
    assert trains(trainings, ex3_pretrained.main, [*argv, f"--pretrained={moved}"]) == 0


@pytest.mark.parametrize(("setting", "on"), [
    ("label_smoothing: float = 0.0", "--label_smoothing=0.1"), ("mixup: bool = False", "--mixup"),
    ("warmup: int | None = None", "--warmup=3"), ('sampler: str = "none"', "--sampler=hard"),
    ("milestones: list = []", "--milestones=3")])
def test_an_own_setting_finds_the_old_records_while_it_is_off(small, edited, setting, on):
    own = edited(("# --- training recipe", f"{setting}  # mine\n\n# --- training recipe"))
    own.draw = lambda *_: None
    assert trains(small, ex3_convnet.main, ONE) == 1
    assert trains(small, own.main, ONE) == 0
    assert trains(small, own.main, [*ONE, on]) == 1
    assert trains(small, own.main, [*ONE, on]) == 0
    assert trains(small, ex3_convnet.main, ONE) == 0


def test_a_constant_outside_the_settings_changes_nothing(small, edited):
    other = edited(("CHANNELS = (", "limit = 3\nCHANNELS = ("))
    other.draw = lambda *_: None
    assert trains(small, ex3_convnet.main, ONE) == 1
    assert trains(small, other.main, ONE) == 0
    with pytest.raises(utils.Problem, match="unknown flag --limit"):
        other.main([*ONE, "--limit=4"])


# ------------------------------------------- precision -------------------------------------------


def test_records_of_two_precisions_stand_side_by_side(small, folder):
    for precision in ("bfloat16", "float32"):
        assert trains(small, ex3_convnet.main, [*ONE, f"--precision={precision}"]) == 1
        assert trains(small, ex3_convnet.main, [*ONE, f"--precision={precision}"]) == 0
    assert sorted(record["precision"] for record in records_in(folder)) == ["bfloat16", "float32"]
    for precision in ("bfloat16", "float32"):
        record, = ex3_convnet.main([*ONE, "--redraw", f"--precision={precision}"])["1"][
            "without batch norm"]
        assert record["precision"] == precision
    assert trains(small, ex3_convnet.main, ONE) == 0
    assert len(ex3_convnet.main([*ONE, "--redraw"])["1"]["without batch norm"]) == 1


def test_of_two_precisions_auto_takes_the_latest_record(small, folder):
    for precision in ("bfloat16", "float32"):
        ex3_convnet.main([*ONE, f"--precision={precision}"])
    paths = {json.loads(path.read_text())["precision"]: path
             for path in folder.glob("figures/*/records/*")}
    for late in ("bfloat16", "float32"):
        for precision, path in paths.items():
            time = f"2026-01-0{1 + (precision == late)} 00:00:00"
            change_record(path, lambda record, time=time: {**record, "finished": time})
        found, = ex3_convnet.main([*ONE, "--redraw"])["1"]["without batch norm"]
        assert found["precision"] == late


def test_a_caption_tells_that_precisions_are_pooled(few, folder, small_convnet, trainings):
    ex3_convnet.main([*TWO_A, "--precision=bfloat16"])
    place = folder / "figures/synthetic-60"
    assert "60 training images, seed 0, 1 epochs" in page_table(place, "Table 1")
    ex3_convnet.main([*TWO_A, "--precision=float32", "--seed=1"])
    ex3_convnet.main([*TWO_A, "--redraw"])
    assert "60 training images, 2 seeds, bfloat16 and float32, 1 epochs" in page_table(
        place, "Table 1")
    ex3_convnet.main([*TWO_A, "--redraw", "--precision=float32"])
    assert "60 training images, seed 1, 1 epochs" in page_table(place, "Table 1")


# --------------------------------------------- redraw ---------------------------------------------


def test_redrawing_needs_neither_data_nor_weights(
        few, folder, small_convnet, weights_file, monkeypatch):
    pretrained = f"--pretrained={weights_file}"
    before = {ex3_convnet: ex3_convnet.main(TWO_A),
              ex3_pretrained: ex3_pretrained.main([*TINY, "--question=all", pretrained])}
    weights_file.unlink()
    for path in folder.glob("*.ckpt"):
        path.unlink()
    monkeypatch.setattr(utils, "load_data", None)
    assert ex3_convnet.main([*TWO_A, "--redraw"]) == before[ex3_convnet]
    assert ex3_pretrained.main([*TINY, "--question=all", pretrained, "--redraw"]) == (
        before[ex3_pretrained])


# ----------------------------------------- the git commit -----------------------------------------


def test_the_commit_and_the_changed_files_stand_in_the_record(
        small, folder, tmp_path, monkeypatch):
    def git(*arguments):
        return subprocess.run(
            ["git", "-c", "user.name=x", "-c", "user.email=x@x", "-C", str(repository), *arguments],
            check=True, capture_output=True, text=True).stdout.strip()

    if not shutil.which("git"):
        pytest.skip("git is not installed")
    repository = tmp_path / "repository"
    (repository / "sub").mkdir(parents=True)
    for name in ("ex3_convnet.py", "utils.py", "sub/other.py", "notes.txt"):
        (repository / name).write_text("1\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    monkeypatch.setattr(utils, "FOLDER", repository)
    utils.code_version.cache_clear()
    commit = git("rev-parse", "HEAD")
    assert ex3_convnet.main(ONE)["1"]["without batch norm"][0]["code"] == {
        "commit": commit, "changed": []}  # what the run has written is no code
    for name in ("utils.py", "sub/other.py", "notes.txt"):
        (repository / name).write_text("2\n")
    (repository / "new file.py").write_text("")
    utils.code_version.cache_clear()  # in another process
    code = ex3_convnet.main([*ONE, "--rerun"])["1"]["without batch norm"][0]["code"]
    assert code["commit"] == commit
    assert {name.strip('"') for name in code["changed"]} == {"utils.py", "new file.py"}


def test_outside_of_git_the_record_has_no_commit(small, folder, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(folder.parent))
    utils.code_version.cache_clear()
    assert ex3_convnet.main(ONE)["1"]["without batch norm"][0]["code"] is None
    monkeypatch.setenv("PATH", "")  # nor without git
    utils.code_version.cache_clear()
    assert utils.code_version() is None


# -------------------------------------------- reading --------------------------------------------


@pytest.mark.parametrize("content", [
    "", "{", "[]", "{}", "3", "null", '{"recipe": 3}', "\0\1", "[" * 100_000])
def test_a_record_that_cannot_be_read_is_named_and_left_out(small, folder, capsys, content):
    """Once, in one line, and the training goes on."""
    path = folder / "figures/synthetic-60/records/convnet.json"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    assert trains(small, ex3_convnet.main, ONE) == 1
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{path} cannot be read as the record of a run and is left out: ")
    assert path.read_text() == content
    assert trains(small, ex3_convnet.main, ONE) == 0


@pytest.mark.parametrize("change", [
    lambda r: r["result"].update(test_accuracy=0.99), lambda r: r.update(seed=1),
    lambda r: r["history"].update(train_loss=[]), lambda r: r["recipe"]["flags"].pop("dropout")])
def test_a_record_that_was_changed_is_left_out(small, folder, capsys, change):
    """What is shown was measured."""
    ex3_convnet.main(ONE)
    path, = folder.glob("figures/*/records/*")
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    capsys.readouterr()
    with pytest.raises(utils.Problem, match="there is no record of question 1"):
        ex3_convnet.main([*ONE, "--redraw"])
    assert (f"{path} cannot be read as the record of a run and is left out: it has been changed "
            "since it was written") in capsys.readouterr().err


@pytest.mark.parametrize("part", sorted(utils.RECORD))
def test_an_older_record_that_lacks_a_part_is_left_out(small, folder, capsys, part):
    ex3_convnet.main(ONE)
    path, = folder.glob("figures/*/records/*")
    change_record(path, lambda record: record.pop(part) and None)
    assert utils.load_records(path.parent.parent) == []
    assert f"it has no {part}" in capsys.readouterr().err


def test_an_accuracy_that_a_record_lacks_is_a_dash(few, folder, small_convnet, capsys):
    ex3_convnet.main(TWO_A)
    path = next(folder.glob("figures/*/records/convnet-batch-norm_*"))

    def remove(record):
        del record["result"]["test_accuracy_first_1000"], record["result"]["model_size"]
        del record["filters"]

    change_record(path, remove)
    ex3_convnet.main([*TWO_A, "--redraw"])
    lines = page_table(folder / "figures/synthetic-60", "Table 1").splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith("| with")]
    assert [[cell == "–" for cell in row[1:]] for row in rows] == [
        [False] * 5 + [True, False], [False, False, True, False, True, False, False]]


def test_what_a_person_finds_in_a_record_is_readable(small, folder):
    """One line for each part; the settings and the recipe as they stand in the code."""
    ex3_convnet.main([*ONE, "--dropout=0.25"])
    path, = folder.glob("figures/*/records/*")
    lines = path.read_text().splitlines()
    assert len(lines) == len(json.loads(path.read_text())) + 2
    recipe = json.loads(path.read_text())["recipe"]
    assert recipe["flags"]["dropout"] == 0.25
    assert [layer for layer in recipe["network"] if layer.startswith(
        "layers.0: Conv2d(in_channels=3, out_channels=8, kernel_size=(3, 3), ")]
    assert recipe["network"][4:6] == ["layers.2: ReLU(inplace=True)", "layers.3: Dropout(p=0.25)"]
    assert recipe["optimizer"][0]["name"] == "Adam"
    assert (recipe["optimizer"][0]["lr"], recipe["optimizer"][0]["weight_decay"]) == (0.002, 0.001)
    assert recipe["schedule"] == {"name": "ExponentialLR", "base_lrs": [0.002], "gamma": 0.95}


def test_a_narrow_network_on_a_folder_whose_name_is_not_utf8_is_found_again(
        folder, small_convnet, trainings, monkeypatch, tmp_path):
    name = os.fsdecode(b"F\xfcchse")
    for i, part in enumerate(("train", "test") * 6):
        path = tmp_path / name / part / ("cat", "dog")[i // 2 % 2] / f"{i:03}.png"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except (OSError, UnicodeError):
            pytest.skip("this system's names are all UTF-8")
        Image.fromarray(np.full((32, 32, 3), 20 * i, np.uint8)).save(path)
    monkeypatch.setattr(ex3_convnet, "CHANNELS", (32, 8, 8, 8, 8))
    argv = [f"--dataset={tmp_path / name}", "--question=2a", "--num_epochs=1",
            "--num_validation=2"]
    assert trains(trainings, ex3_convnet.main, argv) == 2
    assert trains(trainings, ex3_convnet.main, argv) == 0
    assert len(ex3_convnet.main([*argv, "--redraw"])["2a"]) == 2
    assert {record["data"] for record in records_in(folder)} == {"F\ufffdchse"}
    assert "| with batch norm |" in page_table(next(folder.glob("figures/*")), "Table 1")


def test_the_recipe_is_the_same_in_another_process():
    """No address, order of a set or random hash is in it, which would hide all older records."""
    code = ("import sys, json, utils, ex3_convnet; flags = utils.parse_flags(vars(ex3_convnet), "
            "sys.argv[2:]); print(json.dumps(ex3_convnet.experiment(flags, json.loads(sys.argv[1])"
            ").recipe))")
    argv = ["--norm_flag", "--dropout=0.5", "--augmentation=color_jitter+rotation"]
    facts = {"data": {"classes": ["a", "b"]}, "batch_norm_shards": None}
    other = subprocess.run([sys.executable, "-c", code, json.dumps(facts), *argv], check=True,
                           cwd=ROOT, capture_output=True, text=True)
    assert json.loads(other.stdout) == ex3_convnet.experiment(parse(*argv), facts).recipe


# ----------------------------------- schedules and techniques -----------------------------------

SCHEDULE = ("scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, "
            "flags.learning_rate_decay)")


def recipe_of(edited, *changes):
    """The recipe of the convnet, edited, on data of two classes."""
    script = edited(*changes)
    facts = {"data": {"classes": ["a", "b"]}, "batch_norm_shards": None}
    flags = utils.parse_flags(vars(script), ["--augmentation=rotation"])
    return script.experiment(flags, facts).recipe


def test_a_schedule_made_of_others_is_told_from_another(edited):
    recipes = [recipe_of(edited, (SCHEDULE, (
        "from torch.optim.lr_scheduler import ConstantLR, ExponentialLR, SequentialLR\n"
        "    scheduler = SequentialLR(optimizer, [ConstantLR(optimizer, 0.1, 1), "
        f"ExponentialLR(optimizer, {gamma})], [{switch}])")))
        for gamma, switch in ((0.9, 1), (0.1, 1), (0.9, 2))]
    assert len({json.dumps(recipe["schedule"]) for recipe in recipes}) == 3


def test_a_recipe_with_an_infinite_number_can_be_written(edited):
    recipe = recipe_of(edited, (
        SCHEDULE, "scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)"))
    assert json.dumps(recipe, allow_nan=False)


def test_the_default_parameters_of_a_technique_are_in_the_recipe(edited, monkeypatch):
    def noise(images, generator, std=0.1):
        return images

    monkeypatch.setitem(utils.AUGMENTATIONS, "rotation", noise)
    assert recipe_of(edited)["augmentation"] == {"rotation": {"function": "noise", "std": 0.1}}


def test_a_broken_link_among_the_records_is_no_record(folder):
    (folder / "records").mkdir()
    (folder / "records/broken.json").symlink_to(folder / "nowhere")
    assert utils.load_records(folder) == []
