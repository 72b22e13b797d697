"""Is the difference real? The intervals against scipy, how often they err, and the verdicts."""

import numpy as np
import pytest
from scipy import stats

import ex3_convnet
import ex3_pretrained
import utils
from utils import Claim

Z = stats.norm.ppf(0.975)
ONE = " (of one seed each)"


def one(*right):
    """A sample of one seed."""
    return {0: np.array(right, bool)}


def sample(*accuracies, images=1000):
    """A sample with these accuracies (%), a seed each."""
    return {seed: np.arange(images) < round(images * accuracy / 100)
            for seed, accuracy in enumerate(accuracies)}


def pairs(only_a, only_b, both=0, neither=0):
    """Two samples of one seed each, with these numbers of images."""
    counts = (only_a, only_b, both, neither)
    return one(*np.repeat([1, 0, 1, 0], counts)), one(*np.repeat([0, 1, 1, 0], counts))


# ------------------------------------------- intervals -------------------------------------------


@pytest.mark.parametrize(("right", "images"), [
    (0, 1), (1, 1), (0, 51), (51, 51), (1, 7), (0, 10_000), (10_000, 10_000), (7437, 10_000)])
def test_wilsons_interval_is_that_of_scipy(right, images):
    expected = stats.binomtest(right, images).proportion_ci(method="wilson")
    assert utils.wilson(right / images, images) == pytest.approx(expected, abs=1e-12)


def test_wilsons_interval_stays_within_0_and_100_percent():
    for images in range(1, 1000):  # of 51 images a rounding error would give -0.0 %
        assert utils.wilson(0.0, images)[0] >= 0
        assert utils.wilson(1.0, images)[1] <= 1


@pytest.mark.parametrize("p", [0.025, 0.6, 0.975, 1 - 0.025 / 9])
def test_the_quantiles_of_students_t_are_those_of_scipy(p):
    for degrees in (*range(1, 101), 1.01, 1.5, 2.7, 3.14159, 17.3, 99.5):
        assert utils.t_quantile(p, degrees) == pytest.approx(stats.t.ppf(p, degrees), rel=2e-4)


@pytest.mark.parametrize("counts", [
    (7, 3, 60, 30), (3, 7, 60, 30), (1, 0, 0, 9), (5, 5, 5, 5), (400, 300, 9000, 300), (4, 0, 0, 0)
    ])
def test_two_networks_are_compared_image_by_image(counts):
    b, c, n = *counts[:2], sum(counts)
    middle, error = 100 * (b - c) / n, 100 * (b + c - (b - c) ** 2 / n) ** 0.5 / n
    assert utils.difference_of(*pairs(*counts)) == pytest.approx(
        (middle, middle - Z * error, middle + Z * error), abs=1e-9)


def test_the_pairs_are_of_a_seed_that_both_have():
    (a, b), other = (next(iter(one.values())) for one in pairs(3, 1, 5, 1)), np.zeros(10, bool)
    assert utils.difference_of({0: other, 4: a}, {4: b})[0] == pytest.approx(20)
    assert utils.difference_of({4: a}, {2: other, 4: b})[0] == pytest.approx(20)
    assert utils.difference_of({1: a}, {2: b})[0] == pytest.approx(20)  # or else of the first


@pytest.mark.parametrize(("x", "y"), [
    ((80.1, 81.2, 79.9), (78.0, 79.1, 78.8)), ((50, 60), (55, 55.5)), ((70, 71, 75, 60), (70, 71)),
    ((80, 80, 80), (79, 80, 81)), (range(10, 90, 8), range(12, 52, 4))])
@pytest.mark.parametrize("level", [0.95, 1 - 0.05 / 8])
@pytest.mark.filterwarnings("ignore:Precision loss")  # of scipy, for seeds of equal accuracy
def test_several_seeds_are_compared_by_welchs_t(x, y, level):
    found = utils.difference_of(sample(*x), sample(*y), level)
    expected = stats.ttest_ind(x, y, equal_var=False).confidence_interval(level)
    assert found == pytest.approx((np.mean(x) - np.mean(y), *expected), rel=1e-3)


