"""The options of ``dualign plan`` that a run and a table share, and the question they ask."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from pipeline.contracts.errors import InputError
from pipeline.planning.sample_plan import PlanQuestion

_COUNTS = {
    "responses": "plan for so many responses a prompt, and find the prompts",
    "prompts": "plan for so many prompts, and find the responses",
    "most-prompts": "prompts there are",
    "most-responses": "responses a prompt at most",
    "evaluation-responses": "responses a prompt of the final evaluation (default: a recipe's; of a table the plan's)",
}


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    """Add them to a parser."""
    parser.add_argument(
        "--within",
        action="append",
        default=[],
        metavar="NUMBER",
        help="how far a constraint may end from its demand, in its own units; NAME=NUMBER for one of several",
    )
    parser.add_argument(
        "--confidence", type=float, default=0.95, help="probability that all of them are within (default: 0.95)"
    )
    for name, meaning in _COUNTS.items():
        parser.add_argument(f"--{name}", type=int, metavar="N", help=meaning)


def read_question(options: argparse.Namespace, *, evaluation_responses: int | None) -> PlanQuestion:
    """The question that the options ask.

    Args:
        options: of :func:`add_plan_options`.
        evaluation_responses: of the recipe, where the options do not say.

    Raises:
        InputError: a number cannot be what it is for.
    """
    asked = options.evaluation_responses
    return PlanQuestion(
        within=_read_within(options.within),
        confidence=options.confidence,
        evaluation_responses=evaluation_responses if asked is None else asked,
        responses=options.responses,
        prompts=options.prompts,
        most_prompts=options.most_prompts,
        most_responses=options.most_responses,
    )


def _read_within(texts: Sequence[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for text in texts:
        name, _, number = text.rpartition("=")  # a name may hold the sign itself
        if name in found:
            raise InputError(f"`--within` is given twice{f' for {name!r}' if name else ', without a name'}")
        try:
            found[name] = float(number)
        except ValueError:
            raise InputError(f"--within {text!r}: it must be NUMBER or NAME=NUMBER") from None
    return found
