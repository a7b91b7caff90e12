from __future__ import annotations

import math

import pytest
import torch

from stage1_dual.sampling.draws import draw_tokens, uniforms_of


def test_frequencies_are_the_probabilities() -> None:
    logits = torch.tensor([2.0, -1.0, 0.0, 1.0, -3.0, 0.5])
    n = 100_000
    drawn = draw_tokens(logits.expand(n, -1), uniforms_of(3, n_tokens=n))
    expected = logits.double().softmax(-1)
    z = (drawn.bincount(minlength=6) - n * expected) / (n * expected * (1 - expected)).sqrt()
    assert z.abs().max() < 4


@pytest.mark.parametrize("uniform", [0.0, 0.25, 0.5, math.nextafter(1.0, 0.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_of_probability_zero_is_never_drawn(uniform: float, dtype: torch.dtype) -> None:
    logits = torch.full((1, 50_000), -math.inf, dtype=dtype)
    logits[0, 7::3] = torch.linspace(-4, 4, len(logits[0, 7::3])).to(dtype)
    token = int(draw_tokens(logits, torch.tensor([uniform], dtype=torch.float64)))
    assert logits[0, token] > -math.inf


def test_a_stream_belongs_to_its_seed_and_grows_without_change() -> None:
    assert torch.equal(uniforms_of(5, n_tokens=4), uniforms_of(5, n_tokens=9)[:4])
    assert not torch.equal(uniforms_of(5, n_tokens=4), uniforms_of(6, n_tokens=4))
    assert not torch.equal(uniforms_of(2**32 + 5, n_tokens=4), uniforms_of(5, n_tokens=4))  # all bits count
