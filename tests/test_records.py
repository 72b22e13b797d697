"""The identity of a run, and what is read from a folder of records."""

import csv
import hashlib
import json
import re
import runpy
import shutil
import subprocess
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY, parse, random_weights, records_in, tiny_features, vgg_features
from PIL import Image

import ex3_convnet
import ex3_pretrained
import utils

ARGV = [*TINY, "--num_epochs=1"]
RECIPE = "# --- training recipe"
PLACE = "# --- where and how to run"
MODEL = "self.layers = nn.Sequential(*layers, nn.Flatten(), head)"
OPTIMIZER = "return optimizer, scheduler"
GELU = ("nn.ReLU(inplace=True)", "nn.GELU()")

def edited(folder, *changes, name="ex3_convnet"):
    """The convnet's script with these changes (old, new) of its source, as a module."""
    source = (ROOT / "ex3_convnet.py").read_text(encoding="utf-8")
    for old, new in (*changes, ("(128, 512, 512, 512, 512)", "(8, 8, 8, 8, 8)")):
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    (folder / f"{name}.py").write_text(source, encoding="utf-8")
    return SimpleNamespace(**runpy.run_path(str(folder / f"{name}.py")))

def digest(*argv, script=ex3_convnet):
    """That of a run, from the name of its record, which is the only one."""
    shutil.rmtree(utils.FOLDER / "figures", ignore_errors=True)
    script.main([*ARGV, *argv])
    path, = utils.FOLDER.glob("figures/*/*/records/*")
    return re.search("_([0-9a-f]{8})_seed", path.name)[1]

def change(path, **parts):
    path.write_text(json.dumps({**json.loads(path.read_text()), **parts}))

def page(folder):
    return next(folder.glob("figures/*/*/README.md")).read_text(encoding="utf-8")

def rows_of(folder):
    """Those of the CSV in the only results."""
    path, = folder.glob("figures/*/*/results.csv")
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))

def test_the_identity_holds_all_that_decides_what_a_run_computes(small):
    name = digest("--norm_flag", "--augmentation=rotation+horizontal_flip", "--seed=5")
    found, (_, _, images, labels, _) = records_in(small)[0]["identity"], utils.make_synthetic()
    assert hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:8] == name
    layers, pixels = found.pop("layers"), hashlib.sha256(images.tobytes() + labels.tobytes())
    assert found == {
        "script": "ex3_convnet", "precision": "float32",
        "settings": {
            "norm_flag": True, "augmentation": "rotation+horizontal_flip", "patience": 10,
            "monitor": "accuracy", "num_epochs": 1, "batch_size": 20, "learning_rate": 0.002,
            "learning_rate_decay": 0.95, "reg": 0.001, "num_training": 60, "num_validation": 20,
            "image_size": 32},
        "optimizer": [{"name": "Adam", "lr": 0.002, "initial_lr": 0.002, "betas": [0.9, 0.999],
                       "eps": 1e-8, "weight_decay": 0.001}],
        "schedule": {"name": "ExponentialLR", "gamma": 0.95, "base_lrs": [0.002]},
        "augmentation": {"rotation": {"degrees": 45}, "horizontal_flip": {"dim": 3, "p": 0.5}},
        "normalization": [[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]],
        "data": {"fingerprint": pixels.hexdigest()[:16], "train": 60, "val": 20, "test": 100}}
    assert [layer["class"] for layer in layers] == ["ConvNet", "Sequential", *5 * [
        "Conv2d", "BatchNorm2d", "MaxPool2d", "ReLU"], "Flatten", "Linear"]

OFF = [  # or without an effect on results
    [("dropout = 0  #", "dropout: float = 0.0  #")], [("dropout = 0  #", "dropout = None  #")],
    [("reg = 1e-3  #", "reg: float = 0.001  #")], [("earlystop = False  #", "earlystop = None  #")],
    [(RECIPE, f'mixup = False  # mine\nwarm = None\nsmooth = 0.0\nsampler = "none"\n{RECIPE}')],
    [("CHANNELS = (", "LIMIT = 3\nCHANNELS = (")],
    [(RECIPE, f"activation = nn.ReLU  # mine: no plain value, of which the layers tell\n{RECIPE}")],
    # what another version of PyTorch knows of, or does not, but is off
    [(MODEL, f"{MODEL}\n        for layer in self.modules():\n            layer.novel = False\n"
             "            vars(layer).pop('ceil_mode', None)\n            layer.other = None"),
     ("return self.layers(images)", "for layer in self.modules():\n            layer.ceil_mode = "
      "False\n        return self.layers(images)")],
    [(OPTIMIZER, "optimizer.param_groups[0]['novel'] = scheduler.novel = False\n    "
                 f"scheduler._state = 3\n    {OPTIMIZER}")]]
