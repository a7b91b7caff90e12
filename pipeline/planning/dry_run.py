"""``--dry-run``: the whole recipe checked, and what it would load, sample, score and train, with estimates.

Reaches no network and writes nothing. What is not on this machine is named, and its size taken from the table of
facts (``pipeline/published``) or called unknown.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipeline.config.recipe import RunConfig
from pipeline.config.sections import WIDER, PromptSettings
from pipeline.contracts.artifacts import is_complete, read_manifest
from pipeline.contracts.errors import InputError, MissingExtraError
from pipeline.contracts.section import Dtype
from pipeline.contracts.tables import SPLITS
from pipeline.microworld.grammar import read_grammar
from pipeline.microworld.size import WorldSize
from pipeline.planning import estimates
from pipeline.planning.estimates import (
    CHARACTERS_PER_TOKEN,
    DEVICES,
    PROMPT_TOKENS,
    RESPONSE_SHARE,
    Device,
    Size,
    Work,
    adapter_parameters,
    draw,
    mapped_bytes,
    policy_bytes,
    read,
    scoring_bytes,
    sequences_at_once,
    stored_bytes,
    table_bytes,
    train,
    training_bytes,
    weight_bytes,
)
from pipeline.planning.model_sizes import embedded_size, read_gguf_size, read_size
from pipeline.planning.training_steps import StepCount, bound_steps, count_on_tables, measure_lengths
from pipeline.published import ModelFacts, read_data_set_facts, read_model_facts
from pipeline.run.looks import sized
from pipeline.run.run import Run
from pipeline.run.step import log
from pipeline.scorers.models import EMBEDDED, ModelSettings, find_model, is_gguf, is_hub_id
from pipeline.scoring.demanded import demands_on
from pipeline.scoring.groups import check_new_responses
from pipeline.sources.pairs import pair_reader, read_pairs
from pipeline.sources.prompts import limit_prompts, read_prompts
from pipeline.steps.preflight import check_models, check_packages, check_training
from pipeline.steps.prepare import prompts_are_prepared
from pipeline.steps.runner import STEPS
from stage2_policy.data import count_held_out

_AT_ONCE = 256
"""Completions that vLLM decodes at the same time on most GPUs, where the recipe does not say."""


@dataclass(frozen=True)
class PlannedPrompts:
    """The prompts of a run.

    Attributes:
        where: what they are read from.
        counts: prompts of each split; None where not known.
        exact: whether they were counted, as opposed to bounded from above.
        characters: of one prompt in the mean, without its template; None where they were not read.
    """

    where: str
    counts: Mapping[str, int | None]
    exact: bool
    characters: float | None


@dataclass(frozen=True)
class PlannedPairs:
    """The pairs of a data set that are trained on.

    Attributes:
        where: what they are read from.
        count: how many; None where not known.
        bound: what the count is, such as ``at most``.
        counted: whether they were read and counted.
    """

    where: str
    count: int | None
    bound: str
    counted: bool = False


@dataclass(frozen=True)
class PlannedLengths:
    """Tokens of prompts and responses in the mean.

    Attributes:
        prompt: of a prompt, with its template.
        response: of a response.
        prompt_from: where the first comes from.
        response_from: where the second comes from.
    """

    prompt: float
    response: float
    prompt_from: str
    response_from: str


@dataclass(frozen=True)
class PlannedModel:
    """A model of a run.

    Attributes:
        setting: where the recipe names it.
        name: as the recipe names it, with its revision.
        place: on this machine, on the Hub, or to be built.
        size: None where not known.
        dtype: it is loaded in.
        licence: a note; empty for what is built here.
        fetched_bytes: what is still to be fetched; None where not known.
    """

    setting: str
    name: str
    place: str
    size: Size | None
    dtype: Dtype
    licence: str
    fetched_bytes: float | None


@dataclass(frozen=True)
class PlannedRequests:
    """What a scorer sends to an endpoint, at most: equal responses and what was answered before are not sent.

    Attributes:
        scorer: its name.
        url: where to.
        model: as it is called there.
        requests: how many; None where the number of responses is not known.
        tokens: of their texts; None likewise.
        per_minute: most requests a minute; None for no limit.
    """

    scorer: str
    url: str
    model: str
    requests: int | None
    tokens: float | None
    per_minute: float | None


@dataclass(frozen=True)
class Memory:
    """What a step needs of a device's memory, bytes; None where not known."""

    what: str
    needed: float | None


