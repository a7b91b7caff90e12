"""A cluster that is started here is for this machine alone, and tells nobody of it."""

from __future__ import annotations

import ipaddress
import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

# In a process of its own: another test's cluster in this one would be taken instead.
_START = """
import json, os
import psutil, ray
from stage1_dual.ray_cluster import connect

connect("local", local_cpus=1)
worker = ray.get(ray.remote(lambda: os.environ.get("RAY_USAGE_STATS_ENABLED")).remote())
processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
ports = [
    (process.name(), port.laddr.ip)
    for process in processes
    for port in process.net_connections("inet")
    if port.status == psutil.CONN_LISTEN
]
print(json.dumps({"ports": ports, "worker": worker}))
ray.shutdown()
"""


def test_a_local_cluster_listens_to_this_machine_alone() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_USAGE_STATS_ENABLED"}
    done = subprocess.run(
        [sys.executable, "-c", _START], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert {"gcs_server", "raylet"} <= {name for name, _ in found["ports"]}
    for name, address in found["ports"]:
        ip = ipaddress.ip_address(address)
        assert (getattr(ip, "ipv4_mapped", None) or ip).is_loopback, (name, address)
    assert found["worker"] == "0"
