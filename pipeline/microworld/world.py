"""The built world on disk: what it holds, how it is read back, built once and cached."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import FileLock
from pydantic import BaseModel, ConfigDict, ValidationError
from tqdm import tqdm

from pipeline.contracts.errors import CorruptArtifactError, MissingExtraError
from pipeline.microworld.gold import SCORES
from pipeline.microworld.grammar import DATA_DIRECTORY, DATA_FILES, GrammarPrompt, read_grammar
from pipeline.microworld.size import WorldSize

_SCHEMA_VERSION = 1
_LIBRARIES = ("torch", "transformers", "tokenizers", "numpy")
_SOURCES = Path(__file__).parent


@dataclass(frozen=True)
class Prompt:
    """One prompt of the world, as chat messages with the keys ``role`` and ``content``."""

    messages: tuple[Mapping[str, str], ...]
    split: Literal["train", "test"]
    category: str


@dataclass(frozen=True)
class World:
    """A built world.

    Attributes:
        directory: holds everything below and ``world.json``, which describes it.
        digest: sha256 of all that decides the content: data files, sources, seed, size, library versions.
        reference: the checkpoint of the reference policy.
        scorers: checkpoints of the score models ``helpful``, ``harmless`` and ``humour``.
        prompts: all prompts, train and test.
        scorer_accuracy: for each scorer the share of held-out pairs it puts in the gold order.
        build_seconds: how long the build took.
    """

    directory: Path
    digest: str
    reference: Path
    scorers: Mapping[str, Path]
    prompts: tuple[Prompt, ...]
    scorer_accuracy: Mapping[str, float]
    build_seconds: float


def build_world(cache_root: Path, *, seed: int, show_progress: bool = True) -> World:
    """The embedded world for ``seed``: read from ``cache_root``, or built there first (about two minutes on 2 cores).

    Several processes may call this at once: one builds and the others wait for it. A build that is killed leaves
    nothing that could be taken for a world.

    Raises:
        InputError: a data file of the grammar is missing or wrong.
        MissingExtraError: torch, transformers or tokenizers is not installed.
        CorruptArtifactError: the cached world is damaged.
    """
    return build_world_of_size(cache_root, seed=seed, size=WorldSize(), show_progress=show_progress)


def build_world_of_size(cache_root: Path, *, seed: int, size: WorldSize, show_progress: bool) -> World:
    """:func:`build_world` for any size."""
    versions = _library_versions()
    digest = world_digest(seed=seed, size=size, versions=versions)

    def write(folder: Path) -> None:
        _write_world(folder, digest=digest, seed=seed, size=size, versions=versions, show_progress=show_progress)

    directory = cache_root / f"microworld-{digest[:12]}"
    _build_once(directory, write)
    return read_world(directory)


def build_reference(cache_root: Path, *, seed: int, size: WorldSize, show_progress: bool) -> Path:
    """The checkpoint of a reference policy of another size, trained on the same replies as the world's for ``seed``.

    Cached and built once like a world; arguments and errors as of :func:`build_world_of_size`.
    """
    digest = world_digest(seed=seed, size=size, versions=_library_versions())
    directory = cache_root / f"reference-{digest[:12]}"
    _build_once(directory, lambda folder: _write_reference(folder, seed=seed, size=size, show_progress=show_progress))
    return directory


def _build_once(directory: Path, write: Callable[[Path], None]) -> None:
    """Fill a folder of the cache unless it is there; other processes wait, and a killed build leaves nothing."""
    if directory.exists():
        return
    directory.parent.mkdir(parents=True, exist_ok=True)
    # The lock ends with its process, however that ends.
    with FileLock(directory.parent / f".{directory.name}.lock"):
        if directory.exists():
            return
        for leftover in directory.parent.glob(f".{directory.name}.*.partial"):
            shutil.rmtree(leftover)
        partial = directory.parent / f".{directory.name}.{uuid.uuid4().hex[:8]}.partial"
        partial.mkdir()
        try:
            write(partial)
            partial.rename(directory)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def read_world(directory: Path) -> World:
    """Read a built world; checks every file against its recorded sha256.

    Raises:
        CorruptArtifactError: the folder is no complete world, or a file is missing or changed.
    """
    record_path = directory / "world.json"
    try:
        record = _Record.model_validate_json(record_path.read_bytes())
    except (OSError, ValidationError) as error:
        raise CorruptArtifactError(f"{record_path} does not describe a built world: {error}") from error
    for name, expected in record.files.items():
        path = directory / name
        if not path.is_file() or _hash_file(path) != expected:
            raise CorruptArtifactError(
                f"{path} is missing or differs from what {record_path.name} records; delete {directory} to rebuild it"
            )
    prompts = json.loads((directory / "prompts.json").read_text(encoding="utf-8"))
    return World(
        directory=directory,
        digest=record.digest,
        reference=directory / "reference",
        scorers={name: directory / "scorers" / name for name in SCORES},
        prompts=tuple(
            Prompt(messages=tuple(row["messages"]), split=row["split"], category=row["category"]) for row in prompts
        ),
        scorer_accuracy=record.scorer_accuracy,
        build_seconds=record.build_seconds,
    )


def world_digest(*, seed: int, size: WorldSize, versions: Mapping[str, str]) -> str:
    """sha256 of all that decides the content of a world."""
    files = [DATA_DIRECTORY / name for name in DATA_FILES] + sorted(_SOURCES.glob("*.py"))
    read_grammar()  # names a missing or wrong data file better than its hash could
    facts = {
        "schema_version": _SCHEMA_VERSION,
        "seed": seed,
        "size": asdict(size),
        "versions": dict(versions),
        "files": {path.name: _hash_file(path) for path in files},
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


class _Record(BaseModel):
    """The content of ``world.json``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1]
    digest: str
    seed: int
    size: dict[str, int | float]
    versions: dict[str, str]
    n_parameters: dict[str, int]
    final_losses: dict[str, float]
    scorer_accuracy: dict[str, float]
    build_seconds: float
    files: dict[str, str]


