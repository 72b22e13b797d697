"""Training: the network, an epoch and a run against plain loops, precise BN, early stopping."""

import itertools
import re
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, checkpoints_in, comparable, parse, records_in, write_photos
from torch import nn

import ex3_convnet
import ex3_pretrained
import utils
from ex3_convnet import ConvNet

CPU, FLOAT32 = torch.device("cpu"), torch.float32
has_native_bfloat16 = utils.has_native_bfloat16  # which conftest.py replaces in each test

@pytest.fixture
def data(few, folder):
    """60 training, 20 validation and 100 test images for the convnet."""
    return utils.load_data(parse(*TINY), (0.5,) * 3, (0.5,) * 3, CPU)

def plain_batch(data, indices, augment=None):
    images = data.images[indices] / 255
    if augment:
        images = augment(images)
    return (images - data.mean) / data.std, data.labels[indices]

def plain_evaluate(model, data, indices):
    """Mean loss, accuracy and confusion matrix in eval mode, image by image."""
    model.eval()
    losses, confusion = [], torch.zeros(10, 10, dtype=torch.int64)
    for i in indices:
        image, label = plain_batch(data, i[None])
        logits = model(image)
        losses.append(F.cross_entropy(logits, label).item())
        confusion[label, logits.argmax()] += 1
    mean = pytest.approx(np.mean(losses), rel=1e-5)
    return mean, confusion.trace().item() / len(losses), confusion.tolist()

@pytest.mark.parametrize("dropout", [0, 0.3])
@pytest.mark.parametrize(("norm_flag", "size"), [(False, 7_678_474), (True, 7_682_826)])
def test_layers_and_size_are_the_reports(norm_flag, size, dropout):
    model = ConvNet(norm_flag, dropout)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == size
    block = [nn.Conv2d, *[nn.BatchNorm2d] * norm_flag, nn.MaxPool2d, nn.ReLU,
             *[nn.Dropout] * (dropout > 0)]
    assert [type(layer) for layer in model.layers] == block * 5 + [nn.Flatten, nn.Linear]
    convolutions = [(layer.out_channels, layer.kernel_size, layer.stride, layer.padding)
                    for layer in model.layers if isinstance(layer, nn.Conv2d)]
    assert convolutions == [(n, (3, 3), (1, 1), (1, 1)) for n in (128, 512, 512, 512, 512)]
    assert {layer.p for layer in model.layers if isinstance(layer, nn.Dropout)} <= {dropout}
    assert model.layers[-1].weight.std().item() == pytest.approx(1e-3, rel=0.05)
    assert not model.layers[-1].bias.any()

@pytest.mark.parametrize(("blocks", "size"), [(5, 32), (5, 63), (5, 64), (6, 64)])
def test_the_network_takes_images_of_any_size_from_a_pixel_after_the_last_block_on(
        monkeypatch, blocks, size):
    monkeypatch.setattr(ex3_convnet, "CHANNELS", (8,) * blocks)
    model = ConvNet(num_classes=2, image_size=size)
    assert model(torch.zeros(3, 3, size, size)).shape == (3, 2)

def test_a_sixth_block_asks_for_larger_images(small, monkeypatch):
    monkeypatch.setattr(ex3_convnet, "CHANNELS", (8,) * 6)
    with pytest.raises(utils.UserError, match="^6 blocks .*--image_size=64$"):
        ex3_convnet.main(TINY)

def test_a_run_shows_its_summary_which_changes_nothing(small, capsys):
    """The same run as one of a question, which shows none, has the same numbers."""
    record, = ex3_convnet.main([*TINY, "--norm_flag"])
    out, history, result = capsys.readouterr().out, record["history"], record["result"]
    assert f"Trainable params: {result['model_size']:,}\n" in out
    assert (f"epoch  2/2:  train loss {history['train_loss'][1]:.3f}, accuracy "
            f"{history['train_accuracy'][1]:.1%};  validation loss {history['val_loss'][1]:.3f}, "
            f"accuracy {history['val_accuracy'][1]:.1%};") in out
    assert (f"Last model (epoch 2): train accuracy {result['train_accuracy']:.1%}, validation "
            f"{result['val_accuracy']:.1%}, test {result['test_accuracy']:.1%}") in out
    *_, of_question = ex3_convnet.main([*TINY, "--question=2a", "--rerun"])
    assert "Trainable params" not in capsys.readouterr().out
    assert comparable(of_question) == comparable(record)

