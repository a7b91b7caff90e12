"""`croissant.json` against the rules of Croissant 1.0 that can be checked without its library.

``benchmarks/read_back.py`` reads every record of a hand-off with ML Commons' own `mlcroissant`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.hand_offs import read_lines

from pipeline.contracts.artifacts import file_sha256, read_json
from pipeline.formats.all_formats import FORMATS

pytestmark = pytest.mark.slow


def fields_of(fields: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for field in fields:
        yield field
        yield from fields_of(field.get("subField", []))


@pytest.mark.parametrize("name", FORMATS)
def test_it_is_valid_and_says_what_is_there(name: str, exported: tuple[Path, pa.Table]) -> None:
    folder = exported[0] / name
    document = read_json(folder / "croissant.json")
    # What the specification requires of a data set.
    assert document["@type"] == "sc:Dataset"
    assert document["conformsTo"] == "http://mlcommons.org/croissant/1.0"
    for required in ("name", "description", "version", "datePublished", "distribution", "recordSet"):
        assert document[required]
    assert re.fullmatch(r"[\w-]+", document["name"])
    ids = [one["@id"] for one in document["distribution"] + document["recordSet"]]
    for record_set in document["recordSet"]:
        ids += [field["@id"] for field in fields_of(record_set["field"])]
    assert len(ids) == len(set(ids))
    # Every term is one of the context's, or a keyword.
    known = {*document["@context"], "name", "description", "version", "datePublished", "distribution", "containedIn"}
    known |= {"contentUrl", "encodingFormat", "sha256", "@context", "@id", "@type"}

    def terms(value: object) -> Iterator[str]:
        if isinstance(value, dict):
            yield from value
            for inner in value.values():
                yield from terms(inner)
        elif isinstance(value, list):
            for inner in value:
                yield from terms(inner)

    content = {key: value for key, value in document.items() if key != "@context"}
    assert set(terms(content)) <= known
    # Files are there and are these; sets of files have members; fields are columns of them.
    objects = [one for one in document["distribution"] if one["@type"] == "cr:FileObject"]
    sets = {one["@id"]: one for one in document["distribution"] if one["@type"] == "cr:FileSet"}
    for one in objects:
        assert file_sha256(folder / one["contentUrl"]) == one["sha256"]
    described = set()
    for record_set in document["recordSet"]:
        leaves = [field for field in fields_of(record_set["field"]) if "subField" not in field]
        assert all("dataType" in field for field in leaves)
        (source,) = {field["source"]["fileSet"]["@id"] for field in leaves}
        (path,) = folder.glob(sets[source]["includes"])
        described.add(str(path.relative_to(folder)))
        rows = read_lines(path) if path.suffix == ".jsonl" else pq.read_table(path).to_pylist()
        assert {field["source"]["extract"]["column"] for field in leaves} == set(rows[0])
    assert described == {one["@id"] for one in objects if one["@id"].endswith((".parquet", ".jsonl"))}
