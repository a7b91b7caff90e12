"""Proof of optimality by code that does not know the solver.

Value, slack, KL and Hessian are written out again from the definitions of the primal and the dual in plain NumPy, and
the Karush-Kuhn-Tucker conditions decide. Where there is a KL budget beta is a multiplier too, and they decide on both:
lam may be optimal for its beta, and still no certificate be valid. What a solution predicts is read off the same pass,
so that what is reported is what was proved. No sum, weight or reduction of the solver, of the dual function or of
their kernels (:mod:`stage1_dual.dual.segments`) is called: an error there moves lam*, and shows here. Calling them
instead would save 2 to 5% of a solve.

What is shared is the data, found once when the scores are centred (:mod:`stage1_dual.dual.blocks`): the scores
relative to a shift of their prompt and the shifts, which rows belong to which prompt, the standard deviations in which
residual and gap are measured, and the bound on the exponents. An error in those would not show here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from stage1_dual.dual.blocks import SampleBlock
from stage1_dual.dual.display import Display, number, some
from stage1_dual.dual.errors import NotCertifiedError
from stage1_dual.dual.problem import DualProblem
from stage1_dual.dual.segments import FloatArray, Segments

KKT_TOLERANCE = 1e-8
GAP_TOLERANCE = 1e-8

# Eigenvalues of the correlation matrix of the active constraints below this are dependence, not poor conditioning:
# rounding leaves about 1e-15 of an exact zero.
_DEPENDENCE_TOLERANCE = 1e-10

# Exponents up to this many nats leave weights so even that covariances can be differences of moments, and need no
# shift to stay within float64. A property of float64: the dual function draws its own line at the same place, and one
# moved too far there would still show here.
_EVEN_NATS = 15.0


@dataclass(frozen=True, eq=False)
class Certificate:
    """How far a claimed lam* is from optimal, and what the policy tilted by it does.

    Attributes:
        dual_value: D(lam), reward units; with a KL budget kappa D(beta, lam), which has beta kappa more.
        primal_value: E[r] - beta KL of the tilted policy, reward units; with a KL budget E[r].
        duality_gap: dual minus primal value, reward units. Equals <lam, slack> for a tilted policy, with a KL budget
            <lam, slack> + beta (kappa - KL).
        relative_gap: |gap| over the scale of the problem, dimensionless: the largest of beta, the sd of the reward
            within prompts and <|lam|, s>.
        kkt_residual: max_j |min(lam_j s_j / beta, slack_j / s_j)|, dimensionless, s_j the standard deviation of g_j
            within prompts; of an equality |slack_j / s_j|, whatever its multiplier. A constraint no policy can change
            (s_j = 0) counts 0 when it is met within rounding and its multiplier is 0, else infinity. With
            a KL budget at least |KL - kappa| / kappa.
        slack_m: E[g] - b under the tilted policy, score units, shape (m,).
        complementarity_m: lam_j * slack_j, reward units, shape (m,).
        reward: E[r] under the tilted policy, reward units.
        kl: KL from the reference policy, nats per prompt.
        hess_mm: Hessian of the dual, E_x Cov[g] / beta under the tilted policy, score units squared per reward unit,
            shape (m, m).
        ess_p: effective sample size of each prompt's weights, 1 to its number of responses, shape (p,).
    """

    dual_value: float
    primal_value: float
    duality_gap: float
    relative_gap: float
    kkt_residual: float
    slack_m: FloatArray
    complementarity_m: FloatArray
    reward: float
    kl: float
    hess_mm: FloatArray
    ess_p: FloatArray

    def __repr__(self) -> str:
        """The verdict and its figures; slacks of at most eight constraints."""
        return self._display().text()

    def _repr_html_(self) -> str:
        """The same table as HTML, for notebooks."""
        return self._display().html()

    def _display(self) -> Display:
        return Display(
            f"Certificate: {'valid' if self.is_valid else 'not valid'}",
            [
                ("KKT residual", f"{self.kkt_residual:.1e}, at most {KKT_TOLERANCE:g}"),
                ("relative gap", f"{self.relative_gap:.1e}, at most {GAP_TOLERANCE:g}"),
                ("dual value", number(self.dual_value)),
                ("primal value", number(self.primal_value)),
                ("reward", number(self.reward)),
                ("KL", f"{number(self.kl)} nats a prompt"),
                ("slack", some([number(slack) for slack in self.slack_m])),
            ],
        )

    @property
    def is_valid(self) -> bool:
        """Whether the KKT residual and the relative gap are both at most 1e-8."""
        return self.kkt_residual <= KKT_TOLERANCE and self.relative_gap <= GAP_TOLERANCE


def certify(problem: DualProblem, lam_m: FloatArray) -> Certificate:
    """Measure how far ``lam_m``, shape (m,), is from optimal, from the definitions, in one pass over the samples.

    Where the problem has a KL budget, ``lam_m`` and the problem's beta together are what is measured. Any multipliers
    can be measured; :attr:`Certificate.is_valid` says whether they are optimal.
    """
    beta, n_prompts = problem.beta, problem.n_prompts
    is_even = problem.samples.facts.largest_exponent(lam_m, beta) <= _EVEN_NATS
    function = partial(_examine, lam_m=lam_m, thresholds_m=problem.thresholds_m, beta=beta, is_even=is_even)
    parts = list(problem.samples.map(function))
    totals = np.sum([part.sums for part in parts], axis=0) / n_prompts
    log_z, kl, reward_offset, reward = map(float, totals[:4])
    slack_m = totals[4:]
    objective_scale = max(beta, problem.reward_scale, float(np.abs(lam_m) @ problem.score_scale_m))
    gap = beta * log_z - (reward - beta * kl)
    with np.errstate(under="ignore"):
        hess_mm = np.sum([part.covariance_mm for part in parts], axis=0) / (n_prompts * beta)
    dual_value, primal_value = beta * log_z, reward - beta * kl
    residual = _kkt_residual(problem, lam_m, slack_m)
    if problem.kl_budget is not None:
        unspent = problem.kl_budget - kl
        dual_value, primal_value, gap = dual_value + beta * problem.kl_budget, reward, gap + beta * unspent
        residual = max(residual, abs(unspent) / problem.kl_budget)
    return Certificate(
        dual_value=dual_value + reward_offset,
        primal_value=primal_value + reward_offset,
        duality_gap=gap,
        relative_gap=abs(gap) / objective_scale,
        kkt_residual=residual,
        slack_m=slack_m,
        complementarity_m=lam_m * slack_m,
        reward=reward + reward_offset,
        # Rounding can leave a KL of -1e-17.
        kl=max(kl, 0.0),
        hess_mm=hess_mm,
        ess_p=np.concatenate([part.ess_p for part in parts]),
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


@dataclass(frozen=True, eq=False)
class _Examination:
    """What the tilted policy is on one block.

    Attributes:
        sums: over its prompts of log Z, KL, reward shift, centred reward, then the m slacks, shape (4 + m,).
        covariance_mm: sum over its prompts of the tilted covariances, score units squared, shape (m, m).
        ess_p: effective sample sizes, shape (p,).
    """

    sums: FloatArray
    covariance_mm: FloatArray
    ess_p: FloatArray


def _examine(
    block: SampleBlock, *, lam_m: FloatArray, thresholds_m: FloatArray, beta: float, is_even: bool
) -> _Examination:
    n_constraints, n_prompts, counts_p = len(lam_m), block.segments.n_prompts, block.segments.counts_p
    # H = g - b is a response's centred score plus something of its prompt, which the tilted weights do not feel.
    h_shift_mp = block.score_shift_mp - thresholds_m[:, np.newaxis]
    mass_p, top_p, square_p = np.empty(n_prompts), np.zeros(n_prompts), np.empty(n_prompts)
    # Rows as in ``_Examination.sums``.
    terms_tp = np.empty((4 + n_constraints, n_prompts))
    log_z_p, kl_p, reward_p, mean_mp = terms_tp[0], terms_tp[1], terms_tp[3], terms_tp[4:]
    covariance_mm = np.zeros((n_constraints, n_constraints))
    with np.errstate(under="ignore"):
        for prompts, tile in block.tiles:
            rows, g_mn = tile.segments, tile.scores_mn
            # (r + <lam, g>) / beta of every response.
            exponent_n = np.append(1.0, lam_m) / beta @ tile.values_in
            if not is_even:
                top_p[prompts] = _largest(exponent_n, rows)
                exponent_n -= np.repeat(top_p[prompts], rows.counts_p)
            # The tilted policy is this over its mass.
            policy_n = np.exp(exponent_n)
            mass_p[prompts] = _total(np.ones_like(policy_n), policy_n, rows)
            share_p = 1.0 / mass_p[prompts]
            kl_p[prompts] = _total(exponent_n, policy_n, rows) * share_p
            reward_p[prompts] = _total(tile.reward_n, policy_n, rows) * share_p
            mean_mp[:, prompts] = _total(g_mn, policy_n, rows) * share_p
            square_p[prompts] = _total(policy_n, policy_n, rows)
            if not is_even:
                g_mn = g_mn - np.repeat(mean_mp[:, prompts], rows.counts_p, axis=1)
            for j, g_n in enumerate(g_mn):
                covariance_mm[j, : j + 1] += _total(g_mn[: j + 1], g_n * policy_n, rows) @ share_p
        covariance_mm += np.tril(covariance_mm, -1).T
        if is_even:
            covariance_mm -= mean_mp @ mean_mp.T
        ess_p = mass_p**2 / square_p
    log_mean_p = np.log(mass_p / counts_p)
    # KL from its definition: the tilted mean of the log of w K, the ratio of the policies.
    kl_p -= log_mean_p
    log_z_p[:] = top_p + log_mean_p + lam_m @ h_shift_mp / beta
    terms_tp[2] = block.reward_shift_p
    mean_mp += h_shift_mp
    # Rounding can leave an effective sample size just outside [1, k].
    return _Examination(terms_tp.sum(axis=1), covariance_mm, np.clip(ess_p, 1.0, counts_p))


def _total(values_n: FloatArray, policy_n: FloatArray, rows: Segments) -> FloatArray:
    """sum_k v_k w_k over the responses of each prompt; (..., n) and (n,) to (..., p)."""
    totals_p: FloatArray
    if rows.common_count is None:
        totals_p = np.add.reduceat(values_n * policy_n, rows.starts_p, axis=-1)
    else:
        shape_pk = (len(rows.counts_p), rows.common_count)
        totals_p = np.vecdot(values_n.reshape(*values_n.shape[:-1], *shape_pk), policy_n.reshape(shape_pk))
    return totals_p


def _largest(values_n: FloatArray, rows: Segments) -> FloatArray:
    """max_k v_k over the responses of each prompt; (n,) to (p,)."""
    return np.asarray(np.maximum.reduceat(values_n, rows.starts_p), dtype=np.float64)


def _kkt_residual(problem: DualProblem, lam_m: FloatArray, slack_m: FloatArray) -> float:
    scale_m = problem.score_scale_m
    varying = scale_m > 0
    divisor_m = np.where(varying, scale_m, 1.0)
    is_bound_m = ~problem.is_equality_m
    residual_m = np.abs(slack_m / divisor_m)
    # Complementarity, of bounds alone: that of an equality is its slack.
    pressed_m = np.minimum(lam_m * divisor_m / problem.beta, slack_m / divisor_m)
    residual_m[is_bound_m] = np.abs(pressed_m[is_bound_m])
    if not varying.all():
        rounding_m = 8 * np.finfo(np.float64).eps * (problem.score_magnitude_m + np.abs(problem.thresholds_m))
        is_met_m = (lam_m == 0) & (np.where(is_bound_m, -slack_m, np.abs(slack_m)) <= rounding_m)
        residual_m[~varying] = np.where(is_met_m, 0.0, np.inf)[~varying]
    # A negative multiplier of a bound is outside the dual's domain, whatever the slack.
    residual_m[(lam_m < 0) & is_bound_m] = np.inf
    return float(residual_m.max(initial=0.0))


def find_dependent_constraints(problem: DualProblem, lam_m: FloatArray, certificate: Certificate) -> tuple[str, ...]:
    """Names of active constraints whose scores are linearly dependent under the tilted policy.

    The Hessian is then singular on the active set, and the split of lam* among them is not unique.

    Args:
        problem: the problem solved.
        lam_m: certified multipliers, reward per score unit, shape (m,).
        certificate: of ``lam_m``.
    """
    # A constraint no policy can change is left out: its multiplier is 0 by convention, and no sign of dependence.
    tight = (np.abs(certificate.slack_m) <= KKT_TOLERANCE * problem.score_scale_m) | (lam_m != 0)
    active = np.flatnonzero(tight & (problem.score_scale_m > 0))
    if len(active) < 2:
        return ()
    hess_aa = certificate.hess_mm[np.ix_(active, active)]
    spread = np.sqrt(np.maximum(np.diag(hess_aa), 0.0))
    moving = spread > 0
    dependent = set(active[~moving].tolist())
    if bool(np.any(moving)):
        correlation = hess_aa[np.ix_(moving, moving)] / np.outer(spread[moving], spread[moving])
        eigenvalues, eigenvectors = np.linalg.eigh(correlation)
        for direction in eigenvectors.T[eigenvalues <= _DEPENDENCE_TOLERANCE]:
            dependent |= set(active[moving][np.abs(direction) > 1e-6].tolist())
    return tuple(problem.constraint_names[j] for j in sorted(dependent))
