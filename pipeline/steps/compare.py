"""``dualign compare``: several runs as tables, as one object, and as a page with a figure a plane."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.contracts.artifacts import is_complete, read_manifest, require_writable, write_json
from pipeline.contracts.errors import InputError
from pipeline.report.compared import (
    ComparedRun,
    State,
    compared_scores,
    comparison_notes,
    runs_view,
    scores_view,
)
from pipeline.report.views import TableView
from pipeline.run.finding import STEP_FOLDERS, find_run, unsolved
from pipeline.steps.show import FoundResults, read_results

_COSTS = tuple(folder for step, folder in STEP_FOLDERS.items() if step != "report")
"""Folders of the steps whose time a run cost: its page may be drawn any time."""


@dataclass(frozen=True)
class ComparedRuns:
    """Several runs.

    Attributes:
        runs: in the order in which they were named.
        notes: what keeps them from being compared number by number.
    """

    runs: tuple[ComparedRun, ...]
    notes: tuple[str, ...]

    @property
    def views(self) -> list[TableView]:
        """The tables: of the runs, and of their scores."""
        tables = [runs_view(self.runs)]
        scores = scores_view(self.runs, self.notes)
        return [*tables, scores]

    @property
    def document(self) -> dict[str, Any]:
        """The same as one object of JSON."""
        return {"runs": [run.document for run in self.runs], "notes": list(self.notes)}


def compare_runs(names: Sequence[str], *, data_dir: Path) -> ComparedRuns:
    """Read runs to compare them; one that is not solved yet is there with what it lacks.

    Args:
        names: of runs, or their folders.
        data_dir: holds ``runs/``.

    Raises:
        InputError: some are not there, or one is named twice; names each.
        CorruptArtifactError: a file of a run is damaged.
    """
    named: dict[Path, tuple[str, Path]] = {}
    faults = []
    for name in names:
        try:
            folder = find_run(name, data_dir=data_dir)
        except InputError as error:
            faults.append(str(error))
            continue
        place = folder.resolve()
        if place in named:
            faults.append(f"{name!r} and {named[place][0]!r} are one run: {folder}")
        named[place] = (name, folder)
    if faults:
        raise InputError("\n".join(faults))
    folders = [folder for _, folder in named.values()]
    labels = _labels(folders, [name for name, _ in named.values()])
    runs = tuple(_read(folder, label) for folder, label in zip(folders, labels, strict=True))
    return ComparedRuns(runs, tuple(comparison_notes(runs)))


def write_comparison(compared: ComparedRuns, output: Path) -> list[Path]:
    """Write ``compare.html``, ``compare.json`` and a figure for each plane into a folder.

    Args:
        compared: the runs.
        output: the folder; made if missing, files of an earlier comparison are replaced.

    Returns:
        What was written: the page first.

    Raises:
        InputError: the folder cannot be written.
    """
    from pipeline.report.compare_page import write_compare_page

    require_writable(output)
    page, *figures = write_compare_page(compared.runs, compared.notes, output=output)
    path = output / "compare.json"
    write_json(path, compared.document)
    return [page, path, *figures]


def _labels(folders: Sequence[Path], names: Sequence[str]) -> list[str]:
    """The names of the folders, or what was given where two folders have one name."""
    short = [folder.resolve().name for folder in folders]
    return short if len(set(short)) == len(short) else list(names)


def _read(folder: Path, label: str) -> ComparedRun:
    of_a_table = (folder / "dual.json").is_file() and not (folder / "prompts").is_dir()
    missing = None if of_a_table else unsolved(folder)
    if missing is not None:
        return ComparedRun(label, str(folder), "unsolved", missing, _seconds(folder))
    return _compared(read_results(folder), label)


def _compared(found: FoundResults, label: str) -> ComparedRun:
    evaluation, dual = found.evaluation, found.dual
    reward, constraints = compared_scores(dual, evaluation)
    kl = {} if evaluation is None else evaluation["kl"]
    lagrangian = {} if evaluation is None else evaluation["lagrangian"]
    state: State = "evaluated" if evaluation is not None else "trained" if found.is_trained else "solved"
    inputs = dual.get("inputs", {})
    # Of the prompts that were not solved on, where there are some: as what is predicted of the scores.
    solved_kl, heldout_kl = dual["kl"]["predicted"], dual["kl"].get("heldout")
    return ComparedRun(
        name=label,
        folder=str(found.folder),
        state=state,
        missing=None,
        seconds=_seconds(found.folder),
        prompts_sha256=inputs.get("prompts") or str(sorted(inputs.items())),
        trust=dual["trust"]["verdict"],
        evaluation=None if evaluation is None else evaluation["status"],
        beta=dual["beta"],
        kl_predicted=kl.get("predicted", solved_kl if heldout_kl is None else heldout_kl),
        kl_realised=kl.get("realised"),
        kl_ci95=kl.get("realised_ci95"),
        closed_fraction=lagrangian.get("closed_fraction"),
        closed_fraction_ci95=lagrangian.get("closed_fraction_ci95"),
        reward=reward,
        constraints=constraints,
    )


def _seconds(folder: Path) -> dict[str, float]:
    """Wall time of the call that finished each step."""
    found: dict[str, float] = {}
    for name in _COSTS:
        place = folder / name
        made = sorted(path for path in place.glob("*") if path.is_dir()) if name == "scores" else [place]
        manifests = [read_manifest(path) for path in made if is_complete(path)]
        if manifests:
            found[manifests[0].step] = sum(one.wall_seconds for one in manifests)
    return found
