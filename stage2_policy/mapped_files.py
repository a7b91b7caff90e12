"""Arrow files that are mapped into memory: columns of numbers, and lists of token ids without a limit to their sum.

What is mapped takes memory while it is read, is shared by the processes of a machine, and is given back when others
need it. Nothing here needs torch.
"""

from __future__ import annotations

import os
import shutil
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
from filelock import FileLock

from pipeline.contracts.artifacts import file_sha256, read_json_object, write_json
from pipeline.contracts.errors import CorruptArtifactError

_SEAL = "sealed.json"
_LISTS = pa.schema([pa.field("tokens", pa.list_(pa.int32()), nullable=False)])


class TokenLists:
    """Many lists of token ids, read one at a time.

    Args:
        chunks: the token ids of some lists one after the other, and where each begins, with the end of the last:
            shapes (tokens,) and (lists + 1,).
    """

    def __init__(self, chunks: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
        self._chunks = chunks
        self._first = [0, *np.cumsum([len(offsets) - 1 for _, offsets in chunks]).tolist()]

    @classmethod
    def of(cls, lists: Iterable[Sequence[int] | np.ndarray]) -> TokenLists:
        """Lists that are in memory."""
        arrays = [np.asarray(one, dtype=np.int32) for one in lists]
        offsets = np.cumsum([0, *map(len, arrays)])
        return cls([(np.concatenate([np.empty(0, np.int32), *arrays]), offsets)])

    @classmethod
    def of_column(cls, column: pa.ChunkedArray) -> TokenLists:
        """The lists of an Arrow column, where they are."""
        chunks = [chunk for chunk in column.chunks if len(chunk)]
        return cls([(lists.values.to_numpy(), lists.offsets.to_numpy()) for lists in chunks])

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, place: int) -> np.ndarray:
        """The token ids of a list, shape (its length,)."""
        if not 0 <= place < len(self):
            raise IndexError(place)
        chunk = bisect_right(self._first, place) - 1
        values, offsets = self._chunks[chunk]
        start = place - self._first[chunk]
        return values[offsets[start] : offsets[start + 1]]


class TokenListWriter:
    """Writes lists of token ids to an Arrow file, a chunk at a time.

    Args:
        path: of the file; a context closes it.
    """

    def __init__(self, path: Path) -> None:
        self._sink = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._sink, _LISTS)
        self.n_lists = 0

    def __enter__(self) -> TokenListWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._writer.close()
        finally:
            self._sink.close()

    def write(self, lists: pa.ListArray) -> None:
        """Append some lists, fewer than 2^31 tokens of them."""
        if len(lists):
            # A slice would be written with all the values it is a slice of.
            whole = pa.concat_arrays([lists]) if lists.offset else lists
            self._writer.write_batch(pa.RecordBatch.from_arrays([whole], schema=_LISTS))
            self.n_lists += len(lists)


def map_token_lists(path: Path) -> TokenLists:
    """The lists of a file of :class:`TokenListWriter`, mapped.

    Raises:
        CorruptArtifactError: the file is damaged.
    """
    return TokenLists.of_column(pa.chunked_array([batch.column(0) for batch in _batches(path)], _LISTS.field(0).type))


def write_columns(path: Path, columns: Mapping[str, np.ndarray | pa.Array]) -> None:
    """Write columns of one length to an Arrow file, in one piece so that each is mapped as one array."""
    batch = pa.RecordBatch.from_pydict(dict(columns))
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)


def map_columns(path: Path) -> dict[str, pa.Array]:
    """The columns of a file of :func:`write_columns`, mapped.

    Raises:
        CorruptArtifactError: the file is damaged.
    """
    (batch,) = _batches(path)
    return {name: batch.column(name) for name in batch.schema.names}


def _batches(path: Path) -> list[pa.RecordBatch]:
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        return [reader.get_batch(number) for number in range(reader.num_record_batches)]
    except (pa.ArrowException, OSError) as error:
        raise CorruptArtifactError(f"{path} cannot be read: {error}; remove {path.parent}") from error


class MappedFolder:
    """A folder of mapped files that is made once, by the first process that needs it, and known by what it is made of.

    Args:
        folder: of the files; nothing else may be in it.
        key: what the files depend on, JSON-serialisable.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any]) -> None:
        self.folder = folder
        self._key = dict(key)

    def lock(self) -> FileLock:
        """Held while the files are made; it dies with its process."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return FileLock(self.folder / ".lock")

    def is_whole(self) -> bool:
        """Whether all files are there, made of the same, and as they were written."""
        if not (self.folder / _SEAL).is_file():
            return False
        try:
            sealed = read_json_object(self.folder / _SEAL)
            return sealed.get("key") == self._key and all(
                file_sha256(self.folder / name) == recorded for name, recorded in sealed["files"].items()
            )
        except CorruptArtifactError:
            return False

    def clear(self) -> None:
        """Remove what an earlier call left."""
        for path in self.folder.iterdir():
            if path.name != ".lock":
                path.unlink()

    def seal(self) -> None:
        """Say that the files are whole, last."""
        paths = sorted(path for path in self.folder.iterdir() if path.suffix == ".arrow")
        for path in paths:
            with path.open("rb") as stream:
                os.fsync(stream.fileno())  # the seal must not reach the disk before what it vouches for
        write_json(self.folder / _SEAL, {"key": self._key, "files": {path.name: file_sha256(path) for path in paths}})


def remove_mapped(folder: Path) -> None:
    """Remove a folder of mapped files; some network file systems keep an empty folder until nobody maps them."""
    (folder / _SEAL).unlink(missing_ok=True)  # first: what is no longer whole must not look so
    with suppress(OSError):
        shutil.rmtree(folder)
