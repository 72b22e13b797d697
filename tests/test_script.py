"""The scripts as a user runs them, in a process of its own."""

import pytest
from PIL import Image

import ex3_convnet
import utils

FILES = {"ex3_convnet.py", "ex3_pretrained.py", "utils.py", "__pycache__"}


@pytest.mark.parametrize(("arguments", "status", "words"), [
    (["--dropout=1.5"], 2, "below 1"),
    (["--nonsense"], 2, "unknown flag --nonsense"),
    (["--dataset=synthetic", "--num_validation=6000"], 2, "5000 training images of synthetic"),
    (["--dataset=no/such/folder"], 1, "there is no folder no/such/folder: "),
    (["--dataset=CIFAR10"], 1, "did you mean --dataset=cifar10?"),
    (["--dataset=synthetic", "--device=cuda:77"], 2, "cuda:77")])
def test_an_error_is_one_sentence(folder, monkeypatch, capsys, arguments, status, words):
    monkeypatch.setattr("sys.argv", ["ex3_convnet.py", *arguments])
    with pytest.raises(SystemExit) as end:
        utils.run_script(lambda: ex3_convnet.main(arguments))
    output = capsys.readouterr()
    assert end.value.code == status
    assert output.err.startswith("ex3_convnet.py: ")
    assert words in output.err
    assert output.err.count("\n") == 1
    assert output.out == ""
    assert list(folder.iterdir()) == []


def test_an_error_of_the_process_is_one_sentence(project):
    """And leaves nothing behind; --help shows the settings as they stand in the source."""
    result = project("ex3_convnet.py", "--dropout=1.5")
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert result.stderr.startswith("ex3_convnet.py: --dropout: '1.5' is not possible")
    assert {path.name for path in project.folder.iterdir()} <= FILES


def test_help_of_the_process_ends_well(project):
    result = project("ex3_pretrained.py", "--help")
    assert (result.returncode, result.stderr) == (0, "")
    for words in ("--num_epochs INT", "passes over the training images", "(default: 3", "recipe:"):
        assert words in result.stdout


def test_importing_does_nothing(project):
    result = project("-c", "import ex3_convnet, ex3_pretrained; ex3_convnet.ConvNet(norm_flag=True,"
                     " dropout=0.5); ex3_pretrained.VGG()")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert {path.name for path in project.folder.iterdir()} <= FILES


def test_a_run_leaves_checkpoint_record_and_figures(project, image_folder):
    """On a person's own two classes of photos, with the settings edited at the top."""
    script = project.folder / "ex3_convnet.py"
    script.write_text(script.read_text().replace("num_epochs: int = 20", "num_epochs: int = 2")
                      .replace("(128, 512, 512, 512, 512)", "(16, 16, 16, 16, 16)")
                      .replace("dropout: float = 0.0", "dropout: float = 0.25"))
    result = project("ex3_convnet.py", "--dataset=photos", "--augmentation=horizontal_flip",
                     "--num_validation=4", "--seed=3")
    assert result.returncode == 0, result.stderr
    assert "epoch  2/2:" in result.stdout
    assert "\r" not in result.stdout + result.stderr  # no progress bar in a log
    for word in ("on photos", "8 training, 4 validation, 4 test images", "dropout 0.25", "seed 3",
                 "train accuracy", "validation", "test"):
        assert word in result.stdout
    files = {str(path.relative_to(project.folder)) for path in project.folder.rglob("*.*")}
    name = "convnet-dropout-0.25-horizontal_flip_seed3"
    assert f"latest_model_{name}_photos.ckpt" in files
    assert not any(file.startswith("best") or file.endswith(".tmp") for file in files)
    for figure in ("learning_curves", "filters"):
        with Image.open(project.folder / f"figures/photos/{name}_{figure}.png") as image:
            assert image.width > 1000
            assert len(image.convert("RGB").getcolors(2**24)) > 50
    records = [file for file in files if file.startswith("figures/photos/records/")]
    assert len(records) == 1
    assert str(project.folder) not in (project.folder / records[0]).read_text()