OTHER = [
    GELU, (MODEL, f"layers[0].padding_mode = 'reflect'\n        {MODEL}"),
    ("torch.optim.Adam(", "torch.optim.AdamW("), ("fused=True", "fused=True, betas=(0.8, 0.9)"),
    ("ExponentialLR(optimizer, settings", "StepLR(optimizer, 5, settings"),
    ("(0.5, 0.5, 0.5), (0.5", "(0.5, 0.5, 0.4), (0.5"),
    ("(0.5, 0.5, 0.5), (0.5", "(0.5, 0.5, 0.5), (0.2"),
    (RECIPE, f"mixup = True  # mine\n{RECIPE}"), (PLACE, f"mixup = True  # mine\n{PLACE}"),
    (RECIPE, f'fused = 3\ntraining = "hard"  # also options of PyTorch\n{RECIPE}'),
    (RECIPE, f"milestones = [10, 20]  # mine\n{RECIPE}"), ("dropout = 0  #", "dropout = .1  #")]

@pytest.mark.parametrize(("changes", "same"), [
    *((changes, True) for changes in OFF), *(([edit], False) for edit in OTHER)])
def test_an_edit_is_another_run_unless_it_is_off_or_changes_no_result(small, changes, same):
    assert (digest(script=edited(small, *changes)) == digest()) == same

def test_a_whole_number_is_one_however_it_is_written(small):
    before = digest(script=edited(small, ("fused=True", "fused=True, eps=1")))
    assert digest(script=edited(small, ("fused=True", "fused=True, eps=1.0"))) == before

@pytest.mark.parametrize(("flags", "same"), [
    *((flag, True) for flag in ("--seed=1", "--device=cpu", "--deterministic", "--resume",
                                "--question=1", "--seeds=1", "--dropout=0.0", "--note=mine")),
    *((flag, False) for flag in ("--norm_flag", "--batch_size=30", "--augmentation=rotation",
                                 "--num_epochs=2", "--earlystop", "--num_training=50",
                                 "--num_validation=19", "--image_size=64", "--precision=auto",
                                 "--precision=bfloat16"))])
def test_a_setting_counts_unless_it_says_where_and_how_to_run(small, flags, same):
    assert (digest(flags) == digest()) == same

def test_of_pretrained_weights_the_content_counts_and_not_the_place(small, weights_file, tmp_path):
    before = digest(f"--pretrained={weights_file}", script=ex3_pretrained)
    moved = shutil.copy(weights_file, tmp_path / "moved.pth")
    assert digest(f"--pretrained={moved}", script=ex3_pretrained) == before
    torch.save(random_weights(tiny_features(), seed=2), moved)
    assert digest(f"--pretrained={moved}", script=ex3_pretrained) != before

@pytest.mark.parametrize("script", [ex3_convnet, ex3_pretrained])
def test_a_run_of_today_has_the_identity_of_the_published_one(script, monkeypatch):
    """Rebuilt from the script and the settings; and the name of its record."""
    vgg = SimpleNamespace(features=vgg_features())
    monkeypatch.setattr(ex3_pretrained, "vgg11_bn", lambda: vgg)
    settings = parse(script=script)
    off = {name: "none" if isinstance(getattr(settings, name), str) else False
           for name in settings.identity_names}
    records = utils.load_records(
        ROOT / "figures/published/cifar-10" / settings.script / "records")
    for record in {record["title"]: record for record in records}.values():
        known = record["identity"]
        weights = known.get("weights")
        own = utils.Settings(**{**vars(settings), **off, **known["settings"],
                                "pretrained": "weights.pth" if weights else "none",
                                "seed": record["seed"], "note": record["note"]})
        sizes = {part: range(known["data"][part]) for part in ("train", "val", "test")}
        data = SimpleNamespace(mean=torch.tensor(script.MEAN), std=torch.tensor(script.STD),
                               fingerprint=known["data"]["fingerprint"], **sizes)
        model = script.build_model(own, 10)
        identity = utils.make_identity(own, data, model, *script.make_optimizer(model, own),
                                       weights)
        assert identity == known
        assert utils.record_name(record["title"], identity, own) == record["name"]

