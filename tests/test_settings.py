"""Edits of the settings at the top of a script: each works, or is named with its line."""

import pytest
from conftest import TINY

import ex3_convnet
import ex3_pretrained
import utils

DROPOUT = "dropout: float = 0.0"
WORKING = [  # what an edit replaces, by what, flags, and the settings that it gives
    (DROPOUT, "dropout: float = 0.3  # much\n#", [], {"dropout": 0.3}),
    (DROPOUT, "dropout : float = 0.3", [], {"dropout": 0.3}),
    (DROPOUT, "dropout: float = 0.1\ndropout: float = 0.3", [], {"dropout": 0.3}),
    (DROPOUT, "dropout: float = 0.2 if norm_flag else 0.3", [], {"dropout": 0.3}),
    ("norm_flag: bool = False", "norm_flag: bool = 1", [], {"norm_flag": True}),
    ('seeds: str = "1"', "seeds: str = 3", [], {"seeds": "3"}),
    ('augmentation: str = "none"', 'augmentation: str = (\n    "rotation"\n    "+scaling")', [],
     {"augmentation": "rotation+scaling"}),
    ("learning_rate: float = 2e-3", "learning_rate: float = 1e-3 * 2", [],
     {"learning_rate": 0.002}),
    (DROPOUT, f"mixup: float = 0.2  # mine\n{DROPOUT}", [], {"mixup": 0.2}),
    (DROPOUT, f"milestones: list = (10, 20)\n{DROPOUT}", [], {"milestones": ["10", "20"]}),
    (DROPOUT, f"größe: int = 2  # umlaute\n{DROPOUT}", ["--größe=3"], {"größe": 3}),
    (DROPOUT, f"{DROPOUT}  # 30% off\n#", [], {"dropout": 0.0}),
    (DROPOUT, "dropout: float = 0", ["--dropout=0.3"], {"dropout": 0.3}),
    ("norm_flag: bool = False", "norm_flag: bool = 0", ["--norm_flag"], {"norm_flag": True}),
    ('question: str = "none"', "question: str = 1", [], {"question": "1"}),
    ("num_training: int | None = None", "num_training: int | None = 50", ["--num_training=None"],
     {"num_training": None}),
    ("predict: list = []", 'predict: list = "a.png"', [], {"predict": ["a.png"]}),
    ("predict: list = []", "predict: list = []", ["--predict", "a.png", "b.png"],
     {"predict": ["a.png", "b.png"]}),
]
NAMED = [  # what an edit replaces, by what, and what the sentence has to name
    (DROPOUT, "dropout: flaot = 0.0", "dropout has the unknown type flaot"),
    (DROPOUT, "dropout: float = 1.5", "--dropout"),
    (DROPOUT, 'dropout: float = "a lot"', "--dropout"),
    (DROPOUT, "dropout: float = 0,3", "--dropout"),
    (DROPOUT, "dropout: float", "dropout has no type, or no value"),
    (DROPOUT, f"# {DROPOUT}", "the setting dropout is commented out"),
    (DROPOUT, "#dropout = 0.3", "the setting dropout is commented out"),
    (DROPOUT, "dropout, other = 0.1, 0.2", "has no type, or no value"),
    ("norm_flag: bool = False", 'norm_flag: bool = "yes"', "--norm_flag"),
    ('augmentation: str = "none"', 'augmentation: str = ["rotation", "scaling"]', "--augmentation"),
    ('augmentation: str = "none"', "augmentation: str = (1, 2)", "--augmentation"),
    ('augmentation: str = "none"', "augmentation: str = None", "--augmentation"),
    ('augmentation: str = "none"', 'augmentation: str = "flip"', "--augmentation"),
    ("patience: int = 10", "patience: int = None", "--patience"),
    ("patience: int = 10", "patience: int | None = None", "--patience"),
    ("num_epochs: int = 20", "num_epochs: int = None", "--num_epochs"),
    ("num_epochs: int = 20", "num_epochs: int = 20.5", "--num_epochs"),
    ("batch_size: int = 200", "batch_size: int = 2e2", "--batch_size"),
    ("seed: int = 0", 'seed: int = "five"', "--seed"),
    ('device: str = "auto"', "device: str = 0", "--device"),
    ('device: str = "auto"', "device: int = 0", "--device"),
    (DROPOUT, 'dropout: str = "0.3"', "--dropout"),
    ('seeds: str = "1"', "seeds: str = 0", "--seeds"),
    ('question: str = "none"', "question: str = None", "--question"),
    (DROPOUT, f"options: dict = {{}}\n{DROPOUT}", "options has the unknown type dict"),
    *((f"{name}: {kind} = {old}", f"{name} = {new}", f"{name} has no type, or no value")
      for name, kind, old, new in (
          ("dropout", "float", "0.0", "0"), ("norm_flag", "bool", "False", "1"),
          ("seeds", "str", '"1"', "3"), ("question", "str", '"none"', "1"),
          ("patience", "int", "10", "None"), ("augmentation", "str", '"none"', '["rotation"]'))),
    (DROPOUT, f"mixup = 0.2  # mine\n{DROPOUT}", "mixup has no type, or no value"),
]


