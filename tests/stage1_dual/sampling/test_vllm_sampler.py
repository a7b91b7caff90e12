"""A real engine: one start in this process, two in a fresh one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
from helpers.tiny_models import save_tiny_policy

from pipeline.contracts.errors import InputError, MissingExtraError
from pipeline.contracts.shards import ShardedTable
from pipeline.contracts.tables import SAMPLES
from stage1_dual.sampling.protocol import SampledCompletion, SampleRequest, sample_all
from stage1_dual.sampling.seeds import sample_seed
from stage1_dual.sampling.transformers_sampler import TransformersSampler
from stage1_dual.sampling.vllm_sampler import VllmSampler

pytestmark = pytest.mark.slow

EOS = 2
LIMIT = 16


@dataclass(frozen=True)
class Drawn:
    policy: Path
    requests: list[SampleRequest]
    first: list[SampledCompletion]
    again_after_others: list[SampledCompletion]
    description: dict[str, object]
    listens_at: frozenset[str]
    told: dict[str, str | None]
    environment_kept: bool
    torch_kept: bool


def make_requests(n: int, run_seed: int) -> list[SampleRequest]:
    return [
        SampleRequest(f"p{k % 5}", (1, *range(10, 13 + 9 * (k % 5))), k, sample_seed(run_seed, "p", k))
        for k in range(n)
    ]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    policy = save_tiny_policy(tmp_path_factory.mktemp("policy"), eos_logit=24.0)
    (policy / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "temperature": 0.1, "top_k": 1, "repetition_penalty": 2.0, "eos_token_id": EOS})
    )
    environment, random_state = dict(os.environ), torch.get_rng_state()
    settings = (torch.set_num_threads, torch.get_num_threads(), torch.accelerator.synchronize)
    sampler = VllmSampler(str(policy), max_new_tokens=LIMIT, max_positions=100, max_num_seqs=64)
    requests = make_requests(300, run_seed=0)
    try:
        first = sample_all(sampler, requests)
        sample_all(sampler, make_requests(100, run_seed=1))
        again = sample_all(sampler, requests)
        description = dict(sampler.describe())
        open_ports = [
            found for found in psutil.Process().net_connections("inet") if found.status == psutil.CONN_LISTEN
        ]
        told = {name: os.environ.get(name) for name in ("VLLM_NO_USAGE_STATS", "DO_NOT_TRACK")}
    finally:
        sampler.close()
    return Drawn(
        policy,
        requests,
        first,
        again,
        description,
        frozenset(found.laddr.ip for found in open_ports),
        told,
        environment_kept=dict(os.environ) == environment,
        torch_kept=(torch.set_num_threads, torch.get_num_threads(), torch.accelerator.synchronize) == settings
        and torch.equal(torch.get_rng_state(), random_state),
    )


def test_the_engine_listens_to_this_machine_and_tells_nobody(drawn: Drawn) -> None:
    assert drawn.listens_at == {"127.0.0.1"}
    assert drawn.told == {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}


_FRESH = """
import json, sys
from stage1_dual.sampling.protocol import SampleRequest, sample_all
from stage1_dual.sampling.vllm_sampler import VllmSampler

policy, requests, answer = sys.argv[1:]
requests = [SampleRequest(p, tuple(ids), k, seed) for p, ids, k, seed in json.load(open(requests))]
drawn = []
for max_num_seqs, compiles in ((64, False), (7, False), (64, True)):
    sampler = VllmSampler(
        policy, max_new_tokens=16, max_positions=100, max_num_seqs=max_num_seqs, compiles=compiles
    )
    assert sampler.describe()["compiled"] == compiles
    drawn.append([(c.text, c.token_ids, c.finish_reason, c.logp) for c in sample_all(sampler, requests)])
    sampler.close()
