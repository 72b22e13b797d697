"""What the seeds say: intervals against hand-computed ones, and verdicts."""

import math
import statistics
from dataclasses import astuple, replace

import numpy as np
import pytest
from scipy import stats

import utils
from utils import Claim

T95 = {2: 4.302653, 8: 2.306004}  # degrees of freedom: two-sided 95 % in a table of t

def results(**runs):
    """{question: {name: records}} of one question, "1", with these test accuracies (%)."""
    rows = {}
    for name, accuracies in runs.items():
        rows[name] = [{"seed": seed, "result": {"test_accuracy": accuracy / 100}}
                      for seed, accuracy in enumerate(accuracies)]
    return {"1": rows}

def claim_on_test(first, *others, **limits):
    """A claim about the test accuracies of rows."""
    return Claim("1", "", first, list(others), **limits)

def verdict(first, *others, above=0.0, below=math.inf):
    """The word for the claim that the first is better than each of the others."""
    names = [f"other{i}" for i in range(len(others))]
    claim = claim_on_test("first", *names, above=above, below=below)
    return utils.judge(claim, results(first=first, **dict(zip(names, others)))).outcome

def welch_interval(x, y):
    """The difference of two means with its interval by Welch's formulas (1947)."""
    squares = [statistics.variance(accuracies) / len(accuracies) for accuracies in (x, y)]
    degrees = sum(squares)**2 / (squares[0]**2 / (len(x) - 1) + squares[1]**2 / (len(y) - 1))
    half = stats.t.ppf(0.975, degrees) * math.sqrt(sum(squares))
    mean = statistics.mean(x) - statistics.mean(y)
    return mean, mean - half, mean + half

@pytest.mark.parametrize(("x", "y"), [
    ((80, 81, 82), (70, 71, 72)), ((70, 71, 75, 60), (70, 71, 69)), ((80, 80, 80), (79, 80, 81)),
    (range(10, 90, 8), range(12, 52, 4))])
@pytest.mark.filterwarnings("ignore:Precision loss")  # of scipy, for seeds of equal accuracy
def test_two_runs_are_compared_by_welchs_t(x, y):
    found = utils.judge(claim_on_test("x", "y", above=0), results(x=x, y=y))
    assert astuple(found.difference) == pytest.approx(welch_interval(x, y), rel=1e-9)

def test_two_states_of_the_same_networks_are_compared_by_the_differences():
    """The seeds differ by far more than what training on has changed: 0.5, 0.8 and 0.5."""
    found = utils.mean_difference([80 - 79.5, 71 - 70.2, 75.5 - 75])
    half = T95[2] * math.sqrt(0.03 / 3)
    assert astuple(found) == pytest.approx((0.6, 0.6 - half, 0.6 + half), rel=1e-6)

@pytest.mark.parametrize(("first", "others", "word"), [
    ((80, 81, 82), [(70, 71, 72)], "holds"), ((70, 71, 72), [(80, 81, 82)], "does not hold"),
    ((80, 81, 82), [(79, 81, 83)], "undecided"), ((80, 80, 80), [(80, 80, 80)], "undecided"),
    ((90, 90, 90), [(80, 80, 80)], "undecided"),  # seeds that do not differ tell nothing
    ((90, 91), [(70, 71, 72)], "too few seeds"), ((90, 91, 92), [(70, 71)], "too few seeds"),
    ((90,), [(70,)], "too few seeds"), ((90, 91, 92), [(80, 81, 82), (70, 71, 72)], "holds"),
    ((90, 91, 92), [(80, 81, 82), (90, 90.5, 91)], "undecided"),
    ((90, 91, 92), [(80, 81), (70, 71, 72)], "too few seeds"),
    ((90, 91, 92), [(80, 81), (90, 90.5, 91)], "undecided"),  # whatever more seeds would tell
    ((90, 91, 92), [(80, 81), (96, 97, 98)], "does not hold")])  # one that is better is enough
def test_the_best_is_better_than_each_other_by_more_than_seeds_do(first, others, word):
    assert verdict(first, *others) == word

@pytest.mark.parametrize(("measured", "word", "seeds"), [
    ((80, 81, 82), "not measured", "missing: b, c"), ((80, 81), "not measured", "missing: b, c"),
    ((96, 97, 98), "does not hold", "3 and 3 seeds")])
