"""Where a script runs: in a notebook, beside one, under other streams, on other processors; and how
it is ended there."""

import io
import os
import signal
from functools import partial
from importlib.util import find_spec

import pytest
import torch
from conftest import ROOT, TINY, records_in

import ex3_convnet
import utils

INLINE = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}  # as a notebook exports it
CPU = torch.device("cpu")


def small_copy(folder):
    """A copy of the convnet and utils.py, whose settings are those of a run of a moment."""
    (folder / "utils.py").write_bytes((ROOT / "utils.py").read_bytes())
    source = (ROOT / "ex3_convnet.py").read_text()
    for old, new in (("(128, 512, 512, 512, 512)", "(8, 8, 8, 8, 8)"),
                     ('dataset: str = "cifar10"', 'dataset: str = "synthetic"'),
                     ("num_training: int | None = None", "num_training: int | None = 60"),
                     ("num_validation: int | None = None", "num_validation: int | None = 20"),
                     ("num_epochs: int = 20", "num_epochs: int = 1"),
                     ("batch_size: int = 200", "batch_size: int = 20")):
        assert old in source, old
        source = source.replace(old, new)
    (folder / "ex3_convnet.py").write_text(source)
    return folder


# ---------------------------------------- in a notebook ----------------------------------------


CELLS = {"run": "%run ex3_convnet.py --seed=1",
         "main after run": "results = main()",
         "import": "import ex3_convnet\nresults = ex3_convnet.main(['--seed=2'])",
         "main after import": "results = ex3_convnet.main()",
         "wrong flag": "%run ex3_convnet.py --dropout=1.5"}


@pytest.fixture(scope="module")
def notebook(tmp_path_factory):
    """The outputs of the cells, run one after the other in a kernel."""
    if not (find_spec("nbclient") and find_spec("ipykernel")):
        pytest.skip("nbclient and ipykernel are not installed")
    import nbclient
    import nbformat

    folder = small_copy(tmp_path_factory.mktemp("notebook"))
    cells = [nbformat.v4.new_code_cell(cell) for cell in CELLS.values()]
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MPLBACKEND", raising=False)
        patch.setenv("IPYTHONDIR", str(folder / "ipython"))
        nbclient.NotebookClient(
            nbformat.v4.new_notebook(cells=cells), timeout=120, kernel_name="python3",
            allow_errors=True, resources={"metadata": {"path": str(folder)}}).execute()
    return {name: cell.outputs for name, cell in zip(CELLS, cells)}


def streams(outputs):
    """What a cell wrote to stdout and to stderr."""
    return ["".join(output.text for output in outputs if output.get("name") == name)
            for name in ("stdout", "stderr")]


@pytest.mark.parametrize(("cell", "seed"), [
    ("run", 1), ("main after run", 0), ("import", 2), ("main after import", 0)])
def test_a_notebook_trains_with_progress_and_figures_in_it(notebook, cell, seed):
    """A kernel's own command line, which holds -f, is not taken for that of a script."""
    outputs = notebook[cell]
    out, err = streams(outputs)
    assert [output for output in outputs if output.output_type == "error"] == []
    assert f"ConvNet, seed {seed}, on synthetic: 60 training, 20 validation" in out
    assert "epoch  1/1:" in out
    assert "60/60" in err  # the bar
    assert "images/s" in err
    figures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(figures) == out.count("Figure: ") == 3


def test_a_wrong_flag_in_a_notebook_is_one_sentence(notebook):
    _, err = streams(notebook["wrong flag"])
    line, = err.strip().splitlines()
    assert line.startswith("ex3_convnet.py: --dropout: '1.5' is not possible")


def test_a_process_that_a_notebook_starts_does_not_draw_for_it(project):
    result = project("-c", "import utils; print(utils.plt.get_backend())", **INLINE)
    assert (result.returncode, result.stderr) == (0, "")
    assert "inline" not in result.stdout


