"""The README: its numbers are those of the published pages, and its commands work."""

import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT, TINY, parse

import ex3_convnet
import ex3_pretrained

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = "\n".join(path.read_text(encoding="utf-8")
                  for path in sorted(ROOT.glob("figures/published/*/*/README.md")))
COMMANDS = [shlex.split(line, comments=True) for line in README.splitlines()
            if re.match(r"\.venv/bin/(python|torchrun) ", line)]


def test_findings_are_those_of_the_published_pages():
    lines = [re.sub(r" \(Table.*", "", line) for line in README.splitlines()
             if line.startswith(("- ✓", "- ✗", "- ?", "Of "))]
    assert len(lines) >= 8
    for line in lines:
        assert line in PAGES.splitlines(), line
    spread = re.search(r"training accuracy is (.+ ± .+) %, the report's (.+?)\.\n", README)
    assert f"| without batch norm | {spread[1]} (report {spread[2]})" in PAGES


def test_every_claim_that_holds_is_in_the_readme():
    holds = [line for line in PAGES.splitlines() if line.startswith("- ✓")]
    assert holds
    assert [line for line in holds if line not in README] == []


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command[1:])[:70])
def test_every_command_is_understood(command):
    script = {"ex3_convnet.py": ex3_convnet, "ex3_pretrained.py": ex3_pretrained}
    name = next((word for word in command if word in script), None)
    if name:
        parse(*command[command.index(name) + 1:], script=script[name])
    else:
        assert (ROOT / command[1]).exists()


def test_questions_and_files_of_the_readme_exist():
    questions = re.findall(r"^\| `(\d\w?)`", README, re.MULTILINE)
    assert sorted(questions) == sorted({*ex3_convnet.QUESTIONS, *ex3_pretrained.QUESTIONS})
    for path in re.findall(r"\]\(([\w/.-]+)\)", README) + re.findall('src="([^"]+)"', README):
        assert (ROOT / path).exists(), path
    assert len(README.split()) <= 1400


NOTEBOOK = f"""
import sys; sys.path.insert(0, "."); sys.argv.append("--of-the-kernel")
import ex3_convnet, utils
TINY = {TINY!r}
for rate in 0.001, 0.002:
    records = ex3_convnet.main([*TINY, f"--learning_rate={{rate}}"])
print(sorted(records[0])[:3], len(records[0]["history"]["val_loss"]))
try:
    ex3_convnet.main(["--dropout=2"])
except Exception as problem:
    print("caught", problem)
"""


def test_a_notebook_shows_figures_and_catches_problems(project):
    """In the kernel of a notebook; its command line is not that of the script."""
    nbformat, nbclient = (pytest.importorskip(name) for name in ("nbformat", "nbclient"))
    run = f"%run ex3_convnet.py {' '.join(TINY)}"
    notebook = nbformat.v4.new_notebook(cells=[
        nbformat.v4.new_code_cell(source) for source in (NOTEBOOK, run)])
    nbclient.NotebookClient(notebook, timeout=200, resources={
        "metadata": {"path": str(project.folder)}}).execute()
    sys.modules.pop("ipykernel", None)  # imported on the way; this process is no kernel
    texts = ["".join(part.get("text", "") for part in cell.outputs) for cell in notebook.cells]
    pictures = [sum("image/png" in part.get("data", {}) for part in cell.outputs)
                for cell in notebook.cells]
    assert pictures == [6, 3]
    assert "['classes', 'commit', 'compile'] 2" in texts[0]
    assert "caught argument --dropout: '2' must be" in texts[0]
    assert "Last model, epoch 2" in texts[1]


def test_the_benchmark_can_be_imported():
    """It is no test, and takes minutes; but it must not be left behind."""
    done = subprocess.run([sys.executable, "-c", "import sys; sys.path.insert(0, 'tests'); "
                           "import benchmark; print(len(benchmark.ROWS))"], cwd=ROOT,
                          capture_output=True, text=True, check=True)
    assert int(done.stdout) >= 8
