"""VGG11-BN: the network, weights of all kinds, freezing, features that are computed once."""

import hashlib
import io
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    TINY,
    checkpoints_in,
    comparable,
    parse,
    random_weights,
    records_in,
    tiny_features,
    vgg_features,
)
from torch import nn
from torchvision.models import VGG11_BN_Weights

import ex3_pretrained
import utils
from ex3_pretrained import VGG, load_features

FEATURES, HEAD = 9_225_984, 512 * 256 + 256 + 2 * 256 + 256 * 10 + 10  # parameters


@pytest.fixture
def run(small, weights_file):
    """A function that trains from the weights: the record, and the best model's state dict."""
    def run(*argv):
        *_, record = ex3_pretrained.main([*TINY, f"--pretrained={weights_file}", *argv])
        states = [state for name, state in checkpoints_in(small).items() if "/best_" in name]
        return record, states[-1]["model"]

    return run


# ------------------------------------------ the network ------------------------------------------


def test_the_network_is_torchvisions_features_and_a_head(tmp_path):
    """Built once in full, with torchvision's own function; its features make one vector."""
    model, reference = VGG().eval(), vgg_features().eval()
    assert str(model.features) == str(reference)
    assert [type(layer) for layer in model.head] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    sizes = [sum(p.numel() for p in part.parameters()) for part in (model.features, model.head)]
    assert sizes == [FEATURES, HEAD]
    torch.save(random_weights(reference), tmp_path / "weights.pth")
    load_features(model, str(tmp_path / "weights.pth"))
    for size in (32, 64):
        images = torch.rand(2, 3, size, size)
        vectors = nn.functional.adaptive_avg_pool2d(reference(images), 1).flatten(1)
        torch.testing.assert_close(model.extract(images), vectors)
        torch.testing.assert_close(model(images), model.head(vectors))


@pytest.mark.parametrize(("argv", "deviation"), [
    (["--pretrained=none"], 1e-3), ([], (3 * 512)**-0.5)])  # PyTorch's: uniform, ±512^-0.5
def test_from_scratch_the_head_starts_as_in_the_template(tiny_vgg, argv, deviation):
    torch.manual_seed(0)
    model = ex3_pretrained.build(parse(*argv, script=ex3_pretrained), 10)
    assert model.head[0].weight.std().item() == pytest.approx(deviation, rel=0.02)
    assert model.head[3].weight.std().item() == pytest.approx(
        1e-3 if argv else (3 * 256)**-0.5, rel=0.05)
    assert model.head[0].bias.any() == model.head[3].bias.any() == (not argv)


# -------------------------------------------- weights --------------------------------------------


@pytest.mark.parametrize("change", [
    lambda state: {**state, "classifier.0.weight": torch.zeros(3)},  # as torchvision's
    lambda state: state,  # features.* only
    lambda state: {k: v.half() if v.is_floating_point() else v for k, v in state.items()},
    lambda state: {"model": {**state, "head.0.bias": torch.zeros(256)}, "epoch": 3}])
def test_weights_of_all_kinds_are_loaded_and_known_by_their_hash(tiny_vgg, tmp_path, change):
    state = random_weights(tiny_features())
    stored, path, model = change(state), tmp_path / "weights.pth", VGG()
    torch.save(stored, path)
    head = comparable(model.head.state_dict())
    assert load_features(model, str(path)) == hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    stored = stored.get("model", stored)
    for name, value in model.features.state_dict().items():
        assert torch.equal(value, stored[f"features.{name}"].to(value.dtype))
        assert value.dtype == state[f"features.{name}"].dtype
    assert comparable(model.head.state_dict()) == head


def test_a_run_from_scratch_on_photos_is_a_start_for_the_next(small, tiny_vgg, photos):
    """The hash of the weights is part of the identity, their path is not."""
    argv = [*TINY, "--num_training=0", "--num_validation=0"]
    ex3_pretrained.main([*argv, f"--dataset={photos}", "--pretrained=none"])
    path, = small.rglob("best_model_part_4b_2.ckpt")
    moved = path.rename(small / "mine.ckpt")
    record, = ex3_pretrained.main([*argv, f"--pretrained={moved}", "--num_epochs=1",
                                   "--learning_rate=1e-12"])
    assert record["title"] == "VGG11-BN fine-tuned, mine weights"
    assert record["identity"]["weights"] == hashlib.sha256(moved.read_bytes()).hexdigest()[:16]
    assert str(small) not in str(record["identity"])
    states = checkpoints_in(small)
    first = states[next(name for name in states if "4b_1" in name)]["model"]
    torch.testing.assert_close(first["features.0.weight"],
                               utils.load_checkpoint(moved)["model"]["features.0.weight"])


def without(name):
    return lambda state: {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize("content", [
    b"", b"no weights", b"PK\x03\x04 half", None, [1, 2], torch.zeros(3), {}, {"model": 3},
    {0: torch.zeros(3)}, without("features.4.weight"), without("features.1.running_mean"),
    lambda state: {**state, "features.0.weight": torch.zeros(3)},
    lambda state: {**state, "features.0.weight": 3},
    lambda state: {**state, "features.9.weight": torch.zeros(3)}], ids=str)
def test_what_has_no_such_weights_is_named_in_one_sentence(tiny_vgg, few, tmp_path, content):
    path = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content(random_weights(tiny_features())) if callable(content) else content, path)
    with pytest.raises(utils.Problem, match=r"weights\.pth (cannot be read|has not)") as problem:
        load_features(VGG(), str(path))
    assert (problem.value.status, str(problem.value).count("\n")) == (1, 0)


