"""The estimates against sums done by hand."""

import pytest

from pipeline.planning.estimates import (
    DEVICES,
    Size,
    adapter_parameters,
    draw,
    kv_bytes_per_token,
    policy_bytes,
    read,
    scoring_bytes,
    sequences_at_once,
    stored_bytes,
    table_bytes,
    train,
    training_bytes,
)

SEVEN_B = Size(parameters=7_000_000_000, layers=32, hidden=4096, kv_width=4096, intermediate=11008)
CONSUMER, WORKSTATION, ACCELERATOR = DEVICES


def test_time_is_flops_over_rate():
    # 1e6 tokens · 2 · 7e9 FLOPs / (312e12 · 0.15) and / (312e12 · 0.3)
    work = draw("sample", tokens=1e6, parameters=7_000_000_000, dtype="bfloat16")
    assert work.seconds(ACCELERATOR) == pytest.approx(299.145, abs=1e-3)
    work = read("score", tokens=1e6, parameters=7_000_000_000, dtype="bfloat16")
    assert work.seconds(ACCELERATOR) == pytest.approx(149.573, abs=1e-3)
    # 6N, 4N and 4N + 2N at 165e12 · 0.3
    for adapter, recomputes, flops in ((False, False, 6), (True, False, 4), (True, True, 6), (False, True, 8)):
        work = train("t", tokens=1e6, parameters=10**9, dtype="bfloat16", adapter=adapter, recomputes=recomputes)
        assert work.seconds(CONSUMER) == pytest.approx(flops * 1e15 / 49.5e12)
    assert read("s", tokens=1, parameters=1, dtype="float32").seconds(ACCELERATOR) == pytest.approx(2 / 5.85e12)


def test_no_model_is_so_small_that_drawing_costs_nothing():
    work = draw("sample", tokens=1e6, parameters=1000, dtype="float32")
    assert work.seconds(CONSUMER) == 100.0  # 10,000 tokens a second


def test_the_cache_and_what_fits_beside_the_weights():
    assert kv_bytes_per_token(SEVEN_B, "bfloat16") == 2 * 32 * 4096 * 2 == 524_288
    assert kv_bytes_per_token(Size(10), "bfloat16") is None
    # 0.9 · 24 GB − 14 GB = 7.6 GB; a sequence of 612 tokens takes 0.3209 GB: 23 of them
    fits = {"share": 0.9, "tokens": 612, "at_most": 256}
    assert sequences_at_once(SEVEN_B, "bfloat16", device=CONSUMER, **fits) == 23
    assert sequences_at_once(SEVEN_B, "float32", device=CONSUMER, **fits) == 0  # 28 GB of weights
    assert sequences_at_once(SEVEN_B, "bfloat16", device=ACCELERATOR, share=0.9, tokens=612, at_most=64) == 64
    assert sequences_at_once(Size(10), "bfloat16", device=CONSUMER, **fits) is None


def test_memory_of_scoring():
    # 14 GB, and 4 · 4096 tokens of half a megabyte
    assert scoring_bytes([SEVEN_B], "bfloat16", batch_tokens=4096) == 14_000_000_000 + 16384 * 524_288
    encoder = Size(1000, 2, 8, 8, 16, decoder=False)
    assert scoring_bytes([encoder, encoder], "float32", batch_tokens=4096) == 8000
    assert scoring_bytes([Size(10)], "float32", batch_tokens=1) is None


def test_weights_of_an_adapter():
    # rank 8, 32 layers: q, k and v are 4096 × 4096
    assert adapter_parameters(SEVEN_B, rank=8, modules=["q_proj", "k_proj", "v_proj"]) == 6_291_456
    # all seven: four of 8192, three of 15104
    assert adapter_parameters(SEVEN_B, rank=16, modules="all-linear") == 32 * 16 * (4 * 8192 + 3 * 15104) == 39_976_960
    assert adapter_parameters(SEVEN_B, rank=8, modules="v_proj") == 32 * 8 * 8192
    last = adapter_parameters(SEVEN_B, rank=8, modules=r".*\.layers\.(30|31)\..*v_proj")
    assert last == 2 * 8 * 8192
    assert adapter_parameters(SEVEN_B, rank=8, modules="no such layer") is None
    assert adapter_parameters(SEVEN_B, rank=8, modules=["c_attn"]) is None
    assert adapter_parameters(Size(10), rank=8, modules="all-linear") is None


@pytest.mark.parametrize(
    ("dtype", "adapter", "trained", "recomputes", "expected"),
    [
        # 16 · 1e6, and 2 layers · 34 · 10 tokens · 100, and 12 · 2^25
        ("bfloat16", "none", 10**6, False, 16e6 + 2 * 34_000 + 402_653_184),
        ("float32", "none", 10**6, False, 16e6 + 2 * 68_000 + 402_653_184),
        # 2 · 1e6 fixed, 16 · 1000 trained; two inputs of 2 · 10 · 100 bytes and one layer
        ("bfloat16", "lora", 1000, True, 2e6 + 16e3 + 4000 + 34_000 + 402_653_184),
        ("bfloat16", "qlora", 1000, True, 0.55e6 + 16e3 + 4000 + 34_000 + 402_653_184),
    ],
)
def test_memory_of_training(dtype, adapter, trained, recomputes, expected):
    size = Size(parameters=10**6, layers=2, hidden=100, kv_width=100, intermediate=200)
    needed = training_bytes(size, dtype=dtype, adapter=adapter, trained=trained, microbatch=10, recomputes=recomputes)
    assert needed == expected
    unknown = training_bytes(
        Size(10**6), dtype=dtype, adapter=adapter, trained=trained, microbatch=10, recomputes=recomputes
    )
    assert unknown is None


def test_disk():
    # A row of docs/howto/gpus.md: 128,000 responses of 256 tokens, 2 scores: 0.2 GB
    assert table_bytes(tokens=32.8e6, rows=128_000, n_scorers=2) == pytest.approx(0.208e9, rel=1e-3)
    assert policy_bytes(Size(10**9), trained=10**9) == 28e9
    assert policy_bytes(Size(10**9), trained=10**6) == 4.024e9
    assert (stored_bytes(Size(7 * 10**9)), stored_bytes(Size(10**8))) == (14e9, 4e8)