@pytest.mark.parametrize("flags", [[], ["--help"]])
def test_the_backend_of_a_notebook_need_not_be_installed(project, flags):
    small_copy(project.folder)
    result = project("-c", "import runpy, sys; sys.modules['matplotlib_inline'] = None; sys.argv = "
                     f"['ex3_convnet.py', *{flags}]; runpy.run_path(sys.argv[0], run_name="
                     "'__main__')", **INLINE)
    assert (result.returncode, result.stderr) == (0, "")
    assert ("Figure: " in result.stdout) == (not flags)


# ---------------------------------- other streams and processes ----------------------------------


def test_streams_that_a_caller_has_replaced_are_written_to(
        few, folder, small_convnet, no_drawing, monkeypatch):
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setattr("sys.stderr", err)
    utils.run_script(partial(ex3_convnet.main, TINY))
    assert "epoch  1/1:" in out.getvalue()
    assert err.getvalue() == ""
    with pytest.raises(SystemExit):
        utils.run_script(partial(ex3_convnet.main, ["--dropout=2"]))
    assert "--dropout: '2' is not possible" in err.getvalue()


@pytest.mark.parametrize("names", [["RANK"], ["RANK", "WORLD_SIZE"], ["WORLD_SIZE"]])
def test_a_rank_of_another_program_is_a_single_run(
        few, folder, small_convnet, no_drawing, monkeypatch, names):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name in names:
        monkeypatch.setenv(name, "3")
    ex3_convnet.main(TINY)
    record, = records_in(folder)
    assert record["processes"] == 1


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_before_the_training_ends_the_script_with_a_sentence(capsys, name):
    number = getattr(signal, name)
    before = signal.signal(number, signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit) as end:
            utils.run_script(lambda: os.kill(os.getpid(), number))
        assert signal.getsignal(number) == signal.SIG_DFL  # as it was
    finally:
        signal.signal(number, before)
    assert end.value.code == 130
    line, = capsys.readouterr().err.splitlines()
    assert line.endswith(": interrupted")


def test_under_nohup_a_closed_terminal_does_not_end_the_script():
    ended, before = [], signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        utils.run_script(lambda: ended.append(os.kill(os.getpid(), signal.SIGHUP)))
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert ended == [None]


# --------------------------------------- other processors ---------------------------------------


@pytest.mark.parametrize(("flags", "native"), [
    ("fpu avx512f avx512_bf16", True), ("fpu amx_bf16 amx_tile", True), ("fpu avx512f", False)])
def test_a_processor_tells_its_name_and_whether_it_computes_bfloat16(monkeypatch, flags, native):
    text = f"processor\t: 0\nmodel name\t: A Processor @ 2 GHz\nflags\t\t: {flags}\n"
    monkeypatch.setattr(utils.Path, "exists", lambda self: True)
    monkeypatch.setattr(utils.Path, "read_text", lambda self: text)
    assert utils.processor() == ("A Processor @ 2 GHz", native)
    assert utils.native_dtypes(CPU) == [torch.bfloat16] * native + [torch.float32]
    assert utils.choose_device("cpu", "auto") == (CPU, [torch.float32, torch.bfloat16][native])


def test_a_system_that_does_not_tell_computes_in_float32(monkeypatch):
    monkeypatch.setattr(utils.Path, "exists", lambda self: False)
    assert utils.processor()[1] is False
    assert utils.native_dtypes(CPU) == [torch.float32]


@pytest.mark.parametrize(("bfloat16", "capability", "dtypes"), [
    (True, (8, 0), [torch.bfloat16, torch.float16, torch.float32]),
    (False, (7, 5), [torch.float16, torch.float32]),
    (False, (7, 0), [torch.float16, torch.float32]), (False, (6, 1), [torch.float32])])
def test_a_gpu_without_bfloat16_computes_in_float16_from_volta_on(
        monkeypatch, bfloat16, capability, dtypes):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert utils.native_dtypes(torch.device("cuda", 0)) == dtypes
