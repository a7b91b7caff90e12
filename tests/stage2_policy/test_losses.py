from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.tabular_policies import (
    Draws,
    TabularWorld,
    build_tabular_world,
    draw_responses,
    enumerate_once,
    enumerate_shares,
    minimise,
    pair_neighbours,
    total_variation,
)

from benchmarks.stage2_objectives import STUDIED, pairwise_with_nll, tilted_kl
from stage2_policy.losses import Targets, dpo, tilted_nll, tilted_pairwise
from stage2_policy.objectives import OBJECTIVES

pytestmark = pytest.mark.slow

ALL = {**OBJECTIVES, **STUDIED}
"""Those that stage 2 was chosen among, too: what the study compares must be what it says."""
LOSSES = {name: objective.load_row_loss() for name, objective in ALL.items()}
LIKELIHOODS = [name for name, objective in ALL.items() if not objective.uses_groups]
NOISELESS = [name for name, objective in ALL.items() if objective.any_source and name != "dpo"]


def fit(objective: str, world: TabularWorld, draws: Draws) -> torch.Tensor:
    return minimise(lambda table: LOSSES[objective](draws.logp(table), draws.targets).sum(), world.ref_logp)


@pytest.mark.parametrize("objective", [*LIKELIHOODS, *NOISELESS, "pairwise_with_nll"])
@pytest.mark.parametrize("seed", [0, 1])
def test_exact_weights_trained_to_the_end_give_the_gibbs_policy(objective: str, seed: int) -> None:
    world = build_tabular_world(n_prompts=3, n_responses=50, seed=seed)
    draws = enumerate_once(world) if ALL[objective].any_source else enumerate_shares(world)

    policy = fit(objective, world, draws)

    assert total_variation(policy, world.tilted) < 1e-3
    assert total_variation(world.ref_logp.exp(), world.tilted) > 0.1


def mean_error(objective: str, world: TabularWorld, *, n_samples: int) -> float:
    draws = [draw_responses(world, n_samples=n_samples, group_size=8, seed=seed) for seed in range(3)]
    return float(np.mean([total_variation(fit(objective, world, part), world.tilted) for part in draws]))


@pytest.mark.parametrize(
    ("objective", "sizes"),
    # Below 2,000 labels a response of few pairs may win or lose them all: its fitted ratio is then without bound.
    [("tilted_nll", (1000, 4000, 16000)), ("dpo", (2000, 8000))],
)
def test_noisy_objectives_err_by_one_over_the_root_of_the_samples(objective: str, sizes: tuple[int, ...]) -> None:
    # Likelihood: the noise of which responses were drawn. Drawn labels: theirs.
    world = build_tabular_world(n_prompts=3, n_responses=50, seed=4)
    errors = [mean_error(objective, world, n_samples=size) for size in sizes]

    slope = np.polyfit(np.log(sizes), np.log(errors), 1)[0]
    assert -0.65 < slope < -0.35
    assert errors[-1] < 0.07


def test_kl_form_errs_less_than_the_likelihood() -> None:
    world = build_tabular_world(n_prompts=3, n_responses=50, seed=4)
    for size in (1000, 4000, 16000):
        assert mean_error("tilted_kl", world, n_samples=size) < 0.7 * mean_error("tilted_nll", world, n_samples=size)


@pytest.mark.parametrize("objective", NOISELESS)
def test_log_ratio_objectives_are_exact_once_every_response_is_drawn(objective: str) -> None:
    world = build_tabular_world(n_prompts=3, n_responses=50, seed=4)
    draws = draw_responses(world, n_samples=6400, group_size=8, seed=0)
    assert len(draws.cell.unique()) == 150

    assert total_variation(fit(objective, world, draws), world.tilted) < 1e-3


