from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.tiny_models import save_tiny_classifier, save_tiny_policy

from pipeline.contracts.errors import InputError
from stage1_dual.checkpoints import check_policy_checkpoint, check_scorer_checkpoint


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    return save_tiny_policy(tmp_path / "policy")


@pytest.fixture
def scorer(tmp_path: Path) -> Path:
    return save_tiny_classifier(tmp_path / "scorer", labels=3)


def drop_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config.pop("chat_template", None)
    path.write_text(json.dumps(config))


def drop(pattern: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        for path in folder.glob(pattern):
            path.unlink()

    return apply


def spoil_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


DAMAGE = [
    (drop("config.json"), "has no config.json"),
    (spoil_config, "config.json cannot be read as JSON"),
    (drop("*.safetensors"), "has no .*safetensors"),
    (drop("tokenizer.json"), "has no tokenizer"),
    (drop_template, "has no chat template"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_a_damaged_policy_is_refused(policy: Path, damage: Callable[[Path], None], message: str) -> None:
    check_policy_checkpoint(str(policy))
    damage(policy)
    with pytest.raises(InputError, match=message):
        check_policy_checkpoint(str(policy))


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_a_damaged_scorer_is_refused(scorer: Path, damage: Callable[[Path], None], message: str) -> None:
    check_scorer_checkpoint(str(scorer), head=2, template=None)
    damage(scorer)
    with pytest.raises(InputError, match=message):
        check_scorer_checkpoint(str(scorer), head=2, template=None)


def test_a_template_of_its_own_does_without_the_tokenizers(scorer: Path) -> None:
    drop_template(scorer)
    check_scorer_checkpoint(str(scorer), head=0, template="{prompt} {completion}")


def test_policy_and_scorer_are_not_mistaken_for_each_other(policy: Path, scorer: Path) -> None:
    with pytest.raises(InputError, match=r"not a causal language model.*LlamaForSequenceClassification"):
        check_policy_checkpoint(str(scorer))
    with pytest.raises(InputError, match=r"not a sequence classifier.*LlamaForCausalLM"):
        check_scorer_checkpoint(str(policy), head=0, template=None)


@pytest.mark.parametrize(("labels", "head", "rule"), [(1, 1, "0 and 0"), (2, 2, "0 and 1"), (3, -1, "0 and 2")])
def test_a_head_out_of_range_is_refused(tmp_path: Path, labels: int, head: int, rule: str) -> None:
    folder = save_tiny_classifier(tmp_path, labels=labels)
    with pytest.raises(InputError, match=rf"no head {head}: num_labels is {labels}.*between {rule}"):
        check_scorer_checkpoint(str(folder), head=head, template=None)
    check_scorer_checkpoint(str(folder), head=labels - 1, template=None)


@pytest.mark.parametrize(
    ("checkpoint", "revision", "message"),
    [
        ("no/such/folder", None, "no such folder$"),
        ("no/such/folder", "main", "no such folder$"),
        ("models/policy", None, "no such folder.*Hub, give its `revision`"),
        ("", None, "no such folder"),
    ],
)
def test_a_path_that_is_not_there_is_refused(checkpoint: str, revision: str | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_policy_checkpoint(checkpoint, revision=revision)
    with pytest.raises(InputError, match=message):
        check_scorer_checkpoint(checkpoint, head=0, template=None, revision=revision)


def test_a_file_is_refused(policy: Path) -> None:
    with pytest.raises(InputError, match="is a file"):
        check_policy_checkpoint(str(policy / "config.json"))


def test_a_hub_id_with_a_revision_is_left_to_the_loader() -> None:
    check_policy_checkpoint("org/name", revision="0123abc")
    check_scorer_checkpoint("org/name", head=3, template=None, revision="0123abc")
