from __future__ import annotations

from pathlib import Path

from helpers.scorers import check_faults, scorer_groups, settings_faults, values_of

KIND = "safe_rlhf_score"


def test_a_cost_is_turned_and_heads_share_a_pass(score_models: dict[str, str], tmp_path: Path) -> None:
    cost = {"kind": KIND, "model": score_models["cost"]}
    (group,) = scorer_groups(score_models, {"a": cost, "b": {**cost, "sign": -1}, "c": {**cost, "head": 1}}, tmp_path)
    assert (group.names, group.reads, group.uses_device) == (("a", "b", "c"), (), True)
    for cost_0, safety_0, cost_1 in values_of(group.start(device="cpu")):
        assert safety_0 == -cost_0
        assert cost_1 != cost_0


def test_faults(score_models: dict[str, str]) -> None:
    for head in ("x", -1):
        (fault,) = settings_faults(score_models, {"kind": KIND, "model": "m", "head": head})
        assert fault.startswith(f"`scorers.x.head` is {head!r}")
    (fault,) = check_faults(score_models, {"kind": KIND, "model": score_models["cost"], "head": 2})
    assert "has no head 2" in fault
    (fault,) = check_faults(score_models, {"kind": KIND, "model": score_models["heads"]})
    assert "is not a score model of safe-rlhf" in fault
