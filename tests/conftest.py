"""What several tests use: data, small networks, and copies of the project."""

import contextlib
import copy
import hashlib
import importlib.util
import io
import itertools
import json
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.models.vgg import cfgs, make_layers

import ex3_convnet
import ex3_pretrained
import utils

matplotlib.use("Agg")
ROOT = Path(__file__).resolve().parent.parent
HALF = (0.5, 0.5, 0.5)
TINY = ["--dataset=synthetic", "--num_training=60", "--num_validation=20", "--num_epochs=1",
        "--batch_size=20"]  # a run of a moment


def parse(*argv, script=ex3_convnet):
    """The flags of a script for this command line."""
    return utils.parse_flags(vars(script), argv)


def records_in(folder):
    """The records in all the results of a project's folder, from their files."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("figures/*/records/*"))]


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Two threads are slower in so small networks, and far slower on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def on_the_cpu(request, monkeypatch):
    """All tests but those of the GPU are on the CPU, where there is a GPU, too."""
    if request.module.__name__ != "test_gpu":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # for other processes


@pytest.fixture(scope="session")
def synthetic():
    """The synthetic data set as the convnet gets it."""
    return utils.load_data("synthetic", 32, None, None, HALF, HALF, torch.device("cpu"))


@pytest.fixture
def few(monkeypatch, synthetic):
    """Let a script load 60 training, 20 validation and 100 test images of the synthetic data."""
    data = copy.copy(synthetic)
    chosen = torch.cat([data.train[:60], data.val[:20], data.test[:100]])
    data.images, data.labels = data.images[chosen], data.labels[chosen]
    data.train, data.val, data.test = torch.arange(180).split([60, 20, 100])
    monkeypatch.setattr(utils, "load_data", lambda *_: data)
    return data


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder that takes the place of the project's: nothing is written into the real."""
    monkeypatch.setattr(utils, "FOLDER", tmp_path)
    return tmp_path


