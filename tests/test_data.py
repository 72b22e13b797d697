"""Data: the three sources, the split and its order, normalization, and each error."""

import hashlib
import io
import pickle
import tarfile
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10

import utils

HALF = (0.5, 0.5, 0.5)
CPU = torch.device("cpu")


def load(dataset, size=32, num_training=None, num_validation=None):
    return utils.load_data(str(dataset), size, num_training, num_validation, HALF, HALF, CPU)


# ---------------------------------- split and normalization ----------------------------------


def test_the_first_images_train_and_the_last_tenth_validates(image_folder):
    data = load(image_folder, num_validation=2)
    grey = data.images[:, 0, 0, 0]
    assert grey[data.train].tolist() == [10 * i for i in range(10)]
    assert grey[data.val].tolist() == [100, 110]
    assert grey[data.test].tolist() == [0, 10, 20, 30]
    assert data.labels[data.train].tolist() == [0, 1] * 5
    assert (data.classes, data.name) == (["cat", "dog"], "photos")


def test_fewer_training_images_leave_the_validation_images_alone(image_folder):
    data = load(image_folder, num_training=3, num_validation=2)
    assert data.images[data.train, 0, 0, 0].tolist() == [0, 10, 20]
    assert data.images[data.val, 0, 0, 0].tolist() == [100, 110]


def test_the_default_split_is_a_tenth_and_at_most_1000(synthetic, image_folder):
    assert (len(synthetic.train), len(synthetic.val), len(synthetic.test)) == (4500, 500, 1000)
    data = load(image_folder)
    assert (len(data.train), len(data.val)) == (11, 1)


@pytest.mark.parametrize(("num_training", "num_validation"), [(12, 1), (None, 12), (1, 13)])
def test_more_images_than_there_are(image_folder, num_training, num_validation):
    with pytest.raises(utils.Problem, match="12 training images of photos") as problem:
        load(image_folder, 32, num_training, num_validation)
    assert problem.value.status == 2


def test_a_batch_is_normalized(image_folder):
    data = utils.load_data(image_folder, 32, None, 2, (0.5, 0.4, 0.3), (0.5, 0.2, 0.1), CPU)
    images, labels = data.batch(torch.tensor([3, 8]))
    assert images.dtype == torch.float32
    assert labels.tolist() == [1, 0]
    for image, level in zip(images, (30 / 255, 80 / 255)):
        expected = [(level - 0.5) / 0.5, (level - 0.4) / 0.2, (level - 0.3) / 0.1]
        assert torch.allclose(image.mean((1, 2)), torch.tensor(expected), atol=1e-5)


def test_the_images_are_one_uint8_tensor(synthetic):
    assert synthetic.images.dtype == torch.uint8
    assert synthetic.images.shape == (6000, 3, 32, 32)


def test_the_fingerprint_changes_with_a_pixel_and_with_the_order(image_folder):
    before = load(image_folder, num_validation=2).fingerprint
    assert load(image_folder, num_validation=3).fingerprint == before
    first, second = image_folder / "train/cat/000.png", image_folder / "train/cat/002.png"
    pixels = np.array(Image.open(first))
    pixels[5, 5, 1] += 1
    Image.fromarray(pixels).save(first)
    changed = load(image_folder, num_validation=2).fingerprint
    first.rename(image_folder / "train/cat/002b.png")
    second.rename(first)
    reordered = load(image_folder, num_validation=2).fingerprint
    assert len({before, changed, reordered}) == 3


# ---------------------------------------- synthetic ----------------------------------------


def test_synthetic_is_deterministic_and_quick(synthetic):
    start = time.perf_counter()
    again = load("synthetic")
    assert time.perf_counter() - start < 5
    assert torch.equal(again.images, synthetic.images)
    assert torch.equal(again.labels, synthetic.labels)
    assert np.bincount(again.labels).tolist() == [600] * 10


