"""HLCV Exercise 3, Questions 1 to 3: a convolutional network on CIFAR-10.

Edit the settings in this file, or give them on the command line:

    python ex3_convnet.py --norm_flag --dropout=0.3 --num_epochs=5
"""

import textwrap

import numpy as np
import torch
from torch import nn

import utils
from utils import Claim, Question, Row

# Each setting is also a flag of the command line. In the code it is settings.num_epochs, ...
# --- experiment -------------------------------------------------------------------------------
norm_flag = False  # batch normalization after each convolution (Question 2a)
earlystop = False  # stop when validation stops improving; keep the best model (2b)
patience = 10  # stop after this many epochs without improvement; 0: never stop early
monitor = "accuracy"  # what early stopping watches: validation accuracy or loss
dropout = 0  # probability of dropping a unit after each block; 0: off (3b)
augmentation = "none"  # of training images (3a): none, a name in AUGMENTATIONS in utils.py, or a+b

# --- training recipe --------------------------------------------------------------------------
num_epochs = 20  # passes over the training images; the report uses 50 with early stopping
batch_size = 200  # images in each step
learning_rate = 2e-3  # of the Adam optimizer
learning_rate_decay = 0.95  # the learning rate is multiplied by this after each epoch
reg = 1e-3  # weight decay (L2 penalty)
num_training = 0  # number of training images; 0: all that are not for validation
num_validation = 0  # number of validation images; 0: the data set's default (CIFAR-10: 1,000)
image_size = 32  # images are resized to this number of pixels per side
seed = 0  # seeds everything random: initial weights, order, augmentation, dropout

# --- where and how to run ---------------------------------------------------------------------
dataset = "cifar10"  # cifar10, synthetic, or a folder: of CIFAR-10, or with train/<class>/, test/
results = "figures"  # the folder of records, tables and figures
device = "auto"  # cpu, cuda, or auto: a GPU if one is available
precision = "auto"  # float32, bfloat16 or float16; auto: the fastest one here
compile = False  # torch.compile: 10 s to a minute more to start; measure whether it pays
deterministic = False  # the same numbers every time on CUDA, too, as on a CPU, but slower
resume = False  # continue an interrupted run from its latest checkpoint
question = "none"  # train all runs of a question of the report: 1, 2a, 2b, 3a or 3b, or all
seeds = 1  # repeat each run with this number of seeds: seed, seed + 1, ...
rerun = False  # repeat the runs of a question that already have a record
redraw = False  # do not train: make tables and figures again, from the records
checkpoint = "none"  # the file of a trained network, for --predict
predict = "none"  # an image or a folder of images, to be classified by that network
note = "none"  # your name or a remark, stored in the record and in its file's name
# --- end of settings --------------------------------------------------------------------------

MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)  # normalization: pixels 0..1 become -1..1
CHANNELS = (128, 512, 512, 512, 512)


# ============================================ network ============================================

class ConvNet(nn.Module):
    """Five blocks of convolution, (batch norm), max-pool, ReLU, (dropout), then one linear layer.

    (B, 3, S, S) images to (B, num_classes) logits; each block halves the side; S is at least 32.
    """

    def __init__(self, norm_flag=False, dropout=0.0, num_classes=10, image_size=32):
        super().__init__()
        layers = []
        in_channels = 3
        for out_channels in CHANNELS:
            layers.append(nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1))
            if norm_flag:
                layers.append(nn.BatchNorm2d(out_channels))
            layers += [nn.MaxPool2d(kernel_size=2), nn.ReLU(inplace=True)]
            if dropout:
                layers.append(nn.Dropout(dropout))
            in_channels = out_channels
        side = image_size // 2**len(CHANNELS)  # of the last block's output
        head = nn.Linear(in_channels * side**2, num_classes)
        nn.init.normal_(head.weight, std=1e-3)
        nn.init.zeros_(head.bias)
        self.layers = nn.Sequential(*layers, nn.Flatten(), head)

    def forward(self, images):
        return self.layers(images)

def build_model(settings, num_classes):
    """The network of the settings, with initial weights."""
    return ConvNet(settings.norm_flag, settings.dropout, num_classes, settings.image_size)

def make_optimizer(model, settings):
    """The optimizer and its schedule, stepped once per epoch."""
    optimizer = torch.optim.Adam(model.parameters(), settings.learning_rate,
                                 weight_decay=settings.reg, fused=True)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, settings.learning_rate_decay)
    return optimizer, scheduler


# ============================================= run =============================================

