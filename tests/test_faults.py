"""Faults: interrupted, killed, full disk, damaged files. Nothing is lost, nothing is trusted."""

import contextlib
import copy
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import namedtuple
from functools import partial
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import test_data
import torch
from PIL import Image
from torch import nn

import ex3_convnet
import ex3_pretrained
import utils

try:
    import resource
except ImportError:  # Windows has no such module
    resource = None

TINY = ["--dataset=synthetic", "--num_training=60", "--num_validation=20", "--batch_size=20",
        "--precision=float32", "--num_epochs=2"]
FULL = [*TINY, "--norm_flag", "--dropout=0.2", "--augmentation=rotation+color_jitter",
        "--earlystop", "--patience=4", "--num_epochs=6"]  # everything that has a state
NAME = "convnet-batch-norm-dropout-0.2-rotation-color_jitter-early-stopping"
CHANNELS = (128, 8, 8, 8, 8)

cifar10 = test_data.cifar10  # a fixture


@pytest.fixture(autouse=True)
def one_thread():
    """Two threads are slower in so small a network, and far slower on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small(few, folder, monkeypatch):
    """An empty folder for a small convnet on few images, which draws nothing."""
    monkeypatch.setattr(ex3_convnet, "CHANNELS", CHANNELS)
    monkeypatch.setattr(ex3_convnet, "draw", lambda *_: None)
    return folder


@pytest.fixture
def epochs(monkeypatch):
    """A list that grows by one with every epoch that is trained."""
    trained, train = [], utils.train_one_epoch

    def count(*arguments):
        trained.append(1)
        return train(*arguments)

    monkeypatch.setattr(utils, "train_one_epoch", count)
    return trained


@contextlib.contextmanager
def interrupted(epoch):
    """Ctrl-C in an epoch (counted from 1), when its training is done and nothing is written."""
    train, calls = utils.train_one_epoch, itertools.count(1)

    def stop(*arguments):
        result = train(*arguments)
        if next(calls) == epoch:
            raise KeyboardInterrupt
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "train_one_epoch", stop)
        with pytest.raises(KeyboardInterrupt):
            yield


def comparable(value):
    """A checkpoint or a record with lists for tensors, without times and the use of memory."""
    if isinstance(value, dict):
        return {key: comparable(part) for key, part in value.items()
                if key not in ("seconds", "finished", "peak_memory_mb")}
    if isinstance(value, list):
        return [comparable(part) for part in value]
    return (value.dtype, value.tolist()) if isinstance(value, torch.Tensor) else value


def outcome(folder):
    """All that a run leaves: its checkpoints and its records."""
    checkpoints = {path.name: utils.load_checkpoint(path) for path in folder.glob("*.ckpt")}
    records = {path.name: json.loads(path.read_text()) for path in folder.rglob("*.json")}
    return comparable({**checkpoints, **records})


def contents(folder):
    """Every file in a folder, with its bytes."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def temporary_files(folder):
    return list(folder.rglob("*.tmp"))


# ---------------------------------------- resume ----------------------------------------


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(small, few):
    """Interrupted in every epoch but the first, with everything on that has a state."""
    ex3_convnet.main(FULL)
    whole = outcome(small)
    assert len(whole) == 3  # latest, best, record
    for path in [*small.glob("*.ckpt"), *small.rglob("*.json")]:
        path.unlink()
    with interrupted(2):
        ex3_convnet.main(FULL)
    for _ in range(len(whole[f"latest_model_{NAME}.ckpt"]["history"]["val_loss"]) - 2):
        torch.manual_seed(99)  # a new process starts with other random numbers
        with interrupted(2):
            ex3_convnet.main([*FULL, "--resume"])
    ex3_convnet.main([*FULL, "--resume"])
    assert outcome(small) == whole


@pytest.mark.parametrize(("change", "differing"), [
    (["--learning_rate=0.1"], {"learning_rate"}),
    (["--reg=0.5", "--num_epochs=3"], {"reg", "num_epochs"}),
    (["--precision=bfloat16"], {"precision"}),
    ([], {"images"})])
