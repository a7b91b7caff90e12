"""The step ``report``: the figures and the page of a run."""

from __future__ import annotations

import shlex
import time
from dataclasses import asdict
from pathlib import Path

from pipeline.contracts.artifacts import content_sha256, file_sha256, is_complete, read_manifest
from pipeline.report.page import write_report
from pipeline.report.page_data import Command
from pipeline.run.run import Run
from pipeline.run.step import derived_step_is_current, finish_step, log


def report(run: Run) -> None:
    """Write the figures and the page."""
    started = time.monotonic()
    folder = run.folder / "report"
    available = [name for name in ("dual", "tilted", "policy", "evaluation") if is_complete(run.folder / name)]
    inputs = {name: read_manifest(run.folder / name).identity for name in available}
    published = {} if run.config.published is None else run.config.published.points()
    if published:  # an input, not a setting: the numbers may be corrected, and older reports have none
        inputs["published"] = content_sha256(
            {name: [asdict(point) for point in points] for name, points in published.items()}
        )
    if derived_step_is_current(folder, step="report", settings={}, inputs=inputs):
        return
    paths = write_report(run.folder, output=folder, published=published, commands=_commands(run))
    files = {str(path.relative_to(folder)): file_sha256(path) for path in paths}
    finish_step(run.name, folder, "report", settings={}, inputs=inputs, files=files, started=started)
    log.info("report: %s", folder / "report.html")


_SAME_SAMPLES = (
    "The command that asks for it, on the same samples and scores: this run's solution, and what was made from it, is "
    "made anew. To keep them, give --run another name; it samples for itself."
)


def _commands(run: Run) -> dict[str, Command]:
    """What asks for another demand on each constraint that has a setting of its own in the recipe."""
    found = {}
    for name, bound in run.config.constraints.items():
        setting = "margin" if bound.margin is not None else "threshold" if bound.threshold is not None else None
        if setting is not None:
            words = ["dualign", "run", "--config", str(run.folder / "config.yaml"), "--run", run.name]
            words += [] if run.data_dir == Path("data") else ["--data-dir", str(run.data_dir)]
            words += [f"--constraints.{name}.{setting}", "{}", "--redo-from", "solve"]
            found[name] = Command(
                " ".join(word if word == "{}" else shlex.quote(word) for word in words), _SAME_SAMPLES
            )
    return found
