"""HLCV Exercise 3, Questions 1 to 3: a convolutional network on CIFAR-10.

Edit the flags below, or give them on the command line:

    python ex3_convnet.py --norm_flag --dropout=0.3 --num_epochs=5
"""

import copy
from functools import partial

import utils  # before PyTorch, which takes seconds: it answers --help at once

# isort: split
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn

# --- experiment -------------------------------------------------------------------------------
norm_flag: bool = False  # batch normalization after each convolution (Question 2a)
earlystop: bool = False  # stop when validation stops improving; keep the best model (2b)
patience: int = 10  # early stopping waits for so many epochs without a new best
monitor: str = "accuracy"  # what early stopping watches in validation: accuracy or loss
dropout: float = 0.0  # probability of dropping a unit after each block; 0: off (3b)
augmentation: str = "none"  # one of AUGMENTATIONS in utils.py, or several: a+b (3a)

# --- training recipe --------------------------------------------------------------------------
num_epochs: int = 20  # passes over the training images; the report takes 50 with early stopping
batch_size: int = 200  # images in each step
learning_rate: float = 2e-3  # of Adam
learning_rate_decay: float = 0.95  # the learning rate is multiplied by this after each epoch
reg: float = 1e-3  # weight decay (L2 penalty)
num_training: int | None = None  # the first so many images train; None: all that do not validate
num_validation: int | None = None  # the last so many validate; None: a tenth, at most 1,000
seed: int = 0  # of everything random: initial weights, order, augmentation, dropout

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
question: str = "none"  # run all of a question of the report: 1, 2a, 2b, 3a, 3b, or all
seeds: str = "1"  # repeat each run with so many seeds: seed, seed + 1, ...; or a list: 0,5,7
rerun: bool = False  # in a question, run again what is recorded already
redraw: bool = False  # only draw the figures and tables again, from the records
show: bool = False  # open a window for each figure, after saving it
predict: list = []  # images or folders: classify them with the trained model, without training

TECHNIQUES = ("vertical_flip", "horizontal_flip", "rotation", "resize_crop", "translation",
              "color_jitter", "greyscale", "scaling")
RATES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
RATES_WITHOUT_NORM = (0.5, 0.7, 0.9)  # to see what of the collapse is batch norm's part

QUESTIONS = {  # question: its runs, each with the flags that it sets
    "1": {"without batch norm": {"norm_flag": False}},
    "2a": {"without batch norm": {"norm_flag": False}, "with batch norm": {"norm_flag": True}},
    "2b": {"without batch norm": {"norm_flag": False, "earlystop": True, "num_epochs": 50},
           "with batch norm": {"norm_flag": True, "earlystop": True, "num_epochs": 50}},
    "3a": {"no augmentation": {"norm_flag": True, "augmentation": "none"},
           **{name: {"norm_flag": True, "augmentation": name} for name in TECHNIQUES}},
    "3b": {"no dropout": {"norm_flag": True, "dropout": 0.0},
           **{f"dropout {rate}": {"norm_flag": True, "dropout": rate} for rate in RATES},
           **{f"dropout {rate}, no batch norm": {"norm_flag": False, "dropout": rate}
              for rate in RATES_WITHOUT_NORM}},
}

