import json
import multiprocessing
import os

import pytest

from pipeline.contracts.artifacts import (
    Manifest,
    artifact_faults,
    atomic_write_bytes,
    begin_step,
    checkpoint_sha256,
    content_sha256,
    file_sha256,
    is_complete,
    read_json,
    read_manifest,
    require_writable,
    run_lock,
    verify_artifact,
    write_json,
    write_manifest,
)
from pipeline.contracts.errors import CorruptArtifactError, InputError, RunLockedError, StaleArtifactError


def manifest(**changes):
    fields = {
        "step": "sample",
        "run": "r",
        "settings": {"seed": 0},
        "inputs": {"reference": "abc"},
        "files": {"a": "1"},
    }
    return Manifest(**{**fields, **changes})


def test_a_step_is_complete_only_once_its_manifest_is_there(tmp_path):
    assert not is_complete(tmp_path)
    with pytest.raises(CorruptArtifactError, match="has not finished"):
        read_manifest(tmp_path)
    write_manifest(tmp_path, manifest())
    assert is_complete(tmp_path)
    assert read_manifest(tmp_path) == manifest()


def test_identity_depends_on_content_and_not_on_circumstances():
    assert manifest(wall_seconds=1.0, environment={"numpy": "1"}, run="other").identity == manifest().identity
    for change in (
        {"settings": {"seed": 1}},
        {"inputs": {"reference": "abd"}},
        {"files": {"a": "2"}},
        {"step": "score"},
    ):
        assert manifest(**change).identity != manifest().identity


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "holds list"),
        ('{"step": "x"}', "not a manifest"),
        ('{"surprise": 1}', "not a manifest"),
    ],
)
def test_a_damaged_manifest_is_named(tmp_path, text, message):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(CorruptArtifactError, match=message):
        read_manifest(tmp_path)


def test_an_altered_manifest_is_refused(tmp_path):
    write_manifest(tmp_path, manifest())
    record = json.loads((tmp_path / "manifest.json").read_text())
    record["settings"]["seed"] = 7
    (tmp_path / "manifest.json").write_text(json.dumps(record))
    with pytest.raises(CorruptArtifactError, match="was altered"):
        read_manifest(tmp_path)


def test_begin_step_accepts_the_same_and_names_every_difference(tmp_path):
    begin_step(tmp_path, settings={"seed": 0, "model": {"dtype": "float32"}}, inputs={"x": "1"}, remedy="use --redo")
    begin_step(tmp_path, settings={"model": {"dtype": "float32"}, "seed": 0}, inputs={"x": "1"}, remedy="use --redo")
    with pytest.raises(StaleArtifactError) as caught:
        begin_step(
            tmp_path, settings={"seed": 1, "model": {"dtype": "bfloat16"}}, inputs={"x": "2"}, remedy="use --redo"
        )
    for text in (
        "seed: 0 then, 1 now",
        'model.dtype: "float32" then, "bfloat16" now',
        'inputs.x: "1" then',
        "use --redo",
    ):
        assert text in str(caught.value)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    target = tmp_path / "dual.json"
    atomic_write_bytes(target, b"old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(InputError, match=r"dual.json cannot be written: No space left"):
        atomic_write_bytes(target, b"new")
    assert target.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["dual.json"]


def test_json_refuses_nan(tmp_path):
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(tmp_path / "a.json", {"value": float("nan")})
    assert not (tmp_path / "a.json").exists()


def test_read_json_names_the_file(tmp_path):
    with pytest.raises(CorruptArtifactError, match=r"missing\.json cannot be read"):
        read_json(tmp_path / "missing.json")


def test_content_hash_ignores_key_order():
    assert content_sha256({"a": 1, "b": [2]}) == content_sha256({"b": [2], "a": 1})


def test_checkpoint_hash_sees_weights_tokenizer_and_template_but_not_the_card(tmp_path):
    for name in ("model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja", "README.md"):
        (tmp_path / name).write_text(name)
    before = checkpoint_sha256(tmp_path)
    (tmp_path / "README.md").write_text("another card")
    assert checkpoint_sha256(tmp_path) == before
    for name in ("model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"):
        (tmp_path / name).write_text("changed")
        after = checkpoint_sha256(tmp_path)
        assert after != before
        before = after


def _hold(folder, ready, release):
    with run_lock(folder):
        ready.set()
        release.wait(30)


def test_a_second_process_on_a_run_is_refused_and_a_killed_one_leaves_no_lock(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, release = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(tmp_path, ready, release))
    process.start()
    assert ready.wait(30)
    with pytest.raises(RunLockedError, match=f"pid {process.pid}"), run_lock(tmp_path):
        pass
    process.kill()
    process.join(30)
    with run_lock(tmp_path):
        pass


def test_an_output_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"the output folder .*file/run cannot be written"):
        require_writable(tmp_path / "file" / "run")


