from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from pipeline.contracts.errors import CorruptArtifactError, MissingExtraError
from pipeline.microworld import World, read_world, world
from pipeline.microworld.grammar import DATA_FILES, read_grammar
from pipeline.microworld.size import WorldSize
from pipeline.microworld.tokenizer import encode_prompt, encode_replies

pytestmark = pytest.mark.slow

Build = Callable[[Path, int], World]
VERSIONS = {"torch": "2", "transformers": "5"}


def file_hashes(directory: Path) -> dict[str, str]:
    return json.loads((directory / "world.json").read_text())["files"]


def test_prompts_are_distinct_and_the_splits_apart(tiny_world: World) -> None:
    splits = Counter(prompt.split for prompt in tiny_world.prompts)
    texts = {prompt.messages[0]["content"] for prompt in tiny_world.prompts}
    assert splits == {"train": 24, "test": 12}
    assert len(texts) == 36
    assert {tuple(message) for prompt in tiny_world.prompts for message in prompt.messages} == {("role", "content")}


def test_the_default_size_has_enough_prompts_of_every_topic() -> None:
    size = WorldSize()
    prompts = read_grammar().build_prompts()
    train, test = world._split_prompts(prompts, size=size, rng=np.random.default_rng(0))
    assert len(train) >= 320
    assert len(test) >= 120
    assert not {prompt.text for prompt in train} & {prompt.text for prompt in test}
    assert {prompt.topic for prompt in train} == {prompt.topic for prompt in test}


def test_checkpoints_load_with_the_auto_classes(tiny_world: World) -> None:
    messages = [{"role": "user", "content": "So my flatmate eats my food. What would you do?"}]
    for path, model_class, turns in (
        (tiny_world.reference, AutoModelForCausalLM, messages),
        *(
            (path, AutoModelForSequenceClassification, [*messages, {"role": "assistant", "content": "Right."}])
            for path in tiny_world.scorers.values()
        ),
    ):
        model = model_class.from_pretrained(path)
        tokenizer = AutoTokenizer.from_pretrained(path)
        assert list(path.glob("*.safetensors"))
        assert not list(path.glob("*.bin"))
        assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
        for config in (model.config, tokenizer):
            assert config.bos_token_id == tokenizer.bos_token_id
            assert config.pad_token_id == tokenizer.pad_token_id
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=len(turns) == 1)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert ids.count(tokenizer.bos_token_id) == 1
        assert (ids[-1] == tokenizer.eos_token_id) == (len(turns) == 2)
        # What a careless caller does gives two: the trap of many Hub models.
        assert tokenizer(text)["input_ids"].count(tokenizer.bos_token_id) == 2
        assert (
            tokenizer.decode(tokenizer(turns[0]["content"], add_special_tokens=False)["input_ids"])
            == (turns[0]["content"])
        )
        logits = model(torch.tensor([ids])).logits
        assert torch.isfinite(logits).all()
        if len(turns) == 2:
            padded = torch.tensor([[*ids, *[tokenizer.pad_token_id] * 5]])
            mask = (padded != tokenizer.pad_token_id).long()
            torch.testing.assert_close(model(padded, attention_mask=mask).logits, logits)
            assert logits.shape == (1, 1)


def test_ids_made_for_training_are_those_of_the_rendered_dialogue(tiny_world: World) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_world.reference)
    prompt, reply = "So my flatmate eats my food. What would you do?", "That sounds hard. Don't, you know, panic."
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}], tokenize=False
    )
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert encode_prompt(tokenizer, prompt) + encode_replies(tokenizer, [reply])[0] == whole


def test_an_unknown_role_is_refused(tiny_world: World) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_world.reference)
    with pytest.raises(Exception, match="only the roles user and assistant"):
        tokenizer.apply_chat_template([{"role": "system", "content": "x"}], tokenize=False)


def test_sampling_defaults_are_a_trap_on_purpose(tiny_world: World) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_world.reference)
    assert (model.generation_config.temperature, model.generation_config.top_p) == (0.7, 0.9)


def test_training_lowers_the_loss(tiny_world: World) -> None:
    record = json.loads((tiny_world.directory / "world.json").read_text())
    assert record["final_losses"]["reference"] < np.log(320) - 0.1  # better than a uniform guess
    assert 0 <= min(tiny_world.scorer_accuracy.values()) <= max(tiny_world.scorer_accuracy.values()) <= 1


def test_a_seed_gives_the_same_bytes_and_another_seed_does_not(
    tiny_world: World, build_tiny: Build, tmp_path: Path
) -> None:
    again, other = build_tiny(tmp_path, 3), build_tiny(tmp_path, 4)
    assert again.digest == tiny_world.digest != other.digest
    assert file_hashes(again.directory) == file_hashes(tiny_world.directory) != file_hashes(other.directory)