@dataclass(frozen=True)
class Plan:
    """What a run would do.

    Attributes:
        prompts: its prompts.
        pairs: those of a data set that it trains on; None where it trains on what it samples.
        lengths: of prompts and responses.
        models: its models.
        works: tokens through models, in the order of the run; empty where the number of prompts or a size is unknown.
        unknown: why works are missing.
        requests: what is sent elsewhere.
        sequences: prompts × responses, by step; ``pairs`` are the two responses of each pair.
        steps: optimisation steps of training; None where nothing can be said of them.
        trained: weights that are trained; None where not known.
        at_once: sequences decoded at the same time, by device.
        memory: of scoring and training.
        disk: bytes by what takes them.
        needed: inputs and packages that are not here.
    """

    prompts: PlannedPrompts
    pairs: PlannedPairs | None
    lengths: PlannedLengths
    models: tuple[PlannedModel, ...]
    works: tuple[Work, ...]
    unknown: tuple[str, ...]
    requests: tuple[PlannedRequests, ...]
    sequences: Mapping[str, int]
    steps: StepCount | None
    trained: int | None
    at_once: Mapping[str, int]
    memory: tuple[Memory, ...]
    disk: Mapping[str, float]
    needed: tuple[str, ...]


def plan_run(run: Run, steps: Sequence[str]) -> Plan:
    """Check a recipe and plan its steps.

    Raises:
        InputError: what the recipe says cannot be, or a file or folder that is here does not fit it.
    """
    config = run.config
    needed = [*_missing_packages(run, steps)]
    check_models(run, locate=find_model)
    if "evaluate" in steps:
        check_new_responses(config)
    if {"sample", "train"} & set(steps):
        check_training(run, locate=find_model)
    prompts = _plan_prompts(run, needed)
    pairs = _plan_pairs(config, needed)
    lengths = _plan_lengths(run, prompts)
    models = _plan_models(run, needed)
    sizes = {model.setting: model.size for model in models}
    unknown = [f"the size of {model.name}" for model in models if model.size is None]
    unknown += [f"the number of {split} prompts" for split, count in prompts.counts.items() if count is None]
    unknown += ["the number of pairs"] if pairs is not None and pairs.count is None else []
    reference = sizes["reference"]
    sequences = _sequences(config, prompts, pairs, steps)
    works: tuple[Work, ...] = ()
    if not unknown:
        assert reference is not None
        known = {setting: size for setting, size in sizes.items() if size is not None}
        works = tuple(_works(config, lengths, sequences, known, steps))
    trained = _trained(config, reference)
    return Plan(
        prompts=prompts,
        pairs=pairs,
        lengths=lengths,
        models=models,
        works=works,
        unknown=tuple(dict.fromkeys(unknown)),
        requests=tuple(_requests(config, lengths, sequences, steps)),
        sequences=sequences,
        steps=_count_steps(run, prompts, pairs, sequences) if "train" in steps else None,
        trained=trained,
        at_once=_at_once(config, lengths, reference) if {"sample", "evaluate"} & set(steps) else {},
        memory=tuple(_memory(config, sizes, steps, trained)),
        disk=_disk(config, lengths, models, sequences, steps, trained),
        needed=tuple(dict.fromkeys(needed)),
    )


def _missing_packages(run: Run, steps: Sequence[str]) -> Iterator[str]:
    for step in steps:
        try:
            check_packages(run, (step,))
        except MissingExtraError as error:
            yield str(error)


def _plan_prompts(run: Run, needed: list[str]) -> PlannedPrompts:
    settings = run.config.prompts
    if prompts_are_prepared(run):
        where = "the embedded world" if settings.source == "embedded" else settings.source
        return _read_prompts(run, run.prompts_table(), f"{where}, as prepared")
    if settings.source == "embedded":
        size = WorldSize()
        # The world takes its prompts from these at random.
        texts = [prompt.text for prompt in read_grammar().build_prompts()]
        counts: dict[str, int | None] = {"train": size.n_train_prompts, "test": size.n_test_prompts}
        where, exact, characters = "the embedded world", True, sum(map(len, texts)) / len(texts)
    elif settings.source == WIDER or Path(settings.source).is_file():
        return _read_prompts(run, limit_prompts(read_prompts(settings)[0], settings.limit), settings.source)
    else:
        counts, where = _data_set(settings, "prompts", needed)
        exact, characters = False, None
    if settings.limit is not None:
        counts = {split: settings.limit if n is None else min(n, settings.limit) for split, n in counts.items()}
    return PlannedPrompts(where=where, counts=counts, exact=exact, characters=characters)


