"""Training: the loop and its numbers against naive ones, early stopping, checkpoints, records."""

import copy
import json
import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ex3_convnet
import utils


def small(seed=0, norm=True):
    """A network that learns within seconds."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 16, 3, 2), *[nn.BatchNorm2d(16)] * norm, nn.ReLU(),
                         nn.Dropout(0.2), nn.Flatten(), nn.Linear(16 * 15 * 15, 10))


def fit(model, data, folder, **changes):
    """utils.fit with the settings of a short run."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    settings = {"num_epochs": 2, "batch_size": 100, "seed": 0, "augmentation": "none",
                "dtype": torch.float32, "patience": None, "monitor": "accuracy", "about": {},
                "latest": folder / "latest.ckpt", "best": folder / "best.ckpt"}
    return utils.fit(model, data, optimizer, scheduler, **{**settings, **changes})


@pytest.fixture(scope="module")
def few(synthetic):
    """The synthetic data set with 400 training, 100 validation and 100 test images."""
    data = copy.copy(synthetic)
    data.train, data.val, data.test = data.train[:400], data.val[:100], data.test[:100]
    return data


@pytest.mark.parametrize(("count", "sizes"), [
    (10, [4, 4, 2]), (9, [4, 5]), (8, [4, 4]), (1, [1]), (4, [4]), (5, [5])])
def test_batches_hold_every_image_once_and_no_image_is_alone(count, sizes):
    batches = utils.split_batches(torch.arange(count), 4)
    assert [len(batch) for batch in batches] == sizes
    assert torch.equal(torch.cat(batches), torch.arange(count))


def test_batches_of_one_stay():
    assert [len(batch) for batch in utils.split_batches(torch.arange(3), 1)] == [1, 1, 1]


def test_evaluate_is_the_mean_over_images_in_eval_mode(few):
    model = small().train()
    before = copy.deepcopy(model.state_dict())
    loss, accuracy = utils.evaluate(model, few, few.val, torch.float32, batch_size=33)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    model.eval()
    losses, right = [], []
    for i in few.val.tolist():  # one by one
        image = (few.images[i:i + 1] / 255 - 0.5) / 0.5
        logits = model(image)
        losses.append(F.cross_entropy(logits, few.labels[i:i + 1]).item())
        right.append(logits.argmax().item() == few.labels[i].item())
    assert loss == pytest.approx(sum(losses) / 100, rel=1e-4)
    assert accuracy == pytest.approx(sum(right) / 100)


def test_an_epoch_trains_like_the_plain_loop(few):
    ours, plain = small(norm=False), small(norm=False)
    torch.manual_seed(5)  # the dropout
    loss, accuracy = utils.train_one_epoch(
        ours, few, torch.optim.Adam(ours.parameters(), fused=True), 150,
        torch.Generator().manual_seed(6), None, torch.float32, utils.progress_bar())

    torch.manual_seed(5)
    optimizer = torch.optim.Adam(plain.parameters())
    plain.train()
    order = torch.randperm(400, generator=torch.Generator().manual_seed(6))
    losses, right = [], 0
    for start in range(0, 400, 150):
        chosen = order[start:start + 150]
        logits = plain((few.images[chosen] / 255 - 0.5) / 0.5)
        loss_of_batch = F.cross_entropy(logits, few.labels[chosen])
        optimizer.zero_grad()
        loss_of_batch.backward()
        optimizer.step()
        losses += [loss_of_batch.item()] * len(chosen)
        right += (logits.argmax(1) == few.labels[chosen]).sum().item()
    assert loss == pytest.approx(sum(losses) / 400, rel=1e-4)
    assert accuracy == pytest.approx(right / 400)
    for p, q in zip(ours.parameters(), plain.parameters()):
        assert torch.allclose(p, q, atol=1e-5)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(few, tmp_path):
    runs = [fit(small(), few, tmp_path, seed=seed, augmentation="rotation")[0]
            for seed in (0, 0, 1)]
    for run in runs:
        del run["seconds"]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_validating_on_augmented_images_changes_nothing_else(few, tmp_path, monkeypatch):
    with_it = fit(small(), few, tmp_path, augmentation="color_jitter")[0]
    evaluate = utils.evaluate
    monkeypatch.setattr(utils, "evaluate", lambda model, data, part, dtype, augment=None:
                        evaluate(model, data, part, dtype))
    without = fit(small(), few, tmp_path, augmentation="color_jitter")[0]
    assert with_it["train_loss"] == without["train_loss"]
    assert with_it["val_accuracy"] == without["val_accuracy"] == without["val_accuracy_augmented"]
    assert with_it["val_accuracy_augmented"] != with_it["val_accuracy"]


def scripted(monkeypatch, accuracies, losses=None):
    """Let the validation accuracies (and losses) of the epochs be these."""
    values = iter(zip(losses or accuracies, accuracies))
    monkeypatch.setattr(utils, "evaluate", lambda *_: next(values))


