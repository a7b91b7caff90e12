"""The step ``sample``: responses of the reference, and the pairs of a data set that are trained on."""

from __future__ import annotations

from pipeline.contracts.artifacts import is_complete
from pipeline.contracts.errors import InputError
from pipeline.run.run import Run
from pipeline.run.step import log
from pipeline.sampling.pair_samples import write_pairs
from pipeline.sampling.policies import reference_policy
from pipeline.sampling.policy_samples import sample_policy
from pipeline.sampling.preview import show_prompts
from pipeline.scoring.demanded import read_demands
from pipeline.sources.prompts import limit_prompts, read_prompts
from pipeline.steps.preflight import check_run


def sample(run: Run) -> None:
    """Draw responses of the reference to the prompts of both splits, and tokenise the pairs of a data set, if any."""
    for warning in read_demands(run).warnings:
        log.warning("sample: %s", warning)  # and what demands ask of prompts is known before anything is drawn
    sampled, *of_data_sets = run.response_sets()
    for pairs in of_data_sets:
        write_pairs(run, pairs)  # first: what is wrong with them is known before anything is drawn
    sample_policy(
        run,
        reference_policy(run),
        sampled,
        step="sample",
        samples_per_prompt=run.config.sampling.samples_per_prompt,
        seed=run.config.seed,
    )


def preview_samples(run: Run, *, n_prompts: int = 2) -> str:
    """What the reference would read of the first prompts, token ids included, and how it would be sampled.

    Nothing is written.

    Raises:
        InputError: the prompts, the tokenizer or the template cannot be used.
    """
    check_run(run, ("sample",))
    if is_complete(run.prompts):
        table = run.prompts_table()
    elif run.uses_embedded:
        raise InputError(f"the embedded world of run `{run.name}` is not built; `dualign prepare` builds it")
    else:
        table = limit_prompts(read_prompts(run.config.prompts)[0], run.config.prompts.limit)
    rows = table.slice(0, n_prompts).to_pylist()
    return show_prompts(run, prompts=[(row["prompt_id"], row["prompt"]) for row in rows])
