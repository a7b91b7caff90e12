"""The connection to a Ray cluster: one that runs, or one started on this machine for the time of the process."""

from __future__ import annotations

import os
import socket

import ray
from ray._private import services

from pipeline.contracts.errors import InputError
from pipeline.contracts.privacy import keep_private

LOCAL = "local"
_LOOPBACK = "127.0.0.1"
_ANSWER_SECONDS = 5.0


def connect(address: str, *, local_cpus: int | None = None) -> None:
    """Connect this process to a cluster, once.

    Args:
        address: ``auto``, ``HOST:PORT`` or ``ray://HOST:PORT`` of a running cluster; ``local`` starts one here.
        local_cpus: logical processors of a cluster started here; as many as there are where None.

    Raises:
        InputError: nobody answers at ``address``.
    """
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # its notes on restarts are not errors of ours
    keep_private()
    try:
        _require_listener(address)
        if address == LOCAL:
            _start_here(local_cpus)
        else:
            ray.init(address=address, log_to_driver=False, configure_logging=False)
    except (OSError, ValueError) as error:
        raise InputError(f"no Ray cluster answers at {address!r} ({error})") from error


def _start_here(cpus: int | None) -> None:
    """Start a cluster that nobody reaches from another machine.

    Ray listens on the loopback interface alone where that is the node's address, and takes any name of it for the
    machine's outer address: that look-up is answered here, while the cluster starts.
    """
    outer = services.get_node_ip_address
    services.get_node_ip_address = lambda *_, **__: _LOOPBACK
    try:
        ray.init(
            address=LOCAL,
            num_cpus=cpus,
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
            _node_ip_address=_LOOPBACK,
        )
    finally:
        services.get_node_ip_address = outer


def _require_listener(address: str) -> None:
    """Raise OSError unless something listens at HOST:PORT: Ray itself would try for two minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=_ANSWER_SECONDS).close()
