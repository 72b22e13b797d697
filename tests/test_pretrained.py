"""VGG11-BN: the network, weights of all kinds, freezing, features that are computed once."""

import hashlib

import pytest
import torch
from conftest import TINY, checkpoints_in, parse, random_weights, tiny_features, vgg_features
from torch import nn
from torchvision.models import VGG11_BN_Weights

import ex3_pretrained
import utils
from ex3_pretrained import VGG, load_features

FROZEN = "--fine_tune=False"


@pytest.fixture
def run(small, weights_file):
    """A function that trains from the weights: the record, and the best model's state dict."""
    def run(*argv):
        *_, record = ex3_pretrained.main([*TINY, f"--pretrained={weights_file}", *argv])
        return record, next(iter(checkpoints_in(small).values()))["model"]

    return run


def test_the_network_is_torchvisions_features_and_a_head(tmp_path):
    """Built once in full, by torchvision's own function; its features make one vector."""
    model, reference = VGG().eval(), vgg_features().eval()
    assert str(model.features) == str(reference)
    assert [type(layer) for layer in model.head] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    sizes = [sum(p.numel() for p in part.parameters()) for part in (model.features, model.head)]
    assert sizes == [9_225_984, 512 * 256 + 256 + 2 * 256 + 256 * 10 + 10]
    torch.save(random_weights(reference), tmp_path / "weights.pth")
    load_features(model, str(tmp_path / "weights.pth"))
    for size in (32, 64):
        images = torch.rand(2, 3, size, size)
        vectors = nn.functional.adaptive_avg_pool2d(reference(images), 1).flatten(1)
        torch.testing.assert_close(model.extract(images), vectors)
        torch.testing.assert_close(model(images), model.head(vectors))


@pytest.mark.parametrize(("argv", "deviations", "bias"), [
    (["--pretrained=none"], (1e-3, 1e-3), False),  # as in the template
    ([], ((3 * 512)**-0.5, (3 * 256)**-0.5), True)])  # PyTorch's: uniform up to inputs**-0.5
def test_initial_weights_of_the_head(tiny_vgg, argv, deviations, bias):
    torch.manual_seed(0)
    model = ex3_pretrained.build(parse(*argv, script=ex3_pretrained), 10)
    for layer, deviation in zip((model.head[0], model.head[3]), deviations):
        assert layer.weight.std().item() == pytest.approx(deviation, rel=0.05)
        assert layer.bias.any() == bias


@pytest.mark.parametrize("change", [
    lambda state: {**state, "classifier.0.weight": torch.zeros(3)},  # as torchvision's
    lambda state: state,  # features.* only
    lambda state: {k: v.half() if v.is_floating_point() else v for k, v in state.items()},
    lambda state: {"model": {**state, "head.0.bias": torch.zeros(256)}, "epoch": 3}])
def test_weights_of_all_kinds_are_loaded_and_known_by_their_hash(tiny_vgg, tmp_path, change):
    stored, path, model = change(random_weights(tiny_features())), tmp_path / "weights.pth", VGG()
    torch.save(stored, path)
    head = model.head[0].bias.clone()
    assert load_features(model, str(path)) == hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    for name, value in model.features.state_dict().items():
        wanted = stored.get("model", stored)[f"features.{name}"]
        assert torch.equal(value, wanted.to(value.dtype))
        assert value.dtype in (torch.float32, torch.int64)
    assert torch.equal(model.head[0].bias, head)


def test_a_run_from_scratch_on_photos_is_a_start_for_the_next(small, tiny_vgg, photos):
    """The hash of the weights is part of the identity, their path is not."""
    argv = [*TINY, "--num_training=0", "--num_validation=0", "--learning_rate=1e-12"]
    ex3_pretrained.main([*argv, f"--dataset={photos}", "--pretrained=none"])
    path, = small.rglob("best_model_part_4b_2.ckpt")
    mine = path.rename(small / "mine.ckpt")
    record, = ex3_pretrained.main([*argv, f"--pretrained={mine}"])
    assert record["title"] == "VGG11-BN fine-tuned, mine weights"
    assert record["identity"]["weights"] == hashlib.sha256(mine.read_bytes()).hexdigest()[:16]
    assert str(small) not in str(record)


