"""Settings: plain assignments at the top of a script, each a flag of the same name."""

import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import TINY, parse

import ex3_convnet
import ex3_pretrained
import utils


@pytest.fixture
def edit(tmp_path):
    """A function that imports a copy of a script with other text in place of a setting's line."""
    def edit(name, text):
        script = ex3_convnet if hasattr(ex3_convnet, name) else ex3_pretrained
        source = Path(script.__file__).read_text(encoding="utf-8")
        path = tmp_path / Path(script.__file__).name
        path.write_text(re.sub(f"^{name} = .*", text, source, flags=re.MULTILINE), encoding="utf-8")
        return SimpleNamespace(**runpy.run_path(str(path)))

    return edit

@pytest.mark.parametrize(("text", "flag", "expected"), [
    ("norm_flag = True", "--norm_flag=False", False), ("norm_flag = False", "--norm_flag", True),
    ('norm_flag = "False"', "", False), ("norm_flag = 1", "", True), ("dropout = 0", "", 0),
    ("dropout=.3", "", 0.3), ("dropout = 0", "--dropout=.5", 0.5),
    ("dropout: float = 0.3", "", 0.3), ("dropout: float = 0.0  # hm", "--dropout=.5", 0.5),
    ("dropout = (0.25\n           + 0.5)  # two lines", "", 0.75),
    ("dropout = 0.3  # 30% are off\n# dropout = 0.5", "", 0.3),
    ("dropout, x = 0.3, 1", "", 0.3), ("dropout, x = 0.3, 1", "--dropout=0.5", 0.5),
    ("dropout = x = 0.3", "", 0.3), ("dropout = 0\nif not norm_flag:\n    dropout = 0.3", "", 0.3),
    ("num_epochs = 2e0", "", 2), ("num_epochs = 20", "--num_epochs=3e0", 3),
    ("patience = None", "", 0), ("num_training = None", "--num_training=50", 50),
    ('augmentation = "horizontal_flip+rotation"', "", "horizontal_flip+rotation"),
    ('augmentation = ("rotation"\n                "+scaling")', "", "rotation+scaling"),
    ("augmentation = None", "", "none"), ("question = 1", "", "1"), ("note = None", "", "none"),
    ('results = "figures"', "--results=True", "True"), ("dropout = .3", "--dropout=0", 0),
    ("pretrained = True", "", "imagenet"), ("pretrained = False", "", "none"),
    ("pretrained = None", "", "none"), ("pretrained = False", "--pretrained=w.pth", "w.pth"),
    ('pretrained = "none"', "--pretrained=True", "imagenet")])
def test_an_edit_at_the_top_is_the_new_default_and_a_flag_overrides_it(edit, text, flag, expected):
    name = re.match(r"\w+", text)[0]
    script = edit(name, text)
    settings = utils.parse_settings(vars(script), [flag] if flag else [])
    assert getattr(settings, name) == expected
    assert name == "dropout" or type(getattr(settings, name)) is type(expected)
    assert settings.given == ({name} if flag else set())
    with pytest.raises(SystemExit):
        utils.parse_settings(vars(script), ["--help"])

@pytest.mark.parametrize(("value", "flag", "expected"), [
    ("3", "5", 5), ("3", "2.5", 2.5), ("0.1", "0.2", 0.2), ("False", "True", True),
    ("None", "True", True), ("'cosine'", "linear", "linear")])
@pytest.mark.parametrize("neighbour", ["dropout = 0", "seeds = 1"])
def test_an_own_setting_is_a_flag_and_counts_wherever_it_stands(
        edit, value, flag, expected, neighbour):
    script = edit(neighbour.split()[0], f"own = {value}  # of my own\n{neighbour}")
    settings = utils.parse_settings(vars(script), [f"--own={flag}"])
    assert (settings.own, type(settings.own)) == (expected, type(expected))
    assert settings.for_identity() == {**parse().for_identity(), "own": expected}

@pytest.mark.parametrize(("text", "name", "is_setting"), [
    ("limits = [10, 20]", "limits", True), ("LIMITS = 3", "LIMITS", False),
    ("_limits = 3", "_limits", False), ("limits = {1: 2}", "limits", False),
    ("limits = [nn.ReLU]", "limits", False), ("for i in range(3):\n    pass", "i", False),
    ("from math import pi", "pi", False),
    ("# --- end of settings ---\nlimits = 3", "limits", False)])
