"""HLCV Exercise 3, Questions 1 to 3: a convolutional network on CIFAR-10.

Edit the settings below, or give them on the command line:

    python ex3_convnet.py --norm_flag --dropout=0.3 --num_epochs=5
"""

from __future__ import annotations  # so that a mistyped type below is named in one sentence

import copy

import numpy as np
import torch
from torch import nn

import utils
from utils import Claim, Question, plt

# --- experiment -------------------------------------------------------------------------------
norm_flag: bool = False  # batch normalization after each convolution (Question 2a)
earlystop: bool = False  # stop when validation stops improving; keep the best model (2b)
patience: int = 10  # early stopping waits for this number of epochs without a new best
monitor: str = "accuracy"  # what early stopping watches in validation: accuracy or loss
dropout: float = 0.0  # probability of dropping a unit after each block; 0: off (3b)
augmentation: str = "none"  # one of AUGMENTATIONS in utils.py, or several: a+b (3a)

# --- training recipe --------------------------------------------------------------------------
num_epochs: int = 20  # passes over the training images; the report takes 50 with early stopping
batch_size: int = 200  # images in each step
learning_rate: float = 2e-3  # of Adam
learning_rate_decay: float = 0.95  # the learning rate is multiplied by this after each epoch
reg: float = 1e-3  # weight decay (L2 penalty)
num_training: int | None = None  # train on the first so many; None: on all that do not validate
num_validation: int | None = None  # validate on the last so many; None: a tenth, 1,000 of CIFAR-10
image_size: int = 32  # images are resized to this number of pixels a side
seed: int = 0  # of everything random: initial weights, order, augmentation, dropout

# --- where and how to run ---------------------------------------------------------------------
dataset: str = "cifar10"  # cifar10, synthetic, or a folder with train/<class>/ and test/<class>/
device: str = "auto"  # cpu, cuda or cuda:N; auto: CUDA where there is one
precision: str = "auto"  # float32, bfloat16 or float16; auto: the one that is fast here
channels_last: bool = True  # the layout in memory that most convolutions are fastest in
compile: bool = False  # torch.compile: 10 s to a minute more a run; measure whether it pays
deterministic: bool = False  # on CUDA: the same numbers every time, at some cost (a CPU always is)
resume: bool = False  # go on with an interrupted run from its latest checkpoint
parallel: str = "images"  # what the processes of torchrun share: the images of a run, or the runs
question: str = "none"  # run all of a question of the report: 1, 2a, 2b, 3a, 3b, or all
seeds: str = "1"  # repeat each run with this number of seeds: seed, seed + 1, ...; or 0,5,7
rerun: bool = False  # in a question, run again what is recorded already
redraw: bool = False  # only draw the figures and tables again, from the records
show: bool = False  # open a window for each figure, after saving it
predict: list = []  # images or folders: classify them with the trained model, without training
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
    """The network and what is special about it, as titles and file names give it."""
    parts = {"ConvNet": True, "batch norm": flags.norm_flag,
             f"dropout {flags.dropout:g}": flags.dropout > 0,
             flags.augmentation: flags.augmentation != "none", "early stopping": flags.earlystop}
    return ", ".join(part for part, is_on in parts.items() if is_on)


def checkpoint_name(flags):
    """The experiment, as the names of checkpoints and figures give it."""
    return utils.slug(describe(flags)) + f"_seed{flags.seed}" * (flags.seed > 0)


def experiment(flags, facts):
    """The run that the flags describe, on data with these facts (see utils.make_recipe)."""
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
    utils.print_summary(model, flags.image_size, table=flags.question in ("none", "1"))
    filters = utils.first_filters(model)
    utils.place(model, device, flags.channels_last, flags.compile)
    optimizer, scheduler = make_optimizer(model, flags)
    scaler = torch.amp.GradScaler(device.type, enabled=run.dtype == torch.float16)
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
    if flags.norm_flag:
        predictions["recalibrated"] = {"val": utils.predict_classes(
            recalibrate(model, data, dtype), data, data.val, dtype)}
    return predictions


