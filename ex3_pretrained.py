"""HLCV Exercise 3, Question 4: transfer learning with a VGG11-BN on CIFAR-10.

Edit the settings in this file, or give them on the command line:

    python ex3_pretrained.py                           # Model 1: fine-tune the pretrained network
    python ex3_pretrained.py --fine_tune=False         # 4a: train the new layers only
    python ex3_pretrained.py --pretrained=none         # Model 2: train from scratch
"""

import hashlib
import socket
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torchvision.models import VGG11_BN_Weights, vgg11_bn

import utils
from utils import Claim, Question, Row

# Each setting is also a flag of the command line. In the code it is settings.num_epochs, ...
# --- experiment -------------------------------------------------------------------------------
pretrained = "imagenet"  # imagenet, none (from scratch, 4b), or the path of weights: see README
fine_tune = True  # train the pretrained part, too; False: only the new layers (4a)
frozen_norm = "eval"  # mode of the frozen batch norm layers: eval, or train as in the exercise
earlystop = True  # stop when validation stops improving; keep the best model
patience = 10  # stop after this many epochs without improvement; 0: never stop early
monitor = "accuracy"  # what early stopping watches: validation accuracy or loss
augmentation = "horizontal_flip"  # none, a name in AUGMENTATIONS in utils.py, or a+b

# --- training recipe --------------------------------------------------------------------------
num_epochs = 30  # passes over the training images, at most
batch_size = 200  # images in each step
learning_rate = 1e-3  # of the Adam optimizer
learning_rate_decay = 0.99  # the learning rate is multiplied by this after each epoch
reg = 0  # weight decay (L2 penalty)
num_training = 0  # number of training images; 0: all that are not for validation
num_validation = 0  # number of validation images; 0: the data set's default (CIFAR-10: 1,000)
image_size = 32  # images are resized to this number of pixels per side
seed = 0  # seeds everything random: initial weights, order, augmentation

# --- where and how to run ---------------------------------------------------------------------
dataset = "cifar10"  # cifar10, synthetic, or a folder: of CIFAR-10, or with train/<class>/, test/
results = "figures"  # the folder of records, tables and figures
device = "auto"  # cpu, cuda, or auto: a GPU if one is available
precision = "auto"  # float32, bfloat16 or float16; auto: the fastest one here
compile = False  # torch.compile: 10 s to a minute more to start; measure whether it pays
deterministic = False  # the same numbers every time on CUDA, too, as on a CPU, but slower
resume = False  # continue an interrupted run from its latest checkpoint
question = "none"  # train all runs of a question of the report: 4a or 4b, or all
seeds = 1  # repeat each run with this number of seeds: seed, seed + 1, ...
rerun = False  # repeat the runs of a question that already have a record
redraw = False  # do not train: make tables and figures again, from the records
checkpoint = "none"  # the file of a trained network, for --predict
predict = "none"  # an image or a folder of images, to be classified by that network
note = "none"  # your name or a remark, stored in the record and in its file's name
# --- end of settings --------------------------------------------------------------------------

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # normalization: ImageNet's
IMAGENET_HASH = "6002323d"  # of torchvision's file of weights, and part of its name
HIDDEN = 256


# ============================================ network ============================================

class VGG(nn.Module):
    """torchvision's VGG11-BN features, averaged to one vector, and two new linear layers.

    (B, 3, S, S) images to (B, num_classes) logits; S is at least 32. fine_tune=False freezes the
    weights of the features. Their batch norm layers then run in eval mode, so that the features are
    a fixed function of the image. With frozen_norm="train", as in the exercise's template, these
    layers normalize by the statistics of the batch, and their running statistics change.
    """

    def __init__(self, fine_tune=True, frozen_norm="eval", num_classes=10):
        super().__init__()
        self.features = vgg11_bn().features.requires_grad_(fine_tune)
        self.head = nn.Sequential(nn.Linear(512, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.ReLU(),
                                  nn.Linear(HIDDEN, num_classes))
        self.fixed = not fine_tune and frozen_norm == "eval"

    def trained_norms(self):
        """The batch norm layers that run in train mode while training."""
        return utils.batch_norm_layers(self.head if self.fixed else self)

    def train(self, mode=True):
        super().train(mode)
        if self.fixed:
            self.features.eval()
        return self

    def extract(self, images):
        """The features (B, 512) of images (B, 3, S, S)."""
        return self.features(images).mean(dim=(2, 3))

    def forward(self, images):
        return self.head(self.extract(images))

def build_model(settings, num_classes):
    """The network of the settings, with initial weights; see load_features for pretrained ones."""
    model = VGG(settings.fine_tune, settings.frozen_norm, num_classes)
    if settings.pretrained == "none":
        init_head(model)
    return model

def init_head(model):
    """Initialize the new layers as the exercise's template does for training from scratch."""
    for layer in model.head:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=1e-3)
            nn.init.zeros_(layer.bias)