def test_imagenet_is_torchvisions_file_whose_hash_is_checked(small, tiny_vgg, monkeypatch):
    asked, state = [], random_weights(tiny_features())

    def get_state_dict(weights, **options):
        asked.append((weights, options["check_hash"]))
        return state

    monkeypatch.setattr(VGG11_BN_Weights, "get_state_dict", get_state_dict)
    record, = ex3_pretrained.main([*TINY, "--fine_tune=False"])
    assert asked == [(VGG11_BN_Weights.IMAGENET1K_V1, True)]
    assert (record["pretrained"], record["identity"]["weights"]) == ("imagenet", "6002323d")
    best = next(iter(checkpoints_in(small).values()))["model"]
    assert all(torch.equal(best[name], value) for name, value in state.items())


def refuse(_):
    raise OSError("no network")


def deliver_other_bytes(_):
    response = io.BytesIO(b"other bytes")
    response.info = lambda: SimpleNamespace()
    response.headers = {}
    return response


@pytest.mark.parametrize(("urlopen", "cached", "words"), [
    (refuse, None, "no network"), (deliver_other_bytes, None, "invalid hash value"),
    (refuse, b"half a file", "")])
def test_without_the_imagenet_weights_one_sentence_names_the_ways_on(
        small, tiny_vgg, monkeypatch, urlopen, cached, words):
    monkeypatch.setenv("TORCH_HOME", str(small))
    monkeypatch.setattr(torch.hub, "urlopen", urlopen)
    path = small / "hub/checkpoints/vgg11_bn-6002323d.pth"
    if cached:
        path.parent.mkdir(parents=True)
        path.write_bytes(cached)
    with pytest.raises(utils.Problem) as problem:
        ex3_pretrained.main(TINY)
    assert problem.value.status == 1
    for part in (words, path.name, str(path.parent), "--pretrained=PATH", "--pretrained=none"):
        assert part in str(problem.value)


def test_frozen_random_features_are_refused(small, capsys):
    with pytest.raises(utils.Problem, match="would freeze random features") as problem:
        ex3_pretrained.main([*TINY, "--pretrained=none", "--fine_tune=False"])
    assert problem.value.status == 2
    assert capsys.readouterr().out == ""


# -------------------------------------------- freezing --------------------------------------------


def is_statistic(name):
    return "running" in name or "num_batches" in name


@pytest.mark.parametrize(("argv", "moves"), [
    (["--fine_tune=False"], lambda name: False),  # from features that are computed once,
    (["--fine_tune=False", "--augmentation=rotation"], lambda name: False),  # and anew
    (["--fine_tune=False", "--frozen_norm=train"], is_statistic), ([], lambda name: True)])
def test_what_is_frozen_stays_to_the_bit(run, weights_file, argv, moves):
    _, state = run(*argv)
    for name, value in utils.load_checkpoint(weights_file).items():
        assert torch.equal(state[name], value) != moves(name), name
    assert state["head.1.num_batches_tracked"] > 0


@pytest.mark.parametrize(("argv", "trained"), [
    (["--fine_tune=False"], {"head"}), (["--fine_tune=False", "--frozen_norm=train"], {"head"}),
    ([], {"features", "head"})])
def test_the_optimizer_gets_what_learns(tiny_vgg, argv, trained):
    flags = parse(*argv, script=ex3_pretrained)
    model = ex3_pretrained.build(flags, 10)
    optimizer, _ = ex3_pretrained.make_optimizer(model, flags)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for name, p in model.named_parameters() if name.split(".")[0] in trained}


@pytest.mark.parametrize("augmentation", ["none", "horizontal_flip"])
def test_features_computed_once_give_the_same_numbers(run, monkeypatch, augmentation):
    argv = ["--fine_tune=False", f"--augmentation={augmentation}", "--num_epochs=4"]
    extract, made = ex3_pretrained.extract_features, []
    monkeypatch.setattr(ex3_pretrained, "extract_features",
                        lambda *arguments: made.append(extract(*arguments)) or made[-1])
    once, state = run(*argv)
    monkeypatch.setattr(ex3_pretrained, "extract_features", lambda model, data, *_: data)
    plain, plain_state = run(*argv)
    assert made[0].features.shape == (1 if augmentation == "none" else 2, 180, 512)
    assert once["result"] == pytest.approx(plain["result"], abs=1e-6)
    for name in plain["history"].keys() - {"seconds"}:
        assert once["history"][name] == pytest.approx(plain["history"][name], rel=1e-4), name
    for name, value in plain_state.items():
        torch.testing.assert_close(state[name], value, rtol=1e-3, atol=1e-3)


def test_of_a_frozen_network_the_latest_checkpoint_is_small_until_the_end(
        run, small, weights_file, monkeypatch):
    """The best is whole at any time: it is what one predicts with, and pretrains from."""
    train, calls = utils.train_one_epoch, []

    def interrupt(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return train(*arguments)

    clock = iter(range(0, 10_000, 11))
    with monkeypatch.context() as patch:
        patch.setattr(utils, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
        patch.setattr(utils, "train_one_epoch", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run("--fine_tune=False", "--num_epochs=4")
    frozen = {name for name, _ in VGG().named_parameters() if name.startswith("features")}
    best, latest = checkpoints_in(small).values()
    assert latest["epoch"] == 2
    assert not frozen & (latest["model"].keys() | latest["best_weights"].keys())
    assert best["model"].keys() == VGG().state_dict().keys()
    _, best = run("--fine_tune=False", "--num_epochs=4", "--resume")
    *_, latest = checkpoints_in(small).values()
    assert latest["model"].keys() == best.keys() == VGG().state_dict().keys()
    assert len(records_in(small)) == 1
