"""The run, step by step. A finished step is skipped, a killed one continues, a contradicting one is refused.

Each step reads the artifacts before it and leaves one folder with a manifest. Nothing else passes between steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import yaml

from pipeline.contracts.allocator import keep_freed_memory
from pipeline.contracts.artifacts import (
    MANIFEST,
    atomic_write_bytes,
    is_complete,
    read_manifest,
    require_writable,
    run_lock,
    verify_artifact,
)
from pipeline.contracts.errors import CorruptArtifactError, InputError
from pipeline.run.looks import sized
from pipeline.run.replaced import drop_replaced, put_aside
from pipeline.run.response_set import ResponseSet, known_response_sets
from pipeline.run.run import Run
from pipeline.steps.evaluate import evaluate
from pipeline.steps.export import export
from pipeline.steps.look import look
from pipeline.steps.preflight import check_run
from pipeline.steps.prepare import prepare
from pipeline.steps.report import report
from pipeline.steps.sample import sample
from pipeline.steps.score import score
from pipeline.steps.solve import solve
from pipeline.steps.train import train

_VERIFIED = ".verified.json"
"""Remembers in the run's folder which files were found to be what their manifests say."""


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
        redo_from: a step to do anew, with all steps after it: what they made is put aside, each until its successor
            is complete.

    Raises:
        DualignError: whatever makes a step stop; finished work is kept.
    """
    tops_up = run.config.sampling.until is not None and "score" in names
    check_run(
        run, ("prepare", "sample", *names) if tops_up else names
    )  # first: what is refused leaves nothing behind, and costs nothing that was done before
    require_writable(run.folder)
    keep_freed_memory()
    with run_lock(run.folder):
        if redo_from is not None:
            _require_earlier_steps(run, redo_from, names)
            _verify_earlier_steps(run, redo_from)
            _put_aside_from(run, redo_from)
        _require_own_artifacts(run)
        for name in names:
            _perform(run, name, names)
            while tops_up and name == "score" and look(sized(run)):
                # Without a limit all prompts take part from the start.
                again = ("sample", "score") if run.config.prompts.limit is None else ("prepare", "sample", "score")
                for one in again:
                    _perform(run, one, (*names, *again))


def _perform(run: Run, name: str, planned: Sequence[str]) -> None:
    run = sized(run)
    _require_earlier_steps(run, name, planned)
    _verify_earlier_steps(run, name)
    STEPS[name].perform(run)
    drop_replaced(run.folder, _made_folders(run, name))
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
        try:
            verify_artifact(folder, memory=run.folder / _VERIFIED)
        except CorruptArtifactError as error:
            raise CorruptArtifactError(
                f"{folder / MANIFEST} is of run `{found.run}` and does not describe the files beside it: {error}\n"
                f"This is run `{run.name}`. Move the folder away, and the step is done again"
            ) from error


def _made_folders(run: Run, step: str) -> list[str]:
    """The folders that a step makes, or once made, within the run, whatever its recipe asks for by now."""
    merged = [run.written_reference.name] if step == "prepare" else []
    return [*merged, *_folders(step, known_response_sets(run.folder))]


def _put_aside_from(run: Run, first: str) -> None:
    order = list(STEPS)
    made = [(name, folder) for name in order[order.index(first) :] for folder in _made_folders(run, name)]
    for name, folder in made:
        path = run.folder / folder
        if path.is_symlink():
            raise InputError(
                f"the step `{name}` of run `{run.name}` is that of {path.resolve().parent}, by a link; redo it there"
            )
    put_aside(run.folder, [folder for _, folder in reversed(made)])


def _verify_earlier_steps(run: Run, name: str) -> None:
    """Compare what a step reads with the manifests that name it: all that the steps before it have finished.

    Raises:
        CorruptArtifactError: a file is missing, or is not what its manifest says; names it.
    """
    order = list(STEPS)
    for earlier in order[: order.index(name)]:
        for made in _made_folders(run, earlier):
            for manifest in sorted((run.folder / made).rglob(MANIFEST)):
                verify_artifact(manifest.parent, memory=run.folder / _VERIFIED)


def _write_config(run: Run) -> None:
    text = yaml.safe_dump(run.config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    atomic_write_bytes(run.folder / "config.yaml", text.encode())