def test_what_is_damaged_or_no_record_is_named_left_out_and_replaced_by_a_run(small, capsys):
    record, = ex3_convnet.main(ARGV)
    path, = small.glob("figures/*/*/records/*")
    parts = [{"result": [0.5]}, {"result": {}}, {"history": {}}, {"identity": {}},
             {"identity": "mine"}, {"seed": "one"}, {"finished": "today"}, {"filters": None},
             {"result": {**record["result"], "test_accuracy": 81.7}}, {"data": "CIFAR-10"},
             {"result": {**record["result"], "train_accuracy": 9}}, {"commit": ["a"]},
             {"result": {**record["result"], "best_epoch": 9}}, {"pretrained": 5}]
    texts = ["", "{", "[]", "3", "null", "\0\1", "[" * 100_000, '{"title": "ConvNet", "seed": 0}',
             *(json.dumps({**record, **part}) for part in parts)]
    others = {path.with_name(f"{i:02}.json"): text for i, text in enumerate(texts)}
    for other, text in others.items():
        other.write_text(text)
    for argv in ARGV, [*ARGV, "--question=1"]:
        change(path, result={"epoch": 1, "val_accuracy": 0.5})  # of an older version
        assert len(ex3_convnet.main(argv)) == 1
        capsys.readouterr()
        shown, = ex3_convnet.main([*argv, "--redraw"])
        assert shown["name"] == path.stem
        for other, line in zip(others, capsys.readouterr().err.splitlines(), strict=True):
            assert line.startswith(f"{other} is left out: it ")
    assert [other.read_text() for other in others] == texts

@pytest.mark.parametrize(("shown", "gelu_is_later", "gelu_seeds", "argv"), [
    ("GELU", True, 2, ["--redraw"]), ("ReLU", False, 2, ["--redraw"]),
    ("GELU", False, 3, ["--redraw"]),  # of more seeds
    ("ReLU", True, 3, ["--rerun"])])  # just trained
def test_of_two_networks_with_the_same_settings_one_is_shown_and_the_other_named(
        small, capsys, shown, gelu_is_later, gelu_seeds, argv):
    """The one with more seeds, of equal ones the latest by UTC; but always the one just trained."""
    argv = [*ARGV, "--question=2a", *argv]
    ex3_convnet.main([*ARGV, "--question=2a", "--seeds=2"])
    edited(small, GELU).main([*ARGV, "--question=2a", f"--seeds={gelu_seeds}"])
    for path in small.glob("figures/*/*/records/*"):
        is_later = ("GELU" in path.read_text()) == gelu_is_later
        change(path, finished=f"2026-01-0{1 + is_later}T00:00:00+00:00")
    capsys.readouterr()
    for record in ex3_convnet.main(argv):
        classes = {layer["class"] for layer in record["identity"]["layers"]}
        assert {"GELU", "ReLU"} & classes == {shown}
    out = capsys.readouterr().out
    chosen = re.findall(r"^Question 2a, .*: showing (layers\.\d: \w+), of", out, re.MULTILINE)
    assert [name.split()[1] for name in chosen] == [shown, shown]
    line, = re.findall("^Left out: .*", out, re.MULTILINE)
    assert len(re.findall(r"layers..: [GR]ELU \(. seeds\)", line, re.IGNORECASE)) == 2
    assert f": {shown} " not in line

def test_of_records_of_one_seed_the_latest_counts_and_both_are_named(small, capsys):
    ex3_convnet.main(ARGV)
    path, = small.glob("figures/*/*/records/*")
    for name, year in ("a (1).json", 2099), ("x (1).json", 2001):
        copy = shutil.copy(path, path.with_name(name))
        change(copy, finished=f"{year}-01-01T00:00:00+00:00")
    capsys.readouterr()
    record, = ex3_convnet.main([*ARGV, "--redraw"])
    assert record["name"] == "a (1)"
    lines = capsys.readouterr().err.splitlines()
    for name, line in zip([path.name, "x (1).json"], lines, strict=True):
        latest = path.with_name("a (1).json")
        assert line.startswith(f"{path.with_name(name)} is left out: {latest} is a later run")

