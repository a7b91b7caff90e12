"""Constraints as texts: every form, what each stands for, and what is refused."""

import re

import pytest

from pipeline.contracts.constraint_text import (
    hold_ranges,
    read_constraint,
    read_constraint_families,
    read_constraints,
    with_number,
)
from pipeline.contracts.errors import InputError
from pipeline.contracts.problem import Constraint
from pipeline.contracts.statistics import Statistic


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
    assert read_constraint(text) == (expected,)


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
    (found,) = read_constraint_families(["'a:b:c' >= ref + 0:0.3:0.1"])
    assert [round(bound.margin, 12) for bound in found] == [0.0, 0.1, 0.2, 0.3]
    assert [[bound.margin for bound in family] for family in read_constraint_families(["a >= ref - 1:1:1"])] == [
        [-1.0]
    ]
    assert read_constraint_families(["a >= 1"]) == ((Constraint("a", ">=", threshold=1.0),),)
    assert [hold_ranges(text) for text in ("'a:b:c' >= 1", "a >= 1:1:1", "1 <= a <= 2")] == [
        (False,),
        (True,),
        (False,) * 2,
    ]
    (shares,) = read_constraint_families(["share(a >= 0) >= 0.5:0.7:0.1"])
    assert [(bound.name, round(bound.threshold, 12)) for bound in shares] == [
        ("share(a >= 0)", 0.5),
        ("share(a >= 0)", 0.6),
        ("share(a >= 0)", 0.7),
    ]


BENIGN = (("category", ("benign",)),)


@pytest.mark.parametrize(
    ("text", "name", "direction", "bound", "statistic"),
    [
        (
            "share(harmless >= 0) >= 0.97",
            *("share(harmless >= 0)", ">=", {"threshold": 0.97}, Statistic("harmless", "share", at_least=0.0)),
        ),
        (
            'share( "safety score"<=-0.5 )<=ref - 0.1',
            *("share(safety score <= -0.5)", "<=", {"margin": -0.1}),
            Statistic("safety score", "share", at_most=-0.5),
        ),
        (
            "shortfall(harmless, 0.123456789) <= 0.1",
            *("shortfall(harmless, 0.123456789)", "<=", {"threshold": 0.1}),
            Statistic("harmless", "shortfall", below=0.123456789),
        ),
        (
            "cvar(harmless, 0.05) >= -4",
            *("cvar(harmless, 0.05)", ">=", {"threshold": -4.0}, Statistic("harmless", "cvar", level=0.05)),
        ),
        (
            "cvar(toxicity, 0.05) <= ref + 0",
            *("cvar(toxicity, 0.05)", "<=", {"margin": 0.0}),
            Statistic("toxicity", "cvar", level=0.05, tail="upper"),
        ),
        ("facts per claims >= 0.9", "facts per claims", ">=", {"threshold": 0.9}, Statistic("facts", per="claims")),
        ("she = 0.5", "she", "=", {"threshold": 0.5}, Statistic("she")),
        ("words == ref + 0", "words", "=", {"margin": 0.0}, Statistic("words")),
        (
            "harmless[category=benign] >= ref + 0.5",
            *("harmless[category=benign]", ">=", {"margin": 0.5}, Statistic("harmless", where=BENIGN)),
        ),
        (
            "share(refusal >= 1)[category=benign|'it''s, a', \"my source\" = x] <= 0.05",
            *("share(refusal >= 1)[category=benign|it's, a, my source=x]", "<=", {"threshold": 0.05}),
            Statistic(
                "refusal",
                "share",
                at_least=1.0,
                where=(("category", ("benign", "it's, a")), ("my source", ("x",))),
            ),
        ),
        ("share >= 1", "share", ">=", {"threshold": 1.0}, Statistic("share")),
    ],
)
def test_texts_of_statistics(text, name, direction, bound, statistic):
    assert read_constraint(text) == (Constraint(name, direction, statistic=statistic, **bound),)


