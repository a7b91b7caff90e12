"""Constraints of every kind through ``dualign.solve``: what is promised, and what the weights make of it."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import dualign
import pipeline.dual.from_table
from pipeline.contracts.statistics import tail_mean

N_PROMPTS, N_RESPONSES = 96, 24


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    rng = np.random.default_rng(5)
    prompt_n = np.repeat(np.arange(N_PROMPTS), N_RESPONSES)
    n = len(prompt_n)
    harmless = rng.normal(size=n) + 0.2 * (prompt_n % 3)
    helpful = -0.5 * harmless + rng.normal(size=n)
    claims = 1.0 + rng.poisson(3, n)
    return pd.DataFrame(
        {
            "prompt_id": prompt_n,
            "helpful": helpful,
            "harmless": harmless,
            "my words": 100 + 20 * rng.normal(size=n) - 4 * helpful,
            "claims": claims,
            "facts": claims * (0.7 + 0.1 * np.tanh(harmless)),
            "category": np.array(["a", "b", "c"])[prompt_n % 3],
            "split": np.where(prompt_n < 72, "train", "test"),
        }
    ).sample(frac=1.0, random_state=0, ignore_index=True)


def of_train(frame: pd.DataFrame, weight_n: np.ndarray) -> tuple[pd.DataFrame, np.ndarray]:
    train = (frame["split"] == "train").to_numpy()
    return frame[train], weight_n[train] / 72


SHARE = "share(harmless >= 0) >= 0.8"


@pytest.mark.parametrize(
    ("texts", "values"),
    [
        ([SHARE], lambda f, w: [w @ (f["harmless"] >= 0)]),
        (
            ["each(category): harmless >= ref + 0.3"],
            lambda f, w: [
                (w * (f["category"] == kind)) @ f["harmless"] / (w @ (f["category"] == kind)) for kind in "abc"
            ],
        ),
        (["100 <= 'my words' <= 120"], lambda f, w: [w @ f["my words"]] * 2),
        (["facts per claims >= ref + 0.02"], lambda f, w: [w @ f["facts"] / (w @ f["claims"])]),
        (["shortfall(harmless, 0) <= 0.15"], lambda f, w: [w @ np.maximum(0 - f["harmless"], 0)]),
        (['"my words" = 103'], lambda f, w: [w @ f["my words"]]),
        (
            ["cvar(harmless, 0.1) >= ref + 0.3"],
            lambda f, w: [tail_mean(f["harmless"].to_numpy(), w, level=0.1, tail="lower")[0]],
        ),
    ],
)
def test_the_weights_give_what_is_predicted(frame: pd.DataFrame, texts: list[str], values: object) -> None:
    result = dualign.solve(frame, reward="helpful", constraints=texts, beta=1.0)
    rows, weight_n = of_train(frame, result.weights["weight"].to_numpy())
    found = values(rows, weight_n)  # type: ignore[operator]
    reference = values(rows, np.full(len(rows), 1.0 / len(rows)))  # type: ignore[operator]
    for entry, value, own in zip(result.dual["constraints"], found, reference, strict=True):
        assert entry["reference"] == pytest.approx(own, abs=1e-9)
        # The mean at the t of a cvar is at most the cvar, and as good as it at the best t.
        close = 2e-3 if entry["statistic"]["kind"] == "cvar" else 1e-8
        assert entry["predicted"] == pytest.approx(value, abs=close)
        assert entry["predicted"] <= value + 1e-8 or close == 1e-8
        slack = (entry["predicted"] - entry["threshold"]) * (-1 if entry["direction"] == "<=" else 1)
        assert entry["slack"] == pytest.approx(slack, abs=1e-9)
        assert entry["slack"] >= -1e-8
        low, high = entry["predicted_ci95"]
        assert low < entry["predicted"] < high
        assert entry["heldout"] is not None


def test_held_out_prompts_are_judged_by_the_policy_of_the_train_prompts(frame: pd.DataFrame) -> None:
    """Of a ratio over the reference the column is that of the train threshold, there as here."""
    result = dualign.solve(frame, reward="helpful", constraints=["facts per claims >= ref + 0.02"], beta=1.0)
    weight_n = result.weights["weight"].to_numpy()
    held = frame[frame["split"] == "test"]
    own = weight_n[held.index]
    value = own @ held["facts"] / (own @ held["claims"])
    (entry,) = result.dual["constraints"]
    assert entry["heldout"] == pytest.approx(value, abs=1e-9)
    reference = held["facts"].sum() / held["claims"].sum()
    assert entry["heldout_reference"] == pytest.approx(reference, abs=1e-12)
    assert entry["heldout_slack"] == pytest.approx(value - reference - 0.02, abs=1e-9)


def test_a_kl_budget_is_spent(frame: pd.DataFrame) -> None:
    found = dualign.solve(frame, reward="helpful", constraints=[SHARE], kl=0.4)
    assert found.dual["kl_budget"] == 0.4
    assert found.dual["kl"]["predicted"] == pytest.approx(0.4, abs=1e-8)
    low, high = found.dual["beta_ci95"]
    assert low < found.dual["beta"] < high
    again = dualign.solve(frame, reward="helpful", constraints=[SHARE], beta=found.dual["beta"])
    assert again.multipliers == pytest.approx(found.multipliers, rel=1e-6)
    assert again.dual["kl_budget"] is again.dual["beta_ci95"] is None


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"beta": 1.0, "kl": 0.4}, "InputError", "both beta and kl are given; a problem has one of the two"),
        ({}, "InputError", "neither beta nor kl is given"),
        ({"kl": 3.0}, "InputError", "`kl` is 3 nats; 24 responses a prompt can show at most 1.11"),
        (
            {"kl": 0.05},
            "KlBudgetError",
            "is too small: the policy closest to the reference that meets",
        ),
        ({"beta": 1.0, "constraints": ["share(harmless >= 0) >= 1.5"]}, "InputError", "a share lies between 0 and 1"),
        ({"beta": 1.0, "constraints": ["harmless[kind=a] >= 0"]}, "InputError", "no column 'kind'"),
        ({"beta": 1.0, "constraints": ["harmless[category=d] >= 0"]}, "InputError", "no prompt has the category 'd'"),
        ({"beta": 1.0, "constraints": ["harmless[helpful=1] >= 0"]}, "InputError", "what says which rows count"),
        ({"beta": 1.0, "constraints": ["claims per harmless >= 0"]}, "InputError", "a score to divide by must be"),
        ({"beta": 1.0, "reserve": {"harmless[category=d]": 1.0}}, "InputError", "a safeguard is asked for"),
        (
            {"beta": 1.0, "constraints": ["'my words' = 100"], "reserve": {"my words": 1.0}},
            "InputError",
            "an equality takes no `reserve`",
        ),
        (
            {"beta": 1.0, "score_error": {SHARE.partition(" >= 0.8")[0]: 0.1}},
            "InputError",
            "`score_error` is of the mean of a score over all prompts",
        ),
    ],
)
def test_what_cannot_be_is_refused(frame: pd.DataFrame, change: dict[str, object], error: str, message: str) -> None:
    with pytest.raises(getattr(dualign, error), match=message):
        dualign.solve(frame, **{"reward": "helpful", "constraints": [SHARE], **change})  # type: ignore[arg-type]


def test_a_reserve_of_each_is_of_every_one_in_units_of_its_statistic(frame: pd.DataFrame) -> None:
    texts = ["each(category): harmless >= ref + 0.3"]
    result = dualign.solve(frame, reward="helpful", constraints=texts, beta=1.0, reserve={"harmless": 0.1})
    for entry in result.dual["constraints"]:
        assert entry["threshold"] == pytest.approx(entry["demanded"]["threshold"] + 0.1, abs=1e-12)
        assert entry["predicted"] == pytest.approx(entry["threshold"], abs=1e-8)
        assert entry["margin"] == pytest.approx(0.4, abs=1e-12)


def test_categories_of_a_table_on_disk_are_those_of_one_in_memory(
    frame: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    def solve() -> dualign.SolveResult:
        texts = ["each(category): harmless >= ref + 0.3", "share(harmless >= 0)[category=a|b] >= 0.5"]
        return dualign.solve(frame, reward="helpful", constraints=texts, beta=1.0)

    expected = solve()
    monkeypatch.setattr(pipeline.dual.from_table, "MEMORY_BYTES", 0)
    found = solve()
    assert found.multipliers == pytest.approx(expected.multipliers, abs=1e-9)
    np.testing.assert_allclose(found.weights["weight"], expected.weights["weight"], rtol=1e-7)
    for text in ("cvar(harmless, 0.1) >= -1.5", "facts per claims >= 0.7"):
        with pytest.raises(dualign.InputError, match="needs the scores in memory"):
            dualign.solve(frame, reward="helpful", constraints=[text], beta=1.0)


def test_a_ratio_has_its_frontier(frame: pd.DataFrame) -> None:
    result = dualign.solve(frame, reward="helpful", constraints=["facts per claims >= 0.74"], beta=1.0)
    table = result.frontier().table
    solved = table[table["feasible"]]
    assert len(solved) > 20
    at = solved.iloc[len(solved) // 2]
    own = dualign.solve(
        frame, reward="helpful", constraints=[f"facts per claims >= {at['threshold']:.17g}"], beta=1.0
    ).dual["constraints"][0]
    assert own["multiplier"] == pytest.approx(at["multiplier_facts per claims"], abs=1e-6)
    assert own["predicted"] == pytest.approx(at["predicted_facts per claims"], abs=1e-8)
