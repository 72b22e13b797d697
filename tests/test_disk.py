"""A full disk, no right to write, no memory, a loss that explodes: what is there stays good."""

import shutil
import tempfile
from collections import namedtuple

import numpy as np
import pytest
import torch
from conftest import DATA, LATEST, SHORT, finish, temporary_files

import ex3_convnet
import ex3_pretrained
import utils

# -------------------------------------- full disks, rights --------------------------------------


@pytest.mark.skipif(utils.resource is None, reason="needs a limit on the size of files")
def test_a_file_that_does_not_fit_leaves_the_old_one(start, tmp_path):
    """A checkpoint, a record, a figure; in a real process, whose files are limited in size."""
    assert finish(start(tmp_path, *SHORT)) == 0
    old = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.name != "data.pt"
           and path.is_file()}
    assert sorted(path.suffix for path in old) == [".ckpt", ".json", ".png", ".png", ".png"]
    size = {path.suffix: path.stat().st_size for path in old}
    for argument, limit, name in [
            ("--seed=0", size[".ckpt"] // 2, LATEST), ("--seed=0", size[".ckpt"] * 9 // 10, LATEST),
            ("--resume", size[".json"] // 2, ".json"),  # trains nothing: no checkpoint
            ("--redraw", size[".png"] // 2, ".png")]:
        assert finish(start(tmp_path, *SHORT, argument, limit=limit)) == 1
        error = (tmp_path / "err").read_text()
        assert f"{name} cannot be written: " in error
        assert error.count("\n") == 1
        assert {path: path.read_bytes() for path in old} == old
        assert temporary_files(tmp_path) == []


@pytest.mark.skipif(utils.resource is None, reason="needs a limit on the size of files")
def test_a_page_that_does_not_fit_leaves_the_old_one(small):
    ex3_convnet.main([*SHORT, "--question=2a"])
    path, = small.rglob("README.md")
    path.write_text("old")
    before = utils.resource.getrlimit(utils.resource.RLIMIT_FSIZE)
    utils.resource.setrlimit(utils.resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(utils.Problem, match="README.md cannot be written"):
            ex3_convnet.main([*SHORT, "--question=2a", "--redraw"])
    finally:
        utils.resource.setrlimit(utils.resource.RLIMIT_FSIZE, before)
    assert path.read_text() == "old"
    assert temporary_files(small) == []


def test_a_full_disk_is_told_before_training(small, epochs, monkeypatch):
    weights = 4 * utils.count_parameters(ex3_convnet.ConvNet())
    disk = namedtuple("disk", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: disk(0, 0, 9 * weights - 1))
    with pytest.raises(utils.Problem, match="MB left, and the checkpoints need .* make room"):
        ex3_convnet.main(SHORT)
    assert not epochs
    assert list(small.rglob("*.*")) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: disk(0, 0, 9 * weights))
    ex3_convnet.main(SHORT)
    assert len(epochs) == 2


@pytest.mark.parametrize("place", [".", f"figures/{DATA}/records"])
def test_a_folder_without_the_right_to_write_is_told_before_training(
        small, epochs, monkeypatch, place):
    def refuse(dir):
        if dir == small / place:
            raise PermissionError(13, "Permission denied")
        return create(dir=dir)

    create = tempfile.TemporaryFile
    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(utils.Problem, match="cannot be written: .*Permission denied"):
        ex3_convnet.main(SHORT)
    assert not epochs


# ----------------------------------- divergence, out of memory -----------------------------------


def test_a_run_that_diverges_keeps_the_last_good_checkpoint(small, monkeypatch):
    """From the second epoch on with a huge learning rate."""
    train = utils.train_one_epoch

    def train_and_raise_the_learning_rate(model, data, batches, augment, optimizer, *arguments):
        result = train(model, data, batches, augment, optimizer, *arguments)
        optimizer.param_groups[0]["lr"] = 1e30
        return result

    monkeypatch.setattr(utils, "train_one_epoch", train_and_raise_the_learning_rate)
    with pytest.raises(utils.Problem, match=r"ConvNet, seed 0, on synthetic: the training diverged:"
                       r" in epoch 2 the loss is \w+; try a smaller --learning_rate") as problem:
        ex3_convnet.main([*SHORT, "--num_epochs=3"])
    assert problem.value.status == 1
    assert [path.name for path in small.rglob("*.*")] == [LATEST]
    latest = utils.load_checkpoint(small / LATEST)
    assert latest["epoch"] == 1
    assert all(value.isfinite().all() for value in latest["model"].values())
    assert np.isfinite(list(latest["history"].values())).all()


@pytest.fixture
def fails(monkeypatch, epochs):
    """A function that sets what happens in the first epoch: a loss, or an exception."""
    def fails(fault):
        train = utils.train_one_epoch

        def fail(*arguments):
            loss, accuracy = train(*arguments)
            if len(epochs) > 1:
                return loss, accuracy
            if isinstance(fault, Exception):
                raise fault
            return fault, accuracy

        monkeypatch.setattr(utils, "train_one_epoch", fail)
    return fails


@pytest.mark.parametrize(("fault", "words"), [
    (float("nan"), "the loss is nan"), (float("inf"), "the loss is inf"),
    (torch.OutOfMemoryError("CUDA out of memory"), "the device is out of memory; try"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."),
     "the device is out of memory; try"), (MemoryError(), "the device is out of memory; try")])
def test_a_run_that_fails_is_reported_and_the_question_goes_on(
        small, epochs, fails, monkeypatch, capsys, fault, words):
    drawn = []
    monkeypatch.setattr(ex3_convnet, "draw", lambda *arguments: drawn.append(arguments[1]))
    fails(fault)
    argv = [*SHORT, "--question=2a"]
    with pytest.raises(utils.Problem, match="1 of the runs failed: ConvNet, seed 0, on") as problem:
        ex3_convnet.main(argv)
    assert problem.value.status == 1
    assert words in str(problem.value)
    assert len(epochs) == 1 + 2
    output = capsys.readouterr()
    failed, = (line for line in output.out.splitlines() if line.startswith("Failed: "))
    assert words in failed
    assert "no record with these flags of without batch norm" in output.err
    results, = drawn
    assert list(results) == ["with batch norm"]
    assert len(list(small.rglob("*.json"))) == 1

    assert list(ex3_convnet.main(argv)["2a"]) == ["without batch norm", "with batch norm"]
    assert len(epochs) == 1 + 2 + 2  # the next call runs what failed, and no more


def test_all_runs_that_fail_are_named_at_the_end(small, monkeypatch):
    monkeypatch.setattr(utils, "train_one_epoch", lambda *_: (float("nan"), 0.1))
    with pytest.raises(utils.Problem, match="2 of the runs failed: .*seed 0.*; .*seed 1"):
        ex3_convnet.main([*SHORT, "--seeds=2"])


@pytest.mark.parametrize("fault", [
    RuntimeError("shapes do not match"), utils.Problem("the disk is full"), OSError("no file")])
def test_any_other_fault_ends_the_question_at_once(small, epochs, fails, fault):
    fails(fault)
    with pytest.raises(type(fault), match=str(fault)):
        ex3_convnet.main([*SHORT, "--question=2a"])
    assert len(epochs) == 1


def test_a_disk_that_becomes_full_ends_the_question_at_once(small, epochs, monkeypatch):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", refuse)
    with pytest.raises(utils.Problem, match=f"{LATEST} cannot be written: .*No space"):
        ex3_convnet.main([*SHORT, "--question=2a"])
    assert len(epochs) == 1


def test_missing_weights_end_the_question_at_once(few, folder, tiny_vgg, epochs, monkeypatch):
    def no_network(*_, **__):
        asked.append(1)
        raise OSError("no network")

    asked = []
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(folder))
    monkeypatch.setattr(ex3_pretrained.VGG11_BN_Weights, "get_state_dict", no_network)
    with pytest.raises(utils.Problem, match="ImageNet weights cannot be downloaded") as problem:
        ex3_pretrained.main([*SHORT, "--question=4a"])
    assert problem.value.status == 1
    assert (len(asked), len(epochs)) == (1, 0)
