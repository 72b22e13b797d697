"""HLCV Exercise 3, Question 4: transfer learning with a VGG11-BN on CIFAR-10.

Edit the settings below, or give them on the command line:

    python ex3_pretrained.py                           # Model 1: fine-tune the pretrained network
    python ex3_pretrained.py --fine_tune=False         # 4a: train the new layers only
    python ex3_pretrained.py --pretrained=none         # Model 2: train from scratch
"""

import copy
import hashlib
import socket
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torchsummary import summary
from torchvision.models import VGG11_BN_Weights, vgg11_bn

import utils
from utils import Claim, Question

# --- experiment -------------------------------------------------------------------------------
pretrained = "imagenet"  # imagenet, none (from scratch, 4b), or the path of weights: see README
fine_tune = True  # train the pretrained part, too; False: only the new layers (4a)
frozen_norm = "eval"  # frozen batch norm: eval is fixed; train follows the data, as in the exercise
earlystop = True  # stop when validation stops improving; keep the best model
patience = 10  # early stopping waits for this number of epochs without a new best; 0: to the end
monitor = "accuracy"  # what early stopping watches in validation
augmentation = "horizontal_flip"  # what is done to the training images

# --- training recipe --------------------------------------------------------------------------
num_epochs = 30  # passes over the training images, at most
batch_size = 200  # images in each step
learning_rate = 1e-3  # of Adam
learning_rate_decay = 0.99  # the learning rate is multiplied by this after each epoch
reg = 0  # weight decay (L2 penalty)
num_training = 0  # train on the first so many images; 0: on all that do not validate
num_validation = 0  # validate on the last so many; 0: 1,000 of CIFAR-10, else a tenth
image_size = 32  # images are resized to this number of pixels a side
seed = 0  # of everything random: initial weights, order, augmentation

# --- where and how to run (changes no result) ---------------------------------------------------
dataset = "cifar10"  # cifar10, synthetic, or a folder with train/<class>/ and test/<class>/
results = "figures"  # the folder of records, tables and figures
device = "auto"  # auto: CUDA where there is one
precision = "auto"  # of the network's arithmetic; auto: the one that is fast here
compile = False  # torch.compile: 10 s to a minute more to start; measure whether it pays
deterministic = False  # on CUDA: the same numbers every time, at some cost (a CPU always is)
resume = False  # go on with an interrupted run from its latest checkpoint
question = "none"  # run all of a question of the report
seeds = 1  # repeat each run with this number of seeds: seed, seed + 1, ...
rerun = False  # in a question, run again what is recorded already
redraw = False  # only draw the questions' tables and figures again, from the records
checkpoint = "none"  # the file of a trained network, for --predict
predict = "none"  # an image, or a folder of images, to classify with it
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
    if flags.pretrained == "none":
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


def load_features(model, pretrained):
    """Put pretrained weights into the features of a network; returns the hash of their file.

    pretrained: "imagenet" for torchvision's, or the path of a state dict of a VGG11-BN, in any
    float type, of its features.* only, or of a checkpoint of this script. Raises utils.Problem.
    """
    if pretrained == "imagenet":
        weights = VGG11_BN_Weights.IMAGENET1K_V1
        state, sha256 = download_weights(weights), Path(weights.url).stem.split("-")[1]
    else:
        state = utils.load_checkpoint(pretrained)
        sha256 = hashlib.sha256(Path(pretrained).read_bytes()).hexdigest()[:16]
    try:
        state = state.get("model", state)  # a checkpoint has more in it
        model.features.load_state_dict({name.removeprefix("features."): value for name, value in
                                        state.items() if name.startswith("features.")})
    except (AttributeError, RuntimeError) as problem:
        raise utils.Problem(f"{pretrained} has not the features.* of a VGG11-BN") from problem
    return sha256


