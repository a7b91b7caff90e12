"""A cluster that is started here is nobody else's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_LISTENERS = """
import os, psutil
from stage1_dual.ray_cluster import connect
connect("local", local_cpus=1)
import ray
assert ray.get(ray.remote(lambda: 3).remote()) == 3
own = {os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))}
open_to = [
    one.laddr.ip for one in psutil.net_connections("tcp") if one.status == psutil.CONN_LISTEN and one.pid in own
]
assert len(open_to) > 3, open_to
print(sorted(set(open_to)), os.environ["RAY_USAGE_STATS_ENABLED"])
"""


def test_a_cluster_that_is_started_here_listens_on_loopback() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _LISTENERS],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found, usage = done.stdout.strip().splitlines()[-1].rsplit(" ", 1)
    assert usage == "0"
    assert all(address.removeprefix("::ffff:").startswith("127.") for address in eval(found))  # its repr
