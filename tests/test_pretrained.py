"""VGG11-BN: weights, freezing, features that are computed once, prediction, errors."""

import copy

import numpy as np
import pytest
import torch
from conftest import parse, random_weights, records_in, vgg_features
from PIL import Image
from torch import nn
from torchvision.models import vgg11_bn

import ex3_convnet
import ex3_pretrained
import utils
from ex3_pretrained import VGG

SHORT = ["--num_training=60", "--num_validation=20", "--batch_size=20", "--num_epochs=2",
         "--precision=float32"]


@pytest.fixture
def vgg_weights(bare_vgg):
    """Weights of the VGG11-BN itself, which the script now makes without the rest of it."""
    return random_weights(vgg_features())


# -------------------------------------------- network --------------------------------------------


def test_model_sizes(bare_vgg, capsys):
    head = 512 * 256 + 256 + 2 * 256 + 256 * 10 + 10
    for fine_tune, size in (True, 9_225_984 + head), (False, head):
        model = VGG(fine_tune)
        assert utils.count_parameters(model) == size
        assert utils.count_parameters(model, trainable=False) == 9_225_984 + head
        utils.print_summary(model, 32)
        output = capsys.readouterr().out
        assert f"Trainable params: {size:,}\n" in output  # as torchsummary counts them
        assert f"Model size: {size:,} trainable parameters" in output


def test_the_head(bare_vgg):
    assert [type(layer) for layer in VGG().head] == [
        nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]


@pytest.mark.parametrize("size", [32, 64, 80])
def test_shapes(bare_vgg, size):
    assert VGG(num_classes=3).eval()(torch.zeros(2, 3, size, size)).shape == (2, 3)


def test_features_are_torchvisions_flattened():
    """With torchvision's own network, whose place small ones take in other tests."""
    model, reference = VGG().eval(), vgg11_bn().features.eval()
    weights = random_weights(reference)
    ex3_pretrained.load_features(model, weights, "test")
    assert [str(layer) for layer in vgg_features()] == [str(layer) for layer in reference]
    images = torch.rand(3, 3, 32, 32)
    assert torch.equal(model.extract(images), reference(images).flatten(1))


def test_the_new_layers_start_as_in_the_template(tiny_vgg):
    torch.manual_seed(0)
    scratch = ex3_pretrained.build(parse("--pretrained=False", script=ex3_pretrained), 10)
    assert scratch.head[0].weight.std().item() == pytest.approx(1e-3, rel=0.02)
    assert scratch.head[3].bias.abs().max() == 0
    pretrained = ex3_pretrained.build(parse(script=ex3_pretrained), 10)
    assert pretrained.head[0].weight.std().item() == pytest.approx(512**-0.5 / 3**0.5, rel=0.02)


# -------------------------------------------- weights --------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_features_of_any_float_type_are_loaded(vgg_weights, tmp_path, dtype):
    stored = {k: v.to(dtype) if v.is_floating_point() else v for k, v in vgg_weights.items()}
    stored["classifier.0.weight"] = torch.zeros(3)  # the rest of a whole network is left alone
    torch.save(stored, tmp_path / "w.pth")
    model = VGG()
    ex3_pretrained.load_features(model, ex3_pretrained.load_weights(tmp_path / "w.pth"), "w.pth")
    for name, value in model.features.state_dict().items():
        assert torch.equal(value, stored[f"features.{name}"].to(value.dtype))
        assert value.dtype in (torch.float32, torch.int64)


@pytest.mark.parametrize(("damage", "words"), [
    (lambda w: w.pop("features.8.weight"), "features.8.weight is missing"),
    (lambda w: w.update({"features.26.bias": 3}), "features.26.bias is missing"),
    (lambda w: w.update({"features.8.bias": torch.ones(256).int()}), "8.bias is not of a float"),
    (lambda w: w["features.1.running_var"].fill_(-1), "features.1.running_var, a variance"),
    (lambda w: w.update({"features.8.bias": torch.zeros(3)}), r"features.8.bias has the shape"),
    (lambda w: w["features.25.weight"].view(-1)[7].fill_(torch.nan), "features.25.weight has val"),
    (lambda w: w["features.1.running_var"][3].fill_(torch.inf), "features.1.running_var has val"),
    (lambda w: w.clear(), "features.0.weight is missing")])
