"""The run, step by step. A finished step is skipped, a killed one continues, a contradicting one is refused.

Each step reads the artifacts before it and leaves one folder with a manifest. Nothing else passes between steps.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import yaml

from pipeline.contracts.artifacts import (
    atomic_write_bytes,
    file_sha256,
    is_complete,
    read_manifest,
    require_writable,
    run_lock,
)
from pipeline.contracts.errors import CorruptArtifactError, InputError
from pipeline.run.response_set import ResponseSet, known_response_sets
from pipeline.run.run import Run
from pipeline.run.step import log, reopen
from pipeline.steps.evaluate import evaluate
from pipeline.steps.export import export
from pipeline.steps.preflight import check_run
from pipeline.steps.prepare import prepare
from pipeline.steps.report import report
from pipeline.steps.sample import sample
from pipeline.steps.score import score
from pipeline.steps.solve import solve
from pipeline.steps.train import train


@dataclass(frozen=True)
class Step:
    """One step: the folder it owns, and the function that fills it."""

    folder: str
    perform: Callable[[Run], None]


STEPS: dict[str, Step] = {
    "prepare": Step("prompts", prepare),
    "sample": Step("samples", sample),
    "score": Step("scores", score),
    "solve": Step("dual", solve),
    "export": Step("tilted", export),
    "train": Step("policy", train),
    "evaluate": Step("evaluation", evaluate),
    "report": Step("report", report),
}
"""In the order of :data:`pipeline.steps.order.SUMMARIES`."""


def run_steps(run: Run, names: Sequence[str], *, redo_from: str | None = None) -> None:
    """Perform steps in order, holding the run.

    Args:
        run: the run.
        names: steps to perform.
        redo_from: a step to remove first, with all steps after it.

    Raises:
        DualignError: whatever makes a step stop; finished work is kept.
    """
    check_run(run, names)  # first: what is refused leaves nothing behind, and costs nothing that was done before
    require_writable(run.folder)
    with run_lock(run.folder):
        if redo_from is not None:
            _discard_from(run, redo_from)
        _require_own_artifacts(run)
        for name in names:
            _require_earlier_steps(run, name, names)
            STEPS[name].perform(run)
            # After the step: a configuration that was refused is not the run's.
            _write_config(run)


def _folders(step: str, sets: Sequence[ResponseSet]) -> dict[str, str | None]:
    """The folders that a step makes, within the run, each with the setting that asks for it, if one does."""
    folders: dict[str, str | None] = {STEPS[step].folder: None}
    for responses in sets:
        folders |= {responses.prefix + name: responses.setting for name in responses.made_by.get(step, ())}
    return folders


def _require_earlier_steps(run: Run, name: str, planned: Sequence[str]) -> None:
    order = list(STEPS)
    needed = ["solve", "export"] if name == "report" else order[: order.index(name)]
    for earlier in needed:
        for folder, setting in _folders(earlier, run.response_sets()).items():
            done = is_complete(run.folder / folder) if earlier != "score" else (run.folder / folder).is_dir()
            if not done and earlier not in planned:
                what = f" for `{setting}` (no {folder})" if setting is not None else ""
                raise InputError(
                    f"`dualign {name}` needs the step `{earlier}` of run `{run.name}`, which is not done{what}; run "
                    "it first"
                )


def _require_own_artifacts(run: Run) -> None:
    """A run that was copied under another name is whole; a manifest of another run beside files of this one is not."""
    names = [step.folder for step in STEPS.values()]
    for responses in known_response_sets(run.folder):
        names += [*responses.scored_tables(), responses.prefix + responses.tilted.name]
    for folder in (run.folder / name for name in dict.fromkeys(names)):
        if not is_complete(folder) or (found := read_manifest(folder)).run == run.name:
            continue
        for name, recorded in found.files.items():
            if file_sha256(folder / name) != recorded:
                raise CorruptArtifactError(
                    f"{folder / 'manifest.json'} is of run `{found.run}` and does not describe {folder / name}: this "
                    f"is run `{run.name}`. Move the folder away, and the step is done again"
                )


def _discard_from(run: Run, first: str) -> None:
    order = list(STEPS)
    discarded = [
        (name, run.folder / folder)
        for name in order[order.index(first) :]
        for folder in _folders(name, known_response_sets(run.folder))
    ]
    for name, folder in discarded:
        if folder.is_symlink():
            raise InputError(
                f"the step `{name}` of run `{run.name}` is that of {folder.resolve().parent}, by a link; redo it there"
            )
    for name, folder in reversed(discarded):
        if folder.is_dir():
            reopen(folder)
            shutil.rmtree(folder)
            log.info("%s: removed, to be done anew", name)
    if first == "prepare" and run.merged_reference.is_dir():
        reopen(run.merged_reference)
        shutil.rmtree(run.merged_reference)


def _write_config(run: Run) -> None:
    text = yaml.safe_dump(run.config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    atomic_write_bytes(run.folder / "config.yaml", text.encode())