def test_a_list_and_a_constant_are_no_flags(edit, text, name, is_setting):
    settings = utils.parse_settings(vars(edit("note", f'note = "none"\n{text}')), [])
    assert (name in settings) == is_setting
    assert (name in settings.for_identity()) == is_setting
    script = edit("note", f'note = "none"\n{text}')
    with pytest.raises(utils.UserError, match=f"unrecognized arguments: --{name}=3"):
        utils.parse_settings(vars(script), [f"--{name}=3"])

@pytest.mark.parametrize("text", [
    "dropout = 1.5", 'dropout = "a lot"', "num_epochs = 20.5", "batch_size = 0", "seeds = None",
    'augmentation = "flip"', 'augmentation = ["rotation"]', "question = 5", "monitor = 1",
    'frozen_norm = "off"', "frozen_norm = False"])
def test_a_wrong_setting_is_one_sentence_unless_a_flag_overrides_it(edit, text):
    name = text.split()[0]
    script = edit(name, text)
    with pytest.raises(utils.UserError, match=f"^argument --{name}: .* must be .*$") as error:
        utils.parse_settings(vars(script), [])
    assert error.value.exit_code == 2
    expected = getattr(ex3_convnet, name, "eval")
    settings = utils.parse_settings(vars(script), [f"--{name}={expected}"])
    assert getattr(settings, name) == expected

@pytest.mark.parametrize(("text", "expected"), [
    ("batch_size = np.int64(50)", 50), ("norm_flag = np.bool_(True)", True),
    ("dropout = np.float32(0.5)", 0.5), ("device = torch.device('cpu')", "cpu"),
    ("pretrained = VGG11_BN_Weights.DEFAULT", "imagenet"), ('note = ""', "none")])
def test_a_value_of_another_library_is_taken_for_what_it_says(edit, text, expected):
    name = text.split()[0]
    settings = utils.parse_settings(vars(edit(name, text)), [])
    assert getattr(settings, name) == expected

@pytest.mark.parametrize("text", ["# norm_flag = True", "Norm_flag = True", "norm_flag: bool"])
def test_a_setting_that_is_missing_is_named(edit, folder, few, text):
    script = edit("norm_flag", text)
    with pytest.raises(utils.UserError, match="there is no setting norm_flag at the top of ex3_"):
        script.main(TINY)
    assert not hasattr(utils.parse_settings(vars(script), []), "norm_flag")

@pytest.mark.parametrize("name", ["help", "code", "replace", "get"])
def test_a_name_that_no_setting_can_have_is_one_sentence(edit, name):
    script = edit("note", f'note = "none"\n{name} = 3')
    with pytest.raises(utils.UserError, match=f"no setting can be called {name}"):
        utils.parse_settings(vars(script), [])

@pytest.mark.parametrize(("changes", "words"), [
    ({"norm_flag": "perhaps"}, "True or False"), ({"dropout": 1.5}, "from 0 to 0.99"),
    ({"augmentation": "flip"}, "must be none, vertical_flip"), ({"batch_size": 0}, "from 1 to"),
    ({"monitor": "val_loss"}, "accuracy or loss"), ({"num_training": 30}, "cannot set num_train"),
    ({"image_size": 64}, "cannot set image_size"), ({"precision": "fp16"}, "must be auto")])
def test_a_wrong_row_of_an_own_question_is_one_sentence(folder, monkeypatch, changes, words):
    question = utils.Question("mine", [utils.Row("mine", changes)])
    monkeypatch.setitem(ex3_convnet.QUESTIONS, "mine", question)
    with pytest.raises(utils.UserError, match=words) as error:
        ex3_convnet.main(["--question=mine", "--redraw"])
    assert error.value.exit_code == 2

def test_a_row_is_read_as_the_settings_are():
    settings = parse().replace(norm_flag="False", batch_size=2e1, patience=None, num_epochs="2")
    assert (settings.norm_flag, settings.batch_size, settings.patience, settings.num_epochs) == (
        False, 20, 0, 2)

