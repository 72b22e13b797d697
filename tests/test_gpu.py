"""The GPU: without one, that every tensor would be on it; with one, that it trains like the CPU."""

import pytest
import torch
from conftest import TINY, parse
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import ex3_convnet
import ex3_pretrained
import utils

GPU, DEVICE = torch.cuda.is_available(), torch.device("cuda", 0)
with_gpu = pytest.mark.skipif(not GPU, reason="there is no GPU")


@pytest.fixture
def reads(small, tiny_vgg, monkeypatch):
    """The devices from which numbers are read. Without a GPU PyTorch has fake tensors here, which
    have a shape and a device, but no numbers: an operation on two devices fails as on a real one.
    Only gradients, which ask for its driver, are not computed."""
    devices, item = [], torch.Tensor.item

    def read(number):
        devices.append(number.device.type)
        if isinstance(number, FakeTensor):
            return len(devices) % 4 if number.dtype == torch.int64 else 1.0  # four are an order
        if number.device.type == "cpu":
            return item(number)
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("default")
        value = item(number)
        torch.cuda.set_sync_debug_mode(mode)
        return value

    monkeypatch.setattr(torch.Tensor, "item", read)
    if GPU:
        yield devices
        torch.cuda.set_sync_debug_mode("default")
        return
    monkeypatch.setattr(nn.Module, "to", lambda model, *_, **__: model)  # not for fake ones
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield devices


@pytest.mark.filterwarnings("ignore:CUDA is not available", "ignore:.*GradScaler is enabled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("script", "argv"), [
    (ex3_convnet, ["--norm_flag", "--dropout=0.3",
                   f"--augmentation={'+'.join(utils.AUGMENTATIONS)}"]),
    (ex3_pretrained, ["--pretrained=none"]),
    (ex3_pretrained, ["--fine_tune=False"])])  # its features are computed once
def test_everything_is_on_the_gpu_and_no_step_waits_for_it(
        script, argv, dtype, reads, monkeypatch):
    flags = parse(*TINY, *argv, script=script)
    data = utils.load_data(flags, script.MEAN, script.STD, DEVICE)
    with DEVICE:
        model = script.build(flags, 10)
    utils.place(model, DEVICE, flags)
    optimizer, _ = script.make_optimizer(model, flags)
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
    if "--fine_tune=False" in argv:
        data = script.extract_features(model, data, dtype, mirror=True)
        assert (data.features.device, data.features.shape) == (DEVICE, (2, 180, 512))

    def backward(loss):
        assert loss.device == DEVICE
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None

    if not GPU:
        monkeypatch.setattr(torch.Tensor, "backward", backward)
    for mode in ("default", "error"):  # in the first epoch cuDNN tries its algorithms
        reads.clear()
        if GPU:  # from now on only the reads above may wait
            torch.cuda.set_sync_debug_mode(mode)
        order, augment, _ = utils.seed_epoch(0, 1, flags.augmentation)
        batches = utils.shuffled_batches(data.train, 20, order)
        utils.train_one_epoch(model, data, batches, augment, optimizer, scaler, dtype)
    assert reads.count("cuda") == 2  # the mean loss and the accuracy, at the end
    assert utils.compute_logits(model, data, data.test, dtype, augment).device == DEVICE


@with_gpu
@pytest.mark.parametrize("technique", utils.AUGMENTATIONS)
def test_a_gpu_augments_like_the_cpu(technique, few):
    """The draws are the same; a pixel on the edge between two may be the one or the other."""
    images = torch.from_numpy(utils.draw_synthetic()[1]).permute(0, 3, 1, 2) / 255
    on_cpu, on_gpu = (utils.make_augment(technique, torch.Generator().manual_seed(0))(
        images.to(device)).cpu() for device in ("cpu", DEVICE))
    assert (on_cpu - on_gpu).abs().mean() < 0.1 * (on_cpu - images).abs().mean()


@with_gpu
@pytest.mark.parametrize(("how", "error"), [
    ("--precision=float32", 0.002), ("--precision=bfloat16", 0.05), ("--precision=float16", 0.05),
    ("--compile", 0.05)])
def test_a_gpu_trains_like_the_cpu(folder, small_convnet, no_figures, how, error):
    """The small convnet; at chance its loss is 2.3."""
    argv = ["--dataset=synthetic", "--num_training=1000", "--num_validation=200", "--num_epochs=3",
            "--batch_size=50", "--learning_rate=0.01", "--norm_flag"]
    on_cpu, on_gpu = (ex3_convnet.main([*argv, *where])[-1]["history"]["train_loss"] for where in (
        ["--device=cpu", "--precision=float32"], ["--device=cuda", how]))
    assert on_gpu[0] == pytest.approx(on_cpu[0], rel=error)
    assert max(on_cpu[-1], on_gpu[-1]) < 1.9
