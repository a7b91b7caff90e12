"""dual.json: signs, thresholds and intervals in the user's own direction, and the message of an infeasible problem."""

import json
from dataclasses import replace

import numpy as np
import pytest

from pipeline.contracts.problem import Constraint, Safeguard
from pipeline.contracts.solution import Solution
from pipeline.dual.posing import pose
from pipeline.dual.solving import EvaluationSize, build_problem, solve_problem, tilted_weights
from pipeline.dual.sweep import sweep_constraints
from pipeline.scoring.joined import JoinedScores
from stage1_dual.dual.errors import InfeasibleError


def scored_rows(rng, n_prompts=80, n_responses=40, n_constraints=1):
    n = n_prompts * n_responses
    reward = rng.normal(size=n)
    scores = -0.5 * reward[:, None] + rng.normal(size=(n, n_constraints))
    return JoinedScores(
        prompt_ids=tuple(f"p{i:03d}" for i in range(n_prompts)),
        prompt_n=np.repeat(np.arange(n_prompts), n_responses),
        sample_index_n=np.tile(np.arange(n_responses), n_prompts),
        reward_n=reward,
        score_names=tuple(f"score_{j}" for j in range(n_constraints)),
        scores_ns=scores,
        cut_off_n=np.zeros(n, dtype=bool),
    )


SIZE = EvaluationSize(100, 40)


def of(constraints, scored):
    """The rows, their scores named after what is bounded."""
    return replace(scored, score_names=tuple(one.statistic.score for one in constraints))


def solved(scored, constraints, heldout=None, safeguards=None, evaluation=SIZE, corrects=False):
    scored = of(constraints, scored)
    heldout = None if heldout is None else of(constraints, heldout)
    found = solve_problem(
        pose(scored, constraints=constraints, beta=1.0),
        heldout=None if heldout is None else pose(heldout, constraints=constraints, beta=1.0),
        reward_name="helpful",
        safeguards=safeguards or [Safeguard()] * len(constraints),
        evaluation=evaluation,
        corrects_response_bias=corrects,
        n_replicates=200,
        rng=np.random.default_rng(0),
    )
    return found.content, found.posed


def flipped(scored):
    return replace(scored, scores_ns=-scored.scores_ns)


def test_an_upper_bound_is_the_mirror_of_a_lower_bound():
    scored = scored_rows(np.random.default_rng(0))
    lower, _ = solved(scored, [Constraint("harmless", ">=", margin=0.3)])
    upper, _ = solved(flipped(scored), [Constraint("harm", "<=", margin=-0.3)])
    low, up = lower["constraints"][0], upper["constraints"][0]
    assert low["multiplier"] > 0
    assert up["multiplier"] == pytest.approx(low["multiplier"], rel=1e-12)
    for key in ("threshold", "reference", "predicted"):
        assert up[key] == pytest.approx(-low[key], abs=1e-12)
    assert up["predicted_ci95"] == pytest.approx([-low["predicted_ci95"][1], -low["predicted_ci95"][0]], abs=1e-12)
    assert up["slack"] == pytest.approx(low["slack"], abs=1e-12)
    low_rows, up_rows = (
        replace(rows, score_names=(name,)) for rows, name in ((scored, "harmless"), (flipped(scored), "harm"))
    )
    weights = tilted_weights(low_rows, Solution.from_document(lower))
    np.testing.assert_allclose(tilted_weights(up_rows, Solution.from_document(upper)), weights, rtol=1e-12)
    assert np.bincount(scored.prompt_n, weights) == pytest.approx(1)


def test_the_content_is_json_and_holds_what_others_rely_on():
    rng = np.random.default_rng(1)
    constraints = [Constraint("a", ">=", margin=0.1), Constraint("b", "<=", threshold=0.5)]
    dual, _ = solved(scored_rows(rng, n_constraints=2), constraints, heldout=scored_rows(rng, 30, n_constraints=2))
    json.dumps(dual, allow_nan=False)
    assert {"schema_version", "status", "beta", "n_prompts", "n_samples", "dual_value", "primal_value"} <= dual.keys()
    assert {
        "duality_gap",
        "kkt_residual",
        "n_evaluations",
        "reward",
        "kl",
        "constraints",
        "diagnostics",
    } <= dual.keys()
    assert dual["kkt_residual"] <= 1e-8
    assert abs(dual["duality_gap"]) <= 1e-8
    expected = {"name", "direction", "threshold", "margin", "reference", "multiplier", "multiplier_ci95"}
    for entry in dual["constraints"]:
        assert expected | {"predicted", "predicted_ci95", "heldout", "slack"} <= entry.keys()
        assert entry["slack"] >= -1e-9
        low, high = entry["predicted_ci95"]
        assert low <= entry["predicted"] <= high
    assert Solution.from_document(json.loads(json.dumps(dual))).bounds == tuple(constraints)


