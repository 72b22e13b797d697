"""HLCV Exercise 3, Question 4: transfer learning with a VGG11-BN on CIFAR-10.

Edit the settings below, or give them on the command line:

    python ex3_pretrained.py                           # Model 1: fine-tune the pretrained network
    python ex3_pretrained.py --fine_tune=False         # 4a: train the new layers only
    python ex3_pretrained.py --pretrained=False        # Model 2: train from scratch
"""

from __future__ import annotations  # so that a mistyped type below is named in one sentence

import http.client
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torchvision.models import VGG11_BN_Weights, vgg11_bn

import utils
from utils import Claim, Question

# --- experiment -------------------------------------------------------------------------------
pretrained: bool | str = True  # ImageNet weights, or the path of others; False: from scratch (4b)
fine_tune: bool = True  # train the pretrained part, too; False: only the new layers (4a)
frozen_norm: str = "eval"  # frozen batch norm: eval is fixed, train drifts as in the exercise
earlystop: bool = True  # stop when validation stops improving; keep the best model
patience: int = 10  # early stopping waits for this number of epochs without a new best
monitor: str = "accuracy"  # what early stopping watches in validation: accuracy or loss
augmentation: str = "horizontal_flip"  # one of AUGMENTATIONS in utils.py, or several: a+b

# --- training recipe --------------------------------------------------------------------------
num_epochs: int = 30  # passes over the training images, at most
batch_size: int = 200  # images in each step
learning_rate: float = 1e-3  # of Adam
learning_rate_decay: float = 0.99  # the learning rate is multiplied by this after each epoch
reg: float = 0.0  # weight decay (L2 penalty)
num_training: int | None = None  # train on the first so many; None: on all that do not validate
num_validation: int | None = None  # validate on the last so many; None: a tenth, 1,000 of CIFAR-10
image_size: int = 32  # images are resized to this number of pixels a side
seed: int = 0  # of everything random: initial weights, order, augmentation

# --- where and how to run ---------------------------------------------------------------------
dataset: str = "cifar10"  # cifar10, synthetic, or a folder with train/<class>/ and test/<class>/
device: str = "auto"  # cpu, cuda or cuda:N; auto: CUDA where there is one
precision: str = "auto"  # float32, bfloat16 or float16; auto: the one that is fast here
channels_last: bool = True  # the layout in memory that most convolutions are fastest in
compile: bool = False  # torch.compile: 10 s to a minute more a run; measure whether it pays
deterministic: bool = False  # on CUDA: the same numbers every time, at some cost (a CPU always is)
resume: bool = False  # go on with an interrupted run from its latest checkpoint
parallel: str = "images"  # what the processes of torchrun share: the images of a run, or the runs
question: str = "none"  # run all of a question of the report: 4a, 4b, or all
seeds: str = "1"  # repeat each run with this number of seeds: seed, seed + 1, ...; or 0,5,7
rerun: bool = False  # in a question, run again what is recorded already
redraw: bool = False  # only draw the figures and tables again, from the records
show: bool = False  # open a window for each figure, after saving it
predict: list = []  # images or folders: classify them with the trained model, without training
# --- end of settings --------------------------------------------------------------------------

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # normalization: ImageNet's
HIDDEN = 256

# ============================================ network ============================================


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


def build(flags, num_classes):
    """The network of the flags, with initial weights; the pretrained ones come later."""
    model = VGG(flags.fine_tune, flags.frozen_norm, num_classes)
    if not flags.pretrained:
        start_from_scratch(model)
    return model


def start_from_scratch(model):
    """The template's initial weights of the new layers, when nothing is pretrained."""
    for layer in model.head:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=1e-3)
            nn.init.zeros_(layer.bias)


