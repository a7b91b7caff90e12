"""The constrained alignment problem on scored samples: validated, frozen, float64.

    maximise over policies pi   E_x [ E_{y~pi} r(x, y) - beta KL(pi || pi_ref) ]
    subject to                  E_x E_{y~pi} g_j(x, y) >= b_j ,   j = 1..m

g is higher-better and a slack E[g_j] - b_j >= 0 means satisfied. A constraint marked as an equality asks for = b_j:
its multiplier may have either sign. With a KL budget kappa the problem is to maximise E[r] subject to E_x KL <= kappa
besides: beta is then its multiplier, and an outcome (:mod:`stage1_dual.dual.kl_budget`). Expectations under pi_ref are
means over the responses of a prompt, then over prompts: every prompt counts the same however many responses it has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pipeline.contracts.errors import InputError
from stage1_dual.dual.arguments import (
    as_float_array,
    require_finite,
    validate_beta,
    validate_equalities,
    validate_kl_budget,
    validate_multipliers,
    validate_names,
    validate_thresholds,
)
from stage1_dual.dual.display import Display, describe_equalities, number
from stage1_dual.dual.errors import TooFewRowsError
from stage1_dual.dual.samples import SampleScores
from stage1_dual.dual.segments import FloatArray, IntArray
from stage1_dual.dual.tilting import weigh_block

# Log of a number of responses beyond which to advise it is no advice.
_LARGEST_ADVISED_LOG = math.log(1_000_000)
LARGEST_KL_SHARE = 0.35
"""The KL over the log of the number of responses, beyond which estimates on them are weak: lam* is biased upwards."""


class Frame(Protocol):
    """Columns by name: a pandas DataFrame, a pyarrow Table, a mapping."""

    def __getitem__(self, name: str, /) -> Any:
        """The column, as something NumPy makes an array of.

        Raises:
            KeyError: there is none of that name.
        """


@dataclass(frozen=True, eq=False)
class RowLayout:
    """How the caller's rows lie against the kept ones, which are grouped by prompt.

    Attributes:
        prompt_ids: the ids given to :meth:`DualProblem.from_rows` in the order prompts are kept (sorted), shape (p,);
            positions for :meth:`DualProblem.from_arrays`.
        row_order_n: the caller's row of each kept row; None when rows were grouped already.
        shape: shape of the caller's reward array.
    """

    prompt_ids: NDArray[np.generic]
    row_order_n: IntArray | None
    shape: tuple[int, ...]

    def to_caller(self, values_n: FloatArray) -> FloatArray:
        """Put one value per kept row, shape (n,), into the layout of the caller's reward."""
        if self.row_order_n is None:
            return values_n.reshape(self.shape)
        values = np.empty_like(values_n)
        values[self.row_order_n] = values_n
        return values