def test_a_linear_classifier_stays_below_half_on_synthetic(synthetic):
    images, labels = synthetic.batch(torch.arange(6000))
    pixels, targets = images.flatten(1), torch.eye(10)[labels]
    best = 0
    for ridge in (30, 300, 3000):
        x = pixels[:5000]
        weights = torch.linalg.solve(x.T @ x + ridge * torch.eye(3072), x.T @ targets[:5000])
        right = (pixels[5000:] @ weights).argmax(1) == labels[5000:]
        best = max(best, right.float().mean().item())
    assert 0.2 < best < 0.5


# ---------------------------------------- image folder ----------------------------------------


def test_files_are_sorted_by_name_over_all_classes(image_folder):
    data = load(image_folder, num_validation=2)
    assert data.images[:12, 0, 0, 0].tolist() == [10 * i for i in range(12)]


@pytest.mark.parametrize(("mode", "colour", "expected"), [
    ("L", 100, (100, 100, 100)), ("RGBA", (200, 0, 0, 255), (200, 0, 0)),
    ("RGBA", (200, 0, 0, 0), (255, 255, 255)), ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
    ("P", 0, (0, 0, 0)), ("1", 1, (255, 255, 255)), ("I;16", 25700, (100, 100, 100)),
    ("LA", (100, 255), (100, 100, 100))])
def test_every_kind_of_image_becomes_rgb(tmp_path, mode, colour, expected):
    path = tmp_path / f"image.{'tif' if mode == 'CMYK' else 'png'}"
    Image.new(mode, (40, 50), colour).save(path)
    pixels = utils.read_image(path, 32)
    assert pixels.shape == (32, 32, 3)
    assert pixels[16, 16].tolist() == pytest.approx(expected, abs=2)


def test_a_photo_is_cut_to_its_middle_square_and_resized(tmp_path):
    photo = np.zeros((300, 500, 3), np.uint8)
    photo[:, 100:250], photo[:, 250:400] = (255, 0, 0), (0, 0, 255)
    Image.fromarray(photo).save(tmp_path / "wide.png")
    pixels = utils.read_image(tmp_path / "wide.png", 64)
    assert (pixels[:, 1:31] == (255, 0, 0)).all()
    assert (pixels[:, 33:63] == (0, 0, 255)).all()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_a_photo_is_turned_upright(tmp_path, mode):
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:32] = 255  # the upper half is white, but the camera was turned
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(pixels).convert(mode).save(tmp_path / "turned.png", exif=exif)
    upright = utils.read_image(tmp_path / "turned.png", 32)
    assert upright[:15].max() == 0
    assert upright[17:].min() == 255


def test_of_an_animation_the_first_frame_counts(tmp_path):
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.webp", save_all=True, append_images=frames[1:], lossless=True)
    assert utils.read_image(tmp_path / "moving.webp", 32)[0, 0].tolist() == [255, 0, 0]


def test_an_unreadable_image_is_named(image_folder):
    broken = image_folder / "train/dog/003.png"
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(utils.Problem, match="003.png"):
        load(image_folder)


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pixels_without_a_known_range_are_refused(tmp_path, mode):
    Image.new(mode, (32, 32)).save(tmp_path / "numbers.tif")
    with pytest.raises(utils.Problem, match="numbers.tif"):
        utils.read_image(tmp_path / "numbers.tif", 32)


def test_a_folder_does_not_pass_for_another_source():
    names = ("cifar10", "synthetic", "x/synthetic", "y/CIFAR-10", "z/Füchse $5/")
    assert [utils.data_name(name) for name in names] == [
        "CIFAR-10", "synthetic", "synthetic (folder)", "CIFAR-10 (folder)", "Füchse $5"]
    assert len({utils.slug(utils.data_name(name)) for name in (*names, "日本")}) == 6


