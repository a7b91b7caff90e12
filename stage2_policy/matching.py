"""After training: a policy is moved until its mean scores are what the dual predicts, as held-out responses tell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from peft import PeftModel

from stage2_policy.adapters import load_reference
from stage2_policy.data import TrainingData, TrainingResponses
from stage2_policy.logprobs import score_sequences
from stage2_policy.parts import SLOPE_STEP, choose_part_factors, measure_gaps, parts_of
from stage2_policy.reference import arithmetic
from stage2_policy.settings import TrainSettings
from stage2_policy.stretch import Change, matching_factor, values_to_match
from stage2_policy.tilted_trainer import Policy

_SLOPE_PROMPTS = 80
"""Held-out prompts, at least, by which it is seen what moving a part moves; the others would only cost a pass each. A
slope is multiplied by how far a part is moved, a tenth, and need not be known as well as the gap is."""


@dataclass(frozen=True)
class Matched:
    """How a policy was moved.

    Attributes:
        stretch: factor along the ray from the reference.
        part_factors: of each part of the change beside it; none where fewer than two constraints bind.
    """

    stretch: float
    part_factors: Mapping[str, float]


def match_prediction(
    model: Policy,
    data: TrainingData,
    *,
    ref_logp: np.ndarray,
    settings: TrainSettings,
    reference: Path,
    show_progress: bool,
) -> Matched:
    """Move a trained policy in place: first along the ray from the reference, then each part of its change.

    Args:
        model: the policy.
        data: whose held-out responses tell where it is.
        ref_logp: log pi_ref of these, nats, shape (h,).
        settings: of the run.
        reference: folder of the checkpoint that training started from.
        show_progress: show progress bars.
    """
    held_out = data.held_out

    def log_ratio(responses: TrainingResponses, ref_logp: np.ndarray, *, of: str) -> np.ndarray:
        with arithmetic(settings.dtype, PartialState().device):
            logp = score_sequences(
                model,
                responses.sequences,
                token_budget=settings.tokens_per_microbatch,
                show_progress=show_progress,
                description=f"held-out responses, {of}",
            )
        return np.asarray(logp - ref_logp)

    columns = data.columns("held_out", np.arange(len(held_out)))
    stretch = matching_factor(
        held_out, log_ratio(held_out, ref_logp, of="policy"), values_to_match(held_out, columns, data.nats)
    )
    origin = None
    if not isinstance(model, PeftModel):
        origin = load_reference(reference, adapter="none", dtype=settings.dtype, device=torch.device("cpu"))
    change = Change(model, origin)
    change.stretch(stretch)
    binding = columns[:, 1:][:, data.solution.multipliers_m != 0]
    if binding.shape[1] < 2 or len(held_out.prompt_ids) < 2:
        return Matched(stretch, {})
    start = log_ratio(held_out, ref_logp, of="policy as moved")
    gaps = measure_gaps(held_out, start, binding)
    rows = np.flatnonzero(held_out.prompt_p % max(1, len(held_out.prompt_ids) // _SLOPE_PROMPTS) == 0)
    some = held_out.select_rows(rows)
    before = measure_gaps(some, start[rows], binding[rows])
    parts = parts_of(change.names)
    slopes = np.zeros((binding.shape[1], len(parts)))
    for place, (part, names) in enumerate(parts.items()):
        change.stretch(1 + SLOPE_STEP, names)
        moved = log_ratio(some, ref_logp[rows], of=f"with more of what is {part}")
        change.stretch(1 / (1 + SLOPE_STEP), names)
        slopes[:, place] = (before.mean - measure_gaps(some, moved, binding[rows]).mean) / SLOPE_STEP
    factors = choose_part_factors(gaps, slopes).tolist()
    for factor, names in zip(factors, parts.values(), strict=True):
        change.stretch(factor, names)
    return Matched(stretch, dict(zip(parts, factors, strict=True)))
