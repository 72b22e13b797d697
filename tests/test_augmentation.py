"""Augmentation: each technique against torchvision's functional for one image, and its draws."""

import math
from functools import partial

import pytest
import torch
from torchvision.transforms import functional as reference

import utils


@pytest.fixture
def images():
    """Smooth random images, so that a pixel and its neighbour differ by little."""
    noise = torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(noise, (32, 32), mode="bicubic").clamp(0, 1)


def fixed(monkeypatch, *draws):
    """Let utils.uniform return these draws (a list of one number an image each), in order."""
    values = iter(draws)
    monkeypatch.setattr(utils, "uniform", lambda *_: torch.tensor(next(values)))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def spread(low, high):
    return torch.linspace(low, high, 16).tolist()


def same_up_to_ties(ours, theirs):
    """Equal but for a few pixels where nearest neighbour may round either way."""
    return (ours - theirs).abs().gt(1e-4).float().mean() < 0.01


def enlarge_and_crop(image, left, top):
    large = reference.resize(image, [40, 40], antialias=True)  # bilinear
    return reference.crop(large, int(top), int(left), 32, 32)


@pytest.mark.parametrize(("technique", "draws", "theirs"), [
    (partial(utils.rotate, degrees=45), [spread(-45, 45)], reference.rotate),
    (partial(utils.translate, fraction=0.5), [spread(-0.5, 0.5), spread(0.4, -0.3)],
     lambda image, x, y: reference.affine(image, 0, [round(32 * x), round(32 * y)], 1, [0.0])),
    (partial(utils.scale, low=0.6, high=1.4), [spread(0.6, 1.4)],
     lambda image, factor: reference.affine(image, 0, [0, 0], factor, [0.0])),
    (partial(utils.resize_crop, ratio=40 / 32), [spread(0, 8.99), spread(8.99, 0)],
     enlarge_and_crop)])
def test_geometry(images, monkeypatch, technique, draws, theirs):
    fixed(monkeypatch, *draws)
    ours = technique(images, None)
    assert same_up_to_ties(ours, torch.stack([theirs(*each) for each in zip(images, *draws)]))
    assert not same_up_to_ties(ours, images)


@pytest.mark.parametrize(("technique", "theirs"), [
    (partial(utils.flip, dim=3, p=0.5), reference.hflip),
    (partial(utils.flip, dim=2, p=0.5), reference.vflip),
    (partial(utils.greyscale, p=0.5), partial(reference.rgb_to_grayscale, num_output_channels=3))])
def test_flips_and_greyscale_change_the_images_whose_draw_is_below_p(
        images, monkeypatch, technique, theirs):
    fixed(monkeypatch, [0.2, 0.7] * 8)
    ours = technique(images, None)
    assert torch.allclose(ours[::2], theirs(images[::2]), atol=1e-6)
    assert torch.equal(ours[1::2], images[1::2])


@pytest.mark.parametrize(("ours", "theirs", "low", "high"), [
    (utils.adjust_brightness, reference.adjust_brightness, 0.6, 1.4),
    (utils.adjust_contrast, reference.adjust_contrast, 0.6, 1.4),
    (utils.adjust_saturation, reference.adjust_saturation, 0.6, 1.4),
    (utils.adjust_hue, reference.adjust_hue, -0.5, 0.5)])
def test_colours(images, ours, theirs, low, high):
    images[0] = 0.5  # grey has no hue
    amounts = torch.linspace(low, high, 16)
    expected = torch.stack([theirs(i, a.item()) for i, a in zip(images, amounts)])
    assert torch.allclose(ours(images, amounts.view(-1, 1, 1, 1)), expected, atol=1e-4)


def test_color_jitter_takes_the_four_in_random_order(images, monkeypatch):
    taken = []

    def take(images, amount, name):
        taken.append((name, amount))
        return images

    for name in ("brightness", "contrast", "saturation", "hue"):
        monkeypatch.setattr(utils, f"adjust_{name}", partial(take, name=name))
    widths = {"brightness": 0.4, "contrast": 0.3, "saturation": 0.2, "hue": 0.1}
    orders = set()
    for seed in range(20):
        taken.clear()
        utils.color_jitter(images, generator(seed), **widths)
        orders.add(tuple(name for name, _ in taken))
        assert {name for name, _ in taken} == set(widths)
        for name, amount in taken:
            away = (amount - (0 if name == "hue" else 1)).abs().max()
            assert widths[name] / 2 < away <= widths[name]
            assert len(amount.unique()) == 16
    assert len(orders) > 5


@pytest.mark.parametrize("name", utils.AUGMENTATIONS)
def test_each_image_gets_its_own_draw_from_the_given_generator(images, name):
    copies = images[:1].repeat(64, 1, 1, 1)
    augment = utils.make_augment(name, generator(1))
    torch.manual_seed(0)
    first, global_state = augment(copies), torch.get_rng_state()
    again = utils.make_augment(name, generator(1))(copies)
    assert torch.equal(first, again)
    torch.manual_seed(0)
    assert torch.equal(global_state, torch.get_rng_state())
    distinct = len(torch.unique(first.flatten(1), dim=0))
    few = {"vertical_flip": 2, "horizontal_flip": 2, "greyscale": 2, "scaling": 1}
    assert distinct == few[name] if name in few else distinct > 30
    assert first.shape == copies.shape
    assert 0 <= first.min() <= first.max() <= 1


def test_a_uniform_draw(images):
    draws = utils.uniform(-3, 5, torch.empty(20000, 0), generator())
    assert -3 <= draws.min() <= draws.max() < 5
    assert draws.mean().item() == pytest.approx(1, abs=0.1)
    assert draws.var().item() == pytest.approx(64 / 12, rel=0.05)


@pytest.mark.parametrize(("name", "p"), [("vertical_flip", 0.5), ("horizontal_flip", 0.5),
                                         ("greyscale", 0.2)])
def test_how_often_an_image_is_changed(images, name, p):
    changed = 0
    augment = utils.make_augment(name, generator())
    for _ in range(100):
        changed += (augment(images) != images).flatten(1).any(1).sum().item()
    assert changed / 1600 == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / 1600))


def test_techniques_are_combined_in_order(images):
    both = utils.make_augment("scaling+vertical_flip", generator())(images)
    source = generator()
    small = utils.AUGMENTATIONS["scaling"](images, source)
    assert torch.equal(both, utils.AUGMENTATIONS["vertical_flip"](small, source))
    assert not torch.equal(both, small)
    assert utils.make_augment("none", generator()) is None
