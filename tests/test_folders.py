"""Folders of photos as people have them, to train on and to classify; and a memory that is full."""

import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import HALF, made_record
from PIL import Image, features

import ex3_convnet
import utils

CPU = torch.device("cpu")
FORMATS = ["png", "gif", "jfif", "jpeg", "webp", "tiff", "bmp"] + ["avif"] * features.check("avif")
CLUTTER = [".ipynb_checkpoints/IMG_1.png", "__MACOSX/IMG_1.png", "._IMG_1.png", "Thumbs.db",
           "thumbs.db", ".DS_Store", "Desktop.ini"]  # what no person has put there


def draw(path, level=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((40, 50, 3), level, np.uint8)).save(path, **options)


SUMMARY = "As their folder is named: "


@pytest.fixture
def photos(folder):
    """Two classes of three photos each, none numbered."""
    for part in ("train", "test"):
        for i, name in enumerate(("cat", "dog")):
            for j in range(3):
                draw(folder / "photos" / part / name / f"IMG_{j}.png", 100 * i + 10 * j)
    return folder / "photos"


@pytest.fixture
def trained(photos, small_convnet, no_drawing, capsys):
    """The photos, after a training on them; and a function that classifies."""
    argv = [f"--dataset={photos}", "--num_epochs=1"]
    ex3_convnet.main(argv)
    capsys.readouterr()

    def predict(*paths):
        with pytest.raises(SystemExit) as end:
            utils.run_script(lambda: sys.exit(
                ex3_convnet.main([*argv, "--predict", *map(str, paths)])))
        output = capsys.readouterr()
        lines = [line for line in output.out.splitlines()[1:] if not line.startswith(SUMMARY)]
        predict.summary = output.out.splitlines()[-1]
        return end.value.code, lines, output.err.splitlines()

    return predict


def load(dataset, size=32):
    return utils.load_data(str(dataset), size, None, None, HALF, HALF, CPU)


def clutter(folder):
    for name in CLUTTER:
        (folder / name).parent.mkdir(exist_ok=True)
        if name.endswith(".png") and "/" in name:
            draw(folder / name)
        else:
            (folder / name).write_bytes(b"\0")


# ------------------------------------ what is an image, and what not ------------------------------


@pytest.mark.parametrize("suffix", [*FORMATS, "PNG"])
def test_what_pillow_reads_is_trained_on_and_classified(trained, photos, capsys, suffix):
    draw(photos / f"train/cat/other.{suffix}",
         **{"format": "JPEG"} if suffix == "jfif" else {})
    assert len(load(photos).images) == 13
    assert "left out" not in capsys.readouterr().out
    status, lines, errors = trained(photos / "train/cat")
    assert (status, len(lines), errors) == (None, 4, [])


def test_what_no_person_has_put_there_is_neither_read_nor_told(trained, photos, capsys):
    for place in ("train", "train/cat", "test/dog", "test"):
        clutter(photos / place)
    data = load(photos)
    assert (data.classes, len(data.images)) == (["cat", "dog"], 12)
    assert capsys.readouterr().out == ""
    status, lines, errors = trained(photos / "train/cat")
    assert (status, len(lines), errors) == (None, 3, [])


def test_images_in_no_folder_of_a_class_are_told(photos, capsys):
    for name in ("train/a.png", "train/b.png", "test/c.png", "test/d.png", "train/.e.png"):
        draw(photos / name)
    assert len(load(photos).images) == 12
    assert capsys.readouterr().out == (f"{photos}: left out as in no folder of a class: "
                                       "train/a.png, train/b.png, test/c.png, ...\n")


def test_what_is_left_out_of_a_folder_to_classify_is_told(trained, photos):
    for name in ("a.HEIC", "b.heic", "notes.txt"):
        (photos / "train/cat" / name).touch()
    status, lines, errors = trained(photos / "train/cat")
    assert (status, len(lines)) == (None, 3)
    assert errors == [f"{photos / 'train/cat'}: left out as no images: 2 .heic, 1 .txt; convert "
                      "HEIC photos to JPEG first"]