def _read_prompts(run: Run, table: pa.Table, where: str) -> PlannedPrompts:
    for warning in demands_on(run.config, table).warnings:
        log.warning("%s", warning)
    splits = table["split"].to_pylist()
    texts = ["".join(message["content"] for message in row) for row in table["prompt"].to_pylist()]
    return PlannedPrompts(
        where=where,
        counts={split: splits.count(split) for split in SPLITS},
        exact=True,
        characters=sum(map(len, texts)) / len(texts),
    )


def _plan_lengths(run: Run, prompts: PlannedPrompts) -> PlannedLengths:
    measured = measure_lengths(run)
    if measured is not None:
        return PlannedLengths(measured.prompt, measured.response, "of the samples", "of the samples")
    if prompts.characters is None:
        prompt, prompt_from = float(PROMPT_TOKENS), "assumed"
    else:
        prompt, prompt_from = prompts.characters / CHARACTERS_PER_TOKEN, "their characters / 4"
    response = RESPONSE_SHARE * run.config.sampling.max_new_tokens
    return PlannedLengths(prompt, response, prompt_from, f"{RESPONSE_SHARE:.0%} of its limit")


def _plan_pairs(config: RunConfig, needed: list[str]) -> PlannedPairs | None:
    settings = config.training.pairs
    if settings is None:
        return None
    if Path(settings.source).is_file():
        # Test prompts of the run, and responses that are too long, are left out later.
        n_pairs = len(read_pairs(config, test_prompts=set()).pairs)
        return PlannedPairs(settings.source, n_pairs, bound="at most", counted=True)
    counts, where = _data_set(pair_reader(config), "training.pairs", needed)
    count, bound = counts["train"], "at most"
    if settings.limit is not None and count is not None:
        count, bound = min(count, settings.limit), "at a pair a prompt"
    return PlannedPairs(where, count, bound="" if count is None else bound)


def _data_set(settings: PromptSettings, section: str, needed: list[str]) -> tuple[dict[str, int | None], str]:
    unknown: dict[str, int | None] = dict.fromkeys(SPLITS)
    if Path(settings.source).is_dir():
        return unknown, f"{settings.source}, a folder; its rows are not counted here"
    if not is_hub_id(settings.source):
        needed.append(f"`{section}.source` {settings.source}: there is no such file or folder yet")
        return unknown, f"{settings.source}, which is not here yet"
    if settings.revision is None:
        raise InputError(f"`{section}.source` is {settings.source!r}, on the Hub; give its `{section}.revision` too")
    where = f"{settings.source} at {settings.revision}, on the Hub"
    facts = read_data_set_facts().get(settings.source)
    if facts is None:
        return unknown, f"{where}; rows unknown; licence: see its page"
    where += f"; licence: {facts.licence}"
    chosen: Mapping[str, str] | None
    chosen = settings.dataset_splits or ({name: name for name in SPLITS} if set(SPLITS) <= set(facts.rows) else None)
    if chosen is None or settings.split_column is not None:
        total = sum(facts.rows.values())
        n_test = round(total * settings.test_fraction)
        return {"train": total - n_test, "test": n_test}, where
    counts: dict[str, int | None] = dict.fromkeys(SPLITS, 0)
    for name, split in chosen.items():
        rows, so_far = facts.rows.get(name), counts[split]
        counts[split] = None if rows is None or so_far is None else so_far + rows
    return counts, where


def _plan_models(run: Run, needed: list[str]) -> tuple[PlannedModel, ...]:
    config = run.config
    embedded = {"reference": run.world.reference, **run.world.scorers} if _is_world_built(run) else {}
    models = {
        setting: _plan_model(setting, model, embedded, needed) for setting, model in config.checkpoints().items()
    }
    for name, scorer in config.scorers.items():
        setting = f"scorers.{name}"
        is_tuned = None in scorer.checkpoints().values()
        if is_tuned and setting in models and models[setting].size is None:
            size = models["reference"].size
            place = f"{models[setting].place}; taken to be as large as the reference, from which it was tuned"
            models[setting] = replace(models[setting], size=size, place=place)
    return tuple(models.values())


