"""What sampling until it is trusted has looked at, on disk beside the samples, and the size a run has by it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.contracts.artifacts import read_json_object, write_json
from pipeline.contracts.errors import CorruptArtifactError
from pipeline.run.run import Run

_FILE = "looks.json"


def looks_file(run: Run) -> Path:
    """Where the looks of a run are recorded: with its samples, which `--redo sample` replaces together with them."""
    return run.samples / _FILE


def read_looks(run: Run) -> list[dict[str, Any]]:
    """The looks so far, the first one first (docs/artifacts.md).

    Raises:
        CorruptArtifactError: the file is not what a look writes.
    """
    path = looks_file(run)
    if not path.is_file():
        return []
    looks = read_json_object(path).get("looks")
    if not isinstance(looks, list) or not all(_is_look(one) for one in looks):
        raise CorruptArtifactError(
            f"{path} does not hold the looks of `sampling.until`; delete it, and what is drawn is looked at again"
        )
    return looks


def write_looks(run: Run, looks: Sequence[Mapping[str, Any]]) -> None:
    """Record the looks, all of them at once."""
    write_json(looks_file(run), {"looks": list(looks)})


def sized(run: Run) -> Run:
    """The run at the size that the last look asks for; the run itself where nothing is sampled until it is trusted."""
    looks = read_looks(run) if run.config.sampling.until is not None else []
    if not looks:
        return run
    asked, config = looks[-1]["next"], run.config
    sampling = config.sampling.model_copy(
        update={"samples_per_prompt": max(asked["responses"], config.sampling.samples_per_prompt)}
    )
    prompts = config.prompts
    if prompts.limit is not None and asked["limit"] is not None:
        prompts = prompts.model_copy(update={"limit": max(asked["limit"], prompts.limit)})
    return replace(run, config=config.model_copy(update={"sampling": sampling, "prompts": prompts}))


def limit_reached(run: Run) -> list[str]:
    """A warning where the limits of ``sampling.until`` were reached before it held, for those who read the dual."""
    looks = read_looks(run) if run.config.sampling.until is not None else []
    if not looks or looks[-1].get("outcome") != "limit":
        return []
    reasons = "; ".join(map(str, looks[-1].get("reasons", ())))
    return [f"`sampling.until` does not hold, and its limits are reached: {reasons}"]


def _is_look(one: object) -> bool:
    if not isinstance(one, Mapping) or not isinstance(asked := one.get("next"), Mapping):
        return False
    limit = asked.get("limit")
    has_sizes = isinstance(asked.get("responses"), int) and (limit is None or isinstance(limit, int))
    return has_sizes and {"question", "drawn"} <= set(one)
