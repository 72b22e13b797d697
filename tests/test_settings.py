"""Settings: plain assignments at the top of a script, each a flag of the same name."""

import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import parse

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
    ("_limits = 3", "_limits", False), ("limits = {1: 2}", "limits", False)])
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

@pytest.mark.parametrize("flag", [
    "--dropout=1", "--dropout=nan", "--dropout=a", "--dropout=", "--num_epochs=0",
    "--num_epochs=2.5", "--num_epochs=inf", "--num_epochs", "--learning_rate=0", "--reg=-1",
    "--seed=4294967296", "--norm_flag=maybe", "--augmentation=flip", "--augmentation=rotation+none",
    "--augmentation=rotation+", "--monitor=test", "--monitor=none", "--precision=none",
    "--frozen_norm=none", "--question=5", "--dataset=", "--note=", "--image_size=16",
    "--unknown=1", "--norm", "positional", "--device=gpu"])
def test_a_wrong_flag_is_one_sentence(folder, flag):
    """Which for an augmentation names the right ones."""
    script = ex3_pretrained if "frozen" in flag else ex3_convnet
    with pytest.raises(utils.UserError, match=f"{flag.split('=')[0]}.*$") as error:
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