def test_seeds_of_equal_accuracy_are_no_error():
    assert utils.difference_of(sample(80, 80), sample(75, 75)) == pytest.approx((5, 5, 5))
    assert utils.is_better("ab", [sample(80, 80), sample(80, 80)])[0] == "undecided"
    assert utils.is_better("ab", [sample(80, 80), sample(75, 75)])[0] == "holds"


def test_networks_that_are_right_on_the_same_images_are_level_and_no_error():
    for counts in (0, 0, 8, 2), (0, 0, 5, 0), (0, 0, 0, 5):
        assert utils.difference_of(*pairs(*counts)) == (0, 0, 0)
        assert utils.is_better("ab", pairs(*counts)) == (
            "undecided", "+0.0 [+0.0, +0.0]" + ONE)
        assert utils.is_best("ab", pairs(*counts))[0] == "level with b"


# ------------------------- how often an interval misses what is the same -------------------------


def share_of_misses(random, draw, trials=1000):
    """How often (%) the interval of two samples of one population excludes zero."""
    intervals = [utils.difference_of(*draw(random)) for _ in range(trials)]
    return 100 / trials * sum(low > 0 or high < 0 for _, low, high in intervals)


def test_equally_good_networks_are_taken_for_different_in_a_twentieth_of_the_cases():
    def draw(random, images=1000):
        case = random.choice(4, images, p=[0.1, 0.1, 0.7, 0.1])  # only a, only b, both, neither
        return {0: (case == 0) | (case == 2)}, {0: (case == 1) | (case == 2)}

    assert 3.5 <= share_of_misses(np.random.default_rng(0), draw) <= 6.5


def test_equally_good_seeds_are_taken_for_different_in_a_twentieth_of_the_cases():
    def draw(random):
        return [sample(*random.normal(70, 3, 5)) for _ in range(2)]

    assert 3.5 <= share_of_misses(np.random.default_rng(0), draw) <= 6.5


def test_the_best_of_nine_equally_good_networks_is_seldom_taken_for_the_best():
    random, errors = np.random.default_rng(0), 0
    for _ in range(300):
        samples = [{0: random.random(500) < 0.7} for _ in range(9)]
        errors += utils.is_best("abcdefghi", samples)[0] in ("holds", "does not hold")
    assert 0 < errors <= 0.065 * 300  # at 95 % for each of the eight it would be a quarter


# -------------------------------------------- verdicts --------------------------------------------


@pytest.mark.parametrize(("samples", "verdict"), [
    (pairs(60, 20, 20), ("holds", "+40.0 [+24.3, +55.7]" + ONE)),
    (pairs(20, 60, 20), ("does not hold", "-40.0 [-55.7, -24.3]" + ONE)),
    (pairs(22, 20, 58), ("undecided", "+2.0 [-10.7, +14.7]" + ONE)),
    ([sample(80, 81, 82), sample(70, 71, 72)], ("holds", "+10.0 [+7.7, +12.3]")),
    ([sample(70, 71, 72), sample(80, 81, 82)], ("does not hold", "-10.0 [-12.3, -7.7]")),
    ([sample(80, 81, 82), sample(79, 81, 83)], ("undecided", "+0.0 [-4.2, +4.2]"))])
def test_a_run_is_better_if_the_interval_is_above_zero(samples, verdict):
    assert utils.is_better("ab", samples) == verdict


@pytest.mark.parametrize(("others", "verdict", "nearest"), [
    ((70, 60), "holds", "b +20.0"), ((89.8, 60), "first, but level with b", "b +0.2"),
    ((89.8, 89.5), "first, but level with b, c", "b +0.2"),
    ((60, 89.8), "first, but level with c", "c +0.2"),
    ((90.2, 60), "level with b", "b -0.2"), ((90.2, 89.8), "level with b, c", "b -0.2"),
    ((95, 60), "does not hold", "b -5.0"), ((89.8, 99), "does not hold", "c -9.0")])
def test_the_best_run_is_better_than_each_other_one(others, verdict, nearest):
    samples = [sample(of - 0.4, of, of + 0.4) for of in (90, *others)]
    found = utils.is_best("abc", samples)
    assert found[0] == verdict
    assert found[1].startswith(f"against {nearest} [")