def test_a_checkpoint_of_another_run_is_refused_and_names_what_differs(
        small, few, epochs, change, differing):
    with interrupted(2):
        ex3_convnet.main(TINY)
    if not change:
        few.fingerprint = "0" * 16
    before = contents(small)
    with pytest.raises(utils.Problem, match="belongs to another run") as problem:
        ex3_convnet.main([*TINY, *change, "--resume"])
    assert problem.value.status == 2
    assert set(re.findall(r"(\w+): [^;]+ there, ", str(problem.value))) == differing
    assert len(epochs) == 2
    assert contents(small) == before


def test_a_run_goes_on_elsewhere_and_otherwise(small, epochs):
    """Flags of the environment do not make another run."""
    with interrupted(2):
        ex3_convnet.main([*TINY, "--device=cpu"])
    ex3_convnet.main([*TINY, "--channels_last=False", "--resume"])
    assert len(epochs) == 2 + 1


def test_resuming_a_finished_run_trains_nothing(small, epochs, capsys):
    ex3_convnet.main(TINY)
    whole = outcome(small)
    ex3_convnet.main([*TINY, "--resume"])
    assert len(epochs) == 2
    assert "Resumed after epoch 2" in capsys.readouterr().out
    assert outcome(small) == whole


def test_resuming_what_stopped_early_does_not_train_on(small, epochs, capsys):
    argv = [*TINY, "--earlystop", "--patience=2", "--num_epochs=9", "--learning_rate=1e-30"]
    ex3_convnet.main(argv)  # it does not learn: epoch 1 stays the best
    whole = outcome(small)
    ex3_convnet.main([*argv, "--resume"])
    assert len(epochs) == 3
    assert capsys.readouterr().out.count("Early stop: no better epoch than 1 for 2 epochs") == 2
    assert outcome(small) == whole


def test_resuming_without_a_checkpoint_says_so_and_starts(small, epochs, capsys):
    ex3_convnet.main([*TINY, "--resume"])
    assert "There is no latest_model_convnet.ckpt yet: starting at epoch 1" in (
        capsys.readouterr().out)
    assert len(epochs) == 2


def test_without_resume_a_checkpoint_is_announced_before_it_is_replaced(small, epochs, capsys):
    ex3_convnet.main(TINY)
    assert "will be replaced" not in capsys.readouterr().out
    ex3_convnet.main(TINY)
    announced, trained = capsys.readouterr().out.split("epoch  1/2")
    assert "latest_model_convnet.ckpt is there already and will be replaced" in announced
    assert "--resume" in announced
    assert len(epochs) == 4


def test_hours_of_an_unfinished_run_are_not_replaced(small, epochs, capsys):
    """By a run of the same name: their checkpoint is renamed, and can be resumed."""
    with interrupted(2):
        ex3_convnet.main(TINY)
    path = small / "latest_model_convnet.ckpt"
    state = utils.load_checkpoint(path)
    state["history"]["seconds"] = [7200.0]
    utils.save_checkpoint(path, state)
    good = path.read_bytes()
    ex3_convnet.main([*TINY, "--learning_rate=0.1"])
    kept, = set(small.glob("*.ckpt")) - {path}
    assert kept.read_bytes() == good
    assert f"epoch 1 of 2 of a run: kept as {kept.name}" in capsys.readouterr().out
    ex3_convnet.main([*TINY, "--learning_rate=0.2"])  # a finished run is not kept
    assert set(small.glob("*.ckpt")) == {kept, path}
    kept.rename(path)
    ex3_convnet.main([*TINY, "--resume"])
    assert "Resumed after epoch 1" in capsys.readouterr().out


def test_a_checkpoint_that_another_process_renames_meanwhile_is_no_error(
        small, epochs, monkeypatch):
    def load_and_rename(path):
        state = load(path)
        state["history"]["seconds"] = [7200.0]
        path.rename(small / "kept.ckpt")
        return state

    with interrupted(2):
        ex3_convnet.main(TINY)
    load = utils.load_checkpoint
    monkeypatch.setattr(utils, "load_checkpoint", load_and_rename)
    ex3_convnet.main(TINY)
    assert len(epochs) == 2 + 2


