"""Which figures a run has; what each shows is test_figures.py's and test_readers.py's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.report.plates import stage2_plates


def test_after_both_stages_each_figure_has_its_words(two_bounds: Any) -> None:
    plates = stage2_plates(two_bounds.folder, two_bounds.solved, two_bounds.evaluation)
    assert plates[0].stem == "predicted_realised"
    assert "training" in [plate.stem for plate in plates]
    for plate in plates:
        assert plate.title
        assert plate.caption.endswith(".")
        assert plate.figure.axes
        assert plate.values.endswith(".")
        assert plate.numbers.csv().count("\n") == len(plate.numbers.rows) + 1


def test_before_training_there_are_none(two_bounds: Any, tmp_path: Path) -> None:
    assert stage2_plates(tmp_path, two_bounds.solved, None) == []


def test_training_alone_is_shown_before_the_evaluation(two_bounds: Any) -> None:
    assert [plate.stem for plate in stage2_plates(two_bounds.folder, two_bounds.solved, None)] == ["training"]
