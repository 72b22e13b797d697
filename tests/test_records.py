"""The identity of a run, and what is read from a folder of records."""

import hashlib
import json
import re
import runpy
import shutil
import subprocess
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY, parse, random_weights, records_in, tiny_features, vgg_features

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


def git(folder, *arguments):
    command = ["git", "-c", "user.name=A", "-c", "user.email=a@b.c", "-C", folder, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


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
    assert layers[3] == {"layer": "layers.1", "class": "BatchNorm2d", "num_features": 8,
                         "eps": 1e-5, "momentum": 0.1, "affine": True, "track_running_stats": True}


@pytest.mark.parametrize("changes", [
    [("dropout = 0  #", "dropout: float = 0.0  #")], [("dropout = 0  #", "dropout = None  #")],
    [("reg = 1e-3  #", "reg: float = 0.001  #")], [("earlystop = False  #", "earlystop = None  #")],
    [(RECIPE, f'mixup = False  # mine\nwarm = None\nsmooth = 0.0\nsampler = "none"\n{RECIPE}')],
    [("CHANNELS = (", "limit = 3\nCHANNELS = (")],
    [(RECIPE, f"activation = nn.ReLU  # mine: no plain value, of which the layers tell\n{RECIPE}")],
    # what another version of PyTorch knows of, or does not, but is off
    [(MODEL, f"{MODEL}\n        for layer in self.modules():\n            layer.novel = False\n"
             "            vars(layer).pop('ceil_mode', None)\n            layer.other = None"),
     ("return self.layers(images)", "for layer in self.modules():\n            layer.ceil_mode = "
      "False\n        return self.layers(images)")],
    [(OPTIMIZER, "optimizer.param_groups[0]['novel'] = scheduler.novel = False\n    "
                 f"scheduler._state = 3\n    {OPTIMIZER}")]])
def test_what_is_off_or_changes_no_result_is_no_part_of_the_digest(small, changes):
    assert digest(script=edited(small, *changes)) == digest()


@pytest.mark.parametrize("edit", [
    GELU, (MODEL, f"layers[0].padding_mode = 'reflect'\n        {MODEL}"),
    ("torch.optim.Adam(", "torch.optim.AdamW("), ("fused=True", "fused=True, betas=(0.8, 0.9)"),
    ("ExponentialLR(optimizer, settings", "StepLR(optimizer, 5, settings"),
    ("(0.5, 0.5, 0.5), (0.5", "(0.5, 0.5, 0.4), (0.5"),
    ("(0.5, 0.5, 0.5), (0.5", "(0.5, 0.5, 0.5), (0.2"),
    (RECIPE, f"mixup = True  # mine\n{RECIPE}"), (PLACE, f"mixup = True  # mine\n{PLACE}"),
    (RECIPE, f"milestones = [10, 20]  # mine\n{RECIPE}"), ("dropout = 0  #", "dropout = .1  #")])
def test_an_edit_of_what_is_computed_is_another_run(small, edit):
    assert digest(script=edited(small, edit)) != digest()


def test_a_whole_number_is_one_however_it_is_written(small):
    assert digest(script=edited(small, ("reg = 1e-3", "reg = 1"))) == digest("--reg=1.0")


@pytest.mark.parametrize(("flags", "same"), [
    *((flag, True) for flag in ("--seed=1", "--device=cpu", "--deterministic", "--resume",
                                "--question=1", "--seeds=1", "--dropout=0.0", "--note=mine")),
    *((flag, False) for flag in ("--norm_flag", "--batch_size=30", "--augmentation=rotation",
                                 "--num_epochs=2", "--earlystop", "--num_training=50",
                                 "--num_validation=19", "--image_size=64"))])
def test_a_setting_counts_unless_it_says_where_and_how_to_run(small, flags, same):
    assert (digest(flags) == digest()) == same


def test_parameters_of_an_augmentation_count_where_it_is_used_and_each_pixel(small, monkeypatch):
    before, made = digest("--augmentation=rotation"), utils.make_synthetic()
    monkeypatch.setitem(utils.AUGMENTATIONS, "scaling", partial(utils.scale, low=0.5, high=0.7))
    assert digest("--augmentation=rotation") == before
    with monkeypatch.context() as patch:
        patch.setitem(utils.AUGMENTATIONS, "rotation", partial(utils.rotate, degrees=15))
        assert digest("--augmentation=rotation") != before
    made[2][7, 3, 2, 1] ^= 1  # one pixel
    monkeypatch.setattr(utils, "make_synthetic", lambda: made)
    assert digest("--augmentation=rotation") != before


def test_of_pretrained_weights_the_content_counts_and_not_the_place(small, weights_file, tmp_path):
    before = digest(f"--pretrained={weights_file}", script=ex3_pretrained)
    moved = shutil.copy(weights_file, tmp_path / "moved.pth")
    assert digest(f"--pretrained={moved}", script=ex3_pretrained) == before
    assert records_in(small)[0]["identity"]["weights"] == hashlib.sha256(
        moved.read_bytes()).hexdigest()[:16]
    torch.save(random_weights(tiny_features(), seed=2), moved)
    assert digest(f"--pretrained={moved}", script=ex3_pretrained) != before


def test_precision_counts_where_it_is_asked_for_by_name(small):
    identities = {}
    for name in "auto", "float32", "bfloat16":
        digest(f"--precision={name}")
        identities[name] = records_in(small)[0]["identity"]
    assert identities["bfloat16"] == {**identities["auto"], "precision": "bfloat16"}
    assert identities["float32"] == {**identities["auto"], "precision": "float32"}
    assert "precision" not in identities["auto"]


@pytest.mark.parametrize("script", [ex3_convnet, ex3_pretrained])
def test_a_run_of_today_has_the_identity_of_the_published_one(script, monkeypatch, capsys):
    """Rebuilt from the script and the settings; a further seed stands in the same row."""
    vgg = SimpleNamespace(features=vgg_features())
    monkeypatch.setattr(ex3_pretrained, "vgg11_bn", lambda: vgg)
    settings = parse(script=script)
    off = {name: "none" if isinstance(getattr(settings, name), str) else False
           for name in settings.identity_names}
    folder = ROOT / "figures/published/cifar-10" / settings.script / "records"
    records, further = utils.load_records(folder), {}
    assert len(records) == len([*folder.iterdir()]) > 0
    for record in records:
        known = record["identity"]
        pretrained = "weights.pth" if "weights" in known else "none"
        own = settings.replace(**off, pretrained=pretrained, seed=record["seed"],
                               note=record["note"])
        own = own.replace(**known["settings"])
        assert record["name"] == utils.record_name(record["title"], known, own)
        name = utils.digest_of(known)
        if name not in further:
            sizes = {part: range(known["data"][part]) for part in ("train", "val", "test")}
            data = SimpleNamespace(mean=torch.tensor(script.MEAN), std=torch.tensor(script.STD),
                                   fingerprint=known["data"]["fingerprint"], **sizes)
            model = script.build_model(own, 10)
            identity = utils.make_identity(own, data, model, *script.make_optimizer(model, own),
                                           known.get("weights"))
            further[name] = {**record, "seed": 99, "identity": identity}
        assert known == further[name]["identity"]
    shown = utils.find_results(settings, script.QUESTIONS, [*records, *further.values()], [])
    rows = [found for runs in shown.values() for found in runs.values()]
    assert len(rows) == sum(len(question.rows) for question in script.QUESTIONS.values())
    assert all(row[-1]["seed"] == 99 for row in rows)
    assert all(record in sum(rows, []) for record in records)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("content", [
    "", "{", "[]", "{}", "3", "null", '{"recipe": 3}', "\0\1", '{"title": "ConvNet", "seed": 0}'])
def test_a_damaged_or_foreign_file_is_named_and_left_out(small, capsys, content):
    path = small / "figures/synthetic-60/ex3_convnet/records/convnet.json"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    assert len(ex3_convnet.main(ARGV)) == 1
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{path} is left out")
    assert path.read_text() == content


@pytest.mark.parametrize("part", [
    {"result": [0.5]}, {"result": {}}, {"history": {}}, {"identity": {}}, {"identity": "mine"},
    {"seed": "one"}, {"finished": "today"}, {"filters": None}])
def test_a_record_with_a_damaged_part_is_named_and_left_out(small, capsys, part):
    ex3_convnet.main(ARGV)
    path, = small.glob("figures/*/*/records/*")
    other = shutil.copy(path, path.with_name("other.json"))
    change(other, **part)
    for argv in [*ARGV, "--redraw"], [*ARGV, "--redraw", "--question=1"]:
        capsys.readouterr()
        record, = ex3_convnet.main(argv)
        assert record["name"] == path.stem
        line, = capsys.readouterr().err.splitlines()
        assert line.startswith(f"{other} is left out")


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
    lines = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert sorted(line.split(":")[0] for line in lines) == ["ConvNet", "ConvNet, batch norm"]
    for line in lines:
        assert re.search(rf"{shown} shown, . runs with .*[GR]ELU left out", line, re.IGNORECASE)


@pytest.mark.parametrize("copy_is_later", [True, False])
def test_of_two_records_of_one_seed_the_later_counts_and_both_are_named(
        small, capsys, copy_is_later):
    ex3_convnet.main([*ARGV, "--question=1"])
    path, = small.glob("figures/*/*/records/*")
    copy = shutil.copy(path, path.with_name("x (1).json"))
    change(copy, finished=f"{2099 if copy_is_later else 2001}-01-01T00:00:00+00:00")
    older, later = (path, copy) if copy_is_later else (copy, path)
    for argv in ["--question=1"], []:
        capsys.readouterr()
        record, = ex3_convnet.main([*ARGV, *argv, "--redraw"])
        assert record["name"] == later.stem
        line, = capsys.readouterr().err.splitlines()
        assert line.startswith(f"{older.name} is left out: {later.name} is")


def test_a_note_stands_in_the_record_its_name_and_the_table_of_runs(small):
    record, = ex3_convnet.main([*ARGV, "--note=Zoë's laptop"])
    assert record["note"] == "Zoë's laptop"
    path, = small.glob("figures/*/*/records/*")
    assert path.name.endswith("_seed0_zoë-s-laptop.json")
    table = next(small.glob("figures/*/*/results.csv")).read_text(encoding="utf-8")
    assert "Zoë's laptop" in table


def test_records_of_several_machines_stand_in_one_row(small):
    """Without a precision by name: seeds of five other people, put into one folder."""
    argv = [*ARGV, "--question=2a", "--precision=auto"]
    ex3_convnet.main(argv)
    for path in [*small.glob("figures/*/*/records/*")]:
        for seed in range(1, 6):
            copy = path.with_name(path.name.replace("seed0", f"seed{seed}"))
            shutil.copy(path, copy)
            same = json.loads(path.read_text())["identity"]
            same["settings"] = dict(reversed(same["settings"].items()))  # in another process
            change(copy, seed=seed, device=f"GPU {seed % 2}", precision="float16", torch="2.11.0",
                   commit="abc1234", compile=True, identity=same)
    assert len(ex3_convnet.main([*argv, "--redraw"])) == 12
    lines = page(small).splitlines()
    assert [line[-5:] for line in lines if line.startswith("| with")] == ["| 6 |", "| 6 |"]
    caption = next(line for line in lines if "Accuracies are in %" in line)
    for words in ", 12 runs", "float16", "CPU", "GPU 0", "GPU 1":
        assert words in caption


@pytest.mark.filterwarnings("error")
def test_what_an_older_record_lacks_is_shown_as_a_dash(small, capsys):
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
    row = next(line for line in page(small).splitlines() if line.startswith("| with batch norm"))
    assert [cell == " – " for cell in row.split("|")[2:8]] == [
        False, False, False, False, True, True]
    capsys.readouterr()
    assert len(ex3_convnet.main([*ARGV, "--redraw"])) == 8
    assert "norm_flag True" in capsys.readouterr().out


def test_a_commit_is_that_of_the_repository_that_tracks_the_script(
        project, few, small_convnet, no_figures, monkeypatch):
    """Also of one around the project; none for a script or a project that is not tracked."""
    def recorded(folder, script=ex3_convnet):
        monkeypatch.setattr(utils, "FOLDER", folder)
        record, = script.main(ARGV)
        return record["commit"]

    home = project.folder
    head = git(home, "rev-parse", "HEAD")
    commit = recorded(home)
    assert head.startswith(commit)
    assert len(commit) >= 7
    assert recorded(home, edited(home, GELU, name="mine")) == ""
    assert recorded(home, edited(home, GELU)) == f"{commit}-dirty"
    copy = home / "copy"
    copy.mkdir()
    for name in "ex3_convnet.py", "utils.py":
        shutil.copy(ROOT / name, copy)
    assert recorded(copy) == ""
    git(home, "add", "-A")
    git(home, "commit", "-qm", "with a copy")
    assert git(home, "rev-parse", "HEAD").startswith(recorded(copy))
    assert recorded(copy) != ""