@pytest.mark.parametrize(("count", "sizes"), [(10, [4, 4, 2]), (9, [4, 5]), (1, [1]), (4, [4])])
def test_shuffled_batches_hold_every_image_once_and_no_last_one_is_alone(data, count, sizes):
    def labels_of(seed):
        shuffle = torch.Generator().manual_seed(seed)
        batches = data.batches(torch.arange(50, 50 + count), 4, shuffle)
        assert len(batches) == len(sizes)
        return [labels.tolist() for _, labels in batches]

    data.labels = torch.arange(180)  # each image tells which it is
    batches = labels_of(seed=0)
    assert [len(batch) for batch in batches] == sizes
    assert sorted(sum(batches, [])) == list(range(50, 50 + count))
    assert labels_of(seed=0) == batches
    if count > 4:
        assert labels_of(seed=1) != batches

def test_without_shuffling_the_order_stays_and_a_last_one_may_be_alone(data):
    """And images are augmented before they are normalized."""
    expected, expected_labels = plain_batch(data, torch.arange(9))
    for size, sizes in (4, [4, 4, 1]), (1, [1] * 9), (None, [9]):
        batches = data.batches(torch.arange(9), size, augment=lambda images: 1 - images)
        assert [len(labels) for _, labels in batches] == sizes
        images, labels = (torch.cat(parts) for parts in zip(*batches))
        torch.testing.assert_close(images, -expected)
        assert torch.equal(labels, expected_labels)
    alone = data.batches(torch.arange(3), 1, torch.Generator())  # a size that is asked for
    assert [len(labels) for _, labels in alone] == [1, 1, 1]

def test_what_is_random_in_an_epoch_depends_on_seed_and_epoch_only():
    """The order, the augmentation of both sets and PyTorch's own numbers, as for dropout."""
    found = []
    for seed, epoch in (0, 1), (0, 1), (0, 2), (1, 1), (1, 0):
        generators = [*utils.seed_epoch(seed, epoch), None]
        found.append([torch.rand(1, generator=each).item() for each in generators])
    assert found[0] == found[1]
    assert len({*sum(found, [])}) == 4 * 4

def test_a_run_is_that_of_its_seed_whatever_ran_before(small):
    argv = [*TINY, "--dropout=0.2", "--augmentation=rotation"]
    several = ex3_convnet.main([*argv, "--seeds=2"])
    assert comparable(ex3_convnet.main([*argv, "--seed=1"])) == comparable(several[1:])
    assert several[0]["history"]["train_loss"] != several[1]["history"]["train_loss"]

@pytest.mark.parametrize(("script", "argv"), [
    (ex3_convnet, ["--norm_flag", "--dropout=0.2"]),
    (ex3_pretrained, ["--pretrained=none", "--earlystop=False"])])
