"""Data: CIFAR-10 in its forms, synthetic images, the split, and photos as people have them."""

import hashlib
import io
import pickle
import re
import shutil
import socket
import unicodedata
import urllib.request
from functools import partial
from urllib.error import URLError

import numpy as np
import pytest
import torch
from conftest import parse, records_in, write_photos
from PIL import Image
from torchvision.datasets import CIFAR10
from torchvision.transforms.functional import normalize

import ex3_convnet
import utils

BATCHES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
PYTHON, BINARY = "cifar-10-batches-py", "cifar-10-batches-bin"

def load(dataset, *argv, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)):
    settings = parse(f"--dataset={dataset}", *argv)
    return utils.load_data(settings, mean, std, torch.device("cpu"))

def levels(data, part):  # the grey of each image
    return data.images[getattr(data, part), 0, 0, 0].tolist()

def shares(data, part):  # of each class among the images
    labels = data.labels[getattr(data, part)]
    return (torch.bincount(labels, minlength=len(data.classes)) / len(labels)).tolist()

@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """A folder with archive and python folder of a CIFAR-10 of 20 images a batch, and its images
    and labels; what utils and torchvision know of the real one fits it."""
    random = np.random.default_rng(0)
    place = tmp_path / "source" / PYTHON
    images = random.integers(0, 256, (120, 32, 32, 3), dtype=np.uint8)
    labels = random.integers(0, 10, 120)
    place.mkdir(parents=True)
    for name, x, y in zip(BATCHES, np.split(images, 6), np.split(labels, 6)):
        x = x.transpose(0, 3, 1, 2).reshape(20, 3072)
        (place / name).write_bytes(pickle.dumps({"data": x, "labels": y.tolist()}))
    (place / "batches.meta").write_bytes(pickle.dumps({"label_names": utils.CIFAR10_CLASSES}))
    shutil.make_archive(place.parent / "cifar-10-python", "gztar", place.parent, PYTHON)
    md5 = {path.name: hashlib.md5(path.read_bytes()).hexdigest()
           for path in place.parent.rglob("*") if path.is_file()}
    known = {"train_list": [[name, md5[name]] for name in BATCHES[:5]],
             "test_list": [["test_batch", md5["test_batch"]]], "tgz_md5": md5[CIFAR10.filename],
             "meta": {**CIFAR10.meta, "md5": md5["batches.meta"]}}
    for name, value in known.items():
        monkeypatch.setattr(CIFAR10, name, value)
    monkeypatch.setattr(utils, "CIFAR10_SIZES", {"train": 90, "val": 10, "test": 20})
    digest = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    monkeypatch.setattr(utils, "CIFAR10_FINGERPRINT", digest[:16])
    return place.parent, images, labels

@pytest.fixture
def mirrors(monkeypatch):
    """{host: the bytes that it delivers}, and the hosts that are asked, in turn."""
    there, asked = {}, []

    def urlopen(request):
        host = request.host.split(".")[-2]
        if host not in asked:
            asked.append(host)
        assert socket.getdefaulttimeout()
        if host not in there:
            raise URLError("not there")
        response = io.BytesIO(there[host])
        response.url, response.length = request.full_url, len(there[host])
        return response

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return there, asked

@pytest.mark.parametrize("place", ["datasets", "shared"])
@pytest.mark.parametrize("form", [CIFAR10.filename, PYTHON])
def test_archive_and_folder_are_the_same_data(folder, cifar10, mirrors, form, place):
    source, images, labels = cifar10
    _, asked = mirrors
    (folder / place).mkdir()
    (source / form).rename(folder / place / form)
    data = load("cifar10" if place == "datasets" else folder / place)
    assert np.array_equal(data.images.permute(0, 2, 3, 1), images)
    assert (data.labels.tolist(), len(data.train), len(data.val)) == (labels.tolist(), 90, 10)
    assert (data.name, asked) == ("CIFAR-10", [])

