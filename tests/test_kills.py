"""Processes that are killed, interrupted, or run twice at once: nothing is lost or half-written."""

import os
import random
import re
import signal
import time
from functools import partial

import pytest
from conftest import (
    FULL,
    LATEST,
    LATEST_FULL,
    SHORT,
    finish,
    outcome,
    temporary_files,
)
from PIL import Image

import ex3_convnet
import utils


def wait(process, ready):
    """Wait until a condition holds, or the process has ended."""
    end = time.monotonic() + 60
    while not ready() and process.is_alive():
        assert time.monotonic() < end
        time.sleep(0.001)


def output(folder):
    return (folder / "out").read_text()


def printed_epochs(folder):
    return [int(epoch) for epoch in re.findall(r"^epoch +(\d+)/", output(folder), re.MULTILINE)]


def test_a_new_process_gives_the_same_numbers(start, tmp_path):
    folders = [tmp_path / "first", tmp_path / "second"]
    assert [finish(start(folder, *FULL, "--num_epochs=2")) for folder in folders] == [0, 0]
    first, second = map(outcome, folders)
    assert len(first) == 3
    assert first == second


def test_kills_at_any_moment_lose_at_most_the_epoch_under_way(start, tmp_path):
    """8 of them, every other while a file is being written, each followed by --resume."""
    argv = [*FULL, "--num_epochs=20", "--patience=20"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert finish(start(whole, *argv)) == 0
    draw, latest, left = random.Random(0), broken / LATEST_FULL, set()
    for kill in range(8):
        process = start(broken, *argv, "--resume")
        done = kill // 2 % 3  # epochs
        wait(process, lambda done=done: len(printed_epochs(broken)) >= done)
        time.sleep(draw.uniform(0, 0.1))
        if kill % 2:
            wait(process, lambda left=left: set(temporary_files(broken)) - left)
        process.kill()
        assert finish(process) == -signal.SIGKILL
        left = set(temporary_files(broken))
        printed = printed_epochs(broken)
        assert len(printed) >= done
        if latest.exists() or printed:
            assert utils.load_checkpoint(latest)["epoch"] >= max(printed, default=0)
    assert left  # at least one kill came in the middle of a file
    assert finish(start(broken, *argv, "--resume")) == 0
    assert outcome(broken) == outcome(whole)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_ctrl_c_and_the_end_of_a_job_end_with_a_sentence_and_a_checkpoint(start, tmp_path, name):
    process = start(tmp_path, *SHORT, "--num_epochs=10000")
    wait(process, lambda: len(printed_epochs(tmp_path)) >= 3)
    os.kill(process.pid, getattr(signal, name))
    assert finish(process) == 130
    error = (tmp_path / "err").read_text()
    told, = re.findall("interrupted after epoch ([0-9]+): the same command with --resume", error)
    assert error.count("\n") == 1
    assert int(told) >= printed_epochs(tmp_path)[-1] >= 3
    assert utils.load_checkpoint(tmp_path / LATEST)["epoch"] == int(told)
    assert temporary_files(tmp_path) == []


def test_ctrl_c_in_the_first_epoch_says_that_nothing_is_kept(small, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(utils, "train_one_epoch", interrupt)
    with pytest.raises(SystemExit) as end:
        utils.run_script(partial(ex3_convnet.main, SHORT))
    assert end.value.code == 130
    assert "interrupted in its first epoch, of which nothing is kept" in capsys.readouterr().err


def test_two_processes_at_once_leave_valid_files(start, tmp_path):
    assert finish(start(tmp_path / "alone", *FULL)) == 0
    both = [start(tmp_path / "shared", *FULL) for _ in range(2)]
    assert [finish(process) for process in both] == [0, 0]
    assert outcome(tmp_path / "shared") == outcome(tmp_path / "alone")
    figures = list((tmp_path / "shared").rglob("*.png"))
    assert len(figures) == 3
    for path in figures:
        with Image.open(path) as image:
            image.load()
    assert temporary_files(tmp_path) == []


def test_two_processes_that_write_a_file_at_once_do_not_share_a_temporary_one(
        tmp_path, monkeypatch):
    path = tmp_path / "model.ckpt"
    with utils.atomic_write(path) as ours:
        ours.write_text("ours")
        monkeypatch.setattr(os, "getpid", lambda: 1)
        utils.save_checkpoint(path, {"theirs": 1})
        assert utils.load_checkpoint(path) == {"theirs": 1}
    assert path.read_text() == "ours"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_has_left_is_deleted_when_nobody_can_be_writing_it(tmp_path):
    path = tmp_path / "model.ckpt"
    for process, minutes in (1, 90), (2, 1):
        left = tmp_path / f".model.ckpt.{process}.tmp"
        left.touch()
        os.utime(left, (time.time() - 60 * minutes,) * 2)
    utils.save_checkpoint(path, {})
    assert {file.name for file in tmp_path.iterdir()} == {"model.ckpt", ".model.ckpt.2.tmp"}