def _is_world_built(run: Run) -> bool:
    """Whether `prepare` has built the embedded world of this run, and it is still there."""
    details = read_manifest(run.prompts).details if is_complete(run.prompts) else {}
    return "world" in details and (run.data_dir / str(details["world"]["directory"])).is_dir()


def _plan_model(setting: str, model: ModelSettings, embedded: Mapping[str, Path], needed: list[str]) -> PlannedModel:
    name = model.model if model.revision is None else f"{model.model} at {model.revision}"
    facts = read_model_facts().get(model.model)
    size = None
    fetched: float | None = 0.0
    licence = facts.licence if facts is not None else "see its card"
    if model.model.startswith(EMBEDDED):
        licence = ""
    if model.model.startswith(EMBEDDED) and not embedded:
        size = embedded_size(model.model.removeprefix(EMBEDDED), WorldSize())
        place = "built by `dualign prepare`, in about two minutes"
    elif (found := find_model(model, embedded, setting=setting)) is not None and is_gguf(model.model):
        size = read_gguf_size(Path(found))
        place = f"a GGUF file here, {Path(found).stat().st_size / 1e9:.3g} GB, dequantised by `dualign prepare`"
    elif found is not None:
        size = read_size(Path(found))
        place = f"here, {_folder_bytes(Path(found)) / 1e9:.3g} GB"
    elif is_hub_id(model.model):
        place = "on the Hub, to be fetched"
        if facts is not None:
            size = _published_size(facts)
            if facts.weights == "bin":
                needed.append(
                    f"`{setting}.model` {model.model}: published as .bin only; fetch it by hand, convert it once "
                    "(docs/scorers.md, Weights) and name the folder"
                )
        fetched = None if size is None else stored_bytes(size)
    else:
        needed.append(
            f"`{setting}.model` {model.model}: there is no such {'file' if is_gguf(model.model) else 'folder'} yet"
        )
        place = "not here yet"
        size = None if facts is None else _published_size(facts)
    return PlannedModel(setting, name, place, size, model.dtype, licence, fetched)


def _published_size(facts: ModelFacts) -> Size:
    return Size(
        parameters=facts.parameters,
        layers=facts.layers,
        hidden=facts.hidden,
        kv_width=facts.kv_width,
        intermediate=facts.intermediate,
        decoder=facts.decoder,
    )


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def _sequences(
    config: RunConfig, prompts: PlannedPrompts, pairs: PlannedPairs | None, steps: Sequence[str]
) -> dict[str, int]:
    train_prompts, test_prompts = (prompts.counts[split] for split in SPLITS)
    if train_prompts is None or test_prompts is None or (pairs is not None and pairs.count is None):
        return {}
    of_pairs = 0 if pairs is None or pairs.count is None else 2 * pairs.count
    samples = config.sampling.samples_per_prompt
    found = {
        "sample": (train_prompts + test_prompts) * samples,
        "pairs": of_pairs,
        "evaluate": test_prompts * config.evaluation.samples_per_prompt,
    }
    if "train" in steps:
        held_out = count_held_out(train_prompts, fraction=config.training.held_out_fraction)
        found["train"] = (train_prompts - held_out) * samples if pairs is None else of_pairs
        found["held_out"] = held_out * samples
    return found


def _works(
    config: RunConfig,
    lengths: PlannedLengths,
    sequences: Mapping[str, int],
    sizes: Mapping[str, Size],
    steps: Sequence[str],
) -> Iterator[Work]:
    """Every pass of tokens through a model."""
    response = lengths.response
    whole = lengths.prompt + response
    parameters, dtype = sizes["reference"].parameters, config.reference.dtype
    if "sample" in steps:
        yield draw("sample", tokens=sequences["sample"] * response, parameters=parameters, dtype=dtype)
    if "score" in steps:
        for name, weights, scorer_dtype in _passes(config, sizes):
            tokens = (sequences["sample"] + sequences["pairs"]) * whole
            yield read(f"score {name}", tokens=tokens, parameters=weights, dtype=scorer_dtype)
    training = config.training
    if "train" in steps:
        both = (sequences["train"] + sequences["held_out"]) * whole
        yield read("train: log π_ref", tokens=both, parameters=parameters, dtype=training.dtype)
        yield train(
            "train",
            tokens=training.epochs * sequences["train"] * whole,
            parameters=parameters,
            dtype=training.dtype,
            adapter=training.adapter != "none",
            recomputes=training.gradient_checkpointing,
        )
        checks = training.evaluations * sequences["held_out"] * whole
        yield read("train: held-out checks", tokens=checks, parameters=parameters, dtype=training.dtype)
    if "evaluate" in steps:
        yield draw("evaluate: sample", tokens=sequences["evaluate"] * response, parameters=parameters, dtype=dtype)
        for name, weights, scorer_dtype in _passes(config, sizes):
            tokens = sequences["evaluate"] * whole
            yield read(f"evaluate: score {name}", tokens=tokens, parameters=weights, dtype=scorer_dtype)
        tokens = 2 * sequences["evaluate"] * whole
        yield read("evaluate: log-ratios", tokens=tokens, parameters=parameters, dtype=dtype)


