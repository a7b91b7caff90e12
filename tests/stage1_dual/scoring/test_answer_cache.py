from __future__ import annotations

import threading
from pathlib import Path

import pytest

from pipeline.contracts.errors import InputError
from stage1_dual.scoring.answer_cache import AnswerCache


def test_what_several_threads_and_processes_kept_is_read_again(tmp_path: Path) -> None:
    first, second = AnswerCache(tmp_path / "answers"), AnswerCache(tmp_path / "answers")
    threads = [
        threading.Thread(target=cache.add, args=(f"{name}{k}", {"text": f"{k} \u2028 \ud800 ü\n"}))
        for name, cache in (("a", first), ("b", second))
        for k in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first.close()
    second.close()
    found = AnswerCache(tmp_path / "answers")
    assert len(found) == 40
    assert found.get("b7") == {"text": "7 \u2028 \ud800 ü\n"}
    assert found.get("c") is None
    assert len(list((tmp_path / "answers").iterdir())) == 2, "a process that asked nothing leaves no file"


def test_a_line_that_a_kill_cut_is_passed_over(tmp_path: Path) -> None:
    cache = AnswerCache(tmp_path)
    for k in range(3):
        cache.add(str(k), {"text": "4"})
    cache.close()
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-9])
    found = AnswerCache(tmp_path)
    assert [found.get(str(k)) for k in range(3)] == [{"text": "4"}, {"text": "4"}, None]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be read or made"):
        AnswerCache(tmp_path / "file" / "answers")
