"""Predictions: each record holds the classes that were given, from which its accuracies follow."""

import numpy as np
import pytest
import torch
from conftest import TINY, records_in
from torch import nn

import ex3_convnet
import ex3_pretrained
import utils

LONGER = [*TINY, "--num_epochs=3"]


@pytest.fixture
def decided(small_convnet, monkeypatch):
    """A small convnet that does not take all images for the same class, as a new one does."""
    def build(flags, num_classes, build=ex3_convnet.build):
        model = build(flags, num_classes)
        for layer in model.layers:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.normal_(layer.weight, std=0.3)
        return model

    monkeypatch.setattr(ex3_convnet, "build", build)


def accuracies(record):
    """{(model, part): accuracy} from the labels and predictions of a record."""
    labels = {part: utils.unpack(text) for part, text in record["labels"].items()}
    return {(kind, part): (utils.unpack(text) == labels[part]).mean()
            for kind, parts in record["predictions"].items() for part, text in parts.items()}


def check(record):
    """All accuracies that a record states, against its predictions."""
    found, result, history = accuracies(record), record["result"], record["history"]
    assert found["reported", "test"] == result["test_accuracy"]
    assert found["latest", "test"] == result["latest_test_accuracy"]
    assert found["reported", "val"] == pytest.approx(result["val_accuracy"], abs=1e-12)
    assert found["latest", "val"] == pytest.approx(history["val_accuracy"][-1], abs=1e-12)
    if "val_accuracy_augmented" in history:
        assert found["augmented", "val"] == pytest.approx(
            history["val_accuracy_augmented"][result["epoch"] - 1], abs=1e-12)
    if "val_accuracy_recalibrated" in result:
        assert found["recalibrated", "val"] == result["val_accuracy_recalibrated"]
    return {kind for kind, _ in found}


@pytest.mark.parametrize(("flags", "kinds"), [
    ([], set()), (["--earlystop"], set()), (["--norm_flag"], {"recalibrated"}),
    (["--augmentation=rotation"], {"augmented"}),
    (["--norm_flag", "--earlystop", "--augmentation=color_jitter", "--dropout=0.3"],
     {"recalibrated", "augmented"})])
def test_the_convnets_predictions_give_the_accuracies_of_its_record(
        few, folder, decided, no_drawing, flags, kinds):
    ex3_convnet.main([*LONGER, *flags])
    record, = records_in(folder)
    assert check(record) == {"reported", "latest"} | kinds
    assert len(np.unique(utils.unpack(record["predictions"]["reported"]["test"]))) > 1
    for part in ("val", "test"):
        assert np.array_equal(utils.unpack(record["labels"][part]),
                              few.labels[getattr(few, part)].numpy())


@pytest.mark.parametrize(("flags", "kinds"), [
    (["--fine_tune=False"], {"augmented"}), (["--augmentation=none"], set()),
    (["--fine_tune=False", "--frozen_norm=train"], {"augmented"}), ([], {"augmented"})])
def test_the_pretrained_networks_predictions_give_the_accuracies_of_its_record(
        few, folder, weights_file, no_drawing, flags, kinds):
    ex3_pretrained.main([*LONGER, f"--pretrained={weights_file}", *flags])
    record, = records_in(folder)
    assert check(record) == {"reported", "latest"} | kinds


def test_the_best_and_the_latest_model_predict_differently(
        few, folder, decided, no_drawing, monkeypatch):
    values = iter([0.9, 0.1, 0.2])
    evaluate = utils.evaluate
    monkeypatch.setattr(utils, "evaluate", lambda *arguments: (
        evaluate(*arguments)[0], next(values)))
    record = ex3_convnet.main([*LONGER, "--earlystop"])["none"][""][0]
    assert record["predictions"]["reported"]["test"] != record["predictions"]["latest"]["test"]
    found = accuracies(record)
    assert found["reported", "test"] == record["result"]["test_accuracy"]
    assert found["latest", "test"] == record["result"]["latest_test_accuracy"]


@pytest.mark.parametrize("script", [ex3_convnet, ex3_pretrained])
def test_test_images_are_looked_at_only_after_the_training(
        few, folder, small_convnet, tiny_vgg, no_drawing, monkeypatch, script):
    """Each of them once by the latest and once by the reported model."""
    seen, epochs, train, batch = [], [], utils.train_one_epoch, few.batch

    def look(indices, augment=None):
        seen.extend((len(epochs), index) for index in indices.tolist())
        return batch(indices, augment)

    def count(*arguments):
        epochs.append(None)
        return train(*arguments)

    monkeypatch.setattr(utils, "train_one_epoch", count)
    monkeypatch.setattr(few, "batch", look, raising=False)
    pretrained = ["--pretrained=False"] * (script is ex3_pretrained)
    script.main([*LONGER, "--earlystop", "--augmentation=rotation", *pretrained])
    test = set(few.test.tolist())
    assert [epoch for epoch, index in seen if index in test] == [3] * 2 * len(test)
    assert {index for epoch, index in seen if epoch < 3} == set(range(80))  # train and val


def test_packed_arrays_come_back_as_they_were():
    for array in (np.arange(10), np.array([300, 2]), np.zeros((2, 3), np.float16),
                  np.array([], np.int64)):
        back = utils.unpack(utils.pack(array))
        assert np.array_equal(back, array)
        assert back.dtype.kind == array.dtype.kind or array.dtype.kind == "i"


def test_a_packed_array_cannot_run_code():
    buffer = utils.io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    packed = utils.base64.b64encode(utils.zlib.compress(buffer.getvalue())).decode()
    with pytest.raises(ValueError, match="pickle"):
        utils.unpack(packed)


def test_the_classes_are_numbers_of_the_model_in_eval_mode(few, small_convnet):
    torch.manual_seed(0)
    model = ex3_convnet.ConvNet(norm_flag=True, dropout=0.5).train()
    predicted = utils.predict_val_and_test(model, few, torch.float32)
    with torch.inference_mode():
        for part in ("val", "test"):
            expected = model.eval()(few.batch(getattr(few, part))[0]).argmax(1)
            assert predicted[part].tolist() == expected.tolist()
