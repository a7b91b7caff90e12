"""``dualign validate``: every claim a run makes about itself, checked against its files.

Reads files only: no model, no torch, no network. Whoever receives a run from somebody else can run it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from pipeline.contracts.artifacts import (
    MANIFEST,
    Manifest,
    artifact_faults,
    checkpoint_sha256,
    is_complete,
    read_json,
    read_manifest,
    shown,
)
from pipeline.contracts.errors import CorruptArtifactError, InputError
from pipeline.contracts.keys import PromptPlaces, row_keys
from pipeline.contracts.shards import ShardedTable, read_parquet
from pipeline.contracts.tables import (
    CONSTRAINT_PREFIX,
    PROMPTS,
    SAMPLE_KEY,
    SAMPLES,
    SCORE_PREFIX,
    SCORES,
    SPLITS,
    prompt_id,
)
from pipeline.evaluation import judge
from pipeline.formats.export_format import SOLUTION
from pipeline.report.evaluated import read_evaluation
from pipeline.report.solved import ReportedConstraint, ReportedReward, ReportedSolution
from pipeline.run.response_set import ResponseSet, known_response_sets
from pipeline.steps.validate_hand_off import is_hand_off, validate_hand_off
from pipeline.steps.validation import Check, Link, Validation
from stage1_dual.sampling.protocol import THE_POLICY

_CHANCE = 1e-9
"""Probability with which chance alone may be called a fault."""

_WEIGHT_TOLERANCE = 1e-9
_MEAN_TOLERANCE = 1e-9
"""Of a mean that is computed again, relative to the largest score."""

_UPSTREAM = ("prompts", "samples", "scores", "dual", "tilted", "pairs", "policy", "evaluation")


class _CheckedConstraint(ReportedConstraint):
    slack: float


class _CheckedSolution(ReportedSolution):
    """A solution with what can be computed again from the tilted table."""

    constraints: Annotated[tuple[_CheckedConstraint, ...], Field(strict=False)]


def validate(folder: Path, *, show_progress: bool = False) -> Validation:
    """Check a run, or a hand-off that was made of one.

    Args:
        folder: of the run, or of the hand-off.
        show_progress: whether to show a progress bar.

    Raises:
        InputError: the folder is neither.
    """
    check = validate_hand_off if is_hand_off(folder) else validate_run
    return check(folder, show_progress=show_progress)


def validate_run(folder: Path, *, show_progress: bool = False) -> Validation:
    """Check schemas, keys, counts, hashes, lineage, BOS, seeds, signs, weights and repeated samples of a run.

    Args:
        folder: of the run.
        show_progress: whether to show a progress bar.

    Raises:
        InputError: there is no run in the folder.
    """
    if not os.path.isdir(folder / "prompts"):  # noqa: PTH112  # of a name too long for a file, False
        raise InputError(f"{folder} is not a run: it has no prompts folder")
    found = Validation(faults=list(_not_folders(folder)))
    manifests = {name: _read(folder / name, found) for name in _artifacts(folder)}
    for name, manifest in manifests.items():
        made_from = tuple(manifest.inputs) if manifest is not None else ()
        counts = manifest.counts if manifest is not None else {}
        identity, run = (manifest.identity, manifest.run) if manifest is not None else (None, None)
        found.chain.append(Link(name, identity, run, counts, made_from))
    complete = {name: manifest for name, manifest in manifests.items() if manifest is not None}
    checks: list[Check] = [
        ("lineage", lambda: _check_lineage(folder, complete)),
        *((f"hashes of {name}", _bound(_check_files, folder / name, complete[name])) for name in complete),
        ("prompts", lambda: _check_prompts(folder / "prompts")),
    ]
    for name, check in (("prompts", _check_splits), ("dual", _check_dual), ("evaluation", _check_evaluation)):
        if name in complete:
            checks.append((name, _bound(check, folder, complete[name])))
    for responses in known_response_sets(folder):
        checks += _checks_of_set(folder, responses, complete)
    for hand_off in sorted(folder.glob("exports/*/")):
        manifest = _read(hand_off, found)
        if manifest is not None:
            name = str(hand_off.relative_to(folder))
            found.chain.append(Link(name, manifest.identity, manifest.run, manifest.counts, tuple(manifest.inputs)))
            checks.append((name, _bound(_check_export, hand_off, manifest, complete)))
    found.perform(
        checks,
        unreadable=lambda what: f"{what}: cannot be checked, as its files hold what no step writes",
        show_progress=show_progress,
    )
    return found


def _not_folders(run: Path) -> Iterator[str]:
    """What has the name of an artifact and is none: a file, a link that leads nowhere, a folder that is closed."""
    names = [*_UPSTREAM, "report", "multishot"]
    names += [f"{set_}/{name}" for set_ in ("pairs", "evaluation") for name in ("prompts", "samples", "scores")]
    for path in (run / name for name in [*names, "pairs/tilted"]):
        if not os.path.lexists(path):
            continue
        if not path.is_dir():
            yield f"{path} is not a folder"
        elif not os.access(path, os.R_OK | os.X_OK):
            yield f"{path} cannot be read: Permission denied"


def _checks_of_set(
    run: Path, responses: ResponseSet, complete: Mapping[str, Manifest]
) -> Iterator[tuple[str, Callable[[], Iterator[str]]]]:
    samples, tilted = (responses.prefix + path.name for path in (responses.samples, responses.tilted))
    if samples in complete:
        if responses.paired:
            yield f"{responses.prefix}prompts", _bound(_check_prompts, responses.prompts)
            yield samples, _bound(_check_pairs, run, responses, complete[samples])
        else:
            yield samples, _bound(_check_samples, responses, complete[samples])
    for name in responses.scored_tables():
        if name.startswith(f"{responses.prefix}scores/") and name in complete:
            yield name, _bound(_check_scores, responses, run / name, complete[name])
    if tilted in complete and "dual" in complete:
        yield tilted, _bound(_check_tilted, run, responses, complete[tilted])


def _bound(check: Callable[..., Iterator[str]], *arguments: object) -> Callable[[], Iterator[str]]:
    return lambda: check(*arguments)


def _artifacts(folder: Path) -> list[str]:
    """The artifacts that were begun, upstream first."""
    sampled, pairs, evaluated = (responses.scored_tables() for responses in known_response_sets(folder))
    names = [*sampled, "dual", "tilted", *pairs, "pairs/tilted", "policy", *evaluated]
    names += ["evaluation", "report", "multishot"]
    return [name for name in names if (folder / name).is_dir()]


def _read(folder: Path, found: Validation) -> Manifest | None:
    if not is_complete(folder):
        return None
    try:
        return read_manifest(folder)
    except CorruptArtifactError as error:
        found.faults.append(str(error))
        return None


def _check_lineage(folder: Path, manifests: Mapping[str, Manifest]) -> Iterator[str]:
    for name, manifest in manifests.items():
        for source, recorded in manifest.inputs.items():
            if (name, source) == ("evaluation/samples", "policy"):  # as a checkpoint, like the reference of `samples`
                if not (folder / source).is_dir() or checkpoint_sha256(folder / source) != recorded:
                    yield f"{folder / name}: was drawn from another `{source}` than the one in the run"
                continue
            upstream = _prefix(folder, name) + source if source == "samples" else source
            if upstream == "prompts" and (name == "prompts" or name.endswith("samples")):
                continue  # a hash of the prompts themselves, which are checked by it below
            if upstream.partition("/")[0] not in _UPSTREAM:
                continue  # a checkpoint or a world, which need not be here
            if upstream not in manifests:
                yield f"{folder / name}: was made from `{source}`, which is not in the run or not finished"
            elif manifests[upstream].identity != recorded:
                yield (
                    f"{folder / name}: was made from another `{source}` than the one in the run "
                    f"({recorded[:12]} then, {manifests[upstream].identity[:12]} now)"
                )


def _prefix(run: Path, name: str) -> str:
    """What the names of the artifacts begin with that are of the same set of responses."""
    return next((one.prefix for one in known_response_sets(run) if one.prefix and name.startswith(one.prefix)), "")


def _check_files(folder: Path, manifest: Manifest) -> Iterator[str]:
    yield from artifact_faults(folder, manifest)
    for path in sorted(folder.glob("data/*.parquet")):
        if str(path.relative_to(folder)) not in manifest.files:
            yield f"{path} is not in the manifest"
    leftover = sorted(folder.glob("parts/*.parquet"))
    if leftover:
        yield f"{leftover[0]}: an unfinished shard in a finished step"


def _check_export(folder: Path, manifest: Manifest, complete: Mapping[str, Manifest]) -> Iterator[str]:
    """A hand-off within its run, made of the tilted table that is there; of an earlier release, its files alone."""
    yield from validate_hand_off(folder).faults if SOLUTION in manifest.files else artifact_faults(folder, manifest)
    recorded = manifest.inputs.get("tilted")
    if "tilted" in complete and recorded != complete["tilted"].identity:
        remedy = f"`dualign export --format {folder.name}` makes it anew"
        yield f"{folder}: was made from another `tilted` than the one in the run; {remedy}"


def _read_prompts(folder: Path) -> pa.Table:
    paths = sorted(folder.glob("data/*.parquet"))
    if not paths:
        raise CorruptArtifactError(f"{folder} has no data")
    return pa.concat_tables(read_parquet(path, schema=PROMPTS) for path in paths)


def _places(prompts: pa.Table) -> PromptPlaces:
    """Of the prompts of a table; one that is there twice is named by the check of the prompts."""
    return PromptPlaces(prompts["prompt_id"].unique().to_pylist())


def _check_prompts(folder: Path) -> Iterator[str]:
    table = _read_prompts(folder)
    wrong = [row["prompt_id"] for row in table.to_pylist() if not _is_named(row["prompt"], row["prompt_id"])]
    if wrong:
        yield f"{folder}: {len(wrong)} prompts are not what their prompt_id says (first: {wrong[0]})"
    repeated = table.num_rows - len(table["prompt_id"].unique())
    if repeated:
        yield f"{folder}: {repeated} prompts are there twice"
    unknown = set(table["split"].unique().to_pylist()) - set(SPLITS)
    if unknown:
        yield f"{folder}: unknown splits {sorted(unknown)}"


def _check_splits(run: Path, manifest: Manifest) -> Iterator[str]:
    splits = _read_prompts(run / "prompts")["split"].to_pylist()
    yield from _check_counts(run / "prompts", manifest, {split: splits.count(split) for split in SPLITS})


def _check_counts(folder: Path, manifest: Manifest, found: Mapping[str, int]) -> Iterator[str]:
    for name, n in found.items():
        if manifest.count(name) != n:
            yield f"{folder}: {n} {name}, {manifest.counts[name]} in the manifest"


def _is_named(messages: list[dict[str, str]], name: str) -> bool:
    return bool(messages) and prompt_id(messages) == name


def _setting(folder: Path, manifest: Manifest, name: str) -> int:
    """A setting that is a positive whole number."""
    value = manifest.settings.get(name)
    if type(value) is not int or value < 1:
        raise CorruptArtifactError(
            f"{folder / MANIFEST}: `settings.{name}` is {shown(repr(value))}; it must be a whole number from 1 on"
        )
    return value


def _token(folder: Path, manifest: Manifest, name: str) -> int | None:
    """A token id among the details, None where there is none."""
    value = manifest.details.get(name)
    if value is not None and type(value) is not int:
        raise CorruptArtifactError(
            f"{folder / MANIFEST}: `details.{name}` is {shown(repr(value))}; it must be a token id or null"
        )
    return value


def _check_samples(responses: ResponseSet, manifest: Manifest) -> Iterator[str]:
    folder = responses.samples
    prompts = _read_prompts(responses.prompts)
    n_samples = _setting(folder, manifest, "samples_per_prompt")
    bos = _token(folder, manifest, "bos_token_id")
    table = ShardedTable(folder=folder, schema=SAMPLES, metadata={})
    n_rows = 0
    seeds: list[np.ndarray] = []
    reads: dict[str, tuple[int, ...]] = {}
    for split in SPLITS:
        places = _places(prompts.filter(pc.equal(prompts["split"], split)))
        keys = [np.empty(0, np.int64)]
        for path in table.paths(split):
            rows = read_parquet(path, schema=SAMPLES)
            n_rows += rows.num_rows
            seeds.append(rows["seed"].to_numpy())
            place = places.of(rows["prompt_id"])
            index = rows["sample_index"].to_numpy()
            if (place < 0).any():
                yield f"{path}: {np.count_nonzero(place < 0)} rows are of prompts that are not in the {split} split"
            if ((index < 0) | (index >= n_samples)).any():
                yield f"{path}: a sample_index is outside of 0 to {n_samples - 1}"
            keys.append(row_keys(place[place >= 0], index[place >= 0]))
            yield from _check_tokens(path, rows, bos=bos, reads=reads)
        yield from _check_distinct(folder, split, np.concatenate(keys))
    # Of another distribution, the sampler's log-probabilities do not say how many repeats chance makes.
    if all(manifest.settings.get(name) == value for name, value in asdict(THE_POLICY).items()):
        yield from _check_repeats(folder, table)
    yield from _check_counts(folder, manifest, {"rows": n_rows})
    missing = manifest.count("prompts") * n_samples - n_rows
    if missing != manifest.count("failed"):
        yield f"{folder}: {missing} rows are missing, {manifest.counts['failed']} failures in the manifest"
    all_seeds = np.concatenate([np.empty(0, np.int64), *seeds])
    repeated = len(all_seeds) - len(np.unique(all_seeds))
    if repeated:
        yield f"{folder}: {repeated} samples share the seed of another"


def _check_distinct(folder: Path, split: str, key_n: np.ndarray) -> Iterator[str]:
    repeated = len(key_n) - len(np.unique(key_n))
    if repeated:
        yield f"{folder}: {repeated} {split} rows are there twice"


def _check_tokens(path: Path, rows: pa.Table, *, bos: int | None, reads: dict[str, tuple[int, ...]]) -> Iterator[str]:
    """One BOS in front of each prompt, one reading of each prompt, and an ending that the finish reason fits."""
    columns = rows.select(["prompt_id", "prompt_token_ids", "completion_token_ids", "finish_reason"])
    for prompt, group in _first_of_each(columns).items():
        ids = tuple(group["prompt_token_ids"])
        if reads.setdefault(prompt, ids) != ids:
            yield f"{path}: prompt {prompt} has other token ids than elsewhere in the table"
        # Further on a BOS may belong to the template, which begins every turn with one.
        front = next((place for place, token in enumerate(ids) if token != bos), len(ids))
        if bos is not None and front != 1:
            yield f"{path}: prompt {prompt} begins with {front} BOS tokens ({bos}); it must begin with exactly one"
    unknown = set(columns["finish_reason"].unique().to_pylist()) - {"stop", "length"}
    if unknown:
        yield f"{path}: unknown finish reasons {sorted(unknown)}"
    empty = pc.sum(pc.equal(pc.list_value_length(columns["completion_token_ids"]), 0)).as_py()
    if empty:
        yield f"{path}: {empty} completions have no token"


def _first_of_each(rows: pa.Table) -> dict[str, dict[str, Any]]:
    ids = rows["prompt_id"].to_numpy(zero_copy_only=False)
    _, first = np.unique(ids, return_index=True)
    return {row["prompt_id"]: row for row in rows.take(first).to_pylist()}


def _check_repeats(folder: Path, table: ShardedTable) -> Iterator[str]:
    """Equal responses to a prompt, against the number that the policy's own probabilities make likely.

    A sample equals another one of the prompt with probability exp(logp), so that over K samples
    sum_k (K - 1) exp(logp_k) / 2 is an unbiased estimate of the expected number of equal pairs.
    """
    for split in SPLITS:
        prompts = PromptPlaces(table.prompt_ids(split))
        place, response = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        chance_p, count_p = np.zeros(len(prompts)), np.zeros(len(prompts))
        for path in table.paths(split):
            rows = read_parquet(path, columns=["prompt_id", "completion_token_ids", "sampler_logp"], schema=SAMPLES)
            place.append(prompts.of(rows["prompt_id"]))
            hashes = [hash(tuple(ids)) for ids in rows["completion_token_ids"].to_pylist()]
            response.append(np.array(hashes, dtype=np.int64))
            logp = rows["sampler_logp"].to_numpy()
            if not np.isfinite(logp).all():
                yield f"{path}: {np.count_nonzero(~np.isfinite(logp))} values of sampler_logp are not finite"
            np.add.at(chance_p, place[-1], np.exp(np.minimum(logp, 0.0)))
            np.add.at(count_p, place[-1], 1)
        pairs = np.stack([np.concatenate(place), np.concatenate(response)])
        groups = np.unique(pairs, axis=1, return_counts=True)[1]
        observed = int((groups * (groups - 1) // 2).sum())
        expected = float(((count_p - 1) * chance_p).sum() / 2)
        # Pairs are not independent: their number varies like that of the largest groups.
        largest = int(groups.max(initial=1))
        limit = expected + largest * (np.sqrt(-2 * np.log(_CHANCE) * (expected + 1)) - np.log(_CHANCE))
        if observed > limit:
            yield (
                f"{folder}: {observed} pairs of equal {split} responses to a prompt, {expected:.1f} expected by "
                "chance: samples were repeated"
            )


def _check_pairs(run: Path, responses: ResponseSet, manifest: Manifest) -> Iterator[str]:
    """Whole pairs of train prompts, none of them a test prompt of the run, each response with its end token."""
    folder = responses.samples
    everything = _read_prompts(run / "prompts")
    test = set(everything.filter(pc.equal(everything["split"], "test"))["prompt_id"].to_pylist())
    known = set(_read_prompts(responses.prompts)["prompt_id"].to_pylist())
    reads: dict[str, tuple[int, ...]] = {}
    keys: list[tuple[str, int]] = []
    for path in ShardedTable(folder=folder, schema=SAMPLES, metadata={}).paths("train"):
        rows = read_parquet(path, schema=SAMPLES)
        its_keys = list(zip(*(rows[name].to_pylist() for name in SAMPLE_KEY), strict=True))
        keys += its_keys
        for what, n in (
            ("of test prompts of the run", sum(prompt in test for prompt, _ in its_keys)),
            ("of prompts that are not in pairs/prompts", sum(prompt not in known for prompt, _ in its_keys)),
        ):
            if n:
                yield f"{path}: {n} rows are {what}"
        yield from _check_tokens(path, rows, bos=_token(folder, manifest, "bos_token_id"), reads=reads)
        ends = {ids[-1] for ids in rows["completion_token_ids"].to_pylist() if ids}
        if ends - {_token(folder, manifest, "eos_token_id")}:
            yield f"{path}: a response does not end with the end token of the manifest"
    there = set(keys)
    if len(keys) != len(there):
        yield f"{folder}: {len(keys) - len(there)} responses are there twice"
    alone = sum((prompt, index ^ 1) not in there for prompt, index in keys)
    if alone:
        yield f"{folder}: {alone} responses have no partner"
    yield from _check_counts(folder, manifest, {"rows": len(keys)})


def _check_scores(responses: ResponseSet, folder: Path, manifest: Manifest) -> Iterator[str]:
    prompts = _places(_read_prompts(responses.prompts))
    drawn = ShardedTable(folder=responses.samples, schema=SAMPLES, metadata={})
    table = ShardedTable(folder=folder, schema=SCORES, metadata={})
    n_rows = 0
    for split in SPLITS:
        there = [row_keys(*drawn.keys(path, prompts)) for path in drawn.paths(split)]
        scored = [np.empty(0, np.int64)]
        for path in table.paths(split):
            rows = read_parquet(path, schema=SCORES)
            n_rows += rows.num_rows
            place, index = prompts.of(rows["prompt_id"]), rows["sample_index"].to_numpy()
            scored.append(row_keys(place, index))
            known = (place >= 0) & np.isin(scored[-1], np.concatenate([scored[0], *there]))
            if not known.all():
                yield f"{path}: {np.count_nonzero(~known)} scores of samples that are not in {responses.samples}"
            infinite = rows.num_rows - pc.sum(pc.is_finite(rows["value"])).as_py() if rows.num_rows else 0
            if infinite:
                yield f"{path}: {infinite} scores are not finite"
        yield from _check_distinct(folder, split, np.concatenate(scored))
    yield from _check_counts(folder, manifest, {"rows": n_rows})
    if "repeats.parquet" in manifest.files:
        # Imported where it is used: it brings the recipe along, which a check of most runs does without.
        from pipeline.scoring.repeats import read_noise

        noise, recorded = read_noise(folder), manifest.details.get("score_noise")
        sigma = recorded.get("sigma") if isinstance(recorded, dict) else None
        if noise is not None and sigma != noise.sigma:
            yield f"{folder}: the rows that were scored twice have a noise of {noise.sigma}, the manifest {sigma}"


def _read_dual(run: Path) -> _CheckedSolution:
    path = run / "dual" / "dual.json"
    return _CheckedSolution.from_document(read_json(path), source=path)


def _check_dual(run: Path, manifest: Manifest) -> Iterator[str]:
    path = run / "dual" / "dual.json"
    solution = _read_dual(run)
    yield from _check_counts(run / "dual", manifest, {"prompts": solution.n_prompts, "samples": solution.n_samples})
    for bound in solution.constraints:
        # By its own means: a fault in the sign that the solve used would hide itself.
        sign = -1.0 if bound.direction == "<=" else 1.0
        slack = sign * (bound.predicted - bound.threshold)
        tolerance = 1e-9 * max(1.0, abs(bound.threshold))
        if abs(slack - bound.slack) > tolerance:
            yield (
                f"{path}: the slack of {bound.name} is {bound.slack:g}, but predicted {bound.predicted:g} against "
                f"{bound.direction} {bound.threshold:g} gives {slack:g}"
            )
        if bound.margin is not None and abs(bound.reference + bound.margin - bound.threshold) > tolerance:
            yield f"{path}: the threshold of {bound.name} is not its reference plus its margin"


def _check_evaluation(run: Path, manifest: Manifest) -> Iterator[str]:
    path = run / "evaluation" / "evaluation.json"
    found = read_evaluation(path, _read_dual(run))
    counts = {"prompts": found.n_prompts, "samples": found.n_samples}
    yield from _check_counts(run / "evaluation", manifest, counts)
    for bound in found.constraints:
        sign = -1.0 if bound.direction == "<=" else 1.0
        slack = sign * (bound.realised - bound.threshold)
        if not abs(slack - bound.slack) <= _MEAN_TOLERANCE * max(1.0, abs(bound.threshold)):
            yield (
                f"{path}: the slack of {bound.name} is {bound.slack:g}, but realised {bound.realised:g} against "
                f"{bound.direction} {bound.threshold:g} gives {slack:g}"
            )
        ends = [end for end in bound.ci95 if end is not None]
        if len(ends) == 2 and bound.status != judge(
            ends, bound.threshold, bound.direction, tolerance=bound.tolerance or 0.0
        ):
            yield f"{path}: {bound.name} is called {bound.status}, which its interval and threshold are not"
    kl = found.kl
    if kl.budget is not None and kl.realised_ci95 is not None:
        ends = [end for end in kl.realised_ci95 if end is not None]
        if len(ends) == 2 and judge(ends, kl.budget, "<=") != kl.status:
            yield f"{path}: the KL is called {kl.status}, which its interval and budget are not"


def _check_tilted(run: Path, responses: ResponseSet, manifest: Manifest) -> Iterator[str]:
    """Weights that sum to one and, of the samples, give back the predicted means; scores as in the score tables."""
    solution = _read_dual(run)
    schema = solution.tilted_schema
    # The columns that are scores as they were given; a constraint on anything else is made of them.
    names = {solution.reward.name: "reward"} | {
        score: SCORE_PREFIX + score if SCORE_PREFIX + score in schema.names else CONSTRAINT_PREFIX + score
        for score in solution.scores
    }
    known = _read_prompts(responses.prompts)
    prompts = _places(known)
    table = ShardedTable(folder=responses.tilted, schema=schema, metadata={})
    n_rows = 0
    for split in SPLITS:
        weight_p = np.zeros(len(prompts))
        count_p = np.zeros(len(prompts))
        sums = {name: np.zeros((2, len(prompts))) for name in names}
        largest = dict.fromkeys(names, 0.0)
        keys = [np.empty(0, np.int64)]
        made = [one for one in solution.constraints if names.get(one.name) != CONSTRAINT_PREFIX + one.name]
        ratios = {one.name: np.zeros((2, 2, len(prompts))) for one in made}
        for path in table.paths(split):
            rows = read_parquet(path, schema=schema)
            n_rows += rows.num_rows
            place = prompts.of(rows["prompt_id"])
            if (place < 0).any():
                yield f"{path}: {np.count_nonzero(place < 0)} rows are of prompts that are not in {responses.prompts}"
            if pc.any(pc.not_equal(rows["split"], split)).as_py():
                yield f"{path}: a row is of another split than {split}"
            keys.append(row_keys(place, rows["sample_index"].to_numpy()))
            rows, place = rows.filter(pa.array(place >= 0)), place[place >= 0]
            weight = rows["weight"].to_numpy()
            np.add.at(weight_p, place, weight)
            np.add.at(count_p, place, 1)
            for name, column in names.items():
                value = rows[column].to_numpy()
                np.add.at(sums[name][0], place, value)
                np.add.at(sums[name][1], place, value * weight)
                largest[name] = max(largest[name], float(np.abs(value).max(initial=0.0)))
            for one in made:
                parts = _parts(one, rows, names, known, place)
                for k, value in enumerate(parts):
                    np.add.at(ratios[one.name][0, k], place, value)
                    np.add.at(ratios[one.name][1, k], place, value * weight)
                column = rows[CONSTRAINT_PREFIX + one.name].to_numpy()
                expected = parts[0] if one.column_ratio is None else parts[0] - one.column_ratio * parts[1]
                off = np.abs(column - expected) > _MEAN_TOLERANCE * np.maximum(1.0, np.abs(expected))
                if off.any():
                    yield f"{path}: the column of {one.name} is not what its scores make it in {off.sum()} rows"
        there = count_p > 0
        n_off = np.count_nonzero(~(np.abs(weight_p[there] - 1) <= _WEIGHT_TOLERANCE))
        if n_off:
            yield f"{responses.tilted}: the weights of {n_off} {split} prompts do not sum to 1"
        yield from _check_distinct(responses.tilted, split, np.concatenate(keys))
        yield from _check_against_scores(responses, split, table, prompts, names)
        if split != "train" or responses.paired:  # the dual was solved on what was sampled
            continue
        solved_on, found = (solution.n_prompts, solution.n_samples), (int(there.sum()), int(count_p.sum()))
        if solved_on != found:
            yield (
                f"{run / 'dual' / 'dual.json'}: it was solved on {solved_on[1]} samples of {solved_on[0]} prompts; "
                f"the tilted table has {found[1]} of {found[0]}"
            )
        if not there.any():
            continue
        plain = [one for one in solution.constraints if one not in made]
        entries: tuple[ReportedReward | _CheckedConstraint, ...] = (solution.reward, *plain)
        for one in made:
            of_reference = ratios[one.name][0][:, there] / count_p[there]
            (up, down), (up_ref, down_ref) = ratios[one.name][1][:, there].mean(axis=1), of_reference.mean(axis=1)
            found_means = {"predicted": (one.predicted, up / down)}
            if one.statistic.kind != "cvar":  # of which the column is that of the policy's tail, not the reference's
                found_means["reference"] = (one.reference, up_ref / down_ref)
            for kind, (recorded, mean) in found_means.items():
                if not abs(mean - recorded) <= _MEAN_TOLERANCE * max(1.0, abs(recorded)):
                    yield (
                        f"{run / 'dual' / 'dual.json'}: the {kind} value of {one.name} is {recorded:g}; the tilted "
                        f"table gives {mean:g} (a sign, a weight or a score differs)"
                    )
        for entry in entries:
            reference, predicted = sums[entry.name]
            means = {
                "reference": (entry.reference, float((reference[there] / count_p[there]).mean())),
                "predicted": (entry.predicted, float(predicted[there].mean())),
            }
            for kind, (recorded, mean) in means.items():
                if not abs(mean - recorded) <= _MEAN_TOLERANCE * max(1.0, largest[entry.name]):
                    yield (
                        f"{run / 'dual' / 'dual.json'}: the {kind} mean of {entry.name} is {recorded:g}; the "
                        f"tilted table gives {mean:g} (a sign, a weight or a score differs)"
                    )
    yield from _check_counts(responses.tilted, manifest, {"rows": n_rows})


def _parts(
    one: _CheckedConstraint, rows: pa.Table, names: Mapping[str, str], prompts: pa.Table, place: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """U and h of rows, whose statistic is their ratio, by formulas of its own."""
    score = rows[names[one.score]].to_numpy()
    stated = one.statistic
    counts = np.ones(len(score))
    for name, values in stated.where.items():
        value_of = dict(zip(prompts["prompt_id"].to_pylist(), prompts[name].to_pylist(), strict=True))
        by_prompt = np.array([value in values for value in value_of.values()])
        counts = counts * by_prompt[place]
    if stated.kind == "share":
        value = (score >= stated.at_least if stated.at_least is not None else score <= stated.at_most) * 1.0
    elif stated.kind == "shortfall":
        value = np.where(score < stated.below, stated.below - score, 0.0)
    elif stated.kind == "cvar":
        start = float("nan") if one.certified_at is None else one.certified_at  # a solution has it
        beyond = score < start if stated.tail == "lower" else score > start
        value = np.where(beyond, start + (score - start) / stated.level, start)
    else:
        value = score
    denominator = counts if stated.per is None else counts * rows[names[stated.per]].to_numpy()
    return value * counts, denominator


def _check_against_scores(
    responses: ResponseSet, split: str, table: ShardedTable, prompts: PromptPlaces, names: Mapping[str, str]
) -> Iterator[str]:
    for name, column in names.items():
        scores = ShardedTable(folder=responses.scores / name, schema=SCORES, metadata={})
        scored = [read_parquet(path, columns=[*SAMPLE_KEY, "value"], schema=SCORES) for path in scores.paths(split)]
        tilted = [
            read_parquet(path, columns=[*SAMPLE_KEY, column], schema=table.schema) for path in table.paths(split)
        ]
        if not tilted:
            continue
        ours, theirs = (
            pa.concat_tables(tilted),
            pa.concat_tables(
                [pa.schema([SCORES.field(one) for one in (*SAMPLE_KEY, "value")]).empty_table(), *scored]
            ),
        )
        if theirs.num_rows == 0:
            yield f"{responses.tilted}: {ours.num_rows} {split} rows have a {name}, and scores/{name} has none"
            continue
        keys = [row_keys(prompts.of(rows["prompt_id"]), rows["sample_index"].to_numpy()) for rows in (ours, theirs)]
        order = np.argsort(keys[1])
        at = order[np.minimum(np.searchsorted(keys[1], keys[0], sorter=order), len(order) - 1)]
        same = (keys[1][at] == keys[0]) & (theirs["value"].to_numpy()[at] == ours[column].to_numpy())
        if not same.all():
            yield f"{responses.tilted}: {np.count_nonzero(~same)} {split} rows have another {name} than scores/{name}"