def test_a_folder_to_classify_that_holds_only_heic_says_what_to_do(trained, photos):
    (photos / "a.HEIC").touch()
    for part in ("train", "test"):
        utils.shutil.rmtree(photos / part)
    status, lines, (error,) = trained(photos)
    assert (status, lines) == (1, [])
    assert f"there is no image in {photos} (left out as no images: 1 .heic; convert" in error


def test_classifying_goes_on_past_what_cannot_be_read_and_ends_with_1(trained, photos):
    (photos / "train/cat/IMG_0.png").write_bytes(b"no image")
    status, lines, errors = trained("nowhere.jpg", photos / "train/cat", photos / "train/dog")
    assert status == 1
    assert [line.split(":")[0] for line in lines] == [
        str(photos / "train" / name) for name in (
            "cat/IMG_1.png", "cat/IMG_2.png", "dog/IMG_0.png", "dog/IMG_1.png", "dog/IMG_2.png")]
    assert errors[0].startswith("nowhere.jpg cannot be read as an image")
    assert "cat/IMG_0.png cannot be read as an image" in errors[1]
    assert errors[2].endswith(": 2 of 7 files cannot be read as images")


def test_the_accuracy_follows_where_folders_are_named_after_classes(trained, photos):
    draw(photos / "train/dog/at the lake/Rex.png")
    _, lines, _ = trained(photos / "train", photos / "test/dog")
    right = sum(line.split()[-2] in Path(line.split(": ")[0]).parts for line in lines)
    assert trained.summary == f"{SUMMARY}{right} of 10 images, {right / 10:.1%}"
    assert len(trained(photos / "train/dog/at the lake")[1]) == 1  # it has no class's name
    assert SUMMARY not in trained.summary


@pytest.mark.parametrize(("change", "words"), [
    (lambda cat, dog: utils.shutil.rmtree(dog), "train: 1, and it needs at least two"),
    (lambda cat, dog: [path.unlink() for path in dog.iterdir()],
     "dog: 0, and it needs at least 2: add some, or delete the folder\n"),
    (lambda cat, dog: [path.unlink() for path in list(dog.iterdir())[1:]],
     "dog: 1, and it needs at least 2: add some, or delete the folder\n"),
    (lambda cat, dog: [path.rename(path.with_suffix(".HEIC")) for path in list(dog.iterdir())],
     "dog: 0, and it needs at least 2: add some, or delete the folder (left out as no images: "
     "3 .heic; convert HEIC photos to JPEG first)\n")])
def test_too_few_classes_or_images_are_one_sentence(photos, capsys, change, words):
    change(photos / "train/cat", photos / "train/dog")
    with pytest.raises(SystemExit) as end:
        utils.run_script(partial(ex3_convnet.main, [f"--dataset={photos}"]))
    output = capsys.readouterr()
    assert (end.value.code, output.out, output.err.count("\n")) == (1, "", 1)
    assert words in output.err


# ------------------------------------ order, split and tables ------------------------------------


def test_the_first_training_images_are_of_all_classes(photos):
    """Where the classes have as many images each, as --num_training takes them."""
    data = load(photos)
    assert data.labels[data.train].tolist() == [0, 1, 0, 1]
    assert data.labels[data.val].tolist() == [0, 1]  # the last of each class
    assert data.images[data.val, 0, 0, 0].tolist() == [20, 120]


def test_one_file_without_a_number_splits_by_the_classes(tmp_path):
    for name, files in {"cat": ["1", "2", "3"], "dog": ["4", "5", "6"]}.items():
        for file in files:
            for part in ("train", "test"):
                draw(tmp_path / part / name / f"{file}.png", int(file))
    data = load(tmp_path)
    assert data.images[:6, 0, 0, 0].tolist() == [1, 2, 3, 4, 5, 6]
    (tmp_path / "train/cat/1.png").rename(tmp_path / "train/cat/1a.png")
    data = load(tmp_path)
    assert data.images[:6, 0, 0, 0].tolist() == [1, 4, 2, 5, 3, 6]


