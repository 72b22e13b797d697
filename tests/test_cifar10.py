"""CIFAR-10 in its forms: python and binary version, folder and archive, anywhere on the disk."""

import io
import os
import pickle
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
from conftest import HALF, ROOT, parse

import ex3_convnet
import utils

CPU = torch.device("cpu")
PUBLISHED = ROOT.parent / "shared/data/unpack_cifar10.py"  # makes the real batches, if it is there


def load(dataset):
    return utils.load_data(str(dataset), 32, None, None, HALF, HALF, CPU)


def contents(folder):
    """Every file in a folder, with its bytes."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same(data, other):
    return (torch.equal(data.images, other.images) and torch.equal(data.labels, other.labels)
            and all(torch.equal(getattr(data, part), getattr(other, part))
                    for part in ("train", "val", "test")))


def test_the_images_come_in_the_order_of_the_batches(cifar10):
    """As torchvision gives them; the last tenth of the training images validates."""
    classes, images, labels, num_test, num_validation = utils.load_cifar10(cifar10, mirrors=())
    assert (images.dtype, images.shape, labels.dtype, labels.shape) == (
        np.uint8, (120, 32, 32, 3), np.int64, (120,))
    assert (num_test, num_validation) == (20, 10)
    assert images[::20, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert images.flags.c_contiguous
    assert classes[:3] + classes[-1:] == ["airplane", "automobile", "bird", "truck"]
    with tarfile.open(cifar10 / utils.CIFAR10.filename) as archive:
        batch = pickle.load(archive.extractfile("cifar-10-batches-py/data_batch_2"))
    assert labels[20:40].tolist() == batch["labels"]
    assert np.array_equal(images[25, :, :, 1].ravel(), batch["data"][5, 1024:2048])  # its green


@pytest.mark.parametrize("form", utils.CIFAR10_FORMS)
def test_every_form_is_the_same_data_set_and_is_only_read(small_cifar10, cifar10, form):
    reference = load(cifar10)
    folder = small_cifar10(form) if form != utils.CIFAR10.filename else cifar10
    before = contents(folder)
    data = load(folder)
    assert same(data, reference)
    assert (data.name, data.classes) == ("CIFAR-10", list(utils.CIFAR10_CLASSES))
    assert data.fingerprint == reference.fingerprint
    assert utils.results_folder(parse(f"--dataset={folder}")) == (
        utils.results_folder(parse("--dataset=cifar10")))
    assert contents(folder) == before


@pytest.mark.parametrize("form", ["cifar-10-batches-py", "cifar-10-batches-bin"])
def test_the_folder_of_the_batches_itself_can_be_named(small_cifar10, cifar10, form):
    folder = small_cifar10(form) / form
    assert same(load(folder), load(cifar10))
    assert utils.data_name(folder) == "CIFAR-10"


def test_a_folder_that_cannot_be_written_is_read(small_cifar10, cifar10):
    """Neither the files are unpacked there nor anything else is written."""
    folder = small_cifar10("cifar-10-binary.tar.gz")
    os.chmod(folder, 0o555)
    try:
        assert same(load(folder), load(cifar10))
    finally:
        os.chmod(folder, 0o755)


@pytest.mark.parametrize("form", utils.CIFAR10_FORMS)
def test_the_default_finds_each_form_in_the_projects_own_folder(
        small_cifar10, folder, monkeypatch, form):
    monkeypatch.setattr(utils, "download", None)  # it is not called
    small_cifar10(form).rename(folder / "datasets")
    assert load("cifar10").name == "CIFAR-10"


def test_the_published_cifar10_is_loaded(tmp_path):
    if not PUBLISHED.exists():
        pytest.skip("the published images are not beside the project")
    subprocess.run([sys.executable, PUBLISHED, tmp_path], check=True, capture_output=True)
    data = load(tmp_path)
    assert data.name == "CIFAR-10"
    assert [len(part) for part in (data.train, data.val, data.test)] == [49_000, 1000, 10_000]
    assert np.bincount(data.labels[data.test]).tolist() == [1000] * 10
    assert data.classes[data.labels[0]] == "frog"  # the first image that everyone shows


def test_a_name_in_capitals_is_asked_about():
    with pytest.raises(utils.Problem, match="did you mean --dataset=cifar10") as problem:
        load("CIFAR10")
    assert problem.value.status == 1


# ------------------------------------- damaged and malicious -------------------------------------


class Trap:
    """Unpickling it leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def repack(path, name, content):
    """Replace (or with None leave out) a file of the unpacked or packed batches."""
    if path.is_dir():
        (path / name).unlink()
        if content is not None:
            (path / name).write_bytes(content)
        return
    with tarfile.open(path) as archive:
        files = {member.name: archive.extractfile(member).read() for member in archive}
    with tarfile.open(path, "w:gz") as archive:
        for member, old in files.items():
            new = content if member.endswith(f"/{name}") else old
            if new is not None:
                info = tarfile.TarInfo(member)
                info.size = len(new)
                archive.addfile(info, io.BytesIO(new))