def make_optimizer(model, settings):
    """The optimizer of the weights that are trained, and its schedule, stepped once per epoch."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trainable, settings.learning_rate,
                                 weight_decay=settings.reg, fused=True)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, settings.learning_rate_decay)
    return optimizer, scheduler


# ====================================== pretrained weights ======================================

def load_features(model, pretrained):
    """Put pretrained weights into the features of a network; returns the hash of their file.

    pretrained: "imagenet" for torchvision's weights; or the path of a state dict of a VGG11-BN, or
    of its features.* only, or of a checkpoint of this script. "none" leaves the network as it is
    and returns None. Raises utils.UserError.
    """
    if pretrained == "none":
        return None
    if pretrained == "imagenet":
        state = download_weights(VGG11_BN_Weights.IMAGENET1K_V1)
        weights_hash = IMAGENET_HASH
    else:
        state = utils.load_checkpoint(pretrained)
        weights_hash = hashlib.sha256(Path(pretrained).read_bytes()).hexdigest()[:16]
    try:
        state = state.get("model", state)  # a checkpoint has the weights under this name
        features = {name.removeprefix("features."): value for name, value in state.items()
                    if name.startswith("features.")}
        model.features.load_state_dict(features)
    except (AttributeError, RuntimeError) as error:
        raise utils.UserError(f"{pretrained} lacks the features.* of a VGG11-BN") from error
    return weights_hash

def download_weights(weights):
    """torchvision's weights, downloaded once. Raises utils.UserError."""
    socket.setdefaulttimeout(15)  # seconds without data after which the download fails
    try:
        return weights.get_state_dict(check_hash=True, weights_only=True)
    except Exception as error:  # urllib, http.client, zipfile and torch raise their own
        path = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
        raise utils.UserError(
            f"the ImageNet weights cannot be downloaded ({error}): put an undamaged {path.name} "
            f"into {path.parent}, name others with --pretrained=PATH, or train from scratch with "
            "--pretrained=none") from error


# ======================================== fixed features ========================================

@dataclass
class FeatureData(utils.Data):
    """A data set whose batches are the fixed features of images, computed once, for the head."""

    plain: torch.Tensor | None = None  # float32 (N, 512): the features of the images
    mirrored: torch.Tensor | None = None  # those of the mirrored images; None if not needed

    def batch(self, indices, augment=None):
        """Features (B, 512), those of mirrored images where `augment` mirrors, and labels (B,)."""
        features = self.plain[indices]
        if augment:
            p = utils.AUGMENTATIONS["horizontal_flip"].keywords["p"]
            chosen = utils.choose(indices, augment.generator, p).view(-1, 1)
            features = torch.where(chosen, self.mirrored[indices], features)
        return features, self.labels[indices]

def cache_features(model, data, augmentation, dtype):
    """The network to train and the data to train it on: the head and FeatureData if the features
    are fixed and no augmentation but mirroring is used, otherwise the model and data as they are.
    FeatureData mirrors the same images as flip would: both draw one number for each image."""
    if not model.fixed or augmentation not in ("none", "horizontal_flip"):
        return model, data
    plain = extract_all(model, data, dtype)
    mirrored = None
    if augmentation == "horizontal_flip":
        mirrored = extract_all(model, data, dtype, mirror)
    return model.head, FeatureData(**vars(data), plain=plain, mirrored=mirrored)

def mirror(images):
    """All images mirrored left to right, as horizontal_flip mirrors some of them."""
    return images.flip(utils.AUGMENTATIONS["horizontal_flip"].keywords["dim"])

