"""``dualign show``: the tables of a run again, or of the results of a table, from what is on disk."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.contracts.artifacts import is_complete, read_json_object
from pipeline.contracts.training_verdict import TrainingVerdict, read_training_verdict
from pipeline.report.evaluated import Evaluation
from pipeline.report.solved import ReportedSolution
from pipeline.report.views import TableView, stage1_view, stage2_view
from pipeline.run.finding import require_solved
from pipeline.run.loaded import load_run


@dataclass(frozen=True, eq=False)
class FoundResults:
    """What a folder has of results.

    Attributes:
        name: of the run, or of the folder.
        folder: where they are.
        dual: the content of ``dual.json``.
        training: whether training paid, or None before training, or where that was not judged.
        evaluation: the content of ``evaluation.json``, or None before it.
        is_trained: whether there is a trained policy.
    """

    name: str
    folder: Path
    dual: dict[str, Any]
    training: TrainingVerdict | None = None
    evaluation: dict[str, Any] | None = None
    is_trained: bool = False

    @property
    def views(self) -> list[TableView]:
        """The tables, the last stage's last, with the verdicts on everything."""
        first = stage1_view(self.dual, self.training)
        if self.evaluation is None:
            views = [first]
        else:
            # What the first says of trust and warns of, the second says too.
            first = replace(first, badges=(), answers=(), warnings=())
            views = [first, stage2_view(self.evaluation, self.dual, self.training)]
        return [replace(view, title=f"{self.name}, {view.title[:1].lower()}{view.title[1:]}") for view in views]

    @property
    def document(self) -> dict[str, Any]:
        """The same as one object of JSON."""
        return {
            "run": self.name,
            "folder": str(self.folder),
            "dual": self.dual,
            "training": None if self.training is None else self.training.model_dump(mode="json"),
            "evaluation": self.evaluation,
        }


def read_results(folder: Path) -> FoundResults:
    """Read the results of a run, or of ``dualign solve --table``, each file checked against its manifest.

    Args:
        folder: of the run, or the output folder.

    Raises:
        InputError: there is no solution in it; says how far the run is.
        CorruptArtifactError: a file is damaged, or is not the one that its step wrote.
    """
    path = folder / "dual.json"
    if path.is_file() and not (folder / "prompts").is_dir():
        dual = read_json_object(path)
        ReportedSolution.from_document(dual, source=path)
        return FoundResults(folder.resolve().name, folder, dual)
    require_solved(folder)
    run = load_run(folder)
    is_trained = is_complete(folder / "policy")
    evaluation = None
    if is_complete(folder / "evaluation"):
        evaluation = run.evaluation
        source = folder / "evaluation" / "evaluation.json"
        solution = ReportedSolution.from_document(run.dual, source=folder / "dual" / "dual.json")
        Evaluation.from_document(evaluation, source=source).require_of(solution, source=source)
    return FoundResults(
        name=run.name,
        folder=folder,
        dual=run.dual,
        training=read_training_verdict(folder / "policy") if is_trained else None,
        evaluation=evaluation,
        is_trained=is_trained,
    )
