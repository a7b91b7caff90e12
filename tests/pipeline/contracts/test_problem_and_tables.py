import pytest

from pipeline.contracts.errors import ConfigError, ConstraintsNotSatisfiedError, DualignError, InputError
from pipeline.contracts.problem import Constraint, read_constraint
from pipeline.contracts.tables import prompt_id, require_unique
from stage1_dual.dual.errors import InfeasibleError, NotCertifiedError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("harmless >= 0.5", Constraint("harmless", ">=", threshold=0.5)),
        ("toxicity <= 0.1", Constraint("toxicity", "<=", threshold=0.1)),
        ("harmless >= ref + 0.8", Constraint("harmless", ">=", margin=0.8)),
        ("toxicity <= ref - 0.8", Constraint("toxicity", "<=", margin=-0.8)),
        ("  x>=-1e-3 ", Constraint("x", ">=", threshold=-1e-3)),
        ("x>=ref+2", Constraint("x", ">=", margin=2.0)),
    ],
)
def test_constraint_texts(text, expected):
    assert read_constraint(text) == expected


@pytest.mark.parametrize(
    "text", ["harmless", "harmless > 1", "harmless >= ref * 2", "harmless >= x", "1 >= harmless", ""]
)
def test_malformed_constraint_texts_are_quoted(text):
    with pytest.raises(InputError, match="is not of the form"):
        read_constraint(text)


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


def test_prompt_id_is_of_role_and_content_only():
    messages = [{"role": "user", "content": "hé"}]
    assert prompt_id(messages) == prompt_id([{"content": "hé", "role": "user", "extra": "x"}])
    assert prompt_id(messages) != prompt_id([{"role": "system", "content": "hé"}])
    assert len(prompt_id(messages)) == 64
    for wrong in ([], [{"role": "user"}], [{"role": "user", "content": None}]):
        with pytest.raises(InputError, match="prompt"):
            prompt_id(wrong)


def test_require_unique_names_the_first():
    with pytest.raises(InputError, match="1 repeated \\(first: b\\)"):
        require_unique(["a", "b", "b"], what="keys")


def test_exit_codes():
    codes = {DualignError: 1, InputError: 2, ConfigError: 2, InfeasibleError: 3, NotCertifiedError: 4}
    assert {kind: kind.exit_code for kind in codes} == codes
    assert ConstraintsNotSatisfiedError.exit_code == 5