@torch.no_grad()
def extract_all(model, data, dtype, augment=None):
    """The features (N, 512) of all images of a data set."""
    model.eval()
    features = torch.zeros(len(data.images), 512, device=data.images.device)
    used = torch.cat((data.train, data.val, data.test))
    for indices in utils.progress_bar(used.split(data.scaled_batch_size(500)), "features"):
        images, _ = data.batch(indices, augment)
        with utils.autocast(images.device, dtype):
            features[indices] = model.extract(images).float()
    return features


# ============================================= run =============================================

def run_title(settings):
    """The name of the network, with the source of its weights."""
    if settings.pretrained == "none":
        return "VGG11-BN from scratch"
    source = "ImageNet" if settings.pretrained == "imagenet" else Path(settings.pretrained).stem
    if settings.fine_tune:
        return f"VGG11-BN fine-tuned, {source} weights"
    if settings.frozen_norm == "eval":
        return f"VGG11-BN frozen, {source} weights"
    return f"VGG11-BN frozen, batch norm in train mode, {source} weights"

def checkpoint_name(settings):
    """The part of a checkpoint's file name that identifies the network, as in Question 4."""
    if settings.pretrained == "none":
        return "part_4b_2"
    if settings.fine_tune:
        return "part_4b_1"
    return "part_4a" if settings.frozen_norm == "eval" else "part_4a_frozen_norm_train"

def train(settings, data, dtype):
    """One run: a new network, trained and tested. Returns its record. data: a utils.Data."""
    torch.manual_seed(settings.seed)
    model = build_model(settings, len(data.classes)).to(data.images.device)
    digest = load_features(model, settings.pretrained)  # a hash of the weights
    optimizer, scheduler = make_optimizer(model, settings)
    scaler = torch.amp.GradScaler(data.images.device.type, enabled=dtype == torch.float16)
    stopper = utils.make_stopper(settings)
    run = utils.Run(settings, run_title(settings), data, dtype, model, optimizer, scheduler, digest)
    if record := run.find_record():
        return record
    run.show_start()
    utils.prepare_model(model, settings, dtype)
    checkpoint = utils.Checkpoint(run, checkpoint_name(settings), stopper, model=model,
                                  optimizer=optimizer, scheduler=scheduler, scaler=scaler)
    first_epoch = checkpoint.restore() + 1
    net, data = cache_features(model, data, settings.augmentation, dtype)  # net: a part of model

    for epoch in range(first_epoch, settings.num_epochs + 1):
        if stopper and stopper.should_stop:
            break
        order_generator, augment_generator, val_generator = utils.seed_epoch(settings.seed, epoch)
        augment = utils.make_augment(settings.augmentation, augment_generator)
        batches = data.batches(data.train, settings.batch_size, order_generator, augment)
        train_loss, train_accuracy = utils.train_one_epoch(net, batches, optimizer, scaler, dtype)
        val_loss, val_accuracy = utils.evaluate(net, data.batches(data.val), dtype)
        numbers = {"train_loss": train_loss, "train_accuracy": train_accuracy,
                   "val_loss": val_loss, "val_accuracy": val_accuracy}
        if augment:  # validate on augmented images, too, as the report probably did
            augment = utils.make_augment(settings.augmentation, val_generator)
            batches = data.batches(data.val, augment=augment)
            _, numbers["val_accuracy_augmented"] = utils.evaluate(net, batches, dtype)
        scheduler.step()
        if stopper:
            stopper.update(epoch, val_loss, val_accuracy, model)
        run.log_epoch(epoch, numbers)
        checkpoint.save_periodically()

    checkpoint.save()
    latest = best = utils.test(net, data, dtype)
    if stopper:
        model.load_state_dict(stopper.best_weights)
        best = utils.test(net, data, dtype)
    precise = utils.precise_bn_accuracies(net, model.trained_norms(), data, dtype)
    return run.finish(checkpoint, latest, best, precise)


# ========================================== questions ==========================================

NOTE = ("We measure on plain images in eval mode; the report probably measured on mirrored "
        "ones in train mode.")