def test_the_best_is_not_known_while_others_are_not_measured(measured, word, seeds):
    """Unless one of those that are measured decides it."""
    found = utils.judge(claim_on_test("best", "a", "b", "c", above=0),
                        results(best=(90, 91, 92), a=measured))
    assert (found.outcome, found.seeds, found.rival) == (word, seeds, "a")

def test_that_it_is_the_best_needs_no_correction_and_that_another_is_better_does():
    """Eight others, 2.45 standard errors away: enough for one comparison, and not for eight."""
    spread = np.array([-2, -1, 0, 1, 2])  # a variance of 2.5: of the mean of five 0.5, twice
    assert T95[8] < 2.45 < stats.t.ppf(1 - 0.025 / 8, 8)
    assert verdict(82.45 + spread, *[80 + spread] * 8) == "holds"
    assert verdict(80 + spread, *[82.45 + spread] * 8) == "undecided"
    assert verdict(80 + spread, 82.45 + spread) == "does not hold"

@pytest.mark.parametrize(("a", "b", "c", "word", "rival", "difference"), [
    ((80, 80.1, 80.2), (78, 78.1, 78.2), (60, 75, 90), "undecided", "c", 5.1),
    ((70, 70.1, 70.2), (78, 78.1, 78.2), (60, 70, 90), "does not hold", "b", -8)])
def test_the_comparison_that_decides_a_claim_is_shown(a, b, c, word, rival, difference):
    """Of c's seeds one can tell less."""
    found = utils.judge(claim_on_test("a", "b", "c", above=0), results(a=a, b=b, c=c))
    assert (found.outcome, found.rival, found.seeds) == (word, rival, "3 and 3 seeds")
    assert found.difference.mean == pytest.approx(difference)
    assert found.means == pytest.approx([np.mean(a), np.mean(a) - difference])

@pytest.mark.parametrize(("first", "word"), [
    ((80, 80.1, 80.2), "holds"), ((79.5, 80, 80.5), "undecided"), ((84, 85, 86), "does not hold"),
    ((74, 75, 76), "does not hold")])
def test_two_runs_are_level_if_the_interval_is_within_a_point_either_way(first, word):
    assert verdict(first, (79.9, 80, 80.1), above=-1, below=1) == word

@pytest.mark.parametrize(("accuracies", "word"), [
    ((10, 10, 10), "holds"), ((10.1, 10.3, 9.9), "holds"), ((15, 15, 15), "does not hold"),
    ((10, 12, 11), "undecided"), ((10, 10), "too few seeds")])
def test_a_network_that_is_stuck_at_chance_is_at_chance(accuracies, word):
    """Such a network predicts one class, whatever its seed."""
    found = utils.judge(claim_on_test("a", constant=10.0, below=2), results(a=accuracies))
    assert (found.outcome, found.seeds) == (word, f"{len(accuracies)} seeds")
    assert found.means == pytest.approx([np.mean(accuracies), 10])

@pytest.mark.parametrize(("latest", "word"), [
    ((80, 81, 82, 83), None), ((80.1, 80.9, 82, 83), "undecided"),
    ((80.5, 81.5, 82.5, 83.5), "does not hold"), ((79, 80.1, 80.9, None), "holds")])
def test_best_and_last_epoch_of_the_same_networks(latest, word):
    """Nothing was measured where they are one; a seed that lacks a number is left out."""
    found = results(a=(80, 81, 82, 83))
    for record, accuracy in zip(found["1"]["a"], latest):
        record["result"]["latest_test_accuracy"] = None if accuracy is None else accuracy / 100
    claim = Claim("1", "", "a", key="latest_test_accuracy", other_key="test_accuracy", below=0.1)
    assert getattr(utils.judge(claim, found), "outcome", None) == word

def test_the_rows_of_a_claim_are_those_of_its_question_and_rivals_of_theirs():
    claim = claim_on_test("a", "b", above=0)
    good, poor = (results(x=accuracies)["1"]["x"] for accuracies in ((80, 81, 82), (70, 71, 72)))
    found = {"0": {"a": poor, "b": good}, "1": {"a": good, "b": poor}, "2": {"b": good}}
    assert utils.judge(claim, found).outcome == "holds"
    elsewhere = replace(claim, rivals_question="2")
    assert utils.judge(elsewhere, found).outcome == "undecided"
    for found in {}, {"1": {}}, {"1": {"a": good}}, {"1": {"a": good, "b": []}}, {
            "1": {"b": poor}, "2": {"a": good}}:
        assert utils.judge(claim, found) is None
