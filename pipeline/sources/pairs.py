"""Pairs of responses of a data set, to train on instead of the reference's own responses (arXiv 2405.19544, eq. 5).

Each step does for them, in ``pairs/`` of the run, what it does for the samples: ``sample`` reads and tokenises them,
``score`` scores them and ``export`` writes their hand-off table. The responses 2i and 2i + 1 of a prompt are its pair
i, counted in the order of the source.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Set
from dataclasses import dataclass

from pipeline.config.recipe import RunConfig
from pipeline.config.sections import PairSettings, PromptSettings
from pipeline.contracts.errors import InputError
from pipeline.contracts.tables import prompt_id
from pipeline.sources.prompts import Messages, SourceRow, read_prompt_row, read_source

PAIRS_SECTION = "training.pairs"


@dataclass(frozen=True)
class DataSetPair:
    """A pair of responses to a train prompt.

    Attributes:
        prompt_id: of the prompt.
        messages: the prompt.
        number: of the pair among those of its prompt, from 0; pairs that are left out count too.
        texts: the two responses, which differ.
    """

    prompt_id: str
    messages: Messages
    number: int
    texts: tuple[str, str]


@dataclass(frozen=True)
class ReadPairs:
    """What a source holds.

    Attributes:
        pairs: by prompt_id and number.
        counts: ``source_rows``, and how many of them were left out, by the reason: ``missing`` (no prompt, or
            no response), ``test`` (of a test prompt), ``equal`` (responses), ``beyond_limit``.
        sha256: of all rows of the source, whether they are left out or not.
    """

    pairs: tuple[DataSetPair, ...]
    counts: Mapping[str, int]
    sha256: str


def read_pairs(config: RunConfig, *, test_prompts: Set[str]) -> ReadPairs:
    """The pairs of train prompts of a recipe's source.

    Args:
        config: the run configuration, with ``training.pairs``.
        test_prompts: ids of the run's test prompts: whatever the source says of them, they are not trained on.

    Raises:
        InputError: the source or a column is not there or cannot be read, or a row is malformed.
        MissingExtraError: the source is a data set, and `datasets` is not installed.
    """
    settings = pair_settings(config)
    reader = pair_reader(config)
    counts: Counter[str] = Counter()
    digest = hashlib.sha256()
    found: list[tuple[str, Messages, tuple[str, str] | None]] = []
    # A prompt that is a test prompt in one row is none to train on in another.
    not_trained = set(test_prompts)
    for row in read_source(reader, section=PAIRS_SECTION, response_columns=settings.response_columns):
        counts["source_rows"] += 1
        digest.update(json.dumps([row.split, row.values], sort_keys=True, ensure_ascii=False, default=str).encode())
        if _is_missing(row.values[reader.prompt_column]):
            counts["missing"] += 1
            continue
        prompt = read_prompt_row(reader, row)
        key = prompt_id(prompt.messages)
        if prompt.split == "test":
            not_trained.add(key)
        found.append((key, prompt.messages, _texts(row, settings)))
    pairs: list[DataSetPair] = []
    numbers: Counter[str] = Counter()
    for key, messages, texts in found:
        number = numbers[key]
        numbers[key] += 1
        if key in not_trained:
            counts["test"] += 1
        elif texts is None:
            counts["missing"] += 1
        elif texts[0] == texts[1]:
            counts["equal"] += 1
        else:
            pairs.append(DataSetPair(key, messages, number, texts))
    pairs.sort(key=lambda pair: (pair.prompt_id, pair.number))
    if settings.limit is not None:
        within = set(sorted({pair.prompt_id for pair in pairs})[: settings.limit])
        kept = [pair for pair in pairs if pair.prompt_id in within]
        counts["beyond_limit"] = len(pairs) - len(kept)
        pairs = kept
    return ReadPairs(tuple(pairs), dict(counts), digest.hexdigest())


def pair_settings(config: RunConfig) -> PairSettings:
    """Where the pairs come from, of a recipe that trains on some."""
    assert config.training.pairs is not None  # the callers ask first
    return config.training.pairs


def pair_reader(config: RunConfig) -> PromptSettings:
    """The source under the rules of ``prompts``: a prompt has one id and one split in both."""
    return PromptSettings(
        **pair_settings(config).model_dump(exclude={"response_columns"}),
        system=config.prompts.system,
        test_fraction=config.prompts.test_fraction,
        last_assistant_turn=config.prompts.last_assistant_turn,
    )


def _is_missing(value: object) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _texts(row: SourceRow, settings: PairSettings) -> tuple[str, str] | None:
    """The two responses of a row; None where one is missing."""
    first, second = (row.values[column] for column in settings.response_columns)
    for column, value in zip(settings.response_columns, (first, second), strict=True):
        if value is not None and not isinstance(value, str):
            raise InputError(f"{row.place}: `{column}` is {str(value)[:60]}; it must be a text")
    return None if _is_missing(first) or _is_missing(second) else (first, second)
