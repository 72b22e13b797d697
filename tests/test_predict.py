"""Prediction: a named checkpoint classifies images exactly as its network does, or says why not."""

import re
import shlex
import shutil

import pytest
import torch
from conftest import TINY, write_photos
from PIL import Image
from torch import nn
from torchvision.transforms.functional import normalize, pil_to_tensor

import ex3_convnet
import ex3_pretrained
import utils

TRAIN = ["--norm_flag", "--num_epochs=8", "--batch_size=4", "--learning_rate=0.01",
         "--precision=float32"]
ACCURACY = r"^In folders named after classes: ([\d,]+) of ([\d,]+) images? right, ([\d.]+)%$"

@pytest.fixture
def checkpoint(small, photos, capsys, monkeypatch):
    """The --checkpoint flag that a run on the photos prints, as a shell reads it. A folder in its
    path has a space in its name."""
    monkeypatch.setattr(utils, "FOLDER", small / "my project")
    ex3_convnet.main([f"--dataset={photos}", "--image_size=40", *TRAIN])
    found = re.search(r"--predict=FOLDER --checkpoint=.*$", capsys.readouterr().out, re.MULTILINE)
    _, flag = shlex.split(found[0])
    return flag

def forward(checkpoint, paths):
    """(class, probability) of each image, by the network alone."""
    state = torch.load(checkpoint.removeprefix("--checkpoint="), weights_only=True)
    model = ex3_convnet.ConvNet(norm_flag=True, num_classes=2, image_size=40).eval()
    model.load_state_dict(state["model"])
    images = torch.stack([pil_to_tensor(Image.open(path).resize((40, 40))) for path in paths])
    found = model(normalize(images / 255, [0.5] * 3, [0.5] * 3)).softmax(1).max(1)
    return [(("cat", "dog")[label], p) for label, p in zip(found.indices, found.values.tolist())]

def accuracy_in(output):
    """How many images are said to be recognized, of how many, and the percentage."""
    right, count, percent = re.search(ACCURACY, output, re.MULTILINE).groups()
    return int(right), int(count), float(percent)

def test_classes_and_probabilities_are_those_of_the_network(
        checkpoint, photos, capsys, monkeypatch):
    paths = sorted((photos / "train").rglob("*.png"))
    expected = forward(checkpoint, paths)
    assert {label for label, _ in expected} == {"cat", "dog"}
    monkeypatch.setattr(ex3_convnet, "MEAN", (0.1, 0.2, 0.3))  # that of the training counts
    ex3_convnet.main(["--image_size=64", checkpoint, f"--predict={photos / 'train'}"])
    output = capsys.readouterr().out
    *lines, _ = output.splitlines()
    found = [re.fullmatch(r"(.*): (\w+) (.*)%", line).groups() for line in lines]
    assert [(name, label) for name, label, _ in found] == [
        (str(path.relative_to(photos)), label) for path, (label, _) in zip(paths, expected)]
    assert [float(percent) / 100 for *_, percent in found] == (
        pytest.approx([probability for _, probability in expected], abs=0.0011))
    right = sum(label == path.parent.name for (label, _), path in zip(expected, paths))
    assert accuracy_in(output) == (right, 24, pytest.approx(100 * right / 24, abs=0.051))

def test_on_the_test_folder_of_a_training_run_the_accuracy_is_that_of_the_run(
        small, photos, capsys):
    """Where a class is a link, has another case, or has in it a folder named like another one."""
    for name in ("000", "001", "002"):  # which are recognized
        shutil.copy(photos / f"train/cat/{name}.png", photos / f"test/cat/again{name}.png")
    shutil.copytree(photos / "train/dog", photos / "test/cat/dog")
    (photos / "train/dog").rename(photos / "train/other")
    (photos / "train/other").rename(photos / "train/DOG")
    (photos / "test/dog").rename(photos.parent / "dogs")
    (photos / "test/dog").symlink_to(photos.parent / "dogs")
    record, = ex3_convnet.main([f"--dataset={photos}", *TRAIN])
    file, = small.glob("checkpoints/*/*.ckpt")
    capsys.readouterr()
    ex3_convnet.main([f"--checkpoint={file}", f"--predict={photos / 'test'}"])
    right, count, _ = accuracy_in(capsys.readouterr().out)
    assert count == record["identity"]["data"]["test"] == 4 + 3 + 12 + 4
    assert right / count == record["result"]["test_accuracy"]

