"""Freed memory is kept, as the faults of a process that frees it show."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

_MADE_AND_FREED = """
import resource
import numpy as np
from pipeline.contracts.allocator import keep_freed_memory
{call}
for _ in range(50):
    blocks = [np.ones(1 << 20) for _ in range(5)]  # of 8 MiB, 2048 pages each
    del blocks
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


def _faults(call: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", _MADE_AND_FREED.format(call=call)], check=True, capture_output=True, text=True
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library is left as it is")
def test_what_is_made_and_freed_again_and_again_is_not_handed_back_each_time() -> None:
    assert _faults("keep_freed_memory()") < _faults("") / 3
