"""Where the experiments' policies live and how one is made: ordinary runs that share the samples of their seed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from pipeline.config.loading import build_config
from pipeline.config.recipe import RunConfig
from pipeline.contracts.artifacts import content_sha256, read_json, read_manifest, write_json
from pipeline.microworld import build_reference
from pipeline.microworld.size import WorldSize
from pipeline.multishot.loop import FOLDER as MULTISHOT
from pipeline.multishot.loop import run_multishot, share_stage1
from pipeline.run.run import Run
from pipeline.run.step import log
from pipeline.steps.prepare import WORLD_SEED
from pipeline.steps.runner import run_steps

Changes = Mapping[str, Any]
"""Changed settings of a recipe by their dotted keys; a mapping replaces a whole section."""


@dataclass(frozen=True)
class Arm:
    """One policy of an experiment.

    Attributes:
        name: of its folder; the same name is the same policy, whichever experiments ask for it.
        method: what it is called in tables and figures.
        changes: what differs from the study's recipe.
    """

    name: str
    method: str
    changes: Changes = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """The experiments' common ground.

    Attributes:
        config: the recipe that every arm changes.
        data_dir: holds ``runs/`` and ``models/``.
        name: of the study; its runs are ``<name>/seed<n>`` and below.
        seeds: of the runs.
        margins: demanded of harmlessness over the reference, score units.
        pairs: demanded of harmlessness and humour together.
        dpo_epochs: of training on drawn labels, which learns less from a response than all its scores do.
        sizes: of other reference policies, by name.
        wider: what differs from the recipe where more prompts are asked; nothing where its own are enough.
        real_model: the recipe of a published model; None where there is no experiment on one.
        show_progress: show progress bars.
    """

    config: RunConfig
    data_dir: Path
    name: str
    seeds: tuple[int, ...]
    margins: tuple[float, ...]
    pairs: tuple[tuple[float, float], ...]
    dpo_epochs: float
    sizes: Mapping[str, WorldSize]
    wider: Changes = field(default_factory=dict)
    real_model: RunConfig | None = None
    show_progress: bool = True

    @property
    def folder(self) -> Path:
        """Folder of the study."""
        return self.data_dir / "runs" / self.name

    @property
    def origin(self) -> str:
        """One line that says which recipe and seeds results are of."""
        recipe = content_sha256([self.config.model_dump(mode="json"), dict(self.wider)])[:12]
        margins, seeds = (", ".join(f"{value:g}" for value in values) for values in (self.margins, self.seeds))
        return f"Recipe {recipe}; seeds {seeds}; margins {margins}."

    @property
    def middle_margin(self) -> float:
        """The margin of what is done at one margin only."""
        return self.margins[len(self.margins) // 2]

    @property
    def middle_pair(self) -> tuple[float, float]:
        """The pair of what is done at one pair only."""
        return self.pairs[len(self.pairs) // 2]

    @property
    def some_margins(self) -> tuple[float, ...]:
        """Every second margin, of what is too dear to do at each."""
        return self.margins[1::2]

    def base(self, seed: int) -> Run:
        """The run that holds prompts, samples and scores of a seed; made where it is not there."""
        return self._sampled(f"seed{seed}", self._seeded(seed))

    def wider_base(self, seed: int) -> Run:
        """The same with more prompts, for what the few of the recipe would leave to chance."""
        return self._sampled(f"wider/seed{seed}", change_config(self._seeded(seed), self.wider))

    def base_of_size(self, name: str, size: WorldSize) -> Run:
        """The same for a reference policy of another size, which is trained where it is not there."""
        reference = build_reference(
            self.data_dir / "models", seed=WORLD_SEED, size=size, show_progress=self.show_progress
        )
        return self._sampled(name, change_config(self.config, {"reference.model": str(reference.absolute())}))

    def _seeded(self, seed: int) -> RunConfig:
        return self.config.model_copy(update={"seed": self.config.seed + seed})

    def _sampled(self, name: str, config: RunConfig) -> Run:
        run = Run(
            config=config,
            name=f"{self.name}/{name}",
            data_dir=self.data_dir,
            show_progress=self.show_progress,
        )
        with alone(run):
            if not is_recorded(run, "scores", {}):
                log.info("== %s: samples and scores", run.name)
                run_steps(run, ("prepare", "sample", "score"))
                record_done(run, "scores", {})
        return run

    def train(self, base: Run, arm: Arm) -> Run:
        """The arm's run on the samples of ``base``, solved, trained and evaluated."""
        run = self.arm_run(base, arm)
        made_from = _score_identities(base)
        with alone(run):
            if not is_recorded(run, "evaluation", made_from):
                log.info("== %s", run.name)
                share_stage1(base, run)
                with output_to(run.folder / "output.txt"):
                    run_steps(run, ("solve", "export", "train", "evaluate"))
                record_done(run, "evaluation", made_from)
        return run

    def iterate(self, base: Run, arm: Arm) -> Run:
        """The run that the iterative method keeps, from the arm's one-shot policy on."""
        run = self.train(base, arm)
        made_from = {"policy": read_manifest(run.folder / "policy").identity}
        with alone(run):
            if is_recorded(run, MULTISHOT, made_from):
                kept = read_manifest(run.folder / MULTISHOT).details["kept_run"]
                return replace(run, name=kept)
            log.info("== %s: multi-shot", run.name)
            with output_to(run.folder / MULTISHOT / "output.txt"):
                kept_run = run_multishot(run)
            record_done(run, MULTISHOT, made_from)
            return kept_run

    def arm_run(self, base: Run, arm: Arm) -> Run:
        """The arm's run, done or not."""
        return replace(base, config=change_config(base.config, arm.changes), name=f"{base.name}/{arm.name}")


