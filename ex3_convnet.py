"""HLCV Exercise 3, Questions 1 to 3: a convolutional network on CIFAR-10.

Edit the flags below, or give them on the command line:

    python ex3_convnet.py --norm_flag --dropout=0.3 --num_epochs=5
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn

import utils

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
show: bool = False  # open a window for each figure, after saving it
predict: list = []  # images or folders: classify them with the trained model, without training

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
            layers += [nn.MaxPool2d(kernel_size=2), nn.ReLU()]
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


def first_filters(model):
    """The weights of the first convolution, a list (128, 3, 3, 3), for the record."""
    return model.layers[0].weight.detach().cpu().double().numpy().round(4).tolist()


def plot_filters(record, path, show=False):
    """Figures 1 and 2: the first convolution's filters before and after training, 8 x 16 each.

    A filter's weights for red, green and blue are its colour, grey is 0; both in one scale.
    """
    before, after = (np.array(record["filters"][when]) for when in ("before", "after"))
    most = np.quantile(np.abs([before, after]), 0.99)
    figure, axes = plt.subplots(1, 2, figsize=(12, 3.6), layout="constrained")
    for axis, filters, when in zip(axes, (before, after), (
            "before training", f"after training (epoch {record['result']['epoch']})")):
        pixels = (0.5 + filters / (2 * most)).clip(0, 1).transpose(0, 2, 3, 1)
        tiles = pixels.repeat(6, axis=1).repeat(6, axis=2)  # 18 x 18, with a margin of 2: 20 x 20
        tiles = np.pad(tiles, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=1)
        axis.imshow(tiles.reshape(8, 16, 20, 20, 3).swapaxes(1, 2).reshape(160, 320, 3))
        axis.set_title(f"{when}: standard deviation {filters.std():.3f}", fontsize=11)
        axis.axis("off")
    figure.suptitle(f"{record['title']} on {record['data']}: the 128 filters of the first "
                    f"convolution (grey: 0, full colour: ±{most:.2f}, seed {record['seed']})")
    utils.save_figure(figure, path, show)


def experiment_name(flags):
    """The experiment, as file names give it."""
    return utils.slug(describe(flags)) + f"_seed{flags.seed}" * (flags.seed > 0)


def build(flags, num_classes, image_size):
    """The network of the flags, with initial weights."""
    return ConvNet(flags.norm_flag, flags.dropout, num_classes, image_size)


def run(flags, data, dtype):
    """One experiment: a new network, trained, tested, recorded and drawn. Returns the record."""
    torch.manual_seed(flags.seed)
    model = build(flags, len(data.classes), flags.image_size)
    utils.print_summary(model, flags.image_size)
    before = first_filters(model)
    name = experiment_name(flags)
    record = utils.run_experiment(describe(flags), name, model, data, flags, dtype)
    record["filters"] = {"before": before, "after": first_filters(model)}
    utils.save_record(record)
    folder = utils.results_folder(record)
    utils.plot_learning_curves(record, folder / f"{name}_learning_curves.png", flags.show)
    plot_filters(record, folder / f"{name}_filters.png", flags.show)
    return record


def main(argv=None):
    """Run the experiment that the flags describe (argv: the command line; None: the real one)."""
    flags = utils.parse_flags(globals(), argv)
    device, dtype = utils.choose_device(flags.device, flags.precision)
    if flags.predict:
        return utils.predict(flags, experiment_name(flags), build, device, dtype)
    data = utils.load_data(flags.dataset, flags.image_size, flags.num_training,
                           flags.num_validation, MEAN, STD, device)
    return run(flags, data, dtype)


if __name__ == "__main__":
    utils.run_script(main)
