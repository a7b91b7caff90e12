"""Runs that no step wrote: files of a real run are changed, one after the other, and put back.

`dualign validate` ends in faults that name what is wrong and never in a traceback; other commands refuse it.
"""

from __future__ import annotations

import copy
import json
import os
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.tiny_runs import dualign, run_folder, write_recipe

import dualign as public
from pipeline.cli import main
from pipeline.contracts.artifacts import content_sha256, file_sha256
from pipeline.contracts.errors import CorruptArtifactError, DualignError, InputError
from pipeline.contracts.keys import PromptPlaces
from pipeline.contracts.shards import ShardedTable, read_parquet
from pipeline.contracts.solution import read_solution
from pipeline.contracts.tables import PROMPTS, SAMPLES, SCORES
from pipeline.formats.prompt_rows import read_prompt_rows
from pipeline.report.page import write_report
from pipeline.scoring.joined import read_scores
from pipeline.steps.validate import validate_run
from stage2_policy.data import read_training_data

pytestmark = pytest.mark.slow

_UNFORESEEN = "cannot be checked"
_REMOVED = object()
_NOT_IDENTIFYING = ("counts", "details", "environment", "wall_seconds", "schema_version")
"""Fields of a manifest that its identity leaves out."""

_VALUES = (
    None,
    [],
    {},
    "x",
    "\x1b[2J安全",
    -1,
    2**30,
    10**400,
    float("nan"),
    float("inf"),
    True,
    _REMOVED,
    [None],
    0.5,
)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = write_recipe(tmp_path_factory.mktemp("malformed"))
    settings = {"epochs": "0.2", "evaluations": "1", "held_out_fraction": "0.3"}
    options = [f"--training.{name}={value}" for name, value in settings.items()]
    # One step of rate 0: training did not pay, and all was done.
    assert dualign("run", recipe, *options, "--evaluation.samples_per_prompt=2") == 6
    return recipe


@pytest.fixture(scope="module")
def run(recipe: Path) -> Path:
    folder = run_folder(recipe)
    assert validate_run(folder).faults == []
    return folder


@contextmanager
def in_place_of(path: Path) -> Iterator[None]:
    """The path is free, and is again what it was afterwards, as are its manifest's bytes."""
    manifest = owner(path) / "manifest.json"
    sealed = manifest.read_bytes() if manifest.is_file() else None
    aside = path.parent.parent / "aside"
    path.rename(aside)
    try:
        yield
    finally:
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink(missing_ok=True)
        aside.rename(path)
        if sealed is not None and manifest.parent.is_dir():
            manifest.write_bytes(sealed)


def owner(path: Path) -> Path:
    """The folder whose manifest lists a file."""
    return path.parent.parent if path.parent.name == "data" else path.parent


def seal(folder: Path) -> None:
    """Let the manifest say that what is there is what was written: who damages on purpose does."""
    path = folder / "manifest.json"
    record = json.loads(path.read_text())
    if not isinstance(record, dict):
        return
    if isinstance(record.get("files"), dict):
        there = {name: folder / name for name in record["files"] if (folder / name).is_file()}
        record["files"] = {**record["files"], **{name: file_sha256(file) for name, file in there.items()}}
    determining = {name: record.get(name) for name in ("step", "settings", "inputs", "files")}
    path.write_text(json.dumps({**record, "identity": content_sha256(determining)}))


def faults_of(run: Path) -> list[str]:
    """What validate says, which must be foreseen."""
    try:
        faults = validate_run(run).faults
    except DualignError as error:
        return [str(error)]
    assert not [fault for fault in faults if _UNFORESEEN in fault]
    return faults


def read_by_others(run: Path, reference: Path) -> list[Callable[[], object]]:
    """What the other commands read."""

    def joined() -> None:
        scores = {name: ShardedTable(run / "scores" / name, SCORES, {}) for name in ("helpful", "harmless")}
        for split in ("train", "test"):
            read_scores(
                ShardedTable(run / "samples", SAMPLES, {}),
                scores,
                reward="helpful",
                constraints=["harmless"],
                split=split,
                max_unscored=0,
            )

    def shown() -> None:
        loaded = public.load_run(run)
        repr(loaded)
        loaded._repr_html_()
        _ = loaded.tilted, loaded.policy_path

    def formats() -> None:
        solution = read_solution(run / "dual" / "dual.json")
        for split in ("train", "test"):
            list(read_prompt_rows(run / "tilted", solution, split=split))

    def trained_on() -> None:
        read_training_data(
            reference=reference,
            samples=run / "samples",
            tilted=run / "tilted",
            dual=run / "dual",
            held_out_fraction=0.3,
        )

    return [joined, shown, formats, trained_on]