CLEAN, AUGMENTED = "Validation accuracy", "Augmented validation accuracy"
RECALIBRATED = "Validation accuracy, recalibrated"
REPORT = {  # question: run: what the report's table states, accuracies in %
    "2a": {"without batch norm": {"Train accuracy": 92.7, "Validation accuracy": 80.1,
                                  "Model size": 7_678_474, "Test accuracy": 79.9,
                                  "Test accuracy, first 1,000": 79.9},
           "with batch norm": {"Train accuracy": 98.1, "Validation accuracy": 82.9,
                               "Model size": 7_682_826, "Test accuracy": 81.9,
                               "Test accuracy, first 1,000": 81.9}},
    "2b": {"without batch norm": {"Early stop checkpoint": 23,
                                  "Best model validation accuracy": 81.5,
                                  "Latest model validation accuracy": 79.6,
                                  "Best model train accuracy": 97.0,
                                  "Latest model train accuracy": 99.6},
           "with batch norm": {"Early stop checkpoint": 20,
                               "Best model validation accuracy": 84.9,
                               "Latest model validation accuracy": 81.8,
                               "Best model train accuracy": 98.2,
                               "Latest model train accuracy": 99.0}},
    "3a": {"no augmentation": {CLEAN: None, AUGMENTED: None},
           **{name: {CLEAN: number, AUGMENTED: number} for name, number in zip(
               TECHNIQUES, (79.3, 84.9, 75.9, 78.9, 77.1, 78.8, 80.0, 76.7))}},
    "3b": {"no dropout": {"Train accuracy": None, CLEAN: None, RECALIBRATED: None},
           **{f"dropout {rate}": {"Train accuracy": train, CLEAN: val, RECALIBRATED: None}
              for rate, train, val in zip(
                  RATES, (93.1, 89.4, 85.7, 82.3, 79.1, 74.9, 69.1, 58.7, 37.0),
                  (83.8, 85.8, 85.9, 82.1, 82.1, 74.5, 66.0, 42.3, 10.3))},
           **{f"dropout {rate}, no batch norm": {"Train accuracy": None, CLEAN: None}
              for rate in RATES_WITHOUT_NORM}},
}

MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)  # normalization: pixels 0..1 become -1..1
CHANNELS = (128, 512, 512, 512, 512)


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


def describe(flags):
    """The network and what is special about it, as titles and file names give it."""
    return ", ".join(["ConvNet"] + ["batch norm"] * flags.norm_flag
                     + [f"dropout {flags.dropout:g}"] * (flags.dropout > 0)
                     + [flags.augmentation] * (flags.augmentation != "none")
                     + ["early stopping"] * flags.earlystop)


@torch.no_grad()
def recalibrate(model, data, dtype, batch_size=500):
    """A copy of the model whose batch norm statistics are those of the training images anew.

    They are estimated with dropout off, as the network runs when it is tested. In training dropout
    changes the variance that each batch norm sees and remembers: Li et al., "Understanding the
    Disharmony between Dropout and Batch Normalization by Variance Shift", CVPR 2019. Without
    dropout it shows how far the moving statistics lag behind the weights.
    """
    model = copy.deepcopy(model).eval()
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):  # SyncBatchNorm, too
            layer.reset_running_stats()
            layer.momentum = None  # the mean over all batches, not a moving one
            layer.train()
    for indices in data.train.split(batch_size):
        images, _ = data.batch(indices)
        with utils.autocast(images.device, dtype):
            model(images)
    return model


def first_filters(model):
    """The weights of the first convolution, a list (128, 3, 3, 3), for the record."""
    return model.layers[0].weight.detach().cpu().double().numpy().round(4).tolist()


def plot_filters(record, path, show=False):
    """Figures 1 and 2: the first convolution's filters before and after training, 8 x 16 each.

    A filter's weights for red, green and blue are its colour, grey is 0; both in one scale.
    """
    before, after = (np.array(record["filters"][when]) for when in ("before", "after"))
    most = np.quantile(np.abs([before, after]), 0.99)
    figure, axes = plt.subplots(1, 2, figsize=(12, 3.8), layout="constrained")
    for axis, filters, when in zip(axes, (before, after), (
            "before training", f"after training (epoch {record['result']['epoch']})")):
        pixels = (0.5 + filters / (2 * most)).clip(0, 1).transpose(0, 2, 3, 1)
        tiles = pixels.repeat(6, axis=1).repeat(6, axis=2)  # 18 x 18, with a margin of 2: 20 x 20
        tiles = np.pad(tiles, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=1)
        axis.imshow(tiles.reshape(8, 16, 20, 20, 3).swapaxes(1, 2).reshape(160, 320, 3))
        axis.set_title(f"{when}: standard deviation {filters.std():.3f}", fontsize=11)
        axis.axis("off")
    figure.suptitle(f"{record['title']}: the 128 filters of the first convolution (grey 0, full "
                    f"colour ±{most:.2f})\n{utils.caption([record])}", fontsize=11)
    utils.save_figure(figure, path, show)


