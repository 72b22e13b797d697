"""Training: an epoch and its numbers against the plain loop, seeds, precision, and a whole run."""

import copy
import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, records_in
from torch import nn

import ex3_convnet
import utils

SCALER = torch.amp.GradScaler("cpu", enabled=False)


def network(seed=0, norm=True):
    """A network that learns within seconds."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 16, 3, 2), *[nn.BatchNorm2d(16)] * norm, nn.ReLU(),
                         nn.Dropout(0.2), nn.Flatten(), nn.Linear(16 * 15 * 15, 10))


def train_one_epoch(model, data, optimizer, batch_size, seed=0, dtype=torch.float32, augment=None):
    batches = utils.shuffled_batches(data.train, batch_size, torch.Generator().manual_seed(seed))
    return utils.train_one_epoch(model, data, batches, augment, optimizer, SCALER, dtype,
                                 utils.progress_bar())


@pytest.fixture(scope="module")
def four_hundred(synthetic):
    """The synthetic data set with 400 training, 100 validation and 100 test images."""
    data = copy.copy(synthetic)
    data.train, data.val, data.test = data.train[:400], data.val[:100], data.test[:100]
    return data


@pytest.fixture
def short(few, folder, no_drawing, monkeypatch):
    """A function that trains `network` on few images by the convnet's main, for two epochs.

    Returns the record, and the state in the latest checkpoint.
    """
    def run(*argv, model=network):
        monkeypatch.setattr(ex3_convnet, "build", lambda *_: model())
        results = ex3_convnet.main([*TINY, "--precision=float32", "--num_epochs=2", *argv])
        latest = max(folder.glob("latest*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
        return results["none"][""][-1], utils.load_checkpoint(latest)

    return run


# -------------------------------------------- an epoch --------------------------------------------


@pytest.mark.parametrize(("count", "sizes"), [
    (10, [4, 4, 2]), (9, [4, 5]), (8, [4, 4]), (1, [1]), (4, [4]), (5, [5])])
def test_batches_hold_every_image_once_and_no_image_is_alone(count, sizes):
    indices = torch.arange(100, 100 + count)
    batches = utils.shuffled_batches(indices, 4, torch.Generator().manual_seed(0))
    assert [len(batch) for batch in batches] == sizes
    assert torch.equal(torch.cat(batches).sort().values, indices)


def test_batches_of_one_stay():
    assert [len(batch) for batch in utils.shuffled_batches(torch.arange(3), 1, None)] == [1, 1, 1]


def test_the_order_of_the_images_is_the_generators():
    def order(seed):
        return torch.cat(utils.shuffled_batches(
            torch.arange(50), 8, torch.Generator().manual_seed(seed))).tolist()

    assert order(3) == torch.randperm(50, generator=torch.Generator().manual_seed(3)).tolist()
    assert order(3) != order(4)


def test_evaluate_is_the_mean_over_images_in_eval_mode(four_hundred):
    model, data = network().train(), four_hundred
    before = copy.deepcopy(model.state_dict())
    loss, accuracy = utils.evaluate(model, data, data.val, torch.float32)
    logits = utils.compute_logits(model.train(), data, data.val, torch.float32, batch_size=33)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    model.eval()
    losses, classes, right = [], [], []
    for i, ours in zip(data.val.tolist(), logits, strict=True):  # one by one
        plain = model((data.images[i:i + 1] / 255 - 0.5) / 0.5)
        assert torch.allclose(plain[0], ours, atol=1e-5)
        losses.append(F.cross_entropy(plain, data.labels[i:i + 1]).item())
        classes.append(plain.argmax().item())
        right.append(classes[-1] == data.labels[i].item())
    assert loss == pytest.approx(sum(losses) / 100, rel=1e-4)
    assert accuracy == pytest.approx(sum(right) / 100)
    predicted = utils.predict_classes(model.train(), data, data.val, torch.float32)
    assert predicted.tolist() == classes


def test_an_epoch_trains_like_the_plain_loop(four_hundred):
    ours, plain, data = network(norm=False), network(norm=False), four_hundred
    torch.manual_seed(5)  # the dropout
    loss, accuracy = train_one_epoch(
        ours.eval(), data, torch.optim.Adam(ours.parameters(), fused=True), 150, seed=6)

    torch.manual_seed(5)
    optimizer = torch.optim.Adam(plain.parameters())
    plain.train()
    order = torch.randperm(400, generator=torch.Generator().manual_seed(6))
    losses, right = [], 0
    for start in range(0, 400, 150):
        chosen = order[start:start + 150]
        logits = plain((data.images[chosen] / 255 - 0.5) / 0.5)
        loss_of_batch = F.cross_entropy(logits, data.labels[chosen])
        optimizer.zero_grad()
        loss_of_batch.backward()
        optimizer.step()
        losses += [loss_of_batch.item()] * len(chosen)
        right += (logits.argmax(1) == data.labels[chosen]).sum().item()
    assert loss == pytest.approx(sum(losses) / 400, rel=1e-4)
    assert accuracy == pytest.approx(right / 400)
    for p, q in zip(ours.parameters(), plain.parameters()):
        assert torch.allclose(p, q, atol=1e-5)


def test_bfloat16_trains_about_the_same(four_hundred):
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        model = network(norm=False)
        torch.manual_seed(0)
        losses.append(train_one_epoch(model, four_hundred, torch.optim.Adam(model.parameters()),
                                      100, dtype=dtype)[0])
        assert all(p.dtype == torch.float32 for p in model.parameters())
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_the_scaler_scales_the_loss_and_skips_a_step_that_overflows(few):
    """As float16 needs it: the gradients are those without scaling, up to rounding."""
    weights = []
    for scaler in (SCALER, torch.amp.GradScaler("cpu", init_scale=1024.0)):
        model = network(norm=False)
        torch.manual_seed(0)
        utils.train_one_epoch(model, few, [few.train], None, torch.optim.SGD(
            model.parameters(), 0.1), scaler, torch.float32, utils.progress_bar())
        weights.append(model[0].weight.detach())
    assert torch.allclose(*weights, atol=1e-6)
    before = copy.deepcopy(model.state_dict())
    huge = torch.amp.GradScaler("cpu", init_scale=float("inf"))
    utils.train_one_epoch(model, few, [few.train], None, torch.optim.SGD(
        model.parameters(), 0.1), huge, torch.float32, utils.progress_bar())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_compiled_network_trains_the_same(few):
    losses = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))  # it compiles within seconds
        if compiled:
            utils.place(model, torch.device("cpu"), compiled=True)
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        losses.append(train_one_epoch(model, few, optimizer, 30)[0])
        assert "1.weight" in model.state_dict()  # under the names of the plain network
        assert (model._compiled_call_impl is not None) == compiled
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_without_a_compiler_compile_is_refused(monkeypatch):
    monkeypatch.setattr(utils.shutil, "which", lambda name: None)
    with pytest.raises(utils.Problem, match=r"needs a compiler such as g\+\+") as problem:
        utils.place(network(), torch.device("cpu"), compiled=True)
    assert problem.value.status == 2


# --------------------------------------------- a run ---------------------------------------------


def test_the_same_seed_gives_the_same_run_and_another_seed_another(
        few, folder, small_convnet, no_drawing):
    """Initial weights, order of the images, augmentation and dropout."""
    runs = [ex3_convnet.main([*TINY, "--dropout=0.2", "--augmentation=rotation", f"--seed={seed}"])
            ["none"][""][0] for seed in (0, 0, 1)]
    for run in runs:
        del run["history"]["seconds"]
    assert runs[0]["history"] == runs[1]["history"] != runs[2]["history"]
    assert runs[0]["filters"] == runs[1]["filters"]
    assert runs[0]["filters"]["before"] != runs[2]["filters"]["before"]


def test_validating_on_augmented_images_changes_nothing_else(short, monkeypatch):
    with_it = short("--augmentation=color_jitter")[0]["history"]
    evaluate = utils.evaluate
    monkeypatch.setattr(utils, "evaluate", lambda model, data, part, dtype, augment=None:
                        evaluate(model, data, part, dtype))
    without = short("--augmentation=color_jitter")[0]["history"]
    assert with_it["train_loss"] == without["train_loss"]
    assert with_it["val_loss"] == without["val_loss"]
    assert with_it["val_accuracy"] == without["val_accuracy"] == without["val_accuracy_augmented"]
    assert with_it["val_accuracy_augmented"] != with_it["val_accuracy"]


def test_the_settings_reach_the_optimizer_and_the_learning_rate_decays_once_an_epoch(
        short, monkeypatch):
    optimizers, make = [], ex3_convnet.make_optimizer

    def watch(model, flags):
        optimizers.append(make(model, flags)[0])
        return make(model, flags)

    monkeypatch.setattr(ex3_convnet, "make_optimizer", watch)
    _, latest = short("--num_epochs=3", "--learning_rate=0.01", "--learning_rate_decay=0.5",
                      "--reg=0.25")
    assert latest["scheduler"]["_last_lr"] == [pytest.approx(0.01 * 0.5**3)]
    assert all(type(optimizer) is torch.optim.Adam for optimizer in optimizers)
    group, = latest["optimizer"]["param_groups"]
    assert (group["initial_lr"], group["weight_decay"]) == (0.01, 0.25)
    assert latest["optimizer"]["state"][0]["step"] == 3 * 3  # 60 images in batches of 20


def test_a_diverging_run_is_told_and_leaves_no_record(short, folder, capsys):
    def broken():
        model = network()
        model[0].weight.data.fill_(float("nan"))
        return model

    with pytest.raises(utils.Problem, match="1 of the runs failed: .* in epoch 1 the loss is nan; "
                                            "try a smaller --learning_rate") as problem:
        short(model=broken)
    assert problem.value.status == 1
    assert "Failed: ConvNet, seed 0, on synthetic: the training diverged" in capsys.readouterr().out
    assert records_in(folder) == list(folder.glob("*.ckpt")) == []


def test_a_loss_that_only_validation_sees_diverge_is_told(short, folder, monkeypatch):
    monkeypatch.setattr(utils, "evaluate", lambda *_: (float("inf"), 0.1))
    with pytest.raises(utils.Problem, match="in epoch 1 the loss is inf"):
        short("--earlystop", "--monitor=loss")
    assert list(folder.glob("*.ckpt")) == []


def test_after_a_run_that_diverges_the_others_of_a_question_go_on(
        few, folder, small_convnet, monkeypatch, capsys):
    losses, train = itertools.count(), utils.train_one_epoch

    def diverge(*arguments):
        loss, accuracy = train(*arguments)
        return (float("nan") if next(losses) == 0 else loss), accuracy

    monkeypatch.setattr(utils, "train_one_epoch", diverge)
    with pytest.raises(utils.Problem, match="1 of the runs failed: ConvNet, seed 0"):
        ex3_convnet.main([*TINY, "--question=2a"])
    assert [record["title"] for record in records_in(folder)] == ["ConvNet, batch norm"]
    assert "| without batch norm | not run |" in capsys.readouterr().out


def test_the_layout_in_memory_changes_nothing_but_the_speed(folder, no_drawing, monkeypatch):
    """And the images keep it, as does a batch of them."""
    def plain():
        model = network()
        model[3].p = 0  # dropout draws in the order of the memory
        return model

    monkeypatch.setattr(ex3_convnet, "build", lambda *_: plain())
    histories, loaded, load = [], [], utils.load_data

    def keep(*arguments):
        loaded.append(load(*arguments))
        return loaded[-1]

    monkeypatch.setattr(utils, "load_data", keep)
    for channels_last in (True, False):
        results = ex3_convnet.main([*TINY, "--precision=float32", "--num_training=100",
                                    f"--channels_last={channels_last}"])
        images, _ = loaded[-1].batch(torch.arange(5))
        assert images.is_contiguous(memory_format=utils.memory_format(channels_last))
        history = results["none"][""][0]["history"]
        histories.append(history["train_loss"] + history["val_loss"])
    assert histories[0] == pytest.approx(histories[1], rel=1e-4)


def test_a_short_real_training_beats_chance_by_far(folder, capsys, monkeypatch):
    """And the record, the best checkpoint and the output agree."""
    monkeypatch.setattr(ex3_convnet, "CHANNELS", (32, 64, 64, 64, 64))
    results = ex3_convnet.main([
        "--dataset=synthetic", "--norm_flag", "--earlystop", "--num_epochs=3", "--batch_size=20",
        "--learning_rate=5e-3", "--num_training=1000", "--num_validation=200"])
    record = results["none"][""][0]
    result, history = record["result"], record["history"]
    assert result["val_accuracy"] > 0.25
    assert result["test_accuracy"] > 0.25
    best = history["val_accuracy"].index(max(history["val_accuracy"]))
    assert (result["best_epoch"], result["epoch"]) == (best + 1, best + 1)
    assert result["train_accuracy"] == history["train_accuracy"][best]

    written, = records_in(folder)
    assert written.pop("sha256") == utils.record_digest(record)
    assert written == json.loads(json.dumps(record))
    flags = written["recipe"]["flags"]
    assert (flags["batch_size"], written["seed"], written["data"]) == (20, 0, "synthetic")
    assert [written["recipe"]["data"][part] for part in ("train", "val", "test")] == [
        1000, 200, 1000]
    assert all(len(values) == 3 for values in history.values())

    # the checkpoint of the best model has the accuracy that the record states
    best = utils.load_checkpoint(
        folder / "best_model_convnet-batch-norm-early-stopping_synthetic-1000.ckpt")
    model = ex3_convnet.ConvNet(norm_flag=True)
    model.load_state_dict(best["model"])
    normalization = best["recipe"]["normalization"]
    data = utils.load_data("synthetic", 32, 1000, 200, normalization["mean"], normalization["std"],
                           torch.device("cpu"))
    dtype = getattr(torch, record["precision"])
    assert utils.evaluate(model, data, data.test, dtype)[1] == pytest.approx(
        result["test_accuracy"], abs=0.005)
    assert best["recipe"]["data"]["classes"] == data.classes
    output = capsys.readouterr().out
    assert f"test {result['test_accuracy']:.1%}" in output
    assert "synthetic" in output