def refused_or_read(readers: list[Callable[[], object]]) -> None:
    for read in readers:
        with suppress(InputError):  # exit code 2
            read()


def put_as(kind: str, path: Path) -> None:
    """Something else where a file was."""
    match kind:
        case "nothing":
            return
        case "empty":
            path.write_bytes(b"")
        case "garbage":
            path.write_bytes(random.Random(0).randbytes(300))
        case "deep":
            path.write_bytes(b"[" * 100_000)
        case "half a surrogate":
            path.write_bytes(b'{"a": "\\ud800"}')
        case "folder":
            path.mkdir()
        case "circle":
            path.symlink_to(path)
        case "pipe":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")


KINDS = ("nothing", "empty", "garbage", "deep", "half a surrogate", "folder", "circle", "pipe", "device")


def files_of(run: Path) -> list[Path]:
    """One file of each kind of every artifact."""
    found = {}
    for path in sorted(run.rglob("*")):
        parts = path.relative_to(run).parts
        other = parts[0] in {"report", "reference_logp"} or path.name in {"settings.json", "README.md"}
        if path.is_file() and len(parts) > 1 and not other:
            found.setdefault((*parts[:-1], path.suffix, path.name[:5]), path)
    return list(found.values())


def test_a_file_that_is_gone_or_something_else_is_named(run: Path, recipe: Path) -> None:
    readers = read_by_others(run, recipe.parent / "policy")
    for place, path in enumerate(files_of(run)):
        # Every file meets two of the kinds, and every kind files of each sort.
        for kind in (KINDS[(place + step) % len(KINDS)] for step in (0, 4)):
            with in_place_of(path):
                put_as(kind, path)
                faults = faults_of(run)
                unfinished = path.name == "manifest.json" and kind == "nothing"  # as a step that was killed
                assert unfinished or any(str(path) in fault for fault in faults), (path, kind, faults)
                if place % 2:
                    refused_or_read(readers)


def test_a_folder_that_is_something_else_is_named(run: Path) -> None:
    names = ["samples", "scores", "dual", "tilted", "policy", "evaluation", "evaluation/samples", "report"]
    for place, name in enumerate(names):
        path = run / name
        with in_place_of(path):
            put_as(("empty", "circle", "pipe")[place % 3], path)
            assert any(str(path) in fault for fault in faults_of(run)), name
    for name in ("samples", "scores/harmless", "dual", "tilted"):
        with in_place_of(run / name):
            (run / name).mkdir()
            assert faults_of(run)
    for name in ("samples/data", "tilted/data", "prompts/data"):
        with in_place_of(run / name):
            assert any(str(run / name) in fault for fault in faults_of(run))