def experiment_name(flags):
    """The experiment, as file names give it."""
    return utils.slug(describe(flags)) + f"_seed{flags.seed}" * (flags.seed > 0)


def build(flags, num_classes, image_size):
    """The network of the flags, with initial weights."""
    return ConvNet(flags.norm_flag, flags.dropout, num_classes, image_size)


def train(flags, data, dtype):
    """One experiment: a new network, trained and tested. Returns the record."""
    torch.manual_seed(flags.seed)
    model = build(flags, len(data.classes), flags.image_size)
    utils.print_summary(model, flags.image_size, table=flags.question in ("none", "1"))
    before = first_filters(model)
    record = utils.run_experiment(
        describe(flags), experiment_name(flags), model, data, flags, dtype)
    if flags.norm_flag:
        _, accuracy = utils.evaluate(recalibrate(model, data, dtype), data, data.val, dtype)
        record["result"]["val_accuracy_recalibrated"] = accuracy
        print(f"With batch norm statistics estimated anew: validation {accuracy:.1%}")
    return {**record, "filters": {"before": before, "after": first_filters(model)}}


def draw(question, records, flags, data):
    """The figures and tables of a question (or of one experiment: "none") from its records.

    records: {run: the records of its seeds}; data: for the picture of the techniques, or None.
    """
    folder, first = utils.results_folder(flags), next(iter(records.values()))
    if question == "none":
        name = experiment_name(flags)
        plot_filters(first[0], folder / f"{name}_filters.png", flags.show)
        utils.plot_learning_curves(first, describe(flags), folder / f"{name}_learning_curves.png",
                                   flags.show)
    elif question == "1":
        plot_filters(first[0], folder / "figure_1_2_filters.png", flags.show)
    elif question == "2a":
        for number, (run, runs) in enumerate(records.items(), start=3):
            utils.plot_learning_curves(runs, f"ConvNet {run}", folder / f"figure_{number}.png",
                                       flags.show)
        utils.write_table("Table 1", records, REPORT["2a"], folder / "table_1.md")
    elif question == "2b":
        plot_early_stopping(records, folder / "figure_5.png", flags.show)
        utils.write_table(f"Table 2 (patience {flags.patience})", records, REPORT["2b"],
                          folder / "table_2.md")
    elif question == "3a":
        plot_techniques(records, folder / "figure_6.png", flags.show)
        if data:
            plot_augmented_images(data, folder / "figure_6_techniques.png", flags.show)
        utils.write_table("Table 3", records, REPORT["3a"], folder / "table_3.md")
    elif question == "3b":
        plot_dropout(records, folder / "figure_7.png", flags.show)
        utils.write_table("Table 4", records, REPORT["3b"], folder / "table_4.md")


def plot_early_stopping(records, path, show=False):
    """Figure 5: accuracy curves with the best epoch and the stop marked."""
    figure = plt.figure(figsize=(10, 3.8), layout="constrained")
    for axis, (run, runs) in zip(panels(figure, len(records), columns=2), records.items()):
        utils.draw_curves(axis, runs, "accuracy")
        stops = [len(record["history"]["val_accuracy"]) for record in runs]
        for i, stop in enumerate(sorted(set(stops))):
            axis.axvline(stop, color="black", linewidth=1,
                         label=None if i else f"stop: epoch {', '.join(map(str, stops))}")
        axis.set_title(run)
        axis.legend(loc="lower right")
    figure.suptitle(f"ConvNet with early stopping ({utils.caption(sum(records.values(), []))})")
    utils.save_figure(figure, path, show)


def panels(figure, count, columns=3):
    """So many axes of one scale, in rows of so many columns."""
    axes = figure.subplots(-(-count // columns) or 1, columns, sharex=True, sharey=True,
                           squeeze=False).flat
    for axis in axes[count:]:
        axis.remove()
    return axes[:count]


def plot_techniques(records, path, show=False):
    """Figure 6: the learning curves of each augmentation technique, with its best accuracy."""
    figure = plt.figure(figsize=(10, 8), layout="constrained")
    handles = {}
    for axis, (run, runs) in zip(panels(figure, len(records)), records.items()):
        utils.draw_curves(axis, runs, "accuracy", ("train", "val", "augmented"))
        handles |= {label: line for line, label in zip(*axis.get_legend_handles_labels())}
        best = 100 * np.mean([max(record["history"]["val_accuracy"]) for record in runs])
        error = utils.standard_error(best, runs[0]["images"]["val"])
        axis.set_title(f"{run}: best {best:.1f} ± {error:.1f} %", fontsize=10)
        axis.label_outer()
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=3)
    figure.suptitle("Accuracy with each augmentation technique (best clean validation accuracy ± "
                    f"its standard error)\n{utils.caption(sum(records.values(), []))}", fontsize=11)
    utils.save_figure(figure, path, show)


