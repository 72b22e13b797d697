"""What several tests use: small data, small networks, and copies of the project."""

import json
import os
import shutil
import subprocess
import sys
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
torch.set_num_threads(1)  # several processes of tests would wait for each other
os.environ["OMP_NUM_THREADS"] = "1"  # of those that tests start
ROOT = Path(__file__).resolve().parent.parent
TINY = ["--dataset=synthetic", "--num_training=60", "--num_validation=20", "--num_epochs=2",
        "--batch_size=20", "--precision=float32", "--device=cpu"]  # with `few` a run of a moment

def parse(*argv, script=ex3_convnet):
    """The settings of a script for this command line."""
    return utils.parse_settings(vars(script), argv)

def records_in(folder):
    """The records in all the results of a project's folder, from their files."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("figures/*/*/records/*"))]

def checkpoints_in(folder):
    """{path from `folder`/checkpoints on: checkpoint} of all that are there."""
    folder = folder / "checkpoints"
    return {str(path.relative_to(folder)): utils.load_checkpoint(path)
            for path in sorted(folder.rglob("*.ckpt"))}

def comparable(value):
    """A checkpoint or a record with lists for tensors, without what differs from call to call."""
    if isinstance(value, dict):
        return {key: comparable(part) for key, part in value.items()
                if key not in ("seconds", "finished", "commit")}
    if isinstance(value, (list, tuple)):
        return [comparable(part) for part in value]
    return (str(value.dtype), value.tolist()) if isinstance(value, torch.Tensor) else value

def pytest_addoption(parser):
    parser.addoption("--bfloat16", action="store_true",
                     help="let the precision auto find a CPU with bfloat16, whatever it has")

@pytest.fixture(autouse=True)
def _same_everywhere(monkeypatch, request):
    """On every machine the precision auto finds the same CPU, no test believes that torchrun has
    started it, and git works in the folder of a test even if a commit hook has started pytest."""
    found = request.config.getoption("--bfloat16")
    monkeypatch.setattr(utils, "has_native_bfloat16", lambda device: found)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "GIT_DIR", "GIT_INDEX_FILE", "GIT_WORK_TREE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)

@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder in the place of the project's: nothing is written into the real one."""
    monkeypatch.setattr(utils, "FOLDER", tmp_path)
    return tmp_path

@pytest.fixture
def few(monkeypatch):
    """Let the synthetic data be 180 images: 60 train, 20 validate, 100 test."""
    *made, _ = utils.make_synthetic(num_train=80, num_test=100)
    sizes = {"train": 60, "val": 20, "test": 100}
    monkeypatch.setattr(utils, "make_synthetic", lambda: (*made, sizes))

@pytest.fixture
def small_convnet(monkeypatch):
    """Let the convnet have 8 channels in each block: an epoch takes a fraction of a second."""
    monkeypatch.setattr(ex3_convnet, "CHANNELS", (8, 8, 8, 8, 8))

@pytest.fixture
def no_figures(monkeypatch):
    """Let no figure be drawn, where they are not the point: each takes a quarter of a second."""
    monkeypatch.setattr(utils, "save_figure", lambda figure, *_, **__: utils.plt.close(figure))
    for name in ("plot_runs", "plot_learning_curves", "plot_filters", "plot_classes"):
        monkeypatch.setattr(utils, name, lambda *_, **__: None)

@pytest.fixture
def small(folder, few, small_convnet, no_figures):
    """An empty folder for a small convnet on few images, which draws nothing."""
    return folder

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
def weights_file(tiny_vgg, tmp_path):
    """A file of weights that fit the tiny network, which the script now makes."""
    torch.save(random_weights(tiny_features()), tmp_path / "weights.pth")
    return tmp_path / "weights.pth"

@pytest.fixture
def project(tmp_path):
    """A copy of the project as a user has it, in git, with a small convnet that runs in a moment,
    and a function that runs a command of Python in it (run.folder, and run.status(): what git says
    is new or changed)."""
    home = tmp_path / "project"
    home.mkdir()
    for name in ("ex3_convnet.py", "ex3_pretrained.py", "utils.py", ".gitignore"):
        shutil.copy(ROOT / name, home)
    script = home / "ex3_convnet.py"
    source = script.read_text(encoding="utf-8")
    channels = "CHANNELS = (128, 512, 512, 512, 512)"
    assert channels in source
    script.write_text(source.replace(channels, "CHANNELS = (8, 8, 8, 8, 8)"), encoding="utf-8")
    git = ["git", "-c", "user.name=A", "-c", "user.email=a@b.c", "-C", str(home)]
    for arguments in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "all"]):
        subprocess.run([*git, *arguments], check=True)

    def run(*command, **environment):
        return subprocess.run(
            [sys.executable, *command], cwd=home, capture_output=True, text=True, timeout=240,
            stdin=subprocess.DEVNULL, env={**os.environ, "MPLBACKEND": "Agg", **environment})

    def status():
        return subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True,
                              check=True).stdout

    run.folder, run.status = home, status
    return run

def write_photos(folder, counts, size=32):
    """Make an image folder; counts: {"train/cat": number of pictures}; each has another grey."""
    grey = 0
    for place, count in counts.items():
        for i in range(count):
            path = folder / place / f"{i:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            grey = (grey + 5) % 256
            Image.fromarray(np.full((size, size, 3), grey, np.uint8)).save(path)
    return folder

@pytest.fixture
def photos(tmp_path):
    """Two classes, 12 training and 4 test images of each."""
    return write_photos(tmp_path / "photos", {"train/cat": 12, "train/dog": 12, "test/cat": 4,
                                              "test/dog": 4})
