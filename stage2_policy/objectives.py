"""What stage 2 minimises: pure functions of sequence log-probabilities, scores and the grouping by prompt.

Each objective returns one loss per response, nats. Summed over the responses of a prompt and averaged over prompts
they give the value that is minimised, so any whole groups of rows, rightly scaled, are an unbiased estimate of it.

Two families. *Likelihoods* (``tilted_nll``, ``tilted_kl``) weigh each response by the tilted weight, which is itself
an estimate: K responses stand for all, and the weighted sample is what is learnt. *Log-ratio objectives* (all others)
ask that the differences of log pi_theta - log pi_ref between responses of one prompt be the differences of their
scores; both sides are known exactly for every response drawn, so that nothing is noisy at the optimum except drawn
labels.

A log-ratio objective says nothing of responses that were not drawn, and any constant may be added to all log-ratios of
a prompt. The gradient in the log-probabilities of a group sums to zero, so training starts from pi_ref and adds no
mass to the drawn responses as a whole; what is not drawn is left to the parametrisation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import functional

from pipeline.contracts.errors import InputError


@dataclass(frozen=True)
class Targets:
    """What stage 1 knows about each response of a set of whole groups.

    A group is some of the responses to one prompt. s = (r + <lam*, g - b>) / beta is the score of a response.

    Attributes:
        ref_logp: log pi_ref(y|x), nats, shape (n,).
        weight: tilted weight w_pk, shape (n,); all K weights of a prompt sum to 1.
        score: s, nats, shape (n,).
        label_noise: standard Gumbel noise of the response's drawn labels, shape (n,).
        n_samples: K, how many responses the prompt has in all, shape (n,).
        largest_ratio: the largest K w_pk among the responses of the row's prompt, shape (n,).
        group: number of the row's group, 0 to the number of groups less 1, int64, shape (n,).
        beta: KL strength, reward per nat, no dimensions.
    """

    ref_logp: torch.Tensor
    weight: torch.Tensor
    score: torch.Tensor
    label_noise: torch.Tensor
    n_samples: torch.Tensor
    largest_ratio: torch.Tensor
    group: torch.Tensor
    beta: torch.Tensor


class RowLoss(Protocol):
    """The loss of each response, shape (n,), nats; gradients flow through ``logp`` = log pi_theta(y|x), shape (n,)."""

    def __call__(self, logp: torch.Tensor, targets: Targets) -> torch.Tensor:
        """Loss of each response, shape (n,)."""


def tilted_nll(logp: torch.Tensor, targets: Targets) -> torch.Tensor:
    """Tilted maximum likelihood, -w log pi_theta(y|x).

    With y_1..y_K drawn from pi_ref, -sum_k w_k log pi_theta(y_k|x) estimates the forward KL(pi_lambda || pi_theta) up
    to a constant. Exact minimiser on exact weights: the tilted policy pi_lambda, proportional to
    pi_ref exp((r + <lambda, g>) / beta). On K samples: their reweighted empirical distribution, so that an
    unrestricted policy trained to the end forgets every response that was not drawn. Consistent: its error falls as
    K**-0.5.

    Source: the projection step of Peters and Schaal, "Reinforcement learning by reward-weighted regression" (2007),
    doi:10.1145/1273496.1273590.
    """
    return -targets.weight * logp


def tilted_kl(logp: torch.Tensor, targets: Targets) -> torch.Tensor:
    """Tilted maximum likelihood less its sampling noise, -w log rho + (rho - 1) / K with rho = pi_theta / pi_ref.

    Since pi_theta sums to one, E_ref[rho] = 1 whatever theta: the second term has mean zero, and the objective has the
    value (up to a constant) and the exact minimiser pi_lambda of :func:`tilted_nll`. Its gradient
    -(w - rho / K) grad log pi_theta, however, vanishes response by response where rho = K w, that is at the tilted
    policy, where that of ``tilted_nll`` is as noisy as everywhere. On K samples: any policy whose ratio to pi_ref is
    K w on the responses drawn, which leaves the reference where nothing was drawn. Consistent: w is off by the error
    of the prompt's log-partition, K**-0.5, but by one factor for all its responses, which normalisation takes back.

    Where rho exceeds the largest tilted ratio of its prompt, c = max_k K w_k, it is continued by its tangent in
    log rho, so that no response pulls harder than c / K: a few noisy ratios would else outweigh all others. pi_lambda
    has no such ratio and stays a minimiser; the gradient equals that of ``tilted_nll`` in the mean for every policy
    whose ratios stay below c.

    Source: the variational form of the Kullback-Leibler divergence of Nguyen, Wainwright and Jordan, "Estimating
    divergence functionals and the likelihood ratio by convex risk minimization", IEEE Trans. Inf. Theory 56 (2010),
    doi:10.1109/TIT.2010.2068870, with log rho for the critic.
    """
    log_ratio = logp - targets.ref_logp
    below = torch.minimum(log_ratio, targets.largest_ratio.log())
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
    groups = _Groups(targets)
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
    groups = _Groups(targets)
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
    groups = _Groups(targets)
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
    groups = _Groups(targets)
    weight = groups.log_softmax(targets.score).exp()
    error = logp - targets.ref_logp - targets.score
    centred = error - groups.sum(weight * error)
    return 0.5 * groups.share * weight * centred**2


def tilted_pairwise(logp: torch.Tensor, targets: Targets) -> torch.Tensor:
    """Cross-entropy of the policy's choice between two responses to the tilted one, over all pairs of a group.

    Of two responses drawn from pi_ref, importance weighting keeps i with probability sigmoid(log rho_i - log rho_j)
    under pi_theta, and sigmoid(s_i - s_j) under pi_lambda: :func:`tilted_listwise` on every pair by itself. Exact
    minimiser: equal differences, hence log rho = s + constant, hence pi_lambda. Consistent for groups of any size
    from 2, and convex in log rho. The pull of a pair is bounded and fades where two scores lie several nats apart, so
    that a few responses of strange log-ratio do not outweigh the rest. Unchanged if r and beta are scaled together.

    Source: Burges et al., "Learning to rank using gradient descent" (ICML 2005), doi:10.1145/1102351.1102363, with
    log rho for the ranking score and the tilted choice for its target; at beta = 1 it is :func:`dpo_soft`.
    """
    return _pairwise_logistic(
        logp - targets.ref_logp,
        targets,
        lambda first, second: torch.sigmoid(targets.score[first] - targets.score[second]),
    )


def dpo(logp: torch.Tensor, targets: Targets) -> torch.Tensor:
    """Direct preference optimisation on drawn labels, over all pairs of a group.

    -log sigmoid(beta (log rho_chosen - log rho_rejected)) where i is chosen over j with the Bradley-Terry probability
    sigmoid(beta (s_i - s_j)) of the tilted scores. Each response holds its own Gumbel noise and the larger sum
    beta s + noise is chosen, which gives every pair that probability and the same label whenever the pair comes up. In
    groups of two it is the papers' objective. Exact minimiser of the mean over labels: log rho = s + constant, hence
    pi_lambda. Consistent, with error K**-0.5 from the noise of the labels: it is that of the scores thrown away.

    Source: Rafailov et al., "Direct preference optimization" (NeurIPS 2023), arXiv 2305.18290, eq. 7; pseudo-labels as
    in arXiv 2405.19544, eq. 5.
    """
    utility = targets.beta * targets.score + targets.label_noise
    return _pairwise_logistic(
        targets.beta * (logp - targets.ref_logp),
        targets,
        lambda first, second: (utility[first] > utility[second]).to(logp.dtype),
    )


def dpo_soft(logp: torch.Tensor, targets: Targets) -> torch.Tensor:
    """:func:`dpo` with every label replaced by its expectation, the Bradley-Terry probability.

    The same mean and the same exact minimiser, pi_lambda, without the noise of drawn labels. Consistent for groups of
    any size from 2, and convex in log rho; flat where rewards lie several units apart, whatever beta.

    Source: as :func:`dpo`; the cross-entropy of a logistic model to known probabilities.
    """
    utility = targets.beta * targets.score
    return _pairwise_logistic(
        targets.beta * (logp - targets.ref_logp),
        targets,
        lambda first, second: torch.sigmoid(utility[first] - utility[second]),
    )


def _pairwise_logistic(
    value: torch.Tensor,
    targets: Targets,
    label: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Mean over the pairs of each group of the logistic loss of their value difference, half to either row."""
    groups = _Groups(targets)
    first, second = groups.pairs()
    loss = functional.binary_cross_entropy_with_logits(
        value[first] - value[second], label(first, second), reduction="none"
    )
    # n (n - 1) / 2 pairs, the mean of which counts by the group's share n / K: 2 / (K (n - 1)) each.
    scaled = loss / targets.n_samples[first] / (groups.size[first] - 1)
    return torch.zeros_like(value).index_add(0, first, scaled).index_add(0, second, scaled)


