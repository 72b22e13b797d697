"""torchrun with two processes on the CPU: one run that both share, and runs that they divide."""

import json
import os
import shutil
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from conftest import HALF, ROOT

import ex3_convnet
import ex3_pretrained
import utils

# a script with a small network, few images and other runs; FAULT says what goes wrong in it
DRIVER = """
import functools, importlib, os, pathlib, signal, time
import torch
import ex3_convnet, utils

ex3_convnet.CHANNELS = (128, 8, 8, 8, 8)
ex3_convnet.QUESTIONS["1"] = {
    "even": {"augmentation": "rotation+color_jitter"},
    "odd": {"augmentation": "translation", "batch_size": 15},
    "norm": {"norm_flag": True, "dropout": 0.5},
    "stop": {"earlystop": True, "patience": 1, "learning_rate": 1e-9}}
number, fault = os.environ.get("RANK", "0"), os.environ.get("FAULT")
train_one_epoch = utils.train_one_epoch
epochs = []

def train_and_fail(*arguments):
    pathlib.Path(f"seed_{number}").write_text(str(torch.initial_seed()))  # of the dropout
    epochs.append(None)
    if fault == "problem" and number == "1" and len(epochs) == 2:
        raise utils.Problem("only this process fails")
    while fault == "kill" and number == "1":
        if list(pathlib.Path("figures").rglob("*.json")):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.01)
    if fault == "slow" and number == "1":
        time.sleep(3)
    return train_one_epoch(*arguments)

utils.draw_synthetic = functools.partial(utils.draw_synthetic, 80, 100)
utils.train_one_epoch = train_and_fail
utils.run_script(importlib.import_module(os.environ.get("SCRIPT", "ex3_convnet")).main)
"""
FEW = ["--dataset=synthetic", "--num_training=50", "--num_validation=21", "--batch_size=20",
       "--num_epochs=3", "--precision=float32"]
RECORDS = "figures/synthetic-50/records"


def launch(folder, *arguments, processes=2, **environment):
    """Run the driver in the folder, a copy of the project, with or without torchrun."""
    for name in ("ex3_convnet.py", "ex3_pretrained.py", "utils.py"):
        shutil.copy(ROOT / name, folder)
    (folder / "driver.py").write_text(DRIVER)
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    start = time.perf_counter()
    result = subprocess.run(
        [sys.executable, *torchrun * (processes > 1), "driver.py", *FEW, *arguments], cwd=folder,
        capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL,
        env={**os.environ, "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1", **environment})
    result.seconds = time.perf_counter() - start
    return result


def records(folder):
    """{name of the file without its seed and digest: the record}"""
    found = {path.name: json.loads(path.read_text()) for path in (folder / RECORDS).iterdir()}
    return {f"{record['title']}, seed {record['seed']}": record for record in found.values()}


def weights(folder, name, kind="latest"):
    return utils.load_checkpoint(folder / f"{kind}_model_{name}.ckpt")["model"]


def check_lines(output, *ends):
    """Each line that ends so is there once."""
    for end in ends:
        assert len([line for line in output.splitlines() if line.endswith(end)]) == 1, end


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The four runs of the driver by one process: the folder."""
    folder = tmp_path_factory.mktemp("one")
    result = launch(folder, "--question=1", processes=1)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The same by two processes that share each run: the folder, with its output."""
    folder = tmp_path_factory.mktemp("two")
    result = launch(folder, "--question=1")
    assert result.returncode == 0, result.stderr
    (folder / "stdout").write_text(result.stdout)
    (folder / "stderr").write_text(result.stderr)
    return folder


# ------------------------------------- one run, shared -------------------------------------


@pytest.mark.parametrize(("title", "name"), [
    ("ConvNet, rotation+color_jitter", "convnet-rotation-color_jitter"),  # batches 20, 20, 10
    ("ConvNet, translation", "convnet-translation")])  # 15, 15, 15, 5: shares of 8 and 7, 3 and 2
def test_two_processes_train_like_one(one, two, title, name):
    single, shared = (records(folder)[f"{title}, seed 0"]["history"] for folder in (one, two))
    assert single.keys() == shared.keys()
    assert single["train_loss"][0] - single["train_loss"][-1] > 0.002  # it learns
    for key in single.keys() - {"seconds"}:
        assert shared[key] == pytest.approx(single[key], abs=1e-5), key
    expected = weights(one, name)
    for key, value in weights(two, name).items():
        assert torch.allclose(value, expected[key], rtol=0, atol=1e-5), key
    assert records(two)[f"{title}, seed 0"]["processes"] == 2
    assert records(one)[f"{title}, seed 0"]["processes"] == 1


@pytest.mark.parametrize("norm", [False, True])
def test_the_metrics_are_of_all_images_and_of_the_saved_model(two, monkeypatch, norm):
    """With batch norm, only if both processes validate with the statistics that rank 0 saves."""
    monkeypatch.setattr(ex3_convnet, "CHANNELS", (128, 8, 8, 8, 8))
    title, name = (("ConvNet, batch norm, dropout 0.5", "convnet-batch-norm-dropout-0.5") if norm
                   else ("ConvNet, translation", "convnet-translation"))
    record = records(two)[f"{title}, seed 0"]
    model = ex3_convnet.ConvNet(norm, 0.5 * norm)
    model.load_state_dict(weights(two, name))
    monkeypatch.setattr(utils, "draw_synthetic", partial(utils.draw_synthetic, 80, 100))
    data = utils.load_data("synthetic", 32, 50, 21, HALF, HALF, torch.device("cpu"))
    loss, accuracy = utils.evaluate(model, data, data.val, torch.float32)
    assert record["history"]["val_accuracy"][-1] == pytest.approx(accuracy)
    assert record["history"]["val_loss"][-1] == pytest.approx(loss, abs=1e-6)
    assert record["result"]["test_accuracy"] == pytest.approx(
        utils.evaluate(model, data, data.test, torch.float32)[1])


