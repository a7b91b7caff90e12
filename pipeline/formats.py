"""The same tilt in the formats of other trainers, for people who train elsewhere.

Every format is a function of the hand-off table, so its rows carry what stage 1 found: with s = (r + <lam*, g - b>) /
beta the score of a response in nats, the tilted policy is proportional to pi_ref exp(s). Its answers are messages, and
every one is rendered as a trainer would: what the reference's chat template puts before an answer is kept.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
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
)
from pipeline.contracts.errors import InputError
from pipeline.contracts.markdown import code_markdown
from pipeline.contracts.shards import ShardedTable, read_parquet
from pipeline.contracts.solution import Solution, read_solution
from pipeline.contracts.tables import PROMPTS, SAMPLE_KEY, SPLITS
from pipeline.run.run import Run
from pipeline.run.step import finish_step, log, reopen
from stage1_dual.sampling.rendering import load_tokenizer
from stage1_dual.sampling.whole_turns import WholeTurns, fit_turns

_TEMPLATE = "chat_template.jinja"
_CARD = Path(__file__).parent / "export_card.md.jinja"
_ROWS_PER_FILE = 200_000
_MESSAGES = PROMPTS.field("prompt").type


@dataclass(frozen=True)
class ExportSettings:
    """What of the export is drawn, and how much.

    Attributes:
        seed: of pairs, labels and resampled lines. The draws of a prompt depend on this and its id alone.
        pairs_per_prompt: pairs of responses; a prompt that has fewer gives all it has.
        lines_per_prompt: resampled lines.
    """

    seed: int = 0
    pairs_per_prompt: int = 64
    lines_per_prompt: int = 64


@dataclass(frozen=True)
class PromptRows:
    """The responses to one prompt.

    Attributes:
        prompt_id: of the prompt.
        prompt: its messages.
        sample_index: of each response, shape (k,).
        completion: text of each response.
        weight: tilted weight, sums to 1, shape (k,).
        score: s, nats, shape (k,).
    """

    prompt_id: str
    prompt: Sequence[Mapping[str, str]]
    sample_index: np.ndarray
    completion: Sequence[str]
    weight: np.ndarray
    score: np.ndarray


Row = dict[str, Any]


def build_preferences(rows: PromptRows, settings: ExportSettings, rng: np.random.Generator) -> Iterator[Row]:
    """Pairs of responses with a drawn label: i is chosen over j with probability sigmoid(s_i - s_j).

    No pair comes twice, and responses come as evenly as their texts differ: a pair of equal texts says nothing and is
    not drawn. The minimiser of the logistic loss of beta_dpo (log rho_i - log rho_j) to labels of that probability is
    log rho = s / beta_dpo + constant: the tilted policy at beta_dpo = 1, whatever the dual's beta, since s is in nats.
    """
    texts = rows.completion
    pairs = (pair for pair in draw_pairs(len(texts), rng) if texts[pair[0]] != texts[pair[1]])
    for first, second in islice(pairs, settings.pairs_per_prompt):
        probability = _sigmoid(rows.score[first] - rows.score[second])
        wins = rng.random() < probability
        chosen, rejected = (first, second) if wins else (second, first)
        yield {
            "prompt": rows.prompt,
            "chosen": _answer(texts[chosen]),
            "rejected": _answer(texts[rejected]),
            "label_probability": probability if wins else 1.0 - probability,
            "chosen_score": rows.score[chosen],
            "rejected_score": rows.score[rejected],
            "prompt_id": rows.prompt_id,
            "chosen_index": rows.sample_index[chosen],
            "rejected_index": rows.sample_index[rejected],
        }


def build_unpaired(
    rows: PromptRows,
    settings: ExportSettings,  # noqa: ARG001  # the signature of a format
    rng: np.random.Generator,
) -> Iterator[Row]:
    """Every response with a drawn label: true with probability K w / (1 + K w).

    That is the posterior probability that a response comes from the tilted policy and not from the reference, before
    which both are equally likely: K w estimates pi_lambda / pi_ref. The minimiser of the logistic loss of
    log rho = log pi_theta - log pi_ref to labels of that probability is log rho = log K w, the tilted policy.
    """
    probability = _sigmoid(_log_ratio(rows))
    labels = rng.random(len(probability)) < probability
    for place, text in enumerate(rows.completion):
        yield {
            "prompt": rows.prompt,
            "completion": _answer(text),
            "label": bool(labels[place]),
            "label_probability": probability[place] if labels[place] else 1.0 - probability[place],
            "log_ratio": _log_ratio(rows)[place],
            "prompt_id": rows.prompt_id,
            "sample_index": rows.sample_index[place],
        }


def build_weighted(
    rows: PromptRows,
    settings: ExportSettings,  # noqa: ARG001  # the signature of a format
    rng: np.random.Generator,  # noqa: ARG001  # the signature of a format
) -> Iterator[Row]:
    """Every response with its tilted weight; nothing is drawn."""
    for place, text in enumerate(rows.completion):
        yield {
            "messages": [*rows.prompt, *_answer(text)],
            "weight": rows.weight[place],
            "prompt_id": rows.prompt_id,
            "sample_index": rows.sample_index[place],
        }


def build_chat_lines(rows: PromptRows, settings: ExportSettings, rng: np.random.Generator) -> Iterator[Row]:
    """Responses resampled by weight, systematically: a response of weight w comes n w times, rounded up or down.

    Assistant turns of the prompt get the weight 0, so that only the response is learnt.
    """
    n_lines = settings.lines_per_prompt
    places = np.searchsorted(np.cumsum(rows.weight), (rng.random() + np.arange(n_lines)) / n_lines)
    prompt = [{**turn, "weight": 0} if turn["role"] == "assistant" else turn for turn in rows.prompt]
    for place in np.minimum(places, len(rows.weight) - 1):
        yield {"messages": [*prompt, *_answer(rows.completion[place])]}


@dataclass(frozen=True)
class ExportFormat:
    """One format.

    Attributes:
        build: rows of a prompt.
        schema: of the Parquet table, or None for JSON Lines.
        drawn_by: names of the settings that it reads.
        optimum: what a policy trained on it comes to, for the card.
    """

    build: Callable[[PromptRows, ExportSettings, np.random.Generator], Iterator[Row]]
    schema: pa.Schema | None
    drawn_by: tuple[str, ...]
    optimum: str


_KEY = [pa.field("prompt_id", pa.string(), nullable=False), pa.field("sample_index", pa.int32(), nullable=False)]

FORMATS: dict[str, ExportFormat] = {
    "trl-preference": ExportFormat(
        build_preferences,
        pa.schema(
            [
                *(pa.field(name, _MESSAGES, nullable=False) for name in ("prompt", "chosen", "rejected")),
                *(
                    pa.field(name, pa.float64(), nullable=False)
                    for name in ("label_probability", "chosen_score", "rejected_score")
                ),
                pa.field("prompt_id", pa.string(), nullable=False),
                *(pa.field(name, pa.int32(), nullable=False) for name in ("chosen_index", "rejected_index")),
            ]
        ),
        ("seed", "pairs_per_prompt"),
        "Of each pair, `chosen` was drawn with the Bradley-Terry probability of the scores in nats. DPO with "
        "`loss_type=sigmoid` and **`beta=1.0`** has the tilted policy as its optimum, whatever beta the dual was "
        "solved with: that one is in the scores already. Another `beta` gives the tilt divided by it.",
    ),
    "trl-unpaired": ExportFormat(
        build_unpaired,
        pa.schema(
            [
                *(pa.field(name, _MESSAGES, nullable=False) for name in ("prompt", "completion")),
                pa.field("label", pa.bool_(), nullable=False),
                *(pa.field(name, pa.float64(), nullable=False) for name in ("label_probability", "log_ratio")),
                *_KEY,
            ]
        ),
        ("seed",),
        "`label` is true with probability K w / (1 + K w), the posterior probability that the response comes from the "
        "tilted policy and not from the reference. The logistic loss of log(pi/pi_ref) to these labels, beta 1 and no "
        "shift, has the tilted policy as its optimum. BCO is this loss with a running shift; KTO's loss is no proper "
        "scoring rule, and its optimum is not the tilted policy whatever the labels.",
    ),
    "weighted-sft": ExportFormat(
        build_weighted,
        pa.schema(
            [
                pa.field("messages", _MESSAGES, nullable=False),
                pa.field("weight", pa.float64(), nullable=False),
                *_KEY,
            ]
        ),
        (),
        "`weight` sums to 1 over the responses to a prompt. Likelihood of the last message times `weight` has the "
        "reweighted responses as its optimum, which estimate the tilted policy with an error of one over the root of "
        "their number. A trainer that does not read `weight` learns the reference: use `openai-jsonl` there.",
    ),
    "openai-jsonl": ExportFormat(
        build_chat_lines,
        None,
        ("seed", "lines_per_prompt"),
        "Responses were resampled by their tilted weight, so a trainer needs no weights: plain likelihood of the last "
        "message has the resampled responses as its optimum, which estimate the tilted policy.",
    ),
}


def write_exports(run: Run, formats: Sequence[str], settings: ExportSettings) -> None:
    """Write ``exports/<format>/`` of a run whose tilted table is there; a format that still stands is kept.

    Args:
        run: the run.
        formats: names in :data:`FORMATS`.
        settings: of what is drawn.

    Raises:
        InputError: a count below one, or the reference's tokenizer is not here.
        MissingExtraError: transformers is not installed, by whose tokenizer the answers are rendered.
        CorruptArtifactError: the tilted table is missing or damaged.
        StaleArtifactError: a format was exported with other settings.
    """
    for name in ("pairs_per_prompt", "lines_per_prompt"):
        if getattr(settings, name) < 1:
            raise InputError(f"`{name}` is {getattr(settings, name)}; it must be at least 1")
    with run_lock(run.folder):
        solution = read_solution(run.folder / "dual" / "dual.json")
        turns = _fit_turns(run, solution)
        for name in dict.fromkeys(formats):
            _write_export(run, name, settings, solution=solution, turns=turns)


def _fit_turns(run: Run, solution: Solution) -> WholeTurns:
    reference = run.config.reference
    tokenizer = load_tokenizer(run.model(reference, "reference"))
    responses = (
        (prompt.prompt, prompt.completion)
        for split in SPLITS
        for prompt in read_prompt_rows(run.folder / "tilted", solution, split=split)
    )
    turns = fit_turns(tokenizer, responses, template=reference.template, day=reference.template_date)
    if turns.chat_template is not None:
        log.warning(
            "export: by the chat template of the tokenizer, %d responses would not follow the text they were sampled "
            "after (first: %s); give the trainer that of %s, which is written beside the rows",
            turns.n_otherwise,
            turns.reason,
            _TEMPLATE,
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


def _write_export(run: Run, name: str, settings: ExportSettings, *, solution: Solution, turns: WholeTurns) -> None:
    started = time.monotonic()
    kind, tilted, folder = FORMATS[name], run.folder / "tilted", run.folder / "exports" / name
    recorded = {"format": name, **{key: asdict(settings)[key] for key in kind.drawn_by}}
    inputs = {"tilted": read_manifest(tilted).identity, "turns": content_sha256(asdict(turns))}
    begin_step(folder, settings=recorded, inputs={}, remedy=f"Go back to these settings, or remove {folder} first.")
    if is_complete(folder) and dict(read_manifest(folder).inputs) == inputs:
        log.info("export: %s done before, kept", name)
        return
    reopen(folder)
    for unfinished in ("data", "parts"):
        shutil.rmtree(folder / unfinished, ignore_errors=True)
    (folder / _TEMPLATE).unlink(missing_ok=True)
    metadata = {**run.table_metadata(), **{key: str(value) for key, value in recorded.items()}}
    counts: dict[str, int] = {}
    for split in SPLITS:
        rows = (
            row
            for prompt in read_prompt_rows(tilted, solution, split=split, prefill=turns.prefill)
            for row in kind.build(prompt, settings, _prompt_rng(settings.seed, prompt.prompt_id))
        )
        counts[split] = (
            _write_lines(folder / "data" / f"{split}.jsonl", rows)
            if kind.schema is None
            else _write_shards(ShardedTable(folder=folder, schema=kind.schema, metadata=metadata), rows, split=split)
        )
    files = (
        {f"data/{path.name}": file_sha256(path) for path in sorted(folder.glob("data/*.jsonl"))}
        if kind.schema is None
        else ShardedTable(folder=folder, schema=kind.schema, metadata=metadata).finish()
    )
    environment = Environment(undefined=StrictUndefined, autoescape=False)  # noqa: S701  # Markdown, not HTML
    environment.filters["code"] = code_markdown
    card = environment.from_string(_CARD.read_text(encoding="utf-8")).render(
        name=name,
        kind=kind,
        counts=counts,
        run=run.name,
        settings=recorded,
        inputs=inputs,
        beta=solution.beta,
        turns=turns,
        date=run.config.reference.template_date,
    )
    if turns.chat_template is not None:
        atomic_write_bytes(folder / _TEMPLATE, turns.chat_template.encode())
        files[_TEMPLATE] = file_sha256(folder / _TEMPLATE)
    atomic_write_bytes(folder / "README.md", card.encode())
    finish_step(
        run.name, folder, "export", settings=recorded, inputs=inputs, files=files, counts=counts, started=started
    )
    log.info("export: %s, %d train and %d test rows: %s", name, counts["train"], counts["test"], folder)


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


def read_prompt_rows(tilted: Path, solution: Solution, *, split: str, prefill: str = "") -> Iterator[PromptRows]:
    """The prompts of a split of the hand-off table, in the order of their ids.

    Args:
        tilted: folder of the hand-off table.
        solution: it was made with.
        split: ``train`` or ``test``.
        prefill: what every completion is to begin with.
    """
    paths = sorted(tilted.glob(f"data/{split}-*.parquet"))
    if not paths:
        return
    table = pa.concat_tables([read_parquet(path, schema=solution.tilted_schema) for path in paths])
    if table.num_rows == 0:
        return
    table = table.sort_by([(name, "ascending") for name in SAMPLE_KEY])
    prompt_id = table["prompt_id"].to_numpy(zero_copy_only=False)
    score = solution.tilt(table) / solution.beta
    first = np.flatnonzero(np.append(True, prompt_id[1:] != prompt_id[:-1]))
    for start, end in zip(first, [*first[1:], len(prompt_id)], strict=True):
        rows = table.slice(start, end - start)
        yield PromptRows(
            prompt_id=str(prompt_id[start]),
            prompt=rows["prompt"][0].as_py(),
            sample_index=rows["sample_index"].to_numpy(),
            completion=[prefill + text for text in rows["completion"].to_pylist()],
            weight=rows["weight"].to_numpy(),
            score=score[start:end],
        )


def draw_pairs(n_responses: int, rng: np.random.Generator) -> Iterator[tuple[int, int]]:
    """All pairs of different responses, each once, in the order of a drawn tournament.

    In each round every response meets one other (one rests where their number is odd), so that any first pairs hold
    all responses equally often, to two.

    Args:
        n_responses: how many responses there are.
        rng: of the draw.
    """
    order = rng.permutation(n_responses)
    places = n_responses + n_responses % 2
    for turn in range(places - 1):
        meetings = [
            (places - 1, turn),
            *(((turn + step) % (places - 1), (turn - step) % (places - 1)) for step in range(1, places // 2)),
        ]
        for first, second in meetings:
            if max(first, second) < n_responses:
                yield int(order[first]), int(order[second])


def _log_ratio(rows: PromptRows) -> np.ndarray:
    """Log K w = s - log mean exp s, from the scores: weights may be too small for a float."""
    shifted = rows.score - rows.score.max()
    return np.asarray(shifted - np.log(np.mean(np.exp(shifted))))


def _sigmoid(value: Any) -> Any:
    return 0.5 * (1.0 + np.tanh(0.5 * value))


def _answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def _prompt_rng(seed: int, prompt_id: str) -> np.random.Generator:
    return np.random.default_rng([seed, *prompt_id.encode()])
