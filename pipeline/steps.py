"""The run, step by step. A finished step is skipped, a killed one continues, a contradicting one is refused.

Each step reads the artifacts before it and leaves one folder with a manifest. Nothing else passes between steps.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import yaml

from pipeline.categories import means_by_category, prompt_categories
from pipeline.comparison import compare_policy, gold_means
from pipeline.config import ModelSettings, RunConfig
from pipeline.contracts.artifacts import (
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
)
from pipeline.contracts.errors import CorruptArtifactError, InputError
from pipeline.contracts.shards import write_table
from pipeline.contracts.tables import SPLITS
from pipeline.data_set_pairs import score_pairs, tilt_pairs, write_pairs
from pipeline.frontiers import sweep_constraints, write_frontier
from pipeline.handoff import write_dataset_card, write_tilted_table
from pipeline.microworld import build_world
from pipeline.preflight import check_run
from pipeline.prompts import PromptRow, build_prompt_table, limit_prompts, read_prompts
from pipeline.report import print_stage1, print_stage2, write_report
from pipeline.responses import Policy, reference_policy, sample_policy, show_prompts
from pipeline.run import Run, derived_step_is_current, finish_step, log, remedy, reopen, require_extra
from pipeline.run_scores import all_scores, reference_scores
from pipeline.sample_quality import apply_length_rule, describe_faults, describe_truncation
from pipeline.scores import ScoredRows
from pipeline.scoring import score_samples
from pipeline.solving import EvaluationSize, build_problem, solve_problem, tilted_weights

if TYPE_CHECKING:
    from stage2_policy.settings import TrainSettings
    from stage2_policy.trainer import TrainResult

WORLD_SEED = 0
"""The embedded world is an input like any checkpoint: the seed of a run draws samples, not worlds."""

_EVALUATION_SEED = 1_000_003
"""Added to the run's seed for the policy's samples: with equal seeds the two policies' samples would be correlated."""


@dataclass(frozen=True)
class Step:
    """One step: its subcommand's summary, the folder it owns, and the function that fills it."""

    summary: str
    folder: str
    perform: Callable[[Run], None]


def prepare(run: Run) -> None:
    """Write the prompts table and, for recipes that use it, build the embedded world."""
    started = time.monotonic()
    folder = run.folder / "prompts"
    inputs: dict[str, str] = {}
    details: dict[str, Any] = {}
    if run.uses_embedded:
        require_extra("sample", "torch", "transformers", purpose="building the embedded world")
        world = build_world(run.data_dir / "models", seed=WORLD_SEED, show_progress=run.show_progress)
        inputs["world"] = world.digest
        details["world"] = {
            "directory": str(world.directory.relative_to(run.data_dir)),
            "scorer_accuracy": dict(world.scorer_accuracy),
            "build_seconds": world.build_seconds,
        }
        shown = ", ".join(f"{name} {accuracy:.3f}" for name, accuracy in world.scorer_accuracy.items())
        log.info("prepare: pairwise accuracy of the scorers on held-out pairs: %s", shown)
    if run.config.prompts.source == "embedded":
        rows = (PromptRow(prompt.messages, prompt.split, prompt.category) for prompt in world.prompts)
        everything, repeated = build_prompt_table(rows, source="embedded")
    else:
        everything, repeated = read_prompts(run.config.prompts)
    prompts = limit_prompts(everything, run.config.prompts.limit)
    left_out = everything.num_rows - prompts.num_rows
    if run.config.reference.adapter is not None:
        _merge_reference(run)
    counts = {split: pc.sum(pc.equal(prompts["split"], split)).as_py() for split in SPLITS}
    counts |= {"repeated": repeated, "left_out": left_out}
    log.info("prepare: %d train and %d test prompts", counts["train"], counts["test"])
    if repeated:
        log.info("prepare: %d repeated prompts dropped", repeated)
    if left_out:
        log.info("prepare: %d prompts left out, beyond `prompts.limit` (%d)", left_out, run.config.prompts.limit)
    # The categories themselves are among the inputs: nothing that was sampled or scored depends on their column. The
    # limit shows in the inputs too: a larger one is a source that has grown.
    settings = run.config.prompts.model_dump(mode="json", exclude={"category_column", "limit"})
    details["limit"] = run.config.prompts.limit
    # A source may grow: the table is then written anew, and later steps compute only what is new.
    inputs["prompts"] = _prompts_identity(prompts)
    if derived_step_is_current(folder, step="prepare", settings=settings, inputs=inputs):
        return
    files = write_table(folder, prompts, metadata=run.table_metadata())
    finish_step(
        run,
        folder,
        "prepare",
        settings=settings,
        inputs=inputs,
        files=files,
        counts=counts,
        details=details,
        started=started,
    )


