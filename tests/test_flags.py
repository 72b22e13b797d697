"""Flags: the settings at the top of a script, on the command line, and their errors."""

import os
import re
from pathlib import Path

import pytest
import torch

import ex3_convnet
import utils

NAMES = {"norm_flag", "earlystop", "patience", "dropout", "augmentation", "num_epochs",
         "batch_size", "learning_rate", "learning_rate_decay", "reg", "num_training",
         "num_validation", "seed", "dataset", "device"}


def parse(*argv):
    return utils.parse_flags(vars(ex3_convnet), argv)


def test_defaults_are_the_settings_of_the_script():
    flags = vars(parse())
    assert flags.pop("given") == set()
    assert set(flags) >= NAMES
    assert flags == {name: getattr(ex3_convnet, name) for name in flags}
    assert (flags["learning_rate"], flags["batch_size"], flags["num_epochs"]) == (2e-3, 200, 20)
    assert (flags["learning_rate_decay"], flags["reg"], flags["patience"]) == (0.95, 1e-3, 10)


def test_an_edited_setting_is_the_new_default(monkeypatch):
    monkeypatch.setattr(ex3_convnet, "dropout", 0)  # an int, where a float stood
    monkeypatch.setattr(ex3_convnet, "norm_flag", True)
    assert parse().dropout == 0.0
    assert parse("--dropout=0.3").dropout == 0.3
    assert parse().norm_flag is True
    assert parse("--norm_flag=False").norm_flag is False


@pytest.mark.parametrize("line", ["dropout = 0.3", "dropout=0.3", "dropout: float = 0.3  # high"])
def test_an_edit_may_drop_the_type_or_the_comment(tmp_path, line):
    path = tmp_path / "script.py"
    path.write_text(f"# --- experiment ---\n{line}\nOTHER = 3\n")
    script = {"__file__": str(path), "__doc__": "", "dropout": 0.3, "OTHER": 3}
    flags = vars(utils.parse_flags(script, ["--dropout=0.5"]))
    assert flags == {"dropout": 0.5, "given": {"dropout"}}


def test_an_edited_setting_is_checked_like_a_flag(monkeypatch, capsys):
    monkeypatch.setattr(ex3_convnet, "dropout", 1.5)
    with pytest.raises(SystemExit) as end:
        parse()
    assert end.value.code == 2
    assert "--dropout" in capsys.readouterr().err


def test_values_from_the_command_line():
    flags = parse("--norm_flag", "--dropout=0.3", "--num_epochs", "5", "--num_training=None",
                  "--num_validation=7", "--augmentation=horizontal_flip+rotation")
    assert flags.norm_flag is True
    assert (flags.dropout, flags.num_epochs) == (0.3, 5)
    assert (flags.num_training, flags.num_validation) == (None, 7)
    assert flags.augmentation == "horizontal_flip+rotation"


@pytest.mark.parametrize("argument", [
    "--dropout=1.5", "--dropout=1", "--dropout=nan", "--dropout=a", "--num_epochs=0",
    "--num_epochs=2.5", "--batch_size=0", "--learning_rate=0", "--learning_rate=inf", "--reg=-1",
    "--patience=0", "--seed=-1", "--norm_flag=maybe", "--augmentation=flip", "--augmentation=",
    "--device=gpu", "--precision=float8", "--monitor=test", "--num_training=0", "--unknown=1",
    "--norm", "positional", "--dataset=", "--predict=", "--num_validation=0", "--image_size=8"])
def test_a_wrong_flag_is_one_sentence_and_code_2(argument, capsys):
    with pytest.raises(SystemExit) as end:
        parse(argument)
    message = capsys.readouterr().err
    assert end.value.code == 2
    assert message.count("\n") == 1
    assert argument.split("=")[0] in message


def test_a_misspelt_flag_gets_a_suggestion(capsys):
    with pytest.raises(SystemExit):
        parse("--num_epoch=3")
    assert "did you mean --num_epochs" in capsys.readouterr().err


def test_help_lists_every_flag_with_its_default_and_comment(capsys):
    with pytest.raises(SystemExit) as end:
        parse("--help")
    assert end.value.code == 0
    page = " ".join(capsys.readouterr().out.split())
    source = Path(ex3_convnet.__file__).read_text(encoding="utf-8")
    for name in vars(parse()).keys() - {"given"}:
        comment = re.search(rf"^{name}: .*  # (.*)$", source, re.MULTILINE)[1]
        assert f"--{name} " in page
        assert f"{comment} (default: {getattr(ex3_convnet, name)})" in page
    assert "training recipe:" in page


def test_more_devices_than_there_are():
    with pytest.raises(utils.Problem, match="cuda:99") as problem:
        utils.choose_device("cuda:99", "auto")
    assert problem.value.status == 2


@pytest.fixture
def two_gpus(monkeypatch):
    """Let PyTorch report two GPUs that compute bfloat16, and collect what is asked of it."""
    asked = []
    for name, value in {"is_available": True, "device_count": 2, "is_bf16_supported": True}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value, **_: value)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked.append)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    return asked


def test_cuda_is_taken_where_there_is_one_and_by_each_process_its_own(two_gpus, monkeypatch):
    assert utils.choose_device("auto", "auto") == (torch.device("cuda:0"), torch.bfloat16)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert utils.choose_device("cuda", "float32") == (torch.device("cuda:1"), torch.float32)
    assert utils.choose_device("cpu", "float32")[0] == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(utils.Problem, match="cuda:2 is not there: PyTorch sees 2"):
        utils.choose_device("auto", "auto")


def test_deterministic_asks_for_it_on_cuda_only(two_gpus, monkeypatch):
    for device, deterministic in ("auto", False), ("cpu", True), ("auto", True):
        utils.choose_device(device, "auto", deterministic)
        assert torch.backends.cudnn.benchmark is not deterministic
    assert two_gpus == [False, False, True]
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
