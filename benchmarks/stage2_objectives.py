"""Objectives that stage 2 was chosen among: compared by ``stage2_study.py``, and not offered to users.

All have pi_lambda as their exact minimiser. What they close is within the noise of ``tilted_pairwise``
(docs/stage2.md), so that none gives a reason to pick it over that one.
"""

from __future__ import annotations

import torch

from stage2_policy.losses import Targets, tilted_nll, tilted_pairwise
from stage2_policy.objectives import Objective


def tilted_kl(logp: torch.Tensor, targets: Targets) -> torch.Tensor:
    """Tilted maximum likelihood less its sampling noise, -w log rho + (rho - 1) / K with rho = pi_theta / pi_ref.

    Since pi_theta sums to one, E_ref[rho] = 1 whatever theta: the second term has mean zero, and the objective has the
    value (up to a constant) and the exact minimiser pi_lambda of :func:`tilted_nll`. Its gradient
    -(w - rho / K) grad log pi_theta, however, vanishes response by response where rho = K w, that is at the tilted
    policy, where that of ``tilted_nll`` is as noisy as everywhere. On K samples: any policy whose ratio to pi_ref is
    K w on the responses drawn, which leaves the reference where nothing was drawn. Consistent: w is off by the error
    of the prompt's log-partition, K**-0.5, but by one factor for all its responses, which normalisation takes back.

    Where rho exceeds c, the largest tilted ratio K w_k of its group and at least 1, it is continued by its tangent in
    log rho, so that no response pulls harder than c / K: a few noisy ratios would else outweigh all others. pi_lambda
    has no such ratio and stays a minimiser; the gradient equals that of ``tilted_nll`` in the mean for every policy
    whose ratios stay below c.

    Source: the variational form of the Kullback-Leibler divergence of Nguyen, Wainwright and Jordan, "Estimating
    divergence functionals and the likelihood ratio by convex risk minimization", IEEE Trans. Inf. Theory 56 (2010),
    doi:10.1109/TIT.2010.2068870, with log rho for the critic.
    """
    log_ratio = logp - targets.ref_logp
    largest = Groups(targets).max(targets.n_samples * targets.weight).clamp(min=1)
    below = torch.minimum(log_ratio, largest.log())
    ratio = torch.exp(below) * (1 + log_ratio - below)
    return -targets.weight * log_ratio + (ratio - 1) / targets.n_samples


def tilted_listwise(logp: torch.Tensor, targets: Targets) -> torch.Tensor:
    """Cross-entropy of the policy's own weights v = softmax(log rho) to the tilted ones, within each group.

    -sum_k w_k log v_k with w = softmax(s) in the group: the forward KL(w || v) up to a constant. The gradient in
    log rho_k is v_k - w_k, at most 1 in size. Exact minimiser: v = w, hence log rho = s + constant on a prompt, hence
    pi_lambda. Consistent for groups of any size from 2: v = w in every group fixes all differences of log rho.

    Source: the listwise likelihood of Cao et al., "Learning to rank: from pairwise approach to listwise approach"
    (ICML 2007), doi:10.1145/1273496.1273513, with log rho for the ranking score and w for its target.
    """
    groups = Groups(targets)
    log_policy = groups.log_softmax(logp - targets.ref_logp)
    return -groups.share * groups.log_softmax(targets.score).exp() * log_policy


def tilted_reverse(logp: torch.Tensor, targets: Targets) -> torch.Tensor:
    """The Lagrangian of the policy within each group, sum_k v_k (log v_k - log w_k).

    v = softmax(log rho) estimates pi_theta on the group, so that beta times this is D(lambda*) - L(pi_theta, lambda*)
    with both expectations over pi_theta replaced by the reference's responses weighted by v: what the closed fraction
    measures. The gradient in log rho_k is v_k (d_k - sum_i v_i d_i) with d = log rho - s, noiseless at the optimum.
    Exact minimiser: v = w, hence pi_lambda. Consistent for groups of any size from 2, but not convex in log rho: where
    v_k is near 0 the gradient is too, and a response once given up is not taken back.

    Source: the identity D - L = beta KL(pi_theta || pi_lambda) for Gibbs policies (Donsker and Varadhan), with
    self-normalised importance weights.
    """
    groups = Groups(targets)
    log_policy = groups.log_softmax(logp - targets.ref_logp)
    return groups.share * log_policy.exp() * (log_policy - groups.log_softmax(targets.score))


