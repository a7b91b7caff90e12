"""Hand-offs of a run: ``exports/<format>/``, each complete by itself.

A folder has the rows, the solution they were made with, a card that says how to train on them, the same in ML Commons'
vocabulary, and a manifest with the hash of every file and the command that made it. Answers are rendered as a trainer
would render them: what the reference's chat template puts before an answer is kept.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jinja2 import Environment, StrictUndefined

from pipeline.contracts.artifacts import (
    atomic_write_bytes,
    begin_step,
    content_sha256,
    file_sha256,
    is_complete,
    read_manifest,
    run_lock,
    shown,
    write_json,
)
from pipeline.contracts.errors import InputError
from pipeline.contracts.markdown import code_markdown
from pipeline.contracts.shards import ShardedTable
from pipeline.contracts.solution import Solution, read_solution
from pipeline.contracts.tables import SPLITS
from pipeline.formats.all_formats import FORMATS
from pipeline.formats.croissant import CROISSANT, describe_hand_off
from pipeline.formats.export_format import (
    CARD,
    SOLUTION,
    TEMPLATE,
    ExportFormat,
    ExportSettings,
    HandOff,
    Part,
    Row,
)
from pipeline.formats.prompt_rows import read_prompt_rows
from pipeline.run.run import Run
from pipeline.run.step import finish_step, log, reopen
from stage1_dual.sampling.rendering import load_tokenizer
from stage1_dual.sampling.whole_turns import WholeTurns, fit_turns

_CARD_TEMPLATE = Path(__file__).parent / "card.md.jinja"
_ROWS_PER_FILE = 200_000
_EXAMPLE_CHARACTERS = 2000


def write_exports(run: Run, formats: Sequence[str], settings: ExportSettings, *, command: Sequence[str] = ()) -> None:
    """Write ``exports/<format>/`` of a run whose tilted table is there; a format that still stands is kept.

    Args:
        run: the run.
        formats: names in :data:`~pipeline.formats.all_formats.FORMATS`.
        settings: of what is drawn.
        command: what was called, without ``--format`` and what is drawn, for the record; empty from Python.

    Raises:
        InputError: a count below one, the reference's tokenizer is not here, or a trainer would not read a prompt.
        MissingExtraError: transformers is not installed, by whose tokenizer the answers are rendered.
        CorruptArtifactError: the tilted table is missing or damaged.
        StaleArtifactError: a format was exported with other settings.
    """
    for name in ("pairs_per_prompt", "lines_per_prompt"):
        if getattr(settings, name) < 1:
            raise InputError(f"`{name}` is {getattr(settings, name)}; it must be at least 1")
    with run_lock(run.folder):
        solution = read_solution(run.dual / SOLUTION)
        _require_prompts_that_are_read(run, [FORMATS[name] for name in dict.fromkeys(formats)], solution)
        tokenizer = load_tokenizer(run.model(run.config.reference, "reference"))
        turns = _fit_turns(run, tokenizer, solution)
        for name in dict.fromkeys(formats):
            writer = _Writer(run, FORMATS[name], settings, solution, turns, str(tokenizer.eos_token or ""))
            writer.write(command)


def _require_prompts_that_are_read(run: Run, kinds: Sequence[ExportFormat], solution: Solution) -> None:
    for split in SPLITS:
        for rows in read_prompt_rows(run.tilted, solution, split=split):
            for kind in kinds:
                reason = kind.refuses(rows.prompt)
                if reason is not None:
                    raise InputError(
                        f"`{kind.name}` cannot be written: prompt {rows.prompt_id} is not read there, {reason}"
                    )


def _fit_turns(run: Run, tokenizer: Any, solution: Solution) -> WholeTurns:
    reference = run.config.reference
    responses = (
        (prompt.prompt, prompt.completion)
        for split in SPLITS
        for prompt in read_prompt_rows(run.tilted, solution, split=split)
    )
    turns = fit_turns(tokenizer, responses, template=reference.template, day=reference.template_date)
    if turns.chat_template is not None:
        log.warning(
            "export: by the chat template of the tokenizer, %d responses would not follow the text they were sampled "
            "after (first: %s); give the trainer that of %s, which is written beside the rows",
            turns.n_otherwise,
            turns.reason,
            TEMPLATE,
        )
    elif turns.prefill:
        log.info("export: answers begin with %r, which the chat template puts before them", turns.prefill)
    if turns.reads_clock:
        log.warning(
            "export: the chat template asks for the date, which was %s where the responses were sampled; a trainer "
            "that renders it on another day has other prompts: write the date into its template",
            reference.template_date,
        )
    return turns


class _Writer:
    """Writes one format of a run."""

    def __init__(
        self,
        run: Run,
        kind: ExportFormat,
        settings: ExportSettings,
        solution: Solution,
        turns: WholeTurns,
        end_of_text: str,
    ) -> None:
        self._run = run
        self._kind = kind
        self._settings = settings
        self._solution = solution
        self._turns = turns
        self._end_of_text = end_of_text
        self._folder = run.folder / "exports" / kind.name
        self._drawn = {key: asdict(settings)[key] for key in kind.drawn_by}

    def write(self, command: Sequence[str]) -> None:
        """Write the folder, unless what stands there was made from the same."""
        started = time.monotonic()
        kind, folder = self._kind, self._folder
        recorded = {"format": kind.name, **self._drawn}
        inputs = {"tilted": read_manifest(self._run.tilted).identity, "turns": content_sha256(asdict(self._turns))}
        begin_step(
            folder, settings=recorded, inputs={}, remedy=f"Go back to these settings, or remove {folder} first."
        )
        if is_complete(folder) and SOLUTION in (found := read_manifest(folder)).files and dict(found.inputs) == inputs:
            log.info("export: %s done before, kept", kind.name)
            return
        if kind.takes_template is None and (self._turns.prefill or self._turns.chat_template is not None):
            log.warning(
                "export: %s renders by templates of its own and cannot be told what the responses were sampled after; "
                "the card says what to compare",
                kind.name,
            )
        reopen(folder)
        self._clear()
        counts = {part.count(split): self._write_rows(part, split) for part in kind.parts for split in SPLITS}
        splits = {part.name: [one for one in SPLITS if counts[part.count(one)]] for part in kind.parts}
        files = self._finish_tables() | self._write_beside(splits)
        reference = self._reference()
        written = _written_command(command, kind.name, self._drawn)
        card = self._render_card(counts, splits, files, inputs=inputs, reference=reference, command=written)
        atomic_write_bytes(folder / CARD, card.encode())
        croissant = describe_hand_off(
            kind,
            name=f"{self._run.name}-{kind.name}",
            description=f"The tilted responses of the run {self._run.name} as {kind.name}, made by {written}.",
            files=files,
            splits=splits,
            date=datetime.now(UTC).date().isoformat(),
        )
        write_json(folder / CROISSANT, croissant)
        finish_step(
            self._run.name,
            folder,
            "export",
            settings=recorded,
            inputs=inputs,
            files=files,
            counts=counts,
            details={
                "command": written,
                "config_sha256": content_sha256(self._run.config.model_dump(mode="json")),
                "reference": reference,
                # What people read of it: no part of the identity, which a date or a command would change.
                "documents": {name: file_sha256(folder / name) for name in (CARD, CROISSANT)},
            },
            started=started,
        )
        rows = ", ".join(f"{count} {name}" for name, count in counts.items())
        log.info("export: %s, rows: %s: %s", kind.name, rows, folder)

    def _clear(self) -> None:
        for name in ("data", "parts", *(part.name for part in self._kind.parts)):
            shutil.rmtree(self._folder / name, ignore_errors=True)
        (self._folder / TEMPLATE).unlink(missing_ok=True)

    def _write_rows(self, part: Part, split: str) -> int:
        prompts = read_prompt_rows(self._run.tilted, self._solution, split=split, prefill=self._turns.prefill)
        rows = (
            row
            for prompt in prompts
            for row in part.build(prompt, self._settings, _prompt_rng(self._settings.seed, prompt.prompt_id))
        )
        if part.lines:
            return _write_lines(self._folder / part.path(split), rows)
        return _write_shards(self._table(part), rows, split=split)

    def _table(self, part: Part) -> ShardedTable:
        metadata = {**self._run.table_metadata(), "format": self._kind.name}
        metadata |= {key: str(value) for key, value in self._drawn.items()}
        return ShardedTable(folder=self._folder, schema=part.schema, metadata=metadata)

    def _finish_tables(self) -> dict[str, str]:
        files: dict[str, str] = {}
        for part in self._kind.parts:
            if part.lines:
                paths = (self._folder / part.path(split) for split in SPLITS)
                files |= {str(path.relative_to(self._folder)): file_sha256(path) for path in paths if path.exists()}
            else:
                files |= self._table(part).finish()
        return files

    def _write_beside(self, splits: Mapping[str, Sequence[str]]) -> dict[str, str]:
        source = HandOff(self._run.name, self._solution, self._run.tilted, splits, self._end_of_text)
        beside = {**self._kind.beside(source), SOLUTION: (self._run.dual / SOLUTION).read_bytes()}
        if self._turns.chat_template is not None:
            beside[TEMPLATE] = self._turns.chat_template.encode()
        for name, content in beside.items():
            atomic_write_bytes(self._folder / name, content)
        return {name: file_sha256(self._folder / name) for name in beside}

    def _reference(self) -> str | None:
        """Identity of the checkpoint that was sampled, where the samples are here."""
        samples = self._run.samples
        return read_manifest(samples).inputs.get("reference") if is_complete(samples) else None

    def _render_card(
        self,
        counts: Mapping[str, int],
        splits: Mapping[str, Sequence[str]],
        files: Mapping[str, str],
        *,
        inputs: Mapping[str, str],
        reference: str | None,
        command: str,
    ) -> str:
        environment = Environment(undefined=StrictUndefined, autoescape=False)  # noqa: S701  # Markdown, not HTML
        environment.filters["code"] = code_markdown
        text = environment.from_string(_CARD_TEMPLATE.read_text(encoding="utf-8")).render(
            kind=self._kind,
            counts=counts,
            splits=splits,
            files=files,
            inputs=inputs,
            run=self._run.name,
            drawn=self._drawn,
            command=command,
            reference=reference,
            solution=self._solution,
            turns=self._turns,
            example=self._example(),
            date=self._run.config.reference.template_date,
        )
        return text + "\n"

    def _example(self) -> dict[str, str] | None:
        for split in SPLITS:
            for rows in read_prompt_rows(self._run.tilted, self._solution, split=split):
                texts = {"prompt": self._turns.first_rendering, "response": rows.completion[0]}
                return {name: shown(text, limit=_EXAMPLE_CHARACTERS) for name, text in texts.items()}
        return None


def _stands(folder: Path, inputs: Mapping[str, str]) -> bool:
    """Whether what is there is complete by itself, which earlier releases did not make it, and made from the same."""
    if not is_complete(folder):
        return False
    found = read_manifest(folder)
    return SOLUTION in found.files and dict(found.inputs) == dict(inputs)


def _written_command(command: Sequence[str], name: str, drawn: Mapping[str, int]) -> str:
    if not command:
        return f"pipeline.formats.writing.write_exports, format {name}"
    options = [f"--{key.replace('_', '-')} {value}" for key, value in drawn.items() if key != "seed"]
    return " ".join([*command, f"--format {name}", *options])


def _write_shards(table: ShardedTable, rows: Iterator[Row], *, split: str) -> int:
    count = 0
    while shard := list(islice(rows, _ROWS_PER_FILE)):
        table.write_shard(pa.Table.from_pylist(shard, schema=table.schema), split=split, order=f"{count:012d}")
        count += len(shard)
    return count


def _write_lines(path: Path, rows: Iterator[Row]) -> int:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    if lines:
        atomic_write_bytes(path, "".join(lines).encode())
    return len(lines)


def _prompt_rng(seed: int, prompt_id: str) -> np.random.Generator:
    return np.random.default_rng([seed, *prompt_id.encode()])
