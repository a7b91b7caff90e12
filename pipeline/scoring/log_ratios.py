"""Log-probabilities of responses by the training stack: a policy's ratio to the reference, a check of the sampler."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from pipeline.contracts.errors import InputError
from pipeline.contracts.shards import ShardedTable, read_parquet
from pipeline.contracts.tables import SAMPLES, SPLITS, TOKEN_IDS
from pipeline.networks import load_network
from pipeline.run.execution import local_device
from pipeline.run.run import Run
from pipeline.scoring.joined import JoinedScores
from stage2_policy.token_sequences import TokenSequences

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_TOKEN_BUDGET = 16384


def log_ratios(run: Run, *, policy_samples: Path, rows: JoinedScores, split: str) -> np.ndarray:
    """Values of log pi_theta(y|x) - log pi_ref(y|x) on the policy's samples, nats, one for each of ``rows``.

    Both by the training stack in float32, on the sampled token ids: a sampler's own log-probabilities are never mixed
    with another arithmetic's in one ratio.
    """
    table = run.samples_table(policy_samples).read(split, columns=["prompt_id", "sample_index", *TOKEN_IDS])
    sequences = TokenSequences.of_table(table).select(rows.find_in(table)[0])
    logp = {
        "policy": _score(run, sequences, load_policy(str(run.policy), dtype="float32"), "policy"),
        "reference": _score(run, sequences, _load_reference(run, dtype="float32"), "reference"),
    }
    return np.asarray(logp["policy"] - logp["reference"])


def check_sampler_logp(run: Run, samples: ShardedTable) -> dict[str, float]:
    """Compare the sampler's log-probabilities of some samples with those of the training stack.

    They differ by rounding; where they differ by more, the sampled model is not the one that will be trained.

    Returns:
        ``rows``, and mean and largest absolute difference, nats a token.

    Raises:
        InputError: the mean difference is above ``sampling.logp_limit``.
    """
    settings = run.config.sampling
    table = _some_samples(samples, settings.logp_rows, seed=run.config.seed)
    sequences = TokenSequences.of_table(table)
    logp = _score(run, sequences, _load_reference(run, dtype=run.config.reference.dtype), "reference")
    difference = np.abs(table["sampler_logp"].to_numpy() - logp) / sequences.completion_length_n
    found = {"rows": table.num_rows, "mean": float(difference.mean()), "largest": float(difference.max())}
    if not found["mean"] <= settings.logp_limit:
        raise InputError(
            f"the sampler's log-probabilities differ from the training stack's by {found['mean']:.3g} nats a token "
            f"on average over {table.num_rows} samples (largest: {found['largest']:.3g}), more than "
            f"`sampling.logp_limit`, {settings.logp_limit:g}: what was sampled is not the model that will be trained "
            "(template, adapter, quantisation and revision are the usual causes)"
        )
    return found


def load_policy(model: str, *, dtype: str) -> PreTrainedModel:
    """A causal language model as the training stack computes with it, on this process's device.

    Raises:
        InputError: the model cannot be loaded, or a weight of it is missing, unexpected or of another shape.
    """
    import torch
    from transformers import AutoModelForCausalLM

    network = load_network(AutoModelForCausalLM, model, dtype=getattr(torch, dtype), what="the policy")
    on_device: PreTrainedModel = network.to(local_device())
    return on_device


def _load_reference(run: Run, *, dtype: str) -> PreTrainedModel:
    return load_policy(run.model(run.config.reference, "reference"), dtype=dtype)


def _score(run: Run, sequences: TokenSequences, network: PreTrainedModel, role: str) -> np.ndarray:
    from stage2_policy.logprobs import score_sequences

    return score_sequences(
        network,
        sequences,
        token_budget=_TOKEN_BUDGET,
        show_progress=run.show_progress,
        description=f"log-probabilities, {role}",
    )


def _some_samples(samples: ShardedTable, n_rows: int, *, seed: int) -> pa.Table:
    """Rows of a few files, chosen by the seed."""
    rng = np.random.default_rng(seed)
    paths = [path for split in SPLITS for path in samples.paths(split)]
    chosen = [paths[place] for place in sorted(rng.permutation(len(paths))[:4])]
    rows = pa.concat_tables(
        read_parquet(path, columns=[*TOKEN_IDS, "sampler_logp"], schema=SAMPLES) for path in chosen
    )
    return rows.take(np.sort(rng.permutation(rows.num_rows)[:n_rows]))
