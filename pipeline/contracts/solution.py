"""What stage 1 hands on: beta, the constraints that were solved and their multipliers lambda*, as in ``dual.json``.

Everything is in the user's own direction and units; how a direction becomes a sign is said in
:mod:`pipeline.contracts.problem`. Whoever needs beta, a multiplier or a threshold of a run takes them from a
:class:`Solution`, and ``dual.json`` is written and read here: what else the file says about a solution (intervals,
ladder, trust) stands beside these keys, for those who show it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.contracts.artifacts import read_json, shown
from pipeline.contracts.errors import CorruptArtifactError
from pipeline.contracts.problem import Constraint, Direction, constraint_signs
from pipeline.contracts.tables import CONSTRAINT_PREFIX, SCHEMA_VERSION

Name = Annotated[str, Field(min_length=1)]


class Part(BaseModel):
    """A part of ``dual.json``: keys that it does not name belong to others."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", allow_inf_nan=False)

    @classmethod
    def from_document(cls, document: Any, *, source: Path | str = "dual.json") -> Self:
        """Read it from the content of a file.

        Args:
            document: the content.
            source: the file, for the message.

        Raises:
            CorruptArtifactError: a key is missing or of the wrong type, or its value cannot be; names file, key, value
                and rule, for all that is wrong.
        """
        try:
            return cls.model_validate(document)
        except ValidationError as error:
            faults = "; ".join(_describe(fault) for fault in error.errors())
            raise CorruptArtifactError(f"{source} is damaged: {faults}") from None


class Demanded(Part):
    """A constraint as the user asked for it; the evaluation judges this.

    Attributes:
        threshold: absolute, score units.
        margin: over the mean under the reference policy, score units, or None for an absolute threshold.
    """

    threshold: float
    margin: float | None


class AppliedSafeguard(Part):
    """What was asked for beyond the demand, score units; positive is harder to meet, in either direction.

    Attributes:
        reserve: for what a fine-tuned policy falls short by.
        assurance: for the error of the evaluation.
        assurance_level: probability that was asked for, or None.
        score_error: for the error of the scorer.
        response_bias: what finitely many responses understate the policy by, negative.
        score_noise: for the noise of the scorer; the means that are predicted lie so much above what is expected.
        score_noise_sigma: its standard deviation, score units.
    """

    reserve: float
    assurance: float
    assurance_level: float | None
    score_error: float
    response_bias: float
    score_noise: float = 0.0
    score_noise_sigma: float = 0.0


class SolvedConstraint(Part):
    """One constraint with its multiplier.

    The order of the fields is that of the keys in ``dual.json``.

    Attributes:
        name: the score it bounds.
        direction: ``">="`` or ``"<="``.
        threshold: absolute threshold that was solved under, the safeguards included, score units.
        margin: likewise over ``reference``, or None where the user gave an absolute threshold.
        demanded: without the safeguards.
        safeguard: their parts.
        reference: mean score under the reference policy, train prompts.
        multiplier: lambda*, reward per score unit, not negative whatever the direction.
    """

    name: Name
    direction: Direction
    threshold: float
    margin: float | None
    demanded: Demanded
    safeguard: AppliedSafeguard
    reference: float
    multiplier: Annotated[float, Field(ge=0)]

    @property
    def bound(self) -> Constraint:
        """What was solved under."""
        if self.margin is not None:
            return Constraint(self.name, self.direction, margin=self.margin)
        return Constraint(self.name, self.direction, threshold=self.threshold)


class SolvedReward(Part):
    """What was maximised.

    Attributes:
        name: the score.
    """

    name: Name