def test_dropout_differs_between_the_processes(two):
    assert (two / "seed_0").read_text() != (two / "seed_1").read_text()


def test_all_processes_stop_early_in_the_same_epoch(one, two):
    for folder in (one, two):
        record = records(folder)["ConvNet, early stopping, seed 0"]
        assert (record["best_epoch"], len(record["history"]["val_loss"])) == (1, 2)
    check_lines((two / "stdout").read_text(), "Early stop: no better epoch than 1 for 1 epochs")


def test_one_process_writes_and_prints(two):
    output = (two / "stdout").read_text()
    epochs = [line for line in output.splitlines() if line.startswith("epoch ")]
    assert len(epochs) == 3 * 3 + 2
    sentence = "on CPUs each process normalizes by the statistics of its own share"
    check_lines(output, sentence, "figure_1_2_filters.png")
    assert len(list((two / RECORDS).iterdir())) == 4
    assert len(list(two.glob("*.ckpt"))) == 4 + 1  # the latest of each, and a best
    warning, = (two / "stderr").read_text().splitlines()  # one, and nothing from PyTorch
    assert warning.startswith("Warning: no validation image of class ring")


def test_a_process_that_fails_ends_the_job_and_the_run_can_be_resumed(one, tmp_path):
    run = "--augmentation=rotation+color_jitter"
    result = launch(tmp_path, run, FAULT="problem")
    assert result.returncode != 0
    assert result.seconds < 60
    check_lines(result.stderr, "driver.py: only this process fails")
    assert "utils.py" not in result.stderr  # no traceback of ours
    assert "epoch  1/3" in result.stdout
    assert "epoch  2/3" not in result.stdout
    assert not (tmp_path / RECORDS).exists() or not records(tmp_path)

    result = launch(tmp_path, run, "--resume")
    assert result.returncode == 0, result.stderr
    check_lines(result.stdout, "Resumed after epoch 1")
    assert "epoch  1/3" not in result.stdout
    expected = weights(one, "convnet-rotation-color_jitter")
    for key, value in weights(tmp_path, "convnet-rotation-color_jitter").items():
        assert torch.allclose(value, expected[key], rtol=0, atol=1e-5), key


def test_too_few_images_for_the_processes_is_one_sentence(tmp_path):
    result = launch(tmp_path, "--batch_size=3")
    assert result.returncode != 0
    check_lines(result.stderr, "driver.py: 2 processes need at least 4 images a step: raise "
                               "--batch_size or --num_training")
    assert not list(tmp_path.glob("*.ckpt"))


# ------------------------------------- the pretrained network -------------------------------------


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    path = tmp_path_factory.mktemp("pretrained") / "weights.pth"
    state = ex3_pretrained.VGG().features.state_dict()
    torch.save({f"features.{name}": value for name, value in state.items()}, path)
    return f"--pretrained={path}"


def test_two_processes_share_the_runs_of_the_pretrained_network(tmp_path, features):
    """Frozen: with features that are computed once, and with batch norm that drifts."""
    result = launch(tmp_path, "--question=4a", "--num_epochs=1", features, SCRIPT="ex3_pretrained")
    assert result.returncode == 0, result.stderr
    assert [record["processes"] for record in records(tmp_path).values()] == [2, 2]
    assert len(trained(result.stdout)) == 2
    check_lines(result.stdout, "table_5.md")


# -------------------------------------- whole runs, divided --------------------------------------


def trained(output):
    """The runs that were trained, as the output tells."""
    return sorted(line.split(", on ")[0] for line in output.splitlines()
                  if "50 training, 21 validation" in line)


def test_runs_are_divided_and_what_a_killed_process_left_is_done_later(tmp_path, features):
    question = ["--question=4a", "--seeds=2", "--num_epochs=1", "--parallel=runs", features]
    result = launch(tmp_path, *question, FAULT="kill", SCRIPT="ex3_pretrained")
    assert result.returncode != 0
    assert "Signal 9 (SIGKILL)" in result.stderr
    before, place = records(tmp_path), tmp_path / "figures/synthetic-50"
    assert 1 <= len(before) <= 3
    assert not list(place.glob("*.md"))

    # one process is done long before the other, for which it has to wait
    result = launch(tmp_path, *question, FAULT="slow", SCRIPT="ex3_pretrained")
    assert result.returncode == 0, result.stderr
    after = records(tmp_path)
    assert len(after) == len(list((tmp_path / RECORDS).iterdir())) == 4
    assert trained(result.stdout) == sorted(after.keys() - before.keys())
    assert all(after[name] == before[name] for name in before)
    assert all(record["processes"] == 1 for record in after.values())
    check_lines(result.stdout, "table_5.md", *(
        path.name for path in place.glob("figure*.png")))
    table = (place / "table_5.md").read_text().splitlines()
    assert all(line.endswith("| 2 |") for line in table if line.startswith("| frozen"))


def test_one_process_draws_the_records_again(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    store = torch.distributed.FileStore(str(tmp_path / "store"), 2)
    assert utils.run_plan({"1": {}}, None, None, None, None, store) == {}
