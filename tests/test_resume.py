"""--resume: going on is the same as never having stopped; what it cannot go on from is kept."""

import re
from functools import partial

import pytest
import torch
from conftest import DATA, FULL, LATEST, LATEST_FULL, SHORT, clear, interrupted, outcome

import ex3_convnet
import utils

CHECKPOINTS_2B = [f"{kind}_model_convnet{norm}-early-stopping_{DATA}.ckpt"
                  for kind in ("latest", "best") for norm in ("", "-batch-norm")]


def kept(folder, *names):
    """The one file that was set aside, other than the checkpoints of these names."""
    path, = set(folder.glob("*.ckpt")) - {folder / name for name in names}
    return path


def take_hours(paths):
    """Let these checkpoints tell of two hours for each epoch. Returns the last one's state."""
    for path in paths:
        state = utils.load_checkpoint(path)
        state["history"]["seconds"] = [7200.0] * state["epoch"]
        utils.save_checkpoint(path, state)
    return state


# -------------------------------------- the same to the bit --------------------------------------


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(small):
    """Interrupted in every epoch but the first, with everything on that has a state."""
    ex3_convnet.main(FULL)
    whole = outcome(small)
    assert len(whole) == 3  # latest, best, record
    clear(small)
    with interrupted(2):
        ex3_convnet.main(FULL)
    for _ in range(len(whole[LATEST_FULL]["history"]["val_loss"]) - 2):
        torch.manual_seed(99)  # a new process starts with other random numbers
        with interrupted(2):
            ex3_convnet.main([*FULL, "--resume"])
    ex3_convnet.main([*FULL, "--resume"])
    assert outcome(small) == whole


def test_a_run_goes_on_elsewhere_and_otherwise(small, epochs):
    """Flags of the environment do not make another run."""
    with interrupted(2):
        ex3_convnet.main([*SHORT, "--device=cpu"])
    ex3_convnet.main([*SHORT, "--channels_last=False", "--resume"])
    assert len(epochs) == 2 + 1


def test_in_another_layout_each_weight_goes_on_with_its_own_moments(small, monkeypatch):
    """A fused Adam does not look at the layout of its numbers: they have to have the weights'."""
    with interrupted(2):
        ex3_convnet.main(SHORT)
    saved = utils.load_checkpoint(small / LATEST)["optimizer"]["state"]
    seen = []

    def look(model, data, batches, augment, optimizer, *_):
        for number, (parameter, numbers) in enumerate(optimizer.state.items()):
            seen.append(parameter)
            for name in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(numbers[name], saved[number][name])
                assert numbers[name].stride() == parameter.stride()
        return 1.0, 0.0

    monkeypatch.setattr(utils, "train_one_epoch", look)
    ex3_convnet.main([*SHORT, "--channels_last=False", "--resume"])
    assert len(seen) == 12  # five convolutions and a linear layer, each with a bias


def test_resuming_a_finished_run_trains_nothing(small, epochs, capsys):
    ex3_convnet.main(SHORT)
    whole = outcome(small)
    ex3_convnet.main([*SHORT, "--resume"])
    assert len(epochs) == 2
    assert "Resumed after epoch 2" in capsys.readouterr().out
    assert outcome(small) == whole


def test_resuming_what_stopped_early_does_not_train_on(small, epochs, capsys):
    argv = [*SHORT, "--earlystop", "--patience=2", "--num_epochs=9", "--learning_rate=1e-30"]
    ex3_convnet.main(argv)  # it does not learn: epoch 1 stays the best
    whole = outcome(small)
    ex3_convnet.main([*argv, "--resume"])
    assert len(epochs) == 3
    assert capsys.readouterr().out.count("Early stop: no better epoch than 1 for 2 epochs") == 2
    assert outcome(small) == whole


def test_resuming_without_a_checkpoint_says_so_and_starts(small, epochs, capsys):
    ex3_convnet.main([*SHORT, "--resume"])
    assert f"There is no {LATEST} yet: starting at epoch 1" in capsys.readouterr().out
    assert len(epochs) == 2


def test_an_interrupted_question_resumes_in_the_middle_of_a_run(small, epochs, capsys):
    argv = [*SHORT, "--question=2a", "--num_epochs=3"]
    with interrupted(5):  # the second of the second run
        ex3_convnet.main(argv)
    capsys.readouterr()
    results = ex3_convnet.main([*argv, "--resume"])
    output = capsys.readouterr().out
    assert "ConvNet, seed 0, on synthetic: recorded already, not run again" in output
    assert output.count("Resumed after epoch 1") == 1
    assert len(epochs) == 5 + 2
    assert [len(runs) for runs in results["2a"].values()] == [1, 1]