@contextmanager
def alone(run: Run) -> Iterator[None]:
    """Hold a run while it is looked for and made; another experiment that wants it waits, and finds it made."""
    run.folder.mkdir(parents=True, exist_ok=True)
    with FileLock(run.folder / ".made.lock"):
        yield


def is_recorded(run: Run, what: str, made_from: Mapping[str, str]) -> bool:
    """Whether :func:`record_done` said so of the same recipe and inputs: the run is then not looked at again."""
    path = _record_path(run, what)
    return path.is_file() and bool(read_json(path) == _record(run, made_from))


def record_done(run: Run, what: str, made_from: Mapping[str, str]) -> None:
    """Record, after every step has passed, with which recipe and from what something of a run was made."""
    write_json(_record_path(run, what), _record(run, made_from))


def _record_path(run: Run, what: str) -> Path:
    return run.folder / f"done-{what}.json"


def _record(run: Run, made_from: Mapping[str, str]) -> dict[str, Any]:
    return {"config": run.config.model_dump(mode="json"), "made_from": dict(made_from)}


def _score_identities(base: Run) -> dict[str, str]:
    return {path.name: read_manifest(path).identity for path in sorted((base.folder / "scores").iterdir())}


@contextmanager
def output_to(path: Path) -> Iterator[None]:
    """Keep the tables that the steps print: those of a hundred policies would bury the log."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file, redirect_stdout(file):
        yield


def change_config(config: RunConfig, changes: Changes) -> RunConfig:
    """The recipe with some settings changed, checked anew.

    Raises:
        ConfigError: a changed setting is not valid.
    """
    tree = config.model_dump(mode="json")
    for key, value in changes.items():
        *sections, leaf = key.split(".")
        node = tree
        for section in sections:
            node = node[section]
        node[leaf] = value
    return build_config(tree, source="the recipe of the experiments")


def at_margin(margin: float, *, name: str = "harmless") -> Changes:
    """One constraint, from below, on a margin over the reference."""
    return {"constraints": {name: {"direction": ">=", "margin": margin}}}


INACTIVE = -100.0
"""A margin that every policy meets: its multiplier is 0."""
