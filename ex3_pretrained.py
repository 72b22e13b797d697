"""HLCV Exercise 3, Question 4: transfer learning with a VGG11-BN on CIFAR-10.

Edit the flags below, or give them on the command line:

    python ex3_pretrained.py                           # Model 1: fine-tune the pretrained network
    python ex3_pretrained.py --fine_tune=False         # 4a: train the new layers only
    python ex3_pretrained.py --pretrained=False        # Model 2: train from scratch
"""

import argparse
import http.client
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import utils  # before PyTorch, which takes seconds: it answers --help at once

# isort: split
import torch
from torch import nn
from torchvision.models import VGG11_BN_Weights, vgg11_bn

# --- experiment -------------------------------------------------------------------------------
pretrained: bool | str = True  # ImageNet weights, or the path of others; False: from scratch (4b)
fine_tune: bool = True  # train the pretrained part, too; False: only the new layers (4a)
frozen_norm: str = "eval"  # frozen batch norm: eval is fixed, train drifts as in the exercise
earlystop: bool = True  # stop when validation stops improving; keep the best model
patience: int = 10  # early stopping waits for so many epochs without a new best
monitor: str = "accuracy"  # what early stopping watches in validation: accuracy or loss
augmentation: str = "horizontal_flip"  # one of AUGMENTATIONS in utils.py, or several: a+b

# --- training recipe --------------------------------------------------------------------------
num_epochs: int = 30  # passes over the training images, at most
batch_size: int = 200  # images in each step
learning_rate: float = 1e-3  # of Adam
learning_rate_decay: float = 0.99  # the learning rate is multiplied by this after each epoch
reg: float = 0.0  # weight decay (L2 penalty)
num_training: int | None = None  # the first so many images train; None: all that do not validate
num_validation: int | None = None  # the last so many validate; None: a tenth, at most 1,000
seed: int = 0  # of everything random: initial weights, order, augmentation

# --- environment ------------------------------------------------------------------------------
dataset: str = "cifar10"  # cifar10, synthetic, or a folder with train/<class>/ and test/<class>/
image_size: int = 32  # images are resized to so many pixels a side
device: str = "auto"  # cpu, cuda or cuda:N; auto: CUDA where there is one
precision: str = "auto"  # float32 or bfloat16; auto: bfloat16 where it is fast
channels_last: bool = True  # the layout in memory that most convolutions are fastest in
compile: bool = False  # torch.compile: a minute more to start; measure whether it pays
deterministic: bool = False  # on CUDA: the same numbers every time, at some cost (a CPU always is)
resume: bool = False  # go on with an interrupted run from its latest checkpoint
parallel: str = "images"  # what the processes of torchrun share: the images of a run, or the runs
question: str = "none"  # run all of a question of the report: 4a, 4b, or all
seeds: str = "1"  # repeat each run with so many seeds: seed, seed + 1, ...; or a list: 0,5,7
rerun: bool = False  # in a question, run again what is recorded already
redraw: bool = False  # only draw the figures and tables again, from the records
show: bool = False  # open a window for each figure, after saving it
predict: list = []  # images or folders: classify them with the trained model, without training

QUESTIONS = {  # question: its runs, each with the flags that it sets
    "4a": {"frozen": {"fine_tune": False, "frozen_norm": "eval"},
           "frozen, batch norm drifting": {"fine_tune": False, "frozen_norm": "train"}},
    "4b": {"Model 1 (fine-tuned)": {"fine_tune": True},
           "Model 2 (from scratch)": {"fine_tune": True, "pretrained": False}},
}

TABLE_5 = {"Validation accuracy": 65.1, "Test accuracy": 61.6, "Test accuracy, first 1,000": 61.6}
REPORT = {  # question: run: what the report's table states, accuracies in %
    "4a": dict.fromkeys(QUESTIONS["4a"], TABLE_5),
    "4b": {"Model 1 (fine-tuned)": {"Early stop checkpoint": 11, "Validation accuracy": 89.1,
                                    "Train accuracy": 97.8, "Test accuracy": 88.6,
                                    "Test accuracy, first 1,000": 88.6},
           "Model 2 (from scratch)": {"Early stop checkpoint": 19, "Validation accuracy": 88.7,
                                      "Train accuracy": 98.0, "Test accuracy": 84.4,
                                      "Test accuracy, first 1,000": 84.4}},
}

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # normalization: ImageNet's
HIDDEN = 256