def test_damaged_weights_are_named_and_nothing_is_loaded(vgg_weights, damage, words):
    damaged = copy.deepcopy(vgg_weights)
    damage(damaged)
    model = VGG()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(utils.Problem, match=words):
        ex3_pretrained.load_features(model, damaged, "w.pth")
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_file_that_is_no_state_dict(tiny_vgg):
    with pytest.raises(utils.Problem, match="w.pth holds no state dict"):
        ex3_pretrained.load_features(VGG(), [1, 2], "w.pth")


@pytest.mark.parametrize("damage", [lambda b: b[:1000], lambda b: b"", lambda b: b"nonsense"])
def test_a_corrupt_file_is_named(tmp_path, weights_file, damage):
    path = tmp_path / "corrupt.pth"
    path.write_bytes(damage(weights_file.read_bytes()))
    with pytest.raises(utils.Problem, match="corrupt.pth"):
        ex3_pretrained.load_weights(path)


def test_without_network_one_sentence_names_the_ways_on(few, folder, tiny_vgg, monkeypatch):
    for name, value in (("TORCH_HOME", str(folder)), ("https_proxy", "http://127.0.0.1:9"),
                        ("no_proxy", "")):
        monkeypatch.setenv(name, value)
    with pytest.raises(utils.Problem) as problem:
        ex3_pretrained.main(["--dataset=synthetic"])
    assert problem.value.status == 1
    for word in ("vgg11_bn-6002323d.pth", str(folder / "hub/checkpoints"), "--pretrained=PATH",
                 "--pretrained=False"):
        assert word in str(problem.value)


def test_an_altered_file_in_torchvisions_cache_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub/checkpoints/vgg11_bn-6002323d.pth"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"half a file")
    with pytest.raises(utils.Problem, match="6002323d.pth is truncated or altered"):
        ex3_pretrained.load_weights(True)


def test_frozen_random_features_are_refused(folder):
    with pytest.raises(utils.Problem, match="random features") as problem:
        ex3_pretrained.main(["--pretrained=False", "--fine_tune=False"])
    assert problem.value.status == 2


def test_weights_that_are_not_there_are_named(few, folder, tiny_vgg):
    with pytest.raises(utils.Problem, match=r"no/such\.pth") as problem:
        ex3_pretrained.main(["--dataset=synthetic", "--pretrained=no/such.pth"])
    assert problem.value.status == 1


def test_weights_that_are_no_file_of_pytorch_are_named(few, folder, tiny_vgg, tmp_path):
    """Without PyTorch's advice to run what may be in the file."""
    for content in (b"import torch\n", b""):
        (tmp_path / "weights.pth").write_bytes(content)
        with pytest.raises(utils.Problem, match="it is damaged, or no file of PyTorch$"):
            ex3_pretrained.main(["--dataset=synthetic", f"--pretrained={tmp_path}/weights.pth"])


def test_a_step_of_one_image_is_refused(folder, few, tiny_vgg):
    with pytest.raises(utils.Problem, match="at least 2 images") as problem:
        ex3_pretrained.main(["--dataset=synthetic", "--pretrained=False", "--batch_size=1"])
    assert problem.value.status == 2


# -------------------------------------------- freezing --------------------------------------------


