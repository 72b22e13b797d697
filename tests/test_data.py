"""Data: synthetic images and folders, the split and its order, normalization, and each error."""

import time

import numpy as np
import pytest
import torch
from conftest import HALF
from PIL import Image

import utils

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


# ----------------------------- which images train, which validate -----------------------------


def make_folder(folder, **classes):
    """train/<class>/ and test/<class>/ with these files; their grey levels count from 0."""
    for part in ("train", "test"):
        for name, files in classes.items():
            (folder / part / name).mkdir(parents=True)
            for i, file in enumerate(files):
                (folder / part / name / file).parent.mkdir(exist_ok=True)
                Image.fromarray(np.full((32, 32, 3), i, np.uint8)).save(folder / part / name / file)
    return folder


def levels(data, part):
    """[(class, grey level)] of the images of a part, in their order."""
    indices = getattr(data, part)
    return [(data.classes[label], level) for label, level in zip(
        data.labels[indices].tolist(), data.images[indices, 0, 0, 0].tolist())]


def test_numbered_images_keep_the_order_of_their_numbers(tmp_path):
    """Not that of their texts, and over all classes."""
    data = load(make_folder(tmp_path, a=["8.png", "10.png", "100.png"], b=["9.png", "11.png"]),
                num_validation=1)
    assert levels(data, "train") == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert levels(data, "val") == [("a", 2)]


@pytest.mark.parametrize("names", ["photo_{:03}.png", "{:03}.png"])
def test_other_images_validate_by_a_tenth_of_each_class_and_train_mixed(tmp_path, names):
    """Also where classes have the same numbers."""
    files = [names.format(i) for i in range(20)]
    data = load(make_folder(tmp_path, ant=files, bee=files[:10], cat=files[:2]))
    assert levels(data, "val") == [("ant", 18), ("bee", 9), ("cat", 1), ("ant", 19)]
    train = levels(data, "train")
    assert sorted(train) == [*(("ant", i) for i in range(18)), *(("bee", i) for i in range(9)),
                             ("cat", 0)]
    for count in (6, 12, 18):  # the first images are a fair sample, as --num_training takes them
        bees = [name for name, _ in train[:count]].count("bee")
        assert abs(bees - count / 3) <= 1, count
    few = load(tmp_path, num_training=6)
    assert levels(few, "train") == train[:6]
    assert levels(few, "val") == levels(data, "val")


def test_images_below_the_folder_of_a_class_are_of_the_class(tmp_path):
    data = load(make_folder(tmp_path, cat=["a.png", "trip/b.png", "trip/c.png"],
                            dog=["a.png", "b.png"]))
    assert len(data.train) + len(data.val) == 5
    assert (data.labels == 0).sum() == 6


def test_hidden_files_are_not_read_and_others_named(tmp_path, capsys):
    make_folder(tmp_path, cat=["a.png", "b.png"], dog=["a.png", "b.png"])
    for name in ("cat/._a.png", "cat/.DS_Store", "cat/Thumbs.db", "dog/notes.txt", "dog/c.HEIC",
                 "dog/README", "dog/.hidden/a.png", "cat/__MACOSX/a.png"):
        (tmp_path / "train" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "train" / name).write_text("no image")
    (tmp_path / "train/.ipynb_checkpoints").mkdir()
    data = load(tmp_path)
    assert (data.classes, len(data.images)) == (["cat", "dog"], 8)
    line, = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{tmp_path}: left out as no images: ")
    for word in ("1 .txt", "1 .heic", "1 without suffix", "convert HEIC photos to JPEG first"):
        assert word in line


def test_one_class_is_too_few(tmp_path):
    make_folder(tmp_path, cat=["a.png", "b.png"])
    with pytest.raises(utils.Problem, match="train: 1, and it needs at least two"):
        load(tmp_path)


def test_a_class_needs_an_image_to_train_and_one_to_validate(tmp_path):
    make_folder(tmp_path, cat=["a.png", "b.png"], dog=["a.png"])
    with pytest.raises(utils.Problem, match="dog: 1, and it needs at least 2"):
        load(tmp_path)


def test_images_that_do_not_fit_into_the_memory_are_told_before_they_are_read(
        image_folder, monkeypatch):
    monkeypatch.setattr(utils, "read_image", None)
    monkeypatch.setattr(utils.Path, "read_text", lambda self: "MemAvailable:   12 kB\n")
    monkeypatch.setattr(utils.Path, "exists", lambda self: True)
    with pytest.raises(utils.Problem, match="16 images of 32 x 32 pixels need .* choose a smaller"):
        utils.load_image_folder(image_folder, 32, CPU)
