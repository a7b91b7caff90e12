"""Hand-offs read by the readers of the trainers they are made for.

    python benchmarks/read_back.py FOLDER [--reference CHECKPOINT] [--croissant]

FOLDER is one of ``exports/``; its manifest says of which format. Run it by a Python that has that trainer: it imports
nothing of this repository. CHECKPOINT is the reference, of which the tokenizer alone is read. ``--croissant`` reads
all records by `mlcroissant` instead, whatever the format. For ``rl-reward`` a ``scorers.py`` is written into FOLDER.

Every row must come out, none passed over; the first, and the first of several turns, are printed as the trainer has
them. Read so far: llama-factory 0.9.5, axolotl 0.19.0, verl 0.9.1, openrlhf 0.11.2, mlcroissant 1.1.1. The package
`nemo-rl` holds a version and no code; ``tests/pipeline/formats/test_nemo_rl.py`` holds its formats to its source.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# Its neighbours here have names of packages that trainers import (`coverage`).
sys.path[:] = [one for one in sys.path if Path(one or ".").resolve() != Path(__file__).resolve().parent]

_TEXT = "call a friend"
_SCORERS = """
def score(prompts, completions):
    assert all(prompt[-1]["role"] == "user" for prompt in prompts)
    return {name: [0.1 * len(text) for text in completions] for name in NAMES}
