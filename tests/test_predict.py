"""Prediction: a named checkpoint classifies images exactly as its network does, or says why not."""

import re
import shutil

import pytest
import torch
from conftest import TINY
from PIL import Image
from torch import nn
from torchvision.transforms.functional import normalize, pil_to_tensor

import ex3_convnet
import ex3_pretrained
import utils


@pytest.fixture
def checkpoint(small, photos, capsys, monkeypatch):
    """The --checkpoint flag that a run on the photos prints at its end, in the project's folder."""
    ex3_convnet.main([f"--dataset={photos}", "--norm_flag", "--image_size=40", "--num_epochs=8",
                      "--batch_size=4", "--learning_rate=0.01", "--precision=float32"])
    monkeypatch.chdir(small)
    return re.search(r"--predict=FOLDER (--checkpoint=\S+)\n$", capsys.readouterr().out)[1]


def forward(checkpoint, paths):
    """(class, probability) of each image, by the network alone."""
    state = torch.load(checkpoint.split("=")[1], weights_only=True)
    model = ex3_convnet.ConvNet(norm_flag=True, num_classes=2, image_size=40).eval()
    model.load_state_dict(state["model"])
    images = torch.stack([pil_to_tensor(Image.open(path).resize((40, 40))) for path in paths])
    found = model(normalize(images / 255, [0.5] * 3, [0.5] * 3)).softmax(1).max(1)
    return [(("cat", "dog")[label], p) for label, p in zip(found.indices, found.values.tolist())]


def test_classes_probabilities_and_accuracy_are_those_of_the_network(
        checkpoint, photos, capsys, monkeypatch):
    for old, new in ("cat", "dog/at the lake/cat.png"), ("dog", "cat/x.png"), ("dog", "x/x.png"):
        (photos / "train" / new).parent.mkdir(exist_ok=True)
        shutil.copy(photos / "train" / old / "003.png", photos / "train" / new)
    paths = sorted((photos / "train").rglob("*.png"))
    expected = forward(checkpoint, paths)
    assert {label for label, _ in expected} == {"cat", "dog"}
    monkeypatch.setattr(ex3_convnet, "MEAN", (0.1, 0.2, 0.3))  # that of the training counts
    ex3_convnet.main(["--image_size=64", checkpoint, f"--predict={photos / 'train'}"])
    *lines, summary = capsys.readouterr().out.splitlines()
    found = [re.fullmatch(r"(.*): (\w+) (.*)%", line).groups() for line in lines]
    assert [(name, label) for name, label, _ in found] == [
        (str(path.relative_to(photos)), label) for path, (label, _) in zip(paths, expected)]
    assert [float(percent) / 100 for *_, percent in found] == (
        pytest.approx([probability for _, probability in expected], abs=0.0011))
    right = sum(label in path.parts for (label, _), path in zip(expected, paths))
    assert summary == f"As their folder is named: {right} of 26, {right / 26:.1%}"


def test_the_folder_itself_can_be_named_after_a_class_and_a_single_file_has_no_accuracy(
        checkpoint, photos, capsys):
    found = forward(checkpoint, sorted((photos / "train/dog").iterdir()))
    right = [label for label, _ in found].count("dog")
    ex3_convnet.main([checkpoint, f"--predict={photos / 'train/dog'}"])
    assert capsys.readouterr().out.endswith(f"named: {right} of 12, {right / 12:.1%}\n")
    ex3_convnet.main([checkpoint, f"--predict={photos / 'train/dog/000.png'}"])
    line, = capsys.readouterr().out.splitlines()
    assert line.startswith(f"000.png: {found[0][0]} ")


def test_files_that_cannot_be_read_are_named_the_others_classified_and_the_exit_code_is_1(
        checkpoint, photos, capsys):
    ex3_convnet.main([checkpoint, f"--predict={photos / 'test/cat'}"])
    before = capsys.readouterr().out.splitlines()
    bad = [photos / "test/cat/000.png", photos / "test/cat/notes.txt"]
    [path.write_bytes(b"no image") for path in bad]
    with pytest.raises(SystemExit) as end:
        utils.run_script(lambda: ex3_convnet.main([checkpoint, f"--predict={photos / 'test/cat'}"]))
    output = capsys.readouterr()
    assert (end.value.code, output.out.splitlines()[:-1]) == (1, before[1:-1])
    assert [str(path) in output.err for path in bad] + [output.err.count("\n")] == [True, True, 1]


def test_a_network_that_is_not_the_trained_one_is_refused(
        checkpoint, photos, tiny_vgg, monkeypatch):
    def edited(flags, classes, build=ex3_convnet.build):
        model = build(flags, classes)
        model.layers[3] = nn.GELU()  # the weights would fit
        return model

    monkeypatch.setattr(ex3_convnet, "build", edited)
    for script in ex3_convnet, ex3_pretrained:
        with pytest.raises(utils.Problem, match=rf"of the network that {script.__name__}\.py"):
            script.main([checkpoint, f"--predict={photos}"])


@pytest.mark.parametrize("damage", [
    lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:9000]),
    lambda path: path.write_bytes(b"nonsense"), lambda path: torch.save([1], path),
    lambda path: torch.save({"model": {}}, path)])
def test_a_file_that_is_no_whole_checkpoint_is_named(checkpoint, photos, damage):
    name = checkpoint.split("=")[1]
    damage(photos.parent / name)
    with pytest.raises(utils.Problem, match=f"^{name} is "):
        ex3_convnet.main([checkpoint, f"--predict={photos}"])


def test_of_a_frozen_network_both_checkpoints_are_whole(small, weights_file, photos, capsys):
    ex3_pretrained.main([*TINY, f"--pretrained={weights_file}", "--fine_tune=False"])
    best, = small.glob("checkpoints/*/best_model_part_4a.ckpt")
    assert capsys.readouterr().out.endswith(f"--checkpoint={best}\n")
    for path in best, best.with_name("latest_model_part_4a.ckpt"):
        ex3_pretrained.main([f"--checkpoint={path}", f"--predict={photos / 'test'}"])
        assert len(capsys.readouterr().out.splitlines()) == 8


@pytest.mark.parametrize("script", [ex3_convnet, ex3_pretrained])
@pytest.mark.parametrize("flag", ["--checkpoint=x.ckpt", "--predict=photos"])
def test_one_of_the_two_flags_is_too_few(folder, script, flag):
    with pytest.raises(utils.Problem, match="--checkpoint=.*--predict=") as problem:
        script.main([flag])
    assert problem.value.status == 2