def plot_augmented_images(data, path, show=False, count=10):
    """What each technique does: the same few training images, each with its own draw."""
    generator = torch.Generator().manual_seed(0)
    images = data.images[data.train[:count]].float() / 255
    figure, axes = plt.subplots(1 + len(TECHNIQUES), 1, figsize=(count * 0.8, 7.6),
                                layout="constrained")
    for axis, name in zip(axes, ("original", *TECHNIQUES)):
        shown = images if name == "original" else utils.AUGMENTATIONS[name](images, generator)
        axis.imshow(np.hstack(shown.clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()))
        axis.set_ylabel(name, rotation=0, ha="right", va="center")
        axis.set(xticks=[], yticks=[])
    figure.suptitle(f"The augmentation techniques on {data.name}")
    utils.save_figure(figure, path, show)


def plot_dropout(records, path, show=False):
    """Figure 7: train and validation accuracy over the dropout, and the learning curves.

    Beside the report's two curves the validation accuracy with recalibrated batch norm, and the
    validation accuracy without batch norm.
    """
    figure = plt.figure(figsize=(12, 5.4), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.3))
    axis = left.subplots()
    with_norm, without = ({run: runs for run, runs in records.items()
                           if runs[0]["flags"]["norm_flag"] == norm} for norm in (True, False))
    for runs, column, style in (
            (with_norm, "Train accuracy", utils.TRAIN),
            (with_norm, CLEAN, utils.VALIDATION),
            (with_norm, RECALIBRATED, {**utils.AUGMENTED, "label": (
                "validation, batch norm recalibrated")}),
            (without, CLEAN, {**utils.VALIDATION, "color": "grey", "marker": "d",
                              "label": "validation, no batch norm"})):
        plot_over_dropout(axis, list(runs.values()), column, style)
    axis.set(xlabel="dropout", ylabel="accuracy (%)", ylim=(0, 100), xticks=(0, *RATES))
    axis.grid(alpha=0.3)
    axis.legend()
    with_norm.pop("no dropout", None)  # Figure 6 shows its learning curves
    for panel, (run, runs) in zip(panels(right, len(with_norm)), with_norm.items()):
        utils.draw_curves(panel, runs, "accuracy")
        panel.set_title(run, fontsize=10)
        panel.label_outer()
    left.suptitle("Accuracy of the last epoch; bars: standard deviation of the seeds,\n"
                  "with one seed the standard error of the validation images", fontsize=9)
    figure.suptitle(f"Dropout ({utils.caption(sum(records.values(), []))})")
    utils.save_figure(figure, path, show)


def plot_over_dropout(axis, runs, column, style):
    """One curve of Figure 7: a column of Table 4, its mean and deviation over the seeds."""
    values = [[utils.QUANTITIES[column](record) for record in seeds] for seeds in runs]
    if not values:
        return
    means = np.array([np.mean(v) for v in values])
    errors = [np.std(v, ddof=1) if len(v) > 1 else 0 for v in values]
    if max(map(len, values)) == 1 and column != "Train accuracy":
        errors = utils.standard_error(means, runs[0][0]["images"]["val"])
    axis.errorbar([seeds[0]["flags"]["dropout"] for seeds in runs], means, errors, capsize=3,
                  **style)


def main(argv=None):
    """Run what the flags describe, an experiment or a question (argv: None: the command line's).

    Returns {question: {run: the records of its seeds}}, "none" being the single experiment.
    """
    flags = utils.parse_flags(globals(), argv)
    plan = utils.plan(flags, QUESTIONS)
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
