"""The first layer's filters: in the record before and after training, and drawn by both scripts."""

import numpy as np
import pytest
import torch
from conftest import TINY, records_in
from PIL import Image

import ex3_convnet
import ex3_pretrained
import utils

CONVOLUTION = ("nn.Conv2d(inputs, outputs, kernel_size=3, padding=1)",
               "nn.Conv2d(inputs, outputs, kernel_size=5, padding=2)")
LEARNING = [*TINY, "--num_epochs=3", "--learning_rate=0.01"]


@pytest.fixture
def figures(monkeypatch):
    """A list that grows by (name of the file, texts of the figure, its pictures) with each that is
    saved."""
    found, save = [], utils.save_figure

    def watch(figure, path, show=False):
        texts = [figure.get_suptitle(), *(axis.get_title() for axis in figure.axes)]
        pictures = [np.array(image.get_array()) for axis in figure.axes for image in axis.images]
        found.append((path.name, texts, pictures))
        save(figure, path, show)

    monkeypatch.setattr(utils, "save_figure", watch)
    return found


def filters_of(record):
    return [utils.unpack(record["filters"][when]) for when in ("before", "after")]


def check_figure(figures, name, count):
    """The one figure with this name says how many filters it shows, before and after."""
    (_, texts, pictures), = (figure for figure in figures if figure[0] == name)
    assert f"the {count} filters of the first convolution" in texts[0]
    assert texts[1].startswith("before training")
    assert texts[2].startswith("after training (epoch ")
    before, after = pictures
    assert before.shape == after.shape
    return before, after


def test_the_convnet_draws_its_filters_before_and_after_training(
        few, folder, small_convnet, figures):
    ex3_convnet.main([*LEARNING, "--earlystop"])
    record, = records_in(folder)
    before, after = filters_of(record)
    best = utils.load_checkpoint(next(folder.glob("best*.ckpt")))["model"]["layers.0.weight"]
    torch.manual_seed(0)
    initial = ex3_convnet.ConvNet().layers[0].weight.detach()
    for filters, weights in (before, initial), (after, best):
        assert np.allclose(filters, weights.numpy(), atol=1e-3)
    assert np.abs(after - before).max() > 0.01
    drawn = check_figure(figures, "convnet-early-stopping_filters.png", 8)
    assert not np.array_equal(*drawn)


def test_question_1_draws_them_as_figures_1_and_2(few, folder, small_convnet, figures):
    ex3_convnet.main([*LEARNING, "--question=1"])
    check_figure(figures, "figure_1_2_filters.png", 8)
    with Image.open(folder / "figures/synthetic-60/figure_1_2_filters.png") as image:
        assert len(image.convert("RGB").getcolors(2**24)) > 50


@pytest.mark.parametrize(("flags", "name", "changes"), [
    (["--fine_tune=False"], "figure_8_part_4a_filters.png", False),
    (["--fine_tune=False", "--frozen_norm=train"],
     "figure_8_part_4a_frozen_norm_train_filters.png", False),
    ([], "figure_9_part_4b_1_filters.png", True),
    (["--pretrained=False"], "figure_10_part_4b_2_filters.png", True)])
def test_the_pretrained_script_draws_its_64_filters(
        few, folder, weights, weights_file, figures, flags, name, changes):
    """Frozen ones are unchanged, and those before training are the pretrained."""
    ex3_pretrained.main([*LEARNING, f"--pretrained={weights_file}", *flags])
    record, = records_in(folder)
    before, after = filters_of(record)
    assert before.shape == after.shape == (64, 3, 3, 3)
    pretrained = np.allclose(before, weights["features.0.weight"].numpy(), atol=1e-3)
    assert pretrained == ("--pretrained=False" not in flags)
    assert np.array_equal(before, after) != changes
    drawn = check_figure(figures, name, 64)
    assert np.array_equal(*drawn) != changes


def test_twenty_filters_of_5_by_5_are_drawn(few, folder, figures, edited):
    edited(CONVOLUTION, channels=(20, 8, 8, 8, 8)).main(LEARNING)
    record, = records_in(folder)
    assert filters_of(record)[1].shape == (20, 3, 5, 5)
    check_figure(figures, "convnet_filters.png", 20)


@pytest.mark.parametrize(("count", "side"), [(1, 3), (16, 3), (20, 5), (64, 3), (128, 3), (7, 11)])
def test_a_mosaic_has_every_filter_in_its_place(count, side):
    filters = np.random.default_rng(0).uniform(0, 0.9, (count, 3, side, side))
    picture = utils.mosaic(filters)
    zoom = max(1, 18 // side)
    cell = zoom * side + 2
    assert picture.shape == (-(-count // 16) * cell, 16 * cell, 3)
    for i in range(count):
        top, left = i // 16 * cell + 1, i % 16 * cell + 1
        tile = picture[top:top + zoom * side:zoom, left:left + zoom * side:zoom]
        assert np.array_equal(tile, filters[i].transpose(1, 2, 0))
    assert (picture == 1).all(axis=2).sum() == picture[..., 0].size - count * (zoom * side) ** 2


def test_filters_that_are_all_zero_are_grey(few, folder, small_convnet, figures, monkeypatch):
    monkeypatch.setattr(utils, "first_filters", lambda model: np.zeros((8, 3, 3, 3), np.float16))
    ex3_convnet.main(TINY)
    before, _ = check_figure(figures, "convnet_filters.png", 8)
    assert before[10, 10].tolist() == [0.5, 0.5, 0.5]


def test_a_record_of_before_there_were_filters_draws_none(few, folder, figures):
    utils.plot_filters({"title": "older"}, folder / "filters.png")
    assert figures == list(folder.iterdir()) == []


def test_without_a_display_show_says_so(few, folder, small_convnet, figures, capsys):
    ex3_convnet.main([*TINY, "--show"])
    assert "There is no display to show it on: open the file" in capsys.readouterr().out
    assert len(list(folder.glob("figures/*/*.png"))) == len(figures) == 3