def test_a_text_of_each_and_one_of_a_band():
    (each,) = read_constraint("each(category): harmless >= ref + 0.5")
    assert each == Constraint("harmless", ">=", margin=0.5, each="category")
    low, high = read_constraint("80 <= words <= 120")
    assert (low, high) == (
        Constraint("words.at_least", ">=", threshold=80.0, statistic=Statistic("words")),
        Constraint("words.at_most", "<=", threshold=120.0, statistic=Statistic("words")),
    )
    assert [one.each for one in read_constraint("each('my kind'): 0.2 <= share(x >= 1) <= 0.4")] == ["my kind"] * 2


def test_a_number_comes_first_in_a_band_alone():
    with pytest.raises(InputError, match="is not of the form"):
        read_constraint("80 <= words")


@pytest.mark.parametrize(
    "text",
    [
        *("share(harmless >= 0) >= 0.97", "harmless[category=benign] >= ref - 0.5", "she = 0.5"),
        *("cvar(harmless, 0.05) >= -4", "facts per claims >= 0.9", "each(category): shortfall(harmless, 0) <= 0.1"),
    ],
)
def test_a_constraint_says_itself_as_it_was_read(text):
    (found,) = read_constraint(text)
    assert found.text() == text


def test_bounds_on_one_statistic_have_names_of_their_own():
    texts = ["words >= 80", "words <= 120", "words >= ref - 5", "harmless >= 0", "each(kind): harmless >= ref + 1"]
    assert [bound.name for bound in read_constraints(texts)] == [
        *("words.at_least", "words.at_most", "words.at_least_over_reference", "harmless", "harmless")
    ]


@pytest.mark.parametrize(
    ("texts", "rule"),
    [
        (["a >= 1", "a >= 1"], "two constraints are the same: 'a >= 1'"),
        (["a >= 1", "a >= 2"], "bound the same from the same side"),
        (["a >= 1", "a <= 0"], "contradict each other"),
        (["a = 1", "a <= 0"], "contradict each other"),
        (["120 <= words <= 80"], "its lower end, 120, is not below its upper one, 80"),
        (["share(a >= 0) >= 1.2"], "a share lies between 0 and 1"),
        (["cvar(a, 1.5) >= 0"], "`level` is 1.5"),
        (["share(a, 0) >= 0.5"], "is not of the form"),
        (["cvar(a >= 0) >= 0.5"], "is not of the form"),
        (["cvar(a, x) >= 0.5"], "is not of the form"),
        (["cvar(a, 0.05) = 0.5"], "no convex set"),
        (["a per a >= 1"], "their ratio is 1"),
        (["a[] >= 1"], "is not of the form [COLUMN=VALUE]"),
        (["a[x=1,] >= 1"], "is not of the form [COLUMN=VALUE]"),
        (["a[x] >= 1"], "is not of the form [COLUMN=VALUE]"),
        (["each(x): a[x=1] >= 1"], "`each` and `where` both name 'x'"),
        ("a >= 1", "give a list of texts"),
    ],
)
def test_what_cannot_be_is_refused_in_one_message(texts, rule):
    with pytest.raises(InputError, match=re.escape(rule)):
        read_constraints(texts)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("harmless >= 0.5", ("harmless >= {}",)),
        ("harmless >= ref + 0.8", ("harmless >= ref + {}",)),
        ("toxicity <= ref - 0.8", ("toxicity <= ref + {}",)),
        ('"ref - 1" >= ref-1e-3 ', ('"ref - 1" >= ref+ {} ',)),
        ("share(harmless >= 0) >= 0.97", ("share(harmless >= 0) >= {}",)),
        ("words[category=a|b] = 5", ("words[category=a|b] = {}",)),
        ("-80 <= words <= 120", ("{} <= words <= 120", "-80 <= words <= {}")),
        ("each(category): harmless >= ref + 0.5", (None,)),
        ("each(category): 1 <= words <= 2", (None, None)),
    ],
)
def test_the_number_of_a_text_is_changed_in_place(text, expected):
    assert with_number(text, "{}") == expected
    for changed, before in zip(expected, read_constraint(text), strict=True):
        if changed is not None:
            number = before.margin if before.threshold is None else before.threshold
            assert before in read_constraint(changed.format(number))


def test_a_text_without_a_number_has_none_to_change():
    with pytest.raises(InputError, match="is not of the form"):
        with_number("harmless", "1")