def _merge_reference(run: Run) -> None:
    """Write the reference with its adapter merged, once: what is sampled is then what is trained."""
    require_extra("train", "torch", "transformers", "peft", purpose="`reference.adapter`")
    from stage1_dual.adapters import write_merged_checkpoint

    started = time.monotonic()
    folder, reference = run.merged_reference, run.config.reference
    assert reference.adapter is not None
    base = run.model(ModelSettings(model=reference.model, revision=reference.revision), "reference")
    inputs = {"base": checkpoint_sha256(Path(base)), "adapter": checkpoint_sha256(Path(reference.adapter))}
    begin_step(folder, settings={}, inputs=inputs, remedy=remedy("prepare"))
    if is_complete(folder):
        return
    write_merged_checkpoint(base, reference.adapter, folder / "checkpoint")
    paths = sorted((folder / "checkpoint").iterdir())
    files = {str(path.relative_to(folder)): file_sha256(path) for path in paths}
    finish_step(run, folder, "prepare", settings={}, inputs=inputs, files=files, started=started)


def sample(run: Run) -> None:
    """Draw responses of the reference to the prompts of both splits, and tokenise the pairs of a data set, if any."""
    if run.config.training.pairs is not None:
        write_pairs(run)  # first: what is wrong with them is known before anything is drawn
    sample_policy(
        run,
        reference_policy(run),
        folder=run.folder / "samples",
        step="sample",
        splits=SPLITS,
        samples_per_prompt=run.config.sampling.samples_per_prompt,
        seed=run.config.seed,
    )


def score(run: Run) -> None:
    """Score every response with every scorer, one model in memory at a time."""
    score_samples(run, samples=run.folder / "samples", folder=run.folder / "scores", splits=SPLITS, step="score")
    if run.config.training.pairs is not None:
        score_pairs(run)


def solve(run: Run) -> None:
    """Minimise the dual, certify the answer, and write ``dual.json`` and the frontier."""
    started = time.monotonic()
    folder, config = run.folder / "dual", run.config
    settings = {
        "beta": config.beta,
        "reward": config.reward,
        "constraints": {name: bound.model_dump(mode="json") for name, bound in config.constraints.items()},
        **config.solve.model_dump(mode="json"),
        "seed": config.seed,
    }
    inputs = {
        **{name: read_manifest(run.folder / name).identity for name in ("prompts", "samples")},
        **{
            f"scores/{name}": read_manifest(run.folder / "scores" / name).identity
            for name in (config.reward, *config.constraints)
        },
    }
    if derived_step_is_current(folder, step="solve", settings=settings, inputs=inputs):
        return
    constraints = config.demanded_constraints()
    everything, n_unscored = all_scores(
        run, samples=run.folder / "samples", scores=run.folder / "scores", split="train"
    )
    train, test = apply_length_rule(everything, config.solve.on_length), reference_scores(run, "test")
    for split, rows in (("train", train), ("test", test)):
        if rows.n_samples == 0:
            raise InputError(
                f"no {split} response takes part: none was scored, or all were cut off at `sampling.max_new_tokens`, "
                f"{config.sampling.max_new_tokens}, and `solve.on_length` is {config.solve.on_length!r}"
            )
    heldout = build_problem(test, constraints=constraints, beta=config.beta)
    solved = solve_problem(
        build_problem(train, constraints=constraints, beta=config.beta),
        heldout=heldout,
        reward_name=config.reward,
        constraints=constraints,
        safeguards=config.safeguards(),
        evaluation=EvaluationSize(heldout.n_prompts, config.evaluation.samples_per_prompt),
        corrects_response_bias=config.solve.correct_response_bias,
        n_replicates=config.solve.bootstrap_replicates,
        rng=np.random.default_rng(config.seed),
    )
    dual = _describe_samples(run, solved.content, train, everything=everything, n_unscored=n_unscored)
    for entry in dual["constraints"]:
        added = sum(entry["safeguard"][name] for name in ("reserve", "assurance", "score_error"))
        if added:
            log.info("solve: %s is asked for %.3g beyond the demand, as its safeguards say", entry["name"], added)
    frontier = sweep_constraints(solved.problem, constraints, n_points=config.solve.frontier_points)
    write_frontier(folder / "frontier.parquet", frontier, metadata=run.table_metadata())
    write_json(folder / "dual.json", {**dual, "seed": config.seed, "inputs": inputs, "environment": environment()})
    finish_step(
        run,
        folder,
        "solve",
        settings=settings,
        inputs=inputs,
        files={name: file_sha256(folder / name) for name in ("dual.json", "frontier.parquet")},
        counts={"prompts": dual["n_prompts"], "samples": dual["n_samples"]},
        started=started,
    )