def test_a_run_equals_a_plain_loop(small, tiny_vgg, script, argv):
    """With batches of 25, 25 and 10 images: the means count images, not batches."""
    argv = [*TINY, *argv, "--seed=3", "--augmentation=rotation", "--batch_size=25", "--reg=0.01",
            "--learning_rate=0.02", "--learning_rate_decay=0.8", "--num_epochs=6"]
    record, = script.main(argv)
    settings = parse(*argv, script=script)
    data = utils.load_data(settings, script.MEAN, script.STD, CPU)
    rotate = utils.AUGMENTATIONS["rotation"]
    torch.manual_seed(3)
    # dropout draws in the order of the memory
    model = script.build_model(settings, 10).to(memory_format=torch.channels_last)
    first_layer = next(layer for layer in model.modules() if isinstance(layer, nn.Conv2d))
    before = utils.decode_filters(record["filters"]["before"])
    assert torch.equal(before, first_layer.weight.half().float())
    optimizer = torch.optim.Adam(model.parameters(), 0.02, weight_decay=0.01, fused=True)
    for epoch in range(6):
        order, draws, val_draws = utils.seed_epoch(3, epoch + 1)
        losses, right = [], 0
        model.train()
        for indices in torch.randperm(60, generator=order).split(25):
            images, labels = plain_batch(data, indices, partial(rotate, generator=draws))
            optimizer.zero_grad()
            logits = model(images)
            loss = F.cross_entropy(logits, labels)
            loss.backward()
            optimizer.step()
            losses += [loss.item()] * len(labels)
            right += (logits.argmax(1) == labels).sum().item()
        optimizer.param_groups[0]["lr"] *= 0.8
        history = {name: values[epoch] for name, values in record["history"].items()}
        assert history["train_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
        assert history["train_accuracy"] == right / 60
        expected = plain_evaluate(model, data, torch.arange(60, 80))
        assert (history["val_loss"], history["val_accuracy"]) == expected[:2]
        images, labels = plain_batch(data, data.val, partial(rotate, generator=val_draws))
        right = (model(images).argmax(1) == labels).sum().item()
        assert history["val_accuracy_augmented"] == right / 20
    _, accuracy, confusion = plain_evaluate(model, data, torch.arange(80, 180))
    assert (record["result"]["test_accuracy"], record["confusion"]) == (accuracy, confusion)
    after = utils.decode_filters(record["filters"]["after"])
    torch.testing.assert_close(after, first_layer.weight.detach(), rtol=1e-3, atol=1e-4)

@pytest.mark.parametrize(("flags", "expected"), [
    ("avx2 avx512f", False), ("avx512_bf16", True), ("amx_bf16", True)])
def test_whether_bfloat16_is_native_is_read_from_the_flags_of_the_cpu(
        tmp_path, monkeypatch, flags, expected):
    (tmp_path / "cpuinfo").write_text(f"flags : fpu {flags} sse\n")
    monkeypatch.setattr(utils, "CPU_INFO", tmp_path / "cpuinfo")
    assert has_native_bfloat16(CPU) == expected

def test_float16_scales_the_loss_and_skips_a_step_that_overflows(small, monkeypatch):
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**21))
    ex3_convnet.main([*TINY, "--precision=float16", "--norm_flag"])
    state, = checkpoints_in(small).values()
    steps, = {int(part["step"]) for part in state["optimizer"]["state"].values()}
    assert 0 < steps < 2 * 3
    assert state["scaler"]["scale"] == 2.0**(21 - (2 * 3 - steps))
    assert all(weight.isfinite().all() for weight in state["model"].values())

def test_precise_bn_takes_the_mean_statistics_of_plain_batches_with_dropout_off(few):
    """Of two batches, by hand: the mean of the means and of the unbiased variances."""
    data = utils.load_data(parse(*TINY, "--image_size=96"), (0.5,) * 3, (0.5,) * 3, CPU)
    pool = nn.AdaptiveAvgPool2d(4)
    model = nn.Sequential(pool, nn.Dropout(0.8), nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.Flatten(),
                          nn.Linear(48, 10))
    model(data.batch(data.test)[0])  # moves the averages
    weights = comparable(dict(model.named_parameters()))
    assert utils.precise_bn_accuracies(model, [], data, FLOAT32) == {}
    layers = utils.batch_norm_layers(model)
    assert layers == [model[2], model[3]]
    assert utils.precise_bn_accuracies(model, layers, data, FLOAT32) == {
        "val_accuracy_recalibrated": plain_evaluate(model, data, data.val)[1],
        "test_accuracy_recalibrated": plain_evaluate(model, data, data.test)[1]}
    assert comparable(dict(model.named_parameters())) == weights
    batches = [pool(plain_batch(data, indices)[0]) for indices in data.train.split(30)]
    means = torch.stack([images.mean((0, 2, 3)) for images in batches])
    variances = torch.stack([images.var((0, 2, 3)) for images in batches])
    torch.testing.assert_close(model[2].running_mean, means.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model[2].running_var, variances.mean(0), rtol=1e-4, atol=1e-6)
    assert model[3].running_mean.abs().max() < 1e-4  # it sees what the first has normalized
    torch.testing.assert_close(model[3].running_var, torch.ones(3), rtol=5e-3, atol=0)

