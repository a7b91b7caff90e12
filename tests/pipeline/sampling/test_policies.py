"""Which checkpoints of a run are sampled from, and by which text of a template."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.tiny_models import save_tiny_policy
from helpers.written_runs import written_run

from pipeline.config.loading import load_config
from pipeline.contracts.errors import InputError
from pipeline.run.run import Run
from pipeline.sampling.policies import reference_policy, render_for, template_text, trained_policy
from stage1_dual.sampling.rendering import load_tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    save_tiny_policy(folder)
    return folder


def _run(tmp_path: Path, checkpoint: Path, **reference: str) -> Run:
    overrides = {"reference.model": str(checkpoint), **{f"reference.{k}": v for k, v in reference.items()}}
    return written_run(tmp_path, load_config(Path("embedded"), overrides))


def test_the_reference_is_that_of_the_recipe_as_it_is_loaded(tmp_path, checkpoint):
    policy = reference_policy(_run(tmp_path, checkpoint, quantization="fp8"))
    assert (policy.role, policy.folder, policy.quantization) == ("reference", str(checkpoint), "fp8")


def test_the_trained_policy_is_the_runs_own_and_whole(tmp_path, checkpoint, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = _run(Path("data"), checkpoint, quantization="fp8")
    policy = trained_policy(run)
    assert (policy.role, policy.quantization) == ("policy", None)
    # Workers of a cluster have another current folder.
    assert policy.folder == str(tmp_path / "data" / "runs" / "written" / "policy")


def test_prompts_are_read_by_the_template_of_the_recipe_and_those_without_room_are_named(tmp_path, checkpoint):
    run = _run(tmp_path, checkpoint, template="'USER: {prompt} ASSISTANT:'")
    asked = [("short", [{"role": "user", "content": "why"}]), ("long", [{"role": "user", "content": "why " * 300}])]
    rendered, unusable = render_for(run, reference_policy(run), load_tokenizer(str(checkpoint)), asked)
    assert [(prompt.prompt_id, prompt.text) for prompt in rendered] == [("short", "USER: why ASSISTANT:")]
    assert [failure.prompt_id for failure in unusable] == ["long"]


def test_a_template_stands_for_its_text_whether_it_is_a_file_or_not(tmp_path):
    path = tmp_path / "chat.jinja"
    path.write_text("{{ messages[0].content }}", encoding="utf-8")
    assert template_text(str(path)) == path.read_text(encoding="utf-8")
    path.write_text("another", encoding="utf-8")
    assert template_text(str(path)) == "another"
    assert template_text("USER: {prompt}") == "USER: {prompt}"
    assert template_text(None) is None
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"`reference\.template` is the file .*chat\.jinja, which cannot be read"):
        template_text(str(path))