class Solution(Part):
    """The solution of a dual.

    Attributes:
        schema_version: of the file.
        beta: KL strength, reward per nat.
        n_prompts: train prompts that took part.
        n_samples: their responses.
        reward: what was maximised.
        constraints: the m constraints, in the order of the multipliers.
    """

    schema_version: Literal["1"] = SCHEMA_VERSION
    beta: Annotated[float, Field(gt=0)]
    n_prompts: Annotated[int, Field(ge=1)]
    n_samples: Annotated[int, Field(ge=1)]
    reward: SolvedReward
    constraints: Annotated[tuple[SolvedConstraint, ...], Field(strict=False)]

    @model_validator(mode="after")
    def _names_are_distinct(self) -> Self:
        if not self.constraints:
            raise ValueError("`constraints` is empty; a dual has at least one")
        repeated = sorted({name for name in self.names if self.names.count(name) > 1})
        if repeated:
            raise ValueError(f"`constraints` has {repeated[0]!r} twice; each bounds a score of its own")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """Of the constraints."""
        return tuple(one.name for one in self.constraints)

    @property
    def bounds(self) -> tuple[Constraint, ...]:
        """The constraints that were solved under, safeguards included."""
        return tuple(one.bound for one in self.constraints)

    @property
    def multipliers_m(self) -> np.ndarray:
        """lambda*, reward per score unit, shape (m,), float64."""
        return np.array([one.multiplier for one in self.constraints], dtype=np.float64)

    @property
    def signs_m(self) -> np.ndarray:
        """Of the constraints, shape (m,); see :func:`~pipeline.contracts.problem.constraint_signs`."""
        return constraint_signs(self.constraints)

    @property
    def turned_thresholds_m(self) -> np.ndarray:
        """Thresholds b of the turned scores, safeguards included, score units, shape (m,)."""
        return np.asarray(self.signs_m * np.array([one.threshold for one in self.constraints]))

    def tilt(self, rows: pa.Table) -> np.ndarray:
        """R + <lambda*, g - b> of each row, reward units, float64, shape (n,); over beta it is a score in nats.

        Args:
            rows: of the hand-off table: ``reward`` and ``constraint_<name>``, in the user's own direction and units.
        """
        tilt_n = np.asarray(rows["reward"].to_numpy(), dtype=np.float64)
        for one, sign in zip(self.constraints, self.signs_m, strict=True):
            score_n = rows[CONSTRAINT_PREFIX + one.name].to_numpy()
            tilt_n = tilt_n + one.multiplier * sign * (score_n - one.threshold)
        return tilt_n

    def to_document(self, statistics: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
        """The content of ``dual.json``.

        Args:
            statistics: what else is known of the solution, laid out as the file is and in its order; what it has of
                ``reward`` and of each of the ``constraints`` is put after the keys that are written here.
        """
        about = statistics.get("constraints") or [{} for _ in self.constraints]
        document = {
            "schema_version": self.schema_version,
            "status": "certified",
            "beta": self.beta,
            "n_prompts": self.n_prompts,
            "n_samples": self.n_samples,
            **statistics,
        }
        document["reward"] = {**self.reward.model_dump(), **statistics.get("reward", {})}
        document["constraints"] = [
            {**one.model_dump(), **more} for one, more in zip(self.constraints, about, strict=True)
        ]
        return document


def read_solution(path: Path) -> Solution:
    """The solution in a ``dual.json``.

    Raises:
        CorruptArtifactError: the file is missing or damaged, as :meth:`Solution.from_document` finds it.
    """
    return Solution.from_document(read_json(path), source=path)


_RULES = {
    "model_type": "it must be an object",
    "tuple_type": "it must be a list",
    "string_too_short": "it must not be empty",
    "int_type": "it must be a whole number",
}


def _describe(fault: Any) -> str:
    """A fault that pydantic found: key, value, rule."""
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in fault["loc"]).removeprefix(".")
    if fault["type"] == "missing":
        return f"`{place}` is missing"
    if fault["type"] == "value_error":  # of this module, and says where
        return str(fault["ctx"]["error"])
    value = fault["input"]
    text = type(value).__name__ if isinstance(value, dict | list) else shown(repr(value))
    rule = _RULES.get(fault["type"]) or fault["msg"].replace("Input should be a valid", "it must be a")
    return f"{f'`{place}`' if place else 'the content'} is {text}; {rule.replace('Input should be', 'it must be')}"
