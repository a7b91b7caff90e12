"""Hand-offs on another machine: whole ones have no fault, and every damage is named, by file and what it breaks."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from helpers.hand_offs import SETTINGS, make_run, read_lines, write_tilted

from pipeline.cli import main
from pipeline.contracts.artifacts import file_sha256, read_json, read_manifest, write_json, write_manifest
from pipeline.formats.all_formats import FORMATS
from pipeline.formats.writing import write_exports
from pipeline.steps.validate import validate

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = make_run(tmp_path_factory.mktemp("data"))
    write_tilted(run)
    write_exports(run, list(FORMATS), SETTINGS, command=["dualign export", "--config mine.yaml"])
    return run.folder / "exports"


def handed_on(exports: Path, name: str, folder: Path) -> Path:
    """The folder alone, as the other team has it."""
    shutil.copytree(exports / name, folder / "from_us")
    return folder / "from_us"


def record(folder: Path, name: str) -> None:
    """Let every hash in the folder say that this is the file: what remains is what its content says."""
    manifest = read_manifest(folder)
    digest = file_sha256(folder / name)
    croissant = read_json(folder / "croissant.json")
    for entry in croissant["distribution"]:
        if entry["@id"] == name:
            entry["sha256"] = digest
    write_json(folder / "croissant.json", croissant)
    documents = {one: file_sha256(folder / one) for one in ("README.md", "croissant.json")}
    changed = replace(
        manifest,
        files={**manifest.files, name: digest},
        details={**manifest.details, "documents": documents},
    )
    write_manifest(folder, changed)


def edit_lines(name: str, change: Callable[[dict], object]) -> Callable[[Path], None]:
    """Change the first row of a file of JSON Lines."""

    def edit(folder: Path) -> None:
        rows = read_lines(folder / name)
        change(rows[0])
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        record(folder, name)

    return edit


def edit_table(change: Callable[[pa.Table], pa.Table]) -> Callable[[Path], None]:
    """Change the train rows of a Parquet table."""

    def edit(folder: Path) -> None:
        path = next((folder / "data").glob("train-*"))
        pq.write_table(change(pq.read_table(path)), path)
        record(folder, str(path.relative_to(folder)))

    return edit


def edit_json(name: str, change: Callable[[dict], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        document = read_json(folder / name)
        change(document)
        write_json(folder / name, document)
        record(folder, name)

    return edit


def set_column(name: str, value: Callable[[pa.ChunkedArray], object]) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        place = table.schema.get_field_index(name)
        return table.set_column(place, table.schema.field(place), value(table[name]))

    return change


DAMAGES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "a changed file": (
        "nemo-rl",
        lambda folder: (folder / "sft/train.jsonl").write_text("{}\n"),
        r"sft/train\.jsonl is not the file that .*manifest\.json records",
    ),
    "a missing file": (
        "axolotl",
        lambda folder: (folder / "preference/test.jsonl").unlink(),
        r"preference/test\.jsonl cannot be read: No such file",
    ),
    "another card": (
        "weighted-sft",
        lambda folder: (folder / "README.md").write_text("beta 0.1"),
        r"README\.md is not the file",
    ),
    "a file more": (
        "weighted-sft",
        lambda folder: shutil.copy(next((folder / "data").glob("train-*")), folder / "data/more.parquet"),
        r"more\.parquet is not in the manifest",
    ),
    "no dual": (
        "weighted-sft",
        lambda folder: (folder / "dual.json").unlink(),
        r"dual\.json cannot be read",
    ),
    "a damaged dual": (
        "rl-reward",
        edit_json("dual.json", lambda dual: dual.pop("beta")),
        r"dual\.json is damaged: `beta` is missing",
    ),
    "another multiplier in the dual": (
        "rl-reward",
        edit_json("dual.json", lambda dual: dual["constraints"][0].update(multiplier=0.8)),
        r"reward\.json: the coefficient of harm is -0\.7, and dual\.json gives -0\.8",
    ),
    "another beta in the reward": (
        "rl-reward",
        edit_json("reward.json", lambda terms: terms.update(beta=0.05)),
        r"reward\.json: beta is 0\.05, and 0\.5 in dual\.json",
    ),
    "an example that is none": (
        "rl-reward",
        edit_json("examples.json", lambda examples: examples[0].update(reward=7.0)),
        r"examples\.json: example 0 says 7; reward\.json gives",
    ),
    "a transform that the module does not have": (
        "rl-reward",
        edit_json("reward.json", lambda terms: terms["constraints"][0].update(transform={"kind": "median"})),
        r"transforms its score by 'median'",
    ),
    "a score that the label was not drawn by": (
        "llama-factory",
        edit_lines("preference/train.jsonl", lambda row: row.update(chosen_score=row["chosen_score"] + 1)),
        r"preference/train\.jsonl: row 0 has another `label_probability` than chosen_score - rejected_score gives",
    ),
    "another prompt": (
        "axolotl",
        edit_lines("sft/train.jsonl", lambda row: row["messages"][0].update(content="something else")),
        r"row 0 is not of the prompt that it names",
    ),
    "ranks the other way round": (
        "nemo-rl",
        edit_lines("preference/train.jsonl", lambda row: row["completions"].reverse()),
        r"row 0 has not exactly a completion of rank 0 and one of rank 1",
    ),
    "a turn of the prompt that is learnt": (
        "nemo-rl",
        edit_lines("sft/train.jsonl", lambda row: row.update(message_loss_mask=[1] * len(row["messages"]))),
        r"row 0 has a mask by which other messages than the last are learnt",
    ),
    "a row of another shape": (
        "openai-jsonl",
        edit_lines("data/train.jsonl", lambda row: row.update(text="")),
        r"line 1 has \['messages', 'text'\], expected \['messages'\]",
    ),
    "a text where a number is": (
        "axolotl",
        edit_lines("preference/train.jsonl", lambda row: row.update(chosen_index="first")),
        r"a line of 1 to 240 does not fit its columns",
    ),
    "half a file": (
        "openai-jsonl",
        lambda folder: (
            (folder / "data/train.jsonl").write_text((folder / "data/train.jsonl").read_text()[:-20]),
            record(folder, "data/train.jsonl"),
        ),
        r"train\.jsonl is damaged: line 480 is not JSON",
    ),
    "fewer rows": (
        "trl-preference",
        edit_table(lambda table: table.slice(1)),
        r"239 rows, 240 in the manifest",
    ),
    "weights of another temperature": (
        "weighted-sft",
        edit_table(set_column("score", lambda score: pc.multiply(score, 2.0))),
        r"has weights that are not those of its scores \(and 11 more prompts\)",
    ),
    "weights that do not sum to one": (
        "weighted-sft",
        edit_table(set_column("weight", lambda weight: pc.multiply(weight, 0.5))),
        r"has weights that do not sum to 1: 0\.5",
    ),
    "labels turned round": (
        "trl-unpaired",
        edit_table(set_column("label", pc.invert)),
        r"has another `label_probability` than log_ratio gives",
    ),
    "a table that is not named": (
        "llama-factory",
        edit_json("dataset_info.json", lambda info: info.pop("dualign_sft")),
        r"dataset_info\.json does not name sft/train\.jsonl",
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_whole_one_has_no_fault(name: str, exports: Path, tmp_path: Path) -> None:
    folder = handed_on(exports, name, tmp_path)
    assert validate(folder).faults == []
    assert f"--config mine.yaml --format {name}" in read_manifest(folder).details["command"]


@pytest.mark.parametrize("what", DAMAGES)
def test_every_damage_is_named(what: str, exports: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, damage, message = DAMAGES[what]
    folder = handed_on(exports, name, tmp_path)
    damage(folder)
    assert main(["validate", str(folder), "--no-progress"]) == 2
    out = capsys.readouterr().out
    assert re.search(message, out), out
    assert "Traceback" not in out


def test_a_prompt_in_both_splits_is_named(exports: Path, tmp_path: Path) -> None:
    folder = handed_on(exports, "nemo-rl", tmp_path)
    shutil.copy(folder / "sft/train.jsonl", folder / "sft/test.jsonl")
    record(folder, "sft/test.jsonl")
    assert any("12 prompts of sft are in both splits" in fault for fault in validate(folder).faults)


def test_one_of_an_earlier_release_is_told_from_a_run(exports: Path, tmp_path: Path) -> None:
    folder = handed_on(exports, "trl-preference", tmp_path)
    manifest = read_manifest(folder)
    files = {name: digest for name, digest in manifest.files.items() if name != "dual.json"}
    write_manifest(folder, replace(manifest, files=files))
    (folder / "dual.json").unlink()
    assert any("is not complete by itself: it has no dual.json" in fault for fault in validate(folder).faults)


def test_it_needs_no_model_and_runs_nothing_of_the_folder(exports: Path, tmp_path: Path) -> None:
    folder = handed_on(exports, "rl-reward", tmp_path)
    (folder / "dualign_reward.py").write_text("raise SystemExit('was run')\n")
    (folder / "scorers.py").write_text("raise SystemExit('was run')\n")
    record(folder, "dualign_reward.py")
    extras = ("torch", "transformers", "datasets", "accelerate", "vllm", "pandas", "safetensors", "tokenizers")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({extras!r}))\n"
        f"from pipeline.cli import main; raise SystemExit(main(['validate', {str(folder)!r}, '--no-progress']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 artifact, no faults" in done.stdout
