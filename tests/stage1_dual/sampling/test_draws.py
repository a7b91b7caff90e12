from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from stage1_dual.sampling.draws import draw_tokens, log_probabilities, uniforms_of


def test_frequencies_are_the_probabilities() -> None:
    logits = torch.tensor([2.0, -1.0, 0.0, 1.0, -3.0, 0.5])
    n = 100_000
    drawn, logp = draw_tokens(logits.expand(n, -1), torch.from_numpy(uniforms_of(3, n_tokens=n)))
    expected = logits.double().softmax(-1)
    z = (drawn.bincount(minlength=6) - n * expected) / (n * expected * (1 - expected)).sqrt()
    assert z.abs().max() < 4
    assert torch.allclose(logp, expected.log()[drawn], rtol=0, atol=1e-14)


@pytest.mark.parametrize("uniform", [0.0, 0.25, 0.5, math.nextafter(1.0, 0.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_of_probability_zero_is_never_drawn(uniform: float, dtype: torch.dtype) -> None:
    logits = torch.full((1, 50_000), -math.inf, dtype=dtype)
    logits[0, 7::3] = torch.linspace(-4, 4, len(logits[0, 7::3])).to(dtype)
    drawn, logp = draw_tokens(logits, torch.tensor([uniform], dtype=torch.float64))
    assert logits[0, drawn] > -math.inf
    assert logp > -math.inf


@pytest.mark.parametrize("n_tokens", [5, 256, 1000, 49_152])
def test_it_is_inversion_of_the_whole_distribution(n_tokens: int) -> None:
    # Another way to add up the same float64 numbers: a draw differs where the uniform lies within rounding, 1e-13.
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(37, n_tokens, generator=generator)
    logits[:, ::7] = -math.inf
    logits[:, -1] = 2.0
    uniforms = torch.rand(37, generator=generator, dtype=torch.float64)
    uniforms[0], uniforms[1] = 0.0, math.nextafter(1.0, 0.0)
    drawn, logp = draw_tokens(logits, uniforms)
    probabilities = logits.double().softmax(-1)
    assert torch.equal(drawn, (probabilities.cumsum(-1) <= uniforms[:, None]).sum(-1).clamp(max=n_tokens - 1))
    expected = logits.double().log_softmax(-1).gather(1, drawn[:, None])[:, 0]
    assert torch.allclose(logp, expected, rtol=0, atol=1e-13)
    assert torch.allclose(log_probabilities(logits, drawn), expected, rtol=0, atol=1e-13)


def test_a_stream_belongs_to_its_seed_and_grows_without_change() -> None:
    assert np.array_equal(uniforms_of(5, n_tokens=4), uniforms_of(5, n_tokens=9)[:4])
    assert not np.array_equal(uniforms_of(5, n_tokens=4), uniforms_of(6, n_tokens=4))
    assert not np.array_equal(uniforms_of(2**32 + 5, n_tokens=4), uniforms_of(5, n_tokens=4))  # all bits count
