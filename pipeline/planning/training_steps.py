"""How many steps training takes: counted by training's own functions on the tables, bounded by them, or not said."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pyarrow.compute as pc

from pipeline.config.sections import TrainingSettings
from pipeline.contracts.artifacts import content_sha256, is_complete, read_manifest
from pipeline.contracts.keys import PromptPlaces, row_keys
from pipeline.contracts.shards import ShardedTable, iterate_parquet
from pipeline.contracts.tables import SAMPLE_KEY, SAMPLES, TOKEN_IDS, tilted_schema
from pipeline.run.response_set import ResponseSet
from pipeline.run.run import Run
from pipeline.sampling.pair_samples import pair_table_settings
from pipeline.sampling.policy_samples import sampling_settings
from pipeline.sources.pairs import pair_settings
from pipeline.steps.prepare import prompts_are_prepared
from stage2_policy.data import choose_held_out
from stage2_policy.step_sampler import StepSampler, count_all_steps, count_groups, count_steps

PROMPT_FACTOR = 2.0
"""Tokens of prompts that were read but not tokenised: within this factor of their characters / 4."""

TEMPLATE_TOKENS = 30
"""Tokens that a template adds to a prompt, at most."""


@dataclass(frozen=True)
class StepCount:
    """Optimisation steps of a training run that is not stopped early.

    Attributes:
        fewest: of them; None where only the most is known.
        most: of them; the same number where they were counted.
        basis: what they were counted in, or what the bounds assume.
    """

    fewest: int | None
    most: int
    basis: str

    @property
    def shown(self) -> str:
        """The number or the bounds, as text."""
        if self.fewest is None:
            return f"at most {self.most:,}"
        return f"{self.most:,}" if self.fewest == self.most else f"{self.fewest:,} to {self.most:,}"


@dataclass(frozen=True)
class MeanLengths:
    """Tokens of the run's samples, in the mean.

    Attributes:
        prompt: of a prompt, with its template.
        response: of a response.
    """

    prompt: float
    response: float


def measure_lengths(run: Run) -> MeanLengths | None:
    """The mean lengths of the reference's samples; None where there are none yet."""
    if not is_complete(run.samples):
        return None
    rows = [_read_lengths(run.sampled, split) for split in run.sampled.splits]
    prompt_n = np.concatenate([one.prompt_n for one in rows])
    if len(prompt_n) == 0:
        return None
    return MeanLengths(float(prompt_n.mean()), float(np.concatenate([one.response_n for one in rows]).mean()))


def count_on_tables(run: Run) -> StepCount | None:
    """The steps, from the lengths of the responses that are on disk; None where those of the recipe are not.

    Rows, held-out prompts, groups and steps are chosen by the functions of training.
    """
    sets, training = run.response_sets(), run.config.training
    if training.optimizer == "natural_gradient":
        return StepCount(1, 1, "of the natural gradient")
    if not all(is_complete(responses.samples) and _are_as_asked(run, responses) for responses in sets):
        return None
    sampled, trained = _rows(run, run.sampled), _rows(run, run.trained_on)
    prompt_ids = sampled.prompt_ids
    held_out = {prompt_ids[place] for place in choose_held_out(prompt_ids, fraction=training.held_out_fraction)}
    apart_p = np.array([name not in held_out for name in trained.prompts.ids], dtype=bool)
    trained = trained.select(apart_p[trained.place_n])
    if len(trained.place_n) == 0:
        return None
    order = np.lexsort((trained.index_n, trained.place_n))
    place_n, index_n = trained.place_n[order], trained.index_n[order]
    if run.trained_on.paired:
        place_n = place_n * (index_n.max() + 1) + index_n // 2
    sampler = StepSampler(
        (trained.prompt_n + trained.response_n)[order],
        np.unique(place_n, return_inverse=True)[1],
        tokens_per_step=training.tokens_per_step,
        tokens_per_microbatch=training.tokens_per_microbatch,
        responses_per_group=training.responses_per_group,
        seed=run.config.seed,
    )
    steps = count_all_steps(sampler.n_steps, epochs=training.epochs)
    if training.negligible_mass > 0:
        return StepCount(None, steps, "before responses of negligible weight are left out")
    if all(_is_tilted(responses) for responses in sets):
        return StepCount(steps, steps, "counted in the tilted table")
    return StepCount(steps, steps, "counted in the samples, if each of them gets its scores")


