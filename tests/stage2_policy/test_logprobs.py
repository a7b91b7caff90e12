from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import linear
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    JambaConfig,
    Lfm2Config,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from pipeline.contracts.errors import InputError
from stage2_policy import logprobs
from stage2_policy.logprobs import (
    IGNORED,
    SequenceBatch,
    build_batch,
    can_share_prompts,
    iterate_budgeted,
    score_sequences,
    sequence_logp,
)


@pytest.fixture(scope="module")
def sequences() -> list[tuple[list[int], list[int]]]:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 25, size=(20, 3))
    return [
        (prompt, rng.integers(5, 300, size=length).tolist())
        for p, *completions in lengths
        for prompt in [rng.integers(5, 300, size=p).tolist()]
        for length in completions
    ]


@pytest.fixture(scope="module")
def full_logit_logp(reference_model: PreTrainedModel, sequences: list[tuple[list[int], list[int]]]) -> np.ndarray:
    """One sequence at a time, no padding, all logits, float64 sums."""
    values = []
    for prompt, completion in sequences:
        with torch.no_grad():
            logits = reference_model(torch.tensor([prompt + completion])).logits[0].double()
        logp = torch.log_softmax(logits, dim=-1)
        values.append(sum(float(logp[len(prompt) + t - 1, token]) for t, token in enumerate(completion)))
    return np.array(values)


@pytest.mark.parametrize("token_budget", [1, 100, 1000, 100_000])
def test_equals_full_logits_whatever_the_batch(
    reference_model: PreTrainedModel,
    sequences: list[tuple[list[int], list[int]]],
    full_logit_logp: np.ndarray,
    token_budget: int,
) -> None:
    logp = score_sequences(reference_model, sequences, token_budget=token_budget, show_progress=False)

    assert logp.dtype == np.float64
    np.testing.assert_allclose(logp, full_logit_logp, rtol=0, atol=2e-4)  # float32 sums of up to 24 terms


def test_order_of_rows_is_kept(reference_model: PreTrainedModel, sequences: list[tuple[list[int], list[int]]]) -> None:
    forward = score_sequences(reference_model, sequences, token_budget=200, show_progress=False)
    backward = score_sequences(reference_model, sequences[::-1], token_budget=200, show_progress=False)

    np.testing.assert_allclose(forward, backward[::-1], rtol=0, atol=2e-4)


def test_logits_of_prompt_tokens_are_never_computed(reference_model: PreTrainedModel) -> None:
    batch = build_batch([([7] * 20, [8, 9]), ([7] * 3, [8, 9, 10]), ([7] * 3, [8])])
    shapes = []
    handle = reference_model.lm_head.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape))
    try:
        sequence_logp(reference_model, batch)
    finally:
        handle.remove()

    assert [tuple(shape[:2]) for shape in shapes] == [(2, 1), (3, 3)]


def test_batch_holds_the_given_tokens_and_nothing_else() -> None:
    batch = build_batch([([1, 2, 3], [4, 5]), ([6], [7, 8, 9]), ([1, 2, 3], [4])])

    assert batch.prefix_ids.tolist() == [[1, 2], [0, 0]]
    assert batch.prefix_mask.tolist() == [[1, 1], [0, 0]]
    assert batch.prefix_positions.tolist() == [[0, 1], [0, 0]]
    assert batch.prefix_of_row.tolist() == [0, 1, 0]
    assert batch.input_ids.tolist() == [[3, 4, 5], [6, 7, 8], [3, 4, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 0], [0, 0, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch.position_ids.tolist() == [[2, 3, 4], [0, 1, 2], [2, 3, 4]]
    assert batch.targets.tolist() == [[4, 5, IGNORED], [7, 8, 9], [4, IGNORED, IGNORED]]


def test_shared_prompts_give_the_gradient_of_separate_ones(reference_model: PreTrainedModel) -> None:
    sequences = [([5, 6, 7], [8, 9]), ([5, 6, 7], [10]), ([11], [12, 13, 14]), ([5, 6, 7], [8, 9, 10])]
    weight = torch.tensor([0.3, -1.0, 2.0, 0.7])
    gradients = []
    for groups in ([sequences], [[sequence] for sequence in sequences]):
        reference_model.zero_grad()
        logp = torch.cat([sequence_logp(reference_model, build_batch(group)) for group in groups])
        (logp * weight).sum().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in reference_model.parameters()]))
    reference_model.zero_grad(set_to_none=True)

    assert gradients[0].norm() > 1
    assert_same_gradient(gradients[0], gradients[1])


