"""What the arguments of this package's functions must be, with one message that names the argument and the rule.

Scores, thresholds, beta, multipliers, levels. How rows belong to prompts is checked where they are grouped
(:mod:`stage1_dual.dual.problem`), whether scores can be centred where they are (:mod:`stage1_dual.dual.blocks`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pipeline.contracts.errors import InputError
from stage1_dual.dual.segments import FloatArray


def validate_multipliers(name: str, lam: ArrayLike, is_equality_m: NDArray[np.bool_]) -> FloatArray:
    """``lam`` as a fresh float64 array of shape (m,); only the multiplier of an equality may be negative.

    Raises:
        InputError: it is not m finite numbers, or that of a bound is negative.
    """
    n_constraints = len(is_equality_m)
    lam_m = np.atleast_1d(as_float_array(name, lam)).copy()
    if lam_m.shape != (n_constraints,):
        raise InputError(f"`{name}` has shape {lam_m.shape}; it must be ({n_constraints},), one per constraint")
    if not bool(np.all(np.isfinite(lam_m) & ((lam_m >= 0) | is_equality_m))):
        except_of = ", except of an equality" if bool(np.any(is_equality_m)) else ""
        raise InputError(f"`{name}` is {lam_m.tolist()}; multipliers must be finite and not negative{except_of}")
    return lam_m


def validate_equalities(is_equality: ArrayLike, n_constraints: int) -> NDArray[np.bool_]:
    """Which constraints are equalities, as a fresh, read-only array of shape (m,).

    Raises:
        InputError: it is not m booleans.
    """
    is_equality_m = np.atleast_1d(np.asarray(is_equality)).copy()
    if is_equality_m.shape != (n_constraints,) or is_equality_m.dtype != np.bool_:
        raise InputError(
            f"`is_equality_m` is {is_equality!r}; it must be {n_constraints} booleans, one per constraint"
        )
    is_equality_m.flags.writeable = False
    return is_equality_m


def validate_relative(relative: ArrayLike | None, n_constraints: int) -> NDArray[np.bool_]:
    """Which thresholds are margins over the reference mean, shape (m,); none of them where ``relative`` is None.

    Raises:
        InputError: it is not m booleans.
    """
    if relative is None:
        return np.zeros(n_constraints, dtype=np.bool_)
    relative_m = np.atleast_1d(np.asarray(relative))
    if relative_m.shape != (n_constraints,) or relative_m.dtype != np.bool_:
        raise InputError(
            f"`thresholds_are_relative_m` is {relative!r}; it must be {n_constraints} booleans, one per constraint"
        )
    return relative_m


def require_prompts(n_prompts: int) -> None:
    """Return where prompts are enough for an interval.

    Raises:
        InputError: there are fewer than two: nothing tells how much they differ.
    """
    if n_prompts < 2:
        raise InputError(f"an interval needs at least 2 prompts; the problem has {n_prompts}")


def require_level(level: float) -> None:
    """Return where ``level`` can be the coverage of an interval.

    Raises:
        InputError: it does not lie between 0 and 1.
    """
    if not 0 < level < 1:
        raise InputError(f"`level` is {level!r}; it must lie between 0 and 1")


def as_float_array(name: str, values: ArrayLike) -> FloatArray:
    """``values`` as a float64 array of the same shape; the caller's own array where it is one already.

    Raises:
        InputError: they are masked, not rectangular or not real numbers; NaN and infinity pass.
    """
    if isinstance(values, np.ma.MaskedArray) and bool(np.any(values.mask)):
        raise InputError(f"`{name}` is a masked array with masked values; drop or fill those rows first")
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise InputError(f"`{name}` is not a rectangular array of numbers: {error}") from error
    if array.dtype.kind not in "fiub" and not (array.dtype.kind == "O" and array.size):
        raise InputError(f"`{name}` has dtype {array.dtype}; it must be an array of real numbers")
    try:
        return np.asarray(array, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"`{name}` has dtype {array.dtype}; it must be an array of real numbers: {error}") from error


def require_finite(name: str, values: FloatArray, *, axes: str) -> None:
    """Return where all ``values`` are finite; ``axes`` says in the message what the places of the others count.

    Raises:
        InputError: a value is NaN or infinite; the message lists the first five with their places.
    """
    bad = np.argwhere(~np.isfinite(values))
    if len(bad) == 0:
        return
    shown = ", ".join(f"{_format_index(index)} = {values[tuple(index)]}" for index in bad[:5])
    more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
    plural = "s" if len(bad) != 1 else ""
    raise InputError(
        f"`{name}` has {len(bad)} NaN or infinite value{plural}, at {axes}: {shown}{more}; all must be finite"
    )


def _format_index(index: NDArray[np.intp]) -> str:
    return str(int(index[0])) if len(index) == 1 else str(tuple(int(i) for i in index))


def validate_thresholds(thresholds: ArrayLike, n_constraints: int) -> FloatArray:
    """``thresholds`` as a fresh, read-only float64 array of shape (m,).

    Raises:
        InputError: they are not m finite numbers.
    """
    thresholds_m = np.atleast_1d(as_float_array("thresholds", thresholds)).copy()
    if thresholds_m.shape != (n_constraints,):
        raise InputError(
            f"`thresholds` has shape {thresholds_m.shape}; it must be ({n_constraints},), one per constraint"
        )
    if not bool(np.all(np.isfinite(thresholds_m))):
        raise InputError(f"`thresholds` is {thresholds_m.tolist()}; thresholds must be finite")
    thresholds_m.flags.writeable = False
    return thresholds_m


def validate_beta(beta: float) -> float:
    """``beta`` as a float.

    Raises:
        InputError: it is not a positive, finite number.
    """
    return _positive("beta", beta, unit="")


def validate_kl_budget(kl_budget: float) -> float:
    """``kl_budget`` as a float, nats per prompt.

    Raises:
        InputError: it is not a positive, finite number.
    """
    return _positive("kl", kl_budget, unit=" of nats")


def _positive(name: str, number: float, *, unit: str) -> float:
    try:
        value = float(number)
    except (TypeError, ValueError):
        raise InputError(f"`{name}` is {number!r}; it must be a positive, finite number{unit}") from None
    if not (np.isfinite(value) and value > 0):
        raise InputError(f"`{name}` is {value!r}; it must be a positive, finite number{unit}")
    return value


def validate_names(names: Sequence[str] | None, n_constraints: int) -> tuple[str, ...]:
    """The names of m constraints; "constraint_0" and so on where ``names`` is None.

    Raises:
        InputError: they are not m distinct names.
    """
    if names is None:
        return tuple(f"constraint_{j}" for j in range(n_constraints))
    kept = tuple(names)
    if isinstance(names, str) or len(kept) != n_constraints or len(set(kept)) != n_constraints:
        raise InputError(f"`constraint_names` is {names!r}; it must be {n_constraints} distinct names")
    return kept