def bound_steps(
    training: TrainingSettings,
    *,
    n_prompts: int,
    responses_per_prompt: int,
    prompt_tokens: float,
    most_response_tokens: int,
    at_most: bool,
) -> StepCount:
    """Bounds of the steps before any response is drawn, from what is known of their lengths.

    Args:
        training: its settings.
        n_prompts: prompts, or pairs of a data set, that are trained on.
        responses_per_prompt: responses of each; 2 of a pair.
        prompt_tokens: of a prompt in the mean, as estimated from its characters; without its template.
        most_response_tokens: the limit of a response.
        at_most: whether there may be fewer prompts or pairs.
    """
    rows = n_prompts * responses_per_prompt
    groups = n_prompts * count_groups(responses_per_prompt, responses_per_group=training.responses_per_group)
    prompts = prompt_tokens / PROMPT_FACTOR, prompt_tokens * PROMPT_FACTOR + TEMPLATE_TOKENS
    fewest, most = (
        count_all_steps(
            count_steps(rows * (prompt + response), groups, tokens_per_step=training.tokens_per_step),
            epochs=training.epochs,
        )
        for prompt, response in zip(prompts, (1, most_response_tokens), strict=True)
    )
    basis = f"if prompts have {prompts[0]:.0f} to {prompts[1]:.0f} tokens and responses 1 to {most_response_tokens}"
    return StepCount(None if at_most else fewest, most, basis)


def _are_as_asked(run: Run, responses: ResponseSet) -> bool:
    """Whether the recipe asks for what is on disk, no more and no less."""
    found = read_manifest(responses.samples)
    config = run.config
    if responses.paired:
        limit, beyond = pair_settings(config).limit, found.counts.get("beyond_limit", 0)
        n_prompts = read_manifest(responses.prompts).count("prompts")
        whole = beyond == 0 if limit is None else n_prompts == limit or (n_prompts < limit and beyond == 0)
        return found.settings == pair_table_settings(config) and whole
    if not prompts_are_prepared(run):
        return False
    rows = run.prompts_table(responses.prompts).select(["prompt_id", "split"]).to_pylist()
    settings = sampling_settings(run, quantization=config.reference.quantization, seed=config.seed)
    return (
        found.settings == {**settings, "samples_per_prompt": config.sampling.samples_per_prompt}
        and found.inputs["prompts"] == content_sha256({row["prompt_id"]: row["split"] for row in rows})
        and not found.count("failed")
    )


def _is_tilted(responses: ResponseSet) -> bool:
    """Whether its hand-off table is there, made from its samples as they are."""
    if not is_complete(responses.tilted):
        return False
    made_from = read_manifest(responses.tilted).inputs[f"{responses.prefix}samples"]
    return made_from == read_manifest(responses.samples).identity


@dataclass(frozen=True, eq=False)
class _Lengths:
    """Keys and lengths of some responses, and whether the token limit ended each; arrays of shape (n,)."""

    prompts: PromptPlaces
    place_n: np.ndarray
    index_n: np.ndarray
    prompt_n: np.ndarray
    response_n: np.ndarray
    cut_off_n: np.ndarray

    @property
    def prompt_ids(self) -> list[str]:
        """The prompts that have rows, sorted."""
        ids = self.prompts.ids
        return [ids[place] for place in np.unique(self.place_n)]

    def select(self, mask_n: np.ndarray) -> _Lengths:
        """The rows where a boolean mask is true."""
        arrays = {name: value[mask_n] for name, value in vars(self).items() if name != "prompts"}
        return replace(self, **arrays)


def _rows(run: Run, responses: ResponseSet) -> _Lengths:
    """Key and lengths of the train responses that take part, so far as that is known."""
    rows = _read_lengths(responses, "train")
    if _is_tilted(responses):
        tilted = ShardedTable(folder=responses.tilted, schema=tilted_schema(()), metadata={})
        keys = [np.empty(0, np.int64)]
        keys += [row_keys(*tilted.keys(path, rows.prompts)) for path in tilted.paths("train")]
        return rows.select(np.isin(row_keys(rows.place_n, rows.index_n), np.concatenate(keys)))
    if run.config.solve.on_length == "drop" and not responses.paired:
        return rows.select(~rows.cut_off_n)
    return rows


def _read_lengths(responses: ResponseSet, split: str) -> _Lengths:
    """The lengths of a split's responses, a row group in memory at a time."""
    table = ShardedTable(folder=responses.samples, schema=SAMPLES, metadata={})
    prompts = PromptPlaces(table.prompt_ids(split))
    columns = [*SAMPLE_KEY, *TOKEN_IDS, "finish_reason"]
    groups = [
        (
            prompts.of(group["prompt_id"]),
            group["sample_index"].to_numpy().astype(np.int64),
            *(pc.list_value_length(group[name]).to_numpy().astype(np.int64) for name in TOKEN_IDS),
            pc.equal(group["finish_reason"], "length").to_numpy(),
        )
        for path in table.paths(split)
        for group in iterate_parquet(path, columns=columns, schema=SAMPLES, as_dictionary=["prompt_id"])
    ]
    empty = (*(np.empty(0, np.int64) for _ in range(4)), np.empty(0, dtype=bool))
    return _Lengths(prompts, *(np.concatenate(column) for column in zip(empty, *groups, strict=True)))
