"""VGG11-BN: the network, weights of all kinds, freezing, features that are computed once."""

import hashlib
import shutil

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
    model = ex3_pretrained.build_model(parse(*argv, script=ex3_pretrained), 10)
    for layer, deviation in zip((model.head[0], model.head[3]), deviations):
        assert layer.weight.std().item() == pytest.approx(deviation, rel=0.05)
        assert layer.bias.any() == bias

FEATURES = random_weights(tiny_features())

@pytest.mark.parametrize("stored", [
    {**FEATURES, "classifier.0.weight": torch.zeros(3)},  # as torchvision's
    {name: value.half() for name, value in FEATURES.items()},
    {"model": {**FEATURES, "head.0.bias": torch.zeros(256)}, "epoch": 3}])  # as a checkpoint
def test_weights_of_all_kinds_are_loaded_and_known_by_their_hash(tiny_vgg, tmp_path, stored):
    path, model = tmp_path / "weights.pth", VGG()
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
    [1, 2], torch.zeros(3), {}, {"model": 3}, {0: torch.zeros(3)},
    {**FEATURES, "features.0.weight": torch.zeros(3)}, {**FEATURES, "features.0.weight": 3},
    {**FEATURES, "features.9.weight": torch.zeros(3)},  # one too many
    {name: FEATURES[name] for name in FEATURES if name != "features.1.running_mean"}])
def test_weights_of_another_network_are_named_in_one_sentence(tiny_vgg, tmp_path, content):
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(utils.UserError, match=r"^[^\n]*weights\.pth lacks the features[^\n]*$"):
        load_features(VGG(), str(tmp_path / "weights.pth"))

def test_imagenet_is_torchvisions_file_whose_hash_is_checked(small, tiny_vgg, monkeypatch):
    def get_state_dict(weights, check_hash, **_):
        assert weights == VGG11_BN_Weights.IMAGENET1K_V1
        assert check_hash
        return FEATURES

    monkeypatch.setattr(VGG11_BN_Weights, "get_state_dict", get_state_dict)
    record, = ex3_pretrained.main([*TINY, FROZEN])
    assert (record["pretrained"], record["identity"]["weights"]) == ("imagenet", "6002323d")
    best = next(iter(checkpoints_in(small).values()))["model"]
    assert all(torch.equal(best[name], value) for name, value in FEATURES.items())

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
    with pytest.raises(utils.UserError) as error:
        ex3_pretrained.main(TINY)
    assert error.value.exit_code == 1
    for words in path.name, str(path.parent), "--pretrained=PATH", "--pretrained=none":
        assert words in str(error.value)
    assert ("no network" in str(error.value)) == (cached is None)

def test_frozen_random_features_are_refused(small, capsys):
    with pytest.raises(utils.UserError, match="random features") as error:
        ex3_pretrained.main([*TINY, "--pretrained=none", FROZEN])
    assert (error.value.exit_code, capsys.readouterr().out) == (2, "")

@pytest.mark.parametrize(("argv", "learn", "moving"), [
    ([FROZEN], 6, []),  # from features that are computed once,
    ([FROZEN, "--augmentation=rotation"], 6, []),  # and anew
    ([FROZEN, "--frozen_norm=train"], 6, ["running_mean", "running_var", "num_batches_tracked"]),
    ([], 6 + 8, ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"])])
def test_what_is_frozen_stays_to_the_bit_and_out_of_the_optimizer(
        run, small, weights_file, argv, learn, moving):
    _, state = run(*argv)
    for name, value in utils.load_checkpoint(weights_file).items():
        moved = not torch.equal(state[name], value)
        assert moved == (name.split(".")[-1] in moving), name
    assert state["head.1.num_batches_tracked"] > 0
    *_, latest = checkpoints_in(small).values()
    assert len(latest["optimizer"]["param_groups"][0]["params"]) == learn

@pytest.mark.parametrize("augmentation", ["none", "horizontal_flip"])
def test_features_computed_once_give_the_same_numbers_as_in_every_epoch(
        run, monkeypatch, augmentation):
    """A technique that changes nothing is one for which they are computed in every epoch."""
    monkeypatch.setitem(utils.AUGMENTATIONS, "nothing", lambda images, generator: images)
    argv = [FROZEN, "--earlystop=False", "--num_epochs=9", "--learning_rate=0.01"]
    once, once_state = run(*argv, f"--augmentation={augmentation}")
    shutil.rmtree(utils.FOLDER / "checkpoints")
    anew = "nothing" if augmentation == "none" else f"{augmentation}+nothing"
    plain, plain_state = run(*argv, f"--augmentation={anew}")
    for name in once["history"].keys() - {"seconds"}:
        assert once["history"][name] == pytest.approx(plain["history"][name], rel=1e-4), name
    for name in once["result"]:
        assert once["result"][name] == pytest.approx(plain["result"][name], abs=1e-6), name
    assert once["confusion"] == plain["confusion"]
    torch.testing.assert_close(once_state, plain_state, rtol=1e-3, atol=1e-4)

@pytest.mark.parametrize("flags", [["--batch_size=1"], ["--num_training=1"]])
@pytest.mark.parametrize("network", [[], [FROZEN], [FROZEN, "--frozen_norm=train"]])
def test_the_head_cannot_train_on_a_single_image_which_one_sentence_says(run, flags, network):
    with pytest.raises(utils.UserError, match="^batch norm cannot .* single image.*$") as error:
        run(*flags, *network)
    assert error.value.exit_code == 2