def make_optimizer(model, flags):
    """The optimizer of what learns and its schedule, which takes a step after each epoch."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trainable, flags.learning_rate,
                                 weight_decay=flags.reg, fused=True)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, flags.learning_rate_decay)
    return optimizer, scheduler


# ====================================== pretrained weights ======================================


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
    load = partial(weights.get_state_dict, progress=True, check_hash=True, weights_only=True)
    try:
        with utils.stall_timeout():
            utils.broadcast_from_rank0(lambda: load() and None)  # the others find its download
            return load()
    except (OSError, RuntimeError, http.client.HTTPException) as problem:
        raise utils.Problem(
            f"the ImageNet weights cannot be downloaded ({problem}): put {path.name} into "
            f"{path.parent}, name another file with --pretrained=PATH, or train from scratch "
            "with --pretrained=False") from problem


def weights_digest(pretrained):
    """What tells the weights behind the flag from others: the beginning of their SHA-256, or None.

    Raises utils.Problem if there is no such file.
    """
    if pretrained is True:
        return Path(VGG11_BN_Weights.IMAGENET1K_V1.url).stem.split("-")[1]
    try:
        return utils.sha256(Path(pretrained).expanduser())[:16] if pretrained else None
    except OSError as problem:
        raise utils.Problem(f"the weights cannot be read ({problem}): --pretrained is True, False "
                            "or the path of a file") from problem


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


# ======================================== fixed features ========================================


@dataclass
class FeatureData(utils.Data):
    """A data set with its images' fixed features, float32 (1 or 2, N, 512): [0] of the images as
    they are, [1] of the mirrored ones.

    A head trains on them as on the images, but the features are not computed in every epoch anew.
    """

    features: torch.Tensor

    def batch(self, indices, augment=None):
        """The features (B, 512) of the images, mirrored where `augment` would, and the labels."""
        mirrored = 0
        if augment:  # it flips a picture of two pixels, which shows what it would do to the image
            pixels = torch.arange(2.0, device=indices.device)
            mirrored = augment(pixels.expand(len(indices), 1, 1, 2))[:, 0, 0, 0].long()
        return self.features[mirrored, indices], self.labels[indices]


@torch.no_grad()
def extract_features(model, data, dtype, mirror):
    """Run the fixed features over all images in use once, and over the mirrored if asked."""
    start = time.perf_counter()
    used = torch.cat((data.train, data.val, data.test))
    model.to(used.device).eval()
    versions = [None, partial(torch.flip, dims=[3])][:1 + mirror]
    features = torch.empty(len(versions), len(data.images), 512, device=used.device)
    for version, augment in enumerate(versions):
        for indices in utils.progress_bar(used.split(500), "features", unit=" batches"):
            images, _ = data.batch(indices, augment)
            with utils.autocast(images.device, dtype):
                features[version, indices] = model.extract(images).float()
    print(f"The fixed features of {len(used):,} images"
          f"{', plain and mirrored,' * mirror} are computed once, in "
          f"{time.perf_counter() - start:.0f} s")
    return FeatureData(**vars(data), features=features)


# ========================================== experiment ==========================================


def describe(flags):
    """The network and what is special about it, as titles give it."""
    if not flags.pretrained:
        return "VGG11-BN from scratch"
    part = "fine-tuned" if flags.fine_tune else "frozen"
    drifting = ", batch norm drifting" * (not flags.fine_tune and flags.frozen_norm == "train")
    source = "ImageNet" if flags.pretrained is True else Path(flags.pretrained).stem
    return f"VGG11-BN {part}{drifting}, {source} weights"


def checkpoint_name(flags):
    """The part of Question 4, as the names of checkpoints and figures give it."""
    if not flags.pretrained:
        part = "part_4b_2"
    elif flags.fine_tune:
        part = "part_4b_1"
    else:
        part = "part_4a" + "_frozen_norm_train" * (flags.frozen_norm == "train")
    return part + f"_seed{flags.seed}" * (flags.seed > 0)


def experiment(flags, facts):
    """The run that the flags describe, on data with these facts (see utils.make_recipe)."""
    if "pretrained" not in facts:  # those of a record are there
        facts = {**facts, "pretrained": weights_digest(flags.pretrained)}
    with torch.device("meta"):  # the network is described, not used: it takes no memory, no time
        model = build(flags, len(facts["data"]["classes"]))
        recipe = utils.make_recipe(__file__, flags, facts, model, *make_optimizer(model, flags),
                                   MEAN, STD)
    return utils.Run(flags, describe(flags), checkpoint_name(flags), recipe)


def train(run, data):
    """One experiment: a new network, trained and tested. Returns its record.

    run: a utils.Run, which keeps the books; data: utils.Data.
    """
    flags, device = run.flags, data.images.device
    torch.manual_seed(flags.seed)
    model = build(flags, len(data.classes))
    if flags.pretrained:
        load_features(model, load_weights(flags.pretrained), flags.pretrained)
    utils.print_summary(model, flags.image_size, table=flags.question == "none")
    filters = utils.first_filters(model)
    utils.place(model, device, flags.channels_last, flags.compile)
    optimizer, scheduler = make_optimizer(model, flags)
    scaler = torch.amp.GradScaler(device.type, enabled=run.dtype == torch.float16)
    if model.fixed and flags.augmentation in ("none", "horizontal_flip"):
        data = extract_features(model, data, run.dtype, flags.augmentation == "horizontal_flip")
    # with --resume they get the state of the interrupted run
    run.begin(model=model, optimizer=optimizer, scheduler=scheduler, scaler=scaler)
    network = utils.distribute(model)

    for epoch in range(run.epoch + 1, flags.num_epochs + 1):
        # before the epoch, so that a resumed run stops, too
        if flags.earlystop and run.epoch - run.best_epoch >= flags.patience:
            print(f"Early stop: no better epoch than {run.best_epoch} for {flags.patience} epochs")
            break
        order, augment, augment_val = utils.seed_epoch(flags.seed, epoch, flags.augmentation)
        batches = utils.shuffled_batches(data.train, flags.batch_size, order)
        train_loss, train_accuracy = utils.train_one_epoch(
            network, data, batches, augment, optimizer, scaler, run.dtype, run.bar)
        val_loss, val_accuracy = utils.evaluate(model, data, data.val, run.dtype)
        numbers = {"train_loss": train_loss, "train_accuracy": train_accuracy,
                   "val_loss": val_loss, "val_accuracy": val_accuracy}
        if augment:  # as the report probably measured it
            _, numbers["val_accuracy_augmented"] = utils.evaluate(
                model, data, data.val, run.dtype, augment_val)
        scheduler.step()

        score = val_accuracy if flags.monitor == "accuracy" else -val_loss
        if flags.earlystop and score > run.best_score:  # of equal ones the first is the best
            run.keep_best(epoch, score)
        run.end_epoch(**numbers)

    predictions = test(run, model, data)
    return run.record(predictions, {"before": filters, "after": utils.first_filters(model)})


def test(run, model, data):
    """The class that the trained network gives to each validation and test image (see Run.record).

    With early stopping the model has the weights of its best epoch from here on.
    """
    flags, dtype = run.flags, run.dtype
    latest = reported = utils.predict_val_and_test(model, data, dtype)
    if flags.earlystop:
        model.load_state_dict(run.best_weights)
        reported = utils.predict_val_and_test(model, data, dtype)
    predictions = {"latest": latest, "reported": reported}
    if flags.augmentation != "none":
        *_, augment = utils.seed_epoch(flags.seed, run.reported_epoch, flags.augmentation)
        predictions["augmented"] = {
            "val": utils.predict_classes(model, data, data.val, dtype, augment)}
    return predictions


# ========================================== questions ==========================================

NOTE = ("We measure in eval mode on clean images; the report probably on flipped images with the "
        "batch's statistics.")

QUESTIONS = {  # rows: name, the flags that it sets, the report's number for each column
    "4a": Question(
        title="Table 5", baseline="frozen",
        figures=("figure_8_part_4a.png", "figure_8_part_4a_filters.png",
                 "figure_8_part_4a_frozen_norm_train.png",
                 "figure_8_part_4a_frozen_norm_train_filters.png"),
        note=NOTE,
        columns={"Validation accuracy": "val_accuracy", "Test accuracy": "test_accuracy",
                 "Test accuracy, first 1,000": "test_accuracy_first_1000"},
        rows=[  # the report's network was probably the second
            ("frozen", {"fine_tune": False, "frozen_norm": "eval"}, 65.1, 61.6, 61.6),
            ("frozen, batch norm drifting", {"fine_tune": False, "frozen_norm": "train"},
             65.1, 61.6, 61.6),
        ]),
    "4b": Question(
        title="Table 6", baseline="Model 2 (from scratch)", note=NOTE,
        figures=("figure_9_part_4b_1.png", "figure_9_part_4b_1_filters.png",
                 "figure_10_part_4b_2.png", "figure_10_part_4b_2_filters.png"),
        columns={"Early stop checkpoint": "best_epoch", "Validation accuracy": "val_accuracy",
                 "Train accuracy": "train_accuracy", "Test accuracy": "test_accuracy",
                 "Test accuracy, first 1,000": "test_accuracy_first_1000"},
        rows=[
            ("Model 1 (fine-tuned)", {"fine_tune": True}, 11, 89.1, 97.8, 88.6, 88.6),
            ("Model 2 (from scratch)", {"fine_tune": True, "pretrained": False},
             19, 88.7, 98.0, 84.4, 84.4),
        ]),
}

CLAIMS = [  # question, claim, the report's figures, rule, what the rule compares
    Claim("4b", "fine-tuning beats frozen features", "test 61.6 → 88.6", utils.is_better,
          [("Model 1 (fine-tuned)", "reported", "test"), ("frozen", "reported", "test")]),
    Claim("4b", "pretrained beats from scratch", "test 84.4 → 88.6", utils.is_better,
          [("Model 1 (fine-tuned)", "reported", "test"),
           ("Model 2 (from scratch)", "reported", "test")]),
    # a question that the report leaves open
    Claim("4a", "open: batch norm that drifts helps a frozen network", "61.6, by which?",
          utils.is_better, [("frozen, batch norm drifting", "reported", "test"),
                            ("frozen", "reported", "test")]),
]

# =========================================== figures ===========================================


def draw(question, results, runs, data):
    """Draw the figures of a question (or one experiment: "none") and print its table.

    results: {name: the records of its seeds}; runs: {name: its flags}; data: not needed here.
    """
    for name, records in results.items():
        flags = runs[name]
        # the figures of a question are of all its seeds
        part = checkpoint_name(flags if question == "none" else flags.replace(seed=0))
        folder = utils.results_folder(flags)
        number = 10 if not flags.pretrained else 9 if flags.fine_tune else 8
        utils.plot_learning_curves(records, describe(flags), folder / f"figure_{number}_{part}.png",
                                   flags.show)
        utils.plot_filters(records[0], folder / f"figure_{number}_{part}_filters.png", flags.show)
        if question == "none":
            utils.plot_classes(records[0], folder / f"{part}_classes.png", flags.show)
    if question in QUESTIONS:
        print("\n" + "\n".join(utils.table_lines(QUESTIONS[question], results)))


# ============================================= main =============================================


def main(argv=None):
    """Run what the flags describe, an experiment or a question (argv: None: the command line's).

    Returns {question: {name: the records of its seeds}}, "none" being the single experiment.
    Raises utils.Problem if a run failed, after all others.
    """
    flags = utils.parse_flags(globals(), argv)
    plan = utils.plan(flags, QUESTIONS)
    if not all(run.pretrained or run.fine_tune for runs in plan.values() for run in runs.values()):
        raise utils.Problem("--pretrained=False with --fine_tune=False would freeze random "
                            "features: leave one of them True", status=2)
    device, dtype = utils.choose_device(flags.device, flags.precision, flags.deterministic)
    utils.init_distributed(flags.parallel, device)
    if flags.predict:
        return utils.predict(flags, checkpoint_name(flags), build, device, dtype)
    data, failed = None, []
    if not flags.redraw:
        data = utils.load_data(flags.dataset, flags.image_size, flags.num_training,
                               flags.num_validation, MEAN, STD, device, flags.channels_last)
        failed = utils.run_all(plan, experiment, train, data, dtype)
    results = utils.find_results(plan, experiment, data) if utils.is_main_process() else {}
    for question, found in results.items():
        draw(question, found, plan[question], data)
    if results and flags.question != "none":
        utils.write_page(__file__, flags, QUESTIONS, CLAIMS, experiment, data)
    utils.check_outcome(flags, plan, results, failed)
    return results


if __name__ == "__main__":
    utils.run_script(main)
