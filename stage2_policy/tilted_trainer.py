"""A Trainer of transformers whose batches are responses with tilted weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from peft import PeftModel
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from typing_extensions import override

from stage2_policy.data import TrainingResponses
from stage2_policy.held_out import HeldOutEstimate, estimate_held_out
from stage2_policy.logprobs import SequenceBatch, build_batch, can_share_prompts, score_sequences, sequence_logp
from stage2_policy.losses import RowLoss, Targets
from stage2_policy.reference import arithmetic
from stage2_policy.step_sampler import GroupedRow, StepSampler

Policy = PreTrainedModel | PeftModel


class RowNumbers(Dataset[GroupedRow]):
    """The data set of a Trainer: an item is what the sampler asks for, a row with its group, as it is."""

    def __init__(self, n_rows: int) -> None:
        self._n_rows = n_rows

    def __len__(self) -> int:
        """Number of responses."""
        return self._n_rows

    def __getitem__(self, item: GroupedRow) -> GroupedRow:
        return item


class TiltedTrainer(Trainer):
    """A Trainer whose batches are responses with tilted weights, and whose evaluation is held-out optimality.

    Args:
        model: the policy, initialised from the reference.
        args: ordinary training arguments; ``gradient_accumulation_steps`` must be this process's share of
            ``sampler.microbatches_per_step``.
        row_loss: what is minimised.
        train: responses trained on.
        ref_logp: log pi_ref of them, nats, shape (n,).
        held_out: responses that choose the checkpoint.
        held_out_ref_logp: log pi_ref of them, nats.
        sampler: rows of each microbatch.
        beta: KL strength, reward per nat.
        label_seed: of the noise of drawn labels.
        token_budget: tokens of a held-out batch.
    """

    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: Policy,
        args: TrainingArguments,
        *,
        row_loss: RowLoss,
        train: TrainingResponses,
        ref_logp: np.ndarray,
        held_out: TrainingResponses,
        held_out_ref_logp: np.ndarray,
        sampler: StepSampler,
        beta: float,
        label_seed: int,
        token_budget: int,
        callbacks: Sequence[TrainerCallback],
    ) -> None:
        # nn.DataParallel would cut prompts and completions alike: several devices are a matter of the launcher.
        args._n_gpu = min(args.n_gpu, 1)
        rows, held_out_rows = RowNumbers(len(train)), RowNumbers(len(held_out))
        super().__init__(model, args, train_dataset=rows, eval_dataset=held_out_rows, callbacks=list(callbacks))
        self._policy = model
        self._row_loss = row_loss
        self._train = train
        self._ref_logp = ref_logp
        self._label_noise = np.random.default_rng(label_seed).gumbel(size=len(train)).astype(np.float32)
        self._held_out = held_out
        self._held_out_ref_logp = held_out_ref_logp
        self._sampler = sampler
        self._beta = beta
        self._token_budget = token_budget
        # Layers that are computed anew keep no cache, and sharded weights are gathered once a microbatch: elsewhere
        # a prompt goes through the model once for all its responses of a microbatch.
        self._share_prompts = can_share_prompts(model) and not (
            args.gradient_checkpointing or self.is_fsdp_enabled or self.is_deepspeed_enabled
        )

    @override
    def get_train_dataloader(self) -> DataLoader[GroupedRow]:
        """Microbatches in the sampler's order, which has dealt them to the processes already."""
        loader: DataLoader[GroupedRow] = DataLoader(
            RowNumbers(len(self._train)),
            batch_sampler=self._sampler,
            collate_fn=self._collate,
            pin_memory=self.args.dataloader_pin_memory,
        )
        prepared: DataLoader[GroupedRow] = prepare_data_loader(
            loader, device=self.accelerator.device, num_processes=1, process_index=0, put_on_device=True
        )
        return prepared

    def _collate(self, items: list[GroupedRow]) -> dict[str, torch.Tensor]:
        rows = np.array([row for row, _ in items])
        train = self._train
        targets = {
            "ref_logp": torch.from_numpy(self._ref_logp[rows]).float(),
            "weight": torch.from_numpy(train.weight[rows]).float(),
            "score": torch.from_numpy(train.tilt[rows] / self._beta).float(),
            "label_noise": torch.from_numpy(self._label_noise[rows]),
            "n_samples": torch.from_numpy(train.n_responses_p[train.prompt_p[rows]]),
        }
        return {
            **vars(build_batch([self._train.sequences[row] for row in rows], share_prompts=self._share_prompts)),
            **targets,
            "group": torch.tensor([group for _, group in items]),
        }

    @override
    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Unbiased estimate of the objective from one microbatch, nats.

        The mean over the microbatches of an epoch, those of all processes, is exactly the mean over prompts of the sum
        over their responses.
        """
        batch = SequenceBatch(**{name: inputs[name] for name in SequenceBatch.__dataclass_fields__})
        targets = Targets(
            **{name: inputs[name] for name in Targets.__dataclass_fields__ if name != "beta"},
            beta=torch.tensor(self._beta),
        )
        losses = self._row_loss(sequence_logp(model, batch), targets)
        n_microbatches = self._sampler.n_steps * self._sampler.microbatches_per_step
        return losses.sum() * (n_microbatches / len(self._train.prompt_ids))

    @override
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Held-out estimates of the policy as it is now."""
        with arithmetic("bfloat16" if self.args.bf16 else "float32", self.accelerator.device):
            logp = score_sequences(
                self._policy, self._held_out.sequences, token_budget=self._token_budget, show_progress=False
            )
        metrics = self.estimate(logp).metrics(metric_key_prefix)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def estimate(self, logp: np.ndarray) -> HeldOutEstimate:
        """Held-out estimates of a policy with these log-probabilities, nats, shape (n,)."""
        return estimate_held_out(
            self._held_out,
            logp=logp,
            ref_logp=self._held_out_ref_logp,
            beta=self._beta,
        )