def test_the_interval_of_the_best_run_is_wider_the_more_it_is_compared_with():
    """Bonferroni: what is better at 95 % in one comparison may not be among nine."""
    a, b = pairs(60, 40, 900)
    worse = [one(*np.zeros(1000))] * 8
    assert utils.is_best("ab", [a, b])[0] == utils.is_better("ab", [a, b])[0] == "holds"
    verdict, ours = utils.is_best(["a", "b", *"cdefghij"], [a, b, *worse])
    assert verdict == "first, but level with b"
    half = 100 * stats.norm.ppf(1 - 0.025 / 9) * (100 - 20**2 / 1000) ** 0.5 / 1000
    assert ours == f"against b +2.0 [{2 - half:+.1f}, {2 + half:+.1f}]{ONE}"


def test_of_the_best_run_the_comparison_that_decides_is_shown():
    """b is nearer, but it is certain that a is better; c is level, as its seeds are far apart."""
    a, b, c = sample(80, 80.1, 80.2), sample(78, 78.1, 78.2), sample(60, 75, 90)
    verdict, ours = utils.is_best("abc", [a, b, c])
    assert verdict == "first, but level with c"
    assert ours.startswith("against c +5.1 [")


@pytest.mark.parametrize(("counts", "verdict"), [
    ((10, 10, 9980), "holds"), ((0, 0, 100), "holds"), ((10, 500, 490), "holds"),
    ((200, 20, 780), "does not hold"), ((10, 10, 180), "undecided"), ((60, 20, 9920), "undecided")])
def test_nothing_is_gained_if_the_interval_is_below_the_margin(counts, verdict):
    found = utils.does_not_gain("ab", pairs(*counts), margin=0.5)
    interval = utils.points(utils.difference_of(*pairs(*counts)), *pairs(*counts))
    assert found == (verdict, f"{interval}, margin 0.5")


@pytest.mark.parametrize(("accuracies", "images", "verdict"), [
    ([10.3], 10_000, ("holds", "10.3 % [9.7, 10.9]")), ([5], 1000, ("holds", "5.0 % [3.8, 6.5]")),
    ([20], 1000, ("does not hold", "20.0 % [17.6, 22.6]")),
    ([11], 1000, ("undecided", "11.0 % [9.2, 13.1]")),
    ([10, 12, 11], 1000, ("undecided", "11.0 % [9.2, 13.1]"))])  # all on the same images
def test_a_network_is_at_chance_if_its_interval_is_below_the_margin(accuracies, images, verdict):
    found = utils.is_at_chance("a", [sample(*accuracies, images=images)], classes=10, margin=2)
    assert found == (verdict[0], f"{verdict[1]}, at most 12")


# --------------------------------------------- claims ---------------------------------------------


def record(*right, seed=0, predictions="reported", images="test"):
    """What a claim needs of a record: all images are of class 1."""
    return {"seed": seed, "labels": {images: utils.pack(np.ones(len(right), int))},
            "predictions": {predictions: {images: utils.pack(np.array(right, int))}}}


GOOD, POOR = [record(*[1] * 90, *[0] * 10)], [record(*[1] * 20, *[0] * 80)]
CLAIM = Claim("3", "a is better", "80 → 90", utils.is_better,
              [("a", "reported", "test"), ("b", "reported", "test")])


def test_a_claim_takes_the_runs_of_its_own_question_first():
    assert CLAIM.judge({"2": {"a": POOR, "b": GOOD}, "3": {"a": GOOD, "b": POOR}})[0] == "holds"
    assert CLAIM.judge({"3": {"a": POOR, "b": GOOD}, "4": {"a": GOOD}})[0] == "does not hold"


def test_a_claim_on_the_same_networks_takes_the_seeds_that_have_both_predictions():
    claim = Claim("3", "a is better anew", "", utils.is_better,
                  [("a", "anew", "test"), ("a", "reported", "test")])
    records = [record(*[0] * 10, seed=seed) for seed in (0, 1, 2)]
    assert claim.judge({"3": {"a": records}}) == ("predictions not recorded", "–")
    for seed, right in (2, 5), (1, 6):
        records[seed]["predictions"]["anew"] = {"test": utils.pack(np.arange(10) < right)}
    assert claim.judge({"3": {"a": records}})[1].startswith("+55.0 [")


