"""Data: CIFAR-10 in its forms, the synthetic images, folders of photos as people have them, and
the split; every error is one sentence."""

import hashlib
import io
import pickle
import socket
import struct
import tarfile
import urllib.request
import zlib
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

CPU = torch.device("cpu")
HALF = (0.5, 0.5, 0.5)


def load(dataset, *argv):
    return utils.load_data(parse(f"--dataset={dataset}", *argv), HALF, HALF, CPU)


def levels(data, part):
    """The grey level of each image of a part, in their order."""
    return data.images[getattr(data, part), 0, 0, 0].tolist()


# ------------------------------------------- CIFAR-10 -------------------------------------------


class Trap:
    """Unpickling it leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def pack(files):
    """These files of CIFAR-10 as its archive."""
    with io.BytesIO() as content, tarfile.open(fileobj=content, mode="w:gz") as archive:
        for name, file in files.items():
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(file)
            archive.addfile(info, io.BytesIO(file))
        archive.close()
        return content.getvalue()


@pytest.fixture
def cifar10(monkeypatch):
    """The files of a CIFAR-10 of 20 images a batch, and "archive", all of them packed; what we and
    torchvision know of the real one fits it. Its images and labels are `images`, `labels`."""
    random, files = np.random.default_rng(0), {}
    images = random.integers(0, 256, (120, 32, 32, 3), dtype=np.uint8)
    labels = random.integers(0, 10, 120)
    for i, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        part = slice(20 * i, 20 * i + 20)
        files[name] = pickle.dumps({"data": images[part].transpose(0, 3, 1, 2).reshape(20, 3072),
                                    "labels": labels[part].tolist()})
    files["batches.meta"] = pickle.dumps({"label_names": utils.CIFAR10_CLASSES})
    files["archive"] = pack(files)
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    batches = [[name, md5[name]] for name in files if "batch_" in name or name == "test_batch"]
    monkeypatch.setattr(CIFAR10, "train_list", batches[:5])
    monkeypatch.setattr(CIFAR10, "test_list", batches[5:])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": md5["batches.meta"]})
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5["archive"])
    monkeypatch.setattr(CIFAR10, "url", CIFAR10.url)  # set back afterwards
    monkeypatch.setattr(utils, "CIFAR10_SIZES", (90, 10, 20))
    digest = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    monkeypatch.setattr(utils, "CIFAR10_FINGERPRINT", digest[:16])
    return {**files, "images": images, "labels": labels}


@pytest.fixture
def mirrors(monkeypatch):
    """{a part of an address: what is there, or the error}, and of all that is asked the hosts."""
    there, asked = {}, []

    def urlopen(request):
        host = request.full_url.split("/")[2]
        asked.extend([host] if host not in asked else [])
        content = next((there[part] for part in there if part in host), URLError("not there"))
        assert socket.getdefaulttimeout()
        if isinstance(content, Exception):
            raise content
        response = io.BytesIO(content)
        response.url, response.length = request.full_url, len(content)
        return response

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return there, asked


def unpack(folder, files, **changes):
    """Write the batches into a folder, as the archive has them."""
    (folder / "cifar-10-batches-py").mkdir(parents=True)
    for name, content in {**files, **changes}.items():
        if "batch" in name:
            (folder / "cifar-10-batches-py" / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("place", ["datasets", "shared"])
@pytest.mark.parametrize("form", ["archive", "folder"])
def test_archive_and_folder_are_the_same_data(folder, cifar10, mirrors, form, place):
    if form == "folder":
        unpack(folder / place, cifar10)
    else:
        (folder / place).mkdir()
        (folder / place / CIFAR10.filename).write_bytes(cifar10["archive"])
    data = load("cifar10" if place == "datasets" else folder / place)
    assert np.array_equal(data.images.permute(0, 2, 3, 1), cifar10["images"])
    assert np.array_equal(data.labels, cifar10["labels"])
    assert [len(part) for part in (data.train, data.val, data.test)] == [90, 10, 20]
    assert (data.name, data.folder.parent.name, mirrors[1]) == ("CIFAR-10", "cifar-10", [])


def test_the_binary_version_is_read_and_one_that_is_altered_refused(tmp_path):
    for i, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        with open(tmp_path / f"{name}.bin", "wb") as file:
            file.truncate(10_000 * 3073)
            file.seek(7 * 3073)  # image 7: label, red of the first pixel, green of the last
            file.write(bytes([i, 10 + i]) + bytes(2 * 1024 - 2) + bytes([20 + i]))
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for path in tmp_path.glob("*.bin"):
        path.rename(folder / path.name)
    classes, images, labels, sizes = utils.load_cifar10(tmp_path)
    assert (images.shape, images.dtype, labels.dtype) == ((60_000, 32, 32, 3), "uint8", "int64")
    assert labels[7::10_000].tolist() == [0, 1, 2, 3, 4, 5]
    assert images[7::10_000, 0, 0].tolist() == [[10 + i, 0, 0] for i in range(6)]
    assert images[7::10_000, 31, 31].tolist() == [[0, 20 + i, 0] for i in range(6)]
    assert (classes[0], classes[9], sizes) == ("airplane", "truck", (49_000, 1_000, 10_000))
    with pytest.raises(utils.Problem, match="damaged"):
        load(tmp_path)
    for path in sorted(folder.glob("*.bin"))[1:], folder.glob("*.bin"):
        [file.unlink() for file in path]
        with pytest.raises(utils.Problem, match="cifar-10-batches-bin"):
            load(tmp_path)


def test_mirrors_are_tried_in_turn_and_only_once(folder, cifar10, mirrors):
    there, asked = mirrors
    there.update({"zenodo": TimeoutError(), "bcebos": b"another file", "toronto":
                  cifar10["archive"]})
    data = load("cifar10")
    assert np.array_equal(data.labels, cifar10["labels"])
    assert [host.split(".")[-2] for host in asked] == ["zenodo", "bcebos", "toronto"]
    there.clear()
    assert load("cifar10").fingerprint == data.fingerprint


@pytest.mark.parametrize("altered", ["archive", "data_batch_3", "test_batch", "batches.meta", ""])
def test_without_a_mirror_one_sentence_and_nothing_altered_is_unpickled(
        folder, cifar10, mirrors, altered):
    trap = pickle.dumps(Trap(folder / "sprung"))
    if altered == "archive":
        mirrors[0]["zenodo"] = pack({**cifar10, "images": b"", "labels": b"", "data_batch_1": trap})
    elif altered:
        unpack(folder / "datasets", cifar10, **{altered: trap})
    with pytest.raises(utils.Problem, match=r"datasets.*\.tar\.gz.*--dataset=synthetic") as problem:
        ex3_convnet.main([])
    assert problem.value.status == 1
    assert not (folder / "sprung").exists()
    pickle.loads(trap).close()  # it would have sprung
    assert (folder / "sprung").exists()


# ------------------------------------------- the split -------------------------------------------


def test_the_split_of_photos(photos):
    """Cats have the levels 5, 10, ..., 60, dogs 65, ..., 120: the last tenth of each validates."""
    data = load(photos)
    assert levels(data, "val") == [60, 120]
    assert levels(data, "train") == [level for i in range(5, 60, 5) for level in (i, i + 60)]
    assert levels(data, "test") == [125, 145, 130, 150, 135, 155, 140, 160]
    assert data.labels[data.train].tolist() == [0, 1] * 11
    few = load(photos, "--num_training=3", "--num_validation=4")
    assert (levels(few, "train"), levels(few, "val")) == ([5, 65, 10], [55, 115, 60, 120])
    assert len(load(photos, "--num_validation=23").train) == 1


@pytest.mark.parametrize("argv", [["--num_training=23"], ["--num_validation=24"],
                                  ["--num_training=20", "--num_validation=5"]])
def test_an_impossible_split_is_a_wrong_flag(photos, argv):
    with pytest.raises(utils.Problem, match="are more than the 24 of photos") as problem:
        load(photos, *argv)
    assert problem.value.status == 2


def test_a_batch_is_normalized(photos):
    mean, std = (0.5, 0.4, 0.3), (0.5, 0.2, 0.1)
    data = utils.load_data(parse(f"--dataset={photos}"), mean, std, CPU)
    images, labels = data.batch(torch.tensor([3, 8]))
    assert torch.allclose(images, normalize(data.images[[3, 8]] / 255, mean, std), atol=1e-5)
    assert labels.tolist() == [1, 0]


def test_images_of_another_size_are_resized(few):
    data = load("synthetic", "--image_size=48")
    for image, original in zip(data.images[:5], utils.draw_synthetic()[1]):
        theirs = Image.fromarray(original).resize((48, 48), Image.Resampling.BILINEAR)
        assert np.abs(image.permute(1, 2, 0).numpy().astype(int) - np.array(theirs)).max() <= 1


def test_the_fingerprint_changes_with_a_pixel_a_label_and_the_order(few, monkeypatch):
    classes, images, labels, sizes = utils.draw_synthetic()
    pixel, label = images.copy(), labels.copy()
    pixel[5, 5, 5, 1] ^= 1
    label[5] ^= 1
    order = np.argsort(labels, kind="stable")
    found = []
    for x, y in (images, labels), (pixel, labels), (images, label), (images[order], labels[order]):
        monkeypatch.setattr(utils, "draw_synthetic", lambda x=x, y=y: (classes, x, y, sizes))
        found.append(load("synthetic").fingerprint)
    assert len({*found}) == 4
    assert load("synthetic", "--num_training=9").fingerprint == found[-1]


def test_synthetic_images_are_those_of_the_published_records():
    _, images, labels, sizes = utils.draw_synthetic()
    assert hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest().startswith(
        "45d226ffeb17293a87f5b792bcf469ef")
    assert sizes == (4500, 500, 1000)


# ---------------------------------------- folders of photos ----------------------------------------


@pytest.mark.parametrize("names", ["{:03}.png", "IMG_20260704_{:06}.png"])
@pytest.mark.parametrize("numbering", ["one after another", "each from 0", "unequal"])
def test_numbered_names_leave_each_class_images_to_train_and_to_validate(
        tmp_path, names, numbering):
    counts = {"ant": 40, "bee": 12, "cat": 8} if numbering == "unequal" else dict.fromkeys(
        ("ant", "bee", "cat"), 20)
    write_photos(tmp_path, {f"{part}/{name}": count for part in ("train", "test")
                            for name, count in counts.items()})
    before = 0
    for name, count in counts.items():
        for path in sorted((tmp_path / "train" / name).iterdir(), reverse=True):
            path.rename(path.with_name("_" + names.format(int(path.stem) + before)))
        before += count if numbering == "one after another" else 0
    data = load(tmp_path, "--num_training=20")
    for part in data.train, data.val, load(tmp_path).train:
        share = torch.bincount(data.labels[part], minlength=3) / len(part)
        assert share.tolist() == pytest.approx([n / 60 for n in counts.values()], abs=0.15)


def test_a_link_inside_a_class_is_not_followed_but_a_class_can_be_one(photos):
    before = load(photos)
    (photos / "train/cat/up").symlink_to(photos)
    (photos / "train/cat/here").symlink_to(photos / "train/cat")
    (photos / "train/dog").rename(photos.parent / "dogs")
    (photos / "train/dog").symlink_to(photos.parent / "dogs")
    assert load(photos).fingerprint == before.fingerprint


def test_what_systems_put_there_is_no_photo_and_no_class(photos, capsys):
    before = load(photos)
    for name in ("train/@eaDir/x.png", "test/__MACOSX/x.png", "train/.ipynb_checkpoints/x.png",
                 "train/cat/@eaDir/x.png", "test/dog/__MACOSX/._x.png", "train/cat/._000.png",
                 "train/dog/.ipynb_checkpoints/x.png", "train/Thumbs.db", "test/dog/Thumbs.db",
                 "train/dog/desktop.ini", "train/cat/.DS_Store"):
        (photos / name).parent.mkdir(exist_ok=True)
        (photos / name).write_bytes((photos / "train/cat/000.png").read_bytes())
    assert load(photos).fingerprint == before.fingerprint
    assert capsys.readouterr().out == ""
    (photos / "train/loose.png").touch()
    assert load(photos).fingerprint == before.fingerprint
    assert "loose.png" in capsys.readouterr().out


def test_photos_in_val_validate_and_those_below_a_class_are_of_it(photos):
    write_photos(photos, {"val/cat": 2, "val/dog": 1, "train/dog/at the lake": 3})
    data = load(photos)
    assert (len(data.train), levels(data, "val")) == (27, [5, 15, 10])
    assert torch.bincount(data.labels[data.train]).tolist() == [12, 15]


@pytest.mark.parametrize(("counts", "words"), [
    ({"train/cat": 3, "test/cat": 1}, "cat"), ({"train/cat": 3}, "test"),
    ({"train/a": 3, "train/b": 3, "test/a": 3}, "b"),
    ({"train/a": 3, "train/b": 1, "test/a": 1, "test/b": 1}, "b"),
    ({"train/a": 3, "train/b": 3, "val/a": 1, "test/a": 1, "test/b": 1}, "b"), ({}, "train")])
def test_missing_classes_and_images_are_one_sentence(tmp_path, counts, words):
    write_photos(tmp_path / "photos", counts)
    for part in "train", "test":
        (tmp_path / "photos" / part / "b" if words == "b" else tmp_path).mkdir(
            parents=True, exist_ok=True)
    with pytest.raises(utils.Problem, match=rf"^.*photos.*\b{words}\b[^\n]*$") as problem:
        load(tmp_path / "photos")
    assert problem.value.status == 1


def test_a_home_that_nobody_has_is_one_sentence(folder):
    with pytest.raises(utils.Problem, match="there is no folder .*~nouser/x"):
        ex3_convnet.main(["--dataset=~nouser/x"])


def test_damaged_files_are_named_all_at_once(photos):
    names = ["train/cat/003.png", "train/dog/004.png", "test/dog/000.png"]
    for name, size in zip(names, (0, 60, 8)):
        (photos / name).write_bytes((photos / name).read_bytes()[:size])
    (photos / "train/dog/notes.txt").write_text("no image")
    with pytest.raises(utils.Problem) as problem:
        load(photos)
    assert all(str(photos / name) in str(problem.value) for name in (*names, "train/dog/notes.txt"))
    assert str(problem.value).count(".png") == 3


def test_two_folders_of_one_name_and_those_named_like_a_data_set_are_apart(
        folder, small_convnet, no_figures):
    for place, size in ("a/photos", 40), ("b/photos", 50), ("synthetic", 60):
        write_photos(folder / place, {"train/x": 2, "train/y": 3, "test/x": 1, "test/y": size // 10})
        ex3_convnet.main([f"--dataset={folder / place}", "--num_epochs=1"])
    names = sorted(path.name for path in (folder / "figures").iterdir())
    assert [name[:-4] for name in names] == ["photos-", "photos-", "synthetic-folder-"]
    assert len(records_in(folder)) == len([*folder.glob("checkpoints/*")]) == 3


# --------------------------------------- kinds of pictures ---------------------------------------

PICTURE = np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8)
EXIF = Image.Exif()
EXIF[0x0112] = 6  # the camera was turned: to be shown a quarter clockwise
PROFILE = "\nexif\n{:8}\n{}\n".format(len(EXIF.tobytes()), EXIF.tobytes().hex()).encode()


def read(path):
    """The one image as the network gets it, or why it cannot be read."""
    images, unreadable = utils.read_images([path], 32)
    return unreadable.get(0, images[0])


def png(pixels, before=(), after=()):
    """A PNG of pixels (H, W, C), uint8 or uint16, with chunks before and after them."""
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(
            ">I", zlib.crc32(kind + content))

    height, width, channels = pixels.shape
    head = struct.pack(">IIBBBBB", width, height, 8 * pixels.itemsize,
                       {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(f">u{pixels.itemsize}").tobytes() for row in pixels)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in [
        (b"IHDR", head), *before, (b"IDAT", zlib.compress(rows)), *after, (b"IEND", b"")])


def tiff16(channels):
    """A TIFF of 32 x 32 pixels of 16 bits."""
    tags = {256: 32, 257: 32, 258: 16, 259: 1, 262: 1 + (channels > 1), 273: 200, 277: channels,
            278: 32, 279: 2048 * channels}
    bits = struct.pack("<3H", 16, 16, 16)
    if channels > 1:  # their numbers of bits stand at the end of the head
        tags[258] = 200 - len(bits)
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(
        struct.pack("<HHII", tag, 3, channels if tag == 258 else 1, value)
        for tag, value in tags.items()) + bytes(4)
    return head.ljust(200 - len(bits), b"\0") + bits + b"\x10\x20" * 1024 * channels


@pytest.mark.parametrize(("name", "options"), [
    ("x.png", {}), ("x.tif", {}), ("x.tif", {"compression": "tiff_lzw"}),
    ("x.webp", {"lossless": True}), ("x.jpg", {"quality": 100, "subsampling": 0})])
@pytest.mark.parametrize(("orientation", "turned"), [
    (6, lambda x: np.rot90(x, -1)), (3, lambda x: np.rot90(x, 2)), (8, np.rot90), (2, np.fliplr)])
def test_pictures_are_turned_upright_whatever_their_format(
        tmp_path, name, options, orientation, turned):
    picture = np.kron(PICTURE[:4, :4], np.ones((8, 8, 1), np.uint8))  # which JPEG keeps
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(picture).save(tmp_path / name, exif=exif, **options)
    assert np.abs(read(tmp_path / name).astype(int) - turned(picture)).max() <= 4 * (".j" in name)


@pytest.mark.parametrize("chunk", [
    (b"eXIf", EXIF.tobytes()[6:]), (b"tEXt", b"Raw profile type exif\0" + PROFILE),
    (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(PROFILE))])
@pytest.mark.parametrize("where", ["before", "after"])
def test_a_png_is_turned_upright_by_any_tools_profile(tmp_path, chunk, where):
    (tmp_path / "x.png").write_bytes(png(PICTURE, **{where: [chunk]}))
    assert np.array_equal(read(tmp_path / "x.png"), np.rot90(PICTURE, -1))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_transparent_colour_becomes_white(tmp_path, channels):
    pixels = PICTURE[:, :, :channels] // 2
    pixels[:16] = np.arange(10, 10 + channels)
    (tmp_path / "x.png").write_bytes(png(pixels, [
        (b"tRNS", struct.pack(f">{channels}H", *range(10, 10 + channels)))]))
    assert read(tmp_path / "x.png")[:16].min() == 255
    assert np.array_equal(read(tmp_path / "x.png")[16:], np.broadcast_to(pixels[16:], (16, 32, 3)))


@pytest.mark.parametrize(("mode", "colour", "name", "expected"), [
    ("RGBA", (200, 0, 0, 0), "x.png", (255, 255, 255)), ("L", 100, "x.jpg", (100, 100, 100)),
    ("RGBA", (0, 0, 200, 51), "x.png", (204, 204, 244)), ("LA", (0, 0), "x.png", (255, 255, 255)),
    ("RGBA", (0, 0, 200, 255), "x.webp", (0, 0, 200)), ("L", 100, "x.bmp", (100, 100, 100)),
    ("CMYK", (0, 255, 255, 0), "x.jpg", (255, 0, 0)), ("1", 1, "x.png", (255, 255, 255)),
    ("CMYK", (0, 255, 255, 0), "x.tif", (255, 0, 0)), ("1", 0, "x.tif", (0, 0, 0)),
    ("P", 1, "x.png", (9, 8, 200)), ("P", 1, "x.gif", (9, 8, 200)),
    ("P", 0, "x.png", (255, 255, 255)), ("P", 0, "x.gif", (255, 255, 255))])
def test_every_kind_of_picture_becomes_rgb_on_white(tmp_path, mode, colour, name, expected):
    image, options = Image.new(mode, (40, 50), colour), {}
    if mode == "P":
        image.putpalette([1, 2, 3, 9, 8, 200])
        options = {"transparency": 0}
    image.save(tmp_path / name, **options)
    assert read(tmp_path / name)[16, 16].tolist() == pytest.approx(expected, abs=3)


@pytest.mark.parametrize("name", ["x.gif", "x.png", "x.webp"])
def test_of_an_animation_the_first_picture_counts(tmp_path, name):
    first, *others = (Image.new("RGB", (32, 32), colour) for colour in ("red", "blue", "lime"))
    first.save(tmp_path / name, save_all=True, append_images=others)
    assert getattr(Image.open(tmp_path / name), "n_frames", 1) == 3
    assert read(tmp_path / name)[9, 9].tolist() == pytest.approx([255, 0, 0], abs=3)


@pytest.mark.parametrize(("name", "content"), [
    *((f"x{channels}.png", png(np.full((32, 32, channels), 4000, np.uint16)))
      for channels in (1, 2, 3, 4)), ("x1.tif", tiff16(1)), ("x3.tif", tiff16(3))])
def test_more_than_8_bits_are_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    Image.open(tmp_path / name).load()  # it is a picture
    assert read(tmp_path / name) == f"{tmp_path / name} (more than 8 bits a channel)"


@pytest.mark.parametrize("name", ["x.png", "x.jpg"])
def test_a_photo_is_its_middle_square_resized(tmp_path, name):
    Image.fromarray(PICTURE).resize((500, 300), Image.Resampling.BICUBIC).save(tmp_path / name)
    with Image.open(tmp_path / name) as image:
        square = image.crop((100, 0, 400, 300)).resize((32, 32), Image.Resampling.BILINEAR)
    assert np.abs(read(tmp_path / name).astype(int) - np.array(square)).mean() < 2