def test_the_binary_version_is_read_and_refused_if_it_is_altered_or_incomplete(
        tmp_path, monkeypatch):
    (tmp_path / BINARY).mkdir()
    for i, name in enumerate(BATCHES):
        content = bytearray(10_000 * 3073)  # image 7: label, its first red, its last green
        content[7 * 3073:7 * 3073 + 2049] = bytes([i, 10 + i, *bytes(2046), 20 + i])
        (tmp_path / BINARY / f"{name}.bin").write_bytes(content)
    with pytest.raises(utils.UserError, match=f"{BINARY} is incomplete or damaged: delete it"):
        load(tmp_path)
    monkeypatch.setattr(utils, "CIFAR10_BINARY_SHA256", "")
    images, labels = utils.read_cifar10(tmp_path)
    assert labels[7::10_000].tolist() == [*range(6)]
    assert images[7::10_000, [0, 31], [0, 31]].tolist() == (
        [[[10 + i, 0, 0], [0, 20 + i, 0]] for i in range(6)])

def test_mirrors_are_tried_in_turn_and_once_and_without_one_a_sentence_says_what_to_do(
        folder, cifar10, mirrors):
    source, _, labels = cifar10
    there, asked = mirrors
    words = r"^CIFAR-10 cannot be downloaded.*\.tar\.gz.*--dataset=synthetic$"
    with pytest.raises(utils.UserError, match=words) as error:
        ex3_convnet.main([])
    assert error.value.exit_code == 1
    asked.clear()
    archive = (source / CIFAR10.filename).read_bytes()
    there.update(bcebos=archive[:-9], toronto=archive)
    data = load("cifar10")
    assert np.array_equal(data.labels, labels)
    assert asked == ["zenodo", "bcebos", "toronto"]
    there.clear()
    assert load("cifar10").fingerprint == data.fingerprint

@pytest.mark.parametrize("altered", ["data_batch_3", "test_batch", "batches.meta"])
def test_an_altered_file_is_refused_and_not_unpickled(folder, cifar10, mirrors, altered):
    source, _, _ = cifar10
    trap = f"cbuiltins\nopen\n(V{folder}/sprung\nVw\ntR.".encode()
    (source / PYTHON / altered).write_bytes(trap)
    (source / CIFAR10.filename).unlink()
    source.rename(folder / "datasets")
    with pytest.raises(utils.UserError, match=rf"{PYTHON}.* damaged: delete it and start again$"):
        ex3_convnet.main([])
    assert not (folder / "sprung").exists()

def test_the_split_of_photos(photos, capsys):
    """Cats have the levels 5, 10, ..., 60, dogs 65, ..., 120: of each every tenth validates."""
    data = load(photos)
    assert levels(data, "val") == [50, 110]
    cats = [5, 10, 15, 20, 25, 30, 35, 40, 45, 55, 60]
    assert levels(data, "train") == [level for cat in cats for level in (cat, cat + 60)]
    assert levels(data, "test") == [125, 145, 130, 150, 135, 155, 140, 160]
    assert data.labels[data.train].tolist() == [0, 1] * 11
    few = load(photos, "--num_training=3", "--num_validation=4")
    assert (levels(few, "train"), levels(few, "val")) == ([5, 65, 10], [60, 120, 50, 110])
    assert len(load(photos, "--num_validation=23").train) == 1
    assert capsys.readouterr().out == ""

def test_of_fewer_than_ten_images_one_validates_and_of_twenty_two(tmp_path):
    write_photos(tmp_path, {"train/ant": 9, "train/bee": 20, "test/ant": 1, "test/bee": 1})
    data = load(tmp_path)
    assert data.labels[data.val].tolist() == [0, 1, 1]
    assert len(data.train) == 8 + 18

@pytest.mark.parametrize("argv", ["--num_training=23", "--num_validation=24",
                                  "--num_training=20 --num_validation=5"])
def test_an_impossible_split_is_a_wrong_setting(photos, argv):
    with pytest.raises(utils.UserError, match="photos has 24 images for training") as error:
        load(photos, *argv.split())
    assert error.value.exit_code == 2