def download_weights(weights):
    """torchvision's weights, downloaded once. Raises utils.Problem."""
    socket.setdefaulttimeout(15)  # a host that delivers nothing for so many seconds has failed
    try:
        return weights.get_state_dict(check_hash=True, weights_only=True)
    except Exception as problem:  # urllib, http.client, zipfile and torch have their own
        path = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
        raise utils.Problem(
            f"the ImageNet weights cannot be had ({problem}): put the undamaged {path.name} into "
            f"{path.parent}, name others with --pretrained=PATH, or train from scratch with "
            "--pretrained=none") from problem


# ======================================== fixed features ========================================


@dataclass
class FeatureData(utils.Data):
    """A data set with the fixed features of its images, float32 (1 or 2, N, 512): [0] of the images
    as they are, [1] of the mirrored ones. A head trains on them as on the images, but they are not
    computed anew in every epoch."""

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
    """The data with the fixed features of all images in use and, if asked, of the mirrored ones."""
    used = torch.cat((data.train, data.val, data.test))
    versions = [None, partial(torch.flip, dims=[3])][:1 + mirror]
    features = torch.empty(len(versions), len(data.images), 512, device=used.device)
    for version, augment in enumerate(versions):
        for indices in utils.progress_bar(used.split(500), "features"):
            images, _ = data.batch(indices, augment)
            with utils.autocast(images.device, dtype):
                features[version, indices] = model.eval().extract(images).float()
    return FeatureData(**vars(data), features=features)


# ========================================== experiment ==========================================


def describe(flags):
    """What the network is, for titles, and the part of Question 4, for names of checkpoints."""
    if flags.pretrained == "none":
        return "VGG11-BN from scratch", "part_4b_2"
    source = "ImageNet" if flags.pretrained == "imagenet" else Path(flags.pretrained).stem
    if flags.fine_tune:
        return f"VGG11-BN fine-tuned, {source} weights", "part_4b_1"
    if flags.frozen_norm == "eval":
        return f"VGG11-BN frozen, {source} weights", "part_4a"
    return (f"VGG11-BN frozen, batch norm in train mode, {source} weights",
            "part_4a_frozen_norm_train")


def train(run, data):
    """One experiment: a new network, trained and tested; its record is written.

    run: a utils.Run, which keeps the books; data: utils.Data.
    """
    flags, device, weights = run.flags, data.images.device, None
    torch.manual_seed(flags.seed)
    model = build(flags, len(data.classes))
    if flags.pretrained != "none":
        weights = load_features(model, flags.pretrained)
    filters = utils.first_filters(model)
    if flags.question == "none":
        size = flags.image_size  # in eval mode, as its random numbers would move the statistics
        summary(copy.deepcopy(model).eval(), (3, size, size), device="cpu")
    utils.place(model, device, flags)
    optimizer, scheduler = make_optimizer(model, flags)
    scaler = torch.amp.GradScaler(device.type, enabled=run.dtype == torch.float16)
    # with --resume they get the state of the interrupted run
    if not run.begin(weights, model=model, optimizer=optimizer, scheduler=scheduler,
                     scaler=scaler):
        return
    if model.fixed and flags.augmentation in ("none", "horizontal_flip"):
        data = extract_features(model, data, run.dtype, flags.augmentation == "horizontal_flip")

    for epoch in range(run.epoch + 1, flags.num_epochs + 1):
        # before the epoch, so that a resumed run stops, too
        if flags.earlystop and 0 < flags.patience <= run.epoch - run.best_epoch:
            print(f"Early stop: no better epoch than {run.best_epoch} for {flags.patience} epochs")
            break
        order, augment, augment_val = utils.seed_epoch(flags.seed, epoch, flags.augmentation)
        batches = utils.shuffled_batches(data.train, flags.batch_size, order)
        train_loss, train_accuracy = utils.train_one_epoch(
            model, data, batches, augment, optimizer, scaler, run.dtype)
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

    run.save()
    tested, confusion = utils.test(run, model, data)
    run.finish(tested, confusion, {"before": filters, "after": utils.first_filters(model)})


# ========================================== questions ==========================================