def test_an_interrupted_question_resumes_in_the_middle_of_a_run(small, epochs, capsys):
    argv = [*TINY, "--question=2a", "--num_epochs=3"]
    with interrupted(5):  # the second of the second run
        ex3_convnet.main(argv)
    capsys.readouterr()
    results = ex3_convnet.main([*argv, "--resume"])
    output = capsys.readouterr().out
    assert "ConvNet, seed 0, on synthetic: recorded already, not run again" in output
    assert output.count("Resumed after epoch 1") == 1
    assert len(epochs) == 5 + 2
    assert [len(runs) for runs in results["2a"].values()] == [1, 1]


def test_rerun_with_resume_is_refused(small, epochs):
    with pytest.raises(utils.Problem, match="--rerun starts anew") as problem:
        ex3_convnet.main([*TINY, "--question=2a", "--rerun", "--resume"])
    assert problem.value.status == 2
    assert not epochs


# ------------------------------------ processes of their own ------------------------------------


def work(folder, argv, limit=None):
    """A child process: the script, small and in a folder; its output goes to files there.

    limit: bytes that a file can have from now on.
    """
    for number, name in (1, "out"), (2, "err"):
        os.dup2(os.open(folder / name, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1) for number in (1, 2))  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)
    matplotlib.use("Agg")
    torch.set_num_threads(1)
    data = utils.Data(**torch.load(folder / "data.pt"))
    utils.FOLDER, utils.load_data = folder, lambda *_: data
    ex3_convnet.CHANNELS = CHANNELS
    sys.argv = ["ex3_convnet.py", *argv]
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    utils.run_script(ex3_convnet.main)


@pytest.fixture
def start(few, monkeypatch):
    """A function that starts the script in a process of its own (see work)."""
    # children of a server that has imported PyTorch, but never ran it: quick and safe
    context, processes = multiprocessing.get_context("forkserver"), []
    context.set_forkserver_preload(["test_faults"])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # of the server, to find it

    def start(folder, *argv, **options):
        folder.mkdir(exist_ok=True)
        torch.save(vars(few), folder / "data.pt")
        (folder / "out").write_text("")
        (folder / "err").write_text("")
        processes.append(context.Process(target=work, args=(folder, argv), kwargs=options))
        processes[-1].start()
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.join()


def wait(process, ready):
    """Wait until a condition holds, or the process has ended."""
    end = time.monotonic() + 60
    while not ready() and process.is_alive():
        assert time.monotonic() < end
        time.sleep(0.001)


def finish(process):
    """The exit code of a process."""
    process.join(60)
    return process.exitcode


def output(folder):
    return (folder / "out").read_text()


def printed_epochs(folder):
    return [int(epoch) for epoch in re.findall(r"^epoch +(\d+)/", output(folder), re.MULTILINE)]


def test_a_new_process_gives_the_same_numbers(start, tmp_path):
    folders = [tmp_path / "first", tmp_path / "second"]
    assert [finish(start(folder, *FULL, "--num_epochs=2")) for folder in folders] == [0, 0]
    first, second = map(outcome, folders)
    assert len(first) == 3
    assert first == second


