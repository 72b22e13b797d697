"""Damaged files: each is read as it was, or named in one sentence."""

import copy
import json
import random
import re
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import DATA, SHORT, comparable, contents, interrupted, outcome
from PIL import Image
from torch import nn

import ex3_convnet
import ex3_pretrained
import utils


def damage(content, draw):
    """Bytes with a fault in them, of a kind and at a place that are drawn."""
    content, length = bytearray(content), draw.randint(1, 64)
    at, other = (draw.randrange(len(content)) for _ in range(2))
    kind = draw.randrange(6)
    if kind == 0:
        content[at] ^= 1 << draw.randrange(8)
    elif kind == 1:
        del content[at:]
    elif kind == 2:
        del content[at:at + length]
    elif kind == 3:
        content[at:at] = draw.randbytes(length)
    elif kind == 4:
        content[at:at + length], content[other:other + length] = (
            content[other:other + length], content[at:at + length])
    else:
        content = draw.randbytes(length)
    return bytes(content)


def works_or_tells(action):
    """What the action returns, or None if it raises a Problem of one line; nothing else."""
    try:
        return action()
    except utils.Problem as problem:
        sentence = str(problem)
    assert re.fullmatch(".{20,}", sentence)
    return None


JUNK = (None, True, -1, 0, 0.5, 7, 1e300, float("nan"), float("inf"), 10**400, "", "x", "\ud800",
        [], [[1, 2]], {}, {"a": 1}, "many\nlines")


def twist(value, draw, junk=JUNK):
    """A copy of nested dicts and lists in which one value, that is drawn, is junk or missing."""
    value = parent = copy.deepcopy(value)
    while True:
        key = draw.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
        if not isinstance(parent[key], (dict, list)) or not parent[key] or draw.random() < 0.2:
            break
        parent = parent[key]
    if draw.random() < 0.2:
        del parent[key]
    else:
        parent[key] = draw.choice(junk)
    return value


# -------------------------------------------- records --------------------------------------------


def test_damaged_records_are_drawn_or_left_out_and_named(few, folder, small_convnet, capsys):
    """Every figure and table that is drawn from a record of this kind; nothing is half-drawn."""
    for question in "2a", "2b":
        ex3_convnet.main([*SHORT, f"--question={question}"])
    draw, drawn, left_out = random.Random(0), 0, 0
    paths = sorted(folder.rglob("convnet-batch-norm*.json"))
    assert len(paths) == 2
    for _ in range(16):
        path = draw.choice(paths)
        good, before = path.read_bytes(), contents(folder)
        if draw.random() < 0.3:
            bad = damage(good, draw)
        else:
            bad = json.dumps(twist(json.loads(good), draw)).encode()
        path.write_bytes(bad)
        argv = draw.choice((["--question=2a"], ["--question=2b"], ["--question=3a"],
                            ["--norm_flag"], ["--norm_flag", "--earlystop"]))
        capsys.readouterr()
        results = works_or_tells(partial(ex3_convnet.main, [*SHORT, *argv, "--redraw"]))
        error = capsys.readouterr().err
        if f"{path} cannot be read as the record of a run and is left out" in error:
            left_out += 1
            titles = [record["title"] for runs in (results or {}).values()
                      for records in runs.values() for record in records]
            early = "early" in path.name
            assert f"ConvNet, batch norm{', early stopping' * early}" not in titles
        if results:
            drawn += 1
            assert path.read_bytes() == bad
        else:
            assert contents(folder) == {**before, str(path): bad}
        path.write_bytes(good)
    assert drawn > 3
    assert left_out > 3


def test_a_damaged_record_does_not_keep_the_others_from_being_drawn(small, capsys):
    """And the run that it was of counts as not done."""
    argv = [*SHORT, "--question=2a"]
    ex3_convnet.main(argv)
    path, = small.rglob("convnet-batch-norm*.json")
    path.write_bytes(path.read_bytes()[:1000])
    assert list(ex3_convnet.main([*argv, "--redraw"])["2a"]) == ["without batch norm"]
    assert capsys.readouterr().err.count(str(path)) == 1
    assert list(ex3_convnet.main(argv)["2a"]) == ["without batch norm", "with batch norm"]


def test_a_record_nested_without_end_is_named(folder, capsys):
    (folder / "records").mkdir()
    (folder / "records/convnet.json").write_text("[" * 100_000)
    assert utils.load_records(folder) == []
    assert "convnet.json cannot be read" in capsys.readouterr().err


# ------------------------------------------ checkpoints ------------------------------------------


@pytest.fixture
def trained(small, image_folder):
    """The checkpoint of a run whose second epoch is missing, its bytes, and ways to read it."""
    argv = [*SHORT, "--norm_flag"]
    with interrupted(2):
        ex3_convnet.main(argv)
    path = small / f"latest_model_convnet-batch-norm_{DATA}.ckpt"
    picture = f"--predict={image_folder / 'test/cat/000.png'}"
    return SimpleNamespace(path=path, good=path.read_bytes(), argv=argv, ways=(
        lambda: ex3_convnet.main([*argv, "--precision=auto", "--resume"]) and "resumed",
        lambda: ex3_convnet.main([*argv, picture]) or "predicted"))


def test_a_flipped_bit_in_the_numbers_of_a_checkpoint_is_noticed(trained):
    weights = utils.load_checkpoint(trained.path)["model"]["layers.4.weight"].contiguous()
    at = trained.good.index(weights.permute(0, 2, 3, 1).numpy().tobytes()[:40])
    bad = bytearray(trained.good)
    bad[at] ^= 1
    trained.path.write_bytes(bad)
    for read in trained.ways:
        with pytest.raises(utils.Problem, match="is damaged"):
            read()


