"""Proof of optimality by code that does not know the solver.

Nothing here comes from the solver or from the dual function it minimises: value, slack and KL are written out again
from the definitions of the primal and the dual, and the Karush-Kuhn-Tucker conditions decide.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from pipeline.contracts.errors import NotCertifiedError
from stage1_dual.dual.problem import DualProblem
from stage1_dual.dual.samples import SampleBlock
from stage1_dual.dual.segments import FloatArray, IntArray

KKT_TOLERANCE = 1e-8
GAP_TOLERANCE = 1e-8

# Eigenvalues of the correlation matrix of the active constraints below this are dependence, not poor conditioning:
# rounding leaves about 1e-15 of an exact zero.
_DEPENDENCE_TOLERANCE = 1e-10
_CLEARLY_REGULAR = 1e-4


@dataclass(frozen=True, eq=False)
class Certificate:
    """How far a claimed lam* is from optimal.

    Attributes:
        dual_value: D(lam), reward units.
        primal_value: E[r] - beta KL of the tilted policy, reward units.
        duality_gap: dual minus primal value, reward units. Equals <lam, slack> for a tilted policy.
        relative_gap: |gap| over the scale of the problem, dimensionless: the largest of beta, the sd of the reward
            within prompts and <lam, s>.
        kkt_residual: max_j |min(lam_j s_j / beta, slack_j / s_j)|, dimensionless, s_j the standard deviation of g_j
            within prompts. A constraint no policy can change (s_j = 0) counts 0 when it is met within rounding and
            its multiplier is 0, else infinity.
        slack_m: E[g] - b under the tilted policy, score units, shape (m,).
        complementarity_m: lam_j * slack_j, reward units, shape (m,).
    """

    dual_value: float
    primal_value: float
    duality_gap: float
    relative_gap: float
    kkt_residual: float
    slack_m: FloatArray
    complementarity_m: FloatArray

    @property
    def is_valid(self) -> bool:
        """Whether the KKT residual and the relative gap are both at most 1e-8."""
        return self.kkt_residual <= KKT_TOLERANCE and self.relative_gap <= GAP_TOLERANCE


def certify(problem: DualProblem, lam_m: FloatArray) -> Certificate:
    """Measure optimality of ``lam_m``, shape (m,), from the definitions."""
    beta, n_prompts = problem.beta, problem.n_prompts
    primal = partial(_primal_sums, lam_m=lam_m, thresholds_m=problem.thresholds_m, beta=beta)
    totals = np.sum(list(problem.samples.map(primal)), axis=0) / n_prompts
    log_z, kl, reward, reward_offset = map(float, totals[:4])
    slack_m = totals[4:]
    objective_scale = max(beta, problem.reward_scale, float(lam_m @ problem.score_scale_m))
    gap = beta * log_z - (reward - beta * kl)
    return Certificate(
        dual_value=beta * log_z + reward_offset,
        primal_value=reward - beta * kl + reward_offset,
        duality_gap=gap,
        relative_gap=abs(gap) / objective_scale,
        kkt_residual=_kkt_residual(problem, lam_m, slack_m),
        slack_m=slack_m,
        complementarity_m=lam_m * slack_m,
    )


def require_certified(problem: DualProblem, certificate: Certificate) -> None:
    """Return when the certificate is valid.

    Raises:
        NotCertifiedError: with the figures and what to do.
    """
    if certificate.is_valid:
        return
    raise NotCertifiedError(
        f"The multipliers found are not certified: KKT residual {certificate.kkt_residual:.3g} "
        f"(at most {KKT_TOLERANCE:g} wanted), relative duality gap {certificate.relative_gap:.3g} "
        f"(at most {GAP_TOLERANCE:g}), beta {problem.beta:g}. The dual is too ill-conditioned for float64 on these "
        f"{problem.n_samples} samples: raise beta, move the thresholds away from the largest attainable, "
        f"or draw more responses per prompt."
    )


def _primal_sums(block: SampleBlock, *, lam_m: FloatArray, thresholds_m: FloatArray, beta: float) -> FloatArray:
    """Sums over prompts: log Z, KL, centred reward, reward shift, then the m slacks, shape (4 + m,)."""
    h_mn = _centred_on_thresholds(block, thresholds_m)
    policy_n, log_ratio_n, log_z_p = _policy(block, h_mn, lam_m, beta)
    return np.array(
        [
            np.sum(log_z_p),
            # KL from its definition: the sum of w log(w K) over the responses, w / (1/K) being the ratio to pi_ref.
            np.einsum("n,n->", policy_n, log_ratio_n),
            np.einsum("n,n->", policy_n, block.reward_n),
            np.sum(block.reward_shift_p),
            *np.einsum("mn,n->m", h_mn, policy_n),
        ]
    )


def _centred_on_thresholds(block: SampleBlock, thresholds_m: FloatArray) -> FloatArray:
    """H = g - b of the block's rows, shape (m, n)."""
    return block.segments.subtract(block.scores_mn, thresholds_m[:, np.newaxis] - block.score_shift_mp)