def test_a_margin_is_over_the_grand_mean_of_prompts_not_of_rows():
    """Prompts with more responses must not count more."""
    scored = JoinedScores(
        prompt_ids=("a", "b"),
        prompt_n=np.array([0] * 2 + [1] * 6),
        sample_index_n=np.arange(8),
        cut_off_n=np.zeros(8, dtype=bool),
        reward_n=np.zeros(8),
        score_names=("g",),
        scores_ns=np.array([0.0, 2.0] + [4.0, 6.0] * 3)[:, None],
    )
    problem = build_problem(scored, constraints=[Constraint("g", ">=", margin=0.5)], beta=1.0)
    assert problem.thresholds_m == pytest.approx([(1 + 5) / 2 + 0.5])


def test_an_infeasible_margin_says_what_is_feasible_in_the_users_direction():
    scored = scored_rows(np.random.default_rng(2))
    per_prompt_best = scored.scores_ns.reshape(80, 40).max(axis=1).mean()
    best_margin = per_prompt_best - scored.scores_ns.mean()
    for sign, direction in ((1, ">="), (-1, "<=")):
        rows = scored if sign > 0 else flipped(scored)
        with pytest.raises(InfeasibleError) as caught:
            solved(rows, [Constraint("g", direction, margin=sign * 50.0)])
        assert caught.value.exit_code == 3
        assert f"g {direction}" in str(caught.value)
        assert f"(margin {sign * best_margin:.4g})" in str(caught.value)
    with pytest.raises(InfeasibleError):
        solved(scored, [Constraint("g", ">=", margin=best_margin * 1.001)])
    solved(scored, [Constraint("g", ">=", margin=best_margin * 0.99)])


def test_the_frontier_holds_the_runs_own_point():
    scored = scored_rows(np.random.default_rng(3), n_constraints=2)
    constraints = [Constraint("a", ">=", margin=0.2), Constraint("b", "<=", margin=-0.1)]
    dual, problem = solved(scored, constraints)
    frontier = sweep_constraints(problem, n_points=11).to_pandas()
    assert list(frontier["constraint"].unique()) == ["a", "b"]
    for entry in dual["constraints"]:
        rows = frontier[
            (frontier["constraint"] == entry["name"]) & np.isclose(frontier["threshold"], entry["threshold"])
        ]
        assert len(rows) == 1
        assert rows["reward"].item() == pytest.approx(dual["reward"]["predicted"], abs=1e-8)
        assert rows[f"multiplier_{entry['name']}"].item() == pytest.approx(entry["multiplier"], abs=1e-7)
        assert rows["margin"].item() == pytest.approx(entry["margin"], abs=1e-12)
    certified = frontier[frontier["feasible"]]
    assert len(certified) > 10
    assert (certified["kkt_residual"] <= 1e-8).all()


def test_the_corrected_multipliers_become_the_certified_answer():
    scored = scored_rows(np.random.default_rng(5), 200, n_responses=32)
    constraints = [Constraint("harmless", ">=", margin=0.3)]
    plain, _ = solved(scored, constraints)
    found, problem = solved(scored, constraints, corrects=True)
    (before,), (after,) = plain["constraints"], found["constraints"]
    assert after["multiplier"] < before["multiplier"]
    assert after["multiplier"] == pytest.approx(before["multiplier_corrected"], abs=1e-9)
    assert after["multiplier"] == pytest.approx(after["multiplier_corrected"], abs=1e-9)
    assert found["kkt_residual"] <= 1e-8
    # Asked for less on the samples, for the same demand.
    assert after["demanded"] == before["demanded"]
    assert after["safeguard"]["response_bias"] == pytest.approx(after["threshold"] - before["threshold"], abs=1e-12)
    assert after["safeguard"]["response_bias"] < 0
    assert after["predicted"] == pytest.approx(after["threshold"], abs=1e-8)
    # The interval of lambda* is that of the demand, and of the mean around what the policy is expected to have.
    assert after["multiplier_ci95"] == before["multiplier_ci95"]
    assert np.mean(after["predicted_ci95"]) == pytest.approx(before["threshold"], abs=0.03)
    weights = tilted_weights(of(constraints, scored), Solution.from_document(found))
    np.testing.assert_allclose(weights, problem.problem.tilted_weights([after["multiplier"]]), rtol=1e-12)


def test_a_refused_correction_leaves_lambda_and_says_so():
    scored = scored_rows(np.random.default_rng(5), 60, n_responses=6)
    constraints = [Constraint("harmless", ">=", margin=0.3)]
    plain, _ = solved(scored, constraints)
    found, _ = solved(scored, constraints, corrects=True)
    assert found["constraints"] == plain["constraints"]
    (added,) = [text for text in found["warnings"] if text not in plain["warnings"]]
    assert added.startswith("lambda* is not corrected for finitely many responses: the median prompt has 6 responses")