def _requests(
    config: RunConfig, lengths: PlannedLengths, sequences: Mapping[str, int], steps: Sequence[str]
) -> Iterator[PlannedRequests]:
    for name, scorer in config.used_scorers().items():
        remote = scorer.remote()
        if remote is None or not {"score", "evaluate"} & set(steps):
            continue
        count = None
        if sequences:
            scored = (1 + scorer.repeated_share) * sequences["sample"] + sequences["pairs"] if "score" in steps else 0
            count = round((scored + (sequences["evaluate"] if "evaluate" in steps else 0)) * remote.requests)
        each = lengths.prompt + lengths.response + remote.characters / CHARACTERS_PER_TOKEN
        tokens = None if count is None else count * each
        yield PlannedRequests(name, remote.url, remote.model, count, tokens, remote.per_minute)


def _passes(config: RunConfig, sizes: Mapping[str, Size]) -> Iterator[tuple[str, int, Dtype]]:
    """Names, weights and type of what goes over all texts; a checkpoint that is read alike counts once."""
    shared: dict[object, tuple[list[str], int, Dtype]] = {}
    for name, scorer in config.used_scorers().items():
        models = config.models_of(name)
        if not models:
            continue
        common = scorer.shared_settings()
        places = tuple((model.model, model.revision) for _, model in models.values())
        key = name if common is None else (type(scorer), places, common)
        weights = sum(sizes[setting].parameters for setting, _ in models.values())
        shared.setdefault(key, ([], weights, _dtype(models)))[0].append(name)
    for names, weights, dtype in shared.values():
        yield ", ".join(names), weights, dtype


def _dtype(models: Mapping[str, tuple[str, ModelSettings]]) -> Dtype:
    """The type that a scorer computes in: that of its first model, its own."""
    _, own = next(iter(models.values()))
    return own.dtype


def _count_steps(
    run: Run, prompts: PlannedPrompts, pairs: PlannedPairs | None, sequences: Mapping[str, int]
) -> StepCount | None:
    """The steps of training by its own functions; None where neither responses nor prompts can be read."""
    counted = count_on_tables(run)
    if counted is not None:
        return counted
    # Of prompts that were not read, no length is known; and of pairs that were not read, not how many a prompt has.
    if prompts.characters is None or not sequences or (pairs is not None and not pairs.counted):
        return None
    compared = run.config.sampling.samples_per_prompt if pairs is None else 2
    return bound_steps(
        run.config.training,
        n_prompts=sequences["train"] // compared,
        responses_per_prompt=compared,
        prompt_tokens=prompts.characters / CHARACTERS_PER_TOKEN,
        most_response_tokens=run.config.sampling.max_new_tokens,
        at_most=pairs is not None,
    )


def _trained(config: RunConfig, reference: Size | None) -> int | None:
    if reference is None:
        return None
    training = config.training
    if training.adapter == "none":
        return reference.parameters
    return adapter_parameters(reference, rank=training.lora_r, modules=training.lora_target_modules)


def _at_once(config: RunConfig, lengths: PlannedLengths, reference: Size | None) -> dict[str, int]:
    if reference is None:
        return {}
    found = {
        device.name: sequences_at_once(
            reference,
            config.reference.dtype,
            device=device,
            share=config.sampling.gpu_memory_utilization,
            tokens=lengths.prompt + config.sampling.max_new_tokens,
            at_most=config.sampling.max_num_seqs or _AT_ONCE,
        )
        for device in DEVICES
    }
    return {name: count for name, count in found.items() if count is not None}


