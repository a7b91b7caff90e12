"""``dualign env``: versions and devices, for bug reports."""

from __future__ import annotations

from pipeline.contracts.artifacts import environment


def describe_environment() -> str:
    """Versions of what influences results, and the devices that torch sees, a line each."""
    versions = [f"{name:14} {value}" for name, value in environment().items()]
    return "\n".join([*versions, *_devices()])


def _devices() -> list[str]:
    try:
        import torch
    except ImportError:
        return ["torch is not installed: solve, frontier and report work, sample, score and train do not"]
    if not torch.cuda.is_available():
        return [f"{'devices':14} CPU only, {torch.get_num_threads()} threads"]
    return [
        f"{'device ' + str(index):14} {torch.cuda.get_device_name(index)}, "
        f"{torch.cuda.get_device_properties(index).total_memory / 2**30:.0f} GiB"
        for index in range(torch.cuda.device_count())
    ]