def test_a_batch_is_normalized(photos):
    numbers = {"mean": (0.5, 0.4, 0.3), "std": (0.5, 0.2, 0.1)}
    data = load(photos, **numbers)
    images, labels = data.batch(torch.tensor([3, 8]))
    assert torch.allclose(images, normalize(data.images[[3, 8]] / 255, **numbers), atol=1e-5)
    assert labels.tolist() == [1, 0]

def test_the_fingerprint_changes_with_a_pixel_and_a_label(few, monkeypatch):
    name, classes, images, labels, sizes = utils.make_synthetic()
    monkeypatch.setattr(utils, "make_synthetic", lambda: (name, classes, images, labels, sizes))
    found = [load("synthetic").fingerprint]
    for changed in images[5, 5, 5], labels[5:6]:
        changed[:1] ^= 1
        found.append(load("synthetic").fingerprint)
    assert len({*found}) == 3
    assert load("synthetic", "--num_training=9").fingerprint == found[-1]

def test_synthetic_images_are_the_same_on_every_machine():
    _, _, images, labels, sizes = utils.make_synthetic()
    assert hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest().startswith(
        "d88a002f9ee85622fb71c4b28c557e1b")
    assert sizes == {"train": 4500, "val": 500, "test": 1000}

@pytest.mark.parametrize("names", ["{:03}.png", "IMG_20260704_{:06}.png"])
def test_each_class_has_its_share_in_each_part_whatever_the_files_are_called(tmp_path, names):
    """Half of the photos are ants; numbers or times run over all classes."""
    counts = {"ant": 30, "bee": 18, "cicada": 12}
    write_photos(tmp_path, {f"{part}/{name}": count for part in ("train", "test")
                            for name, count in counts.items()})
    for i, path in enumerate(sorted(tmp_path.glob("train/*/*"))):
        path.rename(path.with_name(names.format(i)))
    data, more = load(tmp_path), load(tmp_path, "--num_validation=10")  # more than a tenth
    for found in (*(shares(data, part) for part in ("train", "val", "test")), shares(more, "val")):
        assert found == pytest.approx([0.5, 0.3, 0.2], abs=0.11)
    assert min(shares(load(tmp_path, "--num_training=3"), "train")) > 0

def test_what_is_no_photo_of_a_class_is_left_out_and_its_images_told_in_one_line(photos, capsys):
    """A class can be a link; a link inside one is not followed."""
    before = load(photos)
    (photos / "test/dog").rename(photos.parent / "dogs")
    (photos / "test/dog").symlink_to(photos.parent / "dogs")
    (photos / "train/cat/up").symlink_to(photos)
    for name in ("train/__MACOSX/cat/x.png", "train/cat/@eaDir/x.jpg", "train/dog/.x.png",
                 "train/.ipynb_checkpoints/x.png", "more/cat/x.png", "more/cat/y.PNG",
                 "train/loose.png", "train/Thumbs.db", "train/dog/Thumbs.db",
                 "test/dog/desktop.ini", "train/cat/.DS_Store", "notes.txt"):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(photos / "train/cat/000.png", photos / name)
    assert load(photos).fingerprint == before.fingerprint
    line, = capsys.readouterr().out.splitlines()
    assert re.search(r"^Not used: 7 images\b", line)
    assert line.endswith(", in more/cat, train/.ipynb_checkpoints, train/__MACOSX/cat, "
                         "train/cat/@eaDir, train/dog and 1 more")

@pytest.mark.parametrize("name", ["val", "valid"])
def test_photos_in_val_validate_and_those_below_a_class_are_of_it(photos, name):
    write_photos(photos, {f"{name}/cat": 2, f"{name}/dog": 1, "train/dog/at the lake": 3})
    data = load(photos)
    assert (len(data.train), levels(data, "val")) == (27, [5, 15, 10])
    assert torch.bincount(data.labels[data.train]).tolist() == [12, 15]

