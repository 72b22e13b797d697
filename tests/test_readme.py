"""The README: its percentages are those of the published pages, and its commands work."""

import importlib
import re
import shlex
import sys

import pytest
from conftest import ROOT, TINY, parse

import ex3_convnet
import ex3_pretrained

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = "\n".join(path.read_text(encoding="utf-8")
                  for path in sorted(ROOT.glob("figures/published/*/*/README.md")))
SCRIPTS = {"ex3_convnet.py": ex3_convnet, "ex3_pretrained.py": ex3_pretrained}

def test_every_percentage_stands_on_a_published_page():
    """With its deviation, where it has one: 83.9 %, or 96.7 ± 1.0 %."""
    number = r"\d+(?:\.\d+)?"
    percentages = re.findall(rf"({number}(?: ± {number})?) ?%", README)
    missing = [percentage for percentage in percentages
               if not re.search(rf"(?<![\d.]){re.escape(percentage)}(?!\.?\d)", PAGES)]
    assert missing == []

def test_every_command_that_runs_a_file_is_understood_and_both_scripts_have_some():
    text = README.replace("\\\n", " ")
    blocks = re.findall(r"^```.*?\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = "\n".join([*blocks, *re.findall(r"`([^`\n]+)`", README)])
    run_by_python = r"(?<![\w.])(?:python3?|py|torchrun|run)\s+(?:-\S+\s+)*(\S+\.py\b[^'#]*)"
    names = set()
    for part in re.split("&&|;|\n", lines):
        for command in re.findall(run_by_python, part):
            name, *flags = shlex.split(command)
            names.add(name)
            assert (ROOT / name).exists()
            if name in SCRIPTS:
                parse(*flags, script=SCRIPTS[name])
    assert {*SCRIPTS} <= names

def test_linked_files_and_pictures_exist():
    targets = re.findall(r"\]\(([^)\s]+)", README) + re.findall(r'(?:src|href)="([^"]+)"', README)
    paths = [target.partition("#")[0] for target in targets if "://" not in target]
    assert [path for path in paths if not (ROOT / path).exists()] == []

def test_it_is_read_in_a_few_minutes():
    lines = [line for line in README.splitlines() if not line.startswith("|")]
    assert len(" ".join(lines).split()) <= 1500

NOTEBOOK = f"""
import sys; sys.path.insert(0, "."); sys.argv.append("--of-the-kernel")
import ex3_convnet, utils
TINY = {TINY!r}
for rate in 0.001, 0.002:
    records = ex3_convnet.main([*TINY, f"--learning_rate={{rate}}"])
print("epochs:", len(records[0]["history"]["val_loss"]))
try:
    ex3_convnet.main(["--dropout=2"])
except utils.UserError as error:
    print("caught", error)
"""

def test_a_notebook_shows_figures_and_catches_errors(project, monkeypatch):
    """In the kernel of a notebook; its command line is not that of the script. A run shows the
    comparison of the runs and three figures of its own."""
    nbformat, nbclient = (pytest.importorskip(name) for name in ("nbformat", "nbclient"))
    monkeypatch.delenv("MPLBACKEND", raising=False)  # a notebook has its own
    run = f"%run ex3_convnet.py {' '.join(TINY)}"
    notebook = nbformat.v4.new_notebook(cells=[
        nbformat.v4.new_code_cell(source) for source in (NOTEBOOK, run)])
    nbclient.NotebookClient(notebook, timeout=200, resources={
        "metadata": {"path": str(project.folder)}}).execute()
    sys.modules.pop("ipykernel", None)  # imported on the way; this process is no kernel
    texts = ["".join(part.get("text", "") for part in cell.outputs) for cell in notebook.cells]
    pictures = [sum("image/png" in part.get("data", {}) for part in cell.outputs)
                for cell in notebook.cells]
    assert pictures == [8, 4]
    assert "epochs: 2\n" in texts[0]
    assert "caught argument --dropout: '2' must be" in texts[0]
    assert re.search("Last model .epoch 2", texts[1])

def test_the_benchmark_can_be_imported():
    """It is no test, and takes minutes; but it must not be left behind."""
    assert len(importlib.import_module("benchmark").ROWS) >= 8