def test_early_stopping_takes_the_first_best_and_stops_after_patience(few, tmp_path, monkeypatch):
    scripted(monkeypatch, [0.1, 0.3, 0.3, 0.2, 0.3, 0.9])
    model = small()
    history, best_epoch, best_weights = fit(model, few, tmp_path, num_epochs=6, patience=3)
    assert best_epoch == 2  # 0.3 again is not strictly better
    assert history["val_accuracy"] == [0.1, 0.3, 0.3, 0.2, 0.3]
    best, latest = (utils.load_checkpoint(tmp_path / f"{name}.ckpt") for name in ("best", "latest"))
    assert (best["epoch"], latest["epoch"]) == (2, 5)
    for key, value in model.state_dict().items():
        assert torch.equal(best["model"][key], best_weights[key])
        assert torch.equal(latest["model"][key], value)
    assert not torch.equal(best_weights["5.weight"], model[5].weight)  # a copy, not an alias


def test_early_stopping_on_the_loss(few, tmp_path, monkeypatch):
    scripted(monkeypatch, [0.1, 0.2, 0.3, 0.4], losses=[2.0, 1.0, 1.5, 1.2])
    _, best_epoch, _ = fit(small(), few, tmp_path, num_epochs=4, patience=2, monitor="loss")
    assert best_epoch == 2


