"""Samples from transformers, for machines where vLLM does not run.

A decoding loop of its own, because ``generate`` has one random state for a whole batch: here each row draws from its
own stream, so that its batch mates decide nothing but the last bits of its logits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np

from pipeline.contracts.errors import import_failure
from pipeline.contracts.section import Dtype
from pipeline.networks import load_network
from stage1_dual.sampling.protocol import (
    THE_POLICY,
    Distribution,
    FinishReason,
    OnTokens,
    SampledCompletion,
    SampleRequest,
)
from stage1_dual.sampling.rendering import load_tokenizer
from stage1_dual.sampling.tokens import decode_completions, find_eos_token_ids

if TYPE_CHECKING:
    import torch


class TransformersSampler:
    """Draws samples with a transformers model, in batches of similar prompt length.

    Args:
        checkpoint: folder of a causal language model, or its id on the Hub.
        revision: branch, tag or commit of a Hub model.
        max_new_tokens: length limit of a completion, tokens.
        dtype: of weights and arithmetic; the reference policy is the model in this precision.
        distribution: what to draw from.
        batch_rows: completions computed at once.
        device: torch device.

    Raises:
        MissingExtraError: torch or transformers is not installed.
        InputError: the model cannot be loaded.
    """

    def __init__(
        self,
        checkpoint: str,
        *,
        revision: str | None = None,
        max_new_tokens: int,
        dtype: Dtype = "float32",
        distribution: Distribution = THE_POLICY,
        batch_rows: int = 128,
        device: str = "cpu",
    ) -> None:
        try:
            import torch
            from transformers import AutoModelForCausalLM
        except ImportError as error:
            raise import_failure(
                error, package="transformers", extra="sample", purpose="sampling with transformers"
            ) from error
        self._checkpoint = checkpoint
        self._revision = revision
        self._max_new_tokens = max_new_tokens
        self._dtype = dtype
        self._distribution = distribution
        self._batch_rows = batch_rows
        self._tokenizer = load_tokenizer(checkpoint, revision=revision)
        self._eos_token_ids = find_eos_token_ids(checkpoint, self._tokenizer, revision=revision)
        model = load_network(
            AutoModelForCausalLM, checkpoint, dtype=getattr(torch, dtype), what="the policy", revision=revision
        )
        self._model = model.to(device)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a completion, ascending."""
        return self._eos_token_ids

    @property
    def feeds_on(self) -> bool:
        """No: rows of like prompts are drawn together, a shard at a time."""
        return False

    def stream(
        self, requests: Iterable[SampleRequest], *, on_tokens: OnTokens | None = None
    ) -> Iterator[tuple[SampleRequest, SampledCompletion]]:
        """One completion a request, batch by batch, those of short prompts first."""
        import torch

        ordered = sorted(requests, key=lambda request: len(request.prompt_token_ids))
        for start in range(0, len(ordered), self._batch_rows):
            batch = ordered[start : start + self._batch_rows]
            with torch.inference_mode():
                drawn = self._draw(batch, on_tokens)
            texts = decode_completions(self._tokenizer, [ids for ids, _ in drawn])
            for request, text, (ids, logp) in zip(batch, texts, drawn, strict=True):
                yield request, SampledCompletion(text, ids, self._finish_reason(ids), logp)

    def describe(self) -> Mapping[str, object]:
        """The resolved sampling parameters, JSON-serialisable."""
        return {
            "sampler": "transformers",
            "model": self._checkpoint,
            "revision": self._revision,
            "dtype": self._dtype,
            **asdict(self._distribution),
            "repetition_penalty": 1.0,
            "max_new_tokens": self._max_new_tokens,
            "eos_token_ids": list(self._eos_token_ids),
        }

    def close(self) -> None:
        """Free the model."""
        self._model = None

    def _finish_reason(self, token_ids: Sequence[int]) -> FinishReason:
        return "stop" if token_ids[-1] in self._eos_token_ids else "length"

    def _draw(
        self, requests: Sequence[SampleRequest], on_tokens: OnTokens | None
    ) -> list[tuple[tuple[int, ...], float]]:
        """Tokens and summed log-probability of each request of one batch; finished rows leave the batch."""
        import torch
        from transformers import DynamicCache

        from stage1_dual.sampling.draws import build_warper, draw_tokens, log_probabilities, uniforms_of

        warp = build_warper(self._distribution)
        device = self._model.device
        limit = self._max_new_tokens
        uniforms = torch.from_numpy(np.stack([uniforms_of(request.seed, n_tokens=limit) for request in requests]))
        uniforms = uniforms.to(device)
        eos = torch.tensor(self._eos_token_ids, device=device)
        rows = torch.arange(len(requests), device=device)  # which request each row of the shrinking batch belongs to
        tokens, mask = (part.to(device) for part in _left_padded([request.prompt_token_ids for request in requests]))
        cache = DynamicCache(config=self._model.config)
        drawn: list[list[int]] = [[] for _ in requests]
        logp = torch.zeros(len(requests), dtype=torch.float64, device=device)
        for step in range(limit):
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
            logits = self._model(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1, :]
            chosen, logp_of_chosen = draw_tokens(warp(logits), uniforms[rows, step])
            if not self._distribution.is_the_policy:
                logp_of_chosen = log_probabilities(logits, chosen)
            logp[rows] += logp_of_chosen
            if on_tokens is not None:
                on_tokens(len(chosen))
            for row, token in zip(rows.tolist(), chosen.tolist(), strict=True):
                drawn[row].append(token)
            going = torch.nonzero(~torch.isin(chosen, eos))[:, 0]
            if len(going) == 0:
                break
            if len(going) < len(rows):
                rows, chosen, mask = rows[going], chosen[going], mask[going]
                cache.batch_select_indices(going)
            tokens = chosen[:, None]
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=-1)
        return [(tuple(ids), value) for ids, value in zip(drawn, logp.tolist(), strict=True)]


def _left_padded(token_ids: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids padded in front, and their mask, each (rows, longest); what the padding holds is never attended to."""
    import torch

    longest = max(len(ids) for ids in token_ids)
    tokens = torch.tensor([[0] * (longest - len(ids)) + list(ids) for ids in token_ids])
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in token_ids])
    return tokens, mask
