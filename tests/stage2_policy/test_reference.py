from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from helpers.train_settings import changed
from helpers.training_responses import keys_of
from transformers import PreTrainedModel

from pipeline.contracts.artifacts import content_sha256, read_manifest, write_manifest
from pipeline.contracts.errors import CorruptArtifactError
from stage2_policy import reference
from stage2_policy.data import TrainingData, read_training_data
from stage2_policy.logprobs import score_sequences
from stage2_policy.reference import ReferenceStore, reference_store, score_reference
from stage2_policy.settings import TrainSettings

pytestmark = pytest.mark.slow

SETTINGS = TrainSettings(held_out_fraction=0.25)


class Unused(torch.nn.Module):
    """A model that must not be asked."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, **_: Any) -> None:
        raise AssertionError


@pytest.fixture
def data(stage_one: Any) -> TrainingData:
    return read_training_data(**vars(stage_one), held_out_fraction=0.25)


@pytest.fixture
def store(data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ReferenceStore:
    monkeypatch.setattr(reference, "_SHARD_ROWS", 10)
    return reference_store(tmp_path / "mine" / "reference_logp", data, SETTINGS)


def score(
    model: torch.nn.Module, data: TrainingData, store: ReferenceStore | None, **change: Any
) -> reference.ReferenceLogp:
    return score_reference(model, data, settings=changed(SETTINGS, **change), show_progress=False, store=store)


def test_values_are_computed_once(reference_model: PreTrainedModel, data: TrainingData, store: ReferenceStore) -> None:
    first = score(reference_model, data, store)
    again = score(Unused(), data, store)
    alone = score_reference(reference_model, data, settings=SETTINGS, show_progress=False)

    for name in ("train", "held_out"):
        exact = score_sequences(reference_model, getattr(data, name).sequences, token_budget=999, show_progress=False)
        np.testing.assert_array_equal(getattr(again, name), getattr(first, name))
        np.testing.assert_allclose(getattr(first, name), exact, atol=1e-4)
        np.testing.assert_allclose(getattr(alone, name), exact, atol=1e-4)
    manifest = read_manifest(store.table)
    assert manifest.counts == {"rows": 55}
    assert manifest.run == "mine"
    assert len(manifest.files) > 4


def test_runs_that_train_at_the_same_time_compute_them_once(
    reference_model: PreTrainedModel, data: TrainingData, store: ReferenceStore
) -> None:
    fed = []
    handle = reference_model.register_forward_pre_hook(
        lambda _, __, inputs: fed.append(len(inputs["input_ids"])), with_kwargs=True
    )
    alone = score(reference_model, data, None)
    once, fed[:] = sum(fed), []
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda _: score(reference_model, data, store), range(4)))
    handle.remove()

    assert sum(fed) <= once + 10  # shards cut the rows elsewhere
    for values in together:
        np.testing.assert_allclose(values.train, alone.train, atol=1e-4)
        np.testing.assert_array_equal(values.held_out, together[0].held_out)


def test_another_share_of_held_out_prompts_reads_the_same_table(
    reference_model: PreTrainedModel, data: TrainingData, store: ReferenceStore, stage_one: Any
) -> None:
    score(reference_model, data, store)
    other = read_training_data(**vars(stage_one), held_out_fraction=0.5)
    settings = changed(SETTINGS, held_out_fraction=0.5)
    assert reference_store(store.folder, other, settings).table == store.table

    again = score_reference(Unused(), other, settings=settings, show_progress=False, store=store)
    assert len(again.train) == len(other.train) != len(data.train)


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "bfloat16"},
        {"adapter": "qlora"},
        {"objective": "tilted_nll"},
    ],
)
def test_what_changes_values_or_rows_has_its_own_table(
    change: dict[str, Any], data: TrainingData, store: ReferenceStore
) -> None:
    assert reference_store(store.folder, data, changed(SETTINGS, **change)).table != store.table


def test_a_table_of_an_earlier_version_is_found(data: TrainingData) -> None:
    """Its folder is named by the hash of all keys as one list of JSON."""
    of_pairs = replace(data, train=replace(data.train, prompt_ids=(data.train.prompt_ids[0],) * 6))
    for one in (data, of_pairs):
        keys = sorted([*keys_of(one.train), *keys_of(one.held_out)])
        assert reference_store(Path(), one, SETTINGS).key["responses"] == content_sha256(keys)


@pytest.mark.parametrize("name", ["reference", "samples"])
def test_another_model_or_other_samples_have_their_own_table(
    name: str, data: TrainingData, store: ReferenceStore
) -> None:
    other = replace(data, identities={**data.identities, name: "0" * 64})
    assert reference_store(store.folder, other, SETTINGS).table != store.table


def test_a_killed_run_computes_only_what_is_not_there(
    reference_model: PreTrainedModel, data: TrainingData, store: ReferenceStore
) -> None:
    whole = score(reference_model, data, store)
    (store.table / "manifest.json").unlink()
    lost = sorted((store.table / "data").glob("train-*"))[2]
    lost.unlink()
    fed = []
    handle = reference_model.register_forward_pre_hook(
        lambda _, __, inputs: fed.append(len(inputs["input_ids"])), with_kwargs=True
    )
    again = score(reference_model, data, store)
    handle.remove()

    np.testing.assert_allclose(again.train, whole.train, atol=1e-5)
    assert 0 < sum(fed) <= 20  # ten rows and their prompts


def test_what_a_killed_run_left_serves_another_share_of_held_out_prompts(
    reference_model: PreTrainedModel, data: TrainingData, store: ReferenceStore, stage_one: Any
) -> None:
    score(reference_model, data, store)
    (store.table / "manifest.json").unlink()
    sorted((store.table / "data").glob("train-*"))[2].unlink()
    other = read_training_data(**vars(stage_one), held_out_fraction=0.6)

    found = score(reference_model, other, store)
    rows = reference._table(store).read("train")
    assert rows.num_rows == len(found.train) + len(found.held_out)
    np.testing.assert_allclose(found.train, score(reference_model, other, None).train, atol=1e-5)


def rewrite(store: ReferenceStore, change: Any) -> None:
    """Put another table in place of the stored one, with a manifest that knows it."""
    table = reference._table(store)
    rows = change(table.read("train"))
    for path in table.paths("train"):
        path.unlink()
    table.write_shard(rows, split="train", order="0")
    write_manifest(store.table, replace(read_manifest(store.table), files=table.finish()))


def test_missing_rows_and_nan_are_named(
    reference_model: PreTrainedModel, data: TrainingData, store: ReferenceStore
) -> None:
    score(reference_model, data, store)
    rewrite(store, lambda rows: rows.filter(pa.compute.not_equal(rows["prompt_id"], data.train.prompt_ids[1])))
    lacking = rf"lacks \d+ of \d+ responses.*first: \('{data.train.prompt_ids[1]}'"
    with pytest.raises(CorruptArtifactError, match=lacking):
        score(reference_model, data, store)

    rewrite(store, lambda rows: rows.set_column(2, "ref_logp", pa.array([np.nan] * len(rows))))
    with pytest.raises(CorruptArtifactError, match="log-probability that is not finite"):
        score(reference_model, data, store)


def test_a_damaged_table_is_refused(
    reference_model: PreTrainedModel, data: TrainingData, store: ReferenceStore
) -> None:
    score(reference_model, data, store)
    path = next((store.table / "data").iterdir())
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CorruptArtifactError, match=r"is not the file that .*manifest\.json records .*Remove "):
        score(reference_model, data, store)
