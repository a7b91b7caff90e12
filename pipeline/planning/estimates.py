"""Tokens, time and memory of a run before anything of it exists, each by a formula with stated assumptions.

Good to a factor of two or three: they say whether a run takes an hour or a week, and on what it fits.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.contracts.section import Dtype

DECODING = 0.15
"""Share of a device's peak rate that drawing tokens reaches: it waits for memory."""

READING = 0.3
"""The same for whole sequences, forward only."""

TRAINING = 0.3
"""The same for training."""

MOST_DRAWN = 10_000
"""Tokens a second that a device draws at most, however small the model: the rest is scheduling."""

RESPONSE_SHARE = 0.5
"""Length of a response, as a share of the limit."""

PROMPT_TOKENS = 100
"""Tokens of a prompt with its template, where the prompts are not here to be read."""

CHARACTERS_PER_TOKEN = 4.0

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_LOGITS = 2**25
"""Logits that training holds at a time (docs/stage2.md)."""


@dataclass(frozen=True)
class Device:
    """An accelerator by its data sheet: memory in GB, dense peak rates in FLOP/s."""

    name: str
    memory_gb: float
    bfloat16: float
    float32: float

    def rate(self, dtype: Dtype) -> float:
        """Peak rate of a type, FLOP/s; torch's default for float32 uses no tensor cores."""
        return self.float32 if dtype == "float32" else self.bfloat16


DEVICES = (
    Device("24 GB (as RTX 4090)", 24, 165e12, 83e12),
    Device("48 GB (as RTX A6000)", 48, 155e12, 39e12),
    Device("80 GB (as A100)", 80, 312e12, 19.5e12),
)


@dataclass(frozen=True)
class Size:
    """How large a model is; None where it is not known.

    Attributes:
        parameters: number of weights.
        layers: transformer layers.
        hidden: width of the residual stream.
        kv_width: width of the keys of one token in one layer.
        intermediate: width of the feed-forward layers.
        decoder: whether attention is causal, so that responses to a prompt share its keys and values.
    """

    parameters: int
    layers: int | None = None
    hidden: int | None = None
    kv_width: int | None = None
    intermediate: int | None = None
    decoder: bool = True


@dataclass(frozen=True)
class Work:
    """Tokens through a model.

    Attributes:
        what: of the run this is.
        tokens: how many.
        flops_per_token: 2N forward, 4N forward and back through fixed weights, 6N through trained ones.
        utilisation: share of the peak rate.
        dtype: of the arithmetic.
        drawn: whether the tokens are drawn one after another.
    """

    what: str
    tokens: float
    flops_per_token: float
    utilisation: float
    dtype: Dtype
    drawn: bool = False

    def seconds(self, device: Device) -> float:
        """Time on one device."""
        computing = self.tokens * self.flops_per_token / (device.rate(self.dtype) * self.utilisation)
        return max(computing, self.tokens / MOST_DRAWN) if self.drawn else computing


def draw(what: str, *, tokens: float, parameters: int, dtype: Dtype) -> Work:
    """Drawing tokens: 2N FLOPs each."""
    return Work(what, tokens, 2.0 * parameters, DECODING, dtype, drawn=True)


def read(what: str, *, tokens: float, parameters: int, dtype: Dtype) -> Work:
    """Scores or log-probabilities of whole sequences: 2N FLOPs a token."""
    return Work(what, tokens, 2.0 * parameters, READING, dtype)


def train(what: str, *, tokens: float, parameters: int, dtype: Dtype, adapter: bool, recomputes: bool = False) -> Work:
    """Training: 6N FLOPs a token, 4N where the weights are fixed beside an adapter, 2N more with checkpointing."""
    factor = (4.0 if adapter else 6.0) + (2.0 if recomputes else 0.0)
    return Work(what, tokens, factor * parameters, TRAINING, dtype)


def kv_bytes_per_token(size: Size, dtype: Dtype) -> int | None:
    """Keys and values of one token: 2 · layers · width of the keys · bytes."""
    if size.layers is None or size.kv_width is None:
        return None
    return 2 * size.layers * size.kv_width * _BYTES[dtype]


def weight_bytes(size: Size, dtype: Dtype) -> int:
    """The weights alone."""
    return size.parameters * _BYTES[dtype]


def sequences_at_once(
    size: Size, dtype: Dtype, *, device: Device, share: float, tokens: float, at_most: int
) -> int | None:
    """Sequences of full length whose keys and values fit beside the weights; None where the size is not known.

    Args:
        size: of the model.
        dtype: of weights and cache.
        device: where.
        share: of its memory that may be used.
        tokens: of prompt and response.
        at_most: decoded at the same time.
    """
    cache = kv_bytes_per_token(size, dtype)
    if cache is None:
        return None
    free = share * device.memory_gb * 1e9 - weight_bytes(size, dtype)
    return min(at_most, max(0, math.floor(free / (cache * tokens))))


