"""The precision of the arithmetic: a run keeps its own, and float16 with its scaled loss."""

from functools import partial

import pytest
import torch
from conftest import DATA, LATEST, SHORT, clear, interrupted, outcome

import ex3_convnet
import utils

AUTO = [*SHORT, "--precision=auto"]


# ---------------------------------- a run keeps its precision ----------------------------------


@pytest.fixture
def native(monkeypatch):
    """A function that sets the dtypes which the device multiplies at full speed, the best first."""
    def native(*dtypes):
        monkeypatch.setattr(utils, "native_dtypes", lambda _: list(dtypes))
    return native


def test_a_run_goes_on_in_the_precision_that_it_began_with(small, native):
    """Here it would begin with another; the record and the weights are those of one machine."""
    native(torch.bfloat16, torch.float32)
    ex3_convnet.main(AUTO)
    whole = outcome(small)
    clear(small)
    with interrupted(2):
        ex3_convnet.main(AUTO)
    native(torch.float32, torch.bfloat16)
    ex3_convnet.main([*AUTO, "--resume"])
    assert outcome(small) == whole
    assert whole[LATEST]["precision"] == "bfloat16"


def test_a_precision_that_is_not_native_here_is_changed_and_the_record_tells(
        small, epochs, native, capsys):
    native(torch.bfloat16, torch.float32)
    with interrupted(2):
        ex3_convnet.main([*AUTO, "--num_epochs=4"])
    native(torch.float32)
    with interrupted(3):
        ex3_convnet.main([*AUTO, "--num_epochs=4", "--resume"])
    told = "bfloat16, float32 from epoch 2"
    assert "The run was in bfloat16 last, and goes on in float32" in (
        capsys.readouterr().out)
    record, = ex3_convnet.main([*AUTO, "--num_epochs=4", "--resume"])["none"][""]
    assert record["precision"] == told  # it changed once, though it was interrupted again
    assert "not native" not in capsys.readouterr().out
    assert len(epochs) == 2 + 3 + 1


def test_back_on_the_first_machine_the_first_precision_returns(small, native, capsys):
    native(torch.bfloat16, torch.float32)
    with interrupted(2):
        ex3_convnet.main([*AUTO, "--num_epochs=3"])
    native(torch.float32)
    with interrupted(2):
        ex3_convnet.main([*AUTO, "--num_epochs=3", "--resume"])
    native(torch.bfloat16, torch.float32)
    capsys.readouterr()
    record, = ex3_convnet.main([*AUTO, "--num_epochs=3", "--resume"])["none"][""]
    told = "bfloat16, float32 from epoch 2, bfloat16 from epoch 3"
    assert record["precision"] == told
    output = capsys.readouterr().out
    assert told in output
    assert "The run was in float32 last, and goes on in bfloat16" in output


def test_an_explicit_precision_goes_on_only_in_itself(small, native, epochs, capsys):
    native(torch.bfloat16, torch.float32)
    with interrupted(2):
        ex3_convnet.main(AUTO)
    ex3_convnet.main([*SHORT, "--precision=bfloat16", "--resume"])
    assert "Resumed after epoch 1" in capsys.readouterr().out
    ex3_convnet.main([*SHORT, "--precision=float32", "--resume"])
    assert "is of another experiment (precision)" in capsys.readouterr().out
    assert len(epochs) == 2 + 1 + 2


# ------------------------------------------- float16 -------------------------------------------

HALF_PRECISION = [*SHORT, "--precision=float16", "--norm_flag"]


def test_float16_learns(small, few, monkeypatch):
    """To tell dark images from bright ones; the more frequent class alone would be 61 %."""
    few.labels %= 2
    few.images = (100 + 100 * few.labels).byte().view(-1, 1, 1, 1).expand(few.images.shape)
    dtypes, forward = set(), ex3_convnet.ConvNet.forward

    def watch(model, images):
        logits = forward(model, images)
        dtypes.add(logits.dtype)
        return logits

    monkeypatch.setattr(ex3_convnet.ConvNet, "forward", watch)
    argv = [*HALF_PRECISION, "--num_epochs=6", "--batch_size=10", "--learning_rate=0.01"]
    record, = ex3_convnet.main(argv)["none"][""]
    assert record["precision"] == "float16"
    assert torch.float16 in dtypes
    assert record["result"]["test_accuracy"] > 0.9


@pytest.fixture
def large_scale(monkeypatch):
    """The loss is scaled so much at first that the gradients overflow in float16."""
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**21))


def test_an_overflow_skips_its_step_and_the_run_goes_on(small, large_scale):
    ex3_convnet.main([*HALF_PRECISION, "--num_epochs=4"])
    state = utils.load_checkpoint(small / f"latest_model_convnet-batch-norm_{DATA}.ckpt")
    steps = {int(part["step"]) for part in state["optimizer"]["state"].values()}
    skipped = 4 * 3 - steps.pop()
    assert not steps
    assert 1 <= skipped < 4 * 3
    assert state["scaler"]["scale"] == 2.0**(21 - skipped)
    assert all(value.isfinite().all() for value in state["model"].values())


def test_float16_resumes_with_the_scale_of_its_loss(small, large_scale, monkeypatch):
    """To the bit; a scaler without its state would skip other steps."""
    ex3_convnet.main(HALF_PRECISION)
    whole = outcome(small)
    clear(small)
    with interrupted(2):
        ex3_convnet.main(HALF_PRECISION)
    monkeypatch.setattr(torch.amp, "GradScaler", torch.amp.grad_scaler.GradScaler)
    ex3_convnet.main([*HALF_PRECISION, "--resume"])
    assert outcome(small) == whole


@pytest.mark.parametrize(("before", "after"), [("float16", "bfloat16"), ("bfloat16", "float16")])
def test_a_run_can_go_on_in_and_out_of_float16(small, native, epochs, before, after):
    """Where its own precision is not native; only float16 has a scale."""
    native(getattr(torch, before))
    with interrupted(2):
        ex3_convnet.main(AUTO)
    native(getattr(torch, after))
    record, = ex3_convnet.main([*AUTO, "--resume"])["none"][""]
    assert record["precision"] == f"{before}, {after} from epoch 2"
    assert len(epochs) == 2 + 1