def test_classes_are_the_same_in_another_case_and_in_another_form_of_unicode(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "bär") for form in ("NFC", "NFD"))
    write_photos(tmp_path, {"train/cat": 4, f"train/{composed}": 5, "val/CAT": 1,
                            f"val/{decomposed.title()}": 2, "test/Cat": 3, f"test/{decomposed}": 2})
    data = load(tmp_path)
    assert data.classes == [composed, "cat"]
    for part, counts in ("train", [5, 4]), ("val", [2, 1]), ("test", [2, 3]):
        assert torch.bincount(data.labels[getattr(data, part)]).tolist() == counts

def test_two_folders_that_differ_in_case_only_are_one_sentence(photos):
    if (photos / "TRAIN").exists():
        pytest.skip("this file system does not tell them apart")
    shutil.copytree(photos / "train/cat", photos / "train/Cat")
    with pytest.raises(utils.UserError, match=r"(?i)^.*train has two folders .*\bcat\b.*$"):
        load(photos)

def test_images_of_test_that_are_training_images_are_told_with_their_number(photos, capsys):
    shutil.copy(photos / "train/cat/000.png", photos / "test/cat/again.png")
    with Image.open(photos / "train/dog/001.png") as image:
        image.save(photos / "test/dog/again.bmp")  # another file with the same pixels
    load(photos)
    line, = capsys.readouterr().out.splitlines()
    assert re.search(r"^2 .*\btest images\b.*\btraining set\b", line)

@pytest.mark.parametrize(("counts", "words"), [
    ({"train/ant": 3, "test/ant": 1}, "photos must have two classes or more; it has: ant"),
    ({"train/ant": 3}, "there is no folder .*test:"), ({}, "there is no folder .*train:"),
    ({"train/ant": 3, "train/bee": 3, "test/ant": 3, "test/bee": 0}, "photos lacks images of bee:"),
    ({"train/ant": 3, "train/bee": 1, "test/ant": 1, "test/bee": 1}, "photos lacks images of bee:"),
    ({"train/ant": 3, "train/bee": 3, "val/ant": 1, "test/ant": 1, "test/bee": 1},
     "photos lacks images of bee:")])
def test_missing_classes_and_images_are_one_sentence(tmp_path, counts, words):
    write_photos(tmp_path / "photos", counts)
    for place in counts:
        (tmp_path / "photos" / place).mkdir(exist_ok=True)
    with pytest.raises(utils.UserError, match=f"{words}[^\n]*$"):
        load(tmp_path / "photos")

def test_files_that_cannot_be_read_are_named_all_at_once(photos):
    names = ["train/cat/003.png", "train/dog/004.png", "test/dog/000.png", "train/dog/gone.png"]
    for name, size in zip(names[:3], (0, 60, 8)):
        (photos / name).write_bytes((photos / name).read_bytes()[:size])
    (photos / names[3]).symlink_to(photos / "nowhere.png")
    with pytest.raises(utils.UserError) as error:
        load(photos)
    assert all(str(photos / name) in str(error.value) for name in names)
    assert str(error.value).count(" (") == 4

def test_two_folders_of_one_name_and_one_named_like_a_data_set_share_nothing(
        folder, small_convnet, no_figures):
    for place, count in ("a/photos", 4), ("b/photos", 5), ("synthetic", 6):
        write_photos(folder / place, {"train/x": 2, "train/y": 3, "test/x": 1, "test/y": count})
        ex3_convnet.main([f"--dataset={folder / place}", "--num_epochs=1"])
    names = sorted(path.name for path in (folder / "figures").iterdir())
    assert [name[:-4] for name in names] == ["photos-", "photos-", "synthetic-folder-"]
    assert len(records_in(folder)) == len([*folder.glob("checkpoints/*")]) == 3