def test_kills_at_any_moment_lose_at_most_the_epoch_under_way(start, tmp_path):
    """20 of them, every other while a file is being written, each followed by --resume."""
    argv = [*FULL, "--num_epochs=40", "--patience=40"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert finish(start(whole, *argv)) == 0
    draw, latest, left = random.Random(0), broken / f"latest_model_{NAME}.ckpt", set()
    for kill in range(20):
        process = start(broken, *argv, "--resume")
        done = draw.randrange(3)  # epochs
        wait(process, lambda done=done: len(printed_epochs(broken)) >= done)
        time.sleep(draw.uniform(0, 0.1))
        if kill % 2:
            wait(process, lambda left=left: set(temporary_files(broken)) - left)
        process.kill()
        assert finish(process) == -signal.SIGKILL
        left = set(temporary_files(broken))
        printed = printed_epochs(broken)
        assert len(printed) >= done
        if latest.exists() or printed:
            assert utils.load_checkpoint(latest)["epoch"] >= max(printed, default=0)
    assert left  # at least one kill came in the middle of a file
    assert finish(start(broken, *argv, "--resume")) == 0
    assert outcome(broken) == outcome(whole)


def test_ctrl_c_ends_with_a_sentence_and_a_checkpoint(start, tmp_path):
    process = start(tmp_path, *TINY, "--num_epochs=10000")
    wait(process, lambda: len(printed_epochs(tmp_path)) >= 3)
    os.kill(process.pid, signal.SIGINT)
    assert finish(process) == 130
    error = (tmp_path / "err").read_text()
    assert error.count("\n") == 1
    assert "--resume" in error
    last = printed_epochs(tmp_path)[-1]
    assert last >= 3
    assert utils.load_checkpoint(tmp_path / "latest_model_convnet.ckpt")["epoch"] >= last
    assert temporary_files(tmp_path) == []


def test_two_processes_at_once_leave_valid_files(start, tmp_path):
    assert finish(start(tmp_path / "alone", *FULL)) == 0
    both = [start(tmp_path / "shared", *FULL) for _ in range(2)]
    assert [finish(process) for process in both] == [0, 0]
    assert outcome(tmp_path / "shared") == outcome(tmp_path / "alone")
    figures = list((tmp_path / "shared").rglob("*.png"))
    assert len(figures) == 2
    for path in figures:
        with Image.open(path) as image:
            image.load()
    assert temporary_files(tmp_path) == []


def test_two_processes_that_write_a_file_at_once_do_not_share_a_temporary_one(
        tmp_path, monkeypatch):
    path = tmp_path / "model.ckpt"
    with utils.replacing(path) as ours:
        ours.write_text("ours")
        monkeypatch.setattr(os, "getpid", lambda: 1)
        utils.save_checkpoint(path, {"theirs": 1})
        assert utils.load_checkpoint(path) == {"theirs": 1}
    assert path.read_text() == "ours"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_has_left_is_deleted_when_nobody_can_be_writing_it(tmp_path):
    path = tmp_path / "model.ckpt"
    for process, minutes in (1, 90), (2, 1):
        left = tmp_path / f".model.ckpt.{process}.tmp"
        left.touch()
        os.utime(left, (time.time() - 60 * minutes,) * 2)
    utils.save_checkpoint(path, {})
    assert {file.name for file in tmp_path.iterdir()} == {"model.ckpt", ".model.ckpt.2.tmp"}


# ------------------------------------ full disks, divergence ------------------------------------


@pytest.mark.skipif(resource is None, reason="needs a limit on the size of files")
def test_a_file_that_does_not_fit_leaves_the_old_one(start, tmp_path):
    """A checkpoint, a record, a figure; in a real process, whose files are limited in size."""
    assert finish(start(tmp_path, *TINY)) == 0
    old = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.name != "data.pt"
           and path.is_file()}
    assert sorted(path.suffix for path in old) == [".ckpt", ".json", ".png", ".png"]
    for argument, limit, name in [("--seed=0", 20_000, "latest_model_convnet.ckpt"),
                                  ("--seed=0", 170_000, "latest_model_convnet.ckpt"),
                                  ("--resume", 20_000, ".json"),  # trains nothing: no checkpoint
                                  ("--redraw", 20_000, ".png")]:
        assert finish(start(tmp_path, *TINY, argument, limit=limit)) == 1
        error = (tmp_path / "err").read_text()
        assert f"{name} cannot be written: " in error
        assert error.count("\n") == 1
        assert {path: path.read_bytes() for path in old} == old
        assert temporary_files(tmp_path) == []


