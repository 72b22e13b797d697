"""torchrun with two processes on the CPU: one run that both share, and runs that they divide."""

import inspect
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from functools import partial

import matplotlib
import pytest
import torch
from conftest import HALF, ROOT, SHORT, finish, page_table, parse, tiny_features, write_output

import ex3_convnet
import utils

# a script with a small network, few images and other runs; FAULT says what goes wrong in it
DRIVER = """
import functools, importlib, os, pathlib, signal, sys, time, types
import torch
from torch import nn
import ex3_convnet, ex3_pretrained, utils

ex3_convnet.CHANNELS = (8, 8, 8, 8, 8)
ex3_convnet.QUESTIONS["1"] = utils.Question(rows=[
    ("even", {"augmentation": "rotation+color_jitter"}),
    ("odd", {"augmentation": "translation", "batch_size": 15}),
    ("norm", {"norm_flag": True, "dropout": 0.5}),
    ("stop", {"earlystop": True, "patience": 1, "learning_rate": 1e-9})])
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
    while fault == "late" and number == "1" and not list(pathlib.Path("figures").rglob("*.md")):
        time.sleep(0.01)  # until the first process has drawn
    return train_one_epoch(*arguments)

utils.draw_synthetic = functools.partial(utils.draw_synthetic, 80, 100)
utils.train_one_epoch = train_and_fail
ex3_pretrained.vgg11_bn = lambda: types.SimpleNamespace(features=tiny_features())
script = importlib.import_module(os.environ.get("SCRIPT", "ex3_convnet"))
""" + inspect.getsource(tiny_features) + """
utils.run_script(lambda: script.main(sys.argv[1:]))
"""
FEW = ["--dataset=synthetic", "--num_training=50", "--num_validation=21", "--batch_size=20",
       "--num_epochs=3", "--precision=float32"]
RECORDS = "figures/synthetic-50/records"


def torchrun(folder, *arguments, **environment):
    """Run two processes of the driver in the folder, a copy of the project, by torchrun."""
    for name in ("ex3_convnet.py", "ex3_pretrained.py", "utils.py"):
        shutil.copy(ROOT / name, folder)
    (folder / "driver.py").write_text(DRIVER)
    start = time.perf_counter()
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         "driver.py", *FEW, *arguments], cwd=folder, capture_output=True, text=True, timeout=120,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1", **environment})
    result.seconds = time.perf_counter() - start
    return result


def drive(folder, arguments, environment):
    """A child process: the driver, whose output goes to files."""
    number = environment.get("RANK", 0)
    write_output(folder / f"out_{number}", folder / f"err_{number}")
    matplotlib.use("Agg")
    torch.set_num_threads(1)
    os.chdir(folder)
    os.environ.update(environment)
    utils.FOLDER = folder
    sys.argv = ["driver.py", *FEW, *arguments]
    exec(compile(DRIVER, "driver.py", "exec"), {"__name__": "__main__"})


@pytest.fixture(scope="module")
def launch(fork):
    """A function that runs the driver in processes like torchrun's, but faster; they succeed."""
    def launch(folder, *arguments, processes=2, **environment):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        started = [fork(drive, folder, arguments, {**environment, **({
            "RANK": f"{rank}", "WORLD_SIZE": f"{processes}", "MASTER_ADDR": "localhost",
            "MASTER_PORT": f"{port}"} if processes > 1 else {})}) for rank in range(processes)]
        codes = [finish(process) for process in started]
        assert codes == [0] * processes, [path.read_text() for path in folder.glob("err_*")]
        return "".join(path.read_text() for path in sorted(folder.glob("out_*")))

    return launch


def records(folder):
    """{name of the file without its seed and digest: the record}"""
    found = {path.name: json.loads(path.read_text()) for path in (folder / RECORDS).iterdir()}
    return {f"{record['title']}, seed {record['seed']}": record for record in found.values()}


def saved_weights(folder, name):
    return utils.load_checkpoint(folder / f"latest_model_{name}_synthetic-50.ckpt")["model"]


def check_lines(output, *ends):
    """Each line that ends so is there once."""
    for end in ends:
        assert len([line for line in output.splitlines() if line.endswith(end)]) == 1, end


