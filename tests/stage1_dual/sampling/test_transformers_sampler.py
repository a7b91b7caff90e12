from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import save_tiny_policy
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.contracts.errors import InputError
from stage1_dual.sampling.protocol import SampledCompletion, SampleRequest, sample_all
from stage1_dual.sampling.seeds import sample_seed
from stage1_dual.sampling.transformers_sampler import TransformersSampler

EOS = 2
LIMIT = 12


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny_policy(tmp_path_factory.mktemp("policy"), eos_logit=24.0)
    # What a careless sampler would take over: the model's own wish for sharp, cut-off samples.
    (folder / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "temperature": 0.1, "top_k": 1, "eos_token_id": EOS})
    )
    return folder


def make_requests(n: int, *, prompts: int = 4, run_seed: int = 0) -> list[SampleRequest]:
    return [
        SampleRequest(f"p{k % prompts}", (1, *range(10, 13 + 5 * (k % prompts))), k, sample_seed(run_seed, "p", k))
        for k in range(n)
    ]


def sample(policy: Path, requests: Sequence[SampleRequest], **settings: int) -> list[SampledCompletion]:
    sampler = TransformersSampler(str(policy), max_new_tokens=LIMIT, **settings)
    try:
        return sample_all(sampler, requests)
    finally:
        sampler.close()


def test_tokens_end_with_the_eos_exactly_where_they_stopped(policy: Path) -> None:
    completions = sample(policy, make_requests(200))
    assert {completion.finish_reason for completion in completions} == {"stop", "length"}
    for completion in completions:
        assert EOS not in completion.token_ids[:-1]
        if completion.finish_reason == "stop":
            assert completion.token_ids[-1] == EOS
        else:
            assert completion.token_ids[-1] != EOS
            assert len(completion.token_ids) == LIMIT


def test_text_is_the_decoded_tokens_without_special_ones(policy: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(policy)
    for completion in sample(policy, make_requests(50)):
        assert "<eos>" not in completion.text
        assert completion.text == tokenizer.decode(completion.token_ids, skip_special_tokens=True)


def test_batch_mates_do_not_matter(policy: Path) -> None:
    requests = make_requests(60)
    together = sample(policy, requests, batch_rows=64)
    assert_same(sample(policy, requests, batch_rows=7), together)
    assert_same(sample(policy, requests[::-1], batch_rows=16)[::-1], together)
    assert_same(sample(policy, requests[:1]), together[:1])


def test_one_call_does_not_influence_the_next(policy: Path) -> None:
    requests = make_requests(40)
    sampler = TransformersSampler(str(policy), max_new_tokens=LIMIT)
    first = sample_all(sampler, requests)
    sample_all(sampler, make_requests(30, run_seed=9))
    assert sample_all(sampler, requests) == first


def test_samples_of_one_prompt_differ(policy: Path) -> None:
    completions = sample(policy, make_requests(200, prompts=1))
    assert len({completion.token_ids for completion in completions}) > 190


def test_first_tokens_follow_the_untouched_distribution(policy: Path) -> None:
    n = 4000
    requests = [SampleRequest("p", (1, 20, 30), k, sample_seed(4, "p", k)) for k in range(n)]
    sampler = TransformersSampler(str(policy), max_new_tokens=1, batch_rows=1000)
    first = torch.tensor([completion.token_ids[0] for completion in sample_all(sampler, requests)])
    model = AutoModelForCausalLM.from_pretrained(policy)
    with torch.inference_mode():
        probabilities = model(torch.tensor([[1, 20, 30]])).logits[0, -1].double().softmax(-1)
    order = probabilities.argsort(descending=True)
    expected, found = n * probabilities[order], first.bincount(minlength=len(probabilities))[order].double()
    # The 30 likeliest tokens one by one; the rest, most of which transformers' default of top_k 50 would cut, in tens.
    cuts = [*range(30), *range(30, len(order), 10), len(order)]
    bins = [slice(start, stop) for start, stop in pairwise(cuts)]
    test = chisquare([float(found[b].sum()) for b in bins], [float(expected[b].sum()) for b in bins], sum_check=False)
    assert test.pvalue > 1e-3


def test_logp_is_that_of_the_model_on_the_tokens_drawn(policy: Path) -> None:
    requests = make_requests(30)
    model = AutoModelForCausalLM.from_pretrained(policy)
    for request, completion in zip(requests, sample(policy, requests), strict=True):
        ids = torch.tensor([[*request.prompt_token_ids, *completion.token_ids]])
        with torch.inference_mode():
            logp = model(ids).logits[0, :-1].double().log_softmax(-1)
        start = len(request.prompt_token_ids) - 1
        expected = logp[start:].gather(-1, ids[0, start + 1 :, None]).sum()
        assert completion.logp == pytest.approx(float(expected), abs=1e-4)  # float32 sums over 12 tokens


def test_every_eos_the_checkpoint_names_ends_a_completion(policy: Path, tmp_path: Path) -> None:
    folder = save_tiny_policy(tmp_path, eos_logit=24.0)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS, 40]}))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": 41}))
    sampler = TransformersSampler(str(folder), max_new_tokens=LIMIT)
    assert sampler.eos_token_ids == (EOS, 40, 41)
    ends = {c.token_ids[-1] for c in sample_all(sampler, make_requests(400)) if c.finish_reason == "stop"}
    assert ends == {EOS, 40, 41}


def test_what_cannot_be_loaded_is_refused(tmp_path: Path) -> None:
    folder = save_tiny_policy(tmp_path)
    (folder / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(InputError, match="cannot load"):
        TransformersSampler(str(folder), max_new_tokens=LIMIT)


def assert_same(found: Sequence[SampledCompletion], expected: Sequence[SampledCompletion]) -> None:
    assert [c.token_ids for c in found] == [c.token_ids for c in expected]
    assert [c.text for c in found] == [c.text for c in expected]
    assert [c.logp for c in found] == pytest.approx([c.logp for c in expected], abs=1e-4)