@dataclass(frozen=True, eq=False)
class DualProblem:
    """A problem that was checked and is ready to solve.

    Make one with :meth:`from_frame`, :meth:`from_rows` or :meth:`from_arrays`, which copy their inputs, or with
    :meth:`from_samples` for scores that lie elsewhere. Printed, it is a table.

    Attributes:
        beta: KL strength, reward per nat, positive.
        thresholds_m: absolute thresholds b, score units, shape (m,).
        constraint_names: one name per constraint, for messages and tables.
        is_equality_m: constraints that ask for their threshold exactly, shape (m,); none of them unless
            :meth:`with_equalities` says so.
        kl_budget: the KL to spend, nats per prompt, where beta is an outcome: then :attr:`beta` is where its search
            starts, or what was found. None unless :meth:`with_kl_budget` says so.
        samples: the scores.
        rows: the caller's rows; None for :meth:`from_samples`.
    """

    beta: float
    thresholds_m: FloatArray
    constraint_names: tuple[str, ...]
    is_equality_m: NDArray[np.bool_]
    kl_budget: float | None
    samples: SampleScores
    rows: RowLayout | None

    def __repr__(self) -> str:
        """A table of the constraints; of samples that no problem was made of before it takes a pass over them."""
        return self._display().text()

    def _repr_html_(self) -> str:
        """The same table as HTML, for notebooks."""
        return self._display().html()

    def _display(self) -> Display:
        facts = self.samples.facts
        columns = (self.thresholds_m, facts.reference_means_m, self.thresholds_m - facts.reference_means_m)
        return Display(
            "DualProblem: maximise E[reward] - beta KL subject to E[score] >= threshold",
            [
                ("samples", f"{facts.n_samples:,} responses to {facts.n_prompts:,} prompts"),
                ("beta", number(self.beta))
                if self.kl_budget is None
                else ("KL budget", f"{number(self.kl_budget)} nats"),
                ("reward", f"reference {number(facts.reference_reward)}, sd {number(facts.reward_scale)}"),
                *describe_equalities(self.constraint_names, self.is_equality_m),
            ],
            ("constraint", "threshold", "reference", "margin", "sd"),
            [
                (name, *map(number, values))
                for name, *values in zip(self.constraint_names, *columns, facts.score_scale_m, strict=True)
            ],
        )

    @classmethod
    def from_arrays(
        cls,
        reward_pk: ArrayLike,
        constraints_pkm: ArrayLike,
        *,
        thresholds: ArrayLike,
        beta: float,
        constraint_names: Sequence[str] | None = None,
    ) -> DualProblem:
        """Build from dense arrays: the same number of responses for every prompt.

        Args:
            reward_pk: rewards, shape (p, k), reward units.
            constraints_pkm: constraint scores, shape (p, k, m), or (p, k) for one constraint, score units.
            thresholds: absolute thresholds, shape (m,), or a number for one constraint, score units.
            beta: KL strength, reward per nat, positive.
            constraint_names: m distinct names for messages; "constraint_0" and so on when not given.

        Raises:
            InputError: a value is NaN or infinite, a shape does not fit, beta is not positive, or there is no data.
        """
        reward = as_float_array("reward_pk", reward_pk)
        if reward.ndim != 2:
            raise InputError(f"`reward_pk` has shape {reward.shape}; it must be (prompts, responses)")
        if reward.size == 0:
            raise InputError(
                f"`reward_pk` has shape {reward.shape}; it must hold at least one prompt and one response"
            )
        scores = as_float_array("constraints_pkm", constraints_pkm)
        if scores.ndim == 2:
            scores = scores[:, :, np.newaxis]
        if scores.ndim != 3 or scores.shape[:2] != reward.shape:
            raise InputError(
                f"`constraints_pkm` has shape {np.shape(constraints_pkm)}; with `reward_pk` of shape {reward.shape} "
                f"it must be {reward.shape} or {(*reward.shape, 'm')}".replace("'", "")
            )
        n_prompts, n_responses = reward.shape
        scores_nm = scores.reshape(n_prompts * n_responses, -1)
        counts_p = np.full(n_prompts, n_responses, dtype=np.int64)
        try:
            samples = SampleScores.in_memory(reward.reshape(-1), scores_nm, counts_p)
        except InputError:
            require_finite("reward_pk", reward, axes="(prompt, response)")
            require_finite("constraints_pkm", scores, axes="(prompt, response, constraint)")
            raise
        problem = cls.from_samples(samples, thresholds=thresholds, beta=beta, constraint_names=constraint_names)
        return replace(problem, rows=RowLayout(np.arange(n_prompts), None, reward.shape))

    @classmethod
    def from_rows(
        cls,
        prompt_id_n: ArrayLike,
        reward_n: ArrayLike,
        constraints_nm: ArrayLike,
        *,
        thresholds: ArrayLike,
        beta: float,
        constraint_names: Sequence[str] | None = None,
    ) -> DualProblem:
        """Build from one row a response, in any order, with any number of responses per prompt.

        Args:
            prompt_id_n: the prompt of each row (integers or strings), shape (n,).
            reward_n: rewards, shape (n,), reward units.
            constraints_nm: constraint scores, shape (n, m), or (n,) for one constraint, score units.
            thresholds: absolute thresholds, shape (m,), or a number for one constraint, score units.
            beta: KL strength, reward per nat, positive.
            constraint_names: m distinct names for messages; "constraint_0" and so on when not given.

        Raises:
            InputError: a value is NaN or infinite, a shape does not fit, beta is not positive, or there is no data.
        """
        reward = as_float_array("reward_n", reward_n)
        if reward.ndim != 1:
            raise InputError(f"`reward_n` has shape {reward.shape}; it must be (rows,)")
        if reward.size == 0:
            raise InputError("`reward_n` is empty; it must hold at least one row")
        scores = as_float_array("constraints_nm", constraints_nm)
        if scores.ndim == 1:
            scores = scores[:, np.newaxis]
        if scores.ndim != 2 or scores.shape[0] != reward.shape[0]:
            raise InputError(
                f"`constraints_nm` has shape {np.shape(constraints_nm)}; with {reward.shape[0]} rows in `reward_n` "
                f"it must be ({reward.shape[0]},) or ({reward.shape[0]}, m)"
            )
        prompt_ids, prompt_of_row_n = _group_prompts(prompt_id_n, n_rows=reward.shape[0])
        order_n: IntArray | None = None
        if bool(np.any(np.diff(prompt_of_row_n) < 0)):
            order_n = np.argsort(prompt_of_row_n, kind="stable").astype(np.int64)
        sorted_n = slice(None) if order_n is None else order_n
        counts_p = np.bincount(prompt_of_row_n).astype(np.int64)
        try:
            samples = SampleScores.in_memory(reward[sorted_n], scores[sorted_n], counts_p)
        except InputError:
            require_finite("reward_n", reward, axes="row")
            require_finite("constraints_nm", scores, axes="(row, constraint)")
            raise
        problem = cls.from_samples(samples, thresholds=thresholds, beta=beta, constraint_names=constraint_names)
        return replace(problem, rows=RowLayout(prompt_ids, order_n, reward.shape))

    @classmethod
    def from_frame(
        cls, frame: Frame, *, prompt_id: str, reward: str, thresholds: Mapping[str, float], beta: float
    ) -> DualProblem:
        """Build from a frame with one row a response; constraints have the names of their columns.

        Args:
            frame: a pandas DataFrame, a pyarrow Table, or a mapping from names to arrays.
            prompt_id: the column that says which prompt a row answers (integers or strings).
            reward: the column to maximise, reward units.
            thresholds: the columns that are constrained, with their absolute thresholds, score units.
            beta: KL strength, reward per nat, positive.

        Raises:
            InputError: a column is not there, is not one column of finite numbers, or :meth:`from_rows` refuses it.
        """
        names = list(thresholds)
        reward_n, *scores_mn = (_numbers(frame, name) for name in [reward, *names])
        return cls.from_rows(
            np.asarray(_column(frame, prompt_id)),
            reward_n,
            np.stack(scores_mn, axis=1) if names else np.empty((len(reward_n), 0)),
            thresholds=[thresholds[name] for name in names],
            beta=beta,
            constraint_names=names,
        )

    @classmethod
    def from_samples(
        cls,
        samples: SampleScores,
        *,
        thresholds: ArrayLike,
        beta: float,
        constraint_names: Sequence[str] | None = None,
    ) -> DualProblem:
        """Build on scores wherever they lie.

        Args:
            samples: the scores.
            thresholds: absolute thresholds, shape (m,), or a number for one constraint, score units.
            beta: KL strength, reward per nat, positive.
            constraint_names: m distinct names for messages; "constraint_0" and so on when not given.

        Raises:
            InputError: thresholds, beta or names are not what they must be.
        """
        n_constraints = samples.n_constraints
        positive_beta = validate_beta(beta)
        with np.errstate(over="ignore"):
            largest_exponent = np.float64(samples.facts.largest_reward) / positive_beta
        if not np.isfinite(largest_exponent):
            raise InputError(f"`beta` is {positive_beta!r}: rewards divided by it overflow; use a larger beta")
        thresholds_m = validate_thresholds(thresholds, n_constraints)
        names = validate_names(constraint_names, n_constraints)
        return cls(
            beta=positive_beta,
            thresholds_m=thresholds_m,
            constraint_names=names,
            is_equality_m=validate_equalities(np.zeros(n_constraints, dtype=np.bool_), n_constraints),
            kl_budget=None,
            samples=samples,
            rows=None,
        )

    def with_thresholds(self, thresholds: ArrayLike) -> DualProblem:
        """The same samples under other absolute thresholds, shape (m,); no score is copied.

        Raises:
            InputError: the thresholds are not finite or not m of them.
        """
        return replace(self, thresholds_m=validate_thresholds(thresholds, self.n_constraints))

    def with_equalities(self, is_equality_m: ArrayLike) -> DualProblem:
        """The same problem with the marked constraints, shape (m,), met exactly: E[g_j] = b_j, lam_j of either sign.

        Raises:
            InputError: ``is_equality_m`` is not m booleans.
        """
        return replace(self, is_equality_m=validate_equalities(is_equality_m, self.n_constraints))

    def with_beta(self, beta: float) -> DualProblem:
        """The same samples and thresholds under another KL strength; no score is copied.

        Raises:
            InputError: beta is not a positive, finite number.
        """
        return replace(self, beta=validate_beta(beta))

    def with_kl_budget(self, kl_budget: float | None) -> DualProblem:
        """The same problem with so many nats per prompt to spend and beta to be found; None takes beta as it is.

        Raises:
            InputError: the budget is not a positive, finite number.
            TooFewRowsError: it is so large that samples of this size cannot show it: weights on K responses have at
                most ln K nats, and an estimate is biased low long before.
        """
        if kl_budget is None:
            return replace(self, kl_budget=None)
        budget = validate_kl_budget(kl_budget)
        log_samples = float(np.mean(np.log(self.samples.counts_p)))
        if budget > LARGEST_KL_SHARE * log_samples:
            median = float(np.median(self.samples.counts_p))
            exponent, enough = budget / LARGEST_KL_SHARE, ""
            if exponent < _LARGEST_ADVISED_LOG:
                enough = f", or draw at least {math.ceil(math.exp(exponent)):,} responses a prompt"
            raise TooFewRowsError(
                f"`kl` is {budget:g} nats; {median:g} responses a prompt can show at most "
                f"{LARGEST_KL_SHARE * log_samples:.3g}, {LARGEST_KL_SHARE:g} of the log of their number. Lower it"
                f"{enough}"
            )
        return replace(self, kl_budget=budget)

    def with_samples(self, samples: SampleScores) -> DualProblem:
        """The same thresholds, beta and KL budget on other scores of the same constraints."""
        return replace(self, samples=samples, rows=None)

    @property
    def n_prompts(self) -> int:
        """The number of prompts."""
        return self.samples.facts.n_prompts

    @property
    def n_samples(self) -> int:
        """The number of responses over all prompts."""
        return self.samples.facts.n_samples

    @property
    def n_constraints(self) -> int:
        """The number of constraints, m."""
        return int(self.thresholds_m.shape[0])

    @property
    def reference_reward(self) -> float:
        """E_x E_{pi_ref}[r], reward units."""
        return self.samples.facts.reference_reward

    @property
    def reference_means_m(self) -> FloatArray:
        """E_x E_{pi_ref}[g_j], score units, shape (m,). A threshold is a margin plus this."""
        return self.samples.facts.reference_means_m

    @property
    def reward_scale(self) -> float:
        """Standard deviation of the reward within prompts, reward units."""
        return self.samples.facts.reward_scale

    @property
    def score_scale_m(self) -> FloatArray:
        """s_j, the standard deviation of g_j within prompts, score units, shape (m,)."""
        return self.samples.facts.score_scale_m

    @property
    def is_constant_m(self) -> NDArray[np.bool_]:
        """Constraints whose score is the same for all responses of each prompt: no policy changes them, shape (m,)."""
        return self.samples.facts.is_constant_m

    @property
    def score_magnitude_m(self) -> FloatArray:
        """Largest |g_j|, score units, shape (m,): the scale of rounding in the data."""
        return self.samples.facts.score_magnitude_m

    @cached_property
    def slack_shift_m(self) -> FloatArray:
        """E_x[shift] - b: what to add to a tilted mean of the centred scores to get its slack, shape (m,)."""
        facts = self.samples.facts
        return np.asarray(facts.score_shift_m + (facts.score_pivot_m - self.thresholds_m), dtype=np.float64)

    def clip_multipliers(self, lam_m: FloatArray) -> FloatArray:
        """``lam_m``, shape (..., m), in the dual's domain: what is negative becomes 0, except of an equality."""
        return np.where(self.is_equality_m, lam_m, np.maximum(lam_m, 0.0))

    def is_active_m(self, lam_m: FloatArray) -> NDArray[np.bool_]:
        """Constraints that bind at a minimum ``lam_m``, shape (..., m): equalities, and those with lam > 0."""
        return np.asarray((lam_m > 0) | self.is_equality_m, dtype=np.bool_)

    def tilted_weights(self, lam: ArrayLike) -> FloatArray:
        """Weights of the tilted policy, w proportional to exp{(r + <lam, g>)/beta}, summing to 1 within a prompt.

        Args:
            lam: multipliers, reward per score unit, shape (m,), non-negative except of an equality.

        Returns:
            Weights in the layout of the reward given: (p, k), or (n,) in the caller's row order.

        Raises:
            InputError: ``lam`` is not m such numbers, or the problem has no rows in memory.
        """
        if self.rows is None:
            raise InputError("`tilted_weights` needs a problem made by `from_arrays` or `from_rows`")
        lam_m = validate_multipliers("lam", lam, self.is_equality_m)
        weights = self.samples.map(partial(weigh_block, lam_m=lam_m, beta=self.beta))
        return self.rows.to_caller(np.concatenate(list(weights)))