@pytest.mark.skipif(resource is None, reason="needs a limit on the size of files")
def test_a_table_that_does_not_fit_leaves_the_old_one(small, monkeypatch, capsys):
    results = ex3_convnet.main([*TINY, "--question=2a"])["2a"]
    path = small / "table.md"
    path.write_text("old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(utils.Problem, match="table.md cannot be written"):
            utils.write_table("Table", results, ex3_convnet.REPORT["2a"], path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_text() == "old"
    assert temporary_files(small) == []


def test_a_full_disk_is_told_before_training(small, epochs, monkeypatch):
    weights = 4 * utils.count_parameters(ex3_convnet.ConvNet())
    disk = namedtuple("disk", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: disk(0, 0, 9 * weights - 1))
    with pytest.raises(utils.Problem, match="MB left, and the checkpoints need .* make room"):
        ex3_convnet.main(TINY)
    assert not epochs
    assert list(small.rglob("*.*")) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: disk(0, 0, 9 * weights))
    ex3_convnet.main(TINY)
    assert len(epochs) == 2


@pytest.mark.parametrize("place", [".", "figures/synthetic-60/records"])
def test_a_folder_without_the_right_to_write_is_told_before_training(
        small, epochs, monkeypatch, place):
    def refuse(dir):
        if dir == small / place:
            raise PermissionError(13, "Permission denied")
        return create(dir=dir)

    create = tempfile.TemporaryFile
    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(utils.Problem, match="cannot be written: .*Permission denied"):
        ex3_convnet.main(TINY)
    assert not epochs


def test_a_run_that_diverges_keeps_the_last_good_checkpoint(small, monkeypatch):
    """From the second epoch on with a huge learning rate."""
    train = utils.train_one_epoch

    def train_and_raise_the_learning_rate(model, data, optimizer, *arguments):
        result = train(model, data, optimizer, *arguments)
        optimizer.param_groups[0]["lr"] = 1e30
        return result

    monkeypatch.setattr(utils, "train_one_epoch", train_and_raise_the_learning_rate)
    with pytest.raises(utils.Problem, match=r"epoch 2 the loss is \w+ at learning rate 9.5e\+29;"
                       ) as problem:
        ex3_convnet.main([*TINY, "--num_epochs=3"])
    assert problem.value.status == 1
    assert [path.name for path in small.rglob("*.*")] == ["latest_model_convnet.ckpt"]
    latest = utils.load_checkpoint(small / "latest_model_convnet.ckpt")
    assert latest["epoch"] == 1
    assert all(value.isfinite().all() for value in latest["model"].values())
    assert np.isfinite(list(latest["history"].values())).all()


# -------------------------------------- damaged files --------------------------------------


def damage(content, draw):
    """Bytes with a fault in them, of a kind and at a place that are drawn."""
    content, length = bytearray(content), draw.randint(1, 64)
    at, other = (draw.randrange(len(content)) for _ in range(2))
    kind = draw.randrange(6)
    if kind == 0:
        content[at] ^= 1 << draw.randrange(8)
    elif kind == 1:
        del content[at:]
    elif kind == 2:
        del content[at:at + length]
    elif kind == 3:
        content[at:at] = draw.randbytes(length)
    elif kind == 4:
        content[at:at + length], content[other:other + length] = (
            content[other:other + length], content[at:at + length])
    else:
        content = draw.randbytes(length)
    return bytes(content)


def works_or_tells(action):
    """What the action returns, or None if it raises a Problem of one line; nothing else."""
    try:
        return action()
    except utils.Problem as problem:
        sentence = str(problem)
    assert re.fullmatch(".{20,}", sentence)
    return None


JUNK = (None, True, -1, 0, 0.5, 7, 1e300, float("nan"), float("inf"), 10**400, "", "x", "\ud800",
        [], [[1, 2]], {}, {"a": 1}, "many\nlines")


def twist(value, draw, junk=JUNK):
    """A copy of nested dicts and lists in which one value, that is drawn, is junk or missing."""
    value = parent = copy.deepcopy(value)
    while True:
        key = draw.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
        if not isinstance(parent[key], (dict, list)) or not parent[key] or draw.random() < 0.2:
            break
        parent = parent[key]
    if draw.random() < 0.2:
        del parent[key]
    else:
        parent[key] = draw.choice(junk)
    return value


def test_damaged_records_are_drawn_or_named(few, folder, monkeypatch):
    """Every figure and table that is drawn from a record of this kind; nothing is half-drawn."""
    monkeypatch.setattr(ex3_convnet, "CHANNELS", CHANNELS)
    for question in "2a", "2b":
        ex3_convnet.main([*TINY, f"--question={question}"])
    draw, works = random.Random(0), 0
    paths = sorted(folder.rglob("convnet-batch-norm*.json"))
    assert len(paths) == 2
    for _ in range(60):
        path = draw.choice(paths)
        good, before = path.read_bytes(), contents(folder)
        if draw.random() < 0.3:
            bad = damage(good, draw)
        else:
            bad = json.dumps(twist(json.loads(good), draw)).encode()
        path.write_bytes(bad)
        question = draw.choice((["--question=2a"], ["--question=2b"], ["--question=3a"],
                                ["--norm_flag"], ["--norm_flag", "--earlystop"]))
        if works_or_tells(partial(ex3_convnet.main, [*TINY, *question, "--redraw"])):
            works += 1
            assert path.read_bytes() == bad
        else:
            assert contents(folder) == {**before, str(path): bad}
        path.write_bytes(good)
    assert 3 < works < 50


def test_a_record_with_an_impossible_value_is_named(small):
    record = json.loads(json.dumps(ex3_convnet.main(TINY)["none"][""][0]))
    path = next(small.rglob("*.json"))
    nan = np.full((128, 3, 3, 3), np.nan).tolist()
    for *outer, key, value in [
            ("history", "val_loss", [1.0, float("inf")]), ("history", "train_loss", [1.0, -1.0]),
            ("history", "val_loss", [1.0]), ("history", "val_accuracy", [0.1, 1.5]),
            ("history", "val_accuracy_augmented", [0.1, 1.5]),  # and nothing was augmented
            ("result", "test_accuracy", "0.5"), ("result", "epoch", 3), ("result", "epoch", 0),
            ("result", "epoch", 1.0), ("images", "val", 0), ("images", "train", None),
            ("parameters", "trainable", 10**400), ("best_epoch", "x"), ("best_epoch", 3),
            ("seed", -1), ("title", 5), ("data", "\ud800"), ("finished", None),
            ("filters", "before", nan), ("filters", {"before": [1], "after": [1]}),
            ("filters", None), ("flags", {}),
            ("flags", {**record["flags"], "augmentation": "scaling"}),  # whose accuracy is missing
            ("flags", {**record["flags"], "norm_flag": True, "dropout": 0.5})]:  # recalibrated
        bad = parent = copy.deepcopy(record)
        for name in outer:
            parent = parent[name]
        parent[key] = value
        path.write_text(json.dumps(bad))
        with pytest.raises(utils.Problem, match=f"{path.name} is no record"):
            utils.load_records(path.parent.parent)
    path.write_text(json.dumps(record))
    assert utils.load_records(path.parent.parent) == [record]


def test_a_record_nested_without_end_is_named(folder):
    (folder / "records").mkdir()
    (folder / "records/convnet.json").write_text("[" * 100_000)
    with pytest.raises(utils.Problem, match="convnet.json is no record"):
        utils.load_records(folder)


@pytest.fixture
def trained(small, image_folder):
    """The checkpoint of a run whose second epoch is missing, its bytes, and ways to read it."""
    argv = [*TINY, "--norm_flag"]
    with interrupted(2):
        ex3_convnet.main(argv)
    path = small / "latest_model_convnet-batch-norm.ckpt"
    picture = f"--predict={image_folder / 'test/cat/000.png'}"
    return SimpleNamespace(path=path, good=path.read_bytes(), argv=argv, ways=(
        lambda: ex3_convnet.main([*argv, "--resume"]) and "resumed",
        lambda: ex3_convnet.main([*argv, picture]) or "predicted"))


def test_a_flipped_bit_in_the_numbers_of_a_checkpoint_is_noticed(trained):
    weights = utils.load_checkpoint(trained.path)["model"]["layers.4.weight"].contiguous()
    at = trained.good.index(weights.permute(0, 2, 3, 1).numpy().tobytes()[:40])
    bad = bytearray(trained.good)
    bad[at] ^= 1
    trained.path.write_bytes(bad)
    for read in trained.ways:
        with pytest.raises(utils.Problem, match="is damaged"):
            read()


@pytest.mark.parametrize("way", [0, 1], ids=["resume", "predict"])
def test_damaged_checkpoints_work_unchanged_or_are_named(small, trained, way, capsys):
    def result(content):
        """What is printed and left behind, but for the times; None for a Problem."""
        trained.path.write_bytes(content)
        before = contents(small)
        capsys.readouterr()
        if works_or_tells(trained.ways[way]):
            output = re.sub("[0-9,]+ (images/s.*|s|MB)", "", capsys.readouterr().out)
            return output, outcome(small) if way == 0 else None
        assert contents(small) == before
        return None

    draw, good = random.Random(way), result(trained.good)
    results = [result(damage(trained.good, draw)) for _ in range(80)]
    assert all(this in (None, good) for this in results)
    assert results.count(None) > 60


@pytest.mark.parametrize("way", [0, 1], ids=["resume", "predict"])
def test_checkpoints_of_another_structure_work_or_are_named(small, trained, way):
    draw, state = random.Random(way), utils.load_checkpoint(trained.path)
    rest = {name: state.pop(name) for name in ("optimizer", "scheduler")}
    states = [{**twist(state, draw, (*JUNK, torch.zeros(3))), **rest} for _ in range(80)]
    for name in rest:
        states += [{**state, **rest, name: junk} for junk in JUNK]
    for state in states:
        torch.save(state, trained.path)
        before = contents(small)
        if not works_or_tells(trained.ways[way]):
            assert contents(small) == before


@pytest.mark.parametrize(("part", "junk", "words"), [
    ("scheduler", {}, "its schedule is not complete"),
    ("history", {}, "val_loss|train_loss"),
    ("best_epoch", 2, "its best epoch is impossible"),
    ("epoch", 2, "its history is not of 2 epochs")])
def test_a_checkpoint_that_is_not_complete_is_not_resumed(small, trained, part, junk, words):
    torch.save({**utils.load_checkpoint(trained.path), part: junk}, trained.path)
    with pytest.raises(utils.Problem, match=words):
        trained.ways[0]()


def test_damaged_weights_are_loaded_whole_or_not_at_all(tmp_path):
    """With a small network in the place of the VGG11-BN."""
    draw, path = random.Random(0), tmp_path / "weights.pth"

    def network():
        return SimpleNamespace(features=nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))

    def values(network):
        return comparable(dict(network.features.state_dict()))

    def load():
        ex3_pretrained.load_features(other, utils.load_checkpoint(path), path)
        return True

    first = network()
    torch.save({f"features.{name}": value for name, value in first.features.state_dict().items()},
               path)
    good = path.read_bytes()
    for _ in range(300):
        path.write_bytes(damage(good, draw))
        other = network()
        before = values(other)
        loaded = works_or_tells(load)
        assert values(other) == (values(first) if loaded else before)


