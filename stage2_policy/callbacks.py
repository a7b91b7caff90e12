"""What the training run does beside the steps: it shows its progress and stops when it goes wrong."""

from __future__ import annotations

import math
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from typing_extensions import override

from pipeline.contracts.errors import DualignError
from pipeline.progress import progress_bar


class TrainingDivergedError(DualignError):
    """The loss is no longer a number."""


class StopOnDivergence(TrainerCallback):
    """Raises TrainingDivergedError as soon as a logged loss or gradient norm is not finite."""

    @override
    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Check what was logged."""
        logs: dict[str, float] = kwargs["logs"]
        for name in ("loss", "grad_norm", "eval_loss"):
            if not math.isfinite(logs.get(name, 0.0)):
                raise TrainingDivergedError(
                    f"training diverged: {name} is {logs[name]} at step {state.global_step} of {state.max_steps}; "
                    f"try a learning_rate below {args.learning_rate:g}"
                )


class ProgressBar(TrainerCallback):
    """One bar for the run, with the time left and the last held-out estimates."""

    @override
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar where a continued run begins."""
        self._bar = progress_bar(total=state.max_steps, initial=state.global_step, doing="training", unit="steps")

    @override
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Advance."""
        self._bar.update()

    @override
    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the held-out estimates."""
        metrics: dict[str, float] = kwargs["metrics"]
        self._bar.set_postfix_str(
            f"held-out gap {metrics['eval_loss']:.3f} nats, closed {metrics['eval_closed_fraction']:.0%}"
        )

    @override
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar."""
        self._bar.close()
