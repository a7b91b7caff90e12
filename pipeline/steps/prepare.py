"""The step ``prepare``: the prompts table, the embedded world, a merged reference."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config.sections import PromptSettings
from pipeline.contracts.artifacts import (
    begin_step,
    checkpoint_sha256,
    content_sha256,
    file_sha256,
    is_complete,
    read_manifest,
)
from pipeline.contracts.errors import require_extra
from pipeline.contracts.shards import write_table
from pipeline.contracts.tables import PROMPTS, SPLITS
from pipeline.microworld import build_world
from pipeline.run.prompt_info import write_prompt_info
from pipeline.run.run import Run
from pipeline.run.step import derived_step_is_current, finish_step, log, remedy
from pipeline.scorers.models import ModelSettings
from pipeline.sources.prompts import PromptRow, build_prompt_table, limit_prompts, read_prompts

WORLD_SEED = 0
"""The embedded world is an input like any checkpoint: the seed of a run draws samples, not worlds."""


def prepare(run: Run) -> None:
    """Write the prompts table and, for recipes that use it, build the embedded world."""
    started = time.monotonic()
    folder = run.prompts
    inputs: dict[str, str] = {}
    details: dict[str, Any] = {}
    if run.uses_embedded:
        require_extra("sample", "torch", "transformers", purpose="building the embedded world")
        world = build_world(run.data_dir / "models", seed=WORLD_SEED, show_progress=run.show_progress)
        inputs["world"] = world.digest
        details["world"] = {
            "directory": str(world.directory.relative_to(run.data_dir)),
            "scorer_accuracy": dict(world.scorer_accuracy),
            "build_seconds": world.build_seconds,
        }
        shown = ", ".join(f"{name} {accuracy:.3f}" for name, accuracy in world.scorer_accuracy.items())
        log.info("prepare: pairwise accuracy of the scorers on held-out pairs: %s", shown)
    if run.config.prompts.source == "embedded":
        rows = (PromptRow(prompt.messages, prompt.split, prompt.category) for prompt in world.prompts)
        everything, repeated = build_prompt_table(rows, source="embedded")
    else:
        everything, repeated = read_prompts(run.config.prompts)
    prompts = limit_prompts(everything, run.config.prompts.limit)
    left_out = everything.num_rows - prompts.num_rows
    if run.config.reference.adapter is not None:
        _merge_reference(run)
    counts = {split: pc.sum(pc.equal(prompts["split"], split)).as_py() for split in SPLITS}
    counts |= {"repeated": repeated, "left_out": left_out}
    log.info("prepare: %d train and %d test prompts", counts["train"], counts["test"])
    if repeated:
        log.info("prepare: %d repeated prompts dropped", repeated)
    if left_out:
        log.info("prepare: %d prompts left out, beyond `prompts.limit` (%d)", left_out, run.config.prompts.limit)
    settings = _recorded_settings(run.config.prompts)
    details["limit"] = run.config.prompts.limit
    # A source may grow: the table is then written anew, and later steps compute only what is new.
    inputs["prompts"] = _prompts_identity(prompts)
    if "info" in prompts.column_names:
        inputs["info"] = content_sha256(prompts.select(["prompt_id", "info"]).to_pydict())
    if derived_step_is_current(folder, step="prepare", settings=settings, inputs=inputs):
        return
    files = write_table(folder, prompts.select(PROMPTS.names), metadata=run.table_metadata())
    files |= write_prompt_info(folder, prompts, metadata=run.table_metadata())
    finish_step(
        run.name,
        folder,
        "prepare",
        settings=settings,
        inputs=inputs,
        files=files,
        counts=counts,
        details=details,
        started=started,
    )


def prompts_are_prepared(run: Run) -> bool:
    """Whether the prompts table is there and is what the recipe asks for, as long as its source is the same."""
    if not is_complete(run.prompts):
        return False
    found, prompts = read_manifest(run.prompts), run.config.prompts
    return found.settings == _recorded_settings(prompts) and found.details.get("limit") == prompts.limit


def _recorded_settings(prompts: PromptSettings) -> dict[str, Any]:
    """The settings of the prompts table, as its manifest has them.

    The categories themselves are among the inputs: nothing that was sampled or scored depends on their column. The
    limit shows in the inputs too: a larger one is a source that has grown.
    """
    # Nothing that was sampled depends on the columns for scorers, and what was scored on their values knows them.
    # Only `drop` changes a prompt; with the others a run is what it was before there was the setting.
    same = {"last_assistant_turn"} if prompts.last_assistant_turn != "drop" else set()
    return prompts.model_dump(mode="json", exclude={"category_column", "info_columns", "limit"} | same)


def _merge_reference(run: Run) -> None:
    """Write the reference with its adapter merged, once: what is sampled is then what is trained."""
    require_extra("train", "torch", "transformers", "peft", purpose="`reference.adapter`")
    from stage1_dual.merging import write_merged_checkpoint

    started = time.monotonic()
    folder, reference = run.merged_reference, run.config.reference
    assert reference.adapter is not None
    base = run.model(ModelSettings(model=reference.model, revision=reference.revision), "reference")
    inputs = {"base": checkpoint_sha256(Path(base)), "adapter": checkpoint_sha256(Path(reference.adapter))}
    begin_step(folder, settings={}, inputs=inputs, remedy=remedy("prepare"))
    if is_complete(folder):
        return
    write_merged_checkpoint(base, reference.adapter, folder / "checkpoint")
    paths = sorted((folder / "checkpoint").iterdir())
    files = {str(path.relative_to(folder)): file_sha256(path) for path in paths}
    finish_step(run.name, folder, "prepare", settings={}, inputs=inputs, files=files, started=started)


def _prompts_identity(prompts: pa.Table) -> str:
    """Hash of a prompts table: the ids stand for the text, split and category are added."""
    return content_sha256(prompts.select(["prompt_id", "split", "category"]).to_pydict())