def tilted_regression(logp: torch.Tensor, targets: Targets) -> torch.Tensor:
    """Squared error of log-ratio differences against score differences, over all pairs of a group.

    With d = log rho - s: a quarter of the mean of (d_i - d_j)^2 over the pairs i < j. That is half the sample variance
    of d, and computed so, in O(K). Exact minimiser: d constant on a prompt, hence log rho = s + constant, hence
    pi_lambda. Consistent for groups of any size from 2, and convex in log rho. Every response drawn from pi_ref counts
    the same, also those that pi_lambda hardly gives: low scores pull as hard as high ones.

    Source: the pairwise form of Gao et al., "REBEL: reinforcement learning via regressing relative rewards" (NeurIPS
    2024), arXiv 2404.16767, summed over pairs in closed form; Richter et al., "VarGrad" (NeurIPS 2020),
    arXiv 2010.10436, for the variance of log-ratios as a divergence.
    """
    groups = Groups(targets)
    error = logp - targets.ref_logp - targets.score
    return 0.5 * (error - groups.mean(error)) ** 2 / targets.n_samples * groups.unbiased


def tilted_variance(logp: torch.Tensor, targets: Targets) -> torch.Tensor:
    """Half the variance of d = log rho - s under the tilted weights of each group.

    sum_k w_k (d_k - sum_i w_i d_i)^2 / 2 with w = softmax(s) in the group. To second order in d it is both
    KL(pi_theta || pi_lambda) and KL(pi_lambda || pi_theta), so errors count by what they cost; the weights do not move
    with theta, which keeps it convex in log rho. Exact minimiser: d constant on a prompt, hence pi_lambda. Consistent
    for groups of any size from 2.

    Source: Nuesken and Richter, "Solving high-dimensional Hamilton-Jacobi-Bellman PDEs using neural networks" (2021),
    arXiv 2005.05409, the log-variance divergence with pi_lambda for the measure.
    """
    groups = Groups(targets)
    weight = groups.log_softmax(targets.score).exp()
    error = logp - targets.ref_logp - targets.score
    centred = error - groups.sum(weight * error)
    return 0.5 * groups.share * weight * centred**2


def pairwise_with_nll(logp: torch.Tensor, targets: Targets) -> torch.Tensor:
    """:func:`tilted_pairwise` with a tenth of :func:`tilted_nll`: a sum of what has one exact minimiser has it too.

    What the likelihood adds is a pull on the drawn responses as a whole, which differences of log-ratios leave free.
    """
    return tilted_pairwise(logp, targets) + 0.1 * tilted_nll(logp, targets)


class Groups:
    """Reductions over the rows of each group, broadcast back to the rows, shape (n,)."""

    def __init__(self, targets: Targets) -> None:
        self._group = targets.group
        self._n_groups = int(targets.group.max()) + 1
        self._size = self.sum(torch.ones_like(targets.score))
        self.share = self._size / targets.n_samples
        """The share of the prompt's responses that are in the group."""
        self.unbiased = self._size / (self._size - 1).clamp(min=1)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of each group."""
        return values.new_zeros(self._n_groups).index_add(0, self._group, values)[self._group]

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Mean of each group."""
        return self.sum(values) / self._size

    def max(self, values: torch.Tensor) -> torch.Tensor:
        """Largest value of each group, without gradient."""
        largest = values.new_full((self._n_groups,), -torch.inf)
        return largest.scatter_reduce(0, self._group, values.detach(), "amax")[self._group]

    def log_softmax(self, values: torch.Tensor) -> torch.Tensor:
        """Logarithm of the softmax within each group."""
        shifted = values - self.max(values)
        return shifted - self.sum(shifted.exp()).log()


STUDIED = {
    "tilted_kl": Objective(f"{__name__}:tilted_kl", uses_groups=False, any_source=False),
    "tilted_listwise": Objective(f"{__name__}:tilted_listwise"),
    "tilted_reverse": Objective(f"{__name__}:tilted_reverse"),
    "tilted_regression": Objective(f"{__name__}:tilted_regression"),
    "tilted_variance": Objective(f"{__name__}:tilted_variance"),
    "pairwise_with_nll": Objective(f"{__name__}:pairwise_with_nll", any_source=False),
}
"""Rows for :data:`stage2_policy.objectives.OBJECTIVES`; who trains with them adds them there first."""
