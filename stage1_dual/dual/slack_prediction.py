"""Where the slacks of a run to come will lie, of any number of prompts: how likely one is missed, how many are enough.

As Stein (1945) did for a mean: by Student's t, of as many degrees of freedom as the estimated variance has, about a
bias that has an error of its own. The slope by which the multipliers of a run follow its equations errs with them
(``pilot_slopes``), which matters where prompts are few: then a slack is further beyond its demand than short of it.

Reference: Stein, Ann. Math. Statist. 16 (1945) 243.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
from numpy.typing import NDArray

from stage1_dual.dual.segments import FloatArray

# Where numbers of prompts are looked for.
FEWEST_PROMPTS = 30
MOST_PROMPTS = 10_000_000
# Draws of the predicted slack: 0.2 points of a probability of 5.
_DRAWS = 10_000
# Of the Hessian, the share that a run shows at least: below, its multipliers are anywhere, and its slacks missed.
_FLATTEST = 1e-6
LARGEST_CONFIDENCE = 0.999
"""Of a plan: ten of the draws are beyond it, and one asked for more would be told from none."""


@dataclass(frozen=True, eq=False)
class Prediction:
    """The slacks in the population of a run to come, with a number of responses a prompt.

    Attributes:
        n_responses: responses a prompt.
        variance_mm: of the slack, times the number of prompts, shape (m, m).
        degrees_m: degrees of freedom of the diagonal's estimate, shape (m,).
        offset_m: what is expected of the slack, shape (m,).
        offset_errors_m: standard error of that, shape (m,).
        two_sided_m: constraints that are held at their demand; others are only missed from below, shape (m,).
        hessian_ff: of the dual, of those that bind.
        slopes_ffi: how much lower a run's Hessian is for each unit of error of its equations, ``pilot_slopes.Slopes``.
    """

    n_responses: int
    variance_mm: FloatArray
    degrees_m: FloatArray
    offset_m: FloatArray
    offset_errors_m: FloatArray
    two_sided_m: NDArray[np.bool_]
    hessian_ff: FloatArray
    slopes_ffi: FloatArray

    def errors_m(self, n_prompts: float) -> FloatArray:
        """Standard errors of the slacks with so many prompts, to first order, shape (m,)."""
        return np.asarray(np.sqrt(np.diag(self.variance_mm) / n_prompts))

    def miss(self, n_prompts: float, within_m: FloatArray) -> float:
        """Probability that some slack in the population is off the demand by more than ``within_m``."""
        slack_dm = self._slack_dm(n_prompts)
        missed_dm = (slack_dm < -within_m) | (self.two_sided_m & (slack_dm > within_m))
        return float(np.mean(missed_dm.any(axis=1)))

    def reach(self, n_prompts: float, within_m: FloatArray, *, confidence: float) -> float:
        """How far slacks are off at that confidence with so many prompts, in units of ``within_m``."""
        slack_dm = self._slack_dm(n_prompts)
        off_dm = np.where(self.two_sided_m, np.abs(slack_dm), np.maximum(-slack_dm, 0.0)) / within_m
        return float(np.quantile(off_dm.max(axis=1), confidence))

    def prompts(self, within_m: FloatArray, *, confidence: float) -> int | None:
        """The fewest prompts with which all slacks are within at that confidence; None where no number does."""
        low, high = FEWEST_PROMPTS, FEWEST_PROMPTS
        while self.miss(high, within_m) > 1 - confidence:
            low, high = high, high * 2
            if high > MOST_PROMPTS:
                return None
        while high - low > 1:
            middle = (low + high) // 2
            if self.miss(middle, within_m) > 1 - confidence:
                low = middle
            else:
                high = middle
        return high

    def _slack_dm(self, n_prompts: float) -> FloatArray:
        """Draws of the slacks, shape (draws, m): x, of those that bind H H_hat^{-1} x = (I - T[z] H^{-1})^{-1} x."""
        slack_dm = self.offset_m + self._offset_dm + self._spread_dm / math.sqrt(n_prompts)
        root_fe, inverse_ef, bend_de, axes_dee = self._bends
        axis_de = np.einsum("dea,de->da", axes_dee, slack_dm[:, self.two_sided_m] @ inverse_ef.T)
        further_de = 1.0 / np.maximum(1.0 - bend_de / math.sqrt(n_prompts), _FLATTEST) - 1.0
        slack_dm[:, self.two_sided_m] += np.einsum("dea,da->de", axes_dee, further_de * axis_de) @ root_fe.T
        return np.asarray(slack_dm)

    @cached_property
    def _bends(self) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
        """A root of the Hessian, its inverse; T[z] by these, times the root of the number of prompts, by axes."""
        values, vectors = np.linalg.eigh(self.hessian_ff)
        kept = values > 1e-10 * np.max(values, initial=0.0)
        root_fe, inverse_ef = vectors[:, kept] * np.sqrt(values[kept]), (vectors[:, kept] / np.sqrt(values[kept])).T
        slopes_eei = np.einsum("ef,gh,fhi->egi", inverse_ef, inverse_ef, self.slopes_ffi)
        bend_de, axes_dee = np.linalg.eigh(np.einsum("egi,di->deg", slopes_eei, self._spread_dm[:, self.two_sided_m]))
        return root_fe, inverse_ef, bend_de, axes_dee

    @cached_property
    def _offset_dm(self) -> FloatArray:
        _, offset_dm, _ = _draws(len(self.offset_m))
        return offset_dm * self.offset_errors_m

    @cached_property
    def _spread_dm(self) -> FloatArray:
        """Draws of the slack's error times the root of the number of prompts, shape (draws, m)."""
        normal_dm, _, chi_d1 = _draws(len(self.offset_m))
        values, vectors = np.linalg.eigh(self.variance_mm)
        root_mm = vectors * np.sqrt(np.maximum(values, 0.0))
        # Chi-squared over its degrees of freedom, by Wilson and Hilferty's cube: to 1% from 8 degrees on.
        narrow_m = 2.0 / (9.0 * self.degrees_m)
        chi_dm = (1.0 - narrow_m + np.sqrt(narrow_m) * chi_d1) ** 3
        return np.asarray(normal_dm @ root_mm.T / np.sqrt(np.maximum(chi_dm, 1e-3)))


@cache
def _draws(n_constraints: int) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Normal draws of slacks and of their offsets, shape (draws, m), and of the estimate of all variances, (draws, 1).

    The same for all predictions, so that they compare; pilots that spread too little do so for every constraint.
    """
    rng = np.random.default_rng(0)
    shape = (_DRAWS, n_constraints)
    return rng.normal(size=shape), rng.normal(size=shape), rng.normal(size=(_DRAWS, 1))
