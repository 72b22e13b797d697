"""The speed of our training loop beside the plain loop of the exercise: python tests/benchmark.py

With --precision=float32 ours is the loop of a CPU without bfloat16. Both train the same network on
the same images in one process, in turns; each number is the median of the rounds. It takes minutes
on two CPU cores, needs no data, and is not a test.
"""

import ctypes
import statistics
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ex3_convnet  # noqa: E402
import ex3_pretrained  # noqa: E402
import utils  # noqa: E402

ROUNDS, BATCH = 3, 200
PLAIN = {  # technique: torchvision's transform of a PIL image, with the same parameters as ours
    "none": [], "vertical_flip": [transforms.RandomVerticalFlip()],
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

def seconds(function, device):
    """How long a call takes, with what it leaves to a GPU."""
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start

def return_freed_memory():
    """Undo utils.keep_freed_memory, which would make the plain loop faster, too."""
    with suppress(OSError, AttributeError):  # another system
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, the most that glibc raises it to by itself
        mallopt(-1, 2**26)  # M_TRIM_THRESHOLD

def our_loop(network, data, augmentation, device, dtype, settings):
    """A function that trains one epoch with our loop."""
    model = network().to(device)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3, weight_decay=1e-3, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    utils.prepare_model(model, settings, dtype)
    augment = utils.make_augment(augmentation, torch.Generator())

    def epoch():
        batches = data.batches(data.train, BATCH, torch.Generator(), augment)
        utils.train_one_epoch(model, batches, optimizer, scaler, dtype)

    return epoch

def plain_loop(network, data, augmentation, device):
    """A function that trains one epoch with the plain loop: PIL images that are transformed one by
    one in a DataLoader in the main process, float32, the loss read in each step."""
    model = network().to(device)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3, weight_decay=1e-3)
    mean, std = (value.flatten().tolist() for value in (data.mean, data.std))
    transform = transforms.Compose(
        [*PLAIN[augmentation], transforms.ToTensor(), transforms.Normalize(mean, std)])
    pixels = data.images[data.train].permute(0, 2, 3, 1).cpu().numpy()
    pictures = [*zip(map(Image.fromarray, pixels), data.labels[data.train].tolist())]

    def collate(pairs):
        return torch.stack([transform(image) for image, _ in pairs]), torch.tensor(
            [label for _, label in pairs])

    def epoch():
        total = 0
        for images, labels in DataLoader(pictures, BATCH, shuffle=True, collate_fn=collate):
            images, labels = images.to(device), labels.to(device)
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()

    return epoch

def measure(name, data, device, dtype, settings):
    """Print one line of the table in Markdown."""
    network, augmentation = ROWS[name.split(", --")[0]]
    ours = our_loop(network, data, augmentation, device, dtype, settings)
    plain = plain_loop(network, data, augmentation, device)
    times = []
    for _ in range(1 + ROUNDS):
        utils.keep_freed_memory()
        torch.backends.cudnn.allow_tf32 = False
        mine = seconds(ours, device)
        return_freed_memory()
        torch.backends.cudnn.allow_tf32 = True  # as it is by default
        times.append((mine, seconds(plain, device)))
    mine, plainly = map(statistics.median, zip(*times[1:]))  # the first is a warm-up
    print(f"| {name} | {len(data.train) / mine:,.0f} | {len(data.train) / plainly:,.0f} "
          f"| {plainly / mine:.2f}x |", flush=True)

def main():
    settings = utils.parse_settings(vars(ex3_convnet), ["--dataset=synthetic", *sys.argv[1:]])
    device = utils.choose_device(settings)
    dtype = utils.choose_dtype(device, settings.precision)
    data = utils.load_data(settings, ex3_convnet.MEAN, ex3_convnet.STD, device)
    data.train = data.train[:20 * BATCH if device.type == "cuda" else 2 * BATCH]
    print(f"{utils.describe_device(device)}, PyTorch {torch.__version__}; ours in {dtype}, the "
          f"plain loop in float32; median of {ROUNDS} rounds of {len(data.train):,} images\n\n"
          "| network | ours, images/s | plain, images/s | ratio |\n|---|---|---|---|")
    for name, (_, augmentation) in ROWS.items():
        measure(name, data, device, dtype, settings)
        if device.type == "cuda" and augmentation == "none":
            for extra in ("compile", "deterministic"):
                changed = settings.replace(**{extra: True})
                utils.choose_device(changed)
                measure(f"{name}, --{extra}", data, device, dtype, changed)
            utils.choose_device(settings)

if __name__ == "__main__":
    main()
