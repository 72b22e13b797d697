"""Augmentation: each technique against torchvision's functional for one image, and its draws."""

import itertools
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

def transformed(name, image, first, second):
    """What torchvision makes of an image with these draws."""
    if name == "rotation":
        return reference.rotate(image, first)
    if name == "translation":
        return reference.affine(image, 0, [round(32 * first), round(32 * second)], 1, [0.0])
    if name == "scaling":
        return reference.affine(image, 0, [0, 0], first, [0.0])
    large = reference.resize(image, [40, 40], antialias=True)  # bilinear
    return reference.crop(large, int(second), int(first), 32, 32)

@pytest.mark.parametrize(("name", "low", "high"), [
    ("rotation", -45, 45), ("translation", -0.5, 0.5), ("scaling", 0.6, 1.4),
    ("resize_crop", 0, 9)])
def test_geometry(images, monkeypatch, name, low, high):
    """The first draw of each image goes from low to high, a second one from high to low; a few
    pixels differ where nearest neighbour may round either way."""
    techniques = {**utils.AUGMENTATIONS, "scaling": partial(utils.scale, low=0.6, high=1.4)}
    down = iter([False, True])

    def draw(low, high, *_):
        numbers = spread(low, high)
        return numbers.flip(0) if next(down) else numbers

    monkeypatch.setattr(utils, "uniform", draw)
    ours = techniques[name](images, None)
    numbers = spread(low, high).tolist()
    theirs = torch.stack([transformed(name, image, first, second) for image, first, second
                          in zip(images, numbers, reversed(numbers))])
    assert (ours - theirs).abs().gt(1e-4).float().mean() < 0.01
    assert (ours - images).abs().gt(1e-4).float().mean() > 0.01

@pytest.mark.parametrize(("name", "p", "theirs"), [
    ("horizontal_flip", 0.5, reference.hflip), ("vertical_flip", 0.5, reference.vflip),
    ("greyscale", 0.2, partial(reference.rgb_to_grayscale, num_output_channels=3))])
def test_flips_and_greyscale_change_the_images_whose_draw_is_below_p(
        images, monkeypatch, name, p, theirs):
    def draw(low, high, *_):
        assert (low, high) == (0, 1)
        return torch.tensor([p - 0.01, p + 0.01] * 8)

    monkeypatch.setattr(utils, "uniform", draw)
    ours = utils.AUGMENTATIONS[name](images, None)
    assert torch.allclose(ours[::2], theirs(images[::2]), atol=1e-6)
    assert torch.equal(ours[1::2], images[1::2])

ADJUST = {"brightness": reference.adjust_brightness, "contrast": reference.adjust_contrast,
          "saturation": reference.adjust_saturation, "hue": reference.adjust_hue}

def test_color_jitter_takes_the_four_colours_in_random_order(images, monkeypatch):
    monkeypatch.setattr(utils, "uniform", spread)
    images[0] = 0.5  # grey has no hue
    widths = {"brightness": 0.4, "contrast": 0.3, "saturation": 0.2, "hue": 0.5}
    amounts = {name: 1 + spread(-width, width) for name, width in widths.items()}
    amounts["hue"] -= 1
    expected = {}
    for order in itertools.permutations(widths):
        expected[order] = images
        for name in order:
            expected[order] = torch.stack([ADJUST[name](image, amount.item()) for image, amount
                                           in zip(expected[order], amounts[name])])
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

def test_techniques_are_combined_in_order(images):
    both = utils.make_augment("scaling+vertical_flip", generator())(images)
    source = generator()
    small = utils.AUGMENTATIONS["scaling"](images, source)
    assert torch.equal(both, utils.AUGMENTATIONS["vertical_flip"](small, source))
    assert utils.make_augment("none", generator()) is None
