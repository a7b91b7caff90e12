"""Hand-offs: each complete by itself, and the answers where a trainer reads them."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest
from datasets import load_dataset
from helpers.hand_offs import BETA, MULTIPLIER, SETTINGS, make_run, read_rows, write_tilted
from transformers import AutoTokenizer
from trl import apply_chat_template

from pipeline.cli import main
from pipeline.contracts.artifacts import file_sha256
from pipeline.contracts.errors import InputError, StaleArtifactError
from pipeline.formats.all_formats import FORMATS
from pipeline.formats.export_format import ExportSettings
from pipeline.formats.writing import write_exports
from pipeline.run.run import Run
from stage1_dual.sampling.rendering import render_prompts

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", FORMATS)
def test_datasets_reads_every_format(name: str, exported: tuple[Path, pa.Table]) -> None:
    folder = exported[0] / name
    manifest = json.loads((folder / "manifest.json").read_text())
    counts = {}
    for part in FORMATS[name].parts:
        config = "default" if part.name == "data" else part.name
        dataset = load_dataset(str(folder), config, cache_dir=str(folder.parent / "cache"))
        counts |= {part.count(split): dataset[split].num_rows for split in dataset}

    assert counts == manifest["counts"]
    assert min(counts.values()) > 0
    assert ("seed" in manifest["settings"]) == bool(FORMATS[name].drawn_by)


def test_what_stands_is_kept_and_what_differs_is_not_mixed(run: Run) -> None:
    write_tilted(run)
    write_exports(run, ["trl-preference"], SETTINGS)
    path = next((run.folder / "exports/trl-preference/data").glob("train-*"))
    first, changed = file_sha256(path), path.stat().st_mtime_ns
    write_exports(run, ["trl-preference"], SETTINGS)
    assert path.stat().st_mtime_ns == changed

    with pytest.raises(StaleArtifactError, match=r"pairs_per_prompt: 20 then, 5 now\n.* or remove .*trl-preference"):
        write_exports(run, ["trl-preference"], ExportSettings(seed=3, pairs_per_prompt=5))
    write_tilted(run, seed=1)
    write_exports(run, ["trl-preference"], SETTINGS)
    assert file_sha256(path) != first
    write_tilted(run)
    write_exports(run, ["trl-preference"], SETTINGS)
    assert file_sha256(path) == first


def test_the_documentation_says_what_the_cards_say(exported: tuple[Path, pa.Table]) -> None:
    page = (Path(__file__).parents[3] / "docs" / "handoff.md").read_text()
    for name, kind in FORMATS.items():
        assert f"### {name}\n\n{kind.usage}" in page
        assert kind.usage in (exported[0] / name / "README.md").read_text()


@pytest.mark.parametrize("name", FORMATS)
def test_a_folder_is_complete_by_itself(name: str, exported: tuple[Path, pa.Table]) -> None:
    folder = exported[0] / name
    manifest = json.loads((folder / "manifest.json").read_text())
    dual = exported[0].parent / "dual" / "dual.json"
    assert (folder / "dual.json").read_bytes() == dual.read_bytes()
    card = (folder / "README.md").read_text()
    for told in (
        f"| β | {BETA} reward per nat |",
        f"{MULTIPLIER} reward per score unit",
        manifest["details"]["command"],
    ):
        assert told in card
    assert manifest["details"]["command"].startswith(f"dualign export --config mine.yaml --format {name}")
    assert manifest["details"]["reference"] == "0" * 64
    assert manifest["inputs"]["tilted"] in card
    assert "As the reference read the first prompt" in card
    assert r"\u003cbos\u003e\u003cuser\u003ewalk" in card


THINKING = (
    "<bos>{% for message in messages %}{% if message.role == 'assistant' %}<assistant>{{ CONTENT }}<eos>"
    "{% else %}<user>{{ message.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>[think]\n{% endif %}\n"
)
"""Prefills the answer. What it makes of an assistant's message is to be filled in."""
VERBATIM = "message.content"
"""As most templates write a message."""
CUT = "message.content.split('[/think]')[-1] | trim"
"""As templates of reasoning models write a message: without its reasoning."""
ROLES = (
    "<bos>{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)

TEMPLATES: dict[str, tuple[str | None, str | None, str]] = {
    # of the tokenizer, of the recipe, what is said of them
    "prefilled": (THINKING.replace("CONTENT", VERBATIM), None, '"[think]\\n"'),
    "prefilled and cut": (THINKING.replace("CONTENT", CUT), None, "Give the trainer the chat template"),
    "of the recipe": (None, "USER: {prompt}\nASSISTANT: ", "Give the trainer the chat template"),
    "without the BOS": (THINKING.removeprefix("<bos>"), None, "Give the trainer the chat template"),
    "verbatim": (ROLES, None, "every response follows the text"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_trainer_reads_the_answers_after_what_they_were_sampled_after(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    of_tokenizer, of_recipe, said = TEMPLATES[name]
    run = make_run(tmp_path, **({} if of_recipe is None else {"template": of_recipe}))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "policy")
    if of_tokenizer is not None:
        tokenizer.chat_template = of_tokenizer
        tokenizer.save_pretrained(tmp_path / "policy")
    multi_turn = of_recipe is None
    completions = ["so so[/think] call a friend", " walk \n", "{{ rest }} <b>"]
    write_tilted(run, completions=completions, multi_turn=multi_turn)
    write_exports(run, list(FORMATS), SETTINGS)

    for format_name in FORMATS:
        folder = run.folder / "exports" / format_name
        assert said in (folder / "README.md").read_text()
        if (folder / "chat_template.jinja").exists():
            tokenizer.chat_template = (folder / "chat_template.jinja").read_text()
            assert "chat_template.jinja" in json.loads((folder / "manifest.json").read_text())["files"]
        else:
            assert "Give the trainer" not in said
    rendered = render_prompts(
        AutoTokenizer.from_pretrained(tmp_path / "policy"),
        [(row["prompt_id"], row["prompt"]) for row in read_rows(run.folder / "tilted")],
        template=of_recipe,
        max_new_tokens=1,
        max_positions=10_000,
    )[0]
    prompt_of = {prompt.prompt_id: prompt.token_ids.tolist() for prompt in rendered}
    for row in read_rows(run.folder / "exports" / "trl-preference"):
        # As the trainers of TRL make texts of messages, and tokens of texts.
        texts = apply_chat_template({key: row[key] for key in ("prompt", "chosen", "rejected")}, tokenizer)
        assert tokenizer(texts["prompt"], add_special_tokens=False)["input_ids"] == prompt_of[row["prompt_id"]]
        for answer in (texts["chosen"], texts["rejected"]):
            text = answer.removesuffix("<eos>").removesuffix("\n" if name == "verbatim" else "")
            assert text in completions


def test_what_an_answer_begins_with_is_that_of_a_trainer(run: Run) -> None:
    write_tilted(run)
    write_exports(run, ["openai-jsonl"], SETTINGS)
    tokenizer = AutoTokenizer.from_pretrained(run.data_dir / "policy")
    tokenizer.chat_template = THINKING.replace("CONTENT", VERBATIM)
    tokenizer.save_pretrained(run.data_dir / "policy")
    write_exports(run, ["openai-jsonl"], SETTINGS)  # the rows of the other template do not stand
    lines = (run.folder / "exports/openai-jsonl/data/train.jsonl").read_text().splitlines()
    assert all(json.loads(line)["messages"][-1]["content"].startswith("[think]\ncall a friend") for line in lines)


def test_a_template_that_reads_the_clock_is_told_of(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    run = make_run(run.data_dir, template_date="2026-01-31")
    tokenizer = AutoTokenizer.from_pretrained(run.data_dir / "policy")
    tokenizer.chat_template = tokenizer.chat_template.replace("<user>", "{{ strftime_now('%d %b %Y') }}<user>")
    tokenizer.save_pretrained(run.data_dir / "policy")
    write_tilted(run)
    with caplog.at_level("WARNING", logger="dualign"):
        write_exports(run, ["weighted-sft"], SETTINGS)
    assert "which was 2026-01-31 where the responses were sampled" in caplog.text
    assert "which was 2026-01-31 where" in (run.folder / "exports/weighted-sft/README.md").read_text()


def test_bad_counts_and_formats_are_named(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="`pairs_per_prompt` is 0; it must be at least 1"):
        write_exports(run, ["trl-preference"], ExportSettings(pairs_per_prompt=0))
    with pytest.raises(SystemExit):
        main(["export", "--format", "trl-preferences"])
    assert "invalid choice: 'trl-preferences'" in capsys.readouterr().err