@pytest.mark.parametrize(("script", "argv", "trained"), [
    (ex3_convnet, ["--norm_flag", "--dropout=0.5"], "layers"),
    (ex3_pretrained, ["--pretrained=none"], ""),  # the whole network
    (ex3_pretrained, ["--fine_tune=False", "--frozen_norm=train"], ""),
    (ex3_pretrained, ["--fine_tune=False", "--augmentation=rotation"], "head"),
    (ex3_pretrained, ["--fine_tune=False"], "head")])
def test_precise_bn_is_that_of_the_layers_that_train_and_is_told(
        small, weights_file, capsys, script, argv, trained):
    """Of the best model; the frozen features keep the statistics of the weights' file."""
    argv = [*TINY, "--earlystop", "--num_epochs=4", "--learning_rate=0.01", *argv]
    if "--fine_tune=False" in argv:
        argv.append(f"--pretrained={weights_file}")
    record, = script.main(argv)
    settings = parse(*argv, script=script)
    data = utils.load_data(settings, script.MEAN, script.STD, CPU)
    model = script.build_model(settings, 10)
    best, _ = checkpoints_in(small).values()
    model.load_state_dict(best["model"])
    layers = utils.batch_norm_layers(model.get_submodule(trained))
    expected = utils.precise_bn_accuracies(model, layers, data, FLOAT32)
    found = {name: value for name, value in record["result"].items() if "recalibrated" in name}
    assert found == expected
    told = re.search(r"ith precise BN: validation (\S+)%, test (\S+)%", capsys.readouterr().out)
    assert [float(number) for number in told.groups()] == pytest.approx(
        [100 * value for value in expected.values()])

@pytest.mark.parametrize(("script", "argv"), [
    (ex3_convnet, []), (ex3_pretrained, ["--pretrained=none", "--augmentation=none"])])
@pytest.mark.parametrize(("flags", "losses", "accuracies", "best", "epochs"), [
    (["--patience=3"], [1] * 6, [0.1, 0.3, 0.3, 0.2, 0.3, 0.9], 2, 5),
    (["--patience=0"], [1] * 4, [0.3, 0.1, 0.1, 0.1], 1, 4),
    (["--patience=2"], [1] * 4, [0.0, 0.0, 0.0, 0.5], 1, 3),
    (["--patience=2", "--monitor=loss"], [2, 1, 1.5, 1, 0], [0.1, 0.2, 0.3, 0.4, 0.5], 2, 4)])
def test_a_run_reports_its_first_best_epoch_and_ends_after_its_patience(
        small, tiny_vgg, monkeypatch, script, argv, flags, losses, accuracies, best, epochs):
    validated = iter(zip(losses, accuracies))
    monkeypatch.setattr(utils, "evaluate", lambda *_: next(validated))
    monkeypatch.setattr(utils, "precise_bn_accuracies", lambda *_: {})
    argv = [*TINY, *argv, "--earlystop", "--learning_rate=0.02", *flags]
    record, = script.main([*argv, f"--num_epochs={len(losses)}"])
    history, result = record["history"], record["result"]
    assert (result["best_epoch"], result["epoch"]) == (best, best)
    assert result["val_accuracy"] == accuracies[best - 1]
    assert history["val_accuracy"] == accuracies[:epochs]
    assert result["train_accuracy"] == history["train_accuracy"][best - 1]
    assert result["latest_train_accuracy"] == history["train_accuracy"][-1]
    assert result["latest_val_accuracy"] == accuracies[epochs - 1]
    settings = parse(*argv, script=script)
    data = utils.load_data(settings, script.MEAN, script.STD, CPU)
    tested, heads, model = [], [], script.build_model(settings, 10)
    for state in checkpoints_in(small).values():  # best, latest
        model.load_state_dict(state["model"])
        tested.append((state["epoch"], plain_evaluate(model, data, data.test)[1]))
        heads.append([*state["model"].values()][-1])
    assert not torch.equal(*heads)
    assert tested == [(best, result["test_accuracy"]), (epochs, result["latest_test_accuracy"])]
    assert np.trace(record["confusion"]) == round(100 * result["test_accuracy"])