def places_of(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield place
    children = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, inner in children:
        yield from places_of(inner, (*place, key))


def with_value(document: Any, place: tuple[Any, ...], value: Any) -> Any:
    if not place:
        return None if value is _REMOVED else value
    document = copy.deepcopy(document)
    inner = document
    for key in place[:-1]:
        inner = inner[key]
    if value is _REMOVED:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return document


@pytest.mark.parametrize(
    ("name", "n_cases"),
    [
        ("prompts/manifest.json", 8),
        ("samples/manifest.json", 16),
        ("scores/harmless/manifest.json", 8),
        ("dual/manifest.json", 8),
        ("tilted/manifest.json", 8),
        ("policy/manifest.json", 8),
        ("evaluation/manifest.json", 8),
        ("dual/dual.json", 30),
        ("evaluation/evaluation.json", 20),
        ("policy/training_log.json", 8),
    ],
)
def test_json_of_other_types_is_a_fault_or_changes_nothing_that_is_read(
    name: str, n_cases: int, run: Path, recipe: Path
) -> None:
    path = run / name
    document = json.loads(path.read_text())
    cases = [(place, value) for place in places_of(document) for value in _VALUES]
    readers = read_by_others(run, recipe.parent / "policy")
    for number, (place, value) in enumerate(random.Random(0).sample(cases, n_cases)):
        with in_place_of(path):
            path.write_text(json.dumps(with_value(document, place, value)))
            if number % 4 == 0 and not (place and place[0] in _NOT_IDENTIFYING):
                faults = faults_of(run)  # not sealed: it is another file
                assert any(str(path) in fault for fault in faults), (place, value, faults)
            seal(path.parent)
            faults_of(run)
            if name.startswith(("dual/dual", "evaluation/evaluation")):
                refused_or_read(readers)


def columns_changed(table: pa.Table) -> Iterator[tuple[str, pa.Table]]:
    n = table.num_rows
    for place, field in enumerate(table.schema):
        yield f"without {field.name}", table.drop_columns([field.name])
        values = [None, *table[field.name].to_pylist()[1:]]
        nullable = pa.field(field.name, field.type)
        yield f"null in {field.name}", table.set_column(place, nullable, pa.array(values, field.type))
        other = pa.array(range(n)) if pa.types.is_string(field.type) else pa.array([str(i) for i in range(n)])
        yield f"another type of {field.name}", table.set_column(place, field.name, other)
        if pa.types.is_list(field.type):
            yield f"null within {field.name}", table.set_column(place, field, pa.array([[None]] * n, field.type))
    yield "another order", table.select(table.column_names[::-1])
    yield "one more", table.append_column("more", pa.array(range(n)))
    yield "no columns", pa.table({})
    yield "no rows", table.slice(0, 0)
    yield "rows twice", pa.concat_tables([table, table])


@pytest.mark.parametrize(
    "pattern",
    ["prompts/data/train-*", "samples/data/train-*", "scores/harmless/data/train-*", "tilted/data/train-*"],
)
def test_tables_of_other_columns_types_and_rows_are_faults(pattern: str, run: Path, recipe: Path) -> None:
    path = min(run.glob(pattern))
    table = pq.read_table(path)
    readers = read_by_others(run, recipe.parent / "policy")
    for number, (what, changed) in enumerate(columns_changed(table)):
        with in_place_of(path):
            pq.write_table(changed.replace_schema_metadata(table.schema.metadata), path)
            seal(owner(path))
            faults = faults_of(run)
            at_fault = [fault for fault in faults if str(owner(path)) in fault and "was made from" not in fault]
            assert at_fault, (what, faults)
            if number % 3 == 0:
                refused_or_read(readers)


@pytest.mark.parametrize("value", [-1, -(2**31), 2**31 - 1, 2**30])
def test_a_sample_index_that_cannot_be_is_a_fault(value: int, run: Path, recipe: Path) -> None:
    for table in ("samples", "scores/harmless", "tilted"):
        path = min((run / table).glob("data/train-*"))
        rows = pq.read_table(path)
        with in_place_of(path):
            write_sample_index(path, rows, value)
            faults = faults_of(run)
            assert any(table in fault and "was made from" not in fault for fault in faults), faults
            refused_or_read(read_by_others(run, recipe.parent / "policy"))


def write_sample_index(path: Path, table: pa.Table, value: int) -> None:
    place = table.schema.get_field_index("sample_index")
    values = [value, *table["sample_index"].to_pylist()[1:]]
    pq.write_table(table.set_column(place, table.schema.field(place), pa.array(values, pa.int32())), path)
    seal(owner(path))


def test_weights_and_means_that_are_no_numbers_are_faults(run: Path) -> None:
    path = min((run / "tilted").glob("data/train-*"))
    table = pq.read_table(path)
    place = table.schema.get_field_index("weight")
    for value in (float("nan"), float("inf"), 1e308):
        with in_place_of(path):
            weights = [value, *table["weight"].to_pylist()[1:]]
            pq.write_table(table.set_column(place, table.schema.field(place), pa.array(weights)), path)
            seal(run / "tilted")
            faults = faults_of(run)
            assert any("the weights of 1 train prompts do not sum to 1" in fault for fault in faults), faults
            assert any("the predicted mean of" in fault for fault in faults), faults


@pytest.mark.parametrize("table", ["samples", "scores/helpful", "tilted"])
def test_what_is_claimed_is_not_allocated(table: str, run: Path, tmp_path: Path) -> None:
    """A grid of 24 prompts and 2^30 samples would be 24 GiB; 10^18 samples a prompt are more than any machine has."""
    folder = tmp_path / "tiny"
    shutil.copytree(run, folder)
    path = min((folder / table).glob("data/train-*"))
    write_sample_index(path, pq.read_table(path), 2**30)
    record = json.loads((folder / "samples" / "manifest.json").read_text())
    record["settings"]["samples_per_prompt"] = 10**18
    (folder / "samples" / "manifest.json").write_text(json.dumps(record))
    seal(folder / "samples")
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "validate", str(folder), "--no-progress"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (6 * 2**30, 6 * 2**30)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert f"fault: {folder / 'samples'}: " in done.stdout
    assert _UNFORESEEN not in done.stdout


def test_a_grid_beyond_every_table_is_refused_by_the_steps_that_use_one(run: Path) -> None:
    table = ShardedTable(run / "samples", SAMPLES, {})
    prompts = PromptPlaces(table.prompt_ids("train"))
    with pytest.raises(CorruptArtifactError, match=r"asks for 1073741825 samples of each of 19 prompts"):
        table.presence("train", prompts, n_samples=2**30 + 1)


def test_bytes_of_a_parquet_file_that_were_changed_are_damage(run: Path) -> None:
    path = min((run / "prompts").glob("data/train-*"))
    data = path.read_bytes()
    with in_place_of(path):
        for seed in range(200):
            rng = random.Random(seed)
            changed = bytearray(data)
            first = len(data) - 800 if seed % 2 else 0  # the footer, in every other
            for _ in range(rng.choice((1, 3, 20))):
                changed[rng.randrange(first, len(data))] = rng.randrange(256)
            path.write_bytes(bytes(changed[: rng.randrange(len(data))] if seed % 7 == 0 else changed))
            with suppress(CorruptArtifactError):
                read_parquet(path, schema=PROMPTS)


def test_report_refuses_what_it_cannot_show(run: Path, tmp_path: Path) -> None:
    def change(path: Path, place: tuple[Any, ...], value: Any) -> None:
        document = json.loads((path.parent.parent / "aside").read_text())
        path.write_text(json.dumps(with_value(document, place, value)))

    for name, place, value in (
        ("dual/dual.json", ("kl", "log_samples"), 1e6),
        ("dual/dual.json", ("trust",), {"verdict": "splendid", "reasons": [], "advice": []}),
        ("dual/dual.json", ("trust",), {"verdict": "weak", "reasons": [], "advice": []}),
        ("dual/dual.json", ("ladder", "rungs", 0, "multipliers"), {}),
        ("dual/dual.json", ("inputs",), []),
        ("dual/dual.json", ("by_category", 0, "scores"), []),
        ("evaluation/evaluation.json", ("constraints",), []),
        ("evaluation/evaluation.json", ("constraints", 0, "name"), "another"),
        ("evaluation/evaluation.json", ("status",), "violated"),
        ("evaluation/evaluation.json", ("reward", "ci95"), [1.0]),
        ("evaluation/evaluation.json", ("by_category", 0, "scores", 0, "name"), "another"),
        ("policy/training_log.json", (0, "step"), "one"),
    ):
        path = run / name
        with in_place_of(path):
            change(path, place, value)
            with pytest.raises(CorruptArtifactError, match=path.name.replace(".", r"\.")):
                write_report(run, output=tmp_path)


def test_no_run_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("file", "empty", "loop", "missing", "x" * 300, "a\0b"):
        assert main(["validate", str(tmp_path / name), "--no-progress"]) == 2
        said = capsys.readouterr().err.strip()
        assert said.startswith("dualign: ")
        assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("artifact", "count"),
    [
        ("prompts", "test"),
        ("samples", "rows"),
        ("samples", "failed"),
        ("scores/harmless", "rows"),
        ("dual", "samples"),
        ("tilted", "rows"),
        ("evaluation", "prompts"),
    ],
)
def test_counts_that_are_missing_or_of_something_else_are_faults(artifact: str, count: str, run: Path) -> None:
    path = run / artifact / "manifest.json"
    document = json.loads(path.read_text())
    for value, said in ((_REMOVED, f"has no count `{count}`"), (7, "7 ")):
        with in_place_of(path):
            path.write_text(json.dumps(with_value(document, ("counts", count), value)))
            faults = faults_of(run)
            assert any(artifact in fault and said in fault for fault in faults), faults


def test_what_validate_prints_of_a_manifest_does_not_reach_the_terminal_as_it_is(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / "prompts" / "manifest.json"
    document = json.loads(path.read_text())
    with in_place_of(path):
        path.write_text(json.dumps(with_value(document, ("counts", "\x1b[2J"), 1)))
        seal(path.parent)
        main(["validate", str(run), "--no-progress"])
    assert "\x1b" not in capsys.readouterr().out
