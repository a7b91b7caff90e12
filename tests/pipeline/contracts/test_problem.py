import re

import pytest

from pipeline.contracts.errors import InputError
from pipeline.contracts.problem import (
    Constraint,
    constraint_signs,
    expand_constraints,
    few_prompts,
    require_consistent,
    sign_of,
)
from pipeline.contracts.statistics import Statistic


@pytest.mark.parametrize(("fields", "given"), [({}, "neither"), ({"threshold": 1.0, "margin": 0.0}, "both")])
def test_exactly_one_of_threshold_and_margin(fields, given):
    with pytest.raises(InputError, match=f"gives {given} of"):
        Constraint("harmless", ">=", **fields)


def test_bounds_must_be_finite():
    with pytest.raises(InputError, match="`margin` is nan"):
        Constraint("harmless", ">=", margin=float("nan"))


def test_a_margin_is_over_the_reference_mean():
    assert Constraint("g", ">=", margin=0.5).absolute_threshold(-1.0) == -0.5
    assert Constraint("g", "<=", threshold=0.5).absolute_threshold(-1.0) == 0.5


def test_signs_turn_an_upper_bound_and_nothing_else():
    bounds = [Constraint("a", ">=", threshold=1.0), Constraint("b", "<=", threshold=1.0)]
    assert constraint_signs(bounds).tolist() == [1.0, -1.0] == [bound.sign for bound in bounds]
    assert constraint_signs([]).shape == (0,)
    assert sign_of("<=") * sign_of("<=") == sign_of(">=") == 1.0


@pytest.mark.parametrize("given", ["threshold", "margin"])
def test_a_tightened_constraint_is_harder_from_its_own_side(given):
    assert Constraint("g", ">=", **{given: 1.0}).tightened(0.25) == Constraint("g", ">=", **{given: 1.25})
    assert Constraint("g", "<=", **{given: 1.0}).tightened(0.25) == Constraint("g", "<=", **{given: 0.75})
    assert Constraint("g", "<=", **{given: 1.0}).tightened(0.25).tightened(-0.25) == Constraint(
        "g", "<=", **{given: 1.0}
    )


SHARE = Statistic("g", "share", at_least=0.0)


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({"threshold": 1.2, "statistic": SHARE}, "`threshold` is 1.2; a share lies between 0 and 1"),
        ({"margin": -1.2, "statistic": SHARE}, "`margin` is -1.2; two shares differ by no more than 1"),
        (
            {"threshold": -0.1, "statistic": Statistic("g", "shortfall", below=0.0), "direction": "<="},
            "a shortfall is never negative",
        ),
        ({"threshold": 0.1, "statistic": Statistic("g", "shortfall", below=0.0)}, "bound it from above"),
        ({"threshold": 0.1, "statistic": Statistic("g", "cvar", level=0.1), "direction": "="}, "no convex set"),
        ({"threshold": 0.1, "statistic": Statistic("g", "cvar", level=0.1), "direction": "<="}, "`<=` the upper"),
        ({"threshold": 0.1, "tolerance": 0.1}, "`tolerance` is of an equality"),
        ({"threshold": 0.1, "tolerance": 0.0, "direction": "="}, "`tolerance` is 0; it must be positive"),
        (
            {"threshold": 0.1, "each": "category", "statistic": Statistic("g", where=(("category", ("a",)),))},
            "`each` and `where` both name 'category'",
        ),
    ],
)
def test_what_a_statistic_cannot_be_is_said(fields, rule):
    with pytest.raises(InputError, match=f"constraint `c`: .*{rule}"):
        Constraint("c", fields.pop("direction", ">="), **fields)


COUNTS = {"category": {"b": 40, "a": 29}}


def test_each_value_makes_a_constraint():
    stated = [
        Constraint("tone", ">=", margin=0.5, statistic=Statistic("g"), each="category"),
        Constraint("h", "<=", 1),
    ]
    found = expand_constraints(stated, COUNTS)

    assert [one.name for one in found] == ["tone[category=a]", "tone[category=b]", "h"]
    assert [one.statistic.where for one in found] == [(("category", ("a",)),), (("category", ("b",)),), ()]
    assert all(one.each is None for one in found)
    (few,) = few_prompts(found, COUNTS)
    assert few.startswith("constraint `tone[category=a]` is of 29 train prompts (category 'a')")


@pytest.mark.parametrize(
    ("constraint", "rule"),
    [
        (
            Constraint("c", ">=", 0, each="topic"),
            "`each` names the column 'topic', which is not there; known:",
        ),
        (Constraint("c", ">=", 0, statistic=Statistic("g", where=(("topic", ("a",)),))), "`where` names the column"),
        (
            Constraint("c", ">=", 0, statistic=Statistic("g", where=(("category", ("a", "aa")),))),
            "no prompt has the category 'aa'; did you mean `a`?",
        ),
    ],
)
def test_columns_and_values_must_be_there(constraint, rule):
    with pytest.raises(InputError, match=f"constraint `c`: .*{re.escape(rule)}"):
        expand_constraints([constraint], COUNTS)


def of_g(name, direction, **bound):
    return Constraint(name, direction, statistic=Statistic("g"), **bound)


@pytest.mark.parametrize(
    ("one", "other", "rule"),
    [
        (of_g("a", ">=", threshold=0.0), of_g("a", "<=", threshold=1.0), "two constraints are named 'a'"),
        (of_g("a", ">=", threshold=0.0), of_g("b", ">=", threshold=0.0), "`a` and `b` are the same: g >= 0"),
        (of_g("a", "=", threshold=0.5), of_g("b", ">=", threshold=0.6), "contradict each other"),
        (of_g("a", "=", threshold=0.5), of_g("b", "=", threshold=0.6), "contradict each other"),
        (of_g("a", "<=", threshold=0.5), of_g("b", ">=", threshold=0.6), "contradict each other"),
        (of_g("a", "<=", margin=0.5), of_g("b", ">=", margin=0.6), "contradict each other"),
    ],
)
def test_constraints_that_contradict_each_other_are_refused(one, other, rule):
    with pytest.raises(InputError, match=rule):
        require_consistent([one, other])


def test_constraints_that_may_both_hold_are_kept():
    require_consistent(
        [
            of_g("a", ">=", threshold=0.5),
            of_g("b", "<=", threshold=0.6),
            of_g("c", ">=", margin=0.7),
            Constraint("d", "<=", threshold=0.4, statistic=Statistic("g", where=(("category", ("a",)),))),
            of_g("e", "=", threshold=0.55),
        ]
    )
