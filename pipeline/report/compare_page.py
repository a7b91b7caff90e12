"""The page and the figures of several runs beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.contracts.artifacts import atomic_write_bytes
from pipeline.report.compared import ComparedRun, Plane, planes, runs_view, scores_view
from pipeline.report.page import place_plates, save_plates
from pipeline.report.plane_figure import plane_figure
from pipeline.report.plate_numbers import Numbers
from pipeline.report.plates import Plate
from pipeline.report.shell import render_page
from pipeline.report.views import interval, number, signed

_HEAD = (
    "run",
    "demanded",
    "predicted",
    "realised",
    "realised_low",
    "realised_high",
    "reward_predicted",
    "reward_realised",
    "reward_low",
    "reward_high",
)


def write_compare_page(runs: Sequence[ComparedRun], notes: Sequence[str], *, output: Path) -> list[Path]:
    """Write ``compare.html`` and a figure for each plane into a folder.

    Args:
        runs: the runs, in the order of the rows.
        notes: what keeps them from being compared number by number.
        output: the folder.

    Returns:
        What was written: the page first.
    """
    for earlier in (output / "figures").glob("plane_*.*"):
        earlier.unlink()
    plates = [_plate(plane, place) for place, plane in enumerate(planes(runs), start=1)]
    written = save_plates(plates, output / "figures")
    placed = place_plates(plates, written)
    page = render_page(
        "compare.html.jinja",
        title=", ".join(run.name for run in runs),
        notes=notes,
        runs=runs_view(runs),
        scores=scores_view(runs),
        plates_shown=[placed[plate.stem] for plate in plates],
        folders=[(run.name, run.folder) for run in runs],
    )
    path = output / "compare.html"
    atomic_write_bytes(path, page.encode())
    return [path, *(path for paths in written.values() for path in paths)]


def _plate(plane: Plane, place: int) -> Plate:
    side = "gains over each run's own reference on its own prompts" if plane.is_gain else "means"
    return Plate(
        f"plane_{place}",
        f"{plane.reward} against {plane.quantity}",
        "Hollow: as predicted; filled, with 95% intervals: as realised. Dashed: what was demanded, where that "
        "differs in the colour of the run. The values are "
        f"{side}.",
        plane_figure(plane),
        _numbers(plane),
    )


def _numbers(plane: Plane) -> Numbers:
    show = signed if plane.is_gain else number
    words, rows = [], []
    for point in plane.points:
        score, reward = point.constraint, point.reward
        realised = "not realised yet"
        if score.realised is not None and reward.realised is not None:
            realised = (
                f"realised {show(score.realised, 3)} {interval(score.ci95, 3)} with a reward of "
                f"{signed(reward.realised, 3)}"
            )
        words.append(f"{point.run}: predicted {show(score.predicted, 3)}, {realised}")
        low, high = score.ci95 or (None, None)
        reward_low, reward_high = reward.ci95 or (None, None)
        rows.append(
            (
                point.run,
                score.demanded,
                score.predicted,
                score.realised,
                low,
                high,
                reward.predicted,
                reward.realised,
                reward_low,
                reward_high,
            )
        )
    return Numbers("; ".join(words) + ".", _HEAD, tuple(rows))
