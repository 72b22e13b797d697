"""Training: the network, an epoch and a run against plain loops, statistics, early stopping."""

import itertools
import re
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, checkpoints_in, comparable, parse, records_in
from torch import nn
from torchsummary import summary

import ex3_convnet
import ex3_pretrained
import utils
from ex3_convnet import ConvNet

CPU, FLOAT32 = torch.device("cpu"), torch.float32


@pytest.fixture
def data(few, folder):
    """60 training, 20 validation and 100 test images for the convnet."""
    return utils.load_data(parse(*TINY), (0.5,) * 3, (0.5,) * 3, CPU)


def plain_batch(data, indices):
    return (data.images[indices] / 255 - 0.5) / 0.5, data.labels[indices]


def plain_evaluate(model, data, indices):
    """Mean loss, accuracy and confusion matrix in eval mode, image by image."""
    losses, confusion = [], torch.zeros(10, 10, dtype=torch.int64)
    for i in indices:
        image, label = plain_batch(data, i[None])
        logits = model.eval()(image)
        losses.append(F.cross_entropy(logits, label).item())
        confusion[label, logits.argmax()] += 1
    mean = pytest.approx(np.mean(losses), rel=1e-5)
    return mean, confusion.trace().item() / len(losses), confusion.tolist()


@pytest.mark.parametrize(("norm_flag", "dropout", "size"), [
    (False, 0, 7_678_474), (True, 0, 7_682_826), (False, 0.3, 7_678_474), (True, 0.3, 7_682_826)])
def test_layers_and_size_are_the_reports_as_torchsummary_counts_it(
        norm_flag, dropout, size, capsys):
    model = ConvNet(norm_flag, dropout)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == size
    summary(model.eval(), (3, 32, 32), device="cpu")
    assert f"Trainable params: {size:,}\n" in capsys.readouterr().out
    block = [nn.Conv2d, *[nn.BatchNorm2d] * norm_flag, nn.MaxPool2d, nn.ReLU,
             *[nn.Dropout] * (dropout > 0)]
    assert [type(layer) for layer in model.layers] == block * 5 + [nn.Flatten, nn.Linear]
    convolutions = [(layer.out_channels, layer.kernel_size, layer.stride, layer.padding)
                    for layer in model.layers if isinstance(layer, nn.Conv2d)]
    assert convolutions == [(n, (3, 3), (1, 1), (1, 1)) for n in (128, 512, 512, 512, 512)]
    assert {layer.p for layer in model.layers if isinstance(layer, nn.Dropout)} <= {dropout}
    assert ConvNet(num_classes=2, image_size=63)(torch.zeros(3, 3, 63, 63)).shape == (3, 2)
    assert model.layers[-1].weight.std().item() == pytest.approx(1e-3, rel=0.05)
    assert not model.layers[-1].bias.any()


def test_a_run_shows_its_summary_which_changes_nothing(small, monkeypatch, capsys):
    record, = ex3_convnet.main([*TINY, "--norm_flag"])
    assert f"Trainable params: {record['result']['model_size']:,}\n" in capsys.readouterr().out
    monkeypatch.setattr(ex3_convnet, "summary", lambda *_, **__: None)
    assert comparable(ex3_convnet.main([*TINY, "--norm_flag"])) == comparable([record])


@pytest.mark.parametrize(("count", "sizes"), [(10, [4, 4, 2]), (9, [4, 5]), (1, [1]), (4, [4])])
def test_batches_hold_every_image_once_and_no_last_one_is_alone(count, sizes):
    batches = utils.shuffled_batches(torch.arange(9, 9 + count), 4, torch.Generator())
    assert [len(batch) for batch in batches] == sizes
    assert torch.cat(batches).sort().values.tolist() == list(range(9, 9 + count))
    assert [len(b) for b in utils.shuffled_batches(torch.arange(3), 1, None)] == [1, 1, 1]


def draws(seed, epoch):
    """All that is random in an epoch, as numbers: order, augmentation of both sets, dropout."""
    order, *augments = utils.seed_epoch(seed, epoch, "rotation+color_jitter")
    images = torch.linspace(0, 1, 5 * 3 * 8 * 8).view(5, 3, 8, 8)
    return [torch.randperm(99, generator=order).tolist(), F.dropout(torch.ones(99)).tolist(),
            *(augment(images).tolist() for augment in augments)]


def test_what_is_random_in_an_epoch_depends_on_seed_and_epoch_only():
    first = draws(0, 1)
    torch.rand(7)
    assert draws(0, 1) == first
    assert first[2] != first[3]
    for other in draws(0, 2), draws(1, 1), draws(1, 0):
        assert all(a != b for a, b in zip(first, other))


def test_a_run_is_that_of_its_seed_whatever_ran_before(small):
    argv = [*TINY, "--dropout=0.2", "--augmentation=rotation"]
    several = ex3_convnet.main([*argv, "--seeds=2"])
    assert comparable(ex3_convnet.main([*argv, "--seed=1"])) == comparable(several[1:])
    assert several[0]["history"]["train_loss"] != several[1]["history"]["train_loss"]


