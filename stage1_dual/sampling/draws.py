"""How a token is drawn, the same in every sampler: by inversion, from uniforms that the sample's seed fixes.

A seed then means the same tokens whatever engine, batch or thread count computes the logits, up to the rare draw that
falls within their rounding.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from stage1_dual.sampling.protocol import Distribution

Warper = Callable[[torch.Tensor], torch.Tensor]

_BLOCK = 256
"""Tokens whose probabilities are added up first; about the root of a vocabulary, so that both searches are short."""

_CELLS_CPU = 2**18
"""Logits that are drawn from at once on a CPU: in float64 they stay in a core's cache. 256 rows of 49,152 took 30 ms
of a core in parts of 2**18, 39 ms in parts of 2**20, and 144 ms as one softmax and one cumulative sum of all."""

_CELLS_DEVICE = 2**24
"""... and on an accelerator, whose memory the engine has given away: 128 MiB in float64."""


def build_warper(distribution: Distribution) -> Warper:
    """The change of logits, shape (rows, vocabulary), that makes draws from a softmax draws from ``distribution``."""
    from transformers.generation import logits_process as transformers_warpers

    warpers: list[transformers_warpers.LogitsProcessor] = []
    if distribution.temperature != 1.0:
        warpers.append(transformers_warpers.TemperatureLogitsWarper(distribution.temperature))
    if distribution.top_k > 0:
        warpers.append(transformers_warpers.TopKLogitsWarper(distribution.top_k))
    if distribution.top_p < 1.0:
        warpers.append(transformers_warpers.TopPLogitsWarper(distribution.top_p))
    if distribution.min_p > 0.0:
        warpers.append(transformers_warpers.MinPLogitsWarper(distribution.min_p))

    def warp(logits: torch.Tensor) -> torch.Tensor:
        for warper in warpers:
            logits = warper(None, logits)
        return logits

    return warp


def uniforms_of(seed: int, *, n_tokens: int) -> np.ndarray:
    """The uniform numbers in [0, 1) of one sample, one a token; shape (n_tokens,), float64.

    From NumPy, because torch's generator on the CPU keeps 32 bits of a seed: in a run of a million samples a hundred
    pairs would share their stream.
    """
    return np.random.Generator(np.random.PCG64(seed)).random(n_tokens)


def draw_tokens(logits: torch.Tensor, uniforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first token at which the cumulative probability exceeds the uniform.

    The sums run over blocks of tokens first, and then within the block that holds the uniform.

    Args:
        logits: of the next token, shape (rows, vocabulary).
        uniforms: in [0, 1), shape (rows,), float64.

    Returns:
        Token ids and the log-probability of each, nats, float64; both of shape (rows,). A token of probability zero is
        never drawn.
    """
    n_rows, n_tokens = logits.shape
    at_once = max(1, (_CELLS_CPU if logits.device.type == "cpu" else _CELLS_DEVICE) // n_tokens)
    n_blocks = -(-n_tokens // _BLOCK)
    weights = torch.zeros(min(at_once, n_rows), n_blocks * _BLOCK, dtype=torch.float64, device=logits.device)
    parts = [
        _draw(logits[start : start + at_once], uniforms[start : start + at_once, None], weights)
        for start in range(0, n_rows, at_once)
    ]
    tokens, logps = zip(*parts, strict=True)
    return torch.cat(tokens), torch.cat(logps)


def _draw(logits: torch.Tensor, uniforms: torch.Tensor, scratch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`draw_tokens` of a few rows; ``scratch`` holds zeros beyond the vocabulary."""
    n_rows, n_tokens = logits.shape
    largest = logits.amax(dim=-1, keepdim=True).double()
    torch.sub(logits, largest, out=scratch[:n_rows, :n_tokens]).exp_()
    weights = scratch[:n_rows].view(n_rows, -1, _BLOCK)
    blocks = weights.sum(dim=-1).cumsum(dim=-1)
    total = blocks[:, -1:]
    goal = uniforms * total
    block = torch.searchsorted(blocks, goal, right=True)
    before = torch.nn.functional.pad(blocks, (1, 0)).gather(1, block)
    inside = weights.gather(1, block[:, :, None].expand(-1, 1, _BLOCK))[:, 0].cumsum(dim=-1)
    # The two sums over a block differ by rounding: kept below the second, the goal lies at a token of the block.
    end = inside[:, -1:]
    goal = torch.minimum(goal - before, torch.nextafter(end, torch.zeros_like(end)))
    token = block * _BLOCK + torch.searchsorted(inside, goal, right=True)
    logp = logits.gather(1, token).double() - largest - total.log()
    return token[:, 0], logp[:, 0]


def log_probabilities(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The log-probability of one token of each row, nats, float64; shape (rows,).

    Args:
        logits: shape (rows, vocabulary).
        tokens: shape (rows,).
    """
    at_once = max(1, (_CELLS_CPU if logits.device.type == "cpu" else _CELLS_DEVICE) // logits.shape[1])
    starts = range(0, len(logits), at_once)
    totals = [logits[start : start + at_once].double().logsumexp(dim=-1) for start in starts]
    return logits.gather(1, tokens[:, None])[:, 0].double() - torch.cat(totals)
