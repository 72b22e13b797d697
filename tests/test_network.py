"""The convnet: size, layers, initial weights, and that torchsummary leaves no trace."""

import copy

import pytest
import torch
from torch import nn

import ex3_convnet
import utils
from ex3_convnet import ConvNet, recalibrate


@pytest.mark.parametrize(("norm_flag", "size"), [(False, 7_678_474), (True, 7_682_826)])
def test_the_reports_model_sizes(norm_flag, size, capsys):
    model = ConvNet(norm_flag=norm_flag)
    assert utils.count_parameters(model) == size
    utils.print_summary(model, 32)
    output = capsys.readouterr().out
    assert f"Trainable params: {size:,}\n" in output  # as torchsummary counts them
    assert f"Model size: {size:,} trainable parameters" in output


def test_only_parameters_that_learn_count_as_trainable():
    model = ConvNet()
    model.layers[0].weight.requires_grad_(False)
    assert utils.count_parameters(model) == 7_678_474 - 128 * 27
    assert utils.count_parameters(model, trainable=False) == 7_678_474


@pytest.mark.parametrize(("norm_flag", "dropout"), [(False, 0), (True, 0), (False, 0.3),
                                                    (True, 0.3)])
def test_the_order_of_the_layers(norm_flag, dropout):
    layers = list(ConvNet(norm_flag, dropout).layers)
    block = [nn.Conv2d, *[nn.BatchNorm2d] * norm_flag, nn.MaxPool2d, nn.ReLU,
             *[nn.Dropout] * bool(dropout)]
    assert [type(layer) for layer in layers] == block * 5 + [nn.Flatten, nn.Linear]
    convolutions = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
    assert [c.out_channels for c in convolutions] == [128, 512, 512, 512, 512]
    assert all((c.kernel_size, c.stride, c.padding) == ((3, 3), (1, 1), (1, 1))
               for c in convolutions)
    assert all(layer.p == dropout for layer in layers if isinstance(layer, nn.Dropout))


def test_initial_weights():
    torch.manual_seed(0)
    model = ConvNet()
    head, first = model.layers[-1], model.layers[0]
    assert head.weight.std().item() == pytest.approx(0.001, rel=0.05)
    assert head.bias.abs().max() == 0
    torch.manual_seed(0)
    assert torch.equal(first.weight, nn.Conv2d(3, 128, 3).weight)  # PyTorch's default


@pytest.mark.parametrize(("size", "classes"), [(32, 10), (33, 2), (64, 3)])
def test_shapes(size, classes):
    model = ConvNet(num_classes=classes, image_size=size).eval()
    assert model(torch.zeros(2, 3, size, size)).shape == (2, classes)


def test_the_summary_changes_neither_the_model_nor_the_random_state(capsys):
    model = ConvNet(norm_flag=True).train()
    before, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    utils.print_summary(model, 32)
    assert torch.equal(random_state, torch.get_rng_state())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_recalibration_estimates_the_statistics_with_dropout_off(few, monkeypatch):
    """Against the means and variances of what each batch norm of the copy gets as its input."""
    monkeypatch.setattr(ex3_convnet, "CHANNELS", (32, 64, 64, 64, 64))
    data = few  # 60 images
    torch.manual_seed(0)
    model = ConvNet(norm_flag=True, dropout=0.8).train()
    for _ in range(5):  # dropout makes the variances of the moving statistics far too large
        model(data.batch(data.train)[0])
    before = copy.deepcopy(model.state_dict())
    recalibrated = recalibrate(model, data, torch.float32, batch_size=60)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())

    inputs = {}
    norms = [layer for layer in recalibrated.modules() if isinstance(layer, nn.BatchNorm2d)]
    for layer in norms:
        layer.register_forward_pre_hook(lambda layer, args: inputs.update({layer: args[0]}))
    recalibrated.train()
    for layer in recalibrated.modules():
        if isinstance(layer, nn.Dropout):
            layer.eval()
    expected = [(layer.running_mean.clone(), layer.running_var.clone()) for layer in norms]
    recalibrated(data.batch(data.train)[0])
    moved = [layer.running_var for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    for layer, (mean, variance) in zip(norms, expected):
        assert torch.allclose(mean, inputs[layer].mean((0, 2, 3)), atol=1e-4, rtol=1e-3)
        assert torch.allclose(variance, inputs[layer].var((0, 2, 3)), atol=1e-4, rtol=1e-3)
    assert not torch.allclose(expected[-1][1], moved[-1], rtol=0.2)
    parts = recalibrate(model, data, torch.float32, batch_size=59)  # not 59 images and one
    assert torch.allclose(parts.layers[1].running_mean, expected[0][0], atol=1e-5)


def test_a_batch_too_small_for_batch_norm_is_refused():
    """Of vectors only: of images it has many values in one."""
    utils.check_batches(nn.Sequential(nn.BatchNorm2d(3)), 1)
    utils.check_batches(nn.Sequential(nn.BatchNorm1d(3)), 2)
    with pytest.raises(utils.Problem, match="at least 2 images") as problem:
        utils.check_batches(nn.Sequential(nn.BatchNorm1d(3)), 1)
    assert problem.value.status == 2
