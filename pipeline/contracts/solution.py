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
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_serializer, model_validator

from pipeline.contracts.arrays import FloatArray
from pipeline.contracts.artifacts import read_json, shown
from pipeline.contracts.errors import CorruptArtifactError, InputError
from pipeline.contracts.problem import Constraint, Direction, constraint_signs
from pipeline.contracts.statistics import Kind, Statistic, StatisticColumns, Tail
from pipeline.contracts.tables import CONSTRAINT_PREFIX, SCHEMA_VERSION, tilted_schema

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
        threshold: absolute, in units of the statistic.
        margin: over the statistic under the reference policy, in its units, or None for an absolute threshold.
        tolerance: of an equality, in units of the statistic, or None.
    """

    threshold: float
    margin: float | None
    tolerance: float | None = None


class StatedStatistic(Part):
    """What a constraint bounds of its score; see :class:`~pipeline.contracts.statistics.Statistic`."""

    kind: Kind = "mean"
    at_least: float | None = None
    at_most: float | None = None
    below: float | None = None
    level: float | None = None
    tail: Tail = "lower"
    per: str | None = None
    where: dict[str, list[str]] = Field(default_factory=dict)

    @model_serializer
    def _only_what_is_set(self) -> dict[str, Any]:
        return self.of("").to_document()

    def of(self, score: str) -> Statistic:
        """The statistic of a score.

        Raises:
            InputError: a setting that the kind does not take or needs, or a value that it cannot have.
        """
        return Statistic(
            score,
            self.kind,
            at_least=self.at_least,
            at_most=self.at_most,
            below=self.below,
            level=self.level,
            tail=self.tail,
            per=self.per,
            where=tuple((column, tuple(values)) for column, values in self.where.items()),
        )


class AppliedSafeguard(Part):
    """What was asked for beyond the demand, units of the statistic; positive is harder to meet, in either direction.

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

    The order of the fields is that of the keys in ``dual.json``. Files of before there were statistics have neither
    ``score`` nor ``statistic`` nor what is said of the column: they bound the mean of the score ``name``.

    Attributes:
        name: of the constraint.
        score: the score whose statistic it bounds.
        statistic: what is bounded of it.
        direction: ``">="``, ``"<="`` or ``"="``.
        threshold: absolute threshold that was solved under, the safeguards included, in units of the statistic.
        margin: likewise over ``reference``, or None where the user gave an absolute threshold.
        demanded: without the safeguards.
        safeguard: their parts.
        reference: the statistic under the reference policy, train prompts.
        certified_at: t of a cvar, score units: the column is that of this t, and what it promises holds of the cvar.
        column_ratio: c where the statistic is a ratio E[u] / E[h]: its column is u - c h; None where h is 1
            everywhere and the column is u.
        column_threshold: what the column's mean must reach: the threshold itself where the column is u.
        multiplier: lambda* of the column, reward per unit of it; not negative, but for an equality.
    """

    name: Name
    score: Name
    statistic: StatedStatistic
    direction: Direction
    threshold: float
    margin: float | None
    demanded: Demanded
    safeguard: AppliedSafeguard
    reference: float
    certified_at: float | None
    column_ratio: float | None
    column_threshold: float
    multiplier: float

    @model_validator(mode="before")
    @classmethod
    def _of_before_there_were_statistics(cls, document: Any) -> Any:
        if not isinstance(document, Mapping) or "statistic" in document:
            return document
        older: dict[str, Any] = {
            "score": document.get("name"),
            "statistic": {},
            "certified_at": None,
            "column_ratio": None,
        }
        if "threshold" in document:
            older["column_threshold"] = document["threshold"]
        return {**older, **document}

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        try:
            self.statistic.of(self.score)
        except InputError as error:
            raise ValueError(f"constraint {self.name!r}: {error}") from None
        if self.multiplier < 0 and self.direction != "=":
            raise ValueError(
                f"`multiplier` of {self.name!r} is {self.multiplier:g}; it must not be negative, but for an equality"
            )
        if self.statistic.kind == "cvar" and self.certified_at is None:
            raise ValueError(f"`certified_at` of {self.name!r} is missing; a cvar has a column at one t alone")
        return self

    @property
    def stated(self) -> Statistic:
        """What it bounds."""
        return self.statistic.of(self.score)

    @property
    def bound(self) -> Constraint:
        """What was solved under."""
        threshold = self.threshold if self.margin is None else None
        return Constraint(self.name, self.direction, threshold=threshold, margin=self.margin, statistic=self.stated)

    @property
    def demand(self) -> Constraint:
        """What the user asked for."""
        asked = self.demanded
        threshold = asked.threshold if asked.margin is None else None
        return Constraint(
            self.name,
            self.direction,
            threshold=threshold,
            margin=asked.margin,
            statistic=self.stated,
            tolerance=asked.tolerance,
        )

    def column(self, columns: StatisticColumns) -> FloatArray:
        """The column that the multiplier multiplies, in the user's own direction, shape (n,).

        Args:
            columns: u and h of the rows.
        """
        return columns.less(self.column_ratio)


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
        beta: KL strength, reward per nat: as given, or as the KL budget made it.
        kl_budget: the largest KL that may be spent, nats a prompt, or None where beta was given.
        n_prompts: train prompts that took part.
        n_samples: their responses.
        reward: what was maximised.
        constraints: the m constraints, in the order of the multipliers.
    """

    schema_version: Literal["1"] = SCHEMA_VERSION
    beta: Annotated[float, Field(gt=0)]
    kl_budget: Annotated[float, Field(gt=0)] | None = None
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
            raise ValueError(f"`constraints` has {repeated[0]!r} twice; each has a name of its own")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """Of the constraints."""
        return tuple(one.name for one in self.constraints)

    @property
    def scores(self) -> tuple[str, ...]:
        """The scores that the constraints are computed from, each once."""
        return tuple(dict.fromkeys(name for one in self.constraints for name in one.stated.scores))

    @property
    def tilted_schema(self) -> pa.Schema:
        """Schema of its hand-off table: raw scores stand in it besides the columns that are none."""
        raw = [one.name for one in self.constraints if one.stated == Statistic(one.name)]
        return tilted_schema(self.names, [name for name in self.scores if name not in raw])

    @property
    def bounds(self) -> tuple[Constraint, ...]:
        """The constraints that were solved under, safeguards included."""
        return tuple(one.bound for one in self.constraints)

    @property
    def multipliers_m(self) -> np.ndarray:
        """lambda*, reward per unit of each constraint's column, shape (m,), float64."""
        return np.array([one.multiplier for one in self.constraints], dtype=np.float64)

    @property
    def signs_m(self) -> np.ndarray:
        """Of the constraints, shape (m,); see :func:`~pipeline.contracts.problem.constraint_signs`."""
        return constraint_signs(self.constraints)

    @property
    def turned_thresholds_m(self) -> np.ndarray:
        """Thresholds of the turned columns, safeguards included, shape (m,)."""
        return np.asarray(self.signs_m * np.array([one.column_threshold for one in self.constraints]))

    def tilt(self, rows: pa.Table) -> np.ndarray:
        """R + <lambda*, g - b> of each row, reward units, float64, shape (n,); over beta it is a score in nats.

        Args:
            rows: of the hand-off table: ``reward`` and the columns ``constraint_<name>``, in the user's own direction.
        """
        tilt_n = np.asarray(rows["reward"].to_numpy(), dtype=np.float64)
        for one, sign in zip(self.constraints, self.signs_m, strict=True):
            score_n = rows[CONSTRAINT_PREFIX + one.name].to_numpy()
            tilt_n = tilt_n + one.multiplier * sign * (score_n - one.column_threshold)
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
            "kl_budget": self.kl_budget,
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
