"""Answers that were paid for: on disk before they are used, so that a killed run pays for none twice."""

from __future__ import annotations

import json
import os
import threading
import uuid
from pathlib import Path
from typing import IO, Any

from pipeline.contracts.errors import InputError


class AnswerCache:
    """What was answered to requests, by the sha256 of a request's body; may be used from several threads.

    A folder of JSON Lines. Each process appends to a file of its own, flushed to the disk line by line, and reads all
    files when it starts. A last line that a kill cut short is passed over: its answer is asked for again.

    Args:
        folder: made if missing; None keeps the answers in memory alone.

    Raises:
        InputError: the folder cannot be read or written.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._file: IO[str] | None = None
        self._lock = threading.Lock()
        self._answers: dict[str, Any] = {}
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                for path in sorted(folder.glob("*.jsonl")):
                    self._read(path)
            except OSError as error:
                raise InputError(f"{folder} cannot be read or made: {error.strerror or error}") from error

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, request: str) -> Any | None:
        """The answer to a request, or None where there is none yet."""
        return self._answers.get(request)

    def add(self, request: str, answer: Any) -> None:
        """Keep an answer; when this returns it is on disk.

        Raises:
            InputError: the disk is full, or the like.
        """
        line = json.dumps({"request": request, "answer": answer}, separators=(",", ":"))
        with self._lock:
            if self._folder is not None:
                try:
                    if self._file is None:
                        path = self._folder / f"{uuid.uuid4().hex}.jsonl"
                        self._file = path.open("w", encoding="ascii")
                    self._file.write(line + "\n")
                    self._file.flush()
                    os.fsync(self._file.fileno())
                except OSError as error:
                    raise InputError(f"{self._folder} cannot be written: {error.strerror or error}") from error
            self._answers[request] = answer

    def close(self) -> None:
        """Close the file of this process."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _read(self, path: Path) -> None:
        for line in path.read_text(encoding="ascii", errors="replace").split("\n"):
            try:
                record = json.loads(line)
                self._answers[str(record["request"])] = record["answer"]
            except (ValueError, KeyError, TypeError):
                continue
