"""Where samplers and scorers of a run live: its processes and its accelerators."""

from __future__ import annotations

from pipeline.config.sections import ExecutionSettings
from pipeline.contracts.cores import usable_cores
from pipeline.run.run import Run
from stage1_dual.work import InProcess, WorkerPool


def build_execution(run: Run) -> WorkerPool:
    """The execution of the recipe."""
    settings = run.config.execution
    if settings.kind == "in_process":
        return InProcess()
    from stage1_dual.ray_actors import RayActors

    gpus = _gpus(settings, run.config.sampling.tensor_parallel_size)
    return RayActors(
        address=settings.address,
        min_actors=settings.min_actors,
        max_actors=settings.max_actors,
        gpus_per_actor=gpus,
        cpus_per_actor=settings.cpus_per_actor or _cpus(settings, gpus),
    )


def worker_device(run: Run) -> str:
    """The torch device of a sampler or scorer, where it lives."""
    settings = run.config.execution
    if settings.kind == "in_process":
        return local_device()
    return "cuda" if _gpus(settings, run.config.sampling.tensor_parallel_size) else "cpu"


def local_device() -> str:
    """The torch device of this process."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _cpus(settings: ExecutionSettings, gpus: float) -> float:
    if settings.address is not None or gpus:
        return 1.0
    return float(max(1, usable_cores() // settings.max_actors))


def _gpus(settings: ExecutionSettings, per_model: int) -> float:
    if settings.gpus_per_actor is not None:
        return settings.gpus_per_actor
    return float(per_model) if local_device() == "cuda" else 0.0
