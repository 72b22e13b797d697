"""The speed of our training loop beside the plain loop of the exercise, on this machine.

    python tests/benchmark.py

Both train the same network on the same images in one process, in turns; each number is the median
of the rounds. It takes minutes on two CPU cores, needs no data, and is not a test.
"""

import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ex3_convnet  # noqa: E402
import ex3_pretrained  # noqa: E402
import utils  # noqa: E402

ROUNDS = 3
BATCH = 200

PLAIN = {  # technique: torchvision's transform of a PIL image, with the same parameters as ours
    "none": [],
    "vertical_flip": [transforms.RandomVerticalFlip()],
    "horizontal_flip": [transforms.RandomHorizontalFlip()],
    "rotation": [transforms.RandomRotation(45)],
    "resize_crop": [transforms.Resize(40), transforms.RandomCrop(32)],
    "translation": [transforms.RandomAffine(0, translate=(0.5, 0.5))],
    "color_jitter": [transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)],
    "greyscale": [transforms.RandomGrayscale(0.2)],
    "scaling": [transforms.RandomAffine(0, scale=(0.7, 0.7))],
}

ROWS = {  # row: network, augmentation
    "convnet": (ex3_convnet.ConvNet, "none"),
    "convnet, batch norm": (lambda: ex3_convnet.ConvNet(norm_flag=True), "none"),
    **{f"convnet, batch norm, {name}": (lambda: ex3_convnet.ConvNet(norm_flag=True), name)
       for name in PLAIN if name != "none"},
    "VGG11-BN, horizontal_flip": (ex3_pretrained.VGG, "horizontal_flip"),
}


class Pictures(Dataset):
    """Images as the exercise has them: PIL images, transformed one by one."""

    def __init__(self, data, augmentation):
        pixels = data.images[data.train].permute(0, 2, 3, 1).cpu().numpy()
        self.images = [Image.fromarray(image) for image in pixels]
        self.labels = data.labels[data.train].tolist()
        mean, std = (value.flatten().tolist() for value in (data.mean, data.std))
        self.transform = transforms.Compose(
            [*PLAIN[augmentation], transforms.ToTensor(), transforms.Normalize(mean, std)])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.transform(self.images[i]), self.labels[i]


def plain_epoch(model, loader, optimizer, device):
    """The plain loop: a DataLoader in the main process, float32, the loss read in each step."""
    model.train()
    total = 0
    for images, labels in loader:
        images, labels = images.to(device), labels.to(device)
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()
    return total / len(loader)


def seconds(function, device):
    """How long a call takes, with what it leaves to the GPU."""
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def matrix_rate(device, dtype):
    """The rate (GFLOP/s) at which the machine multiplies two large square matrices."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2e-9 * n**3 / min(seconds(lambda: a @ b, device) for _ in range(4))


def flop_per_image(network, image):
    """The floating-point operations of a training step on this batch of one image."""
    with FlopCounterMode(display=False) as counter:
        network().to(image.device).eval()(image).sum().backward()
    return counter.get_total_flops()


def our_loop(network, data, augmentation, device, dtype, compiled=False):
    """A function that trains one epoch with our loop, and one that only augments its batches."""
    model = network()
    utils.place(model, device, compiled=compiled)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3, weight_decay=1e-3, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    augment = utils.make_augment(augmentation, torch.Generator())
    bar = utils.progress_bar()

    def epoch():
        batches = utils.shuffled_batches(data.train, BATCH, torch.Generator())
        utils.train_one_epoch(model, data, batches, augment, optimizer, scaler, dtype, bar)

    def only_batches(augment=augment):
        for indices in data.train.split(BATCH):
            data.batch(indices, augment)

    return epoch, only_batches


def plain_loop(network, data, augmentation, device):
    """A function that trains one epoch with the plain loop."""
    torch.backends.cudnn.allow_tf32 = True  # as it is by default
    model = network().to(device)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3, weight_decay=1e-3)
    loader = DataLoader(Pictures(data, augmentation), BATCH, shuffle=True)
    return lambda: plain_epoch(model, loader, optimizer, device)


def measure(network, augmentation, data, device, dtype, compiled=False):
    """One row: seconds an epoch of ours, of the plain loop and of our augmentation; GFLOP/s."""
    ours, augmented = our_loop(network, data, augmentation, device, dtype, compiled)
    plain = plain_loop(network, data, augmentation, device)
    times = {"ours": [], "plain": [], "augmentation": [], "matrix": []}
    for _ in range(1 + ROUNDS):
        utils.tune_malloc()
        times["ours"].append(seconds(ours, device))
        utils.tune_malloc(False)  # it would make the plain loop faster, too
        times["plain"].append(seconds(plain, device))
        times["augmentation"].append(
            seconds(augmented, device) - seconds(lambda: augmented(None), device))
        times["matrix"].append(max(matrix_rate(device, d) for d in utils.native_dtypes(device)))
    return {name: statistics.median(values[1:]) for name, values in times.items()}  # 0: warm-up


def print_row(name, times, count, flop):
    """One line of the table in Markdown."""
    rate = 1e-9 * flop * count / times["ours"]
    print(f"| {name} | {count / times['ours']:,.0f} | {count / times['plain']:,.0f} "
          f"| {times['plain'] / times['ours']:.2f}x | {rate:,.0f} | {rate / times['matrix']:.0%} "
          f"| {max(0, times['augmentation']) / times['ours']:.1%} |", flush=True)


def main():
    device, dtype = utils.choose_device("auto", "auto")
    data = utils.load_data("synthetic", 32, None, None, ex3_convnet.MEAN, ex3_convnet.STD, device)
    data.train = data.train[:20 * BATCH if device.type == "cuda" else 2 * BATCH]
    rates = ", ".join(f"{utils.dtype_name(d)} {matrix_rate(device, d):,.0f}"
                      for d in utils.native_dtypes(device))
    print(f"{utils.describe_device(device)}, PyTorch {torch.__version__}; ours in {dtype}, "
          f"the plain loop in float32; matrix rate: {rates} GFLOP/s; median of {ROUNDS} rounds of "
          f"{len(data.train):,} images\n")
    print("| network | ours, images/s | plain, images/s | ratio | ours, GFLOP/s "
          "| of the best matrix rate | augmentation, of a step |\n" + "|---" * 7 + "|")
    for name, (network, augmentation) in ROWS.items():
        flop = flop_per_image(network, data.batch(data.train[:1])[0])
        times = measure(network, augmentation, data, device, dtype)
        print_row(name, times, len(data.train), flop)
        if device.type == "cuda" and augmentation == "none":
            times = measure(network, augmentation, data, device, dtype, compiled=True)
            print_row(f"{name}, compiled", times, len(data.train), flop)
            utils.choose_device("auto", "auto", deterministic=True)
            times = measure(network, augmentation, data, device, dtype)
            print_row(f"{name}, deterministic", times, len(data.train), flop)
            utils.choose_device("auto", "auto")
    print(f"\nPeak memory: {utils.peak_memory(device):,} MB")


if __name__ == "__main__":
    main()