@pytest.mark.parametrize(("script", "flag", "words"), [
    (ex3_convnet, "--patience=3", " without --earlystop"),
    (ex3_convnet, "--monitor=loss", " without --earlystop"),
    (ex3_convnet, "--norm_flag --question=2a", ": each row of the question .* sets it"),
    (ex3_pretrained, "--frozen_norm=train", " without --fine_tune=False")])
def test_a_flag_without_effect_is_one_sentence(folder, script, flag, words):
    with pytest.raises(utils.UserError, match=f"^--[a-z_]+ has no effect{words}$"):
        script.main([*flag.split(), "--redraw"])

def test_a_question_says_which_settings_it_changes(folder, capsys):
    words = "Question 2b sets num_epochs to 50; --num_epochs=... changes that"
    planned = utils.plan_runs(parse("--question=2b"), ex3_convnet.QUESTIONS)
    assert {run.num_epochs for run in planned} == {50}
    assert words in capsys.readouterr().out
    planned = utils.plan_runs(parse("--question=2b", "--num_epochs=5"), ex3_convnet.QUESTIONS)
    assert {run.num_epochs for run in planned} == {5}
    assert words not in capsys.readouterr().out

def test_a_tilde_is_the_home_folder():
    """No shell expands it behind an equals sign."""
    home = Path("~/photos").expanduser()
    assert parse("--dataset=~/photos").dataset == str(home)

def test_own_settings_are_named_at_the_start_of_a_run(edit, folder, few, no_figures, capsys):
    script = edit("note", 'note = "none"\ndroput = 0.3')
    script.CHANNELS = (8, 8, 8, 8, 8)
    script.main([*TINY, "--num_epochs=1"])
    assert "Settings that you have added: droput 0.3\n" in capsys.readouterr().out

@pytest.mark.parametrize("text", ["LIMIT = 3", "limits = {1: 2}", "acts = [nn.ReLU]"])
def test_the_codes_hash_is_of_all_but_the_settings(edit, text):
    def code(name, line):
        return utils.parse_settings(vars(edit(name, line)), []).code

    before = code("dropout", "dropout = 0.3")
    assert code("dropout", "dropout = 0.5  # half") == before
    assert code("dropout", f"dropout = 0.3\n{text}") != before

@pytest.mark.parametrize("flag", [
    "--dropout=1", "--dropout=nan", "--dropout=a", "--dropout=", "--num_epochs=0",
    "--num_epochs=2.5", "--num_epochs=inf", "--num_epochs", "--learning_rate=0", "--reg=-1",
    "--seed=4294967296", "--norm_flag=maybe", "--augmentation=flip", "--augmentation=rotation+none",
    "--augmentation=rotation+", "--monitor=test", "--monitor=none", "--precision=none",
    "--frozen_norm=none", "--question=5", "--dataset=", "--image_size=16",
    "--unknown=1", "--norm", "positional", "--device=gpu"])
def test_a_wrong_flag_is_one_sentence(folder, flag):
    """Which for an augmentation names the right ones."""
    script = ex3_pretrained if "frozen" in flag else ex3_convnet
    sentence = rf"^(argument |.*arguments: )?{flag.split('=')[0]}\b[^\n]*$"
    with pytest.raises(utils.UserError, match=sentence) as error:
        script.main([flag, "--redraw"])
    assert error.value.exit_code == 2
    if "augmentation" in flag:
        assert all(name in str(error.value) for name in utils.AUGMENTATIONS)

@pytest.mark.parametrize("script", [ex3_convnet, ex3_pretrained])
def test_help_tells_each_setting_with_its_default(capsys, script):
    with pytest.raises(SystemExit) as end:
        parse("--help", script=script)
    assert end.value.code == 0
    page = " ".join(capsys.readouterr().out.split())
    source = Path(script.__file__).read_text(encoding="utf-8").split("# --- end of settings")[0]
    settings = re.findall(r"^(\w+) = .*?  # (.*)$", source, re.MULTILINE)
    assert len(settings) > 20
    for name, comment in settings:
        default = re.escape(str(getattr(script, name)))
        assert re.search(rf"--{name} \[?VALUE\]? {re.escape(comment)} (?:(?!--).)*"
                         rf"default: {default}\)", page), name