json.dump(drawn, open(answer, "w"))
"""


@pytest.fixture(scope="module")
def fresh(drawn: Drawn, tmp_path_factory: pytest.TempPathFactory) -> list[list[SampledCompletion]]:
    """The same requests in a new process: as in this one, by an engine that holds seven rows at once, and compiled."""
    folder = tmp_path_factory.mktemp("fresh")
    requests = [(r.prompt_id, r.prompt_token_ids, r.sample_index, r.seed) for r in drawn.requests]
    (folder / "requests.json").write_text(json.dumps(requests))
    arguments = [str(drawn.policy), str(folder / "requests.json"), str(folder / "answer.json")]
    own = {name: str(folder / name) for name in ("XDG_CACHE_HOME", "TMPDIR")}
    (folder / "TMPDIR").mkdir()
    kept = {
        name: value for name, value in os.environ.items() if name not in ("VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR")
    }
    subprocess.run([sys.executable, "-c", _FRESH, *arguments], check=True, timeout=300, env={**kept, **own})
    compiled = folder / "XDG_CACHE_HOME" / "vllm"
    assert any(compiled.rglob("*.so"))
    assert (compiled / "torchinductor").stat().st_mode & 0o077 == 0
    assert not any((folder / "TMPDIR").rglob("*.so"))  # where others could have put theirs
    answer = json.loads((folder / "answer.json").read_text())
    return [
        [SampledCompletion(text, tuple(ids), reason, logp) for text, ids, reason, logp in engine] for engine in answer
    ]


def share_equal(found: Sequence[SampledCompletion], expected: Sequence[SampledCompletion]) -> float:
    equal = [a.token_ids == b.token_ids for a, b in zip(found, expected, strict=True)]
    return sum(equal) / len(equal)


def test_a_call_depends_on_its_requests_alone(drawn: Drawn, fresh: list[list[SampledCompletion]]) -> None:
    assert drawn.again_after_others == drawn.first
    assert fresh[0] == drawn.first


def test_the_batch_does_not_decide_what_is_drawn(drawn: Drawn, fresh: list[list[SampledCompletion]]) -> None:
    # Other batches round the logits otherwise; one draw in a hundred thousand or so falls in between.
    assert share_equal(fresh[1], drawn.first) > 0.98


def test_compilation_does_not_decide_what_is_drawn(drawn: Drawn, fresh: list[list[SampledCompletion]]) -> None:
    assert share_equal(fresh[2], drawn.first) > 0.98
    assert fresh[2] != drawn.first  # other kernels: other last bits


def test_it_draws_what_the_transformers_sampler_draws(drawn: Drawn) -> None:
    # The same seeds, another implementation of the model, and neither heeds generation_config.json.
    other = sample_all(TransformersSampler(str(drawn.policy), max_new_tokens=LIMIT), drawn.requests)
    assert share_equal(drawn.first, other) > 0.98
    for ours, theirs in zip(drawn.first, other, strict=True):
        if ours.token_ids == theirs.token_ids:
            assert ours.text == theirs.text
            assert ours.finish_reason == theirs.finish_reason
            assert ours.logp == pytest.approx(theirs.logp, abs=1e-3)  # float32 sums over 16 tokens


def test_tokens_end_with_the_eos_exactly_where_they_stopped(drawn: Drawn) -> None:
    assert {completion.finish_reason for completion in drawn.first} == {"stop", "length"}
    for completion in drawn.first:
        assert EOS not in completion.token_ids[:-1]
        assert "<eos>" not in completion.text
        if completion.finish_reason == "stop":
            assert completion.token_ids[-1] == EOS
        else:
            assert len(completion.token_ids) == LIMIT
            assert completion.token_ids[-1] != EOS


def test_samples_of_one_prompt_differ(drawn: Drawn) -> None:
    assert len({(r.prompt_id, c.token_ids) for r, c in zip(drawn.requests, drawn.first, strict=True)}) > 280


def test_the_resolved_parameters_are_reported(drawn: Drawn) -> None:
    json.dumps(drawn.description)
    expected = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    expected |= {"compiled": False, "shard_by_shard": True}
    assert expected.items() <= drawn.description.items()
    assert drawn.description["eos_token_ids"] == [EOS]


def test_the_process_gets_its_settings_back(drawn: Drawn) -> None:
    assert drawn.environment_kept
    assert drawn.torch_kept


def test_a_missing_vllm_says_what_to_install(drawn: Drawn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    environment = dict(os.environ)
    with pytest.raises(MissingExtraError, match=r"vllm.*dualign\[sample\]"):
        VllmSampler(str(drawn.policy), max_new_tokens=LIMIT, max_positions=100)
    assert dict(os.environ) == environment


def test_positions_beyond_the_model_are_refused(drawn: Drawn) -> None:
    with pytest.raises(InputError, match="vLLM cannot load"):
        VllmSampler(str(drawn.policy), max_new_tokens=LIMIT, max_positions=129)


_TABLE = """
import sys
from pathlib import Path
import numpy as np
from pipeline.contracts.shards import ShardedTable
from pipeline.contracts.tables import SAMPLES
from stage1_dual.sampling.sample_table import PromptTokens, sample_table
from stage1_dual.sampling.vllm_sampler import VllmSampler

