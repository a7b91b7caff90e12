"""Rewards that can be checked, as functions for scorers of the kind ``python``: an exact answer, and unit tests.

Each reads the reference from a column of the prompts, which ``prompts.info_columns`` and the scorer's ``info`` name.
They are also examples to copy: a run whose scores are to stay as they are under any version of this package uses a
copy beside its recipe.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import unicodedata
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from stage1_dual.scoring.protocol import ScoreRequest

_FENCE = re.compile(r"```[ \t]*(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)
_NUMBER = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)")


def exact_match(
    rows: Sequence[ScoreRequest], *, column: str = "answer", pattern: str | None = None
) -> list[float | None]:
    """1 where the answer of a response is the reference's, 0 where not, after :func:`normalise`.

    Args:
        rows: of the scorer.
        column: of ``row.info`` with the reference answer, a text or number, or a list of such of which any counts.
        pattern: a regular expression whose last match in the response holds the answer, in its first group or as a
            whole; without it the answer is the response's last line that is not empty. A response without a match has
            no answer, and 0.

    Returns:
        One number a row; None for a prompt without a reference answer, whose rows then fail.
    """
    values: list[float | None] = []
    for row in rows:
        reference = row.info.get(column)
        if reference is None or reference == []:
            values.append(None)
            continue
        accepted = {normalise(str(one)) for one in (reference if isinstance(reference, list) else [reference])}
        answer = _answer(row.completion, pattern)
        values.append(float(answer is not None and normalise(answer) in accepted))
    return values


def normalise(text: str) -> str:
    """A text as answers are compared: Unicode NFKC, case folded, blanks as one, without the marks around it.

    A number loses its thousands commas, a sign ``+`` and what does not change its value: ``1,250.0`` is ``1250``.
    """
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split()).strip(" .,;:!?\"'`*$()[]{}")
    number = text.replace(",", "")
    if _NUMBER.fullmatch(number):
        whole, _, decimals = number.lstrip("+").partition(".")
        decimals = decimals.rstrip("0")
        sign = "-" if whole.startswith("-") else ""
        whole = whole.lstrip("-").lstrip("0") or "0"
        return f"{sign if (whole, decimals) != ('0', '') else ''}{whole}{'.' if decimals else ''}{decimals}"
    return text


def _answer(completion: str, pattern: str | None) -> str | None:
    if pattern is None:
        return next((line for line in reversed(completion.splitlines()) if line.strip()), "")
    found = list(re.finditer(pattern, completion))
    if not found:
        return None
    return found[-1][1] if found[-1].re.groups else found[-1][0]


def unit_tests(
    rows: Sequence[ScoreRequest],
    *,
    column: str = "tests",
    seconds: float = 5.0,
    memory_mb: int = 512,
    processes: int = 2,
) -> list[float | None]:
    """1 where the Python code of a response passes the prompt's tests, 0 where it does not.

    The code (of the last fenced block, or the whole response) and the tests behind it, such as ``assert add(1, 2) ==
    3``, run as one program in a process of their own: isolated from this interpreter's paths and variables, in an
    empty folder that is removed, with limits on time, memory, files and processes. That keeps accidents in; it is no
    sandbox against code that means harm, which needs a container or a virtual machine without a network.

    Args:
        rows: of the scorer.
        column: of ``row.info`` with the tests, a text or a list of texts.
        seconds: of computing, and twice as many by the clock.
        memory_mb: address space, megabytes.
        processes: programs that run at the same time.

    Returns:
        One number a row; None for a prompt without tests, whose rows then fail.
    """

    def passed(row: ScoreRequest) -> float | None:
        tests = row.info.get(column)
        if not tests:
            return None
        blocks = _FENCE.findall(row.completion)
        code = blocks[-1] if blocks else row.completion
        return float(
            _runs(f"{code}\n\n{tests if isinstance(tests, str) else chr(10).join(tests)}\n", seconds, memory_mb)
        )

    with ThreadPoolExecutor(max_workers=processes) as pool:
        return list(pool.map(passed, rows))


# The last thing that the program does. Code that ends the process early, with exit code 0, does not get there.
_DONE = "\nimport os as _os\n_os.write({descriptor}, b'{word}')\n"


def _runs(program: str, seconds: float, memory_mb: int) -> bool:
    """Whether a program comes to its end without an error, within limits."""
    word = os.urandom(16).hex()
    read, write = os.pipe()
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "program.py"
            try:
                path.write_text(program + _DONE.format(descriptor=write, word=word), encoding="utf-8")
            except UnicodeEncodeError:
                return False
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _LIMITED, str(path), str(seconds), str(memory_mb)],
                cwd=folder,
                env={"PATH": os.defpath},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(write,),
                start_new_session=True,
            )
            os.close(write)
            write = -1
            try:
                code = process.wait(timeout=2 * seconds)
            except subprocess.TimeoutExpired:
                code = -1
            finally:
                _kill(process)
            os.set_blocking(read, False)
            try:
                said = os.read(read, 64)
            except BlockingIOError:
                said = b""
            return code == 0 and said == word.encode()
    finally:
        os.close(read)
        if write >= 0:
            os.close(write)


# Limits are set by the process itself, before it reads the program: a fork of this one, with its threads, need not run
# Python of ours.
_LIMITED = """
import resource, runpy, sys
path, seconds, megabytes = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
for what, most in (
    (resource.RLIMIT_CPU, max(1, round(seconds))),
    (resource.RLIMIT_AS, megabytes * 2**20),
    (resource.RLIMIT_FSIZE, 2**20),
    (resource.RLIMIT_CORE, 0),
):
    resource.setrlimit(what, (most, most))
sys.argv = [path]
runpy.run_path(path, run_name="__main__")
"""


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