@pytest.mark.filterwarnings("error")
def test_what_an_older_record_lacks_is_shown_as_a_dash(small):
    argv = [*ARGV, "--question=2a", "--seeds=4"]
    ex3_convnet.main(argv)
    for path in small.glob("figures/*/*/records/*norm*"):
        record = json.loads(path.read_text())
        for name in "compile", "commit", "settings", "note", "mistakes":
            del record[name]
        del record["result"]["test_accuracy_first_1000"]
        del record["result"]["test_accuracy_recalibrated"]
        path.write_text(json.dumps(record))
    ex3_convnet.main([*argv, "--redraw"])
    row, = (line for line in page(small).splitlines() if line.startswith("| with batch norm"))
    assert [cell == " – " for cell in row.split("|")[2:8]] == [
        False, False, False, False, True, True]

def test_a_note_may_be_longer_than_a_file_name(small):
    assert ex3_convnet.main([*ARGV, f"--note={'猫' * 300}"])[0]["note"] == "猫" * 300

def test_hand_ins_may_stand_in_folders_of_their_own_but_not_those_of_other_photos(
        small, photos, capsys):
    argv = [*ARGV, f"--dataset={photos}", "--num_training=16", "--num_validation=4"]
    record, = ex3_convnet.main(argv)
    path, = small.glob("figures/*/*/records/*")
    (path.parent / "ada/records").mkdir(parents=True)
    path = path.rename(path.parent / "ada/records" / path.name)
    shown, = ex3_convnet.main([*argv, "--redraw"])
    assert shown == record
    capsys.readouterr()
    shutil.copy(path, path.with_name("other.json"))
    data = {**record["identity"]["data"], "fingerprint": "another folder"}
    change(path.with_name("other.json"), identity={**record["identity"], "data": data})
    assert ex3_convnet.main([*argv, "--redraw"]) == [record]
    assert "other.json is left out: it was written" in capsys.readouterr().err

@pytest.mark.parametrize("layers", [
    "nn.Flatten()",
    "nn.PixelUnshuffle(2), nn.Conv2d(12, 12, 3, padding=1), nn.PixelShuffle(2), nn.Flatten()"])
def test_a_network_without_a_convolution_of_colours_is_recorded_too(folder, few, layers):
    own = ("self.layers = nn.Sequential(*layers, nn.Flatten(), head)",
           f"self.layers = nn.Sequential({layers}, nn.Linear(3072, num_classes))")
    assert len(edited(folder, own).main(ARGV)) == 1
    assert len([*folder.glob("figures/*/*/*_classes.png")]) == 1

def test_seeds_of_edited_code_are_called_versions_of_it_whatever_git_knows(small, capsys):
    """Nor does a prediction by other code pass without a word; an edit of a setting is no such."""
    edited(small).main(ARGV)
    forward = ("return self.layers(images)", "return -self.layers(images)")
    edited(small, forward).main([*ARGV, "--seed=1"])
    assert ", 2 runs, 2 versions of the code." in page(small)
    assert "The seeds of ConvNet ran on 2 versions of the code\n" in capsys.readouterr().out
    file, = small.glob("checkpoints/*seed0/*")
    image = small / "image.png"
    Image.new("RGB", (32, 32)).save(image)
    argv = [f"--checkpoint={file}", f"--predict={image}"]
    for edits, told in ([], 0), ([("dropout = 0 ", "dropout = .1 ")], 0), ([forward], 1):
        capsys.readouterr()
        edited(small, *edits).main(argv)
        assert capsys.readouterr().out.count("code has changed") == told

@pytest.mark.parametrize("rows", [[{"seed": 0}, {"seed": 1}], [{}, {"note": "x"}]])
def test_rows_that_compute_the_same_are_a_wrong_setting(small, monkeypatch, rows):
    rows = [utils.Row(f"row {i}", changes) for i, changes in enumerate(rows)]
    monkeypatch.setitem(ex3_convnet.QUESTIONS, "5", utils.Question("?", rows))
    with pytest.raises(utils.UserError, match="are identical$") as error:
        ex3_convnet.main([*ARGV, "--question=5"])
    assert error.value.exit_code == 2

def test_a_commit_is_that_of_the_repository_that_tracks_the_script(
        project, few, small_convnet, no_figures, monkeypatch):
    home = project.folder
    head = subprocess.check_output(["git", "-C", home, "rev-parse", "HEAD"], text=True)
    monkeypatch.setattr(utils, "FOLDER", home)
    commit = ex3_convnet.main(ARGV)[0]["commit"]
    assert head.startswith(commit)
    assert edited(home, GELU, name="mine").main(ARGV)[0]["commit"] == ""
    assert edited(home, GELU).main(ARGV)[0]["commit"] == f"{commit}-dirty"