def test_photos_of_renamed_classes_are_other_data_and_a_note_among_them_is_no_cifar_10(photos):
    before = load(photos).fingerprint
    (photos / "cifar-10-notes.txt").write_text("to do")
    assert load(photos).fingerprint == before
    for part in "train", "test":
        (photos / part / "dog").rename(photos / part / "dolphin")
    assert load(photos).fingerprint != before

PICTURE = np.random.default_rng(1).integers(0, 256, (4, 4, 3), dtype=np.uint8)
PICTURE = PICTURE.repeat(8, axis=0).repeat(8, axis=1)  # 32 x 32, which JPEG keeps
PHOTO = Image.fromarray(PICTURE)
EXIF = Image.Exif()
EXIF[0x0112] = 6  # the camera was turned: to be shown a quarter clockwise

def saved(kind, image=PHOTO, **options):
    """An image as Pillow saves it, with the camera's note."""
    content = io.BytesIO()
    image.save(content, kind, **{"exif": EXIF.tobytes(), **options})
    return content.getvalue()

TURNED = {"jpeg": saved("jpeg", quality=100, subsampling=0), "png": saved("png"),
          "tiff": saved("tiff"), "tiff, lzw": saved("tiff", compression="tiff_lzw"),
          "webp": saved("webp", lossless=True)}

@pytest.mark.parametrize("kind", TURNED)
def test_pictures_are_turned_upright_whatever_their_format(tmp_path, kind):
    (tmp_path / "x").write_bytes(TURNED[kind])
    found = utils.read_image(tmp_path / "x", 32).astype(int)
    assert np.abs(found - np.rot90(PICTURE, -1)).max() <= 4

new, WHITE = partial(Image.new, size=(40, 50)), (255, 255, 255)
PALETTE = new("P", color=1)
PALETTE.putpalette([1, 2, 3, 9, 8, 200])
MOVING = {"save_all": True, "append_images": [new("RGB", color="blue")]}

@pytest.mark.parametrize(("image", "name", "options", "expected"), [
    (new("RGBA", color=(0, 0, 200, 51)), "x.webp", {}, (204, 204, 244)),
    (new("LA", color=(0, 0)), "x.png", {}, WHITE), (new("1", color=1), "x.png", {}, WHITE),
    (new("L", color=7), "x.jpg", {}, (7, 7, 7)),
    (new("RGB", color=(1, 2, 3)), "x.png", {"transparency": (1, 2, 3)}, WHITE),
    (new("RGB", color=(1, 2, 3)), "x.png", {"transparency": (1, 2, 4)}, (1, 2, 3)),
    (new("CMYK", color=(0, 255, 255, 0)), "x.jpg", {}, (255, 0, 0)),
    (PALETTE, "x.gif", {}, (9, 8, 200)), (PALETTE, "x.png", {"transparency": 1}, WHITE),
    (new("RGB", color="red"), "x.gif", MOVING, (255, 0, 0))])
def test_every_kind_of_picture_becomes_rgb_on_white(tmp_path, image, name, options, expected):
    image.save(tmp_path / name, **options)
    pixel = utils.read_image(tmp_path / name, 32)[16, 16]
    assert pixel.tolist() == pytest.approx(expected, abs=3)

@pytest.mark.parametrize("content", [
    saved("png", image=new("I;16", color=4000)), saved("tiff", image=new("F", color=0.5))])
def test_more_than_8_bits_are_refused(tmp_path, content):
    path = tmp_path / "x"
    path.write_bytes(content)
    with pytest.raises(utils.UserError, match=r"/x \(more than 8 bits per channel\)$"):
        utils.read_image(path, 32)

@pytest.mark.parametrize("name", ["x.png", "x.jpg"])
def test_a_photo_is_its_middle_square_resized(tmp_path, name):
    PHOTO.resize((500, 300), Image.Resampling.BICUBIC).save(tmp_path / name)
    with Image.open(tmp_path / name) as image:
        square = image.crop((100, 0, 400, 300)).resize((32, 32), Image.Resampling.BILINEAR)
    assert np.abs(utils.read_image(tmp_path / name, 32).astype(int) - np.array(square)).mean() < 2
