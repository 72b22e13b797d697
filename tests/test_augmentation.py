"""Augmentation: each technique against torchvision's functional for one image, and its draws."""

import itertools
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


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def spread(low, high, *_):
    """Sixteen numbers from low to high, evenly: in the place of a uniform draw for each image."""
    return low + (high - low) * torch.arange(16) / 16


def same_up_to_ties(ours, theirs):
    """Equal but for a few pixels where nearest neighbour may round either way."""
    return (ours - theirs).abs().gt(1e-4).float().mean() < 0.01


def rotate(image, angle, _):
    return reference.rotate(image, angle)


def translate(image, x, y):
    return reference.affine(image, 0, [round(32 * x), round(32 * y)], 1, [0.0])


def scale(image, factor, _):
    return reference.affine(image, 0, [0, 0], factor, [0.0])


def enlarge_and_crop(image, left, top):
    large = reference.resize(image, [40, 40], antialias=True)  # bilinear
    return reference.crop(large, int(top), int(left), 32, 32)


@pytest.mark.parametrize(("technique", "low", "high", "theirs"), [
    (partial(utils.rotate, degrees=45), -45, 45, rotate),
    (partial(utils.translate, fraction=0.5), -0.5, 0.5, translate),
    (partial(utils.scale, low=0.6, high=1.4), 0.6, 1.4, scale),
    (partial(utils.resize_crop, ratio=40 / 32), 0, 9, enlarge_and_crop)])
def test_geometry(images, monkeypatch, technique, low, high, theirs):
    """The first draw of each image goes from low to high, a second one from high to low."""
    down = iter([False, True])

    def draw(low, high, *_):
        numbers = spread(low, high)
        return numbers.flip(0) if next(down) else numbers

    monkeypatch.setattr(utils, "uniform", draw)
    ours = technique(images, None)
    numbers = spread(low, high).tolist()
    expected = [theirs(*each) for each in zip(images, numbers, reversed(numbers))]
    assert same_up_to_ties(ours, torch.stack(expected))
    assert not same_up_to_ties(ours, images)


@pytest.mark.parametrize(("technique", "theirs"), [
    (partial(utils.flip, dim=3, p=0.5), reference.hflip),
    (partial(utils.flip, dim=2, p=0.5), reference.vflip),
    (partial(utils.greyscale, p=0.5), partial(reference.rgb_to_grayscale, num_output_channels=3))])
def test_flips_and_greyscale_change_the_images_whose_draw_is_below_p(
        images, monkeypatch, technique, theirs):
    monkeypatch.setattr(utils, "uniform", lambda *_: torch.tensor([0.2, 0.7] * 8))
    ours = technique(images, None)
    assert torch.allclose(ours[::2], theirs(images[::2]), atol=1e-6)
    assert torch.equal(ours[1::2], images[1::2])


COLOURS = {  # torchvision's function, the width of the draw around 1 or, of the hue, around 0
    "brightness": (reference.adjust_brightness, 0.4), "contrast": (reference.adjust_contrast, 0.4),
    "saturation": (reference.adjust_saturation, 0.4), "hue": (reference.adjust_hue, 0.5)}


def adjusted(images, name, width):
    """The images as torchvision changes them by amounts from one end of the draw to the other."""
    theirs, _ = COLOURS[name]
    amounts = spread(-width, width)
    if name != "hue":
        amounts = 1 + amounts
    return torch.stack([theirs(image, amount.item()) for image, amount in zip(images, amounts)])


@pytest.mark.parametrize("name", COLOURS)
def test_each_of_the_four_colours_of_color_jitter(images, monkeypatch, name):
    monkeypatch.setattr(utils, "uniform", spread)
    images[0] = 0.5  # grey has no hue
    _, width = COLOURS[name]
    ours = utils.color_jitter(images, generator(), **{**dict.fromkeys(COLOURS, 0), name: width})
    assert torch.allclose(ours, adjusted(images, name, width), atol=1e-4)


def test_color_jitter_takes_the_four_in_random_order(images, monkeypatch):
    monkeypatch.setattr(utils, "uniform", spread)
    widths = {"brightness": 0.4, "contrast": 0.3, "saturation": 0.2, "hue": 0.1}
    expected = {}
    for order in itertools.permutations(widths):
        expected[order] = images
        for name in order:
            expected[order] = adjusted(expected[order], name, widths[name])
    found = set()
    for seed in range(20):
        ours = utils.color_jitter(images, generator(seed), **widths)
        distances = {order: (ours - theirs).abs().max() for order, theirs in expected.items()}
        nearest = min(distances, key=distances.get)
        assert distances[nearest] < 1e-4
        found.add(nearest)
    assert len(found) > 5


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
    if name in few:
        assert distinct == few[name]
    else:
        assert distinct > 30
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