@pytest.fixture
def trained(few, folder, weights_file, no_drawing):
    """A function that trains shortly on few images from the weights; the record, and the state
    dict of the latest model."""
    def train(*flags):
        flags = [f"--pretrained={weights_file}", "--dataset=synthetic", *SHORT, *flags]
        results = ex3_pretrained.main(flags)
        latest = max(folder.glob("latest*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
        return results["none"][""][0], utils.load_checkpoint(latest)["model"]

    return train


@pytest.mark.parametrize("augmentation", ["horizontal_flip", "rotation"])  # once, and plain
def test_frozen_features_stay_bit_identical(trained, weights, augmentation):
    _, state = trained("--fine_tune=False", f"--augmentation={augmentation}")
    for name, value in weights.items():
        assert torch.equal(state[name], value), name
    assert state["head.1.num_batches_tracked"] == 6  # while the head has learnt


def test_batch_norm_of_the_frozen_part_drifts_if_asked(trained, weights):
    _, state = trained("--fine_tune=False", "--frozen_norm=train")
    for name, value in weights.items():
        drifts = "running" in name or "num_batches" in name
        assert torch.equal(state[name], value) != drifts, name


def test_everything_is_fine_tuned(trained, weights):
    _, state = trained()
    moved = [name for name, value in weights.items() if not torch.equal(state[name], value)]
    assert moved == list(weights)


@pytest.mark.parametrize(("flags", "count"), [(["--fine_tune=False"], 6), ([], 6 + 8)])
def test_the_optimizer_holds_what_learns(trained, weights, monkeypatch, flags, count):
    held, begin = [], utils.Run.begin

    def watch(run, **parts):
        held.extend(parts["optimizer"].param_groups[0]["params"])
        return begin(run, **parts)

    monkeypatch.setattr(utils.Run, "begin", watch)
    trained("--num_epochs=1", *flags)
    assert len(held) == count
    assert all(parameter.requires_grad for parameter in held)


@pytest.mark.parametrize("augmentation", ["horizontal_flip", "none"])
def test_features_computed_once_give_the_same_result(trained, monkeypatch, augmentation):
    flags = "--fine_tune=False", f"--augmentation={augmentation}"
    once, once_state = trained(*flags)
    monkeypatch.setattr(ex3_pretrained, "extract_features", lambda model, data, *_: data)
    plain, plain_state = trained(*flags)
    assert once["result"] == pytest.approx(plain["result"], abs=1e-6)
    for key, values in plain["history"].items():
        if key != "seconds":
            assert once["history"][key] == pytest.approx(values, rel=1e-3), key
    for name, value in plain_state.items():
        assert torch.allclose(once_state[name].float(), value.float(), atol=1e-3), name


def test_the_mirrored_features_are_those_of_the_mirrored_image(synthetic, vgg_weights):
    data = copy.copy(synthetic)
    data.images, data.labels = data.images[:50], data.labels[:50]
    model = VGG(fine_tune=False)
    ex3_pretrained.load_features(model, vgg_weights, "test")
    data.train, data.val, data.test = torch.arange(50).split([30, 10, 10])
    features = ex3_pretrained.extract_features(model, data, torch.float32, mirror=True)
    indices = torch.arange(50)
    flipped = model.extract(data.batch(indices, lambda images: images.flip(3))[0])
    both = (utils.make_augment("horizontal_flip", torch.Generator().manual_seed(4)),
            torch.rand(50, generator=torch.Generator().manual_seed(4)) < 0.5)
    batch, labels = features.batch(indices, both[0])
    plain = model.extract(data.batch(indices)[0])
    assert torch.allclose(batch, torch.where(both[1][:, None], flipped, plain), atol=1e-4)
    assert torch.allclose(features.batch(indices)[0], plain, atol=1e-4)
    assert not torch.allclose(flipped, plain, atol=1e-2)
    assert torch.equal(labels, data.labels)


# ------------------------------------ results and prediction ------------------------------------


def test_each_variant_has_its_checkpoint_and_figures(few, folder, weights_file, capsys):
    for flags, part, figure in ((["--fine_tune=False"], "4a", 8), ([], "4b_1", 9),
                                (["--pretrained=False"], "4b_2", 10)):
        ex3_pretrained.main(["--dataset=synthetic", f"--pretrained={weights_file}", *SHORT,
                             "--num_epochs=1", *flags])
        for kind in ("best", "latest"):
            assert (folder / f"{kind}_model_part_{part}_synthetic-60.ckpt").exists()
        for kind in ("", "_filters"):
            assert (folder / f"figures/synthetic-60/figure_{figure}_part_{part}{kind}.png").exists()
    output = capsys.readouterr().out
    head = 512 * 256 + 256 + 2 * 256 + 256 * 10 + 10
    features = (27 + 1) * 64 + 2 * 64 + (64 + 1) * 512 + 2 * 512
    assert f"{head:,} trainable parameters, {head + features:,} in all" in output
    assert f"{head + features:,} trainable parameters, {head + features:,} in all" in output
    assert len(records_in(folder)) == 3
    for path in folder.glob("figures/*/records/*"):
        assert str(weights_file.parent) not in path.read_text()


@pytest.mark.parametrize(("script", "flags"), [
    (ex3_pretrained, ["--pretrained=False", "--image_size=64", "--num_epochs=8"]),
    (ex3_convnet, ["--norm_flag", "--earlystop", "--num_epochs=8", "--learning_rate=0.01"])])
def test_a_trained_model_classifies_a_persons_photos(
        folder, image_folder, small_convnet, tiny_vgg, no_drawing, capsys, script, flags):
    for path in image_folder.rglob("*.png"):  # cats are red, dogs are blue
        colour = (200, 30, 30) if path.parent.name == "cat" else (30, 30, 200)
        Image.fromarray(np.full((50, 70, 3), colour, np.uint8)).save(path)
    flags = [f"--dataset={image_folder}", *flags, "--num_validation=4", "--batch_size=2"]
    script.main(flags)
    capsys.readouterr()
    cat, dog = image_folder / "test/cat/000.png", image_folder / "test/dog"
    script.main([*flags, "--predict", str(cat), str(dog)])
    title, *lines, summary = capsys.readouterr().out.splitlines()
    assert "trained on photos" in title
    assert summary == "As their folder is named: 3 of 3 images, 100.0%"
    assert [line.split(": ")[0] for line in lines] == [str(cat), f"{dog}/001.png", f"{dog}/003.png"]
    assert [line.split(": ")[1].split()[0] for line in lines] == ["cat", "dog", "dog"]
    assert all(50 <= float(line.split()[-1].rstrip("%")) <= 100 for line in lines)


@pytest.mark.parametrize("script", [ex3_convnet, ex3_pretrained])
def test_prediction_needs_a_trained_model_and_an_image(
        folder, small_convnet, tiny_vgg, script, image_folder):
    image = str(image_folder / "test/cat/000.png")
    with pytest.raises(utils.Problem, match="does not exist: train"):
        script.main(["--predict", image])
    name = script.checkpoint_name(parse(script=script))
    kind = "best" if script.earlystop else "latest"
    path = folder / f"{kind}_model_{name}.ckpt"
    recipe = {"data": {"classes": ["a"]}, "flags": {"image_size": 32}, "normalization": {}}
    for content in (torch.zeros(3), {}, {"recipe": recipe}, {"recipe": recipe, "model": {}},
                    {"recipe": 3}, {"recipe": {**recipe, "flags": {}}, "model": {}}):
        torch.save(content, path)
        with pytest.raises(utils.Problem, match="is not a checkpoint of this script"):
            script.main(["--predict", image])


@pytest.fixture
def model(few, folder, small_convnet, no_drawing):
    """The flags of a small convnet that has been trained on few images."""
    ex3_convnet.main(["--dataset=synthetic", *SHORT])
    return ["--dataset=synthetic", "--num_training=60"]


def test_images_that_cannot_be_read_are_named_and_the_others_classified(
        model, image_folder, capsys):
    (image_folder / "test/cat/001.jpg").write_bytes(b"nonsense")
    (image_folder / "test/cat/notes.txt").write_text("no image")
    capsys.readouterr()
    with pytest.raises(utils.Problem, match="1 of 3 files cannot be read as images"):
        ex3_convnet.main([*model, f"--predict={image_folder / 'test/cat'}"])
    output = capsys.readouterr()
    assert "test/cat: left out as no images: 1 .txt" in output.err
    assert [line.split(": ")[0].split("/")[-1] for line in output.out.splitlines()
            if line.endswith("%")] == ["000.png", "002.png"]
    assert "001.jpg cannot be read as an image" in output.err


def test_a_folder_without_an_image_is_named(model, folder):
    (folder / "empty").mkdir()
    with pytest.raises(utils.Problem, match="there is no image in .*empty"):
        ex3_convnet.main([*model, f"--predict={folder / 'empty'}"])


def test_a_prediction_finds_the_model_of_the_same_data_only(model, image_folder, capsys):
    image = f"--predict={image_folder / 'test/cat/000.png'}"
    with pytest.raises(utils.Problem, match=r"latest_model_convnet\.ckpt does not exist"):
        ex3_convnet.main([image])
    capsys.readouterr()
    ex3_convnet.main([*model, image])
    assert "trained on synthetic for 2 epochs (latest_model_convnet_synthetic-60.ckpt)" in (
        capsys.readouterr().out)