class VGG(nn.Module):
    """torchvision's VGG11-BN features, averaged to one vector, and two new linear layers.

    (B, 3, S, S) images, or their features (B, 512), to (B, num_classes) logits. S is at least 32,
    where the features are one vector already.
    fine_tune=False freezes the features; their batch norm layers then run in eval mode, so that
    the features are a fixed function of the image, or with frozen_norm="train" normalize by the
    batch and follow the data, as in the exercise's template.
    """

    def __init__(self, fine_tune=True, frozen_norm="eval", num_classes=10):
        super().__init__()
        self.features = vgg11_bn().features.requires_grad_(fine_tune)
        self.head = nn.Sequential(nn.Linear(512, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.ReLU(),
                                  nn.Linear(HIDDEN, num_classes))
        self.fixed = not fine_tune and frozen_norm == "eval"

    def train(self, mode=True):
        super().train(mode)
        if self.fixed:
            self.features.eval()
        return self

    def extract(self, images):
        """The features (B, 512) of images (B, 3, S, S)."""
        return self.features(images).mean(dim=(2, 3))

    def forward(self, inputs):
        return self.head(self.extract(inputs) if inputs.dim() == 4 else inputs)


def start_from_scratch(model):
    """The template's initial weights of the new layers, when nothing is pretrained."""
    for layer in model.head:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=1e-3)
            nn.init.zeros_(layer.bias)


def load_weights(pretrained):
    """The state dict behind the flag: True for ImageNet's from torchvision, or a path.

    Raises utils.Problem if it is not to be had or damaged.
    """
    if pretrained is not True:
        return utils.load_checkpoint(Path(pretrained).expanduser())
    weights = VGG11_BN_Weights.IMAGENET1K_V1
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    if path.exists() and not utils.sha256(path).startswith(path.stem.split("-")[1]):
        raise utils.Problem(f"{path} is truncated or altered (its sha256 does not begin as its "
                            "name says): delete it and run again")
    try:
        with utils.first_process_first(), utils.stall_timeout():
            return weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except (OSError, RuntimeError, http.client.HTTPException) as problem:
        raise utils.Problem(
            f"the ImageNet weights cannot be downloaded ({problem}): put {path.name} into "
            f"{path.parent}, name another file with --pretrained=PATH, or train from scratch "
            "with --pretrained=False") from problem


def load_features(model, state, source):
    """Put the features.* part of a state dict into the model: all of it or, with Problem, nothing.

    state may hold a whole VGG11-BN or its features only, in any float type.
    """
    if not isinstance(state, dict):
        raise utils.Problem(f"{source} holds no state dict")
    new = {}
    for name, old in model.features.state_dict().items():
        value = state.get(f"features.{name}")
        if value is None and name.endswith("num_batches_tracked"):
            value = old  # older files do not have it
        if not isinstance(value, torch.Tensor):
            raise utils.Problem(f"{source} is no VGG11-BN: features.{name} is missing")
        if value.is_floating_point() != old.is_floating_point() or value.layout != old.layout:
            raise utils.Problem(f"{source} is no VGG11-BN: features.{name} is not of a float type")
        if value.shape != old.shape:
            raise utils.Problem(f"{source} is no VGG11-BN: features.{name} has the shape "
                                f"{tuple(value.shape)} instead of {tuple(old.shape)}")
        if not value.float().isfinite().all():
            raise utils.Problem(f"{source} is damaged: features.{name} has values that are "
                                "not finite")
        if name.endswith("running_var") and value.min() < 0:
            raise utils.Problem(f"{source} is damaged: features.{name}, a variance, is negative")
        new[name] = value
    model.features.load_state_dict(new)


@dataclass
class FeatureData(utils.Data):
    """A data set with its images' fixed features (1 or 2, N, 512): the second of mirrored images.

    A head trains on them as on the images, but the features are not computed in every epoch anew.
    """

    features: torch.Tensor

    def batch(self, indices, augment=None):
        """The features (B, 512) of the images, mirrored where `augment` would, and the labels."""
        mirrored = 0
        if augment:  # it flips a picture of two pixels, which shows what it would do to the image
            pixels = torch.tensor([0.0, 1.0], device=indices.device)
            mirrored = augment(pixels.expand(len(indices), 1, 1, 2))[:, 0, 0, 0].long()
        return self.features[mirrored, indices], self.labels[indices]