NOTE = ("We measure in eval mode on plain images; the report probably on mirrored ones with the "
        "statistics of the batch.")

QUESTIONS = {  # rows: name, the settings that it changes, the report's number for each column
    "4a": Question(
        asked="How far do frozen pretrained features go?",
        title="Table 5", note=f"{NOTE} Its frozen network was probably the second, in train mode.",
        figures=("figure_8_part_4a.png",),
        columns={"validation": "val_accuracy", "test": "test_accuracy",
                 "test, first 1,000 images": "test_accuracy_first_1000",
                 "test, re-estimated statistics": "test_accuracy_recalibrated"},
        rows=[
            ("frozen", {"fine_tune": False, "frozen_norm": "eval"}, 65.1, 61.6),
            ("frozen, batch norm in train mode", {"fine_tune": False, "frozen_norm": "train"}),
        ]),
    "4b": Question(
        asked="Is it better to start from pretrained weights or from scratch?",
        title="Table 6", note=NOTE, figures=("figure_9_10_part_4b.png",),
        columns={"best epoch": "best_epoch", "validation": "val_accuracy",
                 "train": "train_accuracy", "test": "test_accuracy",
                 "test, first 1,000 images": "test_accuracy_first_1000",
                 "test, re-estimated statistics": "test_accuracy_recalibrated"},
        rows=[
            ("Model 1 (fine-tuned)", {"fine_tune": True}, 11, 89.1, 97.8, 88.6),
            ("Model 2 (from scratch)", {"fine_tune": True, "pretrained": "none"},
             19, 88.7, 98.0, 84.4),
        ]),
}

CLAIMS = [  # question, claim, the first, over each of the others by how many points, the report
    Claim("4b", "Fine-tuning beats frozen features", "Model 1 (fine-tuned)", ["frozen"], above=0,
          report="test 61.6 → 88.6", report_lead=27.0),
    Claim("4b", "Pretrained beats from scratch", "Model 1 (fine-tuned)",
          ["Model 2 (from scratch)"], above=0, report="test 84.4 → 88.6", report_lead=4.2),
    # what the report leaves open
    Claim("4a", "Not in the report: frozen, batch norm's mode changes less than a point",
          "frozen, batch norm in train mode", ["frozen"], above=-1, below=1),
]

# =========================================== figures ===========================================


def draw(question, results, flags, folder, data):
    """Draw the figures of a question (or one experiment: "none").

    results: {name: the records of its seeds}; data: not needed here.
    """
    if question == "none":
        utils.plot_run(flags, results, folder)
    else:
        figures = "Figure 8" if question == "4a" else "Figures 9 and 10"
        utils.plot_learning_curves(
            results, f"{figures}: VGG11-BN", folder / QUESTIONS[question].figures[0],
            QUESTIONS[question].report, 60)


# ============================================= main =============================================


def main(argv=None):
    """Run what the flags describe, an experiment or a question (argv: None: the command line's).

    Returns the records that it shows, a list: of each the title, seed, result, history, ...
    Raises utils.Problem for what a user can put right, and at the end for runs that diverged.
    """
    flags = utils.parse_flags(globals(), argv)
    device, dtype = utils.choose_device(flags)
    if (flags.predict, flags.checkpoint) != ("none", "none"):
        return utils.predict(flags, build, device)
    plan, data, failed = utils.make_plan(flags, QUESTIONS), None, []
    if any(run.pretrained == "none" and not run.fine_tune
           for runs in plan.values() for run in runs.values()):
        raise utils.Problem("--pretrained=none with --fine_tune=False would freeze random "
                            "features: leave one of them out", 2)
    if not flags.redraw or flags.dataset not in utils.NAMES:  # a folder's results have its digits
        data = utils.load_data(flags, MEAN, STD, device)
    if not flags.redraw:
        failed = utils.train_all(plan, describe, train, data, dtype)
    return utils.show_results(flags, plan, data, QUESTIONS, CLAIMS, draw, failed)


if __name__ == "__main__":
    utils.run_script(main)