def write_artifact(folder, **files):
    for name, text in files.items():
        (folder / name).write_text(text)
    hashes = {name: file_sha256(folder / name) for name in files}
    write_manifest(folder, manifest(files=hashes, counts={"rows": 3}))


def test_files_are_compared_with_their_manifest(tmp_path):
    write_artifact(tmp_path, a="one", b="two")
    assert verify_artifact(tmp_path).count("rows") == 3
    (tmp_path / "b").write_text("owt")
    with pytest.raises(CorruptArtifactError, match=r"b is not the file that .*manifest\.json records"):
        verify_artifact(tmp_path)
    (tmp_path / "b").unlink()
    with pytest.raises(CorruptArtifactError, match=r"b cannot be read: No such file.*manifest\.json records it"):
        verify_artifact(tmp_path)


def test_some_files_alone_are_compared(tmp_path):
    write_artifact(tmp_path, a="one", b="two")
    (tmp_path / "b").write_text("owt")
    verify_artifact(tmp_path, only=["a"])
    with pytest.raises(CorruptArtifactError, match=r"b is not the file"):
        verify_artifact(tmp_path, only=["b"])
    with pytest.raises(CorruptArtifactError, match=r"manifest\.json does not record c"):
        verify_artifact(tmp_path, only=["c"])


def test_every_fault_is_told_to_who_asks_for_all(tmp_path):
    write_artifact(tmp_path, a="one", b="two", c="three")
    (tmp_path / "a").unlink()
    (tmp_path / "c").write_text("eerht")
    faults = list(artifact_faults(tmp_path, read_manifest(tmp_path)))
    assert [fault.split()[0] for fault in faults] == [str(tmp_path / name) for name in ("a", "c")]


def test_what_was_found_right_is_remembered_by_size_and_time(tmp_path, monkeypatch):
    folder, memory = tmp_path / "step", tmp_path / "verified.json"
    folder.mkdir()
    write_artifact(folder, a="one")
    verify_artifact(folder, memory=memory)
    monkeypatch.setattr("pipeline.contracts.artifacts.file_sha256", lambda path: pytest.fail(f"read again: {path}"))
    verify_artifact(folder, memory=memory)
    monkeypatch.undo()
    (folder / "a").write_text("two")
    with pytest.raises(CorruptArtifactError, match="is not the file"):
        verify_artifact(folder, memory=memory)
    memory.write_text("{")
    with pytest.raises(CorruptArtifactError, match="is not the file"):
        verify_artifact(folder, memory=memory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": []}, r"`settings` is \[\]; it must be an object"),
        ({"files": {"a": 1}}, r"`files\.a` is 1; it must be a text"),
        ({"files": {"../a": "1"}}, r"`files\.\.\./a` is outside of the folder"),
        ({"inputs": None}, r"`inputs` is None; it must be an object"),
        ({"counts": {"rows": "3"}}, r"`counts\.rows` is '3'; it must be an integer"),
        ({"counts": {"rows": True}}, r"`counts\.rows` is True; it must be an integer"),
        ({"wall_seconds": "1"}, r"`wall_seconds` is '1'; it must be a number"),
        ({"step": 7}, r"`step` is 7; it must be a text"),
        ({"surprise": 1}, r"`surprise` is unknown"),
    ],
)
def test_a_manifest_of_wrong_types_is_no_manifest(change, message, tmp_path):
    write_artifact(tmp_path, a="one")
    record = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**record, **change}))
    with pytest.raises(CorruptArtifactError, match=r"manifest\.json is not a manifest: " + message):
        read_manifest(tmp_path)


def test_a_count_that_is_missing_is_said(tmp_path):
    write_artifact(tmp_path, a="one")
    with pytest.raises(CorruptArtifactError, match="the manifest of the step `sample` has no count `failed`"):
        read_manifest(tmp_path).count("failed")