def _write_world(
    directory: Path, *, digest: str, seed: int, size: WorldSize, versions: Mapping[str, str], show_progress: bool
) -> None:
    # These import torch, which a cached world does not need.
    from pipeline.microworld.policy import plan_policy
    from pipeline.microworld.scorers import plan_scorers
    from pipeline.microworld.training import TrainingJob, hidden_write_progress, reproducible_torch, train_models

    started = time.monotonic()
    grammar = read_grammar()
    seeds = _seeds(seed)
    train, test = _split_prompts(grammar.build_prompts(), size=size, rng=np.random.default_rng(seeds[0]))
    _write_prompts(directory / "prompts.json", train=train, test=test)
    with (
        reproducible_torch(seed=seeds[1]),
        tqdm(
            desc="building the embedded world",
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed} passed, {remaining} left",
            total=1,
            smoothing=0,  # all steps count alike, as the two kinds of steps alternate
            disable=not show_progress,
        ) as progress,
    ):
        policy, policy_job = plan_policy(grammar, train, size=size, seed=seeds[2])
        scorers, scorer_jobs = plan_scorers(grammar, train, size=size, seed=seeds[3])
        jobs: list[TrainingJob[Any]] = [policy_job, *scorer_jobs]
        progress.total = sum(len(job.batches) * job.step_cost for job in jobs)
        losses = train_models(jobs, advance=progress.update)
        accuracy = {
            scorer.name: scorer.measure_accuracy(grammar, test, n_pairs=size.n_heldout_pairs, seed=seeds[4])
            for scorer in scorers
        }
    with hidden_write_progress():
        policy.write(directory / "reference")
        for scorer in scorers:
            scorer.write(directory / "scorers" / scorer.name)
    record = _Record(
        schema_version=_SCHEMA_VERSION,
        digest=digest,
        seed=seed,
        size=asdict(size),
        versions=dict(versions),
        n_parameters={job.name: sum(weight.numel() for weight in job.model.parameters()) for job in jobs},
        final_losses={name: float(np.mean(steps[-20:])) for name, steps in losses.items()},
        scorer_accuracy=accuracy,
        build_seconds=time.monotonic() - started,
        files={
            path.relative_to(directory).as_posix(): _hash_file(path)
            for path in sorted(directory.rglob("*"))
            if path.is_file()
        },
    )
    (directory / "world.json").write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")


def _write_reference(directory: Path, *, seed: int, size: WorldSize, show_progress: bool) -> None:
    from pipeline.microworld.policy import plan_policy
    from pipeline.microworld.training import hidden_write_progress, reproducible_torch, train_models

    grammar = read_grammar()
    seeds = _seeds(seed)
    train, _ = _split_prompts(grammar.build_prompts(), size=size, rng=np.random.default_rng(seeds[0]))
    with (
        reproducible_torch(seed=seeds[1]),
        tqdm(desc="training a reference policy", disable=not show_progress) as progress,
    ):
        policy, job = plan_policy(grammar, train, size=size, seed=seeds[2])
        progress.total = len(job.batches)
        train_models([job], advance=lambda _: progress.update())
    with hidden_write_progress():
        policy.write(directory)


def _seeds(seed: int) -> list[int]:
    return [int(child.generate_state(1)[0]) for child in np.random.SeedSequence(seed).spawn(5)]


def _split_prompts(
    prompts: tuple[GrammarPrompt, ...], *, size: WorldSize, rng: np.random.Generator
) -> tuple[list[GrammarPrompt], list[GrammarPrompt]]:
    """Random train and test prompts that have no prompt in common."""
    shuffled = [prompts[index] for index in rng.permutation(len(prompts))]
    return shuffled[: size.n_train_prompts], shuffled[len(prompts) - size.n_test_prompts :]


def _write_prompts(path: Path, *, train: list[GrammarPrompt], test: list[GrammarPrompt]) -> None:
    rows = [
        {"messages": [{"role": "user", "content": prompt.text}], "split": split, "category": prompt.topic}
        for split, prompts in (("train", train), ("test", test))
        for prompt in prompts
    ]
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def _library_versions() -> dict[str, str]:
    versions = {}
    for library in _LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError as error:
            raise MissingExtraError(package=library, extra="sample", purpose="building the embedded world") from error
    return versions


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