def test_a_claim_takes_a_run_from_another_question_if_its_own_has_none_of_that_name():
    assert CLAIM.judge({"2": {"b": POOR}, "3": {"a": GOOD}}) == (
        "holds", "+70.0 [+61.0, +79.0]" + ONE)
    assert CLAIM.judge({"2": {"b": POOR, "a": GOOD}})[0] == "holds"


@pytest.mark.parametrize("results", [
    {}, {"3": {}}, {"3": {"a": GOOD}}, {"3": {"a": GOOD, "b": []}},
    {"3": {"a": GOOD, "b": []}, "4": {"b": POOR}}])  # its own b is another experiment than 4's
def test_what_has_no_record_is_not_measured(results):
    assert CLAIM.judge(results) == ("not measured", "–")


@pytest.mark.parametrize("older", [
    {"seed": 0}, record(0, predictions="latest"), record(0, images="val")])
def test_of_an_older_record_the_predictions_are_missing(older):
    assert CLAIM.judge({"3": {"a": GOOD, "b": [older]}}) == ("predictions not recorded", "–")


def test_two_states_of_the_same_networks_are_compared_within_each_seed():
    """Against scipy: the seeds differ by far more than what training on has changed."""
    latest, best = sample(80.0, 71.0, 75.5), sample(79.5, 70.2, 75.0)
    expected = stats.ttest_rel([80.0, 71.0, 75.5], [79.5, 70.2, 75.0]).confidence_interval()
    middle, low, high = utils.difference_of(latest, best, same=True)
    assert (middle, low, high) == pytest.approx((0.6, expected.low, expected.high), abs=1e-3)
    assert utils.is_better(["a", "a"], [latest, best])[0] == "holds"
    assert utils.is_better(["a", "b"], [latest, best])[0] == "undecided"


def test_where_one_run_has_a_single_seed_the_difference_is_told_to_be_of_one_seed():
    """It is not that of the means, which stand beside it."""
    one, several = sample(80.0), sample(70.0, 90.0)
    assert utils.is_better("ab", [one, several])[1].endswith("]" + ONE)
    assert utils.is_best("abc", [one, sample(60.0), several])[1].endswith("]" + ONE)
    assert utils.is_best("abc", [several, sample(50.0, 50.1), one])[1].endswith("]" + ONE)
    assert utils.is_better("ab", [one, one])[1] == "+0.0 [+0.0, +0.0]" + ONE
    assert utils.is_better("ab", [several, several])[1].endswith("]")


def test_a_record_without_predictions_is_left_out_beside_others():
    found = utils.right_answers([{"seed": 3}, record(1, 0, 2, seed=5)], "reported", "test")
    assert {seed: right.tolist() for seed, right in found.items()} == {5: [True, False, False]}


def test_a_claim_gives_its_rule_the_names_and_the_options():
    def rule(runs, samples, **options):
        return runs, [list(sample) for sample in samples], options

    claim = Claim("1", "", "", rule, [("b", "latest", "val"), ("a", "reported", "test")], {"x": 7})
    results = {"1": {"a": GOOD, "b": [record(1, seed=s, predictions="latest", images="val")
                                      for s in (2, 4)]}}
    assert claim.judge(results) == (["b", "a"], [[2, 4], [0]], {"x": 7})


@pytest.mark.parametrize("script", [ex3_convnet, ex3_pretrained])
def test_the_claims_are_about_runs_of_the_questions_that_have_such_predictions(script):
    planned = utils.plan(utils.parse_flags(vars(script), ["--question=all"]), script.QUESTIONS)
    for claim in script.CLAIMS:
        assert claim.question in script.QUESTIONS
        for run, predictions, images in claim.samples:
            flags = next(runs[run] for runs in (planned[claim.question], *planned.values())
                         if run in runs)
            kinds = {"reported": True, "latest": True, "augmented": flags.augmentation != "none",
                     "recalibrated": vars(flags).get("norm_flag", False)}
            assert kinds[predictions], (claim.claim, run)
            assert images == "val" or predictions in ("reported", "latest")