def test_a_run_equals_a_plain_loop(small, data):
    """With batches of 25, 25 and 10 images: the means count images, not batches."""
    record, = ex3_convnet.main([
        *TINY, "--norm_flag", "--dropout=0.2", "--batch_size=25", "--reg=0.1",
        "--learning_rate=0.01", "--learning_rate_decay=0.5"])
    torch.manual_seed(0)
    # dropout draws in the order of the memory
    model = ConvNet(norm_flag=True, dropout=0.2).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), 0.02, weight_decay=0.1)
    for epoch in range(2):
        optimizer.param_groups[0]["lr"] /= 2
        order, *_ = utils.seed_epoch(0, epoch + 1, "none")
        losses, right = [], 0
        model.train()
        for indices in torch.randperm(60, generator=order).split(25):
            images, labels = plain_batch(data, indices)
            optimizer.zero_grad()
            logits = model(images)
            loss = F.cross_entropy(logits, labels)
            loss.backward()
            optimizer.step()
            losses += [loss.item()] * len(labels)
            right += (logits.argmax(1) == labels).sum().item()
        history = {name: values[epoch] for name, values in record["history"].items()}
        assert history["train_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
        assert history["train_accuracy"] == right / 60
        expected = plain_evaluate(model, data, torch.arange(60, 80))
        assert (history["val_loss"], history["val_accuracy"]) == expected[:2]
    _, accuracy, confusion = plain_evaluate(model, data, torch.arange(80, 180))
    assert (record["result"]["test_accuracy"], record["confusion"]) == (accuracy, confusion)


def test_float16_scales_the_loss_and_skips_a_step_that_overflows(small, monkeypatch):
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**21))
    record, = ex3_convnet.main([*TINY, "--precision=float16", "--norm_flag"])
    state, = checkpoints_in(small).values()
    steps, = {int(part["step"]) for part in state["optimizer"]["state"].values()}
    assert record["precision"] == "float16"
    assert 0 < steps < 2 * 3
    assert state["scaler"]["scale"] == 2.0**(21 - (2 * 3 - steps))
    assert all(weight.isfinite().all() for weight in state["model"].values())


def test_statistics_are_re_estimated_on_plain_images_with_dropout_off(small_convnet, data):
    """Against the mean and the (unbiased) variance of what each batch norm gets, by hand."""
    torch.manual_seed(0)
    model = ConvNet(norm_flag=True, dropout=0.8).train()
    model(data.batch(data.test)[0])
    before = comparable(model.state_dict())
    layers = utils.recalibrate(model, data, FLOAT32, batch_size=30).layers
    assert comparable(model.state_dict()) == before
    assert all(layer.training for layer in model.modules())
    assert {layer.momentum for layer in model.layers if hasattr(layer, "momentum")} == {0.1}
    expected = {layer: [] for layer in layers if isinstance(layer, nn.BatchNorm2d)}
    for part in data.train.split(30):
        x = plain_batch(data, part)[0]
        for layer in layers[:-2]:
            if layer in expected:
                expected[layer].append((x.mean((0, 2, 3)), x.var((0, 2, 3))))
                x = F.batch_norm(x, None, None, layer.weight, layer.bias, training=True)
            elif not isinstance(layer, nn.Dropout):
                x = layer(x)
    for layer, parts in expected.items():
        mean, variance = (torch.stack(numbers).mean(0) for numbers in zip(*parts))
        torch.testing.assert_close(layer.running_mean, mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.running_var, variance, rtol=1e-4, atol=1e-6)


def test_only_statistics_of_layers_that_trained_are_re_estimated(tiny_vgg, data):
    assert utils.recalibrate(ConvNet(), data, FLOAT32) is None
    for frozen_norm in ("eval", "train"):
        model = ex3_pretrained.VGG(fine_tune=False, frozen_norm=frozen_norm)
        recalibrated = utils.recalibrate(model, data, FLOAT32)
        assert recalibrated.features[1].running_mean.any() == (frozen_norm == "train")
        assert recalibrated.head[1].running_mean.any()


@pytest.mark.parametrize(("script", "argv", "trained"), [
    (ex3_convnet, [], False), (ex3_convnet, ["--norm_flag", "--dropout=0.5"], True),
    (ex3_pretrained, ["--pretrained=none"], True)])
def test_a_run_with_batch_norm_tells_its_accuracies_with_re_estimated_statistics(
        small, tiny_vgg, monkeypatch, capsys, script, argv, trained):
    made, recalibrate = [], utils.recalibrate
    monkeypatch.setattr(utils, "recalibrate", lambda *arguments: made.append(
        [recalibrate(*arguments), *arguments[1:]]) or made[0][0])
    record, = script.main([*TINY, *argv, "--num_epochs=4", "--learning_rate=0.01"])
    (model, data, dtype), = made
    expected = {f"{part}_accuracy_recalibrated": utils.evaluate(
        model, data, getattr(data, part), dtype)[1] for part in ("val", "test") if trained}
    assert expected == {name: value for name, value in record["result"].items()
                        if "recalibrated" in name}
    told = re.search(r".*(recalibrated|re-estimated).*", capsys.readouterr().out)
    assert bool(told) == trained
    assert all(f"{value:.1%}" in told[0] for value in expected.values())