@torch.no_grad()
def recalibrate(model, data, dtype, batch_size=500):
    """A copy of the model whose batch norm statistics are those of the training images anew.

    They are estimated with dropout off, as the network runs when it is tested: Hendrycks and
    Gimpel, arXiv 1607.02488. In training dropout changes the variance that each batch norm sees and
    remembers: Li et al., "Understanding the Disharmony between Dropout and Batch Normalization by
    Variance Shift", CVPR 2019. Without dropout it shows how far the moving statistics lag behind
    the weights: Wu and Johnson, "Rethinking Batch in BatchNorm", arXiv 2105.07576.
    """
    model = copy.deepcopy(model).eval()
    for layer in utils.batch_norms(model):
        layer.reset_running_stats()
        layer.momentum = None  # the mean over all batches, not a moving one
        layer.train()
    # parts of nearly one size, as each counts as much as any other
    for indices in data.train.tensor_split(-(-len(data.train) // batch_size)):
        images, _ = data.batch(indices)
        with utils.autocast(images.device, dtype):
            model(images)
    return model


# ========================================== questions ==========================================

QUESTIONS = {  # rows: name, the flags that it sets, the report's number for each column
    "1": Question(rows=[("without batch norm", {})], shared={"norm_flag": False},
                  figures=("figure_1_2_filters.png",)),
    "2a": Question(
        title="Table 1", baseline="without batch norm",
        figures=("figure_3.png", "figure_4.png", "question_2a_classes.png"),
        columns={"Train accuracy": "train_accuracy", "Validation accuracy": "val_accuracy",
                 "Model size": "model_size", "Test accuracy": "test_accuracy",
                 "Test accuracy, first 1,000": "test_accuracy_first_1000"},
        rows=[
            ("without batch norm", {"norm_flag": False}, 92.7, 80.1, 7_678_474, 79.9, 79.9),
            ("with batch norm", {"norm_flag": True}, 98.1, 82.9, 7_682_826, 81.9, 81.9),
        ]),
    "2b": Question(
        title="Table 2", shared={"num_epochs": 50}, figures=("figure_5.png",),
        columns={"Early stop checkpoint": "best_epoch",
                 "Best model validation accuracy": "val_accuracy",
                 "Latest model validation accuracy": "latest_val_accuracy",
                 "Best model train accuracy": "train_accuracy",
                 "Latest model train accuracy": "latest_train_accuracy"},
        rows=[
            ("without batch norm", {"earlystop": True, "norm_flag": False},
             23, 81.5, 79.6, 97.0, 99.6),
            ("with batch norm", {"earlystop": True, "norm_flag": True},
             20, 84.9, 81.8, 98.2, 99.0),
        ]),
    "3a": Question(
        title="Table 3", shared={"norm_flag": True}, baseline="no augmentation",
        figures=("figure_6.png", "figure_6_techniques.png"),
        columns={"Validation accuracy": "val_accuracy",
                 "Augmented validation accuracy": "val_accuracy_augmented"},
        rows=[  # the report's number beside both: it does not say which it is
            ("no augmentation", {"augmentation": "none"}, None, None),
            ("vertical_flip", {"augmentation": "vertical_flip"}, 79.3, 79.3),
            ("horizontal_flip", {"augmentation": "horizontal_flip"}, 84.9, 84.9),
            ("rotation", {"augmentation": "rotation"}, 75.9, 75.9),
            ("resize_crop", {"augmentation": "resize_crop"}, 78.9, 78.9),
            ("translation", {"augmentation": "translation"}, 77.1, 77.1),
            ("color_jitter", {"augmentation": "color_jitter"}, 78.8, 78.8),
            ("greyscale", {"augmentation": "greyscale"}, 80.0, 80.0),
            ("scaling", {"augmentation": "scaling"}, 76.7, 76.7),
        ]),
    "3b": Question(
        title="Table 4", shared={"norm_flag": True}, baseline="no dropout",
        figures=("figure_7.png",),
        columns={"Train accuracy": "train_accuracy", "Validation accuracy": "val_accuracy",
                 "Validation accuracy, recalibrated": "val_accuracy_recalibrated"},
        rows=[
            ("no dropout", {"dropout": 0.0}, None, None, None),
            ("dropout 0.1", {"dropout": 0.1}, 93.1, 83.8, None),
            ("dropout 0.2", {"dropout": 0.2}, 89.4, 85.8, None),
            ("dropout 0.3", {"dropout": 0.3}, 85.7, 85.9, None),
            ("dropout 0.4", {"dropout": 0.4}, 82.3, 82.1, None),
            ("dropout 0.5", {"dropout": 0.5}, 79.1, 82.1, None),
            ("dropout 0.6", {"dropout": 0.6}, 74.9, 74.5, None),
            ("dropout 0.7", {"dropout": 0.7}, 69.1, 66.0, None),
            ("dropout 0.8", {"dropout": 0.8}, 58.7, 42.3, None),
            ("dropout 0.9", {"dropout": 0.9}, 37.0, 10.3, None),
            # what of the collapse is batch norm's part?
            ("dropout 0.5, no batch norm", {"dropout": 0.5, "norm_flag": False}, None, None, None),
            ("dropout 0.7, no batch norm", {"dropout": 0.7, "norm_flag": False}, None, None, None),
            ("dropout 0.9, no batch norm", {"dropout": 0.9, "norm_flag": False}, None, None, None),
        ]),
}

TECHNIQUES = [name for name, *_ in QUESTIONS["3a"].rows]
RATES = ["dropout 0.3", "no dropout", *(f"dropout 0.{i}" for i in (1, 2, 4, 5, 6, 7, 8, 9))]

CLAIMS = [  # question, claim, the report's figures, rule, what the rule compares
    Claim("2a", "batch norm is better", "test 79.9 → 81.9", utils.is_better,
          [("with batch norm", "reported", "test"), ("without batch norm", "reported", "test")]),
    *(Claim("2b", f"training past the best epoch gains nothing, {name}", figures,
            utils.does_not_gain, [(name, "latest", "test"), (name, "reported", "test")],
            {"margin": 0.5})
      for name, figures in (("without batch norm", "validation 81.5 → 79.6"),
                            ("with batch norm", "validation 84.9 → 81.8"))),
    Claim("3a", "horizontal flip helps", "validation 84.9", utils.is_better,
          [(name, "reported", "test") for name in ("horizontal_flip", "no augmentation")]),
    Claim("3a", "horizontal flip is the best technique", "84.9, next 80.0", utils.is_best,
          [(name, "reported", "test") for name in sorted(
              TECHNIQUES, key=lambda name: name != "horizontal_flip")]),
    Claim("3b", "dropout 0.3 is the best", "85.9, next 85.8", utils.is_best,
          [(name, "reported", "test") for name in RATES]),
    Claim("3b", "above 0.3 the accuracy falls: 0.3 is better than 0.7", "85.9 → 66.0",
          utils.is_better, [(name, "reported", "test") for name in ("dropout 0.3", "dropout 0.7")]),
    Claim("3b", "at 0.9 the network is at chance", "validation 10.3", utils.is_at_chance,
          [("dropout 0.9", "reported", "test")], {"classes": 10, "margin": 2}),
    # questions that the report leaves open
    Claim("3a", "open: scaling does better on scaled validation images", "76.7, on which?",
          utils.is_better, [("scaling", "augmented", "val"), ("scaling", "reported", "val")]),
    Claim("3b", "open: at 0.8, batch norm's statistics estimated anew help", "42.3",
          utils.is_better, [("dropout 0.8", "recalibrated", "val"),
                            ("dropout 0.8", "reported", "val")]),
]

# =========================================== figures ===========================================


def draw(question, results, runs, data):
    """Draw the figures of a question (or one experiment: "none") and print its table.

    results: {name: the records of its seeds}; runs: {name: its flags}; data: for the picture of the
    techniques, or None.
    """
    flags, first = next(iter(runs.values())), next(iter(results.values()))
    folder, show = utils.results_folder(flags), flags.show
    if question == "none":
        part = checkpoint_name(flags)
        utils.plot_filters(first[0], folder / f"{part}_filters.png", show)
        utils.plot_learning_curves(first, describe(flags), folder / f"{part}_learning_curves.png",
                                   show)
        utils.plot_classes(first[0], folder / f"{part}_classes.png", show)
    elif question == "1":
        utils.plot_filters(first[0], folder / "figure_1_2_filters.png", show)
    elif question == "2a":
        for name, number in ("without batch norm", 3), ("with batch norm", 4):
            if name in results:
                utils.plot_learning_curves(results[name], f"ConvNet {name}",
                                           folder / f"figure_{number}.png", show)
        if len(results) == 2:
            utils.plot_class_differences(*reversed(results.values()), "With batch norm against "
                                         "without", folder / "question_2a_classes.png", show)
    elif question == "2b":
        plot_early_stopping(results, folder / "figure_5.png", show)
    elif question == "3a":
        plot_techniques(results, folder / "figure_6.png", show)
        if data:
            plot_augmented_images(data, folder / "figure_6_techniques.png", show)
    elif question == "3b":
        plot_dropout(results, folder / "figure_7.png", show)
    if question in QUESTIONS and QUESTIONS[question].columns:
        print("\n" + "\n".join(utils.table_lines(QUESTIONS[question], results)))


def plot_early_stopping(results, path, show=False):
    """Figure 5: accuracy curves with the best epoch and the stop marked."""
    figure = plt.figure(figsize=(10, 3.8), layout="constrained")
    axes = panels(figure, len(results), columns=min(2, len(results)))
    for axis, (name, records) in zip(axes, results.items()):
        utils.draw_curves(axis, records, "accuracy")
        utils.mark_epochs(axis, [len(record["history"]["val_accuracy"]) for record in records],
                          "stop", color="black", linewidth=1)
        axis.set_title(name)
        axis.legend(loc="lower right", framealpha=1)
    utils.set_title(figure, "ConvNet with early stopping\n"
                    + utils.caption(sum(results.values(), [])))
    utils.save_figure(figure, path, show)


def panels(figure, count, columns=3):
    """This number of axes of one scale, in rows."""
    axes = figure.subplots(-(-count // columns) or 1, columns, sharex=True, sharey=True,
                           squeeze=False).flat
    for axis in axes[count:]:
        axis.remove()
    return axes[:count]


def plot_techniques(results, path, show=False):
    """Figure 6: the learning curves of each technique, with its validation accuracy of Table 3."""
    figure = plt.figure(figsize=(10, 8), layout="constrained")
    handles = {}
    for axis, (name, records) in zip(panels(figure, len(results)), results.items()):
        utils.draw_curves(axis, records, "accuracy", ("train", "val", "augmented"))
        handles |= {label: line for line, label in zip(*axis.get_legend_handles_labels())}
        accuracy = utils.table_cell(records, "val_accuracy", None)
        axis.set_title(f"{name}: {accuracy} %", fontsize=10)
        axis.label_outer()
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=3)
    utils.set_title(figure, "The augmentation techniques, and their accuracy on plain validation "
                    f"images as in Table 3\n{utils.caption(sum(results.values(), []))}")
    utils.save_figure(figure, path, show)


def plot_augmented_images(data, path, show=False, count=10):
    """What each technique does: the same few training images, each with its own draw."""
    generator = torch.Generator().manual_seed(0)
    images = data.images[data.train[:count]].float() / 255
    names = [changes["augmentation"] for _, changes, *_ in QUESTIONS["3a"].rows]
    figure, axes = plt.subplots(len(names), 1, figsize=(count * 0.8, 7.6), layout="constrained")
    for axis, name in zip(axes, names):
        augment = utils.make_augment(name, generator)
        shown = augment(images) if augment else images
        axis.imshow(np.hstack(shown.clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()))
        axis.set_ylabel(name if augment else "original", rotation=0, ha="right", va="center",
                        fontsize=14)  # to be read in a small picture, too
        axis.set(xticks=[], yticks=[])
    utils.set_title(figure, f"The augmentation techniques on {data.name}")
    utils.save_figure(figure, path, show)


def plot_dropout(results, path, show=False):
    """Figure 7: train and validation accuracy over the dropout, and the learning curves.

    Beside the report's two curves the validation accuracy with recalibrated batch norm, and the
    validation accuracy without batch norm.
    """
    figure = plt.figure(figsize=(12, 5.4), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.3))
    axis = left.subplots()
    with_norm, without = ({name: records for name, records in results.items()
                           if records[0]["recipe"]["flags"]["norm_flag"] == norm}
                          for norm in (True, False))
    for runs, key, style in (
            (with_norm, "train_accuracy", utils.TRAIN),
            (with_norm, "val_accuracy", utils.VALIDATION),
            (with_norm, "val_accuracy_recalibrated", {**utils.AUGMENTED, "label": (
                "validation, batch norm recalibrated")}),
            (without, "val_accuracy", {**utils.VALIDATION, "color": "grey", "marker": "d",
                              "linestyle": "none",  # not of all rates
                              "label": "validation, no batch norm"})):
        plot_over_dropout(axis, runs.values(), key, style)
    rates = sorted({changes["dropout"] for _, changes, *_ in QUESTIONS["3b"].rows})
    axis.set(xlabel="dropout", ylabel="accuracy (%)", ylim=utils.PERCENT, xticks=rates)
    axis.grid(alpha=0.3)
    axis.legend()
    with_norm.pop("no dropout", None)  # Figure 6 shows its learning curves
    for panel, (name, records) in zip(panels(right, len(with_norm)), with_norm.items()):
        utils.draw_curves(panel, records, "accuracy")
        panel.set_title(name, fontsize=10)
        panel.label_outer()
    left.suptitle("Accuracy of the last epoch; bars: standard deviation of the seeds,\n"
                  "with one seed the 95 % interval of the validation images", fontsize=9)
    utils.set_title(figure, f"Dropout\n{utils.caption(sum(results.values(), []))}")
    utils.save_figure(figure, path, show)


def plot_over_dropout(axis, runs, key, style):
    """One curve of Figure 7: a column of Table 4 with its error bars (see utils.summarize).

    runs: the records of each run's seeds.
    """
    points = [(records[0]["recipe"]["flags"]["dropout"], *numbers) for records in runs
              if (numbers := utils.summarize(records, key))]
    if points:
        rates, means, lows, highs = np.transpose(points)
        axis.errorbar(rates, means, abs(np.array([lows, highs]) - means), capsize=3, **style)


# ============================================= main =============================================


def main(argv=None):
    """Run what the flags describe, an experiment or a question (argv: None: the command line's).

    Returns {question: {name: the records of its seeds}}, "none" being the single experiment.
    Raises utils.Problem if a run failed, after all others.
    """
    flags = utils.parse_flags(globals(), argv)
    plan = utils.plan(flags, QUESTIONS)
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