def test_damaged_cifar10_batches_are_named(cifar10):
    utils.load_cifar10(cifar10, mirrors=())
    draw, paths = random.Random(0), sorted((cifar10 / "cifar-10-batches-py").iterdir())
    for _ in range(100):
        path = draw.choice(paths)
        good = path.read_bytes()
        bad = damage(good, draw)
        path.write_bytes(bad)
        if bad != good:
            with pytest.raises(utils.Problem, match=f"{path.name} is missing, truncated or"):
                utils.load_cifar10(cifar10, mirrors=())
        path.write_bytes(good)
    utils.load_cifar10(cifar10, mirrors=())


@pytest.mark.parametrize(("suffix", "mode"), [
    ("png", "RGB"), ("png", "P"), ("png", "LA"), ("jpg", "RGB"), ("jpg", "CMYK"), ("gif", "P"),
    ("webp", "RGB"), ("bmp", "RGB"), ("tif", "RGB"), ("ppm", "RGB")])
def test_damaged_images_are_read_or_named(tmp_path, suffix, mode):
    draw, path = random.Random(0), tmp_path / f"image.{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    Image.fromarray(noise).convert(mode).save(path)
    good = path.read_bytes()
    for _ in range(60):
        path.write_bytes(damage(good, draw))
        pixels = works_or_tells(lambda: utils.read_image(path, 32))
        assert pixels is None or (pixels.shape, pixels.dtype) == ((32, 32, 3), np.uint8)
