"""Winograd's convolution: the same numbers as PyTorch's, in the layers where it pays."""

import copy
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, parse
from torch import nn

import ex3_convnet
import utils


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("batch", "height", "width"), [
    (1, 4, 4), (2, 5, 4), (3, 7, 10), (1, 8, 8), (2, 16, 13), (1, 1, 9), (2, 3, 2), (0, 8, 8)])
def test_results_and_gradients_are_those_of_pytorchs_convolution(
        batch, height, width, bias, layout):
    torch.manual_seed(0)
    sizes = [(batch, 5, height, width), (3, 5, 3, 3), (3,)]
    images, weight, bias_values = (torch.randn(size, dtype=torch.float64) for size in sizes)
    inputs = [images.to(memory_format=layout), weight.to(memory_format=layout)]
    if bias:
        inputs.append(bias_values)
    for values in inputs:
        values.requires_grad_()
    images, weight, bias = (*inputs, None)[:3]
    ours = utils.winograd_conv2d(images, weight, bias)
    theirs = F.conv2d(images, weight, bias, padding=1)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    upstream = torch.randn(theirs.shape, dtype=torch.float64)
    gradients = torch.autograd.grad(ours, inputs, upstream)
    expected = torch.autograd.grad(theirs, inputs, upstream)
    torch.testing.assert_close(gradients, expected, rtol=1e-10, atol=1e-10)

def test_its_gradients_are_those_of_finite_differences():
    torch.manual_seed(0)
    sizes = [(2, 3, 5, 6), (2, 3, 3, 3), (2,)]
    inputs = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]
    assert torch.autograd.gradcheck(utils.winograd_conv2d, inputs)

def results(layer, images):
    """What a layer makes of images, without gradients."""
    with torch.inference_mode():
        return layer(images)

def changes(layer, size):
    """Whether use_winograd changes the last digits of a layer's results; the first ones must not
    change."""
    images = torch.randn(size, generator=torch.Generator().manual_seed(0))
    before = results(layer, images)
    utils.use_winograd(layer)
    after = results(layer, images)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    return not torch.equal(after, before)

@pytest.mark.parametrize(("height", "width", "expected"), [
    (4, 4, True), (9, 14, True), (3, 9, False), (9, 3, False)])
def test_a_convolution_of_64_channels_is_computed_by_winograd_from_4_pixels_on(
        height, width, expected):
    assert changes(nn.Conv2d(64, 64, 3, padding=1), (2, 64, height, width)) == expected

@pytest.mark.parametrize("options", [
    {"padding": 0}, {"padding": 2}, {"padding": (1, 0)}, {"padding": 1, "stride": 2},
    {"padding": 1, "stride": (1, 2)}, {"padding": 1, "groups": 2}, {"padding": 1, "dilation": 2},
    {"padding": 2, "dilation": 2}, {"padding": 1, "padding_mode": "reflect"},
    {"padding": 1, "kernel_size": 1}, {"padding": 1, "kernel_size": (3, 1)},
    {"padding": 2, "kernel_size": 5}, {"padding": 1, "in_channels": 63},
    {"padding": 1, "out_channels": 63}])
def test_another_convolution_stays_direct(options):
    layer = nn.Conv2d(**{"in_channels": 64, "out_channels": 64, "kernel_size": 3, **options})
    assert not changes(layer, (2, layer.in_channels, 8, 9))

@pytest.mark.parametrize(("dtype", "expected"), [("float32", True), ("bfloat16", False)])
def test_a_network_is_prepared_with_it_in_float32_only(dtype, expected):
    model = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1)).to(memory_format=torch.channels_last)
    images = torch.randn(2, 64, 8, 8).to(memory_format=torch.channels_last)
    before = results(model, images)
    utils.prepare_model(model, parse(), getattr(torch, dtype))
    assert torch.equal(results(model, images), before) is not expected

def test_a_layer_stays_a_convolution_and_keeps_its_hooks():
    layer = nn.Conv2d(64, 64, 3, padding=1)
    calls = []
    layer.register_forward_hook(lambda *arguments: calls.append("called"))
    utils.use_winograd(layer)
    assert layer(torch.randn(64, 8, 8)).shape == (64, 8, 8)  # one image, without a batch
    assert isinstance(layer, nn.Conv2d)
    assert (layer.out_channels, layer.kernel_size, calls) == (64, (3, 3), ["called"])

def test_images_with_another_number_of_channels_are_an_error():
    layer = nn.Conv2d(128, 64, 3, padding=1, bias=False)
    utils.use_winograd(layer)
    with pytest.raises(RuntimeError):
        layer(torch.randn(2, 64, 8, 8))

def test_the_state_dict_does_not_change():
    model = ex3_convnet.ConvNet(norm_flag=True)
    state = copy.deepcopy(model.state_dict())
    utils.prepare_model(model, parse(), torch.float32)
    assert [*model.state_dict()] == [*state]
    for name, values in model.state_dict().items():
        assert torch.equal(values, state[name])

def test_a_resumed_run_ends_as_one_that_was_not_interrupted(
        folder, few, no_figures, monkeypatch):
    monkeypatch.setattr(ex3_convnet, "CHANNELS", (64, 64, 64, 64, 8))
    whole, = ex3_convnet.main(TINY)
    ex3_convnet.main([*TINY, "--num_epochs=1"])
    resumed, = ex3_convnet.main([*TINY, "--resume"])
    assert resumed["history"]["train_loss"] == whole["history"]["train_loss"]
    assert resumed["filters"] == whole["filters"]

def test_the_convnet_trains_with_it_as_without(folder, few, no_figures, monkeypatch):
    monkeypatch.setattr(ex3_convnet, "CHANNELS", (128, 128, 128, 128, 8))  # 2x2 pixels at last
    losses = []
    for use in utils.use_winograd, lambda model: None:
        monkeypatch.setattr(utils, "use_winograd", use)
        record, = ex3_convnet.main([*TINY, "--norm_flag", "--num_training=40", "--batch_size=10"])
        losses.append(record["history"]["train_loss"])
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)

@pytest.mark.parametrize(("flags", "expected"), [([], []), (["--compile"], ["ConvNet"])])
def test_the_network_is_compiled_if_that_is_asked_for(
        folder, few, no_figures, small_convnet, monkeypatch, flags, expected):
    compiled = []

    def compile_nothing(model, **_):
        compiled.append(type(model).__name__)

    monkeypatch.setattr(nn.Module, "compile", compile_nothing)
    ex3_convnet.main([*TINY, *flags])
    assert compiled == expected

@pytest.mark.skipif(not shutil.which("c++"), reason="there is no C++ compiler")
def test_a_compiled_network_computes_the_same():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU())
    images = torch.randn(2, 64, 6, 6)
    expected = results(copy.deepcopy(model), images)
    utils.prepare_model(model, parse("--compile"), torch.float32)
    torch.testing.assert_close(results(model, images), expected, rtol=1e-4, atol=1e-4)
