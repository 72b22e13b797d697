"""The GPU: everything is on it, no step waits for it, and it trains like the CPU.

Without a GPU PyTorch's device "meta" stands for it in the first test: its tensors have a shape, but
no numbers. To read one fails, and so do most operations on tensors of two devices.
"""

from contextlib import nullcontext

import pytest
import torch
from conftest import TINY, parse

import ex3_convnet
import ex3_pretrained
import utils

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if GPU else torch.device("meta")
FLOAT32 = torch.float32
with_gpu = pytest.mark.skipif(not GPU, reason="there is no GPU")

@pytest.fixture
def reads(monkeypatch):
    """The devices from which item() reads numbers; nothing else may wait for the GPU."""
    devices, item = [], torch.Tensor.item

    def read(number):
        devices.append(number.device.type)
        if number.device.type == "meta":
            return 1.0
        if number.device.type == "cpu":
            return item(number)
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("default")
        value = item(number)
        torch.cuda.set_sync_debug_mode(mode)
        return value

    monkeypatch.setattr(torch.Tensor, "item", read)
    yield devices
    if GPU:
        torch.cuda.set_sync_debug_mode("default")

@pytest.mark.parametrize("dtype", [FLOAT32, pytest.param(torch.float16, marks=with_gpu)])
@pytest.mark.parametrize(("script", "argv"), [
    (ex3_convnet, ["--norm_flag", "--dropout=0.3",
                   f"--augmentation={'+'.join(utils.AUGMENTATIONS)}"]),
    (ex3_pretrained, ["--pretrained=none"]),
    (ex3_pretrained, ["--fine_tune=False"])])  # its features are computed once
def test_everything_is_on_the_gpu_and_no_step_waits_for_it(
        script, argv, dtype, small, tiny_vgg, reads, monkeypatch):
    settings = parse(*TINY, *argv, script=script)
    data = utils.load_data(settings, script.MEAN, script.STD, DEVICE)
    for tensor in data.images, data.labels, data.train, data.val, data.test, data.mean, data.std:
        assert tensor.device == DEVICE
    model = script.build_model(settings, 10).to(DEVICE)
    utils.prepare_model(model, settings, dtype)
    optimizer, _ = script.make_optimizer(model, settings)
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=dtype == torch.float16)
    if not GPU:  # what "meta" cannot do
        monkeypatch.setattr(utils, "autocast", lambda *_: nullcontext())
        optimizer.param_groups[0]["fused"] = False
    if script is ex3_pretrained:
        model, data = script.cache_features(model, data, settings.augmentation, dtype)
        assert isinstance(data, ex3_pretrained.FeatureData) == ("--fine_tune=False" in argv)
    for mode in ("default", "error"):  # in the first epoch cuDNN tries its algorithms
        reads.clear()
        if GPU:  # from now on only the reads above may wait
            torch.cuda.set_sync_debug_mode(mode)
        shuffle, draws, _ = utils.seed_epoch(0, 1)
        augment = utils.make_augment(settings.augmentation, draws)
        batches = data.batches(data.train, 20, shuffle, augment)
        utils.train_one_epoch(model, batches, optimizer, scaler, dtype)
    assert reads.count(DEVICE.type) == 2  # the mean loss and the accuracy, at the end
    for result in utils.predict_logits(model, data.batches(data.test), dtype):
        assert (result.device, len(result)) == (DEVICE, 100)

@with_gpu
@pytest.mark.parametrize("technique", utils.AUGMENTATIONS)
def test_a_gpu_augments_like_the_cpu(technique, few):
    """The draws are the same; a pixel on the edge between two may be the one or the other."""
    _, _, pictures, _, _ = utils.make_synthetic()
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255
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
    losses = []
    for where in ["--device=cpu", "--precision=float32"], ["--device=cuda", how]:
        *_, record = ex3_convnet.main([*argv, *where])
        losses.append(record["history"]["train_loss"])
    on_cpu, on_gpu = losses
    assert on_gpu[0] == pytest.approx(on_cpu[0], rel=error)
    assert max(on_cpu[-1], on_gpu[-1]) < 1.9
