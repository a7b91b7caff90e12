"""LLaMA-Factory's formats, by what its converter requires (SharegptDatasetConverter of 0.9.5)."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from helpers.hand_offs import SETTINGS, read_lines, read_rows, write_tilted

from pipeline.contracts.artifacts import read_json
from pipeline.contracts.errors import InputError
from pipeline.formats.llama_factory import refuse_prompt
from pipeline.formats.writing import write_exports
from pipeline.run.run import Run

pytestmark = pytest.mark.slow


def converted(row: dict, entry: dict) -> tuple[list[dict], list[dict]]:
    """Prompt and responses of a row as the converter makes them, by the names and tags of ``dataset_info.json``."""
    tags, columns = entry["tags"], entry["columns"]
    messages = row[columns["messages"]]
    if messages[0][tags["role_tag"]] == tags["system_tag"]:
        messages = messages[1:]
    for place, message in enumerate(messages):
        assert message[tags["role_tag"]] == tags["user_tag" if place % 2 == 0 else "assistant_tag"]
    if not entry.get("ranking"):
        assert len(messages) % 2 == 0
        return messages[:-1], messages[-1:]
    assert len(messages) % 2 == 1
    return messages, [row[columns["chosen"]], row[columns["rejected"]]]


def test_every_row_is_converted_and_none_passed_over(exported: tuple[Path, pa.Table]) -> None:
    folder = exported[0] / "llama-factory"
    info = read_json(folder / "dataset_info.json")
    assert set(info) == {f"dualign_{part}{split}" for part in ("preference", "sft") for split in ("", "_test")}
    assert all(
        entry["formatting"] == "sharegpt" for entry in info.values()
    )  # `openai` writes a system prompt of its own
    pairs = read_rows(exported[0] / "trl-preference")
    entry = info["dualign_preference"]
    for row, pair in zip(read_lines(folder / entry["file_name"]), pairs, strict=True):
        prompt, (chosen, rejected) = converted(row, entry)
        assert (prompt, [chosen], [rejected]) == (pair["prompt"], pair["chosen"], pair["rejected"])
    lines = read_lines(exported[0] / "openai-jsonl/data/test.jsonl")
    entry = info["dualign_sft_test"]
    for row, line in zip(read_lines(folder / entry["file_name"]), lines, strict=True):
        _, answers = converted(row, entry)
        assert answers == line["messages"][-1:]


@pytest.mark.parametrize(
    ("roles", "read"),
    [
        (["user"], True),
        (["system", "user"], True),
        (["user", "assistant", "user"], True),
        (["user", "user"], False),
        (["user", "assistant"], False),
        (["assistant", "user"], False),
        (["user", "system", "user"], False),
        (["system"], False),
        (["tool"], False),
    ],
)
def test_prompts_that_it_would_pass_over_are_refused(roles: list[str], read: bool) -> None:
    reason = refuse_prompt([{"role": role, "content": "?"} for role in roles])
    assert (reason is None) == read


def test_such_a_prompt_stops_the_export_before_anything_is_written(run: Run) -> None:
    write_tilted(run, first_role="tool")
    with pytest.raises(InputError, match=r"`llama-factory` cannot be written: prompt [0-9a-f]{64} is not read"):
        write_exports(run, ["trl-preference", "llama-factory"], SETTINGS)
    assert not (run.folder / "exports").exists()
