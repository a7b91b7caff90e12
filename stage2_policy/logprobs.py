"""Log-probabilities of responses under a causal language model, from the token ids that were sampled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import distributed
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import Cache, PreTrainedModel

from pipeline.contracts.errors import InputError
from pipeline.progress import progress_bar

TokenIds = Sequence[int] | np.ndarray
IGNORED = -100
LOGITS_AT_ONCE = 2**25
"""Logits in memory at a time, 128 MiB in float32: 256 positions of a vocabulary of 128 thousand."""
_SHARING = 16
"""Completions of a prompt that are scored in one batch: more save little of the prompt, and cost padding."""
_LOGITS_ARE_CHANGED = (
    "final_logit_softcapping",
    "lm_head_multiplier",
    "logit_scale",
    "logits_scaling",
    "output_multiplier",
    "logits_soft_cap",
    "output_logit_soft_cap",
    "output_multiplier_scale",
)
"""Settings of models that change their logits behind the head. All logits of a batch are computed for these."""


_ATTENDS_TO_PREFIX = {"full_attention", "sliding_attention", "chunked_attention"}


@dataclass(frozen=True)
class SequenceBatch:
    """Prompts once each, and completions that refer to them.

    All but the last token of a prompt is its prefix, padded on the left. A completion's row feeds the prompt's last
    token and the completion without its last one, padded on the right, so that each fed token predicts one target.

    Attributes:
        prefix_ids: shape (u, prefix).
        prefix_mask: 1 where there is a token, same shape.
        prefix_positions: counted from each prompt's first token, same shape.
        prefix_of_row: row of ``prefix_ids`` each completion continues, shape (n,).
        input_ids: shape (n, completion).
        attention_mask: 1 where there is a token, shape (n, prefix + completion).
        position_ids: counted from each prompt's first token, shape (n, completion).
        targets: the completion's token ids, :data:`IGNORED` behind its end, shape (n, completion).
    """

    prefix_ids: torch.Tensor
    prefix_mask: torch.Tensor
    prefix_positions: torch.Tensor
    prefix_of_row: torch.Tensor
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    targets: torch.Tensor


def can_share_prompts(model: torch.nn.Module) -> bool:
    """Whether what a model keeps of a prompt are keys and values, which serve several completions.

    Recurrent and convolutional layers keep a state instead; their rows are fed whole.
    """
    inner = _pretrained(model)
    if inner._is_stateful:
        return False
    layers = getattr(inner.config.get_text_config(), "layer_types", None)
    return layers is None or set(layers) <= _ATTENDS_TO_PREFIX


def _pretrained(model: torch.nn.Module) -> PreTrainedModel:
    return next(module for module in model.modules() if isinstance(module, PreTrainedModel))


def build_batch(sequences: Sequence[tuple[TokenIds, TokenIds]], *, share_prompts: bool = True) -> SequenceBatch:
    """Pad pairs of prompt and completion token ids; equal prompts are kept once.

    Args:
        sequences: pairs of prompt and completion token ids.
        share_prompts: without it each row is fed whole, its prompt too, and the prefixes are empty: what a model needs
            that keeps no cache while it trains, as with gradient checkpointing, or that cannot share it
            (:func:`can_share_prompts`).

    Raises:
        InputError: a prompt or a completion has no tokens.
    """
    for place, (prompt, completion) in enumerate(sequences):
        if len(prompt) == 0 or len(completion) == 0:
            part = "prompt" if len(prompt) == 0 else "completion"
            raise InputError(f"sequence {place} has a {part} without tokens; both need at least one")
    if not share_prompts:
        return _build_whole_rows(sequences)
    places: dict[tuple[int, ...], int] = {}
    prefix_of_row = np.array([places.setdefault(tuple(prompt), len(places)) for prompt, _ in sequences])
    prompt_length = np.array([len(prompt) for prompt in places])
    width = max(1, int(prompt_length.max()) - 1)
    prefix_ids = np.zeros((len(places), width), dtype=np.int64)
    for prompt, row in places.items():
        prefix_ids[row, width - len(prompt) + 1 :] = prompt[:-1]
    prefix_positions = np.arange(width) - (width - prompt_length[:, None] + 1)
    prefix_mask = prefix_positions >= 0

    completion_length = np.array([len(completion) for _, completion in sequences])
    tail = int(completion_length.max())
    present = np.arange(tail) < completion_length[:, None]
    targets = np.full((len(sequences), tail), IGNORED, dtype=np.int64)
    targets[present] = np.concatenate([np.asarray(completion) for _, completion in sequences])
    last_of_prompt = np.array([[prompt[-1]] for prompt, _ in sequences])
    fed = np.concatenate([last_of_prompt, np.where(targets == IGNORED, 0, targets)[:, :-1]], axis=1)
    return SequenceBatch(
        prefix_ids=torch.from_numpy(prefix_ids),
        prefix_mask=torch.from_numpy(prefix_mask.astype(np.int64)),
        prefix_positions=torch.from_numpy(np.maximum(prefix_positions, 0)),
        prefix_of_row=torch.from_numpy(prefix_of_row),
        input_ids=torch.from_numpy(fed),
        attention_mask=torch.from_numpy(np.hstack([prefix_mask[prefix_of_row], present]).astype(np.int64)),
        position_ids=torch.from_numpy(prompt_length[prefix_of_row][:, None] - 1 + np.arange(tail)),
        targets=torch.from_numpy(targets),
    )


def _build_whole_rows(sequences: Sequence[tuple[TokenIds, TokenIds]]) -> SequenceBatch:
    n_rows, width = len(sequences), max(len(prompt) + len(done) for prompt, done in sequences) - 1
    fed = np.zeros((n_rows, width), dtype=np.int64)
    targets = np.full((n_rows, width), IGNORED, dtype=np.int64)
    present = np.zeros((n_rows, width), dtype=np.int64)
    for row, (prompt, completion) in enumerate(sequences):
        tokens = np.concatenate([prompt, completion])
        fed[row, : len(tokens) - 1] = tokens[:-1]
        present[row, : len(tokens) - 1] = 1
        targets[row, len(prompt) - 1 : len(tokens) - 1] = completion
    nothing = torch.zeros((n_rows, 0), dtype=torch.int64)
    return SequenceBatch(
        prefix_ids=nothing,
        prefix_mask=nothing,
        prefix_positions=nothing,
        prefix_of_row=torch.arange(n_rows),
        input_ids=torch.from_numpy(fed),
        attention_mask=torch.from_numpy(present),
        position_ids=torch.arange(width).repeat(n_rows, 1),
        targets=torch.from_numpy(targets),
    )


def sequence_logp(model: torch.nn.Module, batch: SequenceBatch) -> torch.Tensor:
    """Log pi(completion | prompt) of each row, nats, float32, shape (n,); differentiable.

    Each prompt goes through the model once, and its keys and values serve all its completions. The head is applied to
    the positions that predict a completion token only, a few at a time: no more than :data:`LOGITS_AT_ONCE` logits
    exist at any moment, in the backward pass neither. They are computed again in that pass where the head is trained.

    Args:
        model: a causal language model, wrapped for training on several processes or not.
        batch: what is scored.

    Raises:
        InputError: the model changes its logits behind its head in a way that is not known here.
    """
    cache = None
    if batch.prefix_ids.shape[1] > 0:
        cache = model(
            input_ids=batch.prefix_ids,
            attention_mask=batch.prefix_mask,
            position_ids=batch.prefix_positions,
            use_cache=True,
            logits_to_keep=1,
        ).past_key_values
        cache.batch_select_indices(batch.prefix_of_row)
    inner = _pretrained(model)
    if any(getattr(inner.config.get_text_config(), name, None) is not None for name in _LOGITS_ARE_CHANGED):
        logits = _feed(model, batch, cache)
        present = batch.targets != IGNORED
        return _scatter(_token_logp(logits[present], batch.targets[present]), present).sum(dim=1)
    with _TargetHead(inner, batch.targets) as head:
        logp = _feed(model, batch, cache)
    if not torch.equal(logp.nan_to_num(), head.logp.nan_to_num()):
        raise InputError(
            f"the model {type(inner).__name__} changes its logits behind its head, which is not supported: "
            f"none of {', '.join(_LOGITS_ARE_CHANGED)} is set in its configuration"
        )
    return logp.sum(dim=1)


def _feed(model: torch.nn.Module, batch: SequenceBatch, cache: Cache | None) -> torch.Tensor:
    logits: torch.Tensor = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        past_key_values=cache,
        use_cache=cache is not None,
    ).logits
    return logits


class _TargetHead:
    """Makes a model's head return the log-probability of each target instead of all logits, shape (n, completion).

    It stays inside the model's own forward, where wrappers that gather or reduce weights expect it to run.

    Attributes:
        logp: what the head returned.
    """

    logp: torch.Tensor

    def __init__(self, model: PreTrainedModel, targets: torch.Tensor) -> None:
        self._head: torch.nn.Module = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        self._logits_of = self._head.forward
        self._vocabulary = model.config.get_text_config().vocab_size
        self._targets = targets

    def __enter__(self) -> _TargetHead:
        self._head.forward = self._forward
        return self

    def __exit__(self, *_: object) -> None:
        del self._head.forward

    def _forward(self, hidden: torch.Tensor) -> torch.Tensor:
        present = self._targets != IGNORED
        size = max(1, LOGITS_AT_ONCE // self._vocabulary)
        parts = list(zip(torch.split(hidden[present], size), torch.split(self._targets[present], size), strict=True))
        if torch.is_grad_enabled() and _is_fixed_linear(self._head):
            logp = [_FixedHead.apply(*part, self._logits_of, self._head.weight) for part in parts]  # type: ignore[no-untyped-call]
        elif len(parts) > 1 and torch.is_grad_enabled():
            logp = [checkpoint(self._part, *part, use_reentrant=False) for part in parts]
        else:
            logp = [self._part(*part) for part in parts]
        self.logp = _scatter(torch.cat(logp), present)
        return self.logp

    def _part(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return _token_logp(self._logits_of(hidden), targets)


def _is_fixed_linear(head: torch.nn.Module) -> bool:
    """Whether a head is a plain matrix that is not trained, as beside an adapter."""
    return type(head) is torch.nn.Linear and not any(weight.requires_grad for weight in head.parameters())


class _FixedHead(torch.autograd.Function):
    """Log-probabilities of targets under a head that is not trained, whose gradient is computed with them.

    The derivative of log p(target) in the hidden state is W[target] - sum_v p(v) W[v]: a vector for each target, kept
    for the backward pass in place of the logits, which are then not computed a second time.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        logits_of: Callable[[torch.Tensor], torch.Tensor],
        weight: torch.Tensor,
    ) -> torch.Tensor:
        """Log-probability of each target, float32, shape (n,); ``hidden`` has shape (n, width)."""
        logits = logits_of(hidden)
        dtype = logits.dtype
        every_logp = torch.log_softmax(logits.float(), dim=-1)
        logp = every_logp.gather(1, targets[:, None])
        less_target = every_logp.exp_()
        less_target.scatter_add_(1, targets[:, None], torch.full_like(logp, -1.0))
        ctx.save_for_backward(-(less_target.to(dtype) @ weight.to(dtype)).to(hidden.dtype))
        return logp[:, 0]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        """Gradient in the hidden states."""
        (by_hidden,) = ctx.saved_tensors
        return (gradient[:, None] * by_hidden).to(by_hidden.dtype), None, None, None