@pytest.mark.parametrize("objective", NOISELESS)
def test_log_ratio_objectives_miss_no_more_than_what_was_not_drawn(objective: str) -> None:
    # Half of the probability is drawn: right differences there, whatever the rest.
    world = build_tabular_world(n_prompts=3, n_responses=50, seed=4)
    draws = draw_responses(world, n_samples=24, group_size=24, seed=0)
    policy = fit(objective, world, draws)
    error = (policy.log() - world.ref_logp - world.score).flatten()

    for prompt in range(3):
        drawn = error[draws.cell[24 * prompt : 24 * (prompt + 1)].unique()]
        assert len(drawn) > 8
        assert drawn.max() - drawn.min() < 0.02
    assert total_variation(policy, world.tilted) > 0.02


def test_comparing_responses_of_different_prompts_does_not_give_the_gibbs_policy() -> None:
    # Why objectives know the grouping by prompt: scores of two prompts differ by their log-partitions too.
    world = build_tabular_world(n_prompts=3, n_responses=50, seed=0)
    draws = enumerate_once(replace(world, score=world.score + torch.tensor([[0.0], [1.0], [3.0]])))
    one_group = replace(draws, targets=replace(draws.targets, group=torch.zeros_like(draws.targets.group)))

    assert total_variation(fit("tilted_regression", world, draws), world.tilted) < 1e-3
    assert total_variation(fit("tilted_regression", world, one_group), world.tilted) > 0.01


def test_kl_form_has_the_mean_gradient_of_the_likelihood() -> None:
    world = build_tabular_world(n_prompts=3, n_responses=50, seed=2)
    draws = enumerate_shares(world)
    noise = 0.1 * torch.randn(3, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    start = world.ref_logp + 0.4 * world.score + noise
    largest = (world.tilted / world.ref_logp.exp()).max(dim=1, keepdim=True).values
    assert torch.all(start.log_softmax(1) - world.ref_logp < largest.log())
    gradients = []
    for objective in (tilted_nll, tilted_kl):
        logits = start.clone().requires_grad_()
        objective(draws.logp(torch.log_softmax(logits, dim=1)), draws.targets).sum().backward()
        gradients.append(logits.grad)

    assert gradients[0].norm() > 0.1
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-12)


def test_no_ratio_pulls_harder_than_the_largest_tilted_one() -> None:
    # K = 4, w = 1/2, largest tilted ratio 2: the slope in log pi is -w + rho / K up to rho = 2, and -w + 2 / K above.
    logp = torch.tensor([-1.0, 0.0, 0.5, 10.0], dtype=torch.float64, requires_grad=True)
    full = torch.ones(4, dtype=torch.float64)
    targets = Targets(
        ref_logp=0 * full,
        weight=0.5 * full,
        score=0 * full,
        label_noise=0 * full,
        n_samples=4 * full,
        group=torch.zeros(4, dtype=torch.int64),
        beta=torch.tensor(1.0),
    )
    tilted_kl(logp, targets).sum().backward()

    rho = torch.tensor([-1.0, 0.0, 0.5], dtype=torch.float64).exp()
    torch.testing.assert_close(logp.grad, torch.cat([-0.5 + rho / 4, torch.zeros(1, dtype=torch.float64)]))


def test_gradients_on_samples_are_unbiased_and_the_kl_form_is_noiseless_at_the_optimum() -> None:
    # K draws from pi_ref with the exact weight exp(score) / (K Z): the mean over many draws is the exact gradient.
    world = build_tabular_world(n_prompts=1, n_responses=50, seed=3)
    ref, tilted = world.ref_logp.exp()[0], world.tilted[0]
    n_samples, n_repeats = 32, 4000
    draws = draw_responses(world, n_samples=n_samples * n_repeats, group_size=n_samples, seed=1)
    ratio = (tilted / ref)[draws.cell]
    targets = replace(
        draws.targets,
        weight=ratio / n_samples,
        n_samples=torch.full_like(ratio, n_samples),
    )

    def gradient(name: str, policy_logits: torch.Tensor) -> torch.Tensor:
        logp = torch.log_softmax(policy_logits, dim=0)
        drawn_logp = logp[draws.cell].requires_grad_()
        LOSSES[name](drawn_logp, targets).sum().backward()
        coefficient = torch.zeros(n_repeats, 50, dtype=torch.float64).scatter_add(
            1, draws.cell.view(n_repeats, n_samples), drawn_logp.grad.view(n_repeats, n_samples)
        )
        # d logp_y / d logit_v = 1[y = v] - pi_v
        return coefficient - coefficient.sum(1, keepdim=True) * logp.exp()

    away = world.ref_logp[0] + 0.3 * world.score[0]
    exact = away.softmax(0) - tilted
    for name in LIKELIHOODS:
        estimates = gradient(name, away)
        z = (estimates.mean(0) - exact) / (estimates.std(0) / n_repeats**0.5)
        assert z.abs().max() < 4.5, name  # the largest of 50 normal deviates
    noise = {name: gradient(name, tilted.log()).norm(dim=1).mean() for name in ALL}
    for name in ("tilted_nll", "dpo"):
        assert noise[name] > 0.05, name
    for name in ("tilted_kl", *NOISELESS):
        assert noise[name] < 1e-12, name