def test_of_many_test_images_the_first_thousand_count_apart(small_convnet, data):
    """And the wrong ones of which the network is surest are named."""
    torch.manual_seed(0)
    data.test = data.test[torch.randint(100, (1050,))]
    model = ConvNet()
    tested = utils.test(model, data, FLOAT32)
    images, labels = plain_batch(data, data.test)
    probabilities, predicted = model.eval()(images).softmax(1).max(1)
    right = predicted == labels
    _, accuracy, confusion = plain_evaluate(model, data, data.test)
    assert (tested["accuracy"], tested["confusion"]) == (accuracy, confusion)
    assert tested["accuracy_first_1000"] == right[:1000].sum().item() / 1000 != accuracy
    surest = np.sort(probabilities.detach().numpy()[~right])[:-9:-1]
    assert [probability for *_, probability in tested["mistakes"]] == pytest.approx(surest)
    for position, taken_for, probability in tested["mistakes"]:
        assert taken_for == predicted[position] != labels[position]
        assert probability == pytest.approx(probabilities[position].item())

@pytest.mark.parametrize(("dogs", "told"), [(9, True), (8, False)])
def test_where_classes_differ_by_more_than_a_factor_of_two_the_mean_over_them_is_told(
        small, capsys, tmp_path, dogs, told):
    photos = write_photos(tmp_path / "photos", {
        "train/cat": 12, "train/dog": 12, "test/cat": 4, "test/dog": dogs})
    record, = ex3_convnet.main([*TINY, f"--dataset={photos}", "--num_training=0",
                                "--num_validation=0"])
    (cats_right, _), (_, dogs_right) = record["confusion"]
    mean = re.search(r"4 to \d test images; the mean of .* (\S+)%", capsys.readouterr().out)
    assert bool(mean) == told
    if told:
        assert float(mean[1]) == pytest.approx(50 * (cats_right / 4 + dogs_right / 9), abs=0.05)

@pytest.mark.parametrize("name", ["train_one_epoch", "evaluate"])
def test_a_run_that_diverges_leaves_neither_record_nor_checkpoint_and_the_others_go_on(
        small, monkeypatch, name):
    losses = itertools.chain([1.0, float("nan")], itertools.repeat(1.0))
    real = getattr(utils, name)
    monkeypatch.setattr(utils, name, lambda *arguments: (next(losses), real(*arguments)[1]))
    with pytest.raises(utils.UserError, match="^ConvNet, seed 0, diverged in epoch 2: "
                                              "[^;]*--learning_rate[^;]*$") as error:
        ex3_convnet.main([*TINY, "--seeds=2"])
    assert error.value.exit_code == 1
    assert [record["seed"] for record in records_in(small)] == [1]
    assert len(checkpoints_in(small)) == 1

def test_a_run_that_diverges_under_torchrun_is_told_at_the_end_and_ends_no_other_process(
        small, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(utils, "train_one_epoch", lambda *_: (float("nan"), 0.1))
    assert ex3_convnet.main([*TINY, "--question=2a"]) == []
    *_, diverged, last = capsys.readouterr().out.splitlines()
    assert diverged.startswith("ConvNet, seed 0, diverged in epoch 1")
    assert "--redraw" in last