policy, *folders = sys.argv[1:]

class Unlike(VllmSampler):
    def _parameters(self, request):
        parameters = super()._parameters(request)
        if request.sample_index % 100 == 5:  # one completion in a hundred is thirty times as long as the others
            parameters.ignore_eos, parameters.stop_token_ids = True, []
        else:
            parameters.max_tokens = 4
        return parameters

    def stream(self, requests, *, on_tokens):
        self.steps = 0
        def count(n):
            self.steps += 1
            on_tokens(n)
        yield from super().stream(requests, on_tokens=count)
        print(self.steps, flush=True)

for folder in folders:
    sample_table(
        sampler_factory=lambda: Unlike(policy, max_new_tokens=129, max_positions=140, max_num_seqs=16),
        prompts=[PromptTokens(f"p{place}", "train", np.array([1, 10 + place, 30], np.int32)) for place in range(4)],
        samples_per_prompt=300,
        run_seed=3,
        table=ShardedTable(Path(folder), SAMPLES, {}),
        shard_rows=100,
        show_progress=False,
    )
"""


def test_a_long_completion_holds_no_other_shard_up_and_a_killed_run_draws_by_the_same_seeds(tmp_path: Path) -> None:
    policy = save_tiny_policy(tmp_path / "policy", max_positions=160)
    killed, whole = tmp_path / "killed", tmp_path / "whole"

    def start(*folders: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", _TABLE, str(policy), *map(str, folders)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def shards(folder: Path) -> list[str]:
        return sorted(path.name.split("-")[1] for path in folder.glob("parts/*.parquet"))

    process = start(killed)
    try:
        deadline = time.monotonic() + 300
        while len(shards(killed)) < 3:
            assert process.poll() is None, "the process ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    n_kept = len(ShardedTable(killed, SAMPLES, {}).read("train"))
    process = start(killed, whole)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    # 1188 completions of 4 tokens and 12 of 129 on 16 rows: 394 steps if no row ever waits, 12 * 129 shard by shard.
    assert int(out.split()[-1]) < 600

    def rows(folder: Path) -> dict[tuple[str, int], dict[str, object]]:
        table = ShardedTable(folder, SAMPLES, {}).read("train").to_pylist()
        return {(row["prompt_id"], row["sample_index"]): row for row in table}

    ours, theirs = rows(killed), rows(whole)
    assert 300 <= n_kept < 1200
    assert len(ours) == 1200
    assert ours.keys() == theirs.keys()
    equal = [ours[key]["completion_token_ids"] == theirs[key]["completion_token_ids"] for key in ours]
    assert sum(equal) > 0.98 * 1200  # float32 logits of other batches: one draw in a hundred thousand differs
    assert all(ours[key]["seed"] == theirs[key]["seed"] for key in ours)
    assert shards(killed) == shards(whole) == [f"{place:06d}" for place in range(12)]