@pytest.mark.parametrize("content", [
    b"", b"no weights", b"PK\x03\x04 half", None, [1, 2], torch.zeros(3), {}, {"model": 3},
    {0: torch.zeros(3)}, lambda state: {**state, "features.0.weight": torch.zeros(3)},
    lambda state: {**state, "features.0.weight": 3},
    lambda state: {**state, "features.9.weight": torch.zeros(3)},
    lambda state: {k: v for k, v in state.items() if k != "features.4.weight"},
    lambda state: {k: v for k, v in state.items() if k != "features.1.running_mean"}])
def test_what_has_no_such_weights_is_named_in_one_sentence(tiny_vgg, tmp_path, content):
    path = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content(random_weights(tiny_features())) if callable(content) else content, path)
    with pytest.raises(utils.Problem, match=r"weights\.pth") as problem:
        load_features(VGG(), str(path))
    assert (problem.value.status, str(problem.value).count("\n")) == (1, 0)


def test_imagenet_is_torchvisions_file_whose_hash_is_checked(small, tiny_vgg, monkeypatch):
    asked, state = [], random_weights(tiny_features())
    monkeypatch.setattr(VGG11_BN_Weights, "get_state_dict", lambda weights, **options: asked.append(
        (weights, options["check_hash"])) or state)
    record, = ex3_pretrained.main([*TINY, FROZEN])
    assert asked == [(VGG11_BN_Weights.IMAGENET1K_V1, True)]
    assert (record["pretrained"], record["identity"]["weights"]) == ("imagenet", "6002323d")
    best = next(iter(checkpoints_in(small).values()))["model"]
    assert all(torch.equal(best[name], value) for name, value in state.items())


@pytest.mark.parametrize("cached", [None, b"half a file"])
def test_without_the_imagenet_weights_one_sentence_names_the_ways_on(
        small, tiny_vgg, monkeypatch, cached):
    def no_network(_):
        raise OSError("no network")

    monkeypatch.setenv("TORCH_HOME", str(small))
    monkeypatch.setattr(torch.hub, "urlopen", no_network)
    path = small / "hub/checkpoints/vgg11_bn-6002323d.pth"
    if cached:
        path.parent.mkdir(parents=True)
        path.write_bytes(cached)
    with pytest.raises(utils.Problem) as problem:
        ex3_pretrained.main(TINY)
    assert problem.value.status == 1
    for words in (path.name, str(path.parent), "--pretrained=PATH", "--pretrained=none",
                  "" if cached else "no network"):
        assert words in str(problem.value)


def test_frozen_random_features_are_refused(small, capsys):
    with pytest.raises(utils.Problem, match="random features") as problem:
        ex3_pretrained.main([*TINY, "--pretrained=none", FROZEN])
    assert (problem.value.status, capsys.readouterr().out) == (2, "")


@pytest.mark.parametrize(("argv", "learn", "moves"), [
    ([FROZEN], 6, lambda name: False),  # from features that are computed once,
    ([FROZEN, "--augmentation=rotation"], 6, lambda name: False),  # and anew
    ([FROZEN, "--frozen_norm=train"], 6, lambda name: "running" in name or "num_batches" in name),
    ([], 6 + 8, lambda name: True)])
def test_what_is_frozen_stays_to_the_bit_and_out_of_the_optimizer(
        run, small, weights_file, argv, learn, moves):
    _, state = run(*argv)
    for name, value in utils.load_checkpoint(weights_file).items():
        assert torch.equal(state[name], value) != moves(name), name
    assert state["head.1.num_batches_tracked"] > 0
    *_, latest = checkpoints_in(small).values()
    assert len(latest["optimizer"]["param_groups"][0]["params"]) == learn


@pytest.mark.parametrize(("augmentation", "shapes"), [
    ("none", [(1, 180, 512)]), ("horizontal_flip", [(2, 180, 512)]), ("rotation", [])])
def test_features_computed_once_give_the_same_numbers(run, monkeypatch, augmentation, shapes):
    argv = [FROZEN, f"--augmentation={augmentation}", "--num_epochs=4"]
    extract, made = ex3_pretrained.extract_features, []
    monkeypatch.setattr(ex3_pretrained, "extract_features",
                        lambda *arguments: made.append(extract(*arguments)) or made[-1])
    once, _ = run(*argv)
    monkeypatch.setattr(ex3_pretrained, "extract_features", lambda model, data, *_: data)
    plain, _ = run(*argv)
    assert [data.features.shape for data in made] == shapes
    assert once["result"] == pytest.approx(plain["result"], abs=1e-6)
    for name in plain["history"].keys() - {"seconds"}:
        assert once["history"][name] == pytest.approx(plain["history"][name], rel=1e-4), name