@pytest.mark.parametrize("form", utils.CIFAR10_FORMS)
@pytest.mark.parametrize("batch", ["data_batch_3", "test_batch"])
def test_an_altered_batch_is_named_and_not_unpickled(small_cifar10, tmp_path, form, batch):
    folder = small_cifar10(form)
    name = batch + ".bin" * (utils.CIFAR10_FORMS[form] is utils.CIFAR10_BINARY)
    repack(folder / form, name, pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(utils.Problem, match=f"{name} in .* is missing, truncated or altered"):
        load(folder)
    assert not (tmp_path / "sprung").exists()


def test_one_wrong_pixel_is_enough(small_cifar10):
    """Of the right length, so that only the hash can tell."""
    folder = small_cifar10("cifar-10-batches-bin")
    path = folder / "cifar-10-batches-bin/data_batch_4.bin"
    content = bytearray(path.read_bytes())
    content[7000] ^= 1
    path.write_bytes(content)
    with pytest.raises(utils.Problem, match=r"data_batch_4\.bin"):
        load(folder)


@pytest.mark.parametrize("form", utils.CIFAR10_FORMS)
def test_a_missing_batch_is_named(small_cifar10, form):
    folder = small_cifar10(form)
    name = next(name for name in utils.CIFAR10_FORMS[form] if "_2" in name)
    repack(folder / form, name, None)
    with pytest.raises(utils.Problem, match=f"{name} in .* is missing"):
        load(folder)


@pytest.mark.parametrize("form", ["cifar-10-python.tar.gz", "cifar-10-binary.tar.gz"])
@pytest.mark.parametrize("damage", [
    lambda b: b[:-100], lambda b: b[:len(b) // 2] + b"\0\1\2" + b[len(b) // 2 + 3:],
    lambda b: b"", lambda b: b"nonsense"])
def test_a_damaged_archive_is_named_and_not_unpacked(small_cifar10, form, damage):
    archive = small_cifar10(form) / form
    archive.write_bytes(damage(archive.read_bytes()))
    with pytest.raises(utils.Problem, match=form):
        load(archive.parent)
    assert list(archive.parent.iterdir()) == [archive]


def test_the_hashes_are_those_that_are_published():
    """Of the binary version's test batch and of the python version as torchvision has them."""
    assert utils.CIFAR10_PYTHON["data_batch_1"] == "c99cafc152244af753f735de768cd75f"
    assert len(utils.CIFAR10_PYTHON) == len(utils.CIFAR10_BINARY) == 6
    assert utils.CIFAR10_BINARY["test_batch.bin"] == "803d5f7f4d78ea53de84dbe85f74fb6d"


def test_a_script_trains_on_each_form_and_finds_the_record_of_another(
        small_cifar10, folder, small_convnet, no_drawing, trainings):
    argv = ["--question=1", "--num_epochs=1", "--batch_size=50"]
    for form in utils.CIFAR10_FORMS:
        ex3_convnet.main([*argv, f"--dataset={small_cifar10(form)}"])
    assert len(trainings) == 1
    assert [path.name for path in (folder / "figures").iterdir()] == ["cifar-10"]
    assert (folder / "latest_model_convnet.ckpt").exists()
