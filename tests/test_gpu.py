"""The GPU: without one, that every tensor would be on it; with one, that it trains like the CPU."""

from functools import partial

import pytest
import torch
from conftest import FULL, HALF, clear, interrupted, outcome, parse
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from tqdm import tqdm

import ex3_convnet
import ex3_pretrained
import utils

DEVICE = torch.device("cuda", 0)
ALL = "+".join(utils.AUGMENTATIONS)
BAR = tqdm(disable=True)  # also in a terminal: to draw the loss is to read it
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU")
with_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

# --------------------------------------- without a GPU ---------------------------------------


@pytest.fixture
def reads(monkeypatch):
    """PyTorch with fake tensors, which have a shape and a device, but no numbers: an operation on
    two devices fails as on a real GPU. A list of the devices that numbers were read from."""
    devices = []

    def read(number, real=torch.Tensor.item):
        if not isinstance(number, FakeTensor):
            return real(number)
        devices.append(number.device.type)
        return len(devices) % 4 if number.dtype == torch.int64 else 1.0  # four are an order

    monkeypatch.setattr(torch.Tensor, "item", read)
    monkeypatch.setattr(nn.Module, "to", lambda model, *_, **__: model)  # not for fake ones
    monkeypatch.setattr(utils, "check_memory", lambda *_: None)
    monkeypatch.setattr(utils, "draw_synthetic", partial(utils.draw_synthetic, 80, 30))
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield devices


def fake_epoch(script, flags, model, data, dtype, monkeypatch):
    """One epoch of training, but for the gradients, whose real computation asks for the driver."""
    def backward(loss):
        assert loss.device == DEVICE
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    epoch_of(script, flags, model, data, dtype)


def epoch_of(script, flags, model, data, dtype):
    """One epoch of training as the script trains it."""
    optimizer, _ = script.make_optimizer(model, flags)
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
    order, augment, _ = utils.seed_epoch(0, 1, flags.augmentation)
    batches = utils.shuffled_batches(data.train, 20, order)
    utils.train_one_epoch(model, data, batches, augment, optimizer, scaler, dtype, BAR)


@without_gpu
@pytest.mark.filterwarnings("ignore:CUDA is not available", "ignore:.*GradScaler is enabled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("script", "argv"), [
    (ex3_convnet, ["--norm_flag", "--dropout=0.3", f"--augmentation={ALL}"]),
    (ex3_pretrained, ["--pretrained=False"])])
def test_everything_is_on_the_gpu_and_no_step_waits_for_it(
        script, argv, dtype, reads, bare_vgg, monkeypatch):
    flags = parse(*argv, script=script)
    data = utils.load_data("synthetic", 40, None, None, HALF, HALF, DEVICE)
    with DEVICE:
        model = script.build(flags, 10)
    reads.clear()
    fake_epoch(script, flags, model, data, dtype, monkeypatch)
    assert reads.count("cuda") == 2  # the mean loss and the accuracy, at the end
    logits = utils.compute_logits(model, data, data.test, dtype, utils.make_augment(
        flags.augmentation, torch.Generator()))
    assert (logits.device, logits.shape) == (DEVICE, (30, 10))


@without_gpu
@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_the_fixed_features_stay_on_the_gpu(reads, bare_vgg, monkeypatch):
    flags = parse("--fine_tune=False", script=ex3_pretrained)
    data = utils.load_data("synthetic", 32, None, None, HALF, HALF, DEVICE)
    with DEVICE:
        model = ex3_pretrained.build(flags, 10)
    data = ex3_pretrained.extract_features(model, data, torch.bfloat16, mirror=True)
    assert (data.features.device, data.features.shape) == (DEVICE, (2, 110, 512))
    reads.clear()
    fake_epoch(ex3_pretrained, flags, model, data, torch.bfloat16, monkeypatch)
    assert reads.count("cuda") == 2


# ---------------------------------------- with a GPU ----------------------------------------

GPU = "--device=cuda"
LEARNS = ["--dataset=synthetic", "--num_training=1000", "--num_validation=200", "--num_epochs=3",
          "--batch_size=50", "--learning_rate=0.01", "--norm_flag"]


@pytest.fixture
def losses(folder, small_convnet, no_drawing):
    """A function that trains the small convnet, and returns its loss in each of three epochs."""
    def run(*argv):
        record, = ex3_convnet.main([*LEARNS, *argv])["none"][""]
        return record["history"]["train_loss"]
    return run


@with_gpu
@pytest.mark.parametrize("technique", utils.AUGMENTATIONS)
def test_a_gpu_augments_like_the_cpu(technique, synthetic):
    """The draws are the same; a pixel on the edge between two may be the one or the other."""
    on_cpu, on_gpu = (utils.make_augment(technique, torch.Generator().manual_seed(0))(
        synthetic.images[:100].to(device).float() / 255).cpu() for device in ("cpu", DEVICE))
    change = (on_cpu - synthetic.images[:100] / 255).abs().mean()
    assert (on_cpu - on_gpu).abs().mean() < 0.1 * change


@with_gpu
def test_a_gpu_trains_like_the_cpu(losses):
    on_cpu, on_gpu = (losses("--precision=float32", device) for device in ("--device=cpu", GPU))
    assert on_gpu[0] == pytest.approx(on_cpu[0], rel=0.002)
    assert max(on_cpu[-1], on_gpu[-1]) < 1.9  # at chance 2.3


@with_gpu
@pytest.mark.parametrize("script", [ex3_convnet, ex3_pretrained])
def test_no_step_waits_for_the_gpu(script, bare_vgg, monkeypatch):
    """Frozen features are mirrored in a way of their own."""
    convnet = script is ex3_convnet
    flags = parse("--norm_flag", "--dropout=0.3", f"--augmentation={ALL}") if convnet else parse(
        "--fine_tune=False", script=script)
    data = utils.load_data("synthetic", 32, 1000, 200, HALF, HALF, DEVICE)
    model = script.build(flags, 10)
    utils.place(model, DEVICE)
    if not convnet:
        data = script.extract_features(model, data, torch.float16, mirror=True)
    monkeypatch.setattr(utils, "all_reduce_mean", lambda *_, **__: None)  # it waits, once an epoch
    for mode in ("default", "error"):  # in the first epoch cuDNN tries its algorithms
        torch.cuda.set_sync_debug_mode(mode)
        epoch_of(script, flags, model, data, torch.float16)
    torch.cuda.set_sync_debug_mode("default")


@with_gpu
@pytest.mark.parametrize("how", ["--precision=bfloat16", "--precision=float16", "--compile"])
def test_in_half_precision_and_compiled_a_gpu_learns(losses, how):
    assert losses(how, GPU)[-1] < 1.9


@with_gpu
def test_the_peak_memory_of_a_run_is_its_own(folder, small_convnet, no_drawing):
    large, small = (ex3_convnet.main([*LEARNS, GPU, f"--batch_size={size}"])["none"][""][0]
                    for size in (1000, 10))
    assert 0 < small["peak_memory_mb"] < large["peak_memory_mb"]


@with_gpu
def test_a_deterministic_run_on_a_gpu_is_the_same_each_time_and_when_resumed(
        folder, small_convnet, no_drawing):
    argv = [*FULL, GPU, "--deterministic"]
    ex3_convnet.main(argv)
    whole = outcome(folder)
    clear(folder)
    with interrupted(2):
        ex3_convnet.main(argv)
    ex3_convnet.main([*argv, "--resume"])
    assert outcome(folder) == whole