@pytest.fixture
def project(tmp_path):
    """A copy of the project, as a user has it, and a function that runs one of its scripts."""
    for name in ("ex3_convnet.py", "ex3_pretrained.py", "utils.py"):
        shutil.copy(ROOT / name, tmp_path)

    def run(*command, **environment):
        return subprocess.run(
            [sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, timeout=240,
            stdin=subprocess.DEVNULL, env={**os.environ, "MPLBACKEND": "Agg", **environment})

    run.folder = tmp_path
    return run


@pytest.fixture
def image_folder(tmp_path):
    """Two classes, 12 training and 4 test images; image i is filled with the grey level 10 i."""
    for part, count in ("train", 12), ("test", 4):
        for i in range(count):
            path = tmp_path / "photos" / part / ("cat", "dog")[i % 2] / f"{i:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((32, 32, 3), 10 * i, np.uint8)).save(path)
    return tmp_path / "photos"


@pytest.fixture
def small_cifar10(tmp_path, monkeypatch):
    """A function that makes a folder with CIFAR-10 in one of its forms (see utils.CIFAR10_FORMS),
    of 20 images a batch; the hashes in utils are made to fit it."""
    random, forms = np.random.default_rng(0), {utils.CIFAR10.filename: {},
                                               "cifar-10-binary.tar.gz": {}}
    python, binary = forms.values()
    for i, name in enumerate([f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]):
        pixels = random.integers(0, 256, (20, 3072), dtype=np.uint8)
        pixels[:, 0] = i
        labels = random.permutation(20) % 10
        python[name] = pickle.dumps({"data": pixels, "labels": labels.tolist()})
        binary[f"{name}.bin"] = np.hstack([labels[:, None].astype(np.uint8), pixels]).tobytes()
    for files, known in (python, utils.CIFAR10_PYTHON), (binary, utils.CIFAR10_BINARY):
        for name, content in files.items():
            monkeypatch.setitem(known, name, hashlib.md5(content).hexdigest())
    binary["batches.meta.txt"] = b"airplane\n"

    def make(form):
        place = tmp_path / form.replace(".", "-")
        files = python if "py" in form else binary
        folder = "cifar-10-batches-py" if "py" in form else "cifar-10-batches-bin"
        (place / form if form == folder else place).mkdir(parents=True)
        if form == folder:
            for name, content in files.items():
                (place / form / name).write_bytes(content)
        else:
            with tarfile.open(place / form, "w:gz") as archive:
                for name, content in files.items():
                    info = tarfile.TarInfo(f"{folder}/{name}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
        return place

    return make


@pytest.fixture
def cifar10(small_cifar10, monkeypatch):
    """A folder with the small CIFAR-10 as the python version's archive."""
    folder = small_cifar10(utils.CIFAR10.filename)
    monkeypatch.setattr(utils, "CIFAR10_SHA256", utils.sha256(folder / utils.CIFAR10.filename))
    return folder


@pytest.fixture
def small_convnet(monkeypatch):
    """Let the convnet have 8 channels in each block: an epoch takes a fraction of a second."""
    monkeypatch.setattr(ex3_convnet, "CHANNELS", (8, 8, 8, 8, 8))


def tiny_features():
    """In the place of the VGG11-BN's features: few layers of the same kinds, 512 features."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, stride=4, padding=1), nn.BatchNorm2d(64), nn.ReLU(inplace=True),
        nn.MaxPool2d(2), nn.Conv2d(64, 512, 1), nn.BatchNorm2d(512), nn.ReLU(inplace=True),
        nn.MaxPool2d(4))


def vgg_features():
    """The VGG11-BN's features, but not the 120 million weights behind them, which take seconds."""
    return make_layers(cfgs["A"], batch_norm=True)


@pytest.fixture
def tiny_vgg(monkeypatch):
    """Let ex3_pretrained.py have tiny_features."""
    monkeypatch.setattr(ex3_pretrained, "vgg11_bn",
                        lambda: SimpleNamespace(features=tiny_features()))


@pytest.fixture
def bare_vgg(monkeypatch):
    """Let ex3_pretrained.py make its features without the rest of torchvision's network."""
    monkeypatch.setattr(ex3_pretrained, "vgg11_bn",
                        lambda: SimpleNamespace(features=vgg_features()))


def random_weights(features, seed=1):
    """A state dict like torchvision's, with random features."""
    torch.manual_seed(seed)
    for layer in features:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(layer, nn.BatchNorm2d):  # statistics that are not those of a new network
            nn.init.uniform_(layer.running_mean, -0.1, 0.1)
            nn.init.uniform_(layer.running_var, 0.5, 2)
    return {f"features.{name}": value for name, value in features.state_dict().items()}


@pytest.fixture
def weights(tiny_vgg):
    """Weights that fit the tiny network, which the script now makes."""
    return random_weights(tiny_features())


@pytest.fixture
def weights_file(weights, tmp_path):
    torch.save(weights, tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


@pytest.fixture
def trainings(monkeypatch):
    """A list that grows by (title, seed) with each experiment that is trained."""
    trained = []

    def begin(run, begin=utils.Run.begin, **parts):
        trained.append((run.title, run.flags.seed))
        return begin(run, **parts)

    monkeypatch.setattr(utils.Run, "begin", begin)
    return trained


@pytest.fixture
def no_drawing(monkeypatch):
    """Let the scripts draw nothing, where the figures are not the point."""
    for script in (ex3_convnet, ex3_pretrained):
        monkeypatch.setattr(script, "draw", lambda *_: None)


@pytest.fixture
def edited(tmp_path, monkeypatch):
    """A function that imports a copy of a script, in which texts are replaced: (old, new), ...

    The copy is a module of its own. channels: of its small network; None: as the source has them.
    """
    count = 0

    def edit(*changes, script=ex3_convnet, channels=(8, 8, 8, 8, 8)):
        nonlocal count
        count += 1
        source = Path(script.__file__).read_text(encoding="utf-8")
        for old, new in changes:
            assert old in source, old
            source = source.replace(old, new)
        path = tmp_path / f"edit_{count}" / Path(script.__file__).name
        path.parent.mkdir()
        path.write_text(source, encoding="utf-8")
        name = f"edited_{count}"
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        if channels and script is ex3_convnet:
            module.CHANNELS = channels
        return module

    return edit


# --- faults ---

SHORT = [*TINY, "--num_epochs=2", "--precision=float32"]
FULL = [*SHORT, "--norm_flag", "--dropout=0.2", "--augmentation=rotation+color_jitter",
        "--earlystop", "--patience=4", "--num_epochs=6"]  # everything that has a state
DATA = "synthetic-60"  # as the names of checkpoints and of the folder of results give it
LATEST = f"latest_model_convnet_{DATA}.ckpt"
LATEST_FULL = ("latest_model_convnet-batch-norm-dropout-0.2-rotation-color_jitter-early-stopping_"
               f"{DATA}.ckpt")


@pytest.fixture
def small(few, folder, small_convnet, no_drawing):
    """An empty folder for a small convnet on few images, which draws nothing."""
    return folder


@pytest.fixture
def epochs(monkeypatch):
    """A list that grows by one with every epoch that is trained."""
    trained, train = [], utils.train_one_epoch

    def count(*arguments):
        trained.append(1)
        return train(*arguments)

    monkeypatch.setattr(utils, "train_one_epoch", count)
    return trained


@contextlib.contextmanager
def interrupted(epoch):
    """Ctrl-C in an epoch (counted from 1), when its training is done and nothing is written."""
    train, calls = utils.train_one_epoch, itertools.count(1)

    def stop(*arguments):
        result = train(*arguments)
        if next(calls) == epoch:
            raise KeyboardInterrupt
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "train_one_epoch", stop)
        with pytest.raises(KeyboardInterrupt):
            yield


def comparable(value):
    """A checkpoint or a record with lists for tensors, without what differs from call to call:
    times, the use of memory, and whether it was resumed."""
    if isinstance(value, dict):
        return {key: comparable(part) for key, part in value.items()
                if key not in ("seconds", "finished", "peak_memory_mb", "resume", "sha256")}
    if isinstance(value, list):
        return [comparable(part) for part in value]
    return (value.dtype, value.tolist()) if isinstance(value, torch.Tensor) else value


def outcome(folder):
    """All that a run leaves: its checkpoints and its records."""
    checkpoints = {path.name: utils.load_checkpoint(path) for path in folder.glob("*.ckpt")}
    records = {path.name: json.loads(path.read_text()) for path in folder.rglob("*.json")}
    return comparable({**checkpoints, **records})


def clear(folder):
    """Delete what runs have left in a folder."""
    for path in [*folder.glob("*.ckpt"), *folder.rglob("*.json")]:
        path.unlink()


def contents(folder):
    """Every file in a folder, with its bytes."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def temporary_files(folder):
    return list(folder.rglob("*.tmp"))


def write_output(out, err):
    """In a child process: let all of its output go to two files."""
    for number, path in (1, out), (2, err):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1) for number in (1, 2))  # noqa: SIM115


def work(folder, argv, limit=None):
    """A child process: the script, small and in a folder; its output goes to files there.

    limit: bytes that a file can have from now on.
    """
    write_output(folder / "out", folder / "err")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in {"SIGTERM", "SIGHUP"} & set(dir(signal)):  # also where the tests run under nohup
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    matplotlib.use("Agg")
    torch.set_num_threads(1)
    data = utils.Data(**torch.load(folder / "data.pt"))
    utils.FOLDER, utils.load_data = folder, lambda *_: data
    ex3_convnet.CHANNELS = (8, 8, 8, 8, 8)
    if limit:
        utils.resource.setrlimit(utils.resource.RLIMIT_FSIZE,
                                 (limit, utils.resource.RLIM_INFINITY))
    sys.argv = ["ex3_convnet.py"]
    utils.run_script(partial(ex3_convnet.main, argv))


@pytest.fixture(scope="session")
def fork():
    """A function that starts a function in a process of its own, and returns the process.

    All are children of a server that has imported PyTorch, but never ran it: quick and safe.
    """
    context, processes = multiprocessing.get_context("forkserver"), []

    def fork(function, *arguments, **options):
        with pytest.MonkeyPatch.context() as patch:  # for the server, to find the modules
            patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
            process = context.Process(target=function, args=arguments, kwargs=options)
            process.start()
        processes.append(process)
        return process

    context.set_forkserver_preload(["conftest"])
    yield fork
    for process in processes:
        process.kill()
        process.join()


@pytest.fixture
def start(few, fork):
    """A function that starts the script in a process of its own (see work)."""
    def start(folder, *argv, **options):
        folder.mkdir(exist_ok=True)
        torch.save(vars(few), folder / "data.pt")
        (folder / "out").write_text("")
        (folder / "err").write_text("")
        return fork(work, folder, argv, **options)

    return start


def finish(process):
    """The exit code of a process."""
    process.join(60)
    return process.exitcode


# --- records and pages ---


def change_record(path, change):
    """Change a record in its file: change(record) returns the new one, or changes it in place.

    It is an older record then, from before they had a checksum.
    """
    record = json.loads(path.read_text())
    record.pop("sha256", None)
    path.write_text(json.dumps(change(record) or record))


def page_table(folder, title):
    """The table with this title on the page of a folder of results, up to its legend."""
    page = (folder / "README.md").read_text(encoding="utf-8")
    return re.search(rf"^\*\*{title}\*\*.*?\n\n.*?\n\n.*?\n", page, re.MULTILINE | re.DOTALL)[0]


def made_record(seed=0, epochs=3, best=None, data="photos", title="ConvNet", share=0.7,
                classes=tuple("abcdefghij"), run_flags=()):
    """A record as a run leaves it, in which this share of the images is right in each epoch."""
    labels = np.arange(20 * len(classes)) % len(classes)
    wrong = np.random.default_rng(seed).permutation(len(labels)) >= round(share * len(labels))
    predicted = (labels + wrong) % len(classes)
    accuracy, losses = [float(np.mean(~wrong))] * epochs, list(np.linspace(2, 1, epochs))
    parts = {part: utils.pack(labels) for part in ("val", "test")}
    return {
        "title": title, "data": data, "seed": seed, "precision": "float32",
        "recipe": {"data": {"classes": list(classes), "train": 900, "val": len(labels),
                            "test": len(labels)},
                   "flags": {"num_epochs": 50, "norm_flag": True, "dropout": 0.0,
                             **dict(run_flags)}},
        "result": {"epoch": best or epochs, "best_epoch": best, "model_size": 1000,
                   **{f"{part}_accuracy": accuracy[0] for part in ("train", "val", "test")}},
        "history": {"train_loss": losses, "val_loss": losses, "train_accuracy": accuracy,
                    "val_accuracy": accuracy, "seconds": [1.0] * epochs},
        "labels": parts, "predictions": {kind: {part: utils.pack(predicted) for part in parts}
                                         for kind in ("reported", "latest")},
        "filters": {when: utils.pack(np.ones((16, 3, 3, 3), np.float16))
                    for when in ("before", "after")}}
