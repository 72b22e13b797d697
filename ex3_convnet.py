"""HLCV Exercise 3, Questions 1 to 3: a convolutional network on CIFAR-10.

Edit the settings below, or give them on the command line:

    python ex3_convnet.py --norm_flag --dropout=0.3 --num_epochs=5
"""

import copy
import textwrap

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn
from torchsummary import summary

import utils
from utils import Claim, Question

# --- experiment -------------------------------------------------------------------------------
norm_flag = False  # batch normalization after each convolution (Question 2a)
earlystop = False  # stop when validation stops improving; keep the best model (2b)
patience = 10  # early stopping waits for this number of epochs without a new best; 0: to the end
monitor = "accuracy"  # what early stopping watches in validation
dropout = 0  # probability of dropping a unit after each block; 0: off (3b)
augmentation = "none"  # what is done to the training images (3a)

# --- training recipe --------------------------------------------------------------------------
num_epochs = 20  # passes over the training images; the report takes 50 with early stopping
batch_size = 200  # images in each step
learning_rate = 2e-3  # of Adam
learning_rate_decay = 0.95  # the learning rate is multiplied by this after each epoch
reg = 1e-3  # weight decay (L2 penalty)
num_training = 0  # train on the first so many images; 0: on all that do not validate
num_validation = 0  # validate on the last so many; 0: 1,000 of CIFAR-10, else a tenth
image_size = 32  # images are resized to this number of pixels a side
seed = 0  # of everything random: initial weights, order, augmentation, dropout

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

MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)  # normalization: pixels 0..1 become -1..1
CHANNELS = (128, 512, 512, 512, 512)

# ============================================ network ============================================


