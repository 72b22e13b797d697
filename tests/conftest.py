"""What several tests use: the synthetic data, a folder of images, a copy of the project."""

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

import utils

matplotlib.use("Agg")
ROOT = Path(__file__).resolve().parent.parent
HALF = (0.5, 0.5, 0.5)


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
