"""Arrow schemas of every table, and the checks that keep them: explicit types, no inferred nulls, unique keys."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import pyarrow as pa

from pipeline.contracts.errors import InputError

SCHEMA_VERSION: Final = "1"

SPLITS = ("train", "test")
"""``train`` feeds the dual and training; ``test`` gives held-out predictions and the evaluation."""

SAMPLE_KEY = ("prompt_id", "sample_index")

TOKEN_IDS = ("prompt_token_ids", "completion_token_ids")
"""Columns of the samples table: what the policy read and what was sampled."""

_MESSAGES = pa.list_(pa.struct([pa.field("role", pa.string()), pa.field("content", pa.string())]))

PROMPTS = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("prompt", _MESSAGES, nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("category", pa.string(), nullable=False),
    ]
)

SAMPLES = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("sample_index", pa.int32(), nullable=False),
        pa.field("completion", pa.string(), nullable=False),
        pa.field("prompt_token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("completion_token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("sampler_logp", pa.float64(), nullable=False),
    ]
)

SCORES = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("sample_index", pa.int32(), nullable=False),
        pa.field("value", pa.float64(), nullable=False),
        pa.field("scored_sha256", pa.string(), nullable=False),
        pa.field("truncated", pa.bool_(), nullable=False),
    ]
)

INFO = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("info", pa.string(), nullable=False),
    ]
)
"""Further columns of the prompts, for scorers: a JSON object for each prompt."""

CONSTRAINT_PREFIX = "constraint_"


def tilted_schema(constraint_names: Sequence[str]) -> pa.Schema:
    """Schema of the hand-off table: scores in the user's own direction and units, weight sums to 1 within a prompt."""
    return pa.schema(
        [
            pa.field("prompt_id", pa.string(), nullable=False),
            pa.field("sample_index", pa.int32(), nullable=False),
            pa.field("prompt", _MESSAGES, nullable=False),
            pa.field("completion", pa.string(), nullable=False),
            pa.field("reward", pa.float64(), nullable=False),
            *(pa.field(CONSTRAINT_PREFIX + name, pa.float64(), nullable=False) for name in constraint_names),
            pa.field("weight", pa.float64(), nullable=False),
            pa.field("split", pa.string(), nullable=False),
            pa.field("category", pa.string(), nullable=False),
        ]
    )


def with_metadata(schema: pa.Schema, metadata: Mapping[str, str]) -> pa.Schema:
    """The schema with ``dualign.<key>`` entries and the schema version in its key-value metadata."""
    entries = {
        "dualign.schema_version": SCHEMA_VERSION,
        **{f"dualign.{key}": value for key, value in metadata.items()},
    }
    return schema.with_metadata(entries)


def prompt_id(messages: Sequence[Mapping[str, str]]) -> str:
    """sha256 of the canonical messages: role and content only, compact JSON, UTF-8, keys sorted.

    Raises:
        InputError: no messages, or a message without a string role and content.
    """
    if not messages:
        raise InputError("a prompt has no messages; it needs at least one")
    for message in messages:
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise InputError(f"a prompt holds the message {dict(message)!r}; `role` and `content` must be strings")
    canonical = [{"role": message["role"], "content": message["content"]} for message in messages]
    text = json.dumps(canonical, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def require_unique(keys: Iterable[object], *, what: str) -> None:
    """Raise InputError naming the first keys that occur more than once."""
    seen: set[object] = set()
    repeated: list[object] = []
    for key in keys:
        if key in seen:
            repeated.append(key)
        seen.add(key)
    if repeated:
        shown = ", ".join(str(key) for key in repeated[:3])
        raise InputError(f"{what}: {len(repeated)} repeated (first: {shown}); each may occur once")