@pytest.fixture(scope="module")
def one(tmp_path_factory, launch):
    """The four runs of the driver by one process: the folder."""
    folder = tmp_path_factory.mktemp("one")
    launch(folder, "--question=1", processes=1)
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The same by two processes that share each run: the folder, with its output."""
    folder = tmp_path_factory.mktemp("two")
    result = torchrun(folder, "--question=1")
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
    assert single["train_loss"][0] - single["train_loss"][-1] > 0.001  # it learns
    for key in single.keys() - {"seconds"}:
        assert shared[key] == pytest.approx(single[key], abs=1e-5), key
    expected = saved_weights(one, name)
    for key, value in saved_weights(two, name).items():
        assert torch.allclose(value, expected[key], rtol=0, atol=1e-5), key
    assert records(two)[f"{title}, seed 0"]["processes"] == 2
    assert records(one)[f"{title}, seed 0"]["processes"] == 1


@pytest.mark.parametrize("norm", [False, True])
def test_the_metrics_are_of_all_images_and_of_the_saved_model(
        two, small_convnet, monkeypatch, norm):
    """With batch norm, only if both processes validate with the statistics that rank 0 saves."""
    title, name = (("ConvNet, batch norm, dropout 0.5", "convnet-batch-norm-dropout-0.5") if norm
                   else ("ConvNet, translation", "convnet-translation"))
    record = records(two)[f"{title}, seed 0"]
    model = ex3_convnet.ConvNet(norm, 0.5 * norm)
    model.load_state_dict(saved_weights(two, name))
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
        assert (record["result"]["best_epoch"], len(record["history"]["val_loss"])) == (1, 2)
    check_lines((two / "stdout").read_text(), "Early stop: no better epoch than 1 for 1 epochs")


def test_one_process_writes_and_prints(two):
    output = (two / "stdout").read_text()
    epochs = [line for line in output.splitlines() if line.startswith("epoch ")]
    assert len(epochs) == 3 * 3 + 2
    sentence = "on CPUs each process normalizes by the statistics of its own shard"
    check_lines(output, sentence, "figure_1_2_filters.png")
    assert len(list((two / RECORDS).iterdir())) == 4
    assert len(list(two.glob("*.ckpt"))) == 4 + 1  # the latest of each, and a best
    assert (two / "stderr").read_text() == ""  # and nothing from PyTorch


def test_a_process_that_fails_ends_the_job_and_the_run_can_be_resumed(one, tmp_path, launch):
    run = "--augmentation=rotation+color_jitter"
    result = torchrun(tmp_path, run, FAULT="problem")
    assert result.returncode != 0
    assert result.seconds < 60
    check_lines(result.stderr, "driver.py: only this process fails")
    assert "utils.py" not in result.stderr  # no traceback of ours
    assert "epoch  1/3" in result.stdout
    assert "epoch  2/3" not in result.stdout
    assert not list((tmp_path / RECORDS).iterdir())

    output = launch(tmp_path, run, "--resume")
    check_lines(output, "Resumed after epoch 1")
    assert "epoch  1/3" not in output
    expected = saved_weights(one, "convnet-rotation-color_jitter")
    for key, value in saved_weights(tmp_path, "convnet-rotation-color_jitter").items():
        assert torch.allclose(value, expected[key], rtol=0, atol=1e-5), key


def test_too_few_images_for_the_processes_is_one_sentence(tmp_path):
    result = torchrun(tmp_path, "--batch_size=3")
    assert result.returncode != 0
    check_lines(result.stderr, "driver.py: a step needs at least 4 images (2 processes, batch norm "
                               "needs two in each): raise --batch_size or --num_training")
    assert not list(tmp_path.glob("*.ckpt"))


def test_two_processes_share_the_runs_of_the_pretrained_network(tmp_path, weights_file, launch):
    """Frozen: with features that are computed once, and with batch norm that drifts."""
    output = launch(tmp_path, "--question=4a", "--num_epochs=1", f"--pretrained={weights_file}",
                    SCRIPT="ex3_pretrained")
    assert [record["processes"] for record in records(tmp_path).values()] == [2, 2]
    assert len(trained(output)) == 2
    assert output.count("**Table 5** on synthetic") == 1


# -------------------------------------- whole runs, divided --------------------------------------


def trained(output):
    """The runs that were trained, as the output tells."""
    return sorted(line.split(", on ")[0] for line in output.splitlines()
                  if "50 training, 21 validation" in line)


def test_runs_are_divided_and_what_a_killed_process_left_is_done_later(
        tmp_path, weights_file, launch):
    question = ["--question=4a", "--seeds=2", "--num_epochs=1", "--parallel=runs",
                f"--pretrained={weights_file}"]
    result = torchrun(tmp_path, *question, FAULT="kill", SCRIPT="ex3_pretrained")
    assert result.returncode != 0
    assert "Signal 9 (SIGKILL)" in result.stderr
    before, place = records(tmp_path), tmp_path / "figures/synthetic-50"
    assert 1 <= len(before) <= 2

    # one process is done, and draws what is there, before the other has done anything
    for path in place.glob("*.*"):
        path.unlink()
    output = launch(tmp_path, *question, FAULT="late", SCRIPT="ex3_pretrained")
    after = records(tmp_path)
    assert len(after) == len(list((tmp_path / RECORDS).iterdir())) == 4
    assert trained(output) == sorted(after.keys() - before.keys())
    assert all(after[name] == before[name] for name in before)
    assert all(record["processes"] == 1 for record in after.values())
    table = page_table(place, "Table 5")

    launch(tmp_path, *question, "--redraw", processes=1, SCRIPT="ex3_pretrained")
    complete = page_table(place, "Table 5")
    assert complete != table
    assert all(line.endswith("| 2 |") for line in complete.splitlines()
               if line.startswith("| frozen"))


@pytest.fixture
def as_rank(monkeypatch):
    """A function that makes this process one of two that torchrun has started."""
    def as_rank(rank):
        for name, value in {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank,
                            "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}.items():
            monkeypatch.setenv(name, value)
    return as_rank


def test_processes_have_nothing_to_do_with_each_other(small, epochs, as_rank, monkeypatch):
    """With --parallel=runs, that is: one after the other they do the same; the first one draws."""
    drawn = []
    monkeypatch.setattr(ex3_convnet, "draw", lambda question, results, *_: drawn.append(
        sorted(record["seed"] for records in results.values() for record in records)))
    argv = [*SHORT, "--question=1", "--seeds=5", "--parallel=runs"]
    as_rank("1")
    assert ex3_convnet.main(argv) == {}
    assert len(epochs) == 2 * 2  # seeds 1 and 3
    assert drawn == []
    as_rank("0")
    results = ex3_convnet.main(argv)
    assert len(epochs) == 2 * 2 + 2 * 3
    assert drawn == [[0, 1, 2, 3, 4]]
    assert [len(records) for records in results["1"].values()] == [5]


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_run_that_fails_is_told_but_does_not_end_the_other_processes(
        small, monkeypatch, as_rank, capsys, rank):
    """An exit code would: torchrun ends all processes when one has failed."""
    monkeypatch.setattr(utils, "train_one_epoch", lambda *_: (float("nan"), 0.1))
    as_rank(rank)
    utils.run_script(lambda: ex3_convnet.main([*SHORT, "--seeds=2", "--parallel=runs"]))
    assert f"1 of the runs failed: ConvNet, seed {rank}," in capsys.readouterr().err
    monkeypatch.delenv("RANK")
    with pytest.raises(utils.Problem, match="2 of the runs failed"):
        ex3_convnet.main([*SHORT, "--seeds=2", "--parallel=runs"])


def test_more_processes_than_runs_is_no_error(small, epochs, as_rank):
    as_rank("1")
    assert ex3_convnet.main([*SHORT, "--question=1", "--parallel=runs"]) == {}
    assert not epochs


def test_each_run_is_in_the_list_of_runs_once_and_in_one_process(as_rank):
    """Questions share runs: 1 and 2a the plain network, 2a, 3a and 3b that with batch norm."""
    flags = parse("--question=all", "--parallel=runs", "--seeds=2")
    plan = utils.plan(flags, ex3_convnet.QUESTIONS)
    runs = utils.all_runs(plan)
    titles = [f"{ex3_convnet.describe(run)}, seed {run.seed}" for run in runs]
    planned = [run for runs in plan.values() for run in runs.values()]
    assert len(planned) == 1 + 2 + 2 + 9 + 13
    assert len(titles) == len(set(titles)) == 2 * (len(planned) - 3)
    for title in "ConvNet", "ConvNet, batch norm", "ConvNet, batch norm, early stopping":
        assert f"{title}, seed 0" in titles
    parts = []
    for rank in "0", "1":
        as_rank(rank)
        parts.append(utils.all_runs(plan))
    assert parts == [runs[::2], runs[1::2]]


@pytest.mark.parametrize("parallel", ["images", "runs"])
def test_a_rank_without_the_rest_of_torchruns_variables_is_a_run_of_its_own(
        small, epochs, monkeypatch, parallel):
    """As a batch system may set one."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    results = ex3_convnet.main([*SHORT, "--question=1", f"--parallel={parallel}"])
    assert [len(records) for records in results["1"].values()] == [1]
    assert not torch.distributed.is_initialized()
    assert len(epochs) == 2
