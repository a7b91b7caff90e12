"""The looks of ``sampling.until``: is what is drawn and scored enough, and if not, how much more is drawn?"""

from __future__ import annotations

from typing import Any

import numpy as np

from pipeline.contracts.artifacts import read_manifest
from pipeline.dual.piloting import measure_pilot, pose_pilot
from pipeline.run.looks import read_looks, write_looks
from pipeline.run.run import Run
from pipeline.run.step import log
from pipeline.steps.solve import solve_scores
from stage1_dual.dual import LIMITS, InfeasibleError, KlBudgetError, SizeRequest, TooFewRowsError, top_up

_VERDICTS = ("ok", "weak", "unreliable")
_NOTHING: dict[str, Any] = {"verdict": None, "miss": None, "reach": None, "kl": None}
_OF_RESPONSES = ("ess_fraction_below_2", "kl_share", "pareto_k_fraction", "drift")
"""Signs of distrust that more responses a prompt mend; the others are of prompts."""


def look(run: Run) -> bool:
    """Look at what is drawn and scored, and record it; True where more is to be drawn.

    A look is a function of the scores and of what is asked: one that was recorded is not taken again.

    Args:
        run: at the size that is drawn.
    """
    until = run.config.sampling.until
    assert until is not None  # the caller's question
    question = _question(run)
    looks = read_looks(run)
    if not looks or looks[-1]["question"] != question:
        looks.append(_take(run, question, number=len(looks) + 1))
        write_looks(run, looks)
        _tell(looks[-1])
    last = looks[-1]
    return bool(last["next"] != last["drawn"])


def _question(run: Run) -> dict[str, Any]:
    """What decides a look: the demand, the criterion, and the scores by their manifests."""
    config = run.config
    until = config.sampling.until
    assert until is not None
    folders = {"samples": run.samples, **{f"scores/{name}": run.scores / name for name in config.needed_scores()}}
    return {
        "until": until.model_dump(mode="json"),
        "drawn": _drawn(run),
        "beta": config.model_dump(mode="json", include={"beta"})["beta"],
        "constraints": {name: bound.model_dump(mode="json") for name, bound in config.constraints.items()},
        "solve": config.solve.model_dump(mode="json"),
        "reward": config.reward,
        "inputs": {name: read_manifest(folder).identity for name, folder in folders.items()},
    }