def _token_logp(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return -functional.cross_entropy(logits.float(), targets, reduction="none")


def _scatter(values: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """Values at the places that are present, zeros elsewhere."""
    return torch.zeros(present.shape, dtype=values.dtype, device=values.device).masked_scatter(present, values)


def score_sequences(
    model: torch.nn.Module,
    sequences: Sequence[tuple[TokenIds, TokenIds]],
    *,
    token_budget: int,
    show_progress: bool,
    description: str = "log-probabilities",
) -> np.ndarray:
    """Log pi(completion | prompt) of every pair of prompt and completion token ids, nats, float64, shape (n,).

    The model is put in evaluation mode for the time of the call; its dtype is that of the arithmetic. Where several
    processes train together, all of them must call: each scores a share of the batches, and all get all values.

    Args:
        model: a causal language model.
        sequences: pairs of prompt and completion token ids.
        token_budget: tokens of a batch, padding included; affects speed and memory only.
        show_progress: show a progress bar with an estimate of the time left.
        description: what the bar says.

    Raises:
        InputError: a prompt or a completion has no tokens.
    """
    logp = np.empty(len(sequences), dtype=np.float64)
    device = next(model.parameters()).device
    share_prompts = can_share_prompts(model)
    batches = list(iterate_budgeted(sequences, token_budget, share_prompts=share_prompts))
    process, n_processes = (
        (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
    )
    # The same number for each process, some batches twice: sharded weights are gathered by all at once.
    rounds = -(-len(batches) // n_processes)
    mine = [batches[(turn * n_processes + process) % len(batches)] for turn in range(rounds)]
    was_training = model.training
    model.train(False)
    try:
        with (
            torch.no_grad(),
            progress_bar(
                total=len(sequences), doing=description, unit="responses", stays=False, shown=show_progress
            ) as bar,
        ):
            for rows in mine:
                batch = move_batch(build_batch([sequences[row] for row in rows], share_prompts=share_prompts), device)
                logp[rows] = sequence_logp(model, batch).double().cpu().numpy()
                bar.update(len(rows) * n_processes)
    finally:
        model.train(was_training)
    return _gather(logp, mine) if n_processes > 1 else logp


def _gather(logp: np.ndarray, mine: Sequence[list[int]]) -> np.ndarray:
    """The values of all processes, each of which has those of its own batches."""
    shares: list[list[tuple[list[int], np.ndarray]]] = [[]] * distributed.get_world_size()
    distributed.all_gather_object(shares, [(rows, logp[rows]) for rows in mine])
    whole = np.empty_like(logp)
    for rows, values in (part for share in shares for part in share):
        whole[rows] = values
    return whole


def move_batch(batch: SequenceBatch, device: torch.device) -> SequenceBatch:
    """Copy the batch to a device."""
    return SequenceBatch(**{name: tensor.to(device) for name, tensor in vars(batch).items()})


def iterate_budgeted(
    sequences: Sequence[tuple[TokenIds, TokenIds]], token_budget: int, *, share_prompts: bool = True
) -> Iterator[list[int]]:
    """Rows in batches that share prompts and have completions of similar length.

    The tokens of a batch, distinct prompts (or one a row, where they are not shared) and completions with their
    padding, stay within the budget; a single row that exceeds it goes alone.
    """
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for row, (prompt, _) in enumerate(sequences):
        by_prompt.setdefault(tuple(prompt), []).append(row)
    runs = []
    for prompt, rows in by_prompt.items():
        rows.sort(key=lambda row: len(sequences[row][1]))
        for start in range(0, len(rows), _SHARING):
            run = rows[start : start + _SHARING]
            runs.append((len(sequences[run[-1]][1]), len(prompt), prompt, run))
    batch: list[int] = []
    prompts: set[tuple[int, ...]] = set()
    widest = tail = 0
    for _, _, prompt, run in sorted(runs):
        for row in run:
            width, height = max(widest, len(prompt)), max(tail, len(sequences[row][1]))
            n_prompts = len(prompts | {prompt}) if share_prompts else len(batch) + 1
            if batch and n_prompts * width + (len(batch) + 1) * height > token_budget:
                yield batch
                batch, prompts, width, height = [], set(), len(prompt), len(sequences[row][1])
            batch.append(row)
            prompts.add(prompt)
            widest, tail = width, height
    if batch:
        yield batch