def pairs_of(values: torch.Tensor) -> torch.Tensor:
    return (values[:, None] - values[None, :])[np.triu_indices(len(values), 1)]


def test_group_objectives_against_plain_formulas() -> None:
    rng = np.random.default_rng(0)
    logp, ref_logp, score, noise = (torch.from_numpy(rng.normal(size=12)) for _ in range(4))
    group = torch.tensor([0] * 5 + [1] * 4 + [2] * 3)
    beta = 0.7
    targets = Targets(
        ref_logp=ref_logp,
        weight=torch.ones(12),
        score=score,
        label_noise=noise,
        n_samples=torch.full((12,), 20.0, dtype=torch.float64),
        group=group,
        beta=torch.tensor(beta, dtype=torch.float64),
    )
    for place, size in enumerate((5, 4, 3)):
        rows = group == place
        log_ratio, s = (logp - ref_logp)[rows], score[rows]
        v, w, d = log_ratio.softmax(0), s.softmax(0), log_ratio - s
        margin, chosen = beta * pairs_of(log_ratio), pairs_of(beta * s + noise[rows]) > 0
        kept, ratio = torch.sigmoid(pairs_of(s)), pairs_of(log_ratio)
        wanted = {
            "tilted_listwise": -(w * v.log()).sum(),
            "tilted_reverse": (v * (v / w).log()).sum(),
            "tilted_regression": (pairs_of(d) ** 2).mean() / 4,
            "tilted_variance": (w * (d - (w * d).sum()) ** 2).sum() / 2,
            "tilted_pairwise": -(kept * ratio.sigmoid().log() + (1 - kept) * (-ratio).sigmoid().log()).mean(),
            "dpo": -torch.where(chosen, margin, -margin).sigmoid().log().mean(),
        }
        for name, value in wanted.items():
            found = LOSSES[name](logp, targets)[rows].sum()
            assert float(found) == pytest.approx(float(value) * size / 20, abs=1e-12), name


@pytest.mark.parametrize("name", [name for name in ALL if name.startswith("tilted")])
def test_tilted_objectives_do_not_know_the_unit_of_the_reward(name: str) -> None:
    # Scaled with beta, r leaves scores in nats as they are; beta itself must not matter.
    draws = draw_responses(build_tabular_world(n_prompts=2, n_responses=50, seed=0), n_samples=8, group_size=4, seed=0)
    logp = draws.targets.ref_logp.flip(0)
    scaled = replace(draws.targets, beta=torch.tensor(0.1, dtype=torch.float64))

    torch.testing.assert_close(LOSSES[name](logp, scaled), LOSSES[name](logp, draws.targets))


def test_drawn_labels_have_the_bradley_terry_mean() -> None:
    world = build_tabular_world(n_prompts=1, n_responses=50, seed=5)
    draws = draw_responses(world, n_samples=40_000, group_size=4, seed=2)
    logp = draws.logp(world.ref_logp + 0.5 * world.score.flip(1))
    assert draws.targets.beta == 1  # where the other is the objective on the labels' expectation
    difference = (dpo(logp, draws.targets) - tilted_pairwise(logp, draws.targets)).view(-1, 4).sum(1)

    z = difference.mean() / (difference.std() / len(difference) ** 0.5)
    assert abs(z) < 4
    assert difference.std() > 0