QUESTIONS = {  # each row holds the report's numbers under the keys of our results
    "4a": Question(
        text="How far do frozen pretrained features go?",
        title="Table 5", figures=("figure_8_part_4a.png",),
        note=f"{NOTE} Its frozen network was probably in train mode, as in the second row.",
        columns={"validation": "val_accuracy", "test": "test_accuracy",
                 "test, first 1,000 images": "test_accuracy_first_1000",
                 "test, precise BN": "test_accuracy_recalibrated"},
        rows=[
            Row("frozen", {"fine_tune": False, "frozen_norm": "eval"},
                {"val_accuracy": 65.1, "test_accuracy": 61.6}),
            Row("frozen, batch norm in train mode", {"fine_tune": False, "frozen_norm": "train"}),
        ]),
    "4b": Question(
        text="Is it better to start from pretrained weights or from scratch?",
        title="Table 6", note=NOTE, figures=("figure_9_10_part_4b.png",),
        columns={"best epoch": "best_epoch", "validation": "val_accuracy",
                 "train": "train_accuracy", "test": "test_accuracy",
                 "test, first 1,000 images": "test_accuracy_first_1000",
                 "test, precise BN": "test_accuracy_recalibrated"},
        rows=[
            Row("Model 1 (fine-tuned)", {"fine_tune": True},
                {"best_epoch": 11, "val_accuracy": 89.1, "train_accuracy": 97.8,
                 "test_accuracy": 88.6}),
            Row("Model 2 (from scratch)", {"fine_tune": True, "pretrained": "none"},
                {"best_epoch": 19, "val_accuracy": 88.7, "train_accuracy": 98.0,
                 "test_accuracy": 84.4}),
        ]),
}

SUMMARY = {  # lines of summary.png: the question and the row that have the results
    "VGG11-BN, frozen": ("4a", "frozen"),
    "VGG11-BN, from scratch": ("4b", "Model 2 (from scratch)"),
    "VGG11-BN, fine-tuned": ("4b", "Model 1 (fine-tuned)")}

CLAIMS = [  # the report's own conclusions first
    Claim("4b", "Fine-tuning beats frozen features", "Model 1 (fine-tuned)", ["frozen"],
          rivals_question="4a", above=0, report="test 61.6 → 88.6", report_difference=27.0),
    Claim("4b", "Pretrained beats from scratch", "Model 1 (fine-tuned)", ["Model 2 (from scratch)"],
          above=0, report="test 84.4 → 88.6", report_difference=4.2),
    # what the report leaves open
    Claim("4a", "The mode of frozen batch norm layers makes less than a point's difference",
          "frozen, batch norm in train mode", ["frozen"], above=-1, below=1),
]


# =========================================== figures ===========================================

def draw(question_id, results, folder, data):
    """Draw the figures of a question. results: {name: records}; data: not needed here."""
    question = QUESTIONS[question_id]
    names = question.figures or (f"question_{question_id}.png",)
    titles = {"4a": "Figure 8: VGG11-BN", "4b": "Figures 9 and 10: VGG11-BN"}
    utils.plot_learning_curves(results, titles.get(question_id, question.text), folder / names[0],
                               question.reports(results), lowest=60)


# ============================================= main =============================================

def check(settings):
    """Raise utils.UserError for settings that do not go together."""
    if settings.pretrained == "none" and not settings.fine_tune:
        raise utils.WrongSetting("--pretrained=none with --fine_tune=False would freeze random "
                                 "features: leave one of them out")
    if "frozen_norm" in settings.given and settings.fine_tune:
        raise utils.WrongSetting("--frozen_norm has no effect without --fine_tune=False")
    if settings.batch_size == 1 or settings.num_training == 1:
        raise utils.WrongSetting("batch norm cannot train on a single image: give a larger "
                                 "--batch_size or --num_training")

def main(argv=None):
    """Run what the settings describe, a single run or a question.

    argv: a list of flags; None: those of the command line, if this file is run. Returns a list of
    the records that are shown, dicts with title, seed, result, history, ... Raises utils.UserError
    for what the user can fix, and at the end for runs that have diverged or are missing.
    """
    settings = utils.parse_settings(globals(), argv)
    return utils.run(settings, mean=MEAN, std=STD, build_model=build_model, train=train, draw=draw,
                     questions=QUESTIONS, claims=CLAIMS, summary=SUMMARY, check=check)

if __name__ == "__main__":
    utils.run_script(main)
