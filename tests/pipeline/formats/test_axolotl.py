"""Axolotl's formats, by what its prompt strategies do with a row (dpo.chat_template and chat_template of 0.19)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from helpers.hand_offs import read_lines, read_rows
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pipeline.formats.axolotl import build_chosen, build_trained_turns
from pipeline.formats.export_format import ExportSettings
from pipeline.formats.prompt_rows import PromptRows

pytestmark = pytest.mark.slow

PREFILLING = (
    "<bos>{% for message in messages %}{% if message.role == 'assistant' %}<assistant>{{ message.content }}<eos>"
    "{% else %}<user>{{ message.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>[think]\n{% endif %}\n"
)


def cut_out(tokenizer: PreTrainedTokenizerBase, answer: dict[str, str]) -> str:
    """The text of an answer as `dpo.chat_template.default` finds it: rendered after a dummy, from its content on."""
    dummy = {"role": "user", "content": "[[dummy_message]]"}
    text = tokenizer.apply_chat_template([dummy, answer], add_generation_prompt=False, tokenize=False)
    return text[text.find(answer["content"]) :].rstrip()


def prefilled_rows(completions: list[str]) -> PromptRows:
    k = len(completions)
    return PromptRows(
        prompt_id="p",
        prompt=[{"role": "user", "content": "walk"}],
        sample_index=np.arange(k),
        completion=completions,
        weight=np.full(k, 1 / k),
        score=np.zeros(k),
        prefill="[think]\n",
    )


def test_pairs_are_those_of_trl(exported: tuple[Path, pa.Table]) -> None:
    rows = read_lines(exported[0] / "axolotl/preference/train.jsonl")
    for row, pair in zip(rows, read_rows(exported[0] / "trl-preference"), strict=True):
        assert (row["messages"], [row["chosen"]], [row["rejected"]]) == (
            pair["prompt"],
            pair["chosen"],
            pair["rejected"],
        )


def test_a_prefilled_text_comes_once(exported: tuple[Path, pa.Table]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(exported[0].parents[2] / "policy")
    tokenizer.chat_template = PREFILLING
    rows = prefilled_rows(["so so[/think] call", " walk \n"])
    (pair,) = build_chosen(rows, ExportSettings(), np.random.default_rng(0))
    prompt = tokenizer.apply_chat_template(pair["messages"], add_generation_prompt=True, tokenize=False)
    for answer in (pair["chosen"], pair["rejected"]):
        whole = prompt + cut_out(tokenizer, answer)
        assert whole in {f"<bos><user>walk<assistant>[think]\n{text}<eos>" for text in rows.completion}
    # Whole conversations are rendered without the generation prompt: there the answers have it.
    for line in build_trained_turns(rows, ExportSettings(lines_per_prompt=4), np.random.default_rng(0)):
        assert line["messages"][-1]["content"].startswith("[think]\n")


def test_an_empty_answer_would_be_the_whole_conversation_and_is_left_out(exported: tuple[Path, pa.Table]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(exported[0].parents[2] / "policy")
    assert cut_out(tokenizer, {"role": "assistant", "content": ""}).startswith("<bos><user>[[dummy_message]]")
    rows = prefilled_rows(["", "call", "walk"])
    pairs = list(build_chosen(rows, ExportSettings(), np.random.default_rng(0)))
    assert [{pair["chosen"]["content"], pair["rejected"]["content"]} for pair in pairs] == [{"call", "walk"}]


def test_the_last_message_alone_is_learnt(exported: tuple[Path, pa.Table]) -> None:
    rows = read_lines(exported[0] / "axolotl/sft/train.jsonl")
    assert any(len(row["messages"]) > 2 for row in rows)
    for row in rows:
        assert [turn["training"] for turn in row["messages"]] == [False] * (len(row["messages"]) - 1) + [True]
