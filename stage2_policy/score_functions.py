"""The score function of each response: the gradient of its log-probability in the weights B of a low-rank adapter.

An adapter adds B A x to what a layer makes of x, with A fixed at random and B = 0 at the reference. The gradient of
log pi(y|x) in B there is a sum over tokens of outer products, and all its entries together are the first-order
log-ratio to the reference that a change of B gives a response: log rho(y|x) = <gradient, change>, up to second order.

They are computed response by response in one pass, forward and backward, and kept in a file in bfloat16: of a few
thousand responses a few gigabytes. A killed pass goes on where its last part was written.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel

from pipeline.contracts.artifacts import read_json_object, write_json
from pipeline.contracts.errors import InputError
from pipeline.progress import progress_bar
from stage2_policy.data import TrainingResponses
from stage2_policy.logprobs import build_batch, iterate_budgeted, move_batch, sequence_logp

_ROWS_AT_ONCE = 256
"""Responses between two records of what is done: about a minute of a model of 135 million weights on two cores."""
_DONE = "done.json"
_FILE = "score_functions.bfloat16"


class AdapterWeights:
    """The weights B of an adapter as one vector, in the order of its modules.

    Args:
        model: a policy with an adapter.
    """

    def __init__(self, model: PeftModel) -> None:
        self._modules = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and ".lora_B." in name
        }
        sizes = [module.weight.numel() for module in self._modules.values()]
        ends = np.cumsum([0, *sizes])
        self._parts = {name: slice(*ends[place : place + 2]) for place, name in enumerate(self._modules)}
        self.size = int(ends[-1])

    def items(self) -> Sequence[tuple[torch.nn.Linear, slice]]:
        """Each module and where its weights are in the vector."""
        return [(module, self._parts[name]) for name, module in self._modules.items()]

    @torch.no_grad()
    def set(self, values: np.ndarray) -> None:
        """Give the modules the weights of a vector, shape (size,)."""
        for module, part in self.items():
            own = torch.from_numpy(np.ascontiguousarray(values[part], dtype=np.float32))
            module.weight.copy_(own.view_as(module.weight))


def write_score_functions(
    model: PeftModel,
    responses: TrainingResponses,
    *,
    folder: Path,
    key: Mapping[str, Any],
    token_budget: int,
    show_progress: bool,
) -> np.ndarray:
    """The score function of every response, mapped from a file, bfloat16 as its bits in uint16, shape (n, weights).

    Args:
        model: the reference policy with an adapter whose B is 0.
        responses: whose gradients are taken.
        folder: of the file and of the record of what of it is done.
        key: what the values depend on; a file of another key is written anew.
        token_budget: tokens of a batch, padding included; speed and memory only.
        show_progress: show a progress bar with an estimate of the time left.

    Raises:
        InputError: the disk has no room for the file.
    """
    weights = AdapterWeights(model)
    folder.mkdir(parents=True, exist_ok=True)
    path, record = folder / _FILE, folder / _DONE
    known = {**key, "rows": len(responses), "weights": weights.size}
    recorded = read_json_object(record) if record.is_file() and path.is_file() else {}
    done = int(recorded["done"]) if {name: recorded.get(name) for name in known} == known else 0
    if done == 0:
        _require_room(folder, len(responses) * weights.size * 2)
    shape = (len(responses), weights.size)
    values = np.memmap(path, mode="w+" if done == 0 else "r+", dtype=np.uint16, shape=shape)
    was_training = model.training
    model.train(False)
    try:
        with progress_bar(total=len(responses), doing="score functions", unit="responses", shown=show_progress) as bar:
            bar.update(done)
            for begin in range(done, len(responses), _ROWS_AT_ONCE):
                rows = range(begin, min(begin + _ROWS_AT_ONCE, len(responses)))
                sequences = [responses.sequences[row] for row in rows]
                for places in iterate_budgeted(sequences, token_budget, share_prompts=False):
                    part = _score_functions(model, weights, [sequences[place] for place in places])
                    values[[begin + place for place in places]] = part
                    bar.update(len(places))
                values.flush()
                write_json(record, {**known, "done": rows.stop})
    finally:
        model.train(was_training)
    return values


def _score_functions(model: PeftModel, weights: AdapterWeights, sequences: Sequence[tuple[Any, Any]]) -> np.ndarray:
    """Of one batch, bfloat16 as uint16, shape (n, weights).

    Rows are fed whole: the prompt's part in a gradient is then each response's own.
    """
    device = next(model.parameters()).device
    found = torch.zeros(len(sequences), weights.size, dtype=torch.bfloat16, device=device)

    def collect(part: slice) -> Any:
        def forward(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            entered = inputs[0].detach()

            def backward(gradient: torch.Tensor) -> None:
                own = torch.einsum("nto,ntr->nor", gradient.to(entered.dtype), entered)
                found[:, part] = own.flatten(1).to(found.dtype)

            output.register_hook(backward)  # type: ignore[no-untyped-call]

        return forward

    hooks = [module.register_forward_hook(collect(part)) for module, part in weights.items()]
    try:
        batch = move_batch(build_batch(sequences, share_prompts=False), device)
        with torch.enable_grad():
            sequence_logp(model, batch).sum().backward()  # type: ignore[no-untyped-call]
    finally:
        for hook in hooks:
            hook.remove()
        model.zero_grad(set_to_none=True)
    return np.asarray(found.cpu().view(torch.uint16).numpy())


def as_floats(values: np.ndarray) -> torch.Tensor:
    """Numbers whose bfloat16 bits are given in uint16, float32, of the same shape."""
    return torch.from_numpy(np.ascontiguousarray(values)).view(torch.bfloat16).float()


def _require_room(folder: Path, need: int) -> None:
    free = shutil.disk_usage(folder).free
    if need > free:
        raise InputError(
            f"the natural gradient keeps the gradient of each response in a file in {folder}, which takes "
            f"{need / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free there; make room, or take a smaller `lora_r` or "
            "fewer `lora_target_modules`"
        )