def _take(run: Run, question: dict[str, Any], *, number: int) -> dict[str, Any]:
    config = run.config
    until = config.sampling.until
    assert until is not None
    drawn = _drawn(run)
    found: dict[str, Any] = {"number": number, "question": question, "drawn": drawn}
    left_out = read_manifest(run.prompts).counts.get("left_out", 0)
    n_prompts = read_manifest(run.prompts).counts["train"]
    most_prompts = until.most_prompts if until.most_prompts is not None and left_out else n_prompts
    try:
        pilot = measure_pilot(pose_pilot(run))
        trust = solve_scores(run, n_replicates=100).content["trust"]
    except (InfeasibleError, KlBudgetError, TooFewRowsError) as error:
        # More responses reach further: that they do not suffice is a reason for more, as long as there may be more.
        too_few = isinstance(error, TooFewRowsError)
        wrong = "nothing can be told of what is drawn" if too_few else "the demand is out of reach of what is drawn"
        more_prompts = min(2 * n_prompts, max(most_prompts, n_prompts)) if too_few else n_prompts
        larger = (more_prompts, min(2 * drawn["responses"], until.at_most))
        return found | _outcome(run, larger, n_prompts, [f"{wrong}: {str(error).splitlines()[0]}"]) | _NOTHING
    request = SizeRequest(
        within_m=np.full(len(pilot.names), until.within),
        confidence=until.confidence,
        evaluation_responses=None,
        room_m=np.full(len(pilot.names), 2 * until.within),
        most_prompts=max(most_prompts, n_prompts),
        most_responses=until.at_most,
        drawn_prompts=n_prompts,
        drawn_responses=drawn["responses"],
    )
    prediction = pilot.predict(drawn["responses"])
    miss = prediction.miss(n_prompts, request.within_m)
    reach = prediction.reach(n_prompts, request.within_m, confidence=until.confidence)
    # What is foretold of so few responses is beyond what is known of it: no number, and not within.
    carrying = pilot.carrying_responses()
    is_foretold = drawn["responses"] >= carrying
    is_within = is_foretold and miss <= 1 - until.confidence
    is_trusted = until.verdict is None or _VERDICTS.index(trust["verdict"]) <= _VERDICTS.index(until.verdict)
    reasons = []
    sizes: tuple[int, int] | None = None
    if not is_foretold:
        reasons.append(
            f"how near slacks are to the demand cannot be told from {drawn['responses']:,} responses a prompt: the KL "
            f"of {pilot.kl:.2f} nats needs at least {carrying:,}"
        )
    elif not is_within:
        reasons.append(
            f"slacks are within {until.within * reach:.3g} of the demand at the confidence asked for, and "
            f"{until.within:g} is allowed"
        )
    if not is_within:
        sizes = top_up(pilot, request)
    if not is_trusted:
        reasons += [f"trust in lambda* is {trust['verdict']}", *trust["reasons"]]
        more = (
            (n_prompts, min(2 * drawn["responses"], until.at_most))
            if _wants_responses(trust)
            else (min(2 * n_prompts, request.most_prompts or n_prompts), drawn["responses"])
        )
        sizes = more if sizes is None else (max(sizes[0], more[0]), max(sizes[1], more[1]))
    foretold = {"miss": miss, "reach": reach * until.within} if is_foretold else {"miss": None, "reach": None}
    figures = {"verdict": trust["verdict"], **foretold, "kl": pilot.kl}
    return found | _outcome(run, sizes, n_prompts, reasons) | figures


def _drawn(run: Run) -> dict[str, Any]:
    """Responses a prompt, and the prompts of a split at most."""
    return {"responses": run.config.sampling.samples_per_prompt, "limit": run.config.prompts.limit}


def _wants_responses(trust: dict[str, Any]) -> bool:
    """Whether more responses would mend the verdict: of more prompts, there may be no more.

    A sign that is infinite is null in the document, as one that is unknown is; the former alone has a reason.
    """
    beyond = [name for name, value in trust["signs"].items() if value is not None and value > LIMITS[name][0]]
    return not set(_OF_RESPONSES).isdisjoint(beyond) or len(trust["reasons"]) > len(beyond)


def _outcome(run: Run, sizes: tuple[int, int] | None, n_prompts: int, reasons: list[str]) -> dict[str, Any]:
    """What comes next: the same sizes where it holds or the limits are reached."""
    now = _drawn(run)
    following = dict(now)
    if reasons and sizes is not None:
        following["responses"] = max(sizes[1], now["responses"])
        if sizes[0] > n_prompts:
            following["limit"] = sizes[0]
    outcome = "holds" if not reasons else "more" if following != now else "limit"
    return {"prompts": n_prompts, "next": following, "outcome": outcome, "reasons": reasons}


def _tell(one: dict[str, Any]) -> None:
    size = f"{one['prompts']:,} train prompts x {one['drawn']['responses']:,} responses"
    if one["outcome"] == "holds":
        log.info("until: look %d, %s: it holds", one["number"], size)
        return
    for reason in one["reasons"]:
        log.info("until: look %d, %s: %s", one["number"], size, reason)
    if one["outcome"] == "limit":
        log.warning("until: the limits are reached, and `sampling.until` does not hold")
        return
    limit = one["next"]["limit"]
    more = f"{one['next']['responses']:,} responses" + (f", {limit:,} prompts a split" if limit is not None else "")
    log.info("until: going on to %s", more)