def test_rerun_with_resume_is_refused(small, epochs):
    with pytest.raises(utils.Problem, match="--rerun starts anew") as problem:
        ex3_convnet.main([*SHORT, "--question=2a", "--rerun", "--resume"])
    assert problem.value.status == 2
    assert not epochs


# ---------------------------------------- training longer ----------------------------------------


@pytest.fixture
def scripted(monkeypatch):
    """Validation losses by epoch; the numbers of so small a network would be any."""
    losses, now = {}, []

    def seed_epoch(seed, epoch, augmentation, seed_epoch=utils.seed_epoch):
        now[:] = [epoch]
        return seed_epoch(seed, epoch, augmentation)

    def evaluate(*arguments, evaluate=utils.evaluate):
        return losses[now[0]], evaluate(*arguments)[1]

    monkeypatch.setattr(utils, "seed_epoch", seed_epoch)
    monkeypatch.setattr(utils, "evaluate", evaluate)
    return losses


@pytest.mark.parametrize("flags", [SHORT, FULL], ids=["plain", "everything"])
def test_more_epochs_after_a_finished_run_are_those_of_a_longer_run(
        small, epochs, scripted, flags):
    scripted.update({1: 5.0, 2: 4.0, 3: 4.5, 4: 3.0})
    argv = [*flags, "--monitor=loss"]
    ex3_convnet.main([*argv, "--num_epochs=4"])
    whole = outcome(small)
    clear(small)
    ex3_convnet.main([*argv, "--num_epochs=2"])
    ex3_convnet.main([*argv, "--num_epochs=4", "--resume"])
    assert len(epochs) == 4 + 2 + 2
    longer = outcome(small)
    assert {name: longer.pop(name) for name in whole} == whole
    assert [record["recipe"]["flags"]["num_epochs"] for record in longer.values()] == [2]


def test_a_larger_patience_goes_on_from_an_early_stop(small, epochs, scripted, capsys):
    scripted.update(enumerate([5.0, 4.0, 4.5, 3.0, 3.5, 3.6], start=1))
    argv = [*FULL, "--monitor=loss", "--resume"]
    ex3_convnet.main([*argv, "--patience=2"])
    whole = outcome(small)
    clear(small)
    del epochs[:]
    capsys.readouterr()
    ex3_convnet.main([*argv, "--patience=1"])
    assert "Early stop: no better epoch than 2 for 1 epochs" in capsys.readouterr().out
    assert len(epochs) == 3
    ex3_convnet.main([*argv, "--patience=2"])
    assert len(epochs) == 6
    longer = outcome(small)
    assert {name: longer.pop(name) for name in whole} == whole
    assert [record["recipe"]["flags"]["patience"] for record in longer.values()] == [1]


def test_a_longer_question_goes_on_from_the_shorter_one(small, epochs):
    argv = [*SHORT, "--question=2a", "--resume"]
    ex3_convnet.main(argv)
    results = ex3_convnet.main([*argv, "--num_epochs=3"])["2a"]
    assert len(epochs) == 2 * (2 + 1)
    assert [len(record["history"]["val_loss"]) for record, in results.values()] == [3, 3]


@pytest.mark.parametrize("resume", [[], ["--resume"]], ids=["anew", "resume"])
def test_fewer_epochs_than_a_checkpoint_holds_set_it_aside(small, epochs, capsys, resume):
    ex3_convnet.main([*SHORT, "--num_epochs=3"])
    whole, good = outcome(small), (small / LATEST).read_bytes()
    ex3_convnet.main([*SHORT, "--num_epochs=1", *resume])
    path = kept(small, LATEST)
    assert path.read_bytes() == good
    assert f"{LATEST} holds epoch 3 already: kept as {path.name}" in capsys.readouterr().out
    assert utils.load_checkpoint(small / LATEST)["epoch"] == 1
    path.rename(small / LATEST)
    ex3_convnet.main([*SHORT, "--num_epochs=3", "--resume"])
    assert len(epochs) == 3 + 1
    assert {name: outcome(small)[name] for name in whole} == whole


# ------------------------------------ checkpoints set aside ------------------------------------


