import pyarrow as pa
import pytest

from pipeline.contracts.errors import InputError
from pipeline.contracts.tables import (
    SAMPLE_KEY,
    SAMPLES,
    SCORES,
    prompt_id,
    require_unique,
    tilted_schema,
    with_metadata,
)


def test_prompt_id_is_of_role_and_content_only():
    messages = [{"role": "user", "content": "hé"}]
    assert prompt_id(messages) == prompt_id([{"content": "hé", "role": "user", "extra": "x"}])
    assert prompt_id(messages) != prompt_id([{"role": "system", "content": "hé"}])
    assert len(prompt_id(messages)) == 64
    for wrong in ([], [{"role": "user"}], [{"role": "user", "content": None}]):
        with pytest.raises(InputError, match="prompt"):
            prompt_id(wrong)


def test_require_unique_names_the_first():
    with pytest.raises(InputError, match="1 repeated \\(first: b\\)"):
        require_unique(["a", "b", "b"], what="keys")


def test_samples_and_scores_share_their_key():
    for schema in (SAMPLES, SCORES, tilted_schema(["harmless"])):
        assert all(schema.field(name) == SAMPLES.field(name) for name in SAMPLE_KEY)


def test_the_hand_off_has_a_column_for_each_constraint_and_no_nulls():
    schema = tilted_schema(["harmless", "toxic"])
    assert [name for name in schema.names if name.startswith("constraint_")] == [
        "constraint_harmless",
        "constraint_toxic",
    ]
    assert schema.field("constraint_toxic").type == pa.float64()
    assert not any(field.nullable for field in schema)


def test_metadata_is_named_and_versioned():
    assert with_metadata(SCORES, {"run": "mine"}).metadata == {
        b"dualign.schema_version": b"1",
        b"dualign.run": b"mine",
    }
