"""Statistics as ratios of means of columns: closed forms, slow loops, and what they are indifferent to."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.contracts.errors import InputError
from pipeline.contracts.statistics import Statistic, statistic_columns, tail_mean

G = np.array([-1.0, 0.0, 0.5, 2.0])
CLAIMS = np.array([1.0, 2.0, 4.0, 1.0])
KIND = np.array(["a", "b", "a", "c"], dtype=object)


def columns(statistic, **more):
    return statistic_columns(statistic, {"g": G, "claims": CLAIMS}, {"kind": KIND}, **more)


@pytest.mark.parametrize(
    ("statistic", "u", "h"),
    [
        (Statistic("g"), G, None),
        (Statistic("g", "share", at_least=0.0), [0, 1, 1, 1], None),
        (Statistic("g", "share", at_most=0.0), [1, 1, 0, 0], None),
        (Statistic("g", "shortfall", below=0.25), [1.25, 0.25, 0, 0], None),
        (Statistic("g", where=(("kind", ("a",)),)), [-1, 0, 0.5, 0], [1, 0, 1, 0]),
        (Statistic("g", "share", at_least=0.0, where=(("kind", ("a", "c")),)), [0, 0, 1, 1], [1, 0, 1, 1]),
        (Statistic("g", per="claims"), G, CLAIMS),
        (Statistic("g", per="claims", where=(("kind", ("b",)),)), [0, 0, 0, 0], [0, 2, 0, 0]),
    ],
)
def test_the_columns_of_each_kind(statistic, u, h):
    found = columns(statistic)
    np.testing.assert_array_equal(found.u_n, u)
    if h is None:
        assert found.h_n is None
        assert found.less(None) is found.u_n
    else:
        np.testing.assert_array_equal(found.h_n, h)
        np.testing.assert_array_equal(found.less(0.5), np.array(u) - 0.5 * np.array(h))


@pytest.mark.parametrize("tail", ["lower", "upper"])
@given(
    values=st.lists(st.integers(-20, 20), min_size=1, max_size=12),
    level=st.sampled_from([0.05, 0.25, 0.5, 0.9]),
    seed=st.integers(0, 2**16),
)
def test_a_tail_is_the_best_of_its_columns(tail, values, level, seed):
    """Rockafellar and Uryasev: the mean of the worst is the largest (smallest) mean of the column over all t."""
    value_n = np.array(values, dtype=np.float64)
    weight_n = np.random.default_rng(seed).dirichlet(np.ones(len(values)))
    mean, start = tail_mean(value_n, weight_n, level=level, tail=tail)

    statistic = Statistic("g", "cvar", level=level, tail=tail)
    by_t = [weight_n @ statistic_columns(statistic, {"g": value_n}, {}, at=t).u_n for t in value_n]
    assert mean == pytest.approx(max(by_t) if tail == "lower" else min(by_t), rel=1e-12, abs=1e-11)
    at_start = weight_n @ statistic_columns(statistic, {"g": value_n}, {}, at=start).u_n
    assert at_start == pytest.approx(mean, rel=1e-12, abs=1e-11)


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=20), st.floats(-3, 3))
def test_a_share_is_indifferent_to_monotone_rescaling(values, threshold):
    value_n = np.array(values)
    plain = statistic_columns(Statistic("g", "share", at_least=threshold), {"g": value_n}, {})
    # A factor that is exact: two values that rounding makes one are no question of shares.
    scaled = statistic_columns(Statistic("g", "share", at_least=8 * threshold), {"g": 8 * value_n}, {})
    np.testing.assert_array_equal(plain.u_n, scaled.u_n)


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"kind": "median"}, "`statistic` is 'median'; it must be one of mean, share, shortfall, cvar"),
        ({"at_least": 1.0}, "the statistic `mean` takes `per`, and `at_least` is given, 1.0"),
        ({"kind": "share"}, "the statistic `share` needs `at_least` or `at_most`"),
        ({"kind": "share", "at_least": 0.0, "at_most": 1.0}, "needs `at_least` or `at_most`, one of them"),
        ({"kind": "share", "at_least": 0.0, "per": "claims"}, "takes `at_least` or `at_most`, and `per` is given"),
        ({"kind": "cvar"}, "the statistic `cvar` needs `level`"),
        ({"kind": "cvar", "level": 1.0}, "`level` is 1; the share of the worst responses lies between 0 and 1"),
        ({"kind": "shortfall", "below": float("inf")}, "`below` is inf; it must be a finite number"),
        ({"per": "g"}, "`per` is 'g', the score itself"),
        ({"tail": "upper"}, "`tail` is 'upper'; the statistic `mean` has none"),
        ({"where": (("kind", ()),)}, "`where` has no value of 'kind'"),
        ({"where": (("kind", ("a",)), ("kind", ("b",)))}, "`where` names 'kind' twice"),
    ],
)
def test_settings_that_do_not_go_together_are_named(settings, rule):
    with pytest.raises(InputError, match=rule):
        Statistic("g", **settings)


def test_a_score_to_divide_by_must_be_positive_where_it_counts():
    scores = {"g": G, "claims": np.array([1.0, 0.0, -3.0, 1.0])}
    with pytest.raises(InputError, match=r"`per` is the score 'claims', .* for 2 of 4 responses \(the first: 0\)"):
        statistic_columns(Statistic("g", per="claims"), scores, {})
    of_c = Statistic("g", per="claims", where=(("kind", ("c",)),))
    np.testing.assert_array_equal(statistic_columns(of_c, scores, {"kind": KIND}).h_n, [0, 0, 0, 1])


def test_a_statistic_says_itself():
    shown = Statistic("my score", "share", at_least=0.5, where=(("kind", ("a", "b")),))
    assert shown.text() == "share(my score >= 0.5)[kind=a|b]"
    assert shown.to_document() == {"kind": "share", "at_least": 0.5, "where": {"kind": ["a", "b"]}}
    assert Statistic("g").to_document() == {"kind": "mean"}
    assert Statistic("g", "cvar", level=0.1).to_document() == {"kind": "cvar", "level": 0.1, "tail": "lower"}
    assert (Statistic("g").is_plain, shown.is_plain, shown.is_ratio, Statistic("g").is_ratio) == (
        True,
        False,
        True,
        False,
    )
    assert Statistic("g", per="h").scores == ("g", "h")