def export(run: Run) -> None:
    """Write the tilted table: every response with its scores and its weight under the tilted policy."""
    started = time.monotonic()
    folder = run.folder / "tilted"
    inputs = {name: read_manifest(run.folder / name).identity for name in ("prompts", "samples", "dual")}
    dual = read_json(run.folder / "dual" / "dual.json")
    if not derived_step_is_current(folder, step="export", settings={}, inputs=inputs):
        files, n_rows = write_tilted_table(
            folder,
            prompts=run.prompts_table(),
            samples=run.samples_table(run.folder / "samples"),
            scored={split: reference_scores(run, split) for split in SPLITS},
            dual=dual,
            metadata=run.table_metadata(),
        )
        write_dataset_card(folder, dual=dual, n_rows=n_rows, run=run.name, inputs=inputs)
        counts = {"rows": n_rows}
        finish_step(run, folder, "export", settings={}, inputs=inputs, files=files, counts=counts, started=started)
    if run.config.training.pairs is not None:
        tilt_pairs(run, dual)
    print_stage1(dual)


_SPEED_ONLY = ("tokens_per_microbatch", "gradient_checkpointing", "report_to")
"""Training settings that change no result."""


def train(run: Run) -> None:
    """Fine-tune the reference once on the tilted samples."""
    started = time.monotonic()
    folder = run.folder / "policy"
    # Lambda and beta are not among the settings: they are in the dual, which is an input, and so are the pairs.
    initial = run.config.training.initial
    recorded = {
        **run.config.training.model_dump(mode="json", exclude={*_SPEED_ONLY, "initial", "pairs"}),
        "seed": run.config.seed,
    }
    samples = read_manifest(run.folder / "samples")
    pairs = ("pairs/samples", "pairs/tilted") if run.config.training.pairs is not None else ()
    inputs = {
        **{name: read_manifest(run.folder / name).identity for name in ("tilted", "dual", "samples", *pairs)},
        "reference": samples.inputs["reference"],
        **({"initial": checkpoint_sha256(Path(initial))} if initial is not None else {}),
    }
    begin_step(folder, settings=recorded, inputs=inputs, remedy=remedy("train"))
    if is_complete(folder):
        log.info("train: done before, kept")
        return
    result = perform_training(run)
    log.info("train: %d steps, kept the one of step %d; %s", result.steps, result.best_step, result.stop_reason)
    if run.config.training.match_prediction:
        log.info("train: moved along the ray from the reference by %.3f to match the prediction", result.stretch)
        if result.falls_short_of_prediction:
            log.warning("train: the prediction is further off than that; train longer, or at a higher rate")
    # The card is left out: `evaluate` completes it with what was realised.
    files = {
        str(path.relative_to(folder)): file_sha256(path)
        for path in sorted([*folder.iterdir(), *folder.glob("adapter/*")])
        if path.is_file() and path.name not in {"README.md", "settings.json"}
    }
    finish_step(
        run,
        folder,
        "train",
        settings=recorded,
        inputs=inputs,
        files=files,
        counts={"responses": result.n_responses, "prompts": result.n_train_prompts, "steps": result.steps},
        details=asdict(result),
        started=started,
    )


def perform_training(run: Run) -> TrainResult:
    """The work of the step ``train``, without its manifest: what each process does under a launcher."""
    require_extra("train", "torch", "transformers", "accelerate", "peft", purpose="training")
    from stage2_policy.trainer import train_policy

    training = run.config.training
    return train_policy(
        reference=Path(run.model(run.config.reference, "reference")),
        samples=run.folder / "samples",
        tilted=run.folder / "tilted",
        dual=run.folder / "dual",
        output=run.folder / "policy",
        settings=train_settings(run.config),
        show_progress=run.show_progress,
        initial=None if training.initial is None else Path(training.initial),
        pairs=None if training.pairs is None else run.pairs,
        reference_logp=run.folder / "reference_logp",
        chat_template=_own_chat_template(run),
    )


def train_settings(config: RunConfig) -> TrainSettings:
    """The settings of training as stage 2 takes them; where it starts and what is read are not among them."""
    from stage2_policy.settings import TrainSettings

    return TrainSettings(**config.training.model_dump(exclude={"initial", "pairs"}), seed=config.seed)


def _own_chat_template(run: Run) -> str | None:
    """The chat template that the recipe gives the reference; None where it is the tokenizer's own."""
    from stage1_dual.sampling.prompts import load_tokenizer, resolve_chat_template

    reference = run.config.reference
    if reference.template is None:
        return None
    return resolve_chat_template(load_tokenizer(run.model(reference, "reference")), reference.template)


