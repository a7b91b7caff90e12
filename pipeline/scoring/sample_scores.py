"""Scores of a samples table: one pass for all scorers that share a model, one model in memory at a time."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.contracts.artifacts import begin_step, content_sha256, is_complete, read_json, read_manifest
from pipeline.contracts.shards import ShardedTable
from pipeline.contracts.tables import SCORES
from pipeline.run.execution import build_execution
from pipeline.run.prompt_info import claim_prompt_info, read_prompt_info, select_info
from pipeline.run.replaced import clear_tables
from pipeline.run.response_set import ResponseSet
from pipeline.run.run import Run
from pipeline.run.step import finish_step, has_all_files, log, record_failures, remedy, reopen
from pipeline.scoring.groups import ScorerGroup, group_scorers
from pipeline.scoring.repeats import measure_noise, noise_files

_ANSWERS = "answers"
"""Folder of the run that holds, for each scorer, the answers that it paid for: outside of the steps' own folders, so
that `--redo` of a step, for whatever reason, pays for none of them again."""


def score_samples(run: Run, responses: ResponseSet, *, step: str, names: Sequence[str] | None = None) -> None:
    """Score the samples of a set; continues a killed run and scores only what is new.

    Args:
        run: the run.
        responses: the set, whose samples table is finished.
        step: the step this belongs to, for manifests and messages.
        names: of the scorers; all of the recipe where not given.

    Raises:
        StaleArtifactError: scores were begun with another scorer, other settings or other samples.
        InputError: a scorer cannot be loaded, or too many of its scores fail.
    """
    for group in group_scorers(run, list(run.config.used_scorers() if names is None else names)):
        _score_group(run, group, responses, step=step)


def score_policy(run: Run, responses: ResponseSet, *, step: str, names: Sequence[str]) -> None:
    """Score the samples of a trained policy, by the scorers that the reference's samples were scored by.

    Args:
        run: the run, whose reference is scored.
        responses: what the policy said.
        step: the step this belongs to, for manifests and messages.
        names: of the scorers. One that looks its scores up is left out where it is neither reward nor constraint.

    Raises:
        StaleArtifactError: a scorer is not the one that the reference's samples were scored by.
        InputError: a scorer cannot be loaded, or too many of its scores fail.
    """
    needed = run.config.needed_scores()
    asked = [name for name in names if name in needed or run.config.scorers[name].scores_any_response]
    for name in names:
        if name not in asked:
            log.info("%s: `%s` looks scores up and is not needed here; the policy gets none of it", step, name)
    for group in group_scorers(run, asked):
        origin = _origin(group, run.samples)
        for name, settings in zip(group.names, group.settings, strict=True):
            _require_same_scorer(run.scores / name, group, settings=settings, origin=origin)
    score_samples(run, responses, step=step, names=asked)


def _require_same_scorer(
    folder: Path, group: ScorerGroup, *, settings: Mapping[str, Any], origin: dict[str, str]
) -> None:
    """Compare a scorer with that of the reference's scores in ``folder``.

    A table of scores may have grown by what the policy said: that it is another file is told and not refused.
    """
    if not (folder / "settings.json").is_file():  # a scorer that came later, by which nothing is compared
        return
    if group.looks_up:
        then = read_json(folder / "settings.json")["inputs"]["scorer"]
        if then != origin["scorer"]:
            log.warning(
                "the table of scorer `%s` is not the file that the reference's samples were scored by: their scores "
                "stay as they are, and those of the policy must be on the same scale",
                folder.name,
            )
        origin = {**origin, "scorer": then}
    begin_step(folder, settings=settings, inputs=origin, remedy=remedy("score"))


def _origin(group: ScorerGroup, samples: Path) -> dict[str, str]:
    """What scores are made from; what samples were begun with stands for them: more leave the first as they are."""
    return {"scorer": group.identity, "samples_begun_with": content_sha256(read_json(samples / "settings.json"))}


def _score_group(run: Run, group: ScorerGroup, responses: ResponseSet, *, step: str) -> None:
    from stage1_dual.scoring.score_tables import score_tables

    started = time.monotonic()
    samples, folder = responses.samples, responses.scores
    origin = _origin(group, samples)
    inputs = {**origin, "samples": read_manifest(samples).identity}
    waiting = []
    info = select_info(read_prompt_info(run.prompts), group.info_columns)
    start = group.start
    if group.keeps_answers:
        start = partial(start, cache=(run.folder / _ANSWERS / group.names[0]).absolute())
    for name, settings in zip(group.names, group.settings, strict=True):
        if group.looks_up and not is_complete(folder / name):
            _forget(folder / name)
        begin_step(folder / name, settings=settings, inputs=origin, remedy=remedy(step))
        claim_prompt_info(folder / name, info)
        if not _is_current(folder / name, inputs):
            waiting.append(name)
    if not waiting:
        log.info("%s: scores of %s computed before, kept", step, ", ".join(group.names))
        return
    for name in waiting:
        reopen(folder / name)
    prompts = run.prompts_table(responses.prompts)
    messages = dict(zip(prompts["prompt_id"].to_pylist(), prompts["prompt"].to_pylist(), strict=True))
    tables = {
        name: ShardedTable(folder=folder / name, schema=SCORES, metadata={**run.table_metadata(), "scorer": name})
        for name in group.names
    }
    counts = score_tables(
        scorer_factory=start,
        samples=run.samples_table(samples),
        splits=responses.splits,
        messages=messages,
        tables=tables,
        show_progress=run.show_progress,
        reads=group.reads,
        info=info,
        max_failed_share=run.config.max_failed_share,
        execution=build_execution(run),
    )
    for name, settings in zip(group.names, group.settings, strict=True):
        if name not in waiting:
            continue
        noise: dict[str, Any] = {}
        if group.repeated_share and responses == run.sampled:
            noise = {"score_noise": asdict(measure_noise(run, group, name, start=start, messages=messages, info=info))}
        record_failures(folder / name, [asdict(failure) for failure in counts.failures])
        finish_step(
            run.name,
            folder / name,
            step,
            settings=settings,
            inputs=inputs,
            files={**tables[name].finish(), **noise_files(folder / name)},
            counts={"rows": counts.rows_scored + counts.rows_present, "failed": len(counts.failures)},
            details={"last_call": {**asdict(counts), "failures": len(counts.failures)}, **noise},
            started=started,
        )
    if counts.rows_scored:
        rate = counts.rows_scored / max(counts.scoring_seconds, 1e-9)
        truncated = f", {counts.rows_truncated} cut to the scorer's length" if counts.rows_truncated else ""
        log.info("%s: %d samples by %s, %.0f/s%s", step, counts.rows_scored, ", ".join(group.names), rate, truncated)
    if counts.failures:
        where = folder / group.names[0] / "failures.json"
        log.info("%s: %d samples could not be scored, see %s", step, len(counts.failures), where)


def _forget(folder: Path) -> None:
    """Begin anew with a table of scores that lacked rows: it may have them now, and looking up costs nothing."""
    if folder.is_dir():
        clear_tables(folder)
        (folder / "settings.json").unlink(missing_ok=True)


def _is_current(folder: Path, inputs: Mapping[str, str]) -> bool:
    if not is_complete(folder):
        return False
    found = read_manifest(folder)
    return found.inputs == inputs and not found.count("failed") and has_all_files(folder, found)