@pytest.mark.parametrize("way", [0, 1], ids=["resume", "predict"])
def test_damaged_checkpoints_work_unchanged_or_are_named(small, trained, way, capsys):
    def result(content):
        """What is printed and left behind, but for the times; None for a Problem."""
        trained.path.write_bytes(content)
        before = contents(small)
        capsys.readouterr()
        if works_or_tells(trained.ways[way]):
            output = re.sub("[0-9,]+ (images/s.*|s|MB)", "", capsys.readouterr().out)
            return output, outcome(small) if way == 0 else None
        assert contents(small) == before
        return None

    draw, good = random.Random(way), result(trained.good)
    results = [result(damage(trained.good, draw)) for _ in range(60)]
    assert all(this in (None, good) for this in results)
    assert results.count(None) > 40


@pytest.mark.parametrize("way", [0, 1], ids=["resume", "predict"])
def test_checkpoints_of_another_structure_work_or_are_named(small, trained, way, capsys):
    """What --resume cannot go on from is kept, if it is not refused. It takes the values as they
    are: a change of one is noticed by the checksums."""
    draw, state = random.Random(way), utils.load_checkpoint(trained.path)
    states = [{other: state[other] for other in state if other != name} for name in state]
    states += [{**state, name: None} for name in ("model", "optimizer", "scheduler", "recipe")]
    if way == 1:
        states += [twist(state, draw, (*JUNK, torch.zeros(3))) for _ in range(24)]
    for state in [*states, None, [], {}]:
        torch.save(state, trained.path)
        bad, before = trained.path.read_bytes(), contents(small)
        capsys.readouterr()
        if not works_or_tells(trained.ways[way]):
            assert contents(small) == before
        elif way == 0 and "Resumed after epoch" not in capsys.readouterr().out:
            kept, = set(small.glob("*.ckpt")) - {trained.path}
            assert kept.read_bytes() == bad
            kept.unlink()


@pytest.mark.parametrize("part", ["model", "optimizer", "scheduler", "history", "best_model"])
def test_a_checkpoint_without_a_part_is_not_resumed(small, trained, part):
    state = utils.load_checkpoint(trained.path)
    del state[part]
    torch.save(state, trained.path)
    with pytest.raises(utils.Problem, match=f"does not fit this run .*{part}"):
        trained.ways[0]()


# ------------------------------------- weights and data -------------------------------------


def test_damaged_weights_are_loaded_whole_or_not_at_all(tmp_path):
    """With a small network in the place of the VGG11-BN."""
    draw, path = random.Random(0), tmp_path / "weights.pth"

    def network():
        return SimpleNamespace(features=nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))

    def values(network):
        return comparable(dict(network.features.state_dict()))

    def load():
        ex3_pretrained.load_features(other, utils.load_checkpoint(path), path)
        return True

    first = network()
    torch.save({f"features.{name}": value for name, value in first.features.state_dict().items()},
               path)
    good = path.read_bytes()
    for _ in range(300):
        path.write_bytes(damage(good, draw))
        other = network()
        before = values(other)
        loaded = works_or_tells(load)
        assert values(other) == (values(first) if loaded else before)


@pytest.mark.parametrize("form", ["cifar-10-batches-py", "cifar-10-batches-bin"])
def test_damaged_cifar10_batches_are_named(small_cifar10, form):
    folder = small_cifar10(form)
    draw, paths = random.Random(0), [folder / form / name for name in utils.CIFAR10_FORMS[form]]
    assert len(paths) == 6
    for _ in range(60):
        path = draw.choice(paths)
        good = path.read_bytes()
        bad = damage(good, draw)
        path.write_bytes(bad)
        if bad != good:
            with pytest.raises(utils.Problem, match=f"{path.name} in .* is missing, truncated or"):
                utils.load_cifar10(folder, mirrors=())
        path.write_bytes(good)
    utils.load_cifar10(folder, mirrors=())


@pytest.mark.parametrize("form", ["cifar-10-python.tar.gz", "cifar-10-binary.tar.gz"])
def test_damaged_cifar10_archives_are_read_as_they_were_or_named(small_cifar10, form):
    folder = small_cifar10(form)
    draw, path, good = random.Random(0), folder / form, (folder / form).read_bytes()
    _, images, labels, *_ = utils.load_cifar10(folder, mirrors=())
    read = 0
    for _ in range(60):
        path.write_bytes(damage(good, draw))
        if result := works_or_tells(partial(utils.load_cifar10, folder, mirrors=())):
            read += 1  # a fault in the archive's own header, say
            assert np.array_equal(result[1], images)
            assert np.array_equal(result[2], labels)
    assert read < 30


@pytest.mark.parametrize(("suffix", "mode"), [
    ("png", "RGB"), ("png", "P"), ("png", "LA"), ("jpg", "RGB"), ("jpg", "CMYK"), ("gif", "P"),
    ("webp", "RGB"), ("bmp", "RGB"), ("tif", "RGB"), ("ppm", "RGB")])
def test_damaged_images_are_read_or_named(tmp_path, suffix, mode):
    draw, path = random.Random(0), tmp_path / f"image.{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    Image.fromarray(noise).convert(mode).save(path)
    good = path.read_bytes()
    for _ in range(60):
        path.write_bytes(damage(good, draw))
        pixels = works_or_tells(lambda: utils.read_image(path, 32))
        assert pixels is None or (pixels.shape, pixels.dtype) == ((32, 32, 3), np.uint8)