def assert_same_gradient(found: torch.Tensor, expected: torch.Tensor) -> None:
    """To the rounding of float32, which is of the largest terms of a sum, by the processor: seen is 1.4 of it."""
    rounding = torch.finfo(torch.float32).eps * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=max(1e-5, 4 * rounding))
    assert (found - expected).norm() < 5e-6 * expected.norm()


def gradient_and_logp(model: PreTrainedModel, batch: SequenceBatch) -> tuple[torch.Tensor, torch.Tensor]:
    model.zero_grad()
    logp = sequence_logp(model, batch)
    (logp * torch.linspace(-1, 2, len(logp))).sum().backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    model.zero_grad(set_to_none=True)
    return gradient, logp.detach()


@pytest.mark.parametrize("share_prompts", [True, False])
def test_chunked_head_has_values_and_gradients_of_the_full_one_within_its_memory(
    share_prompts: bool,
    reference_model: PreTrainedModel,
    sequences: list[tuple[list[int], list[int]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batch = build_batch(sequences, share_prompts=share_prompts)
    vocabulary = reference_model.config.vocab_size
    n_targets = int((batch.targets != IGNORED).sum())
    whole = gradient_and_logp(reference_model, batch)

    sizes, saved = [], []
    head = reference_model.get_output_embeddings()
    hook = torch.nn.functional.linear

    def record(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if weight is head.weight:
            sizes.append(hidden.shape[:-1].numel())
        return hook(hidden, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", record)
    monkeypatch.setattr(logprobs, "LOGITS_AT_ONCE", 23 * vocabulary + 5)
    with torch.autograd.graph.saved_tensors_hooks(lambda part: saved.append(part.shape) or part, lambda part: part):
        chunked = gradient_and_logp(reference_model, batch)

    assert n_targets > 200
    assert n_targets % 23
    torch.testing.assert_close(chunked[1], whole[1], rtol=0, atol=1e-5)
    assert_same_gradient(chunked[0], whole[0])
    # Every chunk runs twice, forward and backward; of the prompts only one position does, whose logits nobody reads.
    prompts = [len(batch.prefix_ids)] if share_prompts else []
    assert sorted(sizes) == sorted([*prompts, *[23] * (2 * (n_targets // 23)), *[n_targets % 23] * 2])
    # Nothing of the vocabulary's width is kept between forward and backward but the head's own weight.
    wide = [shape for shape in saved if vocabulary in shape]
    assert all(shape.numel() <= max(23 * vocabulary, head.weight.numel()) for shape in wide)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_fixed_head_has_the_gradient_of_a_trained_one_and_computes_its_logits_once(
    dtype: torch.dtype,
    reference_model: PreTrainedModel,
    sequences: list[tuple[list[int], list[int]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batch = build_batch(sequences)
    head = reference_model.get_output_embeddings()
    n_targets = int((batch.targets != IGNORED).sum())
    monkeypatch.setattr(logprobs, "LOGITS_AT_ONCE", 23 * reference_model.config.vocab_size)
    others = [weight for weight in reference_model.parameters() if weight is not head.weight]

    def gradient() -> tuple[torch.Tensor, torch.Tensor]:
        reference_model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logp = sequence_logp(reference_model, batch)
        (logp * torch.linspace(-1, 2, len(logp))).sum().backward()
        return torch.cat([weight.grad.flatten() for weight in others]), logp.detach()

    trained, sizes = gradient(), []

    def record(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if weight is head.weight:
            sizes.append(hidden.shape[:-1].numel())
        return linear(hidden, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", record)
    try:
        head.weight.requires_grad_(False)
        fixed = gradient()
        assert head.weight.grad is None
    finally:
        head.weight.requires_grad_(True)
        reference_model.zero_grad(set_to_none=True)

    torch.testing.assert_close(fixed[1], trained[1], rtol=0, atol=0)
    if dtype == torch.float32:
        assert_same_gradient(fixed[0], trained[0])
    else:  # 8 bits of mantissa in every product: both are as far from the gradient in float32 as from each other
        assert (fixed[0] - trained[0]).norm() < 0.02 * trained[0].norm()
    assert sum(sizes) == n_targets + len(batch.prefix_ids)  # of the prompts one position each, which nobody reads


def test_rows_fed_whole_have_the_gradient_of_shared_prompts(
    reference_model: PreTrainedModel, sequences: list[tuple[list[int], list[int]]]
) -> None:
    shared, whole = (
        gradient_and_logp(reference_model, build_batch(sequences, share_prompts=share)) for share in (True, False)
    )

    torch.testing.assert_close(whole[1], shared[1], rtol=0, atol=2e-4)
    torch.testing.assert_close(whole[0], shared[0], rtol=1e-3, atol=1e-3)


_SMALL = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    "config",
    [
        Lfm2Config(**_SMALL, **_HEADS, layer_types=["conv", "full_attention"], pad_token_id=0),
        JambaConfig(
            **_SMALL, **_HEADS, num_experts=2, attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False
        ),
    ],
    ids=lambda config: config.model_type,
)
def test_models_that_keep_a_state_are_fed_whole(config: Lfm2Config | JambaConfig) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for weights in model.parameters():
        weights.data *= 3.0  # else all that comes before a token says little
    sequences = [([5, 6, 7, 8], [9]), ([5, 6, 7, 8], [9, 10, 11]), ([12, 13], [5, 9, 6, 7, 8])]
    alone = []
    for prompt, completion in sequences:
        logp = model(torch.tensor([prompt + completion])).logits[0].detach().log_softmax(-1)
        alone.append(sum(float(logp[len(prompt) - 1 + t, token]) for t, token in enumerate(completion)))

    assert not can_share_prompts(model)
    np.testing.assert_allclose(
        score_sequences(model, sequences, token_budget=1000, show_progress=False), alone, atol=1e-4
    )
    assert [len(batch) for batch in iterate_budgeted(sequences[:2] * 2, 14, share_prompts=False)] == [2, 2]


def test_logits_that_are_changed_behind_the_head_are_counted_as_changed() -> None:
    config = Gemma2Config(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        final_logit_softcapping=2.0,
    )
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(config).eval()
    torch.nn.init.normal_(model.lm_head.weight)
    expected = torch.log_softmax(model(torch.tensor([[3, 4, 5]])).logits[0].detach(), dim=-1)
    logp = sequence_logp(model, build_batch([([3], [4, 5])])).detach()

    assert float(logp) == pytest.approx(float(expected[0, 4] + expected[1, 5]), abs=1e-5)
    model.config.final_logit_softcapping = None  # what a model of an unknown kind would look like
    forward = model.forward
    model.forward = lambda **inputs: _halved(forward(**inputs))
    with pytest.raises(InputError, match="Gemma2ForCausalLM changes its logits behind its head"):
        sequence_logp(model, build_batch([([3], [4, 5])]))


def _halved(output: CausalLMOutputWithPast) -> CausalLMOutputWithPast:
    output.logits = output.logits / 2
    return output


def test_budget_holds_every_row_comes_once_and_prompts_are_shared() -> None:
    rng = np.random.default_rng(1)
    sequences = [
        ([prompt] * int(width), [1] * int(length))
        for prompt, width in enumerate(rng.integers(1, 60, size=30))
        for length in rng.integers(1, 60, size=20)
    ]
    batches = list(iterate_budgeted(sequences, 400))

    assert sorted(row for batch in batches for row in batch) == list(range(600))
    prompts_run = 0
    for rows in batches:
        batch = build_batch([sequences[row] for row in rows])
        prompts_run += len(batch.prefix_ids)
        assert batch.prefix_ids.numel() + batch.targets.numel() <= 400 or len(rows) == 1
    assert prompts_run < 600 / 4


def test_training_mode_and_its_absence_are_kept(reference_model: PreTrainedModel) -> None:
    for mode in (True, False):
        reference_model.train(mode)
        score_sequences(reference_model, [([1], [2])], token_budget=10, show_progress=False)
        assert reference_model.training is mode


@pytest.mark.parametrize(("sequence", "part"), [(([], [1]), "prompt"), (([1], []), "completion")])
def test_empty_sequences_are_refused(sequence: tuple[list[int], list[int]], part: str) -> None:
    with pytest.raises(InputError, match=f"sequence 1 has a {part} without tokens"):
        build_batch([([1], [2]), sequence])


def test_no_sequences_no_scores(reference_model: PreTrainedModel) -> None:
    assert score_sequences(reference_model, [], token_budget=10, show_progress=False).shape == (0,)