def _policy(
    block: SampleBlock, h_mn: FloatArray, lam_m: FloatArray, beta: float
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Weights w, log(w K), shape (n,), and log Z = log E_{pi_ref} exp{(r + <lam, h>)/beta}, shape (p,)."""
    segments = block.segments
    with np.errstate(under="ignore"):
        exponent_n = (block.reward_n + np.einsum("m,mn->n", lam_m, h_mn)) / beta
        top_p = segments.max(exponent_n)
        tilt_n = np.exp(segments.subtract(exponent_n, top_p))
        mass_p = segments.sum(tilt_n)
        log_z_p = top_p + np.log(mass_p / segments.counts_p)
        policy_n = segments.divide(tilt_n, mass_p)
        log_ratio_n = segments.subtract(exponent_n, log_z_p)
    return policy_n, log_ratio_n, log_z_p


def _kkt_residual(problem: DualProblem, lam_m: FloatArray, slack_m: FloatArray) -> float:
    scale_m = problem.score_scale_m
    residual_m = np.full(problem.n_constraints, np.inf)
    varying = scale_m > 0
    residual_m[varying] = np.abs(
        np.minimum(lam_m[varying] * scale_m[varying] / problem.beta, slack_m[varying] / scale_m[varying])
    )
    rounding_m = 8 * np.finfo(np.float64).eps * (problem.score_magnitude_m + np.abs(problem.thresholds_m))
    residual_m[~varying & (lam_m == 0) & (slack_m >= -rounding_m)] = 0.0
    # A negative multiplier is outside the dual's domain, whatever the slack.
    residual_m[lam_m < 0] = np.inf
    return float(np.max(residual_m, initial=0.0))


def find_dependent_constraints(
    problem: DualProblem, lam_m: FloatArray, *, slack_m: FloatArray, hess_mm: FloatArray
) -> tuple[str, ...]:
    """Names of active constraints whose scores are linearly dependent under the tilted policy.

    The Hessian is then singular on the active set, and the split of lam* among them is not unique.

    Args:
        problem: the problem solved.
        lam_m: certified multipliers, reward per score unit, shape (m,).
        slack_m: their slacks, score units, shape (m,).
        hess_mm: Hessian of the dual as the solver found it, shape (m, m): where it is far from singular that is
            enough, and else the covariances are computed anew.
    """
    # A constraint no policy can change is left out: its multiplier is 0 by convention, and no sign of dependence.
    tight = (np.abs(slack_m) <= KKT_TOLERANCE * problem.score_scale_m) | (lam_m > 0)
    active = np.flatnonzero(tight & (problem.score_scale_m > 0))
    if len(active) < 2 or _is_regular(hess_mm[np.ix_(active, active)]):
        return ()
    sums = partial(
        _covariance_sums, lam_m=lam_m, thresholds_m=problem.thresholds_m, beta=problem.beta, active_a=active
    )
    covariance = np.sum(list(problem.samples.map(sums)), axis=0)
    spread = np.sqrt(np.diag(covariance))
    moving = spread > 0
    dependent = set(active[~moving].tolist())
    if bool(np.any(moving)):
        correlation = covariance[np.ix_(moving, moving)] / np.outer(spread[moving], spread[moving])
        eigenvalues, eigenvectors = np.linalg.eigh(correlation)
        for direction in eigenvectors.T[eigenvalues <= _DEPENDENCE_TOLERANCE]:
            dependent |= set(active[moving][np.abs(direction) > 1e-6].tolist())
    return tuple(problem.constraint_names[j] for j in sorted(dependent))


def _is_regular(hess_aa: FloatArray) -> bool:
    spread = np.sqrt(np.maximum(np.diag(hess_aa), 0.0))
    if not bool(np.all(spread > 0)):
        return False
    return float(np.linalg.eigvalsh(hess_aa / np.outer(spread, spread))[0]) > _CLEARLY_REGULAR


def _covariance_sums(
    block: SampleBlock, *, lam_m: FloatArray, thresholds_m: FloatArray, beta: float, active_a: IntArray
) -> FloatArray:
    """Sum over prompts of the tilted covariance of the active constraints, shape (a, a)."""
    h_mn = _centred_on_thresholds(block, thresholds_m)
    policy_n, _, _ = _policy(block, h_mn, lam_m, beta)
    with np.errstate(under="ignore"):
        mean_ap = block.segments.sum(h_mn[active_a] * policy_n)
        deviation_an = block.segments.subtract(h_mn[active_a], mean_ap)
        return np.asarray(np.einsum("in,jn,n->ij", deviation_an, deviation_an, policy_n), dtype=np.float64)
