"""Flags: the settings at the top of a script, on the command line, and their errors."""

import os
import re
from pathlib import Path

import pytest
import torch
from conftest import parse

import ex3_convnet
import ex3_pretrained
import utils

NAMES = {"norm_flag", "earlystop", "patience", "dropout", "augmentation", "num_epochs",
         "batch_size", "learning_rate", "learning_rate_decay", "reg", "num_training",
         "num_validation", "seed", "dataset", "device"}


def test_defaults_are_the_settings_of_the_script():
    flags = vars(parse())
    assert flags.pop("given") == set()
    assert flags.pop("where_and_how") <= {"given", "where_and_how", *flags}
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


def test_an_edited_setting_is_checked_like_a_flag(monkeypatch):
    monkeypatch.setattr(ex3_convnet, "dropout", 1.5)
    with pytest.raises(utils.Problem, match=r"^line \d+ of ex3_convnet\.py: --dropout") as problem:
        parse()
    assert problem.value.status == 2


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
    "--device=gpu", "--device=cuda:256", "--device=cuda:07", "--precision=float8", "--monitor=test",
    "--num_training=0", "--unknown=1", "--norm", "positional", "--dataset=", "--predict=",
    "--num_validation=0", "--image_size=8"])
def test_a_wrong_flag_is_one_sentence_and_code_2(argument):
    with pytest.raises(utils.Problem) as problem:
        parse(argument)
    assert problem.value.status == 2
    assert "\n" not in str(problem.value)
    assert argument.split("=")[0] in str(problem.value)
    assert not str(problem.value).startswith("line ")  # the settings are right


def test_a_list_can_be_given_in_parts():
    assert parse("--predict", "a", "b", "--predict=c").predict == ["a", "b", "c"]


def test_a_misspelt_flag_gets_a_suggestion():
    with pytest.raises(utils.Problem, match="did you mean --num_epochs"):
        parse("--num_epoch=3")


@pytest.mark.parametrize("script", [ex3_convnet, ex3_pretrained])
def test_help_lists_every_flag_with_its_default_and_comment(capsys, script):
    with pytest.raises(SystemExit) as end:
        parse("--help", script=script)
    assert end.value.code == 0
    page = " ".join(capsys.readouterr().out.split())
    source = Path(script.__file__).read_text(encoding="utf-8")
    for name in vars(parse(script=script)).keys() - {"given", "where_and_how"}:
        comment = re.search(rf"^{name}: .*  # (.*)$", source, re.MULTILINE)[1]
        assert f"--{name} " in page
        assert f"{comment} (default: {getattr(script, name)})" in page
    assert "training recipe:" in page


def test_what_is_given_and_what_decides_the_result_is_told_apart():
    flags = parse("--num_epochs=3", "--device=cpu")
    assert flags.given == {"num_epochs", "device"}
    assert {"dataset", "device", "seeds", "resume", "predict"} <= flags.where_and_how
    what = flags.what()
    assert what["num_epochs"] == 3
    assert {"norm_flag", "num_training", "image_size"} <= set(what)
    assert not {"seed", "precision", "device", "given"} & set(what)
    other = flags.replace(num_epochs=4)
    assert (other.num_epochs, flags.num_epochs, other.given) == (4, 3, flags.given)


def test_a_path_counts_by_its_name_alone():
    one, two = (parse(f"--pretrained=/{place}/weights.pth", script=ex3_pretrained)
                for place in ("home/me", "tmp"))
    assert one.pretrained != two.pretrained
    assert one.what() == two.what()
    assert one.what()["pretrained"] == "weights.pth"


def test_more_devices_than_there_are():
    with pytest.raises(utils.Problem, match="cuda:99") as problem:
        utils.choose_device("cuda:99", "auto")
    assert problem.value.status == 2


@pytest.fixture
def two_gpus(monkeypatch):
    """Let PyTorch report two GPUs that compute bfloat16, and collect what is asked of it."""
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
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


def test_processes_that_share_a_run_cannot_share_a_gpu(two_gpus, monkeypatch):
    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "MASTER_ADDR": "localhost",
                        "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    device, _ = utils.choose_device("cuda:0", "float32")
    with pytest.raises(utils.Problem, match="cuda:0 is one GPU, .* give --device=cuda") as problem:
        utils.init_distributed("images", device)
    assert problem.value.status == 2
    utils.init_distributed("runs", device)  # they have nothing in common


def test_deterministic_asks_for_it_on_cuda_only(two_gpus, monkeypatch):
    for device, deterministic in ("auto", False), ("cpu", True), ("auto", True):
        utils.choose_device(device, "auto", deterministic)
        assert torch.backends.cudnn.benchmark is not deterministic
    assert two_gpus == [False, False, True]
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
