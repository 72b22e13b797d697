"""Checkpoints: going on is the same as never having stopped, and nothing is lost or half-written."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, checkpoints_in, comparable, records_in, write_photos

import ex3_convnet
import ex3_pretrained
import utils

FULL = [*TINY, "--augmentation=rotation+color_jitter", "--earlystop", "--monitor=loss",
        "--patience=4", "--num_epochs=6"]
RUNS = {  # everything that has a state
    "convnet": (ex3_convnet, [*FULL, "--norm_flag", "--dropout=0.2"]),  # best epoch: 5
    "frozen": (ex3_pretrained, [*FULL, "--pretrained=weights.pth", "--fine_tune=False",
                                "--augmentation=horizontal_flip"]),  # its features: computed once
    "frozen, batch norm in train mode": (ex3_pretrained, [
        *FULL, "--pretrained=weights.pth", "--fine_tune=False", "--frozen_norm=train"])}


class Clock:
    """The time that a run sees; with each look `step` seconds pass."""

    def __init__(self):
        self.now, self.step = 0, 11  # so a checkpoint is written after each epoch

    def perf_counter(self):
        self.now += self.step
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(utils, "time", clock)
    return clock


@pytest.fixture
def new(small, weights_file, clock, monkeypatch):
    """A function that gives the project an empty folder."""
    folders = iter("abcdef")

    def begin():
        monkeypatch.setattr(utils, "FOLDER", small / next(folders))
        return utils.FOLDER

    monkeypatch.chdir(small)
    return begin


@contextmanager
def interrupted(call, name="train_one_epoch", module=utils):
    """Ctrl-C at the end of this call of a function, counted from 1."""
    calls, real = [], getattr(module, name)

    def stop(*arguments):
        calls.append(real(*arguments))
        if len(calls) == call:
            raise KeyboardInterrupt
        return calls[-1]

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, name, stop)
        yield


def outcome(folder):
    """All that the runs in a folder have left, without what differs from call to call."""
    return comparable([checkpoints_in(folder), records_in(folder)])


def epochs_in(folder):
    """The epoch of each checkpoint by the name of its file."""
    return {name.split("/")[1]: state["epoch"] for name, state in checkpoints_in(folder).items()}


# -------------------------------------- the same to the bit --------------------------------------


@pytest.mark.parametrize("name", RUNS)
def test_a_run_interrupted_in_each_epoch_is_the_uninterrupted_one(new, name, capsys):
    script, argv = RUNS[name]
    whole = new()
    script.main(argv)
    broken = new()
    with interrupted(2):
        script.main(argv)
    for _ in range(2, max(epochs_in(whole).values())):
        torch.manual_seed(99)  # a new process starts with other random numbers
        with interrupted(2):
            script.main([*argv, "--resume"])
    script.main([*argv, "--resume"])
    assert re.findall(r"Resumed after epoch (\d)", capsys.readouterr().out)[:3] == list("123")
    assert outcome(broken) == outcome(whole)
    script.main([*argv, "--resume"])  # of a finished run nothing is left to do
    assert outcome(broken) == outcome(whole)


@pytest.mark.parametrize("call", [3, 4, 13, 15])
def test_a_kill_between_any_two_files_loses_nothing(new, call):
    """Each epoch writes the best and the latest model; at the end the record follows."""
    script, argv = RUNS["convnet"]
    whole = new()
    script.main(argv)
    broken = new()
    with interrupted(call, "replace", os):
        script.main(argv)
    script.main([*argv, "--resume"])
    assert outcome(broken) == outcome(whole)


@pytest.mark.parametrize(("less", "more", "recipe"), [
    ("--num_epochs=2", "--num_epochs=4", []),
    ("--patience=1", "--patience=3", ["--learning_rate=1e-12", "--monitor=accuracy"])])
def test_more_epochs_or_patience_go_on_as_if_given_at_once(new, less, more, recipe):
    script, argv = RUNS["convnet"]
    whole = new()
    record, = script.main([*argv, *recipe, more])
    longer = new()
    shorter, = script.main([*argv, *recipe, less])
    script.main([*argv, *recipe, more, "--resume"])
    assert len(shorter["history"]["val_loss"]) < len(record["history"]["val_loss"])
    assert comparable(checkpoints_in(longer)) == comparable(checkpoints_in(whole))
    records = comparable(records_in(longer))
    assert len(records) == 2
    assert comparable(record) in records
    with pytest.raises(utils.Problem, match="give at least as many, or leave out --resume$"):
        script.main([*argv, *recipe, less, "--resume"])


# ------------------------------------------ the files ------------------------------------------


def test_each_run_has_a_folder_with_the_reports_names_which_may_be_deleted(small, tiny_vgg):
    for script, argv in ((ex3_convnet, []), (ex3_convnet, ["--learning_rate=0.1"]),
                         (ex3_convnet, ["--seed=1"]), (ex3_pretrained, ["--pretrained=none"])):
        script.main([*TINY, "--earlystop", *argv])
    found = {}
    for name in checkpoints_in(small):
        folder, file = name.split("/")
        found.setdefault(folder, set()).add(file)
    files = {f"{kind}_model_convnet-early-stopping.ckpt" for kind in ("best", "latest")}
    assert list(found.values()) == [files] * 3 + [
        {"best_model_part_4b_2.ckpt", "latest_model_part_4b_2.ckpt"}]
    assert sorted(name[-6:] for name in found) == ["_seed0"] * 3 + ["_seed1"]
    shutil.rmtree(small / "checkpoints")
    assert len(ex3_convnet.main([*TINY, "--earlystop", "--resume"])) == 1
    assert len(ex3_convnet.main([*TINY, "--earlystop", "--redraw", "--question=2b"])) == 0


def test_without_resume_a_longer_checkpoint_is_kept_aside(small, clock, capsys):
    """A night's run stays, whatever trials follow; renamed back it goes on."""
    argv = [*TINY, "--earlystop", "--num_epochs=5"]
    with interrupted(5):
        ex3_convnet.main(argv)
    night = checkpoints_in(small)
    ex3_convnet.main([*argv, "--num_epochs=1"])
    assert capsys.readouterr().out.count("is now checkpoints/convnet-early-stopping_") == 1
    ex3_convnet.main([*argv, "--num_epochs=1"])
    assert "is now" not in capsys.readouterr().out
    kept = {name.replace(".old", ""): state for name, state in checkpoints_in(small).items()
            if ".old" in name}
    assert comparable(kept) == comparable(night)
    old, = small.rglob("latest*.old.ckpt")
    old.rename(old.with_name(old.name.replace(".old", "")))
    ex3_convnet.main([*argv, "--resume"])
    assert "Resumed after epoch 4" in capsys.readouterr().out


