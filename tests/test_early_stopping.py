"""Early stopping: which epoch is the best, when it ends, and that its weights are reported."""

import copy

import pytest
import torch
from conftest import TINY
from torch import nn

import ex3_convnet
import ex3_pretrained
import utils


@pytest.fixture
def stopped(few, folder, no_drawing, small_convnet, monkeypatch):
    """A function that trains the convnet with these validation accuracies (and losses).

    Returns the record and the states in the checkpoints "latest" and "best".
    """
    def run(accuracies, *argv, losses=None):
        values = iter(zip(losses or accuracies, accuracies))
        monkeypatch.setattr(utils, "evaluate", lambda *_: next(values))
        results = ex3_convnet.main([*TINY, "--earlystop", "--precision=float32", *argv,
                                    f"--num_epochs={len(accuracies)}"])
        return results["none"][""][0], *(
            utils.load_checkpoint(next(folder.glob(f"{kind}_model_*.ckpt")))
            for kind in ("latest", "best"))

    return run


def test_early_stopping_takes_the_first_best_and_stops_after_patience(stopped, capsys):
    record, latest, best = stopped([0.1, 0.3, 0.3, 0.2, 0.3, 0.9], "--patience=3")
    assert record["result"]["best_epoch"] == 2  # 0.3 again is not strictly better
    assert record["history"]["val_accuracy"] == [0.1, 0.3, 0.3, 0.2, 0.3]
    assert (best["epoch"], latest["epoch"]) == (2, 5)
    assert "Early stop: no better epoch than 2 for 3 epochs" in capsys.readouterr().out
    for key, value in best["model"].items():
        assert torch.equal(latest["best_model"][key], value)
        assert not torch.equal(latest["model"][key], value)  # it has learnt on


def test_early_stopping_on_the_loss(stopped):
    record, _, best = stopped([0.1, 0.2, 0.3, 0.4], "--patience=2", "--monitor=loss",
                              losses=[2.0, 1.0, 1.5, 1.2])
    assert record["result"]["best_epoch"] == best["epoch"] == 2
    assert record["result"]["val_accuracy"] == 0.2


def test_a_first_epoch_that_learns_nothing_can_be_the_best(stopped):
    record, *_ = stopped([0.0, 0.0, 0.0], "--patience=2")
    assert (record["result"]["best_epoch"], len(record["history"]["val_loss"])) == (1, 3)


def test_the_weights_of_the_best_epoch_are_a_copy(few, folder, small_convnet):
    flags = utils.parse_flags(vars(ex3_convnet), TINY)
    run = ex3_convnet.experiment(flags, few.facts())
    run.open(few, torch.float32)
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    run.begin(model=model, optimizer=optimizer)
    before = copy.deepcopy(model.state_dict())
    run.keep_best(1, 0.5)
    model.weight.data.zero_()
    assert torch.equal(run.best_weights["weight"], before["weight"])


def test_without_early_stopping_there_is_no_best_model(few, folder, no_drawing, small_convnet):
    record = ex3_convnet.main([*TINY, "--num_epochs=2"])["none"][""][0]
    assert (record["result"]["best_epoch"], record["result"]["epoch"]) == (None, 2)
    assert len(record["history"]["val_loss"]) == 2
    assert [path.name for path in folder.glob("*.ckpt")] == [
        "latest_model_convnet_synthetic-60.ckpt"]


def test_the_record_is_of_the_best_model_and_of_all_test_images(few, stopped):
    """With the best epoch before the last, and more than 1,000 test images."""
    few.test = torch.arange(180).repeat(7)
    record, latest, best = stopped([0.3, 0.6, 0.4, 0.5], "--learning_rate=0.1")
    result, history = record["result"], record["history"]
    assert (result["epoch"], result["val_accuracy"]) == (2, 0.6)
    assert result["train_accuracy"] == history["train_accuracy"][1]
    model = ex3_convnet.ConvNet().eval()
    for state, key in (best, "test_accuracy"), (latest, "latest_test_accuracy"):
        model.load_state_dict(state["model"])
        with torch.inference_mode():
            right = model(few.batch(few.test)[0]).argmax(1) == few.labels[few.test]
        assert result[key] == pytest.approx(right.float().mean().item())
        if state is best:
            assert result["test_accuracy_first_1000"] == pytest.approx(
                right[:1000].float().mean().item())
    assert len({result[key] for key in ("test_accuracy", "latest_test_accuracy",
                                        "test_accuracy_first_1000")}) == 3


def test_the_pretrained_network_reports_its_best_epoch_too(
        few, folder, no_drawing, tiny_vgg, monkeypatch):
    values = iter([(1.0, 0.3), (1.0, 0.6), (1.0, 0.4)])
    monkeypatch.setattr(utils, "evaluate", lambda *_: next(values))
    record = ex3_pretrained.main([*TINY, "--pretrained=False", "--num_epochs=3",
                                  "--augmentation=none", "--precision=float32"])["none"][""][0]
    result = record["result"]
    assert (result["best_epoch"], result["val_accuracy"]) == (2, 0.6)
    best, latest = (utils.load_checkpoint(folder / f"{kind}_model_part_4b_2_synthetic-60.ckpt")
                    for kind in ("best", "latest"))
    assert (best["epoch"], latest["epoch"]) == (2, 3)
    model, predicted = ex3_pretrained.VGG(), []
    for state in (best, latest):
        model.load_state_dict(state["model"])
        predicted.append(utils.predict_classes(model, few, few.test, torch.float32).tolist())
    recorded = [utils.unpack(record["predictions"][kind]["test"]).tolist()
                for kind in ("reported", "latest")]
    assert recorded == predicted
    assert recorded[0] != recorded[1]