@pytest.mark.parametrize("resume", [[], ["--resume"]], ids=["anew", "resume"])
@pytest.mark.parametrize("finished", [True, False], ids=["finished", "interrupted"])
@pytest.mark.parametrize(("change", "differing"), [
    (["--learning_rate=0.1"], "--learning_rate"), (["--precision=bfloat16"], "precision"),
    ("CHANNELS", "network"), ("data", "data")])
def test_a_checkpoint_of_another_experiment_is_set_aside_and_kept(
        small, few, epochs, capsys, monkeypatch, change, differing, finished, resume):
    if finished:
        ex3_convnet.main(SHORT)
    else:
        with interrupted(2):
            ex3_convnet.main(SHORT)
    good = (small / LATEST).read_bytes()
    before, fingerprint = len(epochs), few.fingerprint
    with monkeypatch.context() as patch:
        argv = change if isinstance(change, list) else []
        if change == "CHANNELS":
            patch.setattr(ex3_convnet, "CHANNELS", (8, 8, 8, 8, 4))
        elif change == "data":
            few.fingerprint = "0" * 16
        ex3_convnet.main([*SHORT, *argv, *resume])
    assert len(epochs) == before + 2  # started anew
    path = kept(small, LATEST)
    assert path.read_bytes() == good
    notice, = re.findall(rf"{LATEST} is of another experiment \((.*)\): kept as (\S+); .* --resume",
                         capsys.readouterr().out)
    assert differing in notice[0].split(", ")
    assert notice[1] == path.name

    few.fingerprint = fingerprint
    path.rename(small / LATEST)  # as the notice says
    ex3_convnet.main([*SHORT, "--resume"])
    assert len(epochs) == before + 2 + (not finished)


def test_another_angle_of_the_same_technique_is_another_experiment(
        small, epochs, capsys, monkeypatch):
    argv = [*SHORT, "--augmentation=rotation", "--resume"]
    with interrupted(2):
        ex3_convnet.main(argv)
    monkeypatch.setitem(utils.AUGMENTATIONS, "rotation", partial(utils.rotate, degrees=30))
    ex3_convnet.main(argv)
    assert "is of another experiment (augmentation): kept as" in capsys.readouterr().out
    assert len(epochs) == 2 + 2


def test_with_less_patience_a_run_would_have_ended_before(small, epochs, scripted, capsys):
    scripted.update(enumerate([5.0, 5.5, 5.2, 4.0, 3.0, 2.0], start=1))  # a wait of three epochs
    argv = [*FULL, "--monitor=loss"]
    with interrupted(6):
        ex3_convnet.main([*argv, "--patience=5"])
    with interrupted(1):
        ex3_convnet.main([*argv, "--patience=3", "--resume"])
    assert "Resumed after epoch 5" in capsys.readouterr().out
    ex3_convnet.main([*argv, "--patience=2", "--resume"])
    assert "is of another experiment (--patience): kept as" in capsys.readouterr().out
    assert len(epochs) == 6 + 1 + 3


def test_more_epochs_and_another_patience_are_not_another_experiment(small, capsys):
    """Without --resume they replace a short run, as the same command would."""
    ex3_convnet.main(SHORT)
    ex3_convnet.main([*SHORT, "--num_epochs=3", "--patience=3"])
    assert "will be replaced" in capsys.readouterr().out
    assert [path.name for path in small.glob("*.ckpt")] == [LATEST]


@pytest.mark.parametrize("resume", [[], ["--resume"]], ids=["anew", "resume"])
def test_a_question_goes_on_when_checkpoints_of_others_are_in_its_way(
        small, epochs, capsys, resume):
    """Latest and best, of one of its runs; the exit code is 0."""
    argv = [*SHORT, "--question=2b", "--num_epochs=2"]
    with interrupted(2):
        ex3_convnet.main([*argv, "--reg=0.5"])
    good = sorted(path.read_bytes() for path in small.glob("*.ckpt"))
    assert len(good) == 2
    capsys.readouterr()
    utils.run_script(partial(ex3_convnet.main, [*argv, *resume]))  # would raise SystemExit
    assert len(epochs) == 2 + 2 * 2
    assert capsys.readouterr().out.count("is of another experiment") == 2
    renamed = {path.name for path in small.glob("*.ckpt")} - set(CHECKPOINTS_2B)
    assert sorted((small / name).read_bytes() for name in renamed) == good


