"""Checkpoints: going on is the same as never having stopped; nothing is lost or half-written."""

import itertools
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, checkpoints_in, comparable, records_in
from torch import nn

import ex3_convnet
import ex3_pretrained
import utils

FULL = [*TINY, "--earlystop", "--patience=4", "--monitor=loss", "--num_epochs=6",
        "--augmentation=rotation+color_jitter", "--device=cpu"]
FROZEN = [*FULL, "--pretrained=weights.pth", "--fine_tune=False"]
RUNS = {"convnet": (ex3_convnet, [*FULL, "--norm_flag", "--dropout=0.2"]),  # best epoch: 5
        "frozen": (ex3_pretrained, [*FROZEN, "--augmentation=horizontal_flip"]),
        "frozen, batch norm in train mode": (ex3_pretrained, [*FROZEN, "--frozen_norm=train"])}
if torch.cuda.is_available():
    RUNS["on a GPU"] = (ex3_convnet, [*RUNS["convnet"][1], "--device=cuda", "--deterministic"])

@pytest.fixture
def run(small, weights_file, monkeypatch):
    """A function that runs one of RUNS in a folder, and returns its record."""
    each_look_takes_11_seconds = itertools.count(0, 11).__next__  # so each epoch is saved
    monkeypatch.setattr(utils, "time", SimpleNamespace(
        perf_counter=each_look_takes_11_seconds, time_ns=time.time_ns))
    monkeypatch.chdir(small)

    def run(name, folder, *more):
        script, argv = RUNS[name]
        monkeypatch.setattr(utils, "FOLDER", small / folder)
        return script.main([*argv, *more])[-1]

    return run

@contextmanager
def interrupted(epoch):
    """Ctrl-C at the end of training this epoch of a call, counted from 1."""
    results, real = [], utils.train_one_epoch

    def train_and_stop(*arguments):
        results.append(real(*arguments))
        if len(results) == epoch:
            raise KeyboardInterrupt
        return results[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "train_one_epoch", train_and_stop)
        with pytest.raises(KeyboardInterrupt):
            yield

def outcome(folder):
    """All that the runs in a folder have left, without what differs from call to call."""
    return comparable([checkpoints_in(folder), records_in(folder)])

@pytest.mark.parametrize("name", RUNS)
def test_a_run_interrupted_in_each_epoch_is_the_uninterrupted_one(run, small, name, capsys):
    epochs = len(run(name, "whole")["history"]["val_loss"])
    with interrupted(2):
        run(name, "broken")
    for _ in range(2, epochs):
        torch.manual_seed(99)  # a new process starts with other random numbers
        with interrupted(2):
            run(name, "broken", "--resume")
    for _ in range(2):  # the second time nothing is left to do
        run(name, "broken", "--resume")
        assert outcome(small / "broken") == outcome(small / "whole")
    resumed = re.findall(r"Resumed after epoch (\d)", capsys.readouterr().out)
    assert [int(epoch) for epoch in resumed] == [*range(1, epochs + 1)]

@pytest.mark.parametrize(("file", "number"), [
    ("latest_", 1), ("best_", 1), ("latest_", 7), ("best_", 7), ("seed0.json", 1)])
def test_a_kill_after_any_file_loses_nothing(run, small, monkeypatch, file, number):
    """Each of six epochs writes the latest and the best model; at the end both are written again,
    and the record follows."""
    run("convnet", "whole")
    written, replace = [], os.replace

    def replace_and_stop(source, target):
        replace(source, target)
        if file in str(target):
            written.append(target)
            if len(written) == number:
                raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", replace_and_stop)
    with pytest.raises(KeyboardInterrupt):
        run("convnet", "broken")
    monkeypatch.setattr(os, "replace", replace)
    run("convnet", "broken", "--resume")
    assert outcome(small / "broken") == outcome(small / "whole")

def test_more_epochs_go_on_as_if_given_at_once(run, small):
    """Fewer are refused in one sentence."""
    whole = run("convnet", "whole", "--num_epochs=4")
    run("convnet", "longer", "--num_epochs=2")
    longer = run("convnet", "longer", "--num_epochs=4", "--resume")
    assert comparable([longer, checkpoints_in(small / "longer")]) == comparable(
        [whole, checkpoints_in(small / "whole")])
    assert len(records_in(small / "longer")) == 2
    kept = outcome(small / "longer")
    with pytest.raises(utils.UserError, match="give a larger --num_epochs, or leave out --resume$"):
        run("convnet", "longer", "--num_epochs=2", "--resume")
    assert outcome(small / "longer") == kept

def test_each_run_has_a_folder_with_the_reports_names_which_may_be_deleted(
        small, tiny_vgg, capsys):
    argv = [*TINY, "--earlystop"]
    for more in [], ["--learning_rate=0.1"], ["--seed=1"]:
        ex3_convnet.main([*argv, *more])
    ex3_pretrained.main([*argv, "--pretrained=none"])
    folders, files = zip(*(name.split("/") for name in checkpoints_in(small)))
    assert files == tuple(f"{kind}_model_{name}.ckpt" for name in (
        *["convnet-early-stopping"] * 3, "part_4b_2") for kind in ("best", "latest"))
    assert sorted(name[-6:] for name in {*folders}) == ["_seed0"] * 3 + ["_seed1"]
    shutil.rmtree(small / "checkpoints")
    ex3_convnet.main([*argv, "--resume"])
    assert re.search(r"There is no \S+/checkpoints/\S+/latest_\S+ .* epoch 1",
                     capsys.readouterr().out)