def run_title(settings):
    """The name of the network, with the techniques that it uses."""
    parts = ["ConvNet"]
    if settings.norm_flag:
        parts.append("batch norm")
    if settings.dropout:
        parts.append(f"dropout {settings.dropout:g}")
    if settings.augmentation != "none":
        parts.append(settings.augmentation)
    if settings.earlystop:
        parts.append("early stopping")
    return ", ".join(parts)

def checkpoint_name(settings):
    """The part of a checkpoint's file name that identifies the network."""
    return utils.slug(run_title(settings))

def train(settings, data, dtype):
    """One run: a new network, trained and tested. Returns its record. data: a utils.Data."""
    # The Run describes the network as it was built: prepare_model and training change it.
    torch.manual_seed(settings.seed)
    model = build_model(settings, len(data.classes)).to(data.images.device)
    optimizer, scheduler = make_optimizer(model, settings)
    scaler = torch.amp.GradScaler(data.images.device.type, enabled=dtype == torch.float16)
    stopper = utils.make_stopper(settings)
    run = utils.Run(settings, run_title(settings), data, dtype, model, optimizer, scheduler)
    if record := run.find_record():
        return record
    run.show_start()
    utils.prepare_model(model, settings, dtype)
    checkpoint = utils.Checkpoint(run, checkpoint_name(settings), stopper, model=model,
                                  optimizer=optimizer, scheduler=scheduler, scaler=scaler)
    first_epoch = checkpoint.restore() + 1

    for epoch in range(first_epoch, settings.num_epochs + 1):
        if stopper and stopper.should_stop:
            break
        order_generator, augment_generator, val_generator = utils.seed_epoch(settings.seed, epoch)
        augment = utils.make_augment(settings.augmentation, augment_generator)
        batches = data.batches(data.train, settings.batch_size, order_generator, augment)
        train_loss, train_accuracy = utils.train_one_epoch(model, batches, optimizer, scaler, dtype)
        val_loss, val_accuracy = utils.evaluate(model, data.batches(data.val), dtype)
        numbers = {"train_loss": train_loss, "train_accuracy": train_accuracy,
                   "val_loss": val_loss, "val_accuracy": val_accuracy}
        if augment:  # validate on augmented images, too, as the report probably did
            augment = utils.make_augment(settings.augmentation, val_generator)
            batches = data.batches(data.val, augment=augment)
            _, numbers["val_accuracy_augmented"] = utils.evaluate(model, batches, dtype)
        scheduler.step()
        if stopper:
            stopper.update(epoch, val_loss, val_accuracy, model)
        run.log_epoch(epoch, numbers)
        checkpoint.save_periodically()

    checkpoint.save()
    latest = utils.test(model, data, dtype)
    best = latest
    if stopper:
        model.load_state_dict(stopper.best_weights)
        best = utils.test(model, data, dtype)
    precise = utils.precise_bn_accuracies(model, utils.batch_norm_layers(model), data, dtype)
    return run.finish(checkpoint, latest, best, precise)


# ========================================== questions ==========================================

def augmentation_row(name, val_accuracy):
    """A row of Table 3 with the report's validation accuracy."""
    return Row(name, {"augmentation": name}, {"val_accuracy_augmented": val_accuracy})

def rate_row(rate, train_accuracy, val_accuracy):
    """A row of Table 4 with the report's accuracies."""
    report = {"train_accuracy": train_accuracy, "val_accuracy": val_accuracy}
    return Row(f"dropout {rate}", {"dropout": rate}, report)