"""


def read_llama_factory(folder: Path, tokenizer: Any, counts: dict[str, int]) -> None:
    """By its loader, converter and processors, for preferences and for plain likelihood."""
    from llamafactory.data.loader import get_dataset  # type: ignore[import-not-found]
    from llamafactory.data.template import get_template_and_fix_tokenizer  # type: ignore[import-not-found]
    from llamafactory.hparams import DataArguments, ModelArguments  # type: ignore[import-not-found]
    from transformers import Seq2SeqTrainingArguments

    for stage, part in (("rm", "preference"), ("sft", "sft")):
        with tempfile.TemporaryDirectory() as scratch:
            data = DataArguments(
                dataset=f"dualign_{part}", dataset_dir=str(folder), cutoff_len=4096, mask_history=True
            )
            rows = get_dataset(
                get_template_and_fix_tokenizer(tokenizer, data),
                ModelArguments(model_name_or_path=tokenizer.name_or_path, cache_dir=scratch),
                data,
                Seq2SeqTrainingArguments(output_dir=scratch, report_to="none", use_cpu=True, do_train=True),
                stage=stage,
                tokenizer=tokenizer,
                processor=None,
            )["train_dataset"]
            require(len(rows) == counts[f"{part} train"], f"{len(rows)} of {counts[f'{part} train']} rows of {part}")
            names = ("chosen_input_ids", "rejected_input_ids") if stage == "rm" else ("input_ids", "labels")
            show(part, [[decode(tokenizer, row[name]) for name in names] for row in rows])


def read_axolotl(folder: Path, tokenizer: Any, counts: dict[str, int]) -> None:
    """By its prompt strategies, for preferences and for plain likelihood."""
    from axolotl.utils.data import prepare_datasets  # type: ignore[import-not-found]
    from axolotl.utils.data.rl import prepare_preference_datasets  # type: ignore[import-not-found]
    from axolotl.utils.dict import DictDefault  # type: ignore[import-not-found]

    with tempfile.TemporaryDirectory() as scratch:
        common = {
            "chat_template": "tokenizer_default",
            "sequence_len": 4096,
            "base_model": tokenizer.name_or_path,
            "tokenizer_config": tokenizer.name_or_path,
            "dataset_prepared_path": scratch,
            "dataset_num_proc": 1,
            "seed": 0,
        }
        source = {"ds_type": "json", "split": "train"}
        preference = {**source, "path": f"{folder}/preference/train.jsonl", "type": "chat_template.default"}
        config = DictDefault({**common, "rl": "dpo", "rl_beta": 1.0, "datasets": [preference]})
        rows, _ = prepare_preference_datasets(config, tokenizer)
        require(len(rows) == counts["preference train"], f"{len(rows)} pairs")
        show("preference", [[row[name] for name in ("prompt", "chosen", "rejected")] for row in rows])
        sft = {
            **source,
            "path": f"{folder}/sft/train.jsonl",
            "type": "chat_template",
            "roles_to_train": [],
            "message_field_training": "training",
            "message_property_mappings": {"role": "role", "content": "content"},
        }
        steps = {"num_epochs": 1, "micro_batch_size": 1, "gradient_accumulation_steps": 1, "batch_size": 1}
        config = DictDefault({**common, **steps, "val_set_size": 0.0, "train_on_inputs": False, "datasets": [sft]})
        rows = prepare_datasets(config, tokenizer)[0]
        require(len(rows) == counts["sft train"], f"{len(rows)} lines")
        show("sft", [[decode(tokenizer, row[name]) for name in ("input_ids", "labels")] for row in rows])


def read_verl(folder: Path, tokenizer: Any, counts: dict[str, int]) -> None:
    """By its data set and, with a reward function loaded as it does, its reward manager."""
    import numpy as np
    import torch
    from omegaconf import OmegaConf  # type: ignore[import-not-found]
    from verl import DataProto  # type: ignore[import-not-found]
    from verl.experimental.reward_loop.reward_manager.naive import NaiveRewardManager  # type: ignore[import-not-found]
    from verl.trainer.ppo.reward import get_custom_reward_fn  # type: ignore[import-not-found]
    from verl.utils.dataset.rl_dataset import RLHFDataset  # type: ignore[import-not-found]

    with tempfile.TemporaryDirectory() as scratch:
        config = {"prompt_key": "prompt", "max_prompt_length": 4096, "cache_dir": scratch}
        files = [str(path) for path in sorted(folder.glob("data/train-*.parquet"))]
        rows = RLHFDataset(data_files=files, tokenizer=tokenizer, config=OmegaConf.create(config))
        require(len(rows) == counts["train"], f"{len(rows)} prompts")
        row = rows[0]
    custom = {"path": str(folder / "dualign_reward.py"), "name": "compute_score"}
    function = get_custom_reward_fn(OmegaConf.create({"reward": {"custom_reward_function": custom}}))
    ids = tokenizer(_TEXT, add_special_tokens=False, return_tensors="pt")["input_ids"]

    def one(value: Any) -> np.ndarray:
        array = np.empty(1, dtype=object)
        array[0] = value
        return array

    others = {name: one(row[name]) for name in ("data_source", "reward_model", "extra_info")}
    data = DataProto.from_single_dict({"responses": ids, "attention_mask": torch.ones_like(ids), **others})

    async def score() -> dict[str, Any]:
        manager = NaiveRewardManager(OmegaConf.create({}), tokenizer, function)
        result: dict[str, Any] = await manager.run_single(data)
        return result

    found = asyncio.run(score())
    require_reward(folder, found["reward_score"])
    show("verl", [[row["raw_prompt"], found]])


def read_openrlhf(folder: Path, tokenizer: Any, counts: dict[str, int]) -> None:
    """By its data set of prompts and, with an engine that says one thing, its executor of single turns."""
    from datasets import load_dataset
    from openrlhf.datasets.prompts_dataset import PromptDataset  # type: ignore[import-not-found]
    from openrlhf.utils.agent import SingleTurnAgentExecutor  # type: ignore[import-not-found]

    with tempfile.TemporaryDirectory() as scratch:
        data = load_dataset(str(folder), cache_dir=scratch)["train"]
        keys = SimpleNamespace(input_key="prompt", label_key="label", apply_chat_template=True, image_key=None)
        strategy = SimpleNamespace(args=SimpleNamespace(data=keys), is_rank_0=lambda: False)
        rows = PromptDataset(data, tokenizer, strategy)
        require(len(rows) == counts["train"], f"{len(rows)} prompts")
        _, prompt, label, *_ = rows[0]

    class Engine:
        async def generate(self, ids: Any, params: Any, multi_modal_data: Any = None) -> Any:
            del ids, params, multi_modal_data
            tokens = tokenizer(_TEXT + (tokenizer.eos_token or ""), add_special_tokens=False)["input_ids"]
            output = SimpleNamespace(token_ids=tokens, text=_TEXT, finish_reason="stop", logprobs=None)
            return SimpleNamespace(outputs=[output])

    executor = SingleTurnAgentExecutor(str(folder / "dualign_reward.py"))
    params = SimpleNamespace(max_tokens=64, logprobs=None)
    found = asyncio.run(executor.execute(prompt, label, params, 4096, tokenizer, Engine()))
    require(found["reward"] is not None, "the executor passed over what the reward function raised")
    require_reward(folder, found["reward"])
    show("openrlhf", [[prompt, found["reward"], found["extra_logs"]]])


def read_croissant(folder: Path, counts: dict[str, int]) -> None:
    """Every record of every record set, hashes checked on the way."""
    import mlcroissant  # type: ignore[import-not-found]

    dataset = mlcroissant.Dataset(jsonld=str(folder / "croissant.json"))
    for record_set in dataset.metadata.record_sets:
        records = list(dataset.records(record_set.uuid))
        part, split, _ = record_set.uuid.rsplit("-", 2)
        expected = counts[split if part == "data" else f"{part} {split}"]
        require(len(records) == expected, f"{len(records)} of {expected} records of {record_set.uuid}")
        show(record_set.uuid, [list(record.items()) for record in records])


def require_reward(folder: Path, reward: float) -> None:
    """The reward of the text by the numbers of ``reward.json``, as the scorers above score it."""
    terms = json.loads((folder / "reward.json").read_text(encoding="utf-8"))
    score = 0.1 * len(_TEXT)
    expected = score + sum(one["coefficient"] * (score - one["threshold"]) for one in terms["constraints"])
    require(abs(reward - expected) < 1e-9, f"the reward is {reward}, not {expected}")


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """Tokens as text, without those that a loss passes over."""
    return str(tokenizer.decode([token for token in ids if token != -100]))


def require(holds: bool, what: str) -> None:
    """Stop with a message unless it holds."""
    if not holds:
        raise SystemExit(f"not read back: {what}")


def show(name: str, rows: Sequence[Sequence[object]]) -> None:
    """The first row, and the first with more turns than it."""
    longest = max(rows, key=lambda row: str(row[0]).count("user"))
    print(f"{name}: {len(rows)} rows")
    for row in [rows[0], *([longest] if longest is not rows[0] else [])]:
        for value in row:
            print("   ", repr(value)[:200])


def main() -> None:
    """Read one hand-off."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--reference", help="checkpoint of the reference")
    parser.add_argument("--croissant", action="store_true", help="read all records by mlcroissant")
    parser.add_argument("--trainer", choices=("verl", "openrlhf"), default="verl", help="of rl-reward")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    manifest = json.loads((options.folder / "manifest.json").read_text(encoding="utf-8"))
    counts = manifest["counts"]
    if options.croissant:
        read_croissant(options.folder, counts)
        return
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.reference)
    kind = manifest["settings"]["format"]
    if kind == "rl-reward":
        terms = json.loads((options.folder / "reward.json").read_text(encoding="utf-8"))
        names = [terms["reward"]["score"], *(one["score"] for one in terms["constraints"])]
        (options.folder / "scorers.py").write_text(f"NAMES = {names!r}\n{_SCORERS}", encoding="utf-8")
    readers = {"llama-factory": read_llama_factory, "axolotl": read_axolotl}
    readers["rl-reward"] = read_verl if options.trainer == "verl" else read_openrlhf
    if kind not in readers:
        raise SystemExit(f"{kind} is read back by the tests of this repository, which have its reader")
    readers[kind](options.folder, tokenizer, counts)


if __name__ == "__main__":  # readers start processes that import this file
    main()
