"""A run on disk, for whoever wants its results: what ``dualign.load_run`` returns. Needs no recipe and no model."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pipeline.contracts.artifacts import Manifest, is_complete, read_json, verify_artifact
from pipeline.contracts.errors import CorruptArtifactError, InputError
from pipeline.contracts.section import nearest
from pipeline.contracts.shards import read_parquet
from pipeline.contracts.solution import Solution
from pipeline.contracts.tables import CONSTRAINT_PREFIX, SCORE_PREFIX, SPLITS, tilted_schema
from pipeline.contracts.training_verdict import read_training_verdict

if TYPE_CHECKING:
    from pipeline.report.views import TableView

_STEP_OF = {"dual": "solve", "tilted": "export", "policy": "train", "evaluation": "evaluate"}


def load_run(folder: Path) -> LoadedRun:
    """See :func:`dualign.load_run`."""
    if not os.path.isdir(folder):  # noqa: PTH112  # of a name too long for a file, False
        beside = [path.name for path in folder.parent.glob("*") if path.is_dir()] if folder.parent.is_dir() else []
        raise InputError(f"there is no run {str(folder)!r}{nearest(folder.name, beside) if beside else ''}")
    if not (folder / "prompts").is_dir():
        raise InputError(f"{folder} is not a run: it has no prompts folder")
    return LoadedRun(folder)


class LoadedRun:
    """The results of a run, read when they are asked for.

    Shown as the table of the last stage that has finished.

    Attributes:
        folder: the run's folder.
        name: its name.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = folder.resolve().name

    @cached_property
    def dual(self) -> dict[str, Any]:
        """The content of ``dual/dual.json`` (docs/artifacts.md).

        Raises:
            InputError: the step ``solve`` has not finished.
            CorruptArtifactError: the file is not the one the step wrote, or is damaged.
        """
        from pipeline.report.solved import ReportedSolution

        content = self._read("dual", "dual.json")
        ReportedSolution.from_document(content, source=self.folder / "dual" / "dual.json")
        return content

    @cached_property
    def evaluation(self) -> dict[str, Any]:
        """The content of ``evaluation/evaluation.json`` (docs/artifacts.md).

        Raises:
            InputError: the step ``evaluate`` has not finished.
            CorruptArtifactError: the file is not the one the step wrote, or is damaged.
        """
        from pipeline.report.evaluated import Evaluation

        content = self._read("evaluation", "evaluation.json")
        Evaluation.from_document(content, source=self.folder / "evaluation" / "evaluation.json")
        return content

    @cached_property
    def tilted(self) -> pa.Table:
        """The hand-off table, train prompts first: prompts, completions, scores and weights; ``.to_pandas()`` gives
        a DataFrame.

        Raises:
            InputError: the step ``export`` has not finished.
            CorruptArtifactError: a file is missing or damaged.
        """
        files = self._verified("tilted").files
        paths = [self.folder / "tilted" / name for split in SPLITS for name in sorted(files) if f"/{split}-" in name]
        if not paths:
            raise CorruptArtifactError(f"{self.folder / 'tilted'} has no table: its manifest names no file of a split")
        columns = read_parquet(paths[0]).column_names
        # As the first file has them, not as the dual does: the table may have been handed on without it.
        names = [name.removeprefix(CONSTRAINT_PREFIX) for name in columns if name.startswith(CONSTRAINT_PREFIX)]
        scores = [name.removeprefix(SCORE_PREFIX) for name in columns if name.startswith(SCORE_PREFIX)]
        return pa.concat_tables([read_parquet(path, schema=tilted_schema(names, scores)) for path in paths])

    @property
    def policy_path(self) -> Path:
        """Folder of the fine-tuned policy, a Hugging Face checkpoint.

        Raises:
            InputError: the step ``train`` has not finished.
        """
        self._require_finished("policy")
        return self.folder / "policy"

    def _require_finished(self, artifact: str) -> None:
        if not is_complete(self.folder / artifact):
            step = _STEP_OF[artifact]
            raise InputError(f"run `{self.name}` has no {artifact}: its step `{step}` has not finished")

    def _verified(self, artifact: str, *, only: Collection[str] | None = None) -> Manifest:
        self._require_finished(artifact)
        return verify_artifact(self.folder / artifact, only=only)

    def _read(self, artifact: str, name: str) -> dict[str, Any]:
        self._verified(artifact, only=[name])
        content: dict[str, Any] = read_json(self.folder / artifact / name)
        return content

    def __repr__(self) -> str:
        from pipeline.report.summary import text_summary

        return text_summary(self._view())

    def _repr_html_(self) -> str:
        from pipeline.report.summary import html_summary

        return html_summary(self._view())

    def _view(self) -> TableView:
        from pipeline.report.evaluated import Evaluation
        from pipeline.report.views import TableView, stage1_view, stage2_view

        policy = self.folder / "policy"
        training = read_training_verdict(policy) if is_complete(policy) else None
        if is_complete(self.folder / "evaluation"):
            source = self.folder / "evaluation" / "evaluation.json"
            Evaluation.from_document(self.evaluation).require_of(Solution.from_document(self.dual), source=source)
            view = stage2_view(self.evaluation, self.dual, training)
        elif is_complete(self.folder / "dual"):
            view = stage1_view(self.dual, training)
        else:
            view = TableView("no dual yet", (), ())
        return replace(view, title=f"Run {self.name}, {view.title[0].lower()}{view.title[1:]}")