def test_images_in_folders_of_no_class_are_counted_and_told(checkpoint, photos, capsys):
    write_photos(photos, {"test/bird": 3, "test/fish/at the lake": 2})
    ex3_convnet.main([checkpoint, f"--predict={photos / 'test'}"])
    output = capsys.readouterr().out
    _, count, _ = accuracy_in(output)
    assert count == 8
    assert "Not counted, because their folders match no class: 5 of 13 images;" in output

def test_a_class_folder_and_a_single_file_are_classified_alone(checkpoint, photos, capsys):
    folder = photos / "train/dog"
    labels = [label for label, _ in forward(checkpoint, sorted(folder.iterdir()))]
    ex3_convnet.main([checkpoint, f"--predict={folder}"])
    assert accuracy_in(capsys.readouterr().out)[:2] == (labels.count("dog"), 12)
    ex3_convnet.main([checkpoint, f"--predict={folder / '000.png'}"])
    line, = capsys.readouterr().out.splitlines()
    assert line.startswith(f"000.png: {labels[0]} ")

def test_files_that_cannot_be_read_are_named_the_others_classified_and_the_exit_code_is_1(
        checkpoint, photos, capsys):
    ex3_convnet.main([checkpoint, f"--predict={photos / 'test/cat'}"])
    before = capsys.readouterr().out.splitlines()
    bad = [photos / "test/cat/000.png", photos / "test/cat/notes.txt"]
    for path in bad:
        path.write_bytes(b"no image")
    with pytest.raises(SystemExit) as end:
        utils.run_script(lambda: ex3_convnet.main([checkpoint, f"--predict={photos / 'test/cat'}"]))
    output = capsys.readouterr()
    assert (end.value.code, output.out.splitlines()[:-1]) == (1, before[1:-1])
    assert [str(path) in output.err for path in bad] + [output.err.count("\n")] == [True, True, 1]

@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_where_there_is_nothing_to_classify_the_place_is_named(checkpoint, photos, name):
    (photos / "empty").mkdir()
    with pytest.raises(utils.UserError, match=str(photos / name)):
        ex3_convnet.main([checkpoint, f"--predict={photos / name}"])

def test_a_network_that_is_not_the_trained_one_is_refused(
        checkpoint, photos, tiny_vgg, monkeypatch):
    build_model = ex3_convnet.build_model

    def edited(settings, num_classes):
        model = build_model(settings, num_classes)
        model.layers[3] = nn.GELU()  # the weights would fit
        return model

    monkeypatch.setattr(ex3_convnet, "build_model", edited)
    for content in [1], {"model": {}}:  # nor are these
        torch.save(content, photos / "other.ckpt")
        with pytest.raises(utils.UserError, match=r"/other\.ckpt does not fit the network"):
            ex3_convnet.main([f"--checkpoint={photos / 'other.ckpt'}", f"--predict={photos}"])
    for script in ex3_convnet, ex3_pretrained:
        with pytest.raises(utils.UserError, match=rf"does not fit .*{script.__name__}\.py"):
            script.main([checkpoint, f"--predict={photos}"])

def test_of_a_frozen_network_both_checkpoints_are_whole(small, weights_file, photos, capsys):
    ex3_pretrained.main([*TINY, f"--pretrained={weights_file}", "--fine_tune=False"])
    best, = small.glob("checkpoints/*/best_model_part_4a.ckpt")
    assert f"--checkpoint={best}\n" in capsys.readouterr().out
    for path in best, best.with_name("latest_model_part_4a.ckpt"):
        ex3_pretrained.main([f"--checkpoint={path}", f"--predict={photos / 'test'}"])
        lines = capsys.readouterr().out.splitlines()
        assert len([line for line in lines if line.startswith("test/") and "%" in line]) == 8

@pytest.mark.parametrize("script", [ex3_convnet, ex3_pretrained])
@pytest.mark.parametrize("flag", ["--checkpoint=x.ckpt", "--predict=photos"])
def test_one_of_the_two_flags_is_too_few(folder, script, flag):
    with pytest.raises(utils.UserError, match=r"--checkpoint=.*--predict=") as error:
        script.main([flag])
    assert error.value.exit_code == 2
