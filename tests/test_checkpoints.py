"""Checkpoints: written as a whole or not at all, and never trusted when read."""

import os

import pytest
import torch

import ex3_convnet
import utils


class Unwritable:
    """Fails when half of the file is written, as a full disk does."""

    def __reduce__(self):
        raise OSError("No space left on device")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "model.ckpt"
    utils.save_checkpoint(path, {"epoch": 1})
    with pytest.raises(utils.Problem, match="model.ckpt cannot be written"):
        utils.save_checkpoint(path, {"epoch": 2, "model": Unwritable()})
    assert utils.load_checkpoint(path) == {"epoch": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(utils.Problem, match="cannot be written"):
        utils.save_checkpoint(tmp_path / "file" / "model.ckpt", {})


def test_a_folder_that_cannot_be_written_is_told_before_training(few, folder, monkeypatch):
    monkeypatch.setattr(utils, "train_one_epoch", None)
    (folder / "figures").touch()
    with pytest.raises(utils.Problem, match="figures.* cannot be written"):
        ex3_convnet.main(["--dataset=synthetic"])


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04 half"])
def test_a_damaged_checkpoint_is_named(tmp_path, content):
    (tmp_path / "model.ckpt").write_bytes(content)
    with pytest.raises(utils.Problem, match="model.ckpt"):
        utils.load_checkpoint(tmp_path / "model.ckpt")


def test_a_checkpoint_cannot_run_code(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    torch.save({"model": Trap()}, tmp_path / "model.ckpt")
    with pytest.raises(utils.Problem):
        utils.load_checkpoint(tmp_path / "model.ckpt")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(("dataset", "name"), [
    (["--dataset=cifar10"], "latest_model_x.ckpt"),
    (["--dataset=cifar10", "--num_training=500"], "latest_model_x_cifar-10-500.ckpt"),
    (["--dataset=synthetic"], "latest_model_x_synthetic.ckpt"),
    (["--dataset=My Photos $5"], "latest_model_x_my-photos-5.ckpt")])
def test_only_all_of_cifar10_has_the_reports_plain_name(dataset, name):
    flags = utils.parse_flags(vars(ex3_convnet), dataset)
    assert utils.checkpoint_path("latest", flags, "x").name == name