def test_resume_without_a_checkpoint_says_so_and_starts(small, capsys):
    record, = ex3_convnet.main([*TINY, "--resume"])
    assert re.search(r"There is no checkpoints/convnet_\w+_seed0/latest_model_convnet.ckpt yet: "
                     "starting at epoch 1", capsys.readouterr().out)
    assert len(record["history"]["val_loss"]) == 2


@pytest.mark.parametrize("damage", [lambda content: b"", lambda content: content[:-1000],
                                    lambda content: b"PK" + content[:99]])
def test_a_damaged_checkpoint_is_named_in_one_sentence(small, damage):
    ex3_convnet.main(TINY)
    path, = small.rglob("*.ckpt")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(utils.Problem, match=f"^{re.escape(str(path))} .*damaged.*$"):
        ex3_convnet.main([*TINY, "--resume"])


def test_a_checkpoint_cannot_run_code(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    torch.save({"model": Trap()}, tmp_path / "model.ckpt")
    with pytest.raises(utils.Problem, match="model.ckpt"):
        utils.load_checkpoint(tmp_path / "model.ckpt")
    assert not (tmp_path / "sprung").exists()


def test_a_failed_write_leaves_the_old_file(tmp_path):
    class Unwritable:
        def __reduce__(self):
            raise OSError("No space left on device")

    utils.save_checkpoint(tmp_path / "model.ckpt", {"epoch": 1})
    with pytest.raises(OSError, match="No space left"):
        utils.save_checkpoint(tmp_path / "model.ckpt", {"epoch": 2, "model": Unwritable()})
    assert utils.load_checkpoint(tmp_path / "model.ckpt") == {"epoch": 1}


def test_checkpoints_are_written_every_ten_seconds_and_at_the_end(small, clock, monkeypatch):
    """Each epoch takes four seconds here."""
    clock.step, saved, save = 0, [], utils.save_checkpoint
    train = utils.train_one_epoch

    def slow(*arguments):
        clock.now += 4
        return train(*arguments)

    monkeypatch.setattr(utils, "train_one_epoch", slow)
    monkeypatch.setattr(utils, "save_checkpoint", lambda path, state: saved.append(
        state["epoch"]) or save(path, state))
    ex3_convnet.main([*TINY, "--num_epochs=7"])
    assert saved == [3, 6, 7]
    with interrupted(5), pytest.raises(KeyboardInterrupt, match="on disk is epoch 3 of this run"):
        ex3_convnet.main([*TINY, "--num_epochs=7"])


# ---------------------------------------- real processes ----------------------------------------

PHOTOS = ["--dataset=photos", "--num_epochs=100000", "--batch_size=8", "--precision=float32",
          "--device=cpu", "--earlystop", "--patience=0", "--monitor=loss", "--norm_flag",
          "--dropout=0.2", "--augmentation=rotation"]
COUNTS = {"train/cat": 12, "train/dog": 12, "test/cat": 4, "test/dog": 4}


@pytest.fixture
def home(project):
    """A copy of the project with photos, which writes checkpoints after each epoch."""
    write_photos(project.folder / "photos", COUNTS)
    source = (project.folder / "utils.py").read_text(encoding="utf-8")
    rule = "self.saved_at > 10:"
    assert rule in source
    (project.folder / "utils.py").write_text(source.replace(rule, "True:"), encoding="utf-8")
    return project.folder


def stop(home, number, ready, *argv):
    """Start a run, send a signal when `ready` of its output; the exit code and what it printed."""
    with open(home / "out", "w") as out, open(home / "err", "w") as err:
        process = subprocess.Popen([sys.executable, "ex3_convnet.py", *PHOTOS, *argv], cwd=home,
                                   stdout=out, stderr=err, stdin=subprocess.DEVNULL)
    while not ready((home / "out").read_text()) and process.poll() is None:
        pass
    process.send_signal(number)
    return process.wait(240), (home / "out").read_text(), (home / "err").read_text()


def test_a_process_that_is_interrupted_and_killed_loses_nothing(home, small, monkeypatch):
    """It goes on to the numbers of a run in one piece, in another process."""
    def latest():
        return utils.load_checkpoint(next(home.rglob("latest*.ckpt")))["epoch"]

    code, _, error = stop(home, signal.SIGINT, lambda out: "epoch  3/" in out)
    assert (code, error.count("\n")) == (130, 1)
    assert f"interrupted; on disk is epoch {latest()} of this run" in error
    assert latest() >= 3

    code, out, _ = stop(home, signal.SIGKILL, lambda out: out.count("\nepoch") > 2, "--resume")
    assert code == -signal.SIGKILL
    assert latest() >= max(int(epoch) for epoch in re.findall(r"epoch +(\d+)/", out))
    code, *_ = stop(home, signal.SIGKILL, lambda out: out.count("\nepoch") > 2 and any(
        home.rglob("latest*.tmp")), "--resume")  # in the middle of a file
    assert code == -signal.SIGKILL

    epochs = f"--num_epochs={latest() + 2}"
    code, *_ = stop(home, 0, lambda out: False, "--resume", epochs)
    assert code == 0
    write_photos(small / "photos", COUNTS)
    monkeypatch.chdir(small)
    ex3_convnet.main([*PHOTOS, epochs])
    assert outcome(home) == outcome(small)
    assert not any(home.rglob("*.tmp"))


@pytest.mark.parametrize("closed", ["2>&-", ">&-"])
def test_a_run_whose_output_is_closed_ends_well(home, closed):
    command = [sys.executable, "ex3_convnet.py", *PHOTOS, "--num_epochs=1"]
    process = subprocess.run(["sh", "-c", f"{shlex.join(command)} {closed}"], cwd=home,
                             capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=240)
    assert process.returncode == 0
    assert ("epoch  1/1" in process.stdout) == (closed == "2>&-")
    assert len(records_in(home)) == 1
