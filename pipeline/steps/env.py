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
    except Exception as error:  # noqa: BLE001  # one that does not fit this machine raises whatever it meets
        absent = isinstance(error, ModuleNotFoundError) and error.name == "torch"
        state = "is not installed" if absent else f"is installed and cannot be loaded ({error})"
        return [f"torch {state}: solve, frontier and report work, sample, score and train do not"]
    if not torch.cuda.is_available():
        return [f"{'devices':14} CPU only, {torch.get_num_threads()} threads"]
    return [
        f"{'device ' + str(index):14} {torch.cuda.get_device_name(index)}, "
        f"{torch.cuda.get_device_properties(index).total_memory / 2**30:.0f} GiB"
        for index in range(torch.cuda.device_count())
    ]