QUESTIONS = {  # each row holds the report's numbers under the keys of our results
    "1": Question(
        text="What do the filters of the first convolution learn?",
        rows=[Row("without batch norm", {"norm_flag": False})],
        figures=("figure_1_2_filters.png",), columns={}),
    "2a": Question(
        text="Does batch normalization help?", title="Table 1", figures=("figure_3_4.png",),
        columns={"train": "train_accuracy", "validation": "val_accuracy",
                 "model size": "model_size", "test": "test_accuracy",
                 "test, first 1,000 images": "test_accuracy_first_1000",
                 "test, precise BN": "test_accuracy_recalibrated"},
        rows=[
            Row("without batch norm", {"norm_flag": False},
                {"train_accuracy": 92.7, "val_accuracy": 80.1, "model_size": 7_678_474,
                 "test_accuracy": 79.9}),
            Row("with batch norm", {"norm_flag": True},
                {"train_accuracy": 98.1, "val_accuracy": 82.9, "model_size": 7_682_826,
                 "test_accuracy": 81.9}),
        ]),
    "2b": Question(
        text="Is anything gained by training past the best epoch?",
        title="Table 2", defaults={"num_epochs": 50}, figures=("figure_5.png",),
        columns={"best epoch": "best_epoch", "best model, validation": "val_accuracy",
                 "latest model, validation": "latest_val_accuracy",
                 "best model, train": "train_accuracy",
                 "latest model, train": "latest_train_accuracy"},
        rows=[
            Row("early stopping, without batch norm", {"earlystop": True, "norm_flag": False},
                {"best_epoch": 23, "val_accuracy": 81.5, "train_accuracy": 97.0,
                 "last_epoch": 33, "latest_val_accuracy": 79.6, "latest_train_accuracy": 99.6}),
            Row("early stopping, with batch norm", {"earlystop": True, "norm_flag": True},
                {"best_epoch": 20, "val_accuracy": 84.9, "train_accuracy": 98.2,
                 "last_epoch": 30, "latest_val_accuracy": 81.8, "latest_train_accuracy": 99.0}),
        ]),
    "3a": Question(
        text="Which augmentation of the training images helps on plain images?",
        title="Table 3", defaults={"norm_flag": True},
        figures=("figure_6.png", "figure_6_techniques.png"),
        note="The report does not say whether its validation images were augmented; most of its "
             "numbers fit our accuracies on augmented images better, so they stand beside these.",
        columns={"validation, plain": "val_accuracy",
                 "validation, augmented": "val_accuracy_augmented",
                 "validation, precise BN": "val_accuracy_recalibrated", "test": "test_accuracy"},
        rows=[
            Row("no augmentation", {"augmentation": "none"}),
            augmentation_row("vertical_flip", 79.3), augmentation_row("horizontal_flip", 84.9),
            augmentation_row("rotation", 75.9), augmentation_row("resize_crop", 78.9),
            augmentation_row("translation", 77.1), augmentation_row("color_jitter", 78.8),
            augmentation_row("greyscale", 80.0), augmentation_row("scaling", 76.7)]),
    "3b": Question(
        text="How much dropout is best, and what does it do to batch norm?",
        title="Table 4", defaults={"norm_flag": True}, figures=("figure_7.png",),
        columns={"train": "train_accuracy", "validation": "val_accuracy",
                 "validation, precise BN": "val_accuracy_recalibrated", "test": "test_accuracy"},
        rows=[
            Row("no dropout", {"dropout": 0}),
            rate_row(0.1, 93.1, 83.8), rate_row(0.2, 89.4, 85.8), rate_row(0.3, 85.7, 85.9),
            rate_row(0.4, 82.3, 82.1), rate_row(0.5, 79.1, 82.1), rate_row(0.6, 74.9, 74.5),
            rate_row(0.7, 69.1, 66.0), rate_row(0.8, 58.7, 42.3), rate_row(0.9, 37.0, 10.3),
            # how much of the collapse is due to batch norm?
            Row("dropout 0.5, no batch norm", {"dropout": 0.5, "norm_flag": False}),
            Row("dropout 0.7, no batch norm", {"dropout": 0.7, "norm_flag": False}),
            Row("dropout 0.9, no batch norm", {"dropout": 0.9, "norm_flag": False})]),
}

SUMMARY = {  # lines of summary.png: the question and the row that have the results
    "plain convnet": ("2a", "without batch norm"),
    "batch norm": ("2a", "with batch norm"),
    "batch norm + early stopping": ("2b", "early stopping, with batch norm"),
    "batch norm + horizontal flip": ("3a", "horizontal_flip"),
    "batch norm + dropout 0.3": ("3b", "dropout 0.3")}

def other_rows(name, question):
    """The other rows of a question, except those without batch norm."""
    return [row.name for row in QUESTIONS[question].rows
            if row.name != name and row.changes.get("norm_flag") is not False]