def test_without_resume_a_longer_checkpoint_is_kept_aside(run, small, capsys):
    """A night's run stays, whatever trials follow; renamed back it goes on."""
    with interrupted(5):
        run("convnet", ".")
    night, = small.rglob("latest*.ckpt")
    content = night.read_bytes()
    run("convnet", ".", "--num_epochs=1")
    out = capsys.readouterr().out
    assert re.search(r"is now \S+/checkpoints/\S+\.old\.ckpt: rename it back", out)
    run("convnet", ".", "--num_epochs=1")
    assert ".old" not in capsys.readouterr().out
    old, = small.rglob("*.old.ckpt")  # it has the best weights
    assert old.read_bytes() == content
    old.rename(night)
    run("convnet", ".", "--resume")
    assert "Resumed after epoch 4" in capsys.readouterr().out

def write(path, content):
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)

@pytest.mark.parametrize(("content", "words"), [
    (b"", "is damaged or not a PyTorch file"),
    (b"PK\x03\x04 half", "is damaged or not a PyTorch file"),
    (print, "holds more than weights"),  # which would run
    ({"epoch": 1, "model": {}}, "was written by another version of the project")])
def test_a_checkpoint_to_go_on_from_that_cannot_be_read_is_named_in_one_sentence(
        small, content, words):
    ex3_convnet.main(TINY)
    path, = small.rglob("*.ckpt")
    write(path, content)
    with pytest.raises(utils.UserError, match=f"^{re.escape(str(path))} {words}[^\n]*$"):
        ex3_convnet.main([*TINY, "--resume"])

@pytest.mark.parametrize("flags", [["--checkpoint={}", "--predict=."], ["--pretrained={}"]])
@pytest.mark.parametrize(("name", "content", "sentence"), [
    ("latest.ckpd", None, "there is no file {}"),
    ("README.md", b"# The exercise", "{} is damaged or not a PyTorch file"),
    ("network.pt", nn.Linear(3, 3),
     "{} holds more than weights, perhaps a whole network: save its state_dict()")])
def test_what_is_no_checkpoint_gets_a_sentence_of_its_own_and_is_not_to_be_deleted(
        small, tiny_vgg, name, content, sentence, flags):
    if content:
        write(small / name, content)
    with pytest.raises(utils.UserError) as error:
        ex3_pretrained.main([*TINY, *(flag.format(small / name) for flag in flags)])
    assert str(error.value) == sentence.format(small / name)
    assert error.value.exit_code == 1

def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "model.ckpt"
    torch.save({"epoch": 1}, path)
    with pytest.raises((AttributeError, pickle.PicklingError)), utils.atomic_write(path) as new:
        torch.save({"epoch": 2, "model": lambda: None}, new)
    assert utils.load_checkpoint(path) == {"epoch": 1}
    assert [*tmp_path.iterdir()] == [path]

@pytest.fixture
def command(project, photos):
    """A run of the convnet that never ends, in a copy of the project that saves each epoch."""
    path, rule = project.folder / "utils.py", "self.saved_at > 10:"
    source = path.read_text(encoding="utf-8")
    assert rule in source
    path.write_text(source.replace(rule, "True:"), encoding="utf-8")
    return [sys.executable, "ex3_convnet.py", *RUNS["convnet"][1], f"--dataset={photos}",
            "--num_training=0", "--num_validation=0", "--num_epochs=100000", "--patience=0"]

def test_a_process_that_is_interrupted_and_then_killed_loses_nothing(
        small, project, command, monkeypatch):
    """Another one goes on to the numbers of a run in one piece."""
    for number, argv, code in (signal.SIGINT, [], 130), (signal.SIGKILL, ["--resume"], -9):
        process = subprocess.Popen(
            [*command, *argv], cwd=project.folder, stdin=subprocess.DEVNULL, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            epochs = (line for line in process.stdout if line.startswith("epoch"))
            _, second, _ = itertools.islice(epochs, 3)  # the third is told before it is saved
            process.send_signal(number)
            _, error = process.communicate(timeout=240)
        finally:
            process.kill()
        assert process.returncode == code
        assert ("--resume continues" in error) == (number == signal.SIGINT)
        assert error.count("\n") <= 1
        epoch = utils.load_checkpoint(next(project.folder.rglob("latest*.ckpt")))["epoch"]
        assert epoch >= int(second[5:].split("/")[0])
    argv = [*command[2:], f"--num_epochs={epoch + 2}"]
    ex3_convnet.main(argv)
    monkeypatch.setattr(utils, "FOLDER", project.folder)
    ex3_convnet.main([*argv, "--resume"])
    assert outcome(project.folder) == outcome(small)

@pytest.mark.parametrize(("before", "now", "both"), [
    ("bfloat16", "bfloat16", "bfloat16"), ("bfloat16", "float16", "bfloat16 and float16"),
    ("bfloat16 and float16", "float16", "bfloat16 and float16")])
def test_the_precisions_of_a_resumed_run_are_named_once_each(before, now, both):
    run = object.__new__(utils.Run)
    run.metadata = {"precision": now}
    run.resume(1, {}, before)
    assert run.metadata["precision"] == both