def evaluate(run: Run) -> None:
    """Sample the trained policy on the test prompts and compare what it does with what was predicted."""
    require_extra("train", "torch", "transformers", purpose="evaluating")
    from stage2_policy.export import write_model_card

    started = time.monotonic()
    folder, config = run.folder / "evaluation", run.config
    demands = {name: bound.model_dump(mode="json") for name, bound in config.constraints.items()}
    settings = {**config.evaluation.model_dump(mode="json"), "constraints": demands, "seed": config.seed}
    inputs = {name: read_manifest(run.folder / name).identity for name in ("policy", "dual", "samples")}
    begin_step(folder, settings=settings, inputs=inputs, remedy=remedy("evaluate"))
    dual = read_json(run.folder / "dual" / "dual.json")
    if is_complete(folder):
        log.info("evaluate: done before, kept")
    else:
        sample_policy(
            run,
            Policy("policy", str((run.folder / "policy").absolute())),
            folder=folder / "samples",
            step="evaluate",
            splits=("test",),
            samples_per_prompt=config.evaluation.samples_per_prompt,
            seed=config.seed + _EVALUATION_SEED,
        )
        score_samples(run, samples=folder / "samples", folder=folder / "scores", splits=("test",), step="evaluate")
        evaluation = compare_policy(run, dual=dual, samples=folder / "samples", scores=folder / "scores", split="test")
        if run.uses_embedded:
            evaluation["gold"] = gold_means(run, samples=folder / "samples", split="test")
        evaluation |= {"seed": config.seed, "inputs": inputs, "environment": environment()}
        write_json(folder / "evaluation.json", evaluation)
        write_model_card(run.folder / "policy", dual=dual, evaluation=evaluation)
        finish_step(
            run,
            folder,
            "evaluate",
            settings=settings,
            inputs=inputs,
            files={"evaluation.json": file_sha256(folder / "evaluation.json")},
            counts={"prompts": evaluation["n_prompts"], "samples": evaluation["n_samples"]},
            started=started,
        )
    print_stage2(read_json(folder / "evaluation.json"), dual)


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
    paths = write_report(run.folder, output=folder, published=published)
    files = {str(path.relative_to(folder)): file_sha256(path) for path in paths}
    finish_step(run, folder, "report", settings={}, inputs=inputs, files=files, started=started)
    log.info("report: %s", folder / "report.html")


STEPS: dict[str, Step] = {
    "prepare": Step("write the prompts; build the embedded world where a recipe uses it", "prompts", prepare),
    "sample": Step("draw responses from the reference policy", "samples", sample),
    "score": Step("score the responses", "scores", score),
    "solve": Step("minimise the dual and certify the answer", "dual", solve),
    "export": Step("write the tilted table", "tilted", export),
    "train": Step("fine-tune once on the tilted responses", "policy", train),
    "evaluate": Step("compare the trained policy with the prediction", "evaluation", evaluate),
    "report": Step("write the figures and the page", "report", report),
}

_OF_PAIRS: dict[str, tuple[str, ...]] = {
    "sample": ("pairs/prompts", "pairs/samples"),
    "score": ("pairs/scores",),
    "export": ("pairs/tilted",),
}
"""What a step leaves besides its own folder where the recipe trains on the pairs of a data set."""

STAGES: dict[str, tuple[str, ...]] = {
    "stage1": ("prepare", "sample", "score", "solve", "export"),
    "stage2": ("train", "evaluate", "report"),
    "run": tuple(STEPS),
}


def run_steps(run: Run, names: Sequence[str], *, redo_from: str | None = None) -> None:
    """Perform steps in order, holding the run.

    Args:
        run: the run.
        names: steps to perform.
        redo_from: a step to remove first, with all steps after it.

    Raises:
        DualignError: whatever makes a step stop; finished work is kept.
    """
    require_writable(run.folder)
    with run_lock(run.folder):
        if redo_from is not None:
            _discard_from(run, redo_from)
        _require_own_artifacts(run)
        check_run(run, names)
        for name in names:
            _require_earlier_steps(run, name, names)
            STEPS[name].perform(run)
            # After the step: a configuration that was refused is not the run's.
            _write_config(run)


