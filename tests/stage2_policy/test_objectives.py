from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.tabular_policies import TabularWorld, build_tabular_world, minimise, total_variation

from pipeline.contracts.errors import InputError
from stage2_policy.objectives import OBJECTIVES, Targets, read_objective, tilted_kl, tilted_nll


def enumerated(world: TabularWorld) -> Targets:
    """Every response once: as a sample of pi_ref, response y stands for a share pi_ref(y) of the draws.

    The tilted weight of that share is pi_lambda(y).
    """
    draws = 1.0 / world.ref_logp.exp()
    largest = (world.tilted * draws).max(dim=1, keepdim=True).values.expand_as(draws)
    return Targets(ref_logp=world.ref_logp, weight=world.tilted, n_samples=draws, largest_ratio=largest)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("seed", [0, 1])
def test_exact_weights_trained_to_the_end_give_the_gibbs_policy(name: str, seed: int) -> None:
    world = build_tabular_world(n_prompts=3, n_responses=50, seed=seed)
    targets = enumerated(world)

    policy = minimise(lambda logp: OBJECTIVES[name].row_loss(logp, targets).sum(), world.ref_logp)

    assert total_variation(policy, world.tilted) < 1e-3
    assert total_variation(world.ref_logp.exp(), world.tilted) > 0.1


def test_kl_form_has_the_mean_gradient_of_the_likelihood() -> None:
    world = build_tabular_world(n_prompts=3, n_responses=50, seed=2)
    targets = enumerated(world)
    noise = 0.1 * torch.randn(3, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    start = world.ref_logp + 0.4 * world.score + noise
    assert torch.all(start.log_softmax(1) - world.ref_logp < targets.largest_ratio.log())
    gradients = []
    for objective in (tilted_nll, tilted_kl):
        logits = start.clone().requires_grad_()
        objective(torch.log_softmax(logits, dim=1), targets).sum().backward()
        gradients.append(logits.grad)

    assert gradients[0].norm() > 0.1
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-12)


def test_no_ratio_pulls_harder_than_the_largest_tilted_one() -> None:
    # K = 4, w = 1/2, largest tilted ratio 2: the slope in log pi is -w + rho / K up to rho = 2, and -w + 2 / K above.
    logp = torch.tensor([-1.0, 0.0, 0.5, 10.0], dtype=torch.float64, requires_grad=True)
    full = torch.ones(4, dtype=torch.float64)
    tilted_kl(
        logp, Targets(ref_logp=0 * full, weight=0.5 * full, n_samples=4 * full, largest_ratio=2 * full)
    ).sum().backward()

    rho = torch.tensor([-1.0, 0.0, 0.5], dtype=torch.float64).exp()
    torch.testing.assert_close(logp.grad, torch.cat([-0.5 + rho / 4, torch.zeros(1, dtype=torch.float64)]))


def test_gradients_on_samples_are_unbiased_and_the_kl_form_is_noiseless_at_the_optimum() -> None:
    # K draws from pi_ref with the exact weight exp(score) / (K Z): the mean over many draws is the exact gradient.
    world = build_tabular_world(n_prompts=1, n_responses=50, seed=3)
    ref, tilted = world.ref_logp.exp()[0], world.tilted[0]
    n_samples, n_repeats = 32, 4000
    drawn = torch.multinomial(
        ref, n_samples * n_repeats, replacement=True, generator=torch.Generator().manual_seed(1)
    ).view(n_repeats, n_samples)
    weight = (tilted / ref)[drawn] / n_samples

    def gradient(objective: object, policy_logits: torch.Tensor) -> torch.Tensor:
        logp = torch.log_softmax(policy_logits, dim=0)
        drawn_logp = logp[drawn].requires_grad_()
        targets = Targets(
            ref_logp=world.ref_logp[0][drawn],
            weight=weight,
            n_samples=torch.tensor(n_samples),
            largest_ratio=(tilted / ref).max(),
        )
        OBJECTIVES[objective].row_loss(drawn_logp, targets).sum().backward()
        coefficient = torch.zeros(n_repeats, 50, dtype=torch.float64).scatter_add(1, drawn, drawn_logp.grad)
        # d logp_y / d logit_v = 1[y = v] - pi_v
        return coefficient - coefficient.sum(1, keepdim=True) * logp.exp()

    away = world.ref_logp[0] + 0.3 * world.score[0]
    exact = away.softmax(0) - tilted
    for name in OBJECTIVES:
        estimates = gradient(name, away)
        z = (estimates.mean(0) - exact) / (estimates.std(0) / n_repeats**0.5)
        assert z.abs().max() < 4.5, name  # the largest of 50 normal deviates
    noise = {name: gradient(name, tilted.log()).norm(dim=1).mean() for name in OBJECTIVES}
    assert noise["tilted_nll"] > 0.05
    assert noise["tilted_kl"] < 1e-12


def test_error_on_samples_falls_as_one_over_the_root_of_their_number() -> None:
    # Self-normalised weights of K draws; an unrestricted policy trained to the end on them.
    world = build_tabular_world(n_prompts=3, n_responses=50, seed=4)
    generator = torch.Generator().manual_seed(0)

    def error(n_samples: int) -> float:
        drawn = torch.multinomial(world.ref_logp.exp(), n_samples, replacement=True, generator=generator)
        weight = world.score.gather(1, drawn).softmax(1)
        targets = Targets(
            ref_logp=world.ref_logp.gather(1, drawn),
            weight=weight,
            n_samples=torch.tensor(n_samples),
            largest_ratio=n_samples * weight.max(dim=1, keepdim=True).values,
        )
        policy = minimise(lambda logp: tilted_kl(logp.gather(1, drawn), targets).sum(), world.ref_logp)
        return total_variation(policy, world.tilted)

    few, many = error(500), error(8000)
    assert many < few / 2  # theory: a factor of 4
    assert many < 0.05


def test_unknown_objective_is_named() -> None:
    with pytest.raises(InputError, match=r"objective is `tilted`; it must be one of tilted_nll, tilted_kl"):
        read_objective("tilted")


def test_rows_of_a_prompt_may_be_split_at_will() -> None:
    rng = np.random.default_rng(0)
    logp, *values = (torch.from_numpy(rng.uniform(0.1, 2.0, size=10)) for _ in range(5))
    for objective in OBJECTIVES.values():
        parts = [
            objective.row_loss(logp[part], Targets(*(value[part] for value in values)))
            for part in (slice(0, 3), slice(3, 10))
        ]
        torch.testing.assert_close(torch.cat(parts), objective.row_loss(logp, Targets(*values)))