CLAIMS = [  # the report's own conclusions first
    Claim("2a", "Batch norm is better", "with batch norm", ["without batch norm"], above=0,
          report="test 79.9 → 81.9", report_difference=2.0),
    Claim("2b", "Without batch norm, training past the best epoch gains nothing",
          "early stopping, without batch norm", key="latest_test_accuracy",
          other_key="test_accuracy", below=0.5, report="validation 81.5 → 79.6",
          report_difference=-1.9),
    Claim("2b", "With batch norm, training past the best epoch gains nothing",
          "early stopping, with batch norm", key="latest_test_accuracy",
          other_key="test_accuracy", below=0.5, report="validation 84.9 → 81.8",
          report_difference=-3.1),
    Claim("3a", "Horizontal flip helps", "horizontal_flip", ["no augmentation"], above=0,
          report="validation 82.9 → 84.9", report_difference=2.0),
    Claim("3a", "Horizontal flip is the best technique", "horizontal_flip",
          other_rows("horizontal_flip", "3a"), above=0,
          report="validation 84.9, the next 80.0", report_difference=4.9),
    Claim("3b", "Dropout 0.3 helps", "dropout 0.3", ["no dropout"], above=0,
          report="validation 82.9 → 85.9", report_difference=3.0),
    Claim("3b", "Dropout 0.3 is the best rate", "dropout 0.3", other_rows("dropout 0.3", "3b"),
          above=0, report="validation 85.9, the next 85.8", report_difference=0.1),
    Claim("3b", "Dropout 0.3 is better than 0.7", "dropout 0.3", ["dropout 0.7"], above=0,
          report="validation 66.0 → 85.9", report_difference=19.9),
    Claim("3b", "At dropout 0.9 the network performs at chance level", "dropout 0.9",
          constant=10.0, below=2, report="validation 10.3", report_difference=0.3),
    # what the report leaves open
    Claim("3a", "Trained on scaled images, the network does better on scaled than on plain ones",
          "scaling", key="val_accuracy_augmented", other_key="val_accuracy", above=0,
          report="76.7; it does not say on which images"),
    Claim("3b", "At dropout 0.8 precise BN helps (validation accuracy)", "dropout 0.8",
          key="val_accuracy_recalibrated", other_key="val_accuracy", above=0),
]


# =========================================== figures ===========================================

def draw(question_id, results, folder, data):
    """Draw the figures of a question, or learning curves if it is one that you have added. results:
    {row: records}; data: for the picture of the techniques, or None."""
    reports = QUESTIONS[question_id].reports(results)
    if question_id == "1":
        first = results["without batch norm"][0]
        utils.plot_filters(first, folder / "figure_1_2_filters.png", first["title"])
    elif question_id == "2a":
        utils.plot_learning_curves(results, "Figures 3 and 4: ConvNet", folder / "figure_3_4.png",
                                   reports, lowest=40)
    elif question_id == "2b":
        plot_early_stopping(results, reports, folder / "figure_5.png")
    elif question_id == "3a":
        plot_techniques(results, reports, folder / "figure_6.png")
        if data:
            plot_augmented_images(data, folder / "figure_6_techniques.png")
    elif question_id == "3b":
        plot_dropout(results, reports, folder / "figure_7.png")
    else:
        utils.plot_learning_curves(results, QUESTIONS[question_id].text,
                                   folder / f"question_{question_id}.png")

def plot_early_stopping(results, reports, path):
    """Figure 5: accuracy curves. A star marks a seed's best epoch, a square an early stop."""
    figure, axes = utils.new_figure(len(results), 2, 5, 3.6, sharey=True)
    for ax, (name, records) in zip(axes, results.items()):
        utils.draw_curves(ax, records, "accuracy")
        utils.draw_report(ax, reports[name], len(records[0]["history"]["val_loss"]))
        for record in records:
            accuracy = utils.curve_of(record, "val_accuracy")
            if utils.stopped_early(record):
                ax.plot(len(accuracy), accuracy[-1], "ks", markersize=5, label="early stop")
        ax.set_title(name, fontsize=10)
        if reports[name]:
            ax.set_ylim(40, 101)
    utils.save_figure(figure, "Figure 5: early stopping", path,
                      utils.flatten(results.values()), axes)

def plot_techniques(results, reports, path):
    """Figure 6: the learning curves of each technique, with its accuracies of Table 3."""
    figure, axes = utils.new_figure(len(results), 3, 3.4, 2.6, sharex=True, sharey=True)
    for ax, (name, records) in zip(axes, results.items()):
        utils.draw_curves(ax, records, "accuracy", augmented=True)
        utils.draw_report(ax, reports[name], len(records[0]["history"]["val_loss"]))
        plain = np.mean(utils.values_of(records, "val_accuracy"))
        augmented = np.mean(utils.values_of(records, "val_accuracy_augmented"))
        numbers = f"{augmented:.1f} augmented, {plain:.1f} plain"
        if records[0]["settings"].get("augmentation", "none") == "none":
            numbers = f"{plain:.1f}"
        ax.set_title(f"{name}: {numbers}", fontsize=9)
        if reports[name]:
            ax.set_ylim(40, 101)
    utils.save_figure(figure, "Figure 6: the techniques, with their accuracy (%) on augmented and "
                      "on plain validation images", path, utils.flatten(results.values()), axes)

