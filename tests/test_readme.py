"""The README: its commands parse, its links lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest

import ex3_convnet
import ex3_pretrained
import utils

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
SCRIPTS = {"ex3_convnet.py": ex3_convnet, "ex3_pretrained.py": ex3_pretrained}
CALLS = [call.strip() for block in BLOCKS for call in re.split(r"&&|\n", block) if call.strip()]


@pytest.mark.parametrize("call", [call for call in CALLS if "ex3_" in call])
def test_a_command_parses(call):
    call = call.replace("torchrun --nproc_per_node=4", "python")
    python, script, *arguments = shlex.split(call, comments=True)
    assert python in (".venv/bin/python", "python")
    if arguments == ["--help"]:
        with pytest.raises(SystemExit) as end:
            utils.parse_flags(vars(SCRIPTS[script]), arguments)
        assert end.value.code == 0
    else:
        flags = utils.parse_flags(vars(SCRIPTS[script]), arguments)
        utils.plan(flags, SCRIPTS[script].QUESTIONS)
        assert {a.removeprefix("--").split("=")[0] for a in arguments if a.startswith("--")} == (
            flags.given)


def test_the_first_command_sets_up_everything_and_the_last_one_tests_it():
    for block in (BLOCKS[0], BLOCKS[-1]):
        assert block.startswith(
            "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt")
    assert "--dataset=synthetic" in BLOCKS[0]
    assert ".venv/bin/ruff check . && .venv/bin/pytest " in BLOCKS[-1]


def test_every_other_command_is_known():
    known = (".venv/bin/python ", ".venv/bin/torchrun ", "python3 -m venv .venv",
             ".venv/bin/pip install -r requirements", ".venv/bin/ruff check .", ".venv/bin/pytest",
             "pip install -r requirements.txt", "python ex3_convnet.py ")
    assert all(call.startswith(known) for call in CALLS)


def test_links_lead_somewhere():
    links = re.findall(r"(?:\]\(|src=\")([^)#:\"]+)[)\"]", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
