"""Sizes and licences of models and data sets on the Hub, for estimates that reach no network.

The tables are ``models.yaml`` and ``data_sets.yaml`` beside this file. What is not in them is unknown.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field

_FOLDER = Path(__file__).parent
_Count = Annotated[int, Field(ge=1)]
_Row = TypeVar("_Row", bound=BaseModel)


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelFacts(_Strict):
    """One model.

    Attributes:
        parameters: number of weights.
        layers: transformer layers.
        hidden: width of the residual stream.
        kv_width: width of the keys of one token in one layer (heads of keys × width of a head).
        intermediate: width of the feed-forward layers.
        vocabulary: entries of the vocabulary.
        decoder: whether attention is causal.
        weights: file format in the repository.
        licence: as its card says, or where to look.
        source: of these facts.
    """

    parameters: _Count
    layers: _Count
    hidden: _Count
    kv_width: _Count
    intermediate: _Count
    vocabulary: _Count
    decoder: bool
    weights: Literal["safetensors", "bin", "gguf", "unknown"]
    licence: str
    source: str


class DataSetFacts(_Strict):
    """One data set.

    Attributes:
        rows: number of rows by split; prompts may repeat in them.
        licence: as its page says, or where to look.
        source: of these facts.
    """

    rows: dict[str, _Count]
    licence: str
    source: str


@cache
def read_model_facts() -> Mapping[str, ModelFacts]:
    """Facts of models by their id on the Hub."""
    return _read("models.yaml", ModelFacts)


@cache
def read_data_set_facts() -> Mapping[str, DataSetFacts]:
    """Facts of data sets by their id on the Hub."""
    return _read("data_sets.yaml", DataSetFacts)


def _read(name: str, row: type[_Row]) -> dict[str, _Row]:
    tree: dict[str, Any] = yaml.safe_load((_FOLDER / name).read_text(encoding="utf-8"))
    return {key: row.model_validate(value) for key, value in tree.items()}