def plot_augmented_images(data, path, count=10):
    """What each technique does to the same few training images; unchanged ones are faded."""
    generator = torch.Generator().manual_seed(0)
    images = data.images[data.train[:count]].float().cpu() / 255
    names = [row.changes.get("augmentation", "none") for row in QUESTIONS["3a"].rows]
    figure, axes = utils.new_figure(len(names) * len(images), len(images), 1, 0.9)
    for i, name in enumerate(names):
        row = axes[i * len(images):(i + 1) * len(images)]
        augment = utils.make_augment(name, generator)
        if augment is None:
            changed, label = images, "original"
        else:
            changed = augment(images).clamp(0, 1)
            words = []
            for technique in augment.techniques:
                parameters = getattr(technique, "keywords", {})
                words += [f"{key} {value}" for key, value in parameters.items() if key != "dim"]
            label = f"{name}\n{textwrap.fill(', '.join(words), 30)}"
        for ax, image, original in zip(row, changed, images):
            is_unchanged = augment and torch.equal(image, original)
            ax.imshow(image.permute(1, 2, 0).numpy(), alpha=0.3 if is_unchanged else 1)
            ax.set(xticks=[], yticks=[], frame_on=False)
        row[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
    utils.save_figure(figure, f"The augmentation techniques on {data.name}", path)

def plot_dropout(results, reports, path):
    """Figure 7: accuracy against the dropout rate, whole and zoomed, and the learning curves."""
    figure, (whole, zoom, train_curves, val_curves) = utils.new_figure(4, 2, 5.5, 3.7)
    with_norm, without_norm = {}, {}  # {dropout: records}
    for name, records in results.items():
        settings = records[0]["settings"]
        rate = settings.get("dropout", 0)
        if settings.get("norm_flag"):
            with_norm[rate] = records
        else:
            without_norm[rate] = records
        for ax in whole, zoom:
            utils.draw_report(ax, reports[name], rate)
    for ax in whole, zoom:
        draw_rates(ax, with_norm, "train_accuracy", "train", **utils.TRAIN)
        draw_rates(ax, with_norm, "val_accuracy", "validation", **utils.VALIDATION)
        draw_rates(ax, with_norm, "val_accuracy_recalibrated", "validation, precise BN",
                   **utils.AUGMENTED)
        draw_rates(ax, without_norm, "val_accuracy", "validation, no batch norm", color="0.5",
                   marker="v", linestyle="none", zorder=6)
        ax.set(xlabel="dropout", ylabel="accuracy of the last epoch (%)", ylim=(0, 101))
        ax.grid(True)
    zoom.set(xlim=(-0.02, 0.62), title="the same from 0 to 0.6")
    if any(reports.values()):
        zoom.set_ylim(70, 92)
    draw_curves_of_rates(train_curves, with_norm, "train_accuracy", "train")
    draw_curves_of_rates(val_curves, with_norm, "val_accuracy", "validation")
    val_curves.legend(title="dropout", loc="center left", bbox_to_anchor=(1, 0.5))
    utils.save_figure(figure, "Figure 7: dropout; bars: standard deviation of the seeds", path,
                      utils.flatten(results.values()), [whole])

def draw_rates(ax, records_of, key, label, **style):
    """An accuracy against the dropout rate, mean and standard deviation of the seeds.
    records_of: {dropout: records}."""
    rates = [rate for rate in sorted(records_of) if utils.values_of(records_of[rate], key)]
    if rates:
        values = [utils.values_of(records_of[rate], key) for rate in rates]
        means = [np.mean(numbers) for numbers in values]
        deviations = [np.std(numbers, ddof=1) if len(numbers) > 1 else 0 for numbers in values]
        ax.errorbar(rates, means, deviations, capsize=3, label=label, **style)

def draw_curves_of_rates(ax, records_of, key, label):
    """An accuracy over the epochs, a colour for each rate. records_of: {dropout: records}."""
    colormap = utils.plt.get_cmap("viridis")
    for rate in sorted(records_of):
        curve = utils.mean_curve([utils.curve_of(record, key) for record in records_of[rate]])
        utils.draw_curve(ax, curve, 1.4, color=colormap(rate), label=f"{rate:g}")
    ax.set(title=f"{label}, mean of the seeds", ylim=(0, 101))
    utils.label_epochs(ax, "accuracy (%)")


# ============================================= main =============================================

def check(settings):
    """Raise utils.UserError for images that are too small for the number of blocks."""
    smallest = 2**len(CHANNELS)
    if settings.image_size < smallest:
        raise utils.WrongSetting(f"{len(CHANNELS)} blocks need images of {smallest} pixels: give "
                                 f"--image_size={smallest}")

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
