"""What several tests use: the synthetic data, a folder of images, a copy of the project."""

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