def _memory(
    config: RunConfig, sizes: Mapping[str, Size | None], steps: Sequence[str], trained: int | None
) -> Iterator[Memory]:
    reference = sizes["reference"]
    if {"sample", "evaluate"} & set(steps):
        needed = None if reference is None else weight_bytes(reference, config.reference.dtype)
        yield Memory("sample: the weights alone", needed)
    if {"score", "evaluate"} & set(steps):
        for name, scorer in config.used_scorers().items():
            models = config.models_of(name)
            if not models:
                continue
            found = [size for setting, _ in models.values() if (size := sizes[setting]) is not None]
            whole = len(found) == len(models)
            held = scorer.copies * found
            scoring = scoring_bytes(held, _dtype(models), batch_tokens=scorer.tokens_at_once) if whole else None
            yield Memory(f"score {name}", scoring)
    if "train" in steps:
        training = config.training
        needed = None
        if reference is not None and trained is not None:
            needed = training_bytes(
                reference,
                dtype=training.dtype,
                adapter=training.adapter,
                trained=trained,
                microbatch=training.tokens_per_microbatch,
                recomputes=training.gradient_checkpointing,
            )
        yield Memory("train", needed)


def _disk(
    config: RunConfig,
    lengths: PlannedLengths,
    models: Sequence[PlannedModel],
    sequences: Mapping[str, int],
    steps: Sequence[str],
    trained: int | None,
) -> dict[str, float]:
    found: dict[str, float] = {}
    fetched = {model.name: model.fetched_bytes for model in models}
    known = [size for size in fetched.values() if size is not None]
    if sum(known):
        found["models to be fetched" + ("" if len(known) == len(fetched) else ", those known")] = sum(known)
    rows = (sequences.get("sample", 0) + sequences.get("pairs", 0) if "sample" in steps else 0) + (
        sequences.get("evaluate", 0) if "evaluate" in steps else 0
    )
    if rows:
        tokens = rows * (lengths.prompt + lengths.response)
        found["samples, scores and tilted table"] = table_bytes(
            tokens=tokens, rows=rows, n_scorers=len(config.scorers)
        )
    if "train" in sequences:
        # A prompt is written once for the responses that follow each other: about once for those of a run.
        prompts = sequences["held_out"] / config.sampling.samples_per_prompt + (
            sequences["train"] / (2 if sequences["pairs"] else config.sampling.samples_per_prompt)
        )
        found["responses that training maps, while it runs"] = mapped_bytes(
            rows=sequences["train"] + sequences["held_out"],
            response=lengths.response,
            prompts=prompts,
            prompt=lengths.prompt,
        )
    reference = next(model.size for model in models if model.setting == "reference")
    if "train" in steps and reference is not None and trained is not None:
        found["policy, with its checkpoints while it trains"] = policy_bytes(reference, trained=trained)
    return found


def total_seconds(plan: Plan, device: Device) -> float:
    """Time of all passes of a plan on one device."""
    return sum(work.seconds(device) for work in plan.works)


def show_plan(run: Run, steps: Sequence[str]) -> str:
    """The plan of a run's steps, as text.

    Raises:
        InputError: see :func:`plan_run`.
    """
    run = sized(run)
    config, plan = run.config, plan_run(run, steps)
    jinja = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # noqa: S701  # plain text
    )
    jinja.filters.update(count=_count, time=_time, gb=_gb, fits=_fits)
    template = jinja.get_template("dry_run.txt.jinja")
    return template.render(
        run=run,
        config=config,
        plan=plan,
        steps=steps,
        done=[name for name in steps if _is_done(run, name)],
        response=plan.lengths.response,
        devices=DEVICES,
        totals=[total_seconds(plan, device) for device in DEVICES],
        assumed=estimates,
    ).rstrip()


def _is_done(run: Run, step: str) -> bool:
    if step == "score":
        return all(is_complete(run.scores / name) for name in run.config.used_scorers())
    return is_complete(run.folder / STEPS[step].folder)


def _count(number: float) -> str:
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return f"{number:.0f}"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 1 else "< 1 s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _gb(size: float) -> str:
    return f"{size / 1e9:.3g} GB"


def _fits(size: float) -> str:
    """The smallest device that it fits, with a twentieth to spare."""
    found = [device.name for device in DEVICES if size <= 0.95 * device.memory_gb * 1e9]
    return f"fits {found[0]}" if found else "fits none of these devices: spread it over several"