class _Groups:
    """Reductions over the rows of each group, broadcast back to the rows, shape (n,)."""

    def __init__(self, targets: Targets) -> None:
        self._group = targets.group
        self._n_groups = int(targets.group.max()) + 1
        self.size = self.sum(torch.ones_like(targets.score))
        self.share = self.size / targets.n_samples
        """The share of the prompt's responses that are in the group."""
        self.unbiased = self.size / (self.size - 1).clamp(min=1)

    def pairs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of all pairs of a group, each pair once, shapes (number of pairs,)."""
        rows = torch.argsort(self._group, stable=True)
        counts = torch.bincount(self._group)
        largest = int(counts.max())
        place = (counts.cumsum(0) - counts)[:, None] + torch.arange(largest, device=rows.device)
        first, second = torch.triu_indices(largest, largest, 1, device=rows.device)
        present = second < counts[:, None]
        return rows[place[:, first][present]], rows[place[:, second][present]]

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return values.new_zeros(self._n_groups).index_add(0, self._group, values)[self._group]

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        return self.sum(values) / self.size

    def log_softmax(self, values: torch.Tensor) -> torch.Tensor:
        largest = values.new_full((self._n_groups,), -torch.inf)
        largest = largest.scatter_reduce(0, self._group, values.detach(), "amax")[self._group]
        shifted = values - largest
        return shifted - self.sum(shifted.exp()).log()


@dataclass(frozen=True)
class Objective:
    """An objective and what it needs.

    Attributes:
        row_loss: the loss of each response.
        uses_reference: whether it reads ``Targets.ref_logp``; the reference is then scored on every training response.
        uses_groups: whether it compares responses of a prompt, so that groups need at least 2.
        may_skip: whether a response counts by its tilted weight alone, so that leaving out responses of a small weight
            in all changes the minimiser by no more than that, in total variation.
        any_source: whether pi_lambda minimises it whatever the responses were drawn from, since it reads nothing but
            differences of log-ratios and scores within a group; otherwise they must be draws of pi_ref.
    """

    row_loss: RowLoss
    uses_reference: bool = True
    uses_groups: bool = True
    may_skip: bool = False
    any_source: bool = True


OBJECTIVES = {
    "tilted_nll": Objective(tilted_nll, uses_reference=False, uses_groups=False, may_skip=True, any_source=False),
    "tilted_kl": Objective(tilted_kl, uses_groups=False, any_source=False),
    "tilted_listwise": Objective(tilted_listwise),
    "tilted_reverse": Objective(tilted_reverse),
    "tilted_regression": Objective(tilted_regression),
    "tilted_variance": Objective(tilted_variance),
    "tilted_pairwise": Objective(tilted_pairwise),
    "dpo": Objective(dpo),
    "dpo_soft": Objective(dpo_soft),
}


def read_objective(objective: str | Mapping[str, float]) -> Objective:
    """The objective of that name, or the weighted sum of several, given as name to weight.

    A weighted sum of objectives that share their exact minimiser has the same one.

    Raises:
        InputError: there is no such name, or a weight is not positive.
    """
    weights = {objective: 1.0} if isinstance(objective, str) else objective
    for name, weight in weights.items():
        if name not in OBJECTIVES:
            raise InputError(f"objective is `{name}`; it must be one of {', '.join(OBJECTIVES)}")
        if not 0 < weight < float("inf"):
            raise InputError(f"objective `{name}` has the weight {weight}; it must be a positive number")
    if not weights:
        raise InputError("objective is an empty mapping; it must name at least one objective")
    if isinstance(objective, str):
        return OBJECTIVES[objective]
    parts = [(OBJECTIVES[name], weight) for name, weight in weights.items()]

    def row_loss(logp: torch.Tensor, targets: Targets) -> torch.Tensor:
        return torch.stack([weight * part.row_loss(logp, targets) for part, weight in parts]).sum(dim=0)

    return Objective(
        row_loss,
        uses_reference=any(part.uses_reference for part, _ in parts),
        uses_groups=any(part.uses_groups for part, _ in parts),
        may_skip=all(part.may_skip for part, _ in parts),
        any_source=all(part.any_source for part, _ in parts),
    )
