"""Further columns of the prompts, which scorers may read: kept beside the prompts table, joined by prompt."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.contracts.artifacts import content_sha256, file_sha256
from pipeline.contracts.errors import CorruptArtifactError, StaleArtifactError
from pipeline.contracts.shards import read_parquet, write_parquet
from pipeline.contracts.tables import INFO
from pipeline.run.step import remedy

_FILE = "info.parquet"
_SEEN = "prompt_info.parquet"
_SEEN_SCHEMA = pa.schema(
    [pa.field("prompt_id", pa.string(), nullable=False), pa.field("info_sha256", pa.string(), nullable=False)]
)

PromptInfo = Mapping[str, Mapping[str, Any]]
"""The columns of each prompt, by prompt id."""


def write_prompt_info(folder: Path, prompts: pa.Table, *, metadata: Mapping[str, str]) -> dict[str, str]:
    """Write the ``info`` of a table of prompts beside it, or remove that of a former one where it has none.

    Args:
        folder: of the prompts table.
        prompts: as they were read, with or without a column ``info`` of JSON objects.
        metadata: key-value entries for the file.

    Returns:
        The file within the folder and its sha256; nothing where there is none.
    """
    path = folder / _FILE
    if "info" not in prompts.column_names:
        path.unlink(missing_ok=True)
        return {}
    write_parquet(path, prompts.select(INFO.names).cast(INFO), metadata=metadata)
    return {_FILE: file_sha256(path)}


def read_prompt_info(folder: Path) -> PromptInfo:
    """The columns of each prompt, by prompt id; empty where the recipe named none.

    Raises:
        CorruptArtifactError: the file is damaged.
    """
    path = folder / _FILE
    if not path.is_file():
        return {}
    table = read_parquet(path, schema=INFO)
    found: dict[str, Mapping[str, Any]] = {}
    for prompt_id, text in zip(*(table[name].to_pylist() for name in INFO.names), strict=True):
        try:
            value = json.loads(text)
        except ValueError as error:
            raise CorruptArtifactError(f"{path}: the info of prompt {prompt_id} is not JSON: {error}") from error
        if not isinstance(value, dict):
            raise CorruptArtifactError(f"{path}: the info of prompt {prompt_id} is no JSON object")
        found[prompt_id] = value
    return found


def select_info(info: PromptInfo, columns: Sequence[str] | None) -> PromptInfo:
    """Some columns of each prompt; all where ``columns`` is None, nothing where it is empty."""
    if columns is None:
        return info
    if not columns:
        return {}
    return {prompt_id: {name: row[name] for name in columns if name in row} for prompt_id, row in info.items()}


def claim_prompt_info(folder: Path, info: PromptInfo) -> None:
    """Record what a table of scores was computed from besides the responses, and refuse what contradicts it.

    Prompts may be added; the columns of a prompt whose responses were scored must stay.

    Args:
        folder: of the table of scores.
        info: what its scorer reads of each prompt; empty for a scorer that reads none.

    Raises:
        StaleArtifactError: a prompt has other values than when it was scored.
    """
    if not info:
        return
    path = folder / _SEEN
    now = {prompt_id: content_sha256(dict(row)) for prompt_id, row in info.items()}
    seen: dict[str, str] = {}
    if path.is_file():
        table = read_parquet(path, schema=_SEEN_SCHEMA)
        seen = dict(zip(*(table[name].to_pylist() for name in _SEEN_SCHEMA.names), strict=True))
    changed = [prompt_id for prompt_id, sha256 in now.items() if seen.get(prompt_id, sha256) != sha256]
    if changed:
        raise StaleArtifactError(
            f"{folder} was made from something else:\n  - `info` of {len(changed)} prompts (first: {changed[0]})\n"
            f"{remedy('score')}"
        )
    both = {**seen, **now}
    if both != seen:
        columns = {"prompt_id": list(both), "info_sha256": list(both.values())}
        write_parquet(path, pa.table(columns, schema=_SEEN_SCHEMA), metadata={})
