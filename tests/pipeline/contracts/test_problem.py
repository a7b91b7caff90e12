import pytest

from pipeline.contracts.errors import InputError
from pipeline.contracts.problem import (
    Constraint,
    constraint_signs,
    holds_range,
    read_constraint,
    read_constraint_range,
    sign_of,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("harmless >= 0.5", Constraint("harmless", ">=", threshold=0.5)),
        ("toxicity <= 0.1", Constraint("toxicity", "<=", threshold=0.1)),
        ("harmless >= ref + 0.8", Constraint("harmless", ">=", margin=0.8)),
        ("toxicity <= ref - 0.8", Constraint("toxicity", "<=", margin=-0.8)),
        ("  x>=-1e-3 ", Constraint("x", ">=", threshold=-1e-3)),
        ("x>=ref+2", Constraint("x", ">=", margin=2.0)),
        ('"safety score" >= 0.5', Constraint("safety score", ">=", threshold=0.5)),
        ("'harmless/v2'<=ref - 1", Constraint("harmless/v2", "<=", margin=-1.0)),
        ('"a ""b"" >= 0" >= 0', Constraint('a "b" >= 0', ">=", threshold=0.0)),
        ("'it''s' >= 0", Constraint("it's", ">=", threshold=0.0)),
        ("安全 >= ref + 0.5", Constraint("安全", ">=", margin=0.5)),
        ('"ref" >= ref + 1', Constraint("ref", ">=", margin=1.0)),
    ],
)
def test_constraint_texts(text, expected):
    assert read_constraint(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        *("harmless", "harmless > 1", "harmless >= ref * 2", "harmless >= x", "1 >= harmless", ""),
        *("safety score >= 0.5", "harmless/v2 >= 1", '"open >= 1', '"a" "b" >= 1', "a >= 0:1:0.1"),
    ],
)
def test_malformed_constraint_texts_are_quoted(text):
    with pytest.raises(InputError, match=r"is not of the form .*stands in quotes: '.safety score. >= 0\.5'"):
        read_constraint(text)


@pytest.mark.parametrize("name", ["", " a", "a\n", "a\u200bb", "a\tb", "x" * 201])
def test_names_that_do_not_show_are_refused(name):
    with pytest.raises(InputError, match="a name has"):
        read_constraint(f'"{name}" >= 1')


def test_ranges_hold_their_ends():
    found = read_constraint_range("'a:b:c' >= ref + 0:0.3:0.1")
    assert [round(bound.margin, 12) for bound in found] == [0.0, 0.1, 0.2, 0.3]
    assert [bound.margin for bound in read_constraint_range("a >= ref - 1:1:1")] == [-1.0]
    assert read_constraint_range("a >= 1") == (Constraint("a", ">=", threshold=1.0),)
    assert [holds_range(text) for text in ("'a:b:c' >= 1", "a >= 1:1:1")] == [False, True]


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