def test_torch_settings_are_put_back(tiny_world: World, build_tiny: Build, tmp_path: Path) -> None:
    def settings() -> tuple[int, bool, str | None, torch.Tensor]:
        deterministic = torch.are_deterministic_algorithms_enabled()
        return torch.get_num_threads(), deterministic, os.environ.get("TOKENIZERS_PARALLELISM"), torch.get_rng_state()

    before = settings()
    build_tiny(tmp_path, 5)
    after = settings()
    assert before[:3] == after[:3]
    assert torch.equal(before[3], after[3])


def test_a_cached_world_is_read_without_torch(tiny_world: World) -> None:
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom pipeline.microworld import read_world\n"
        f"world = read_world(Path({str(tiny_world.directory)!r}))\n"
        "print(world.digest, sorted({'torch', 'transformers', 'tokenizers'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True)
    assert shown.stdout.split(maxsplit=1) == [tiny_world.digest, "[]\n"]
    assert not shown.stderr


def test_a_second_call_reads_the_first_world(tiny_world: World, build_tiny: Build) -> None:
    before = (tiny_world.directory / "world.json").stat()
    assert build_tiny(tiny_world.directory.parent, 3) == tiny_world == read_world(tiny_world.directory)
    assert (tiny_world.directory / "world.json").stat() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.unlink(), r"model\.safetensors is missing or differs"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"x"), r"model\.safetensors is missing or differs"),
        (lambda path: (path.parents[1] / "world.json").unlink(), r"world\.json does not describe a built world"),
        (lambda path: (path.parents[1] / "world.json").write_text("{"), r"world\.json does not describe"),
    ],
)
def test_a_damaged_world_is_refused(
    change: Callable[[Path], object], message: str, tiny_world: World, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_world.directory, copy)
    change(copy / "reference" / "model.safetensors")
    with pytest.raises(CorruptArtifactError, match=message):
        read_world(copy)


def test_the_digest_follows_everything_that_decides_the_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def digest(*, seed: int = 0, size: WorldSize | None = None, versions: dict[str, str] = VERSIONS) -> str:
        return world.world_digest(seed=seed, size=size or WorldSize(), versions=versions)

    digests = [
        digest(),
        digest(seed=1),
        digest(size=dataclasses.replace(WorldSize(), policy_steps=7)),
        digest(versions={**VERSIONS, "torch": "3"}),
    ]
    shutil.copytree(world.DATA_DIRECTORY, tmp_path / "data")
    shutil.copytree(world._SOURCES, tmp_path / "sources")
    monkeypatch.setattr(world, "DATA_DIRECTORY", tmp_path / "data")
    monkeypatch.setattr(world, "_SOURCES", tmp_path / "sources")
    assert digest() == digests[0]
    changed = [*(tmp_path / "data" / name for name in DATA_FILES), *sorted((tmp_path / "sources").glob("*.py"))]
    assert len(changed) >= 10
    for path in changed:
        with path.open("a") as file:
            file.write("\n# changed\n")
        digests.append(digest())
    assert len(set(digests)) == 4 + len(changed)


def test_a_missing_library_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "_LIBRARIES", ("torch", "no-such-library"))
    with pytest.raises(MissingExtraError, match=r"`no-such-library`.*dualign\[sample\]"):
        world.build_world(tmp_path, seed=0)


BUILD_PROGRAM = """
import sys
from pathlib import Path
from pipeline.microworld.size import WorldSize
from pipeline.microworld.tokenizer import encode_prompt, encode_replies
from pipeline.microworld.world import build_world_of_size

if __name__ == "__main__":
    build_world_of_size(Path(sys.argv[1]), seed=3, size=eval(sys.argv[2]), show_progress=False)
"""


def start_build(cache_root: Path, size: WorldSize) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", BUILD_PROGRAM, str(cache_root), repr(size)], stderr=subprocess.PIPE)


def test_a_killed_build_leaves_no_world_and_the_next_one_works(
    tiny_world: World, tiny_size: WorldSize, build_tiny: Build, tmp_path: Path
) -> None:
    with start_build(tmp_path, tiny_size) as process:
        # Prompts are the first file of a build; the models come seconds later.
        while not list(tmp_path.glob(".microworld-*.partial/prompts.json")):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not list(tmp_path.glob("microworld-*"))
    assert list(tmp_path.glob(".microworld-*.partial"))
    rebuilt = build_tiny(tmp_path, 3)
    assert file_hashes(rebuilt.directory) == file_hashes(tiny_world.directory)
    assert not list(tmp_path.glob(".microworld-*.partial"))


def test_two_builders_at_once_give_one_world_and_print_nothing(
    tiny_world: World, tiny_size: WorldSize, tmp_path: Path
) -> None:
    builders = [start_build(tmp_path, tiny_size) for _ in range(2)]
    for builder in builders:
        _, shown = builder.communicate(timeout=120)
        assert (builder.returncode, shown) == (0, b"")
    (directory,) = tmp_path.glob("microworld-*")
    assert file_hashes(directory) == file_hashes(tiny_world.directory)
    assert not list(tmp_path.glob(".microworld-*.partial"))