def line_of(module, text):
    """ "line 24 of ex3_convnet.py", where this text begins in the source."""
    source = open(module.__file__, encoding="utf-8").read()  # noqa: SIM115
    return f"line {source[:source.index(text)].count(chr(10)) + 1} of ex3_convnet.py: "


@pytest.mark.parametrize(("old", "new", "argv", "expected"), WORKING)
def test_an_edit_works_on_the_command_line_in_help_and_in_a_run(
        few, folder, edited, capsys, old, new, argv, expected):
    script = edited((old, new))
    flags = utils.parse_flags(vars(script), argv)
    assert {name: getattr(flags, name) for name in expected} == expected
    for name, value in expected.items():
        assert type(getattr(flags, name)) is type(value) or name == "dropout"
    with pytest.raises(SystemExit) as end:
        utils.parse_flags(vars(script), ["--help"])
    assert end.value.code == 0
    assert all(f"--{name} " in capsys.readouterr().out for name in expected)
    if "predict" not in expected:  # for which there is no model yet
        script.draw = lambda *_: None
        assert script.main([*argv, "--dataset=synthetic", "--num_epochs=1", "--batch_size=20"])


@pytest.mark.parametrize(("old", "new", "words"), NAMED)
def test_an_edit_that_cannot_work_is_named_with_its_line(few, folder, edited, old, new, words):
    """By any command, before anything else is done; the reason is one that a person reads."""
    script = edited((old, new))
    for argv in ([], ["--help"], ["--earlystop", *TINY]):
        with pytest.raises(utils.Problem) as problem:
            script.main(argv)
        assert problem.value.status == 2
        assert str(problem.value).startswith(line_of(script, new))
        assert words in str(problem.value)
        assert not any(word in str(problem.value) for word in ("partial", "lambda", "object at"))
    assert list(folder.glob("*.ckpt")) == []


def test_a_wrong_setting_is_named_even_where_a_flag_overrides_it(edited):
    script = edited((DROPOUT, "dropout: float = 1.5"))
    with pytest.raises(utils.Problem, match=r"^line \d+ of ex3_convnet\.py: --dropout: '1\.5'"):
        utils.parse_flags(vars(script), ["--dropout=0.5"])


def test_a_wrong_flag_beside_a_right_setting_names_no_line():
    with pytest.raises(utils.Problem, match="^--dropout: '1.5' is not possible"):
        utils.parse_flags(vars(ex3_convnet), ["--dropout=1.5"])


def test_a_deleted_setting_is_missed_by_name(few, folder, edited):
    script = edited(("dropout: float = 0.0  # probability of dropping a unit after each block; "
                     "0: off (3b)\n", ""))
    with pytest.raises(utils.Problem, match="the setting dropout is missing") as problem:
        script.main(TINY)
    assert problem.value.status == 2


@pytest.mark.parametrize("script", [ex3_convnet, ex3_pretrained])
def test_without_the_last_heading_the_settings_have_no_end(edited, script):
    """Else a constant of the code below them would be a flag, and part of each recipe."""
    heading = next(line for line in open(script.__file__) if "end of settings" in line)  # noqa: SIM115
    script = edited((heading, ""), script=script)
    for argv in ([], ["--help"]):
        with pytest.raises(utils.Problem, match='has no line "# --- end of settings ---"') as (
                problem):
            script.main(argv)
        assert problem.value.status == 2


def test_a_constant_outside_the_settings_is_no_flag(edited, capsys):
    script = edited(("CHANNELS = (", "# --- my own ---\nlimit: int = 3\nCHANNELS = ("),
                    ("# --- experiment", "before: int = 3\n# --- experiment"))
    assert not {"limit", "before", "MEAN", "CHANNELS"} & set(
        vars(utils.parse_flags(vars(script), [])))
    for flag in ("--limit=4", "--before=4"):
        with pytest.raises(utils.Problem, match=f"unknown flag {flag[:-2]}"):
            utils.parse_flags(vars(script), [flag])


def test_a_remark_among_the_settings_is_no_setting(edited):
    script = edited((DROPOUT, f"# the report has 0.3 here\n{DROPOUT}\n# dropout: float = 0.5"))
    assert utils.parse_flags(vars(script), []).dropout == 0.0


def test_the_pretrained_scripts_own_setting_takes_a_path_or_a_truth(edited):
    for value, given in (("'w.pth'", "w.pth"), ("False", False), ("True", True), ("0", False)):
        script = edited(("pretrained: bool | str = True", f"pretrained: bool | str = {value}"),
                        script=ex3_pretrained)
        assert utils.parse_flags(vars(script), []).pretrained == given
        assert type(utils.parse_flags(vars(script), []).pretrained) is type(given)