@pytest.mark.parametrize(("script", "argv"), [
    (ex3_convnet, []), (ex3_pretrained, ["--pretrained=none", "--augmentation=none"])])
@pytest.mark.parametrize(("flags", "losses", "accuracies", "best", "epochs"), [
    (["--patience=3"], [1] * 6, [0.1, 0.3, 0.3, 0.2, 0.3, 0.9], 2, 5),  # 0.3 again is not better
    (["--patience=2"], [1] * 4, [0.0, 0.0, 0.0, 0.5], 1, 3),
    (["--patience=0"], [1] * 4, [0.3, 0.1, 0.1, 0.1], 1, 4),
    (["--patience=2", "--monitor=loss"], [2, 1, 1.5, 1, 0], [0.1, 0.2, 0.3, 0.4, 0.5], 2, 4)])
def test_the_first_best_epoch_is_reported_and_training_ends_after_patience(
        small, tiny_vgg, monkeypatch, script, argv, flags, losses, accuracies, best, epochs):
    numbers, evaluate = iter(zip(losses, accuracies)), utils.evaluate
    monkeypatch.setattr(utils, "recalibrate", lambda *_: None)
    monkeypatch.setattr(utils, "evaluate", lambda model, data, indices, *rest: next(
        numbers) if indices is data.val else evaluate(model, data, indices, *rest))
    argv = [*TINY, *argv, "--earlystop", "--learning_rate=0.02", *flags]
    record, = script.main([*argv, f"--num_epochs={len(losses)}"])
    history, result = record["history"], record["result"]
    assert (result["best_epoch"], result["epoch"]) == (best, best)
    assert result["val_accuracy"] == accuracies[best - 1]
    assert history["val_accuracy"] == accuracies[:epochs]
    assert result["train_accuracy"] == history["train_accuracy"][best - 1]
    flags = parse(*argv, script=script)
    data = utils.load_data(flags, script.MEAN, script.STD, CPU)
    tested, heads, model = [], [], script.build(flags, 10)
    for state in checkpoints_in(small).values():  # best, latest
        model.load_state_dict(state["model"])
        tested.append((state["epoch"], evaluate(model, data, data.test, FLOAT32)[1]))
        heads.append([*state["model"].values()][-1])
    assert not torch.equal(*heads)
    assert tested == [(best, result["test_accuracy"]), (epochs, result["latest_test_accuracy"])]
    assert np.trace(record["confusion"]) == round(100 * result["test_accuracy"])


def test_of_many_test_images_the_first_thousand_count_apart(small_convnet, data):
    torch.manual_seed(0)
    data.test = torch.cat([data.test[:50].repeat(20), data.test[50:]])
    model = ConvNet()
    result, _ = utils.test(SimpleNamespace(best_epoch=0, dtype=FLOAT32), model, data)
    images, labels = plain_batch(data, data.test)
    right = (model.eval()(images).argmax(1) == labels).numpy()
    assert result["test_accuracy_first_1000"] == right[:1000].mean() != right.mean()
    assert result["test_accuracy"] == right.mean()


@pytest.mark.parametrize(("sizes", "argv", "told"), [
    ((60, 99, 21), ["--earlystop"], 1), ((60, 100, 20), ["--earlystop"], 0), ((60, 99, 21), [], 0)])
def test_below_a_hundred_validation_images_the_best_epoch_is_called_luck(
        small, monkeypatch, capsys, sizes, argv, told):
    drawn = utils.draw_synthetic()
    monkeypatch.setattr(utils, "draw_synthetic", lambda: (*drawn[:3], sizes))
    ex3_convnet.main([*TINY, "--num_validation=0", *argv])
    assert len(re.findall(r"validation images.*luck", capsys.readouterr().out)) == told


def test_a_run_that_diverges_fails_and_the_others_of_a_question_go_on(small, capsys):
    """With so large a learning rate only batch norm keeps the numbers finite."""
    with pytest.raises(utils.Problem, match="^ConvNet, seed 0, diverged in epoch 1: "
                                            ".*--learning_rate$") as problem:
        ex3_convnet.main([*TINY, "--question=2a", "--learning_rate=1e6"])
    assert problem.value.status == 1
    assert [record["title"] for record in records_in(small)] == ["ConvNet, batch norm"]


@pytest.mark.parametrize("name", ["train_one_epoch", "evaluate"])
def test_a_loss_that_is_not_finite_leaves_neither_record_nor_checkpoint(small, monkeypatch, name):
    losses, real = itertools.cycle([1.0, float("nan")]), getattr(utils, name)
    monkeypatch.setattr(utils, name, lambda *arguments: (next(losses), real(*arguments)[1]))
    with pytest.raises(utils.Problem, match="seed 0, diverged in epoch 2.*seed 1, diverged in"):
        ex3_convnet.main([*TINY, "--seeds=2"])
    assert (records_in(small), checkpoints_in(small)) == ([], {})
