"""The reward of online trainers: prompts, and a module with one function r + <lambda*, g - b>."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipeline.contracts.artifacts import read_json
from pipeline.contracts.errors import InputError
from pipeline.contracts.solution import Part as DocumentPart
from pipeline.contracts.solution import Solution, SolvedConstraint
from pipeline.contracts.tables import CONSTRAINT_PREFIX, SCORE_PREFIX
from pipeline.formats.dualign_reward import combine, load_terms
from pipeline.formats.export_format import MESSAGES, ExportFormat, ExportSettings, HandOff, Part, Row
from pipeline.formats.prompt_rows import PromptRows, read_tilted
from pipeline.formats.row_checks import TOLERANCE, check_prompt, each_row

MODULE, TERMS, EXAMPLES = "dualign_reward.py", "reward.json", "examples.json"
_N_EXAMPLES = 8

SCHEMA = pa.schema(
    [
        pa.field("prompt", MESSAGES, nullable=False),
        pa.field("label", pa.string(), nullable=False),
        pa.field("data_source", pa.string(), nullable=False),
        pa.field(
            "reward_model",
            pa.struct([pa.field("style", pa.string()), pa.field("ground_truth", pa.string())]),
            nullable=False,
        ),
        pa.field(
            "extra_info",
            pa.struct([pa.field("prompt_id", pa.string())]),
            nullable=False,
        ),
        pa.field("prompt_id", pa.string(), nullable=False),
    ]
)


class Term(DocumentPart):
    """A constraint in ``reward.json``.

    Attributes:
        name: of the constraint.
        score: name of the raw score that it reads.
        transform: what is done to the score, by ``kind`` (:data:`pipeline.formats.dualign_reward.TRANSFORMS`).
        direction: the user's, for people; the sign is in the coefficient.
        coefficient: the multiplier with the sign of the direction, reward per unit of the transformed score.
        threshold: in the user's own direction, units of the transformed score.
    """

    name: str
    score: str
    transform: dict[str, Any]
    direction: str
    coefficient: float
    threshold: float


class Maximised(DocumentPart):
    """The reward in ``reward.json``.

    Attributes:
        score: name of the raw score that is maximised.
    """

    score: str


class Terms(DocumentPart):
    """The content of ``reward.json``.

    Attributes:
        beta: KL strength, reward per nat.
        reward: what is maximised.
        constraints: the terms that are added.
        end_of_text: the end token, as text that some trainers leave on a response; empty where there is none.
    """

    beta: Annotated[float, Field(gt=0)]
    reward: Maximised
    constraints: Annotated[tuple[Term, ...], Field(strict=False)]
    end_of_text: str


def build_prompts(
    rows: PromptRows,
    settings: ExportSettings,  # noqa: ARG001  # the signature of a format
    rng: np.random.Generator,  # noqa: ARG001  # the signature of a format
) -> Iterator[Row]:
    """The prompt, in columns of which TRL, verl and OpenRLHF each read their own.

    verl and OpenRLHF give a reward function no messages, but a text that belongs to the prompt: it has them as JSON.
    """
    label = json.dumps(list(rows.prompt), ensure_ascii=False)
    yield {
        "prompt": rows.prompt,
        "label": label,
        "data_source": "dualign",
        "reward_model": {"style": "rule", "ground_truth": label},
        "extra_info": {"prompt_id": rows.prompt_id},
        "prompt_id": rows.prompt_id,
    }


def make_terms(solution: Solution, *, end_of_text: str) -> Terms:
    """What ``reward.json`` says of a solution.

    Raises:
        InputError: a constraint is of some prompts alone, which no trainer tells a reward function.
    """
    coefficients = solution.signs_m * solution.multipliers_m
    return Terms(
        beta=solution.beta,
        reward=Maximised(score=solution.reward.name),
        constraints=tuple(
            Term(
                name=one.name,
                score=one.score,
                transform=_transform(one),
                direction=one.direction,
                coefficient=float(coefficient),
                threshold=one.column_threshold,
            )
            for one, coefficient in zip(solution.constraints, coefficients, strict=True)
        ),
        end_of_text=end_of_text,
    )


def _transform(one: SolvedConstraint) -> dict[str, Any]:
    """What is done to the score of a constraint, as ``dualign_reward.py`` does it."""
    stated = one.stated
    if stated.where:
        raise InputError(
            f"`rl-reward` cannot say the constraint {one.name!r}: it is of some prompts alone, and online trainers "
            "tell a reward function no column of the prompts; train on `weighted-sft` or preference pairs"
        )
    if stated.per is not None:
        return {"kind": "ratio", "per": stated.per, "ratio": one.column_ratio}
    if stated.kind == "mean":
        return {"kind": "identity"}
    extra = {} if stated.kind != "cvar" else {"at": one.certified_at}
    return stated.to_document() | extra


def make_module(source: HandOff) -> Mapping[str, bytes]:
    """The module, its numbers, and examples of what it gives.

    Raises:
        InputError: the module does not give what the dual was solved with, on a row of the hand-off table.
    """
    terms = make_terms(source.solution, end_of_text=source.end_of_text)
    document = terms.model_dump(mode="json")
    examples = []
    table = read_tilted(source.tilted, source.solution, split="train")
    if table is not None:
        rows = raw_scores(table, terms)
        expected_n = source.solution.tilt(table)
        for scores, expected in zip(rows, expected_n, strict=True):
            total = combine(scores, document)
            if not abs(total - expected) <= TOLERANCE * max(1.0, *(abs(value) for value in scores.values())):
                raise InputError(
                    f"`rl-reward` cannot be written: for the scores {scores} it would give {total:.12g}, and the dual "
                    f"was solved with {expected:.12g}; a constraint is on something else than the mean of its score"
                )
        examples = [
            {"scores": scores, "reward": float(value)}
            for scores, value in zip(rows[:_N_EXAMPLES], expected_n, strict=False)
        ]
    source_code = (Path(__file__).parent / MODULE).read_bytes()
    return {
        MODULE: source_code,
        TERMS: (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode(),
        EXAMPLES: (json.dumps(examples, indent=2, ensure_ascii=False) + "\n").encode(),
    }


def raw_scores(table: pa.Table, terms: Terms) -> list[dict[str, float]]:
    """The raw scores of the rows of the hand-off table, by the names of ``reward.json``.

    A raw score has a column of its own, ``score_<name>``, where no constraint's column is the score itself.
    """
    columns = {terms.reward.score: "reward"}
    for term in terms.constraints:
        for score in filter(None, (term.score, term.transform.get("per"))):
            if score != terms.reward.score:
                raw = SCORE_PREFIX + score
                columns[score] = raw if raw in table.column_names else CONSTRAINT_PREFIX + score
    values = {name: table[column].to_pylist() for name, column in columns.items()}
    return [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]


def check_module(folder: Path, solution: Solution) -> Iterator[str]:
    """The numbers of ``reward.json`` against the solution, and the examples against both; the module is not run."""
    terms = Terms.from_document(read_json(folder / TERMS), source=folder / TERMS)
    expected = make_terms(solution, end_of_text=terms.end_of_text)
    if terms.beta != expected.beta:
        yield f"{folder / TERMS}: beta is {terms.beta:.12g}, and {expected.beta:.12g} in dual.json"
    found = {term.name: term for term in terms.constraints}
    if tuple(found) != solution.names:
        yield f"{folder / TERMS} has the constraints {list(found)}, and dual.json {list(solution.names)}"
        return
    document = load_terms(folder)
    for wanted in expected.constraints:
        term = found[wanted.name]
        if term.transform != wanted.transform:
            yield f"{folder / TERMS}: what is done to the score of {term.name} is not what dual.json says"
            return
        for name in ("coefficient", "threshold"):
            if getattr(term, name) != getattr(wanted, name):
                yield (
                    f"{folder / TERMS}: the {name} of {term.name} is {getattr(term, name):.12g}, and dual.json gives "
                    f"{getattr(wanted, name):.12g}"
                )
    for place, example in enumerate(read_json(folder / EXAMPLES)):
        total = combine(example["scores"], document)
        if not abs(total - example["reward"]) <= TOLERANCE * max(1.0, abs(example["reward"])):
            yield f"{folder / EXAMPLES}: example {place} says {example['reward']:.12g}; {TERMS} gives {total:.12g}"


def _check(row: Row) -> Iterator[str]:
    yield from check_prompt(row, row["prompt"])
    if json.loads(row["label"]) != row["prompt"] or row["reward_model"]["ground_truth"] != row["label"]:
        yield "has a label that is not its prompt"


FORMAT = ExportFormat(
    name="rl-reward",
    parts=(Part(build_prompts, SCHEMA, each_row(_check)),),
    drawn_by=(),
    optimum="The rows are prompts. `dualign_reward.py` gives a response the reward r + <λ*, g − b>, from the raw "
    "scores of a function that you write (`scorers.py`, as the module says at its top) and the numbers of "
    "`reward.json`. "
    "Maximising its mean minus β times the KL divergence to the reference, with the β of `reward.json` and nothing "
    "scaled, has the tilted policy as its optimum: the one whose constraints are met. `examples.json` has scores with "
    "the rewards that they must give.",
    prefilled="It is in the prompts as a trainer renders them, and responses are sampled after it, as they were.",
    beside=make_module,
    check=check_module,
)