@pytest.mark.parametrize("name", ALL)
def test_a_prompt_of_one_response_and_far_scores_give_finite_gradients(name: str) -> None:
    logp = torch.tensor([-1.0, -800.0, -2.0, -3.0], requires_grad=True)
    targets = Targets(
        ref_logp=torch.tensor([-1.5, -2.0, -700.0, -3.0]),
        weight=torch.tensor([1.0, 0.0, 1.0, 0.0]),
        score=torch.tensor([3.0, -500.0, 500.0, 0.0]),
        label_noise=torch.zeros(4),
        n_samples=torch.tensor([1, 3, 3, 3]),
        group=torch.tensor([0, 1, 1, 1]),
        beta=torch.tensor(1.0),
    )
    LOSSES[name](logp, targets).sum().backward()

    assert torch.isfinite(logp.grad).all()


@pytest.mark.parametrize("name", ALL)
def test_whole_groups_may_be_split_at_will(name: str) -> None:
    world = build_tabular_world(n_prompts=2, n_responses=50, seed=0)
    draws = draw_responses(world, n_samples=12, group_size=4, seed=0)
    targets, logp = draws.targets, draws.logp(world.ref_logp.flip(1))

    def loss(rows: slice) -> torch.Tensor:
        part = {field: value if value.dim() == 0 else value[rows] for field, value in vars(targets).items()}
        part["group"] = part["group"] - part["group"].min()
        return LOSSES[name](logp[rows], Targets(**part))

    torch.testing.assert_close(torch.cat([loss(slice(0, 8)), loss(slice(8, 24))]), loss(slice(0, 24)))


@pytest.mark.parametrize("objective", NOISELESS)
def test_pairs_that_no_reference_drew_give_the_gibbs_policy_too(objective: str) -> None:
    """Neighbours in a cycle of the responses: nothing is as likely as under the reference, and all are connected."""
    world = build_tabular_world(n_prompts=2, n_responses=12, seed=3)
    draws = pair_neighbours(world)

    assert total_variation(fit(objective, world, draws), world.tilted) < 1e-3


def test_the_sum_with_a_tenth_of_the_likelihood_is_that() -> None:
    draws = draw_responses(build_tabular_world(n_prompts=2, n_responses=50, seed=0), n_samples=8, group_size=4, seed=0)
    logp = draws.targets.ref_logp.flip(0)
    wanted = tilted_pairwise(logp, draws.targets) + 0.1 * tilted_nll(logp, draws.targets)
    torch.testing.assert_close(pairwise_with_nll(logp, draws.targets), wanted)


@pytest.mark.parametrize("name", ALL)
def test_an_objective_needs_what_its_row_says(name: str) -> None:
    draws = draw_responses(build_tabular_world(n_prompts=2, n_responses=50, seed=0), n_samples=8, group_size=4, seed=0)
    targets = draws.targets
    unread = replace(targets, ref_logp=torch.full_like(targets.ref_logp, torch.nan))
    assert bool(LOSSES[name](targets.ref_logp, unread).isnan().any()) == ALL[name].uses_reference

    # Responses by themselves teach nothing where they are compared with each other; the likelihood they do.
    alone = replace(targets, group=torch.arange(len(targets.score)))
    logp = targets.ref_logp.flip(0).requires_grad_()
    LOSSES[name](logp, alone).sum().backward()
    assert logp.grad.abs().max() < 1e-12 if ALL[name].any_source else logp.grad.abs().max() > 0.01

    # Only what weighs responses by the tilted weight alone has nothing to say of one without any.
    without = replace(targets, weight=torch.zeros_like(targets.weight))
    silent = not LOSSES[name](targets.ref_logp.flip(0), without).any()
    assert silent == ALL[name].may_skip
