"""The exports against the tilt they were made from, and against the trainers they are made for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_dataset
from helpers.solutions import bound, build_solution
from helpers.tabular_policies import TabularWorld, build_tabular_world, minimise, total_variation
from helpers.tiny_models import save_tiny_policy
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import apply_chat_template

from pipeline.cli import main
from pipeline.config.loading import build_config
from pipeline.contracts.artifacts import Manifest, file_sha256, write_json, write_manifest
from pipeline.contracts.errors import InputError, StaleArtifactError
from pipeline.contracts.shards import write_table
from pipeline.contracts.tables import prompt_id, tilted_schema
from pipeline.formats import (
    FORMATS,
    ExportSettings,
    PromptRows,
    build_preferences,
    build_unpaired,
    draw_pairs,
    write_exports,
)
from pipeline.run.run import Run
from stage1_dual.sampling.rendering import render_prompts

pytestmark = pytest.mark.slow

BETA, MULTIPLIER, THRESHOLD = 0.5, 0.7, 0.2
SETTINGS = ExportSettings(seed=3, pairs_per_prompt=20, lines_per_prompt=40)
N_TRAIN, N_TEST, N_SAMPLES = 12, 3, 16


def write_tilted(
    run: Run, *, seed: int = 0, completions: Sequence[str] | None = None, multi_turn: bool = True
) -> pa.Table:
    """A finished hand-off table of random scores with its dual."""
    texts = completions or [f"call a friend {k}" for k in range(12)]
    rng = np.random.default_rng(seed)
    rows = []
    for place in range(N_TRAIN + N_TEST):
        messages = [{"role": "user", "content": f"walk {place}"}]
        if multi_turn and place % 3 == 0:
            messages = [*messages, {"role": "assistant", "content": "rest"}, {"role": "user", "content": "and then?"}]
        reward, harm = rng.normal(size=N_SAMPLES), rng.normal(size=N_SAMPLES)
        odds = np.exp((reward - MULTIPLIER * (harm - THRESHOLD)) / BETA)
        rows += [
            {
                "prompt_id": prompt_id(messages),
                "sample_index": k,
                "prompt": messages,
                "completion": texts[k % len(texts)],
                "reward": reward[k],
                "constraint_harm": harm[k],
                "weight": odds[k] / odds.sum(),
                "split": "train" if place < N_TRAIN else "test",
                "category": "",
            }
            for k in range(N_SAMPLES)
        ]
    table = pa.Table.from_pylist(rows, schema=tilted_schema(["harm"]))
    solution = build_solution(bound("harm", "<=", threshold=THRESHOLD, multiplier=MULTIPLIER), beta=BETA)
    write_json(run.folder / "dual" / "dual.json", solution.to_document())
    shutil.rmtree(run.folder / "tilted", ignore_errors=True)
    files = write_table(run.folder / "tilted", table, metadata={})
    write_manifest(run.folder / "tilted", Manifest(step="export", run=run.name, settings={}, inputs={}, files=files))
    return table


def make_run(folder: Path, **reference: str) -> Run:
    """A run whose reference is in ``folder``; only its tokenizer is read."""
    if not (folder / "policy").exists():
        save_tiny_policy(folder / "policy", bos="template")
    tree = {
        "beta": BETA,
        "reference": {"model": str(folder / "policy"), **reference},
        "scorers": {name: {"model": "embedded:helpful"} for name in ("helpful", "harm")},
        "reward": "helpful",
        "constraints": {"harm": {"direction": "<=", "threshold": THRESHOLD}},
    }
    return Run(build_config(tree, source="the test"), "mine", folder, show_progress=False)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_run(tmp_path)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pa.Table]:
    run = make_run(tmp_path_factory.mktemp("data"))
    table = write_tilted(run)
    write_exports(run, list(FORMATS), SETTINGS)
    return run.folder / "exports", table


def read_rows(folder: Path, split: str = "train") -> list[dict]:
    return pq.read_table(next((folder / "data").glob(f"{split}-*.parquet"))).to_pylist()


@pytest.mark.parametrize("n_responses", [16, 7, 2, 1])
def test_pairs_are_distinct_and_any_first_ones_even(n_responses: int) -> None:
    pairs = list(draw_pairs(n_responses, np.random.default_rng(0)))

    assert len({frozenset(pair) for pair in pairs}) == len(pairs) == n_responses * (n_responses - 1) // 2
    for count in range(1, len(pairs) + 1):
        met = np.bincount(np.array(pairs[:count]).reshape(-1), minlength=n_responses)
        assert met.max() - met.min() <= 1 + n_responses % 2


@pytest.mark.parametrize("name", FORMATS)
def test_datasets_reads_every_format(name: str, exported: tuple[Path, pa.Table]) -> None:
    folder = exported[0] / name
    dataset = load_dataset(str(folder), cache_dir=str(folder.parent / "cache"))
    manifest = json.loads((folder / "manifest.json").read_text())

    assert {split: dataset[split].num_rows for split in dataset} == manifest["counts"]
    assert min(manifest["counts"].values()) > 0
    assert "optimum" in (folder / "README.md").read_text()
    assert ("seed" in manifest["settings"]) == (name != "weighted-sft")


def test_labels_follow_bradley_terry_in_nats(exported: tuple[Path, pa.Table]) -> None:
    folder, tilted = exported
    weight = {(row["prompt_id"], row["sample_index"]): row["weight"] for row in tilted.to_pylist()}
    rows = read_rows(folder / "trl-preference")
    for row in rows:
        odds = weight[row["prompt_id"], row["chosen_index"]] / weight[row["prompt_id"], row["rejected_index"]]
        assert row["chosen_score"] - row["rejected_score"] == pytest.approx(np.log(odds), abs=1e-9)
        assert row["label_probability"] == pytest.approx(odds / (1 + odds), abs=1e-9)
        assert row["chosen"] != row["rejected"]

    # The better of a pair is chosen as often as the probabilities say.
    better = np.array([max(row["label_probability"], 1 - row["label_probability"]) for row in rows])
    won = np.array([row["label_probability"] > 0.5 for row in rows])
    assert len(rows) == N_TRAIN * SETTINGS.pairs_per_prompt
    assert abs(won.sum() - better.sum()) < 4 * np.sqrt(np.sum(better * (1 - better)))
    assert 0 < won.sum() < len(won)


def test_unpaired_labels_tell_the_tilted_policy_from_the_reference(exported: tuple[Path, pa.Table]) -> None:
    folder, tilted = exported
    ratio = {(row["prompt_id"], row["sample_index"]): N_SAMPLES * row["weight"] for row in tilted.to_pylist()}
    rows = read_rows(folder / "trl-unpaired")
    probability = np.array([ratio[row["prompt_id"], row["sample_index"]] for row in rows])
    probability = probability / (1 + probability)
    label = np.array([row["label"] for row in rows])

    np.testing.assert_allclose(
        [row["label_probability"] for row in rows], np.where(label, probability, 1 - probability)
    )
    assert abs(label.sum() - probability.sum()) < 4 * np.sqrt(np.sum(probability * (1 - probability)))


def test_weighted_rows_give_the_tilted_means(exported: tuple[Path, pa.Table]) -> None:
    folder, tilted = exported
    reward = {(row["prompt_id"], row["sample_index"]): row["reward"] for row in tilted.to_pylist()}
    rows = read_rows(folder / "weighted-sft")
    mean = sum(row["weight"] * reward[row["prompt_id"], row["sample_index"]] for row in rows) / N_TRAIN
    train = tilted.filter(pa.compute.equal(tilted["split"], "train"))

    assert mean == pytest.approx(np.sum(train["weight"].to_numpy() * train["reward"].to_numpy()) / N_TRAIN)
    assert all(row["messages"][-1]["role"] == "assistant" for row in rows)


def test_resampled_lines_come_as_often_as_the_weights_say(exported: tuple[Path, pa.Table]) -> None:
    folder, tilted = exported
    lines = [json.loads(line) for line in (folder / "openai-jsonl" / "data" / "train.jsonl").read_text().splitlines()]
    expected: dict[tuple[str, str], float] = {}
    for row in tilted.to_pylist():
        if row["split"] == "train":
            key = (json.dumps([turn["content"] for turn in row["prompt"]]), row["completion"])
            expected[key] = expected.get(key, 0.0) + SETTINGS.lines_per_prompt * row["weight"]
    found = dict.fromkeys(expected, 0)
    for line in lines:
        *prompt, answer = line["messages"]
        found[json.dumps([turn["content"] for turn in prompt]), answer["content"]] += 1
        assert all(turn.get("weight") == (0 if turn["role"] == "assistant" else None) for turn in prompt)
        assert answer.keys() == {"role", "content"}

    assert len(lines) == N_TRAIN * SETTINGS.lines_per_prompt
    # Systematic resampling: each response within one of its expectation; two responses may share their text.
    assert max(abs(found[key] - count) for key, count in expected.items()) < 2


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


def tabular_rows(world: TabularWorld) -> list[PromptRows]:
    return [
        PromptRows(
            prompt_id=f"p{prompt}",
            prompt=[],
            sample_index=np.arange(len(score)),
            completion=[f"y{place}" for place in range(len(score))],
            weight=torch.softmax(score, 0).numpy(),
            score=score.numpy(),
        )
        for prompt, score in enumerate(world.score)
    ]


@pytest.mark.parametrize("dpo_beta", [1.0, 0.5])
def test_dpo_at_beta_one_has_the_tilted_policy_as_its_optimum(dpo_beta: float) -> None:
    world = build_tabular_world(n_prompts=3, n_responses=30, seed=0)
    settings = ExportSettings(pairs_per_prompt=10_000)
    rows = [
        (prompt, row)
        for prompt, responses in enumerate(tabular_rows(world))
        for row in build_preferences(responses, settings, np.random.default_rng(prompt))
    ]
    chosen, rejected = (
        torch.tensor([30 * prompt + row[f"{side}_index"] for prompt, row in rows]) for side in ("chosen", "rejected")
    )
    # The mean over the draws of a label: it would have been the other one with the complementary probability.
    probability = torch.tensor([row["label_probability"] for _, row in rows], dtype=torch.float64)

    def loss(table: torch.Tensor) -> torch.Tensor:
        log_ratio = (table - world.ref_logp).flatten()
        delta = dpo_beta * (log_ratio[chosen] - log_ratio[rejected])
        return functional.binary_cross_entropy_with_logits(delta, probability, reduction="sum")

    policy = minimise(loss, world.ref_logp)
    assert total_variation(policy, torch.softmax(world.ref_logp + world.score / dpo_beta, dim=1)) < 1e-3
    assert (total_variation(policy, world.tilted) < 1e-3) == (dpo_beta == 1.0)


def test_the_logistic_loss_of_unpaired_labels_has_the_tilted_policy_as_its_optimum() -> None:
    world = build_tabular_world(n_prompts=3, n_responses=30, seed=0)
    uniform = torch.full_like(world.score, -np.log(30))  # so that each response stands for as many draws
    world = TabularWorld(ref_logp=uniform, score=world.score)
    rows = [
        row
        for prompt, responses in enumerate(tabular_rows(world))
        for row in build_unpaired(responses, ExportSettings(), np.random.default_rng(prompt))
    ]
    probability = torch.tensor(
        [row["label_probability"] if row["label"] else 1 - row["label_probability"] for row in rows],
        dtype=torch.float64,
    )

    def loss(table: torch.Tensor) -> torch.Tensor:
        return functional.binary_cross_entropy_with_logits(
            (table - world.ref_logp).flatten(), probability, reduction="sum"
        )

    assert total_variation(minimise(loss, world.ref_logp), world.tilted) < 1e-3


def test_dpo_trainer_of_trl_learns_from_the_preferences(exported: tuple[Path, pa.Table], tmp_path: Path) -> None:
    from trl import DPOConfig, DPOTrainer

    reference = save_tiny_policy(tmp_path / "reference", bos="template")
    config = DPOConfig(
        output_dir=str(tmp_path / "out"),
        beta=1.0,
        learning_rate=2e-4,
        max_steps=30,
        per_device_train_batch_size=64,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=0,
    )
    dataset = load_dataset(str(exported[0] / "trl-preference"), split="train", cache_dir=str(tmp_path / "cache"))
    torch.set_num_threads(1)
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32),
        args=config,
        train_dataset=dataset,
        processing_class=AutoTokenizer.from_pretrained(reference),
    )
    trainer.train()

    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(np.log(2), abs=1e-3)
    assert np.mean(losses[-5:]) < losses[0] - 0.03