@pytest.mark.parametrize(("classes", "beside"), [
    (utils.CIFAR10_CLASSES, True), (("cat", "dog"), False), (tuple(utils.SHAPES), False)])
def test_the_reports_numbers_stand_beside_ours_only_on_the_classes_of_cifar10(classes, beside):
    records = {run: [made_record(classes=classes)] for run in ("with batch norm",
                                                               "without batch norm")}
    text = "\n".join(utils.table_lines(ex3_convnet.QUESTIONS["2a"], records))
    assert "70.0 [" in text
    assert ("(79.9, -9.9)" in text) == ("the report's" in text) == beside


# -------------------------------------------- memory --------------------------------------------

GB = 10**9


@pytest.fixture
def free(monkeypatch):
    """A function that sets the free memory, and the limit of the container, as the system tells."""
    def free(memory, limit=None):
        told = {"/proc/meminfo": lambda: f"MemTotal: 1 kB\nMemAvailable: {memory() // 1024} kB\n",
                "/sys/fs/cgroup/memory.max": lambda: f"{limit}\n"}
        exists, read = utils.Path.exists, utils.Path.read_text
        monkeypatch.setattr(utils.Path, "exists", lambda path: exists(path) if (
            str(path) not in told) else limit is not None or str(path) == "/proc/meminfo")
        monkeypatch.setattr(utils.Path, "read_text", lambda path, **options: (
            told[str(path)]() if str(path) in told else read(path, **options)))
    return free


@pytest.mark.parametrize(("memory", "limit"), [(4 * GB, None), (4 * GB, "max"), (64 * GB, 4 * GB)])
def test_photos_that_do_not_fit_are_one_sentence_before_anything_is_allocated(
        tmp_path, free, monkeypatch, capsys, memory, limit):
    free(lambda: memory, limit)
    for part, count in ("train", 1400), ("test", 100):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                (tmp_path / part / name / f"IMG_{i}.jpg").touch()
    monkeypatch.setattr(np, "empty", None)
    with pytest.raises(SystemExit) as end:
        utils.run_script(partial(ex3_convnet.main, [f"--dataset={tmp_path}", "--image_size=1024"]))
    assert end.value.code == 1
    assert capsys.readouterr().err.split(": ", 1)[1] == (
        "3,000 images of 1024 x 1024 pixels need 9.4 GB of memory, and 4.0 GB are free: choose a "
        "smaller --image_size\n")


def test_images_that_are_in_the_memory_already_are_not_counted_again(photos, free, monkeypatch):
    left, read = [12 * 3 * 64**2 + 1024], utils.read_image

    def read_and_fill(path, size):
        left[0] -= 3 * size**2
        return read(path, size)

    monkeypatch.setattr(utils, "read_image", read_and_fill)
    free(lambda: left[0])
    assert load(photos, 64).images.shape == (12, 3, 64, 64)
    assert left[0] < 2048


def test_a_data_set_that_is_enlarged_beyond_the_memory_is_one_sentence(free):
    free(lambda: 4 * GB)
    with pytest.raises(utils.Problem, match="6,000 images of 512 x 512 pixels need 4.7 GB"):
        load("synthetic", 512)


@pytest.mark.parametrize(("fault", "advice"), [
    (MemoryError(), "--image_size"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "--image_size"),
    (torch.OutOfMemoryError("CUDA out of memory"), "--device=cpu")])
def test_the_advice_for_a_full_memory_fits_the_device(capsys, fault, advice):
    def fail():
        raise fault

    with pytest.raises(SystemExit):
        utils.run_script(fail)
    assert capsys.readouterr().err.endswith(
        f": the device is out of memory; try a smaller --batch_size or {advice}\n")