def preview_samples(run: Run, *, n_prompts: int = 2) -> str:
    """What the reference would read of the first prompts, token ids included, and how it would be sampled.

    Nothing is written.

    Raises:
        InputError: the prompts, the tokenizer or the template cannot be used.
    """
    check_run(run, ("sample",))
    if is_complete(run.folder / "prompts"):
        table = run.prompts_table()
    elif run.uses_embedded:
        raise InputError(f"the embedded world of run `{run.name}` is not built; `dualign prepare` builds it")
    else:
        table = limit_prompts(read_prompts(run.config.prompts)[0], run.config.prompts.limit)
    rows = table.slice(0, n_prompts).to_pylist()
    return show_prompts(run, prompts=[(row["prompt_id"], row["prompt"]) for row in rows])


def read_status(run: Run) -> str:
    """The verdict of the run's evaluation: ``satisfied``, ``undecided`` or ``violated``."""
    return str(read_json(run.folder / "evaluation" / "evaluation.json")["status"])


def _describe_samples(
    run: Run, dual: dict[str, Any], train: ScoredRows, *, everything: ScoredRows, n_unscored: int
) -> dict[str, Any]:
    """What ``dual.json`` says about the samples besides the solution."""
    names = (run.config.reward, *run.config.constraints)
    manifest = read_manifest(run.folder / "samples")
    truncation = describe_truncation(everything, run.config.solve.on_length, names=names)
    faults = describe_faults(
        sampling=manifest.settings,
        truncation=truncation,
        n_unscored=n_unscored,
        n_prompts_lost=len(everything.prompt_ids) - len(train.prompt_ids),
        n_unsampled=manifest.counts["failed"],
        n_prompts_left_out=read_manifest(run.folder / "prompts").counts.get("left_out", 0),
    )
    for fault in faults:
        log.warning("solve: %s", fault)
    policies = {"reference": (train, None), "predicted": (train, tilted_weights(train, dual))}
    return {
        **dual,
        "by_category": means_by_category(policies, prompt_categories(run), names=names),
        "truncation": truncation,
        "warnings": [*dual["warnings"], *faults],
    }


def _prompts_identity(prompts: pa.Table) -> str:
    """Hash of a prompts table: the ids stand for the text, split and category are added."""
    return content_sha256(prompts.select(["prompt_id", "split", "category"]).to_pydict())


def _require_earlier_steps(run: Run, name: str, planned: Sequence[str]) -> None:
    order = list(STEPS)
    needed = ["solve", "export"] if name == "report" else order[: order.index(name)]
    for earlier in needed:
        of_pairs = _OF_PAIRS.get(earlier, ()) if run.config.training.pairs is not None else ()
        for folder in (STEPS[earlier].folder, *of_pairs):
            done = is_complete(run.folder / folder) if earlier != "score" else (run.folder / folder).is_dir()
            if not done and earlier not in planned:
                what = f" for `training.pairs` (no {folder})" if folder in of_pairs else ""
                raise InputError(
                    f"`dualign {name}` needs the step `{earlier}` of run `{run.name}`, which is not done{what}; run "
                    "it first"
                )


def _require_own_artifacts(run: Run) -> None:
    """A run that was copied under another name is whole; a manifest of another run beside files of this one is not."""
    folders = [run.folder / step.folder for name, step in STEPS.items() if name != "score"]
    folders += [run.pairs / name for name in ("prompts", "samples", "tilted")]
    folders += sorted([*(run.folder / "scores").glob("*"), *(run.pairs / "scores").glob("*")])
    for folder in (*folders, run.folder / "evaluation" / "samples"):
        if not is_complete(folder) or (found := read_manifest(folder)).run == run.name:
            continue
        for name, recorded in found.files.items():
            if file_sha256(folder / name) != recorded:
                raise CorruptArtifactError(
                    f"{folder / 'manifest.json'} is of run `{found.run}` and does not describe {folder / name}: this "
                    f"is run `{run.name}`. Move the folder away, and the step is done again"
                )


def _discard_from(run: Run, first: str) -> None:
    order = list(STEPS)
    discarded = [
        (name, run.folder / folder)
        for name in order[order.index(first) :]
        for folder in (STEPS[name].folder, *_OF_PAIRS.get(name, ()))
    ]
    for name, folder in discarded:
        if folder.is_symlink():
            raise InputError(
                f"the step `{name}` of run `{run.name}` is that of {folder.resolve().parent}, by a link; redo it there"
            )
    for name, folder in reversed(discarded):
        if folder.is_dir():
            reopen(folder)
            shutil.rmtree(folder)
            log.info("%s: removed, to be done anew", name)
    if first == "prepare" and run.merged_reference.is_dir():
        reopen(run.merged_reference)
        shutil.rmtree(run.merged_reference)


def _write_config(run: Run) -> None:
    text = yaml.safe_dump(run.config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    atomic_write_bytes(run.folder / "config.yaml", text.encode())