def test_without_resume_a_checkpoint_is_announced_before_it_is_replaced(small, epochs, capsys):
    ex3_convnet.main(SHORT)
    assert "will be replaced" not in capsys.readouterr().out
    ex3_convnet.main(SHORT)
    announced, trained = capsys.readouterr().out.split("epoch  1/2")
    assert f"{LATEST} is there already and will be replaced" in announced
    assert "--resume" in announced
    assert len(epochs) == 4


def test_hours_of_training_that_will_not_be_repeated_are_not_replaced(small, epochs, capsys):
    """Their checkpoint is renamed, and can be resumed."""
    with interrupted(2):
        ex3_convnet.main(SHORT)
    path = small / LATEST
    state = take_hours([path])
    good = path.read_bytes()
    ex3_convnet.main(SHORT)
    renamed = kept(small, LATEST)
    assert renamed.read_bytes() == good
    assert f"{LATEST} is not finished: kept as {renamed.name}" in capsys.readouterr().out

    state["history"]["seconds"] = [7200.0, 7200.0]
    state["epoch"] = 2
    utils.save_checkpoint(path, state)
    ex3_convnet.main(SHORT)  # the same run in full: it is repeated
    assert set(small.glob("*.ckpt")) == {renamed, path}
    renamed.rename(path)
    ex3_convnet.main([*SHORT, "--resume"])
    assert "Resumed after epoch 1" in capsys.readouterr().out


def test_a_run_that_stopped_early_is_finished_however_long_it_took(small, scripted, capsys):
    scripted.update({1: 5.0, 2: 6.0})
    argv = [*FULL, "--monitor=loss", "--patience=1"]
    ex3_convnet.main(argv)
    paths = set(small.glob("*.ckpt"))
    take_hours(paths)
    ex3_convnet.main(argv)
    assert capsys.readouterr().out.count("will be replaced") == 2
    assert set(small.glob("*.ckpt")) == paths

    scripted.update({2: 4.0, 3: 3.0, 4: 6.0})  # it goes on: both are worth keeping
    with interrupted(3):
        ex3_convnet.main(argv)
    take_hours(paths)
    ex3_convnet.main(argv)
    assert capsys.readouterr().out.count("is not finished: kept as") == 2


def test_a_checkpoint_that_cannot_be_read_is_kept_by_a_run_that_starts_anew(small, capsys):
    (small / LATEST).write_bytes(b"an older format")
    ex3_convnet.main(SHORT)
    path = kept(small, LATEST)
    assert path.read_bytes() == b"an older format"
    assert f"{LATEST} cannot be read: kept as {path.name}\n" in capsys.readouterr().out


def test_a_checkpoint_that_another_process_renames_meanwhile_is_no_error(
        small, epochs, monkeypatch):
    def load_and_rename(path):
        state = load(path)
        state["history"]["seconds"] = [7200.0]
        path.rename(small / "kept.ckpt")
        return state

    with interrupted(2):
        ex3_convnet.main(SHORT)
    load = utils.load_checkpoint
    monkeypatch.setattr(utils, "load_checkpoint", load_and_rename)
    ex3_convnet.main(SHORT)
    assert len(epochs) == 2 + 2


# -------------------------------------------- names --------------------------------------------


@pytest.mark.parametrize(("argv", "suffix"), [
    (["--dataset=cifar10"], ""), (["--dataset=cifar10", "--num_training=60"], "_cifar-10-60"),
    (["--dataset=synthetic"], "_synthetic"), (["--dataset=my Photos"], "_my-photos"),
    (["--dataset=CIFAR-10"], "_cifar-10-folder"), (["--dataset=cifar 10"], "_cifar-10-folder")])
def test_the_checkpoints_of_all_of_cifar10_have_the_reports_names_others_the_datas(
        small, argv, suffix):
    ex3_convnet.main(["--num_epochs=1", "--earlystop", "--norm_flag", *argv])
    assert {path.name for path in small.glob("*.ckpt")} == {
        f"{kind}_model_convnet-batch-norm-early-stopping{suffix}.ckpt"
        for kind in ("latest", "best")}


def test_a_run_on_other_data_leaves_the_checkpoint_of_cifar10_alone(small, capsys):
    ex3_convnet.main(["--num_epochs=1"])
    before = (small / "latest_model_convnet.ckpt").read_bytes()
    ex3_convnet.main([*SHORT, "--resume"])
    assert (small / "latest_model_convnet.ckpt").read_bytes() == before
    assert "is of another experiment" not in capsys.readouterr().out