def test_a_decompression_bomb_is_named(tmp_path):
    Image.new("1", (12000, 12000)).save(tmp_path / "bomb.png")
    with pytest.raises(utils.Problem, match="bomb.png"):
        utils.read_image(tmp_path / "bomb.png", 32)


def test_an_empty_class_is_named(image_folder):
    (image_folder / "train/emu").mkdir()
    (image_folder / "test/emu").mkdir()
    with pytest.raises(utils.Problem, match="emu"):
        load(image_folder)


def test_classes_that_differ_are_named(image_folder):
    (image_folder / "test/dog").rename(image_folder / "test/wolf")
    with pytest.raises(utils.Problem, match="dog, wolf"):
        load(image_folder)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(utils.Problem, match="nowhere") as problem:
        load(tmp_path / "nowhere")
    assert problem.value.status == 1


def test_a_class_without_validation_image_is_told(image_folder, capsys):
    load(image_folder)
    assert "no validation image of class cat" in capsys.readouterr().err


# ------------------------------------------ CIFAR-10 ------------------------------------------


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """A small archive in CIFAR-10's format; torchvision's and our hashes are made to fit it."""
    random, files = np.random.default_rng(0), {}
    for i, name in enumerate([f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]):
        pixels = random.integers(0, 256, (20, 3072), dtype=np.uint8)
        pixels[:, 0] = i
        files[name] = pickle.dumps({"data": pixels, "labels": [j % 10 for j in range(20)]})
    files["batches.meta"] = pickle.dumps({"label_names": list("abcdefghij")})
    archive = tmp_path / "made.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    sums = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    monkeypatch.setattr(CIFAR10, "train_list", [[n, s] for n, s in sums.items() if "data" in n])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": sums["batches.meta"]})
    monkeypatch.setattr(utils, "CIFAR10_SHA256", hashlib.sha256(archive.read_bytes()).hexdigest())
    root = tmp_path / "datasets"
    root.mkdir()
    archive.rename(root / "cifar-10-python.tar.gz")
    return root


def test_cifar10_from_the_archive_and_unpacked(cifar10):
    classes, images, labels, num_test = utils.load_cifar10(cifar10, mirrors=())
    assert (images.shape, labels.shape, num_test) == ((120, 32, 32, 3), (120,), 20)
    assert images[::20, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5]  # the batches in their own order
    assert classes == list("abcdefghij")
    assert sorted(p.name for p in cifar10.iterdir()) == ["cifar-10-batches-py",
                                                         "cifar-10-python.tar.gz"]
    (cifar10 / "cifar-10-python.tar.gz").unlink()
    assert np.array_equal(utils.load_cifar10(cifar10, mirrors=())[1], images)


@pytest.mark.parametrize("damage", [lambda b: b[:-100], lambda b: b[:50] + b"\0" + b[51:]])
def test_a_damaged_archive_is_named_and_not_unpacked(cifar10, damage):
    archive = cifar10 / "cifar-10-python.tar.gz"
    archive.write_bytes(damage(archive.read_bytes()))
    with pytest.raises(utils.Problem, match="cifar-10-python.tar.gz is truncated or altered"):
        utils.load_cifar10(cifar10, mirrors=())
    assert [p.name for p in cifar10.iterdir()] == [archive.name]


class Trap:
    """Unpickling it leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
def test_an_altered_batch_is_named_and_not_unpickled(cifar10, tmp_path, name):
    utils.load_cifar10(cifar10, mirrors=())
    (cifar10 / "cifar-10-batches-py" / name).write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(utils.Problem, match=f"{name} is missing, truncated or altered"):
        utils.load_cifar10(cifar10, mirrors=())
    assert not (tmp_path / "sprung").exists()


def test_a_missing_batch_is_named(cifar10):
    utils.load_cifar10(cifar10, mirrors=())
    (cifar10 / "cifar-10-batches-py/data_batch_2").unlink()
    with pytest.raises(utils.Problem, match="data_batch_2"):
        utils.load_cifar10(cifar10, mirrors=())