def scoring_bytes(sizes: Sequence[Size], dtype: Dtype, *, batch_tokens: int) -> int | None:
    """Weights, and the keys and values of up to four batches that share prompts (docs/scorers.md)."""
    total = 0
    for size in sizes:
        cache = kv_bytes_per_token(size, dtype) if size.decoder else 0
        if cache is None:
            return None
        total += weight_bytes(size, dtype) + 4 * batch_tokens * cache
    return total


def adapter_parameters(size: Size, *, rank: int, modules: str | Sequence[str]) -> int | None:
    """Weights of low-rank updates: rank · (in + out) of each layer's named matrices; None where not known."""
    if size.layers is None or size.hidden is None or size.kv_width is None or size.intermediate is None:
        return None
    through = {
        "q_proj": 2 * size.hidden,
        "k_proj": size.hidden + size.kv_width,
        "v_proj": size.hidden + size.kv_width,
        "o_proj": 2 * size.hidden,
        "gate_proj": size.hidden + size.intermediate,
        "up_proj": size.hidden + size.intermediate,
        "down_proj": size.hidden + size.intermediate,
    }
    named = {"all-linear": list(through), **{name: [name] for name in through}}
    if isinstance(modules, str) and modules not in named:  # a pattern of whole names, as peft reads it
        places = {name: f"{'mlp' if name in _OF_MLP else 'self_attn'}.{name}" for name in through}
        matched = [
            width
            for layer in range(size.layers)
            for name, width in through.items()
            if re.fullmatch(modules, f"model.layers.{layer}.{places[name]}")
        ]
        return rank * sum(matched) or None
    names = named[modules] if isinstance(modules, str) else list(modules)
    if not set(names) <= set(through):
        return None
    return size.layers * rank * sum(through[name] for name in names)


_OF_MLP = {"gate_proj", "up_proj", "down_proj"}


def training_bytes(
    size: Size,
    *,
    dtype: Literal["float32", "bfloat16"],
    adapter: Literal["none", "lora", "qlora"],
    trained: int,
    microbatch: int,
    recomputes: bool,
) -> int | None:
    """Memory of training: weights, gradients, two moments of AdamW, activations and a chunk of logits.

    What is trained takes 16 bytes a weight (all in float32); fixed weights take those of ``dtype``, or 0.55 bytes in 4
    bits. Activations are 34 bytes a token, layer and unit of width in 16 bits, twice that in 32; with checkpointing,
    one input a layer and one layer whole. Logits, their softmax and gradient are three times 2^25 in float32.

    Args:
        size: of the model.
        dtype: of the arithmetic.
        adapter: what is trained.
        trained: weights that are trained.
        microbatch: tokens in memory at once.
        recomputes: whether activations are computed anew in the backward pass.
    """
    if size.layers is None or size.hidden is None:
        return None
    fixed = {"none": 0.0, "lora": float(_BYTES[dtype]), "qlora": 0.55}[adapter] * size.parameters
    one_layer = 17 * _BYTES[dtype] * microbatch * size.hidden
    inputs = size.layers * _BYTES[dtype] * microbatch * size.hidden
    activations = inputs + one_layer if recomputes else size.layers * one_layer
    return round(fixed + 16 * trained + activations + 3 * 4 * _LOGITS)


def table_bytes(*, tokens: float, rows: float, n_scorers: int) -> float:
    """Parquet of samples and scores, and the tilted table: 4 + 2 bytes a token, 44 bytes a score."""
    return 6 * tokens + 44 * rows * n_scorers


def mapped_bytes(*, rows: float, response: float, prompts: float, prompt: float) -> float:
    """What training maps while it runs: 4 bytes a token, prompts once each, 72 bytes a response (docs/stage2.md).

    Args:
        rows: responses.
        response: tokens of one.
        prompts: how many there are.
        prompt: tokens of one.
    """
    return rows * (4 * response + 72) + 4 * prompts * prompt


def policy_bytes(size: Size, *, trained: int) -> float:
    """The merged policy in float32, and while it trains two checkpoints of weights and moments."""
    return 4 * size.parameters + 2 * 12 * trained


def stored_bytes(size: Size) -> float:
    """Files of a model that is still to be fetched: 2 bytes a weight from a billion weights on, else 4."""
    return size.parameters * (2 if size.parameters >= 1e9 else 4)