@torch.no_grad()
def extract_features(model, data, dtype, mirror):
    """Run the fixed features over all images in use once, and over the mirrored if asked."""
    start = time.perf_counter()
    parts = (data.train, data.val, data.test)
    used = torch.cat(parts)
    everything = torch.arange(len(used), device=used.device)
    train, val, test = everything.split([len(part) for part in parts])
    data = replace(data, images=data.images[used], labels=data.labels[used], train=train, val=val,
                   test=test)
    model.to(data.images.device).eval()
    versions = [None, partial(torch.flip, dims=[3])][:1 + mirror]
    features = []
    for augment in versions:
        for indices in utils.progress_bar(everything.split(500), "features", unit=" batches"):
            images, _ = data.batch(indices, augment)
            with utils.autocast(images.device, dtype):
                features.append(model.extract(images))
    features = torch.cat(features).view(len(versions), len(everything), -1)
    print(f"The fixed features of {len(everything):,} images"
          f"{', plain and mirrored,' * mirror} are computed once, in "
          f"{utils.format_seconds(time.perf_counter() - start)}", flush=True)
    return FeatureData(**vars(data), features=features)


def describe(flags):
    """The network and what is special about it, as titles give it."""
    if not flags.pretrained:
        return "VGG11-BN from scratch"
    part = "fine-tuned" if flags.fine_tune else "frozen"
    drifting = ", batch norm drifting" * (not flags.fine_tune and flags.frozen_norm == "train")
    source = "ImageNet" if flags.pretrained is True else Path(flags.pretrained).stem
    return f"VGG11-BN {part}{drifting}, {source} weights"


def experiment_name(flags):
    """The part of Question 4, as file names give it."""
    if not flags.pretrained:
        part = "part_4b_2"
    elif flags.fine_tune:
        part = "part_4b_1"
    else:
        part = "part_4a" + "_frozen_norm_train" * (flags.frozen_norm == "train")
    return part + f"_seed{flags.seed}" * (flags.seed > 0)


def build(flags, num_classes, image_size):
    """The network of the flags, with initial weights."""
    model = VGG(flags.fine_tune, flags.frozen_norm, num_classes)
    if not flags.pretrained:
        start_from_scratch(model)
    return model


def train(flags, data, dtype):
    """One experiment: a new network, trained and tested. Returns the record."""
    if min(flags.batch_size, len(data.train)) < 2:
        raise utils.Problem("the batch norm of the new layers needs at least two images a step: "
                            "raise --batch_size or --num_training", status=2)
    start = time.perf_counter()
    torch.manual_seed(flags.seed)
    model = build(flags, len(data.classes), flags.image_size)
    if flags.pretrained:
        load_features(model, load_weights(flags.pretrained), flags.pretrained)
    if flags.question == "none":
        print("Parameters that learn:",
              *(name for name, p in model.named_parameters() if p.requires_grad))
    utils.print_summary(model, flags.image_size, table=flags.question == "none")
    if model.fixed and flags.augmentation in ("none", "horizontal_flip"):
        data = extract_features(model, data, dtype, flags.augmentation == "horizontal_flip")
    record = utils.run_experiment(
        describe(flags), experiment_name(flags), model, data, flags, dtype)
    return {**record, "seconds": time.perf_counter() - start}  # with those for the features


def draw(question, records, flags, data):
    """The figures and tables of a question (or of one experiment: "none") from its records.

    records: {run: the records of its seeds}; data: not needed here.
    """
    folder = utils.results_folder(flags)
    for runs in records.values():
        run = argparse.Namespace(**{**runs[0]["flags"], "seed": flags.seed})
        number = 10 if not run.pretrained else 9 if run.fine_tune else 8
        utils.plot_learning_curves(runs, describe(run), folder / (
            f"figure_{number}_{experiment_name(run)}.png"), flags.show)
    number = {"4a": 5, "4b": 6}.get(question)
    if number:
        utils.write_table(f"Table {number}", records, REPORT[question],
                          folder / f"table_{number}.md", "We measure in eval mode on clean images; "
                          "the report probably on flipped images with the batch's statistics.")


def main(argv=None):
    """Run what the flags describe, an experiment or a question (argv: None: the command line's).

    Returns {question: {run: the records of its seeds}}, "none" being the single experiment.
    """
    flags = utils.parse_flags(globals(), argv)
    plan = utils.plan(flags, QUESTIONS)
    if not all(run.pretrained or run.fine_tune for runs in plan.values() for run in runs.values()):
        raise utils.Problem("--pretrained=False with --fine_tune=False would freeze random "
                            "features: leave one of them True", status=2)
    device, dtype = utils.choose_device(flags.device, flags.precision, flags.deterministic)
    store = utils.join_processes(flags.parallel, device)
    if flags.predict:
        return utils.predict(flags, experiment_name(flags), build, device, dtype)
    data = None if flags.redraw else utils.load_data(
        flags.dataset, flags.image_size, flags.num_training, flags.num_validation, MEAN, STD,
        device, flags.channels_last)
    return utils.run_plan(plan, data, partial(train, dtype=dtype), draw, describe, store)


if __name__ == "__main__":
    utils.run_script(main)