class ConvNet(nn.Module):
    """Five blocks of convolution, (batch norm), max-pool, ReLU, (dropout), then one linear layer.

    (B, 3, S, S) images to (B, num_classes) logits; each block halves the side, S is at least 32.
    """

    def __init__(self, norm_flag=False, dropout=0.0, num_classes=10, image_size=32):
        super().__init__()
        layers = []
        for inputs, outputs in zip((3, *CHANNELS), CHANNELS):
            layers.append(nn.Conv2d(inputs, outputs, kernel_size=3, padding=1))
            if norm_flag:
                layers.append(nn.BatchNorm2d(outputs))
            layers += [nn.MaxPool2d(kernel_size=2), nn.ReLU(inplace=True)]
            if dropout:
                layers.append(nn.Dropout(dropout))
        head = nn.Linear(CHANNELS[-1] * (image_size // 2**len(CHANNELS)) ** 2, num_classes)
        nn.init.normal_(head.weight, std=1e-3)
        nn.init.zeros_(head.bias)
        self.layers = nn.Sequential(*layers, nn.Flatten(), head)

    def forward(self, images):
        return self.layers(images)


def build(flags, num_classes):
    """The network of the flags, with initial weights."""
    return ConvNet(flags.norm_flag, flags.dropout, num_classes, flags.image_size)


def make_optimizer(model, flags):
    """The optimizer and its schedule, which takes a step after each epoch."""
    optimizer = torch.optim.Adam(model.parameters(), flags.learning_rate,
                                 weight_decay=flags.reg, fused=True)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, flags.learning_rate_decay)
    return optimizer, scheduler


# ========================================== experiment ==========================================


def describe(flags):
    """What the network is and what is special about it, for titles and for names of files."""
    parts = {"ConvNet": True, "batch norm": flags.norm_flag,
             f"dropout {flags.dropout:g}": flags.dropout > 0,
             flags.augmentation: flags.augmentation != "none", "early stopping": flags.earlystop}
    title = ", ".join(part for part, is_on in parts.items() if is_on)
    return title, utils.slug(title)


def train(run, data):
    """One experiment: a new network, trained and tested; its record is written.

    run: a utils.Run, which keeps the books; data: utils.Data.
    """
    flags, device = run.flags, data.images.device
    torch.manual_seed(flags.seed)
    model = build(flags, len(data.classes))
    filters = utils.first_filters(model)
    if flags.question in ("none", "1"):
        size = flags.image_size  # in eval mode, as its random numbers would move the statistics
        summary(copy.deepcopy(model).eval(), (3, size, size), device="cpu")
    utils.place(model, device, flags)
    optimizer, scheduler = make_optimizer(model, flags)
    scaler = torch.amp.GradScaler(device.type, enabled=run.dtype == torch.float16)
    # with --resume they get the state of the interrupted run
    if not run.begin(model=model, optimizer=optimizer, scheduler=scheduler, scaler=scaler):
        return

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

QUESTIONS = {  # rows: name, the settings that it changes, the report's number for each column
    "1": Question(
        asked="What do the filters of the first convolution learn?",
        rows=[("without batch norm", {"norm_flag": False})],
        figures=("figure_1_2_filters.png",)),
    "2a": Question(
        asked="Does batch normalization help?", title="Table 1", figures=("figure_3_4.png",),
        columns={"train": "train_accuracy", "validation": "val_accuracy",
                 "model size": "model_size", "test": "test_accuracy",
                 "test, first 1,000 images": "test_accuracy_first_1000",
                 "test, re-estimated statistics": "test_accuracy_recalibrated"},
        rows=[
            ("without batch norm", {"norm_flag": False}, 92.7, 80.1, 7_678_474, 79.9),
            ("with batch norm", {"norm_flag": True}, 98.1, 82.9, 7_682_826, 81.9),
        ]),
    "2b": Question(
        asked="Is anything gained by training on after the best epoch?",
        title="Table 2", shared={"num_epochs": 50}, figures=("figure_5.png",),
        columns={"best epoch": "best_epoch", "best model, validation": "val_accuracy",
                 "latest model, validation": "latest_val_accuracy",
                 "best model, train": "train_accuracy",
                 "latest model, train": "latest_train_accuracy"},
        rows=[
            ("early stopping, without batch norm", {"earlystop": True, "norm_flag": False},
             23, 81.5, 79.6, 97.0, 99.6),
            ("early stopping, with batch norm", {"earlystop": True, "norm_flag": True},
             20, 84.9, 81.8, 98.2, 99.0),
        ]),
    "3a": Question(
        asked="Which augmentation of the training images helps on plain ones?",
        title="Table 3", shared={"norm_flag": True},
        figures=("figure_6.png", "figure_6_techniques.png"),
        note="The report does not say whether its validation images were augmented; its numbers "
             "stand beside those of augmented ones, which they fit.",
        columns={"validation, plain": "val_accuracy",
                 "validation, augmented": "val_accuracy_augmented",
                 "validation, re-estimated statistics": "val_accuracy_recalibrated",
                 "test": "test_accuracy"},
        rows=[
            ("no augmentation", {"augmentation": "none"}),
            ("vertical_flip", {"augmentation": "vertical_flip"}, None, 79.3),
            ("horizontal_flip", {"augmentation": "horizontal_flip"}, None, 84.9),
            ("rotation", {"augmentation": "rotation"}, None, 75.9),
            ("resize_crop", {"augmentation": "resize_crop"}, None, 78.9),
            ("translation", {"augmentation": "translation"}, None, 77.1),
            ("color_jitter", {"augmentation": "color_jitter"}, None, 78.8),
            ("greyscale", {"augmentation": "greyscale"}, None, 80.0),
            ("scaling", {"augmentation": "scaling"}, None, 76.7),
        ]),
    "3b": Question(
        asked="How much dropout is best, and what does it do to batch norm?",
        title="Table 4", shared={"norm_flag": True}, figures=("figure_7.png",),
        columns={"train": "train_accuracy", "validation": "val_accuracy",
                 "validation, re-estimated statistics": "val_accuracy_recalibrated",
                 "test": "test_accuracy"},
        rows=[
            ("no dropout", {"dropout": 0}),
            ("dropout 0.1", {"dropout": 0.1}, 93.1, 83.8),
            ("dropout 0.2", {"dropout": 0.2}, 89.4, 85.8),
            ("dropout 0.3", {"dropout": 0.3}, 85.7, 85.9),
            ("dropout 0.4", {"dropout": 0.4}, 82.3, 82.1),
            ("dropout 0.5", {"dropout": 0.5}, 79.1, 82.1),
            ("dropout 0.6", {"dropout": 0.6}, 74.9, 74.5),
            ("dropout 0.7", {"dropout": 0.7}, 69.1, 66.0),
            ("dropout 0.8", {"dropout": 0.8}, 58.7, 42.3),
            ("dropout 0.9", {"dropout": 0.9}, 37.0, 10.3),
            # what of the collapse is batch norm's part?
            ("dropout 0.5, no batch norm", {"dropout": 0.5, "norm_flag": False}),
            ("dropout 0.7, no batch norm", {"dropout": 0.7, "norm_flag": False}),
            ("dropout 0.9, no batch norm", {"dropout": 0.9, "norm_flag": False}),
        ]),
}

TECHNIQUES = [name for name, *_ in QUESTIONS["3a"].rows]
RATES = [name for name, changes, *_ in QUESTIONS["3b"].rows if "norm_flag" not in changes]

CLAIMS = [  # question, claim, the first, over each of the others by how many points, the report
    Claim("2a", "Batch norm is better", "with batch norm", ["without batch norm"], above=0,
          report="test 79.9 → 81.9", report_lead=2.0),
    Claim("2b", "Past the best epoch nothing is gained, without batch norm",
          ("early stopping, without batch norm", "latest_test_accuracy"),
          [("early stopping, without batch norm", "test_accuracy")], below=0.5,
          report="validation 81.5 → 79.6", report_lead=-1.9),
    Claim("2b", "Past the best epoch nothing is gained, with batch norm",
          ("early stopping, with batch norm", "latest_test_accuracy"),
          [("early stopping, with batch norm", "test_accuracy")], below=0.5,
          report="validation 84.9 → 81.8", report_lead=-3.1),
    Claim("3a", "Horizontal flip helps", "horizontal_flip", ["no augmentation"], above=0,
          report="validation 82.9 → 84.9", report_lead=2.0),
    Claim("3a", "Horizontal flip is the best technique", "horizontal_flip",
          [name for name in TECHNIQUES if name != "horizontal_flip"], above=0,
          report="validation 84.9, the next 80.0", report_lead=4.9),
    Claim("3b", "Dropout 0.3 is the best rate", "dropout 0.3",
          [name for name in RATES if name != "dropout 0.3"], above=0,
          report="validation 85.9, the next 85.8", report_lead=0.1),
    Claim("3b", "Dropout 0.3 is better than 0.7", "dropout 0.3", ["dropout 0.7"], above=0,
          report="validation 66.0 → 85.9", report_lead=19.9),
    Claim("3b", "At dropout 0.9 the network is at chance", "dropout 0.9", [10.0], below=2,
          report="validation 10.3", report_lead=0.3),
    # what the report leaves open
    Claim("3a", "Not in the report: trained on scaled images, better on them (validation)",
          ("scaling", "val_accuracy_augmented"), [("scaling", "val_accuracy")], above=0,
          report="76.7, and not on which"),
    *(Claim("3b", f"Not in the report: re-estimated statistics help at dropout {rate} (validation)",
            (f"dropout {rate}", "val_accuracy_recalibrated"), [(f"dropout {rate}", "val_accuracy")],
            above=0) for rate in (0.6, 0.7, 0.8, 0.9)),
]

# =========================================== figures ===========================================


def draw(question, results, flags, folder, data):
    """Draw the figures of a question (or one experiment: "none").

    results: {name: the records of its seeds}; data: for the picture of the techniques, or None.
    """
    if question == "none":
        utils.plot_run(flags, results, folder)
    elif question == "1":
        first = results["without batch norm"][0]
        utils.plot_filters(first, folder / "figure_1_2_filters.png", first["title"])
    elif question == "2a":
        utils.plot_learning_curves(results, "Figures 3 and 4: ConvNet", folder / "figure_3_4.png",
                                   QUESTIONS["2a"].report, lowest=40)
    elif question == "2b":
        plot_early_stopping(results, folder / "figure_5.png")
    elif question == "3a":
        plot_techniques(results, folder / "figure_6.png")
        if data:
            plot_augmented_images(data, folder / "figure_6_techniques.png")
    elif question == "3b":
        plot_dropout(results, folder / "figure_7.png")


def plot_early_stopping(results, path):
    """Figure 5: accuracy curves; a star is a seed's best epoch, a square where it stopped."""
    figure = plt.figure(figsize=(10, 1 + 3.6 * -(-len(results) // 2)))
    axes = panels(figure, len(results), columns=2)
    for axis, (name, records) in zip(axes, results.items()):
        utils.draw_curves(axis, records, "accuracy", report=QUESTIONS["2b"].report(name, records))
        for record in records:
            accuracy = record["history"]["val_accuracy"]
            axis.plot(len(accuracy), 100 * accuracy[-1], "ks", markersize=5, label="stop")
        axis.set_title(name, fontsize=10)
        if utils.has_report(records):
            axis.set_ylim(40, 101)
    utils.save_figure(figure, "Figure 5: early stopping", path, sum(results.values(), []), axes)


def panels(figure, count, columns=3):
    """This number of axes of one scale, in rows."""
    axes = figure.subplots(-(-count // columns), columns, sharex=True, sharey=True,
                           squeeze=False).flat
    for axis in axes[count:]:
        axis.remove()
    return axes[:count]


def plot_techniques(results, path):
    """Figure 6: the learning curves of each technique, with its accuracies of Table 3."""
    figure = plt.figure(figsize=(10, 1 + 2.6 * -(-len(results) // 3)))
    axes = panels(figure, len(results))
    for axis, (name, records) in zip(axes, results.items()):
        utils.draw_curves(axis, records, "accuracy", utils.PARTS,
                          QUESTIONS["3a"].report(name, records))
        plain, augmented = (np.mean(utils.values_of(records, key))
                            for key in ("val_accuracy", "val_accuracy_augmented"))
        both = f"{augmented:.1f} augmented, {plain:.1f} plain"
        axis.set_title(f"{name}: {both if plain != augmented else f'{plain:.1f}'}", fontsize=9)
        axis.label_outer()
    if utils.has_report(records):
        axes[0].set_ylim(40, 101)
    utils.save_figure(figure, "Figure 6: the techniques, with their accuracy (%) on augmented and "
                      "on plain validation images", path, sum(results.values(), []), axes)


def plot_augmented_images(data, path, count=10):
    """What each technique does: the same few training images, each with its own draw; those that it
    left as they were are pale."""
    generator = torch.Generator().manual_seed(0)
    images = data.images[data.train[:count]].float().cpu() / 255
    names = [changes["augmentation"] for _, changes, *_ in QUESTIONS["3a"].rows]
    figure, axes = plt.subplots(len(names), len(images), squeeze=False,
                                figsize=(len(images), 0.9 * len(names) + 0.6))
    for row, name in zip(axes, names):
        augment = utils.make_augment(name, generator)
        shown = augment(images).clamp(0, 1) if augment else images
        for axis, image, old in zip(row, shown, images):
            pale = augment and torch.equal(image, old)
            axis.imshow(image.permute(1, 2, 0).numpy(), alpha=0.3 if pale else 1)
            axis.set(xticks=[], yticks=[], frame_on=False)
        values = getattr(utils.AUGMENTATIONS.get(name), "keywords", {})
        words = ", ".join(f"{key} {value}" for key, value in values.items() if key != "dim")
        words = f"{name}\n{textwrap.fill(words, 30)}" if augment else "original"
        row[0].set_ylabel(words, rotation=0, ha="right", va="center", fontsize=9)
    utils.save_figure(figure, f"The augmentation techniques on {data.name}", path)


def plot_dropout(results, path):
    """Figure 7: accuracy over the dropout, whole and near the best, and the learning curves."""
    figure = plt.figure(figsize=(11, 8.4))
    (whole, zoom), (left, right) = figure.subplots(2, 2)
    rates = {name: records[0]["identity"]["settings"].get("dropout", 0)
             for name, records in results.items()}
    normed = [name for name in results
              if "norm_flag" in results[name][0]["identity"]["settings"]]
    plain = [name for name in results if name not in normed]
    again = "validation, re-estimated statistics"
    for axis in (whole, zoom):
        for names, key, label, style in (
                (normed, "train_accuracy", "train", utils.TRAIN),
                (normed, "val_accuracy", "validation", utils.VALIDATION),
                (normed, "val_accuracy_recalibrated", again, utils.AUGMENTED),
                (plain, "val_accuracy", "validation, no batch norm",
                 {"color": "0.5", "marker": "v", "linestyle": "none", "zorder": 6})):
            numbers = {rates[name]: utils.values_of(results[name], key) for name in names}
            points = [(rate, np.mean(of), np.std(of, ddof=1) if len(of) > 1 else 0)
                      for rate, of in sorted(numbers.items()) if of]
            if points:
                axis.errorbar(*zip(*points), capsize=3, markersize=4, label=label, **style)
            for name in names:
                report = QUESTIONS["3b"].report(name, results[name])
                if key in report:
                    axis.plot(rates[name], report[key], **utils.REPORT, color=style["color"],
                              label="report")
        axis.set(xlabel="dropout", ylabel="accuracy of the last epoch (%)", ylim=(0, 101))
        axis.grid()
    zoom.set(xlim=(-0.02, 0.62), ylim=(70, 92), title="the same from 0 to 0.6")
    for axis, part, what in ((left, "train", "train"), (right, "val", "validation")):
        for name in normed:
            curves = [record["history"][f"{part}_accuracy"] for record in results[name]]
            epochs = min(map(len, curves))
            mean = 100 * np.mean([curve[:epochs] for curve in curves], axis=0)
            axis.plot(range(1, epochs + 1), mean, color=plt.get_cmap("viridis")(rates[name]),
                      label=f"{rates[name]:g}")
        axis.set(xlabel="epoch", ylabel="accuracy (%)", title=f"{what}, mean of the seeds",
                 ylim=(0, 101))
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid()
    right.legend(title="dropout", loc="center left", bbox_to_anchor=(1, 0.5))
    utils.save_figure(figure, "Figure 7: dropout; bars: standard deviation of the seeds", path,
                      sum(results.values(), []), [whole])


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
    if not flags.redraw or flags.dataset not in utils.NAMES:  # a folder's results have its digits
        data = utils.load_data(flags, MEAN, STD, device)
    if not flags.redraw:
        failed = utils.train_all(plan, describe, train, data, dtype)
    return utils.show_results(flags, plan, data, QUESTIONS, CLAIMS, draw, failed)


if __name__ == "__main__":
    utils.run_script(main)