def test_without_early_stopping_there_is_no_best_model(few, tmp_path):
    history, best_epoch, best_weights = fit(small(), few, tmp_path)
    assert (best_epoch, best_weights) == (0, None)
    assert len(history["val_loss"]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["latest.ckpt"]


def test_the_learning_rate_decays_once_an_epoch(few, tmp_path):
    fit(small(), few, tmp_path, num_epochs=3)
    latest = utils.load_checkpoint(tmp_path / "latest.ckpt")
    assert latest["scheduler"]["_last_lr"] == [pytest.approx(1e-3 * 0.9**3)]


def test_a_diverging_run_is_told(few, tmp_path):
    model = small()
    model[0].weight.data.fill_(float("nan"))
    with pytest.raises(utils.Problem, match="epoch 1 the loss is nan at learning rate 0.001"):
        fit(model, few, tmp_path)


def test_a_loss_that_only_validation_sees_diverge_is_told(few, tmp_path, monkeypatch):
    scripted(monkeypatch, [0.1], losses=[float("inf")])
    with pytest.raises(utils.Problem, match="epoch 1 the loss is inf"):
        fit(small(), few, tmp_path, patience=3, monitor="loss")
    assert list(tmp_path.iterdir()) == []


def test_the_record_is_of_the_best_model_and_of_all_test_images(few, folder, monkeypatch):
    """With the best epoch before the last, and more than 1,000 test images."""
    optimizers = []

    def fit(model, data, optimizer, scheduler, **settings):
        optimizers.append(optimizer)
        history = {key: [0.3, 0.6, 0.4] for key in ("train_loss", "train_accuracy", "val_accuracy")}
        return history, 2, {key: value * 0 for key, value in model.state_dict().items()}

    monkeypatch.setattr(utils, "fit", fit)
    data = copy.copy(few)
    data.test = torch.arange(1500)
    flags = ex3_convnet_flags("--earlystop", "--reg=0.25", "--learning_rate=0.5")
    record = utils.run_experiment("T", "t", small(norm=False), data, flags, torch.float32)
    zeros = (few.labels[:1500] == 0).float()  # with all weights 0 the first class always wins
    result = record["result"]
    assert (result["epoch"], result["train_accuracy"], result["val_accuracy"]) == (2, 0.6, 0.6)
    assert result["test_accuracy"] == pytest.approx(zeros.mean().item())
    assert result["test_accuracy_first_1000"] == pytest.approx(zeros[:1000].mean().item())
    assert result["test_accuracy"] != result["test_accuracy_first_1000"]
    assert type(optimizers[0]) is torch.optim.Adam
    group = optimizers[0].param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (0.5, 0.25)


def ex3_convnet_flags(*argv):
    return utils.parse_flags(vars(ex3_convnet), argv)


def test_bfloat16_trains_about_the_same(few):
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        model = small(norm=False)
        torch.manual_seed(0)
        losses.append(utils.train_one_epoch(
            model, few, torch.optim.Adam(model.parameters()), 100,
            torch.Generator().manual_seed(0), None, dtype, utils.progress_bar())[0])
        assert all(p.dtype == torch.float32 for p in model.parameters())
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_the_layout_in_memory_changes_nothing_but_the_speed(folder, few, monkeypatch):
    """And the images keep it, as does a batch of them."""
    histories = []
    for channels_last in (True, False):
        data = utils.load_data("synthetic", 32, 100, 20, (0.5,) * 3, (0.5,) * 3,
                               torch.device("cpu"), channels_last)
        images, _ = data.batch(torch.arange(5))
        assert images.is_contiguous(memory_format=utils.memory_format(channels_last))
        flags = ex3_convnet_flags("--num_epochs=1", f"--channels_last={channels_last}")
        data.test = data.test[:10]
        model = small()
        model[3].p = 0  # dropout draws in the order of the memory
        record = utils.run_experiment("T", "t", model, data, flags, torch.float32)
        histories.append(record["history"]["train_loss"] + record["history"]["val_loss"])
    assert histories[0] == pytest.approx(histories[1], rel=1e-4)


def test_a_compiled_network_trains_the_same(few):
    losses = []
    for compiled in (False, True):
        model = small()
        if compiled:
            utils.compile_model(model, torch.device("cpu"))
        torch.manual_seed(0)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        model[3].p = 0  # its draws differ when compiled
        losses.append(utils.train_one_epoch(
            model, few, optimizer, 200, torch.Generator().manual_seed(0), None, torch.float32,
            utils.progress_bar())[0])
        assert "0.weight" in model.state_dict()  # under the names of the plain network
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_without_a_compiler_compile_is_refused(monkeypatch):
    monkeypatch.setattr(utils.shutil, "which", lambda name: None)
    with pytest.raises(utils.Problem, match=r"C\+\+ compiler") as problem:
        utils.compile_model(small(), torch.device("cpu"))
    assert problem.value.status == 2


# ------------------------------------ checkpoints and records ------------------------------------


class Unwritable:
    """Fails when half of the file is written, as a full disk does."""

    def __reduce__(self):
        raise OSError("No space left on device")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "model.ckpt"
    utils.save_checkpoint(path, {"epoch": 1})
    with pytest.raises(utils.Problem, match="model.ckpt cannot be written"):
        utils.save_checkpoint(path, {"epoch": 2, "model": Unwritable()})
    assert utils.load_checkpoint(path) == {"epoch": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(utils.Problem, match="cannot be written"):
        utils.save_checkpoint(tmp_path / "file" / "model.ckpt", {})


def test_a_folder_that_cannot_be_written_is_told_before_training(few, folder):
    (folder / "figures").touch()
    with pytest.raises(utils.Problem, match="figures.* cannot be written"):
        ex3_convnet.main(["--dataset=synthetic"])


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04 half"])
def test_a_damaged_checkpoint_is_named(tmp_path, content):
    (tmp_path / "model.ckpt").write_bytes(content)
    with pytest.raises(utils.Problem, match="model.ckpt"):
        utils.load_checkpoint(tmp_path / "model.ckpt")


def test_a_checkpoint_cannot_run_code(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    torch.save({"model": Trap()}, tmp_path / "model.ckpt")
    with pytest.raises(utils.Problem):
        utils.load_checkpoint(tmp_path / "model.ckpt")
    assert not (tmp_path / "sprung").exists()


# ---------------------------------------- the whole run ----------------------------------------


def test_a_short_real_training_beats_chance_by_far(folder, capsys):
    results = ex3_convnet.main([
        "--dataset=synthetic", "--norm_flag", "--earlystop", "--num_epochs=2", "--batch_size=20",
        "--learning_rate=5e-4", "--num_training=1000", "--num_validation=200"])
    record = results["none"][""][0]
    result = record["result"]
    assert result["val_accuracy"] > 0.3
    assert result["test_accuracy"] > 0.3
    history = record["history"]
    best = history["val_accuracy"].index(max(history["val_accuracy"]))
    assert (record["best_epoch"], result["epoch"]) == (best + 1, best + 1)
    assert result["train_accuracy"] == history["train_accuracy"][best]

    written = json.loads(next((folder / "figures/synthetic-1000/records").iterdir()).read_text())
    assert written == json.loads(json.dumps(record))
    assert written["parameters"]["trainable"] == 7_682_826
    assert (written["flags"]["batch_size"], written["seed"], written["data"]) == (
        20, 0, "synthetic")
    assert sorted(written["images"].values()) == [200, 1000, 1000]
    assert all(len(values) == 2 for values in history.values())

    # the checkpoint of the best model has the accuracy that the record states
    best = utils.load_checkpoint(folder / "best_model_convnet-batch-norm-early-stopping.ckpt")
    model = ex3_convnet.ConvNet(norm_flag=True)
    model.load_state_dict(best["model"])
    data = utils.load_data("synthetic", 32, 1000, 200, best["mean"], best["std"],
                           torch.device("cpu"))
    dtype = getattr(torch, record["precision"])
    assert utils.evaluate(model, data, data.test, dtype)[1] == pytest.approx(
        result["test_accuracy"], abs=0.005)
    assert best["classes"] == data.classes
    output = capsys.readouterr().out
    assert f"test {result['test_accuracy']:.1%}" in output
    assert "synthetic" in output