def _column(frame: Frame, name: str) -> Any:
    try:
        return frame[name]
    except KeyError:
        raise InputError(f"the frame has no column {name!r}") from None


def _numbers(frame: Frame, name: str) -> FloatArray:
    values_n = as_float_array(name, _column(frame, name))
    if values_n.ndim != 1:
        raise InputError(f"`{name}` has shape {values_n.shape}; it must be one column")
    require_finite(name, values_n, axes="row")
    return values_n


def _group_prompts(prompt_id_n: ArrayLike, *, n_rows: int) -> tuple[NDArray[np.generic], IntArray]:
    ids_n = np.asarray(prompt_id_n)
    if ids_n.shape != (n_rows,):
        raise InputError(f"`prompt_id_n` has shape {ids_n.shape}; it must be ({n_rows},), one id per row")
    if ids_n.dtype.kind == "f" and not bool(np.all(np.isfinite(ids_n))):
        rows = np.flatnonzero(~np.isfinite(ids_n))[:5].tolist()
        raise InputError(f"`prompt_id_n` has missing ids at rows {rows}; every row needs its prompt's id")
    if ids_n.dtype.kind == "O":
        missing = [row for row, value in enumerate(ids_n) if value is None or value != value]
        if missing:
            raise InputError(f"`prompt_id_n` has missing ids at rows {missing[:5]}; every row needs its prompt's id")
    try:
        prompt_ids, prompt_of_row_n = np.unique(ids_n, return_inverse=True)
    except TypeError as error:
        raise InputError(f"`prompt_id_n` mixes types that cannot be compared ({error}); use one type") from error
    return prompt_ids, prompt_of_row_n.reshape(-1).astype(np.int64)
