"""What a hand-off holds, in the vocabulary of ML Commons' Croissant 1.0 (mlcommons.org/croissant), beside its card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from pipeline.formats.export_format import ExportFormat, Part

CROISSANT = "croissant.json"

_CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileProperty": "cr:fileProperty",
    "fileObject": "cr:fileObject",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}
"""The context that the specification asks for, in its words."""


def describe_hand_off(
    kind: ExportFormat,
    *,
    name: str,
    description: str,
    files: Mapping[str, str],
    splits: Mapping[str, Sequence[str]],
    date: str,
) -> dict[str, Any]:
    """The content of ``croissant.json``.

    Args:
        kind: the format.
        name: of the data set; made of letters, digits, ``-`` and ``_`` here.
        description: a sentence.
        files: sha256 of every file by its path in the folder.
        splits: of each part the splits that have rows.
        date: of the day it was made, ISO 8601.
    """
    sets = [(part, split) for part in kind.parts for split in splits[part.name]]
    return {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in name),
        "description": description,
        "datePublished": date,
        "version": "1.0.0",
        "distribution": [
            *(_file_object(path, digest) for path, digest in files.items()),
            *(_file_set(part, split) for part, split in sets),
        ],
        "recordSet": [
            {
                "@type": "cr:RecordSet",
                "@id": f"{part.name}-{split}-rows",
                "name": f"{part.name}-{split}-rows",
                "description": f"The {split} rows of {part.name}/.",
                "field": [_field(f"{part.name}-{split}", field) for field in part.schema],
            }
            for part, split in sets
        ],
    }


def _file_object(path: str, digest: str) -> dict[str, Any]:
    encodings = {".parquet": "application/x-parquet", ".jsonl": "application/jsonlines", ".json": "application/json"}
    suffix = "." + path.rpartition(".")[2]
    return {
        "@type": "cr:FileObject",
        "@id": path,
        "name": path,
        "contentUrl": path,
        "encodingFormat": encodings.get(suffix, "text/plain"),
        "sha256": digest,
    }


def _file_set(part: Part, split: str) -> dict[str, Any]:
    """The files of a split, in the folder that this description is in."""
    return {
        "@type": "cr:FileSet",
        "@id": f"{part.name}-{split}",
        "name": f"{part.name}-{split}",
        "encodingFormat": "application/jsonlines" if part.lines else "application/x-parquet",
        "includes": part.pattern(split),
    }


def _field(table: str, field: pa.Field) -> dict[str, Any]:
    described: dict[str, Any] = {
        "@type": "cr:Field",
        "@id": f"{table}-rows/{field.name}",
        "name": f"{table}-rows/{field.name}",
    }
    inner = field.type.value_type if pa.types.is_list(field.type) else field.type
    if inner is not field.type:
        described["repeated"] = True
    if pa.types.is_struct(inner):
        return described | {
            "subField": [
                _leaf(table, field.name, path, kind, parent=described["@id"]) for path, kind in _leaves(inner)
            ]
        }
    return described | {"dataType": _data_type(inner), "source": _source(table, field.name)}


def _leaf(table: str, column: str, path: str, kind: pa.DataType, *, parent: str) -> dict[str, Any]:
    return {
        "@type": "cr:Field",
        "@id": f"{parent}/{path}",
        "name": f"{parent}/{path}",
        "dataType": _data_type(kind),
        "source": _source(table, column) | {"transform": {"jsonPath": path}},
    }


def _leaves(struct: pa.StructType) -> list[tuple[str, pa.DataType]]:
    """Paths and types of the values in a struct; of lists in it, which hold one message each, of the first."""
    found: list[tuple[str, pa.DataType]] = []
    for field in struct:
        if pa.types.is_list(field.type):
            found += [(f"{field.name}[0].{path}", kind) for path, kind in _leaves(field.type.value_type)]
        else:
            found.append((field.name, field.type))
    return found


def _source(table: str, column: str) -> dict[str, Any]:
    return {"fileSet": {"@id": table}, "extract": {"column": column}}


def _data_type(kind: pa.DataType) -> str:
    if pa.types.is_boolean(kind):
        return "sc:Boolean"
    if pa.types.is_integer(kind):
        return "sc:Integer"
    return "sc:Float" if pa.types.is_floating(kind) else "sc:Text"
