"""Are two demands met at once? Harmlessness and humour over a grid of margins, and what each error is made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.baselines import figures, policies
from pipeline.baselines.outcomes import Outcome, read_outcome
from pipeline.baselines.results import Result, Rows, methods
from pipeline.baselines.study import Study
from pipeline.contracts.errors import InputError
from stage1_dual.dual import InfeasibleError

SCORES = ("harmless", "humour")


def two_constraints(study: Study) -> Result:
    """Harmlessness and humour demanded together, over a grid of margins and seeds; multi-shot at one of the first's.

    Raises:
        InputError: no pair of demands can be met.
    """
    rows: Rows = []
    refused: list[str] = []
    for seed in study.seeds:
        base = study.wider_base(seed)
        for pair in study.pairs:
            try:
                run = study.train(base, policies.two_constraints(*pair))
            except (InfeasibleError, InputError) as error:  # a small world may not have room for what is assured
                refused.append(f"{pair}, seed {seed}: {' '.join(str(error).splitlines()[0].split())}")
            else:
                rows.append(_row(read_outcome(base, run), seed, pair, policies.ONE_SHOT))
    if not rows:
        raise InputError(f"experiment two_constraints: none of its demands can be met; {'; '.join(refused)}")
    first = study.seeds[0]
    base, pair = study.wider_base(first), study.middle_pair
    if (first, *pair) in {_question(row) for row in rows}:
        run = study.iterate(base, policies.two_constraints(*pair))
        rows.append(_row(read_outcome(base, run), first, pair, policies.MULTI_SHOT))
    table = pa.Table.from_pylist(rows)
    return Result(
        "two_constraints",
        "Two constraints at once: harmlessness and humour",
        table,
        figures.two_constraints_figure(table),
        [*_findings(rows), *refused],
        pa.Table.from_pylist(
            [
                summarise([row for row in rows if row["method"] == method], method, name)
                for method in methods(rows)
                for name in SCORES
            ]
        ),
    )


def _row(outcome: Outcome, seed: int, demanded: Sequence[float], method: str) -> dict[str, Any]:
    row: dict[str, Any] = {"method": method, "seed": seed}
    judged = {entry["name"]: entry for entry in outcome.evaluation["constraints"]}
    asked = {one.name: one.safeguard.assurance for one in outcome.solution.constraints}
    solved = {entry["name"]: entry for entry in outcome.dual["constraints"]}
    for margin, name in zip(demanded, SCORES, strict=True):
        bound, score = judged[name], outcome.score(name)
        row |= {
            f"{name}_demanded": margin,
            f"{name}_lambda": outcome.multipliers[name],
            # The dual of a later iterate is asked for other thresholds than are demanded.
            f"{name}_assurance": asked[name] if method == policies.ONE_SHOT else None,
            f"{name}_promised": solved[name]["predicted"] - solved[name]["reference"] + outcome.understated(name),
            f"{name}_predicted": bound["predicted"] - bound["reference"] + outcome.understated(name),
            f"{name}_understated": outcome.understated(name),
            f"{name}_realised": score.improvement,
            f"{name}_ci95_low": score.ci95[0],
            f"{name}_ci95_high": score.ci95[1],
            f"{name}_sd": score.sd,
            f"{name}_status": bound["status"],
        }
    reward = outcome.evaluation["reward"]
    return {
        **row,
        "helpful_predicted": reward["predicted"] - reward["reference"],
        "helpful_realised": reward["improvement"],
        "kl": outcome.evaluation["kl"]["realised"],
        "closed_fraction": outcome.evaluation["lagrangian"]["closed_fraction"],
        "run": outcome.run.name,
    }


def summarise(rows: Rows, method: str, name: str) -> dict[str, Any]:
    """How well the demands on one score are met by the policies of a method, in standard deviations of the score.

    Realised less demanded is what was asked for on top (`assurance`), by how much lambda*, corrected for finitely many
    responses, is foreseen to miss that on the train prompts (`correction`), what the test prompts promise beyond them
    (`prompts`), and what training made of it (`training`). A demand that another one overfulfils is met with room to
    spare, so that errors are over those that bind.
    """
    binding = [row for row in rows if row[f"{name}_lambda"] > 0]
    column = {
        key: np.array([row[f"{name}_{key}"] for row in binding], dtype=float)
        for key in (
            *("demanded", "assurance", "promised", "predicted", "understated", "realised"),
            *("ci95_low", "ci95_high", "sd"),
        )
    }
    sd = column["sd"]
    to_demanded, to_predicted = ((column["realised"] - column[key]) / sd for key in ("demanded", "predicted"))
    half = (column["ci95_high"] - column["ci95_low"]) / 2

    def mean(value_n: np.ndarray) -> float | None:
        return float(np.mean(value_n)) if binding and not np.isnan(value_n).any() else None

    return {
        "method": method,
        "score": name,
        "demands": len(rows),
        "not violated": sum(row[f"{name}_status"] != "violated" for row in rows),
        "satisfied": sum(row[f"{name}_status"] == "satisfied" for row in rows),
        "binding": len(binding),
        "|realised less demanded| (sd)": mean(np.abs(to_demanded)),
        "realised less demanded (sd)": mean(to_demanded),
        "|realised less predicted| (sd)": mean(np.abs(to_predicted)),
        "assurance (sd)": mean(column["assurance"] / sd),
        "correction (sd)": mean((column["promised"] - column["assurance"] - column["demanded"]) / sd),
        "prompts (sd)": mean((column["predicted"] - column["promised"]) / sd),
        "training (sd)": mean(to_predicted),
        "responses (sd)": mean(column["understated"] / sd),
        # Of a normal error with the standard error of the evaluation, the mean absolute value is sqrt(2 / pi) of it.
        "noise (sd)": mean(np.sqrt(2 / np.pi) * half / 1.96 / sd),
    }


def _findings(rows: Rows) -> Iterator[str]:
    one_shot, multi_shot = ([row for row in rows if row["method"] == method] for method in _METHODS)
    beside = [row for row in one_shot if any(_question(row) == _question(other) for other in multi_shot)]
    yield f"one-shot: {_kept(one_shot)}"
    for name in SCORES:
        one = summarise(one_shot, policies.ONE_SHOT, name)
        yield f"one-shot, {name}: {_errors(one)}" + (f". {_split(one)}" if one["binding"] else "")
    for method, some in ((policies.MULTI_SHOT, multi_shot), (policies.ONE_SHOT, beside)) if beside else ():
        found = "; ".join(f"{name} {_errors(summarise(some, method, name))}" for name in SCORES)
        yield f"{method}, one pair of seed {some[0]['seed']}: {_kept(some)}; {found}"


_METHODS = (policies.ONE_SHOT, policies.MULTI_SHOT)


def _question(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return (row["seed"], *(row[f"{name}_demanded"] for name in SCORES))


def _kept(rows: Rows) -> str:
    def kept(status_is: Any) -> int:
        return sum(all(status_is(row[f"{name}_status"]) for name in SCORES) for row in rows)

    return (
        f"{kept(lambda status: status != 'violated')} of {len(rows)} policies violate neither demand, "
        f"{kept(lambda status: status == 'satisfied')} satisfy both"
    )


def _errors(one: Mapping[str, Any]) -> str:
    if not one["binding"]:
        return f"none of the {one['demands']} demands binds"
    return (
        f"mean absolute error {one['|realised less demanded| (sd)']:.3f} standard deviations to the demand (bias "
        f"{one['realised less demanded (sd)']:+.3f}) and {one['|realised less predicted| (sd)']:.3f} to the "
        f"prediction on the test prompts (bias {one['training (sd)']:+.3f}), over the {one['binding']} of "
        f"{one['demands']} demands that bind"
    )


def _split(one: Mapping[str, Any]) -> str:
    return (
        f"Of the bias {one['assurance (sd)']:+.3f} was asked for on top, {one['correction (sd)']:+.3f} is by how much "
        "lambda*, corrected for finitely many responses, is foreseen to miss that on the train prompts, "
        f"{one['prompts (sd)']:+.3f} is what the test prompts promise beyond these, {one['training (sd)']:+.3f} is "
        f"training. Those responses understate what lambda* gives by {one['responses (sd)']:.3f}; "
        f"{one['noise (sd)']:.3f} would be the error of a policy that meets its demand exactly"
    )
