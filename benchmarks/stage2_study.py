"""How near each way of training comes to the tilted optimum on the embedded world, by real sampling.

    python benchmarks/stage2_study.py --runs embedded seed1 seed2 [--only NAME ...] [--responses 16] [--output FILE]

Needs runs whose stage 1 is done, one a seed (`make stage1`, `make stage1 RUN=seed1 ARGS="--seed 1"`). Every row trains
the reference on a run's samples with the run's seed, saves the policy, draws from it on the test prompts and scores
what it drew; nothing is estimated from the reference's samples but the optimum itself. Rows already in
`stage2_study/` of a run are kept, so a killed study continues, and runs can be done by several processes. The table
is written after each row, of the rows that all runs have.

The estimate of the optimum, which all rows of a run share, has an error of its own: differences between rows are
surer than their closed fractions, whose 95% intervals over prompts are in `results.json`.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from stage2_objectives import STUDIED
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, set_seed

from pipeline.config.loading import load_config
from pipeline.contracts.errors import DualignError, InputError
from pipeline.contracts.solution import read_solution
from pipeline.evaluation import evaluate_policy
from pipeline.run.run import Run
from pipeline.scorers.sequence_classification import SequenceClassificationSettings
from pipeline.scoring.demanded import read_demands
from pipeline.scoring.joined import JoinedScores, reference_scores
from stage1_dual.sampling.protocol import SampleRequest, sample_all
from stage1_dual.sampling.rendering import load_tokenizer, render_prompts
from stage1_dual.sampling.seeds import sample_seed
from stage1_dual.sampling.transformers_sampler import TransformersSampler
from stage1_dual.scoring.protocol import RowFailure, ScoreRequest
from stage1_dual.scoring.sequence_classification import SequenceClassificationScorer
from stage2_policy.adapters import AdapterSettings, attach_adapter
from stage2_policy.data import TrainingData, read_training_data, segment_softmax
from stage2_policy.fit import fit_policy
from stage2_policy.logprobs import score_sequences
from stage2_policy.objectives import OBJECTIVES
from stage2_policy.reference import ReferenceLogp, score_reference
from stage2_policy.saving import save_policy
from stage2_policy.settings import TrainSettings
from stage2_policy.tilted_trainer import Policy

_EVALUATION_SEED = 2_000_003


@dataclass(frozen=True)
class Row:
    """One way of training.

    Attributes:
        objective: a name, of stage 2 or of the study.
        learning_rate: peak rate of AdamW.
        samples_per_prompt: only so many responses of each prompt are trained on; all of them where None.
        change: settings that are not those of a single epoch in 116 steps.
    """

    objective: str
    learning_rate: float
    samples_per_prompt: int | None = None
    change: Mapping[str, Any] = field(default_factory=dict)

    def settings(self) -> TrainSettings:
        """Of the training run."""
        return TrainSettings(
            **{
                "objective": self.objective,
                "learning_rate": self.learning_rate,
                "epochs": 1.0,
                "tokens_per_step": 8192,
                "evaluations": 2,
                "patience": 99,
                **self.change,
            }
        )


_LORA = {"adapter": "lora", "lora_r": 16}

ROWS: dict[str, Row] = {
    "nll 2e-4": Row("tilted_nll", 2e-4),
    "nll 5e-4": Row("tilted_nll", 5e-4),
    "kl 2e-4": Row("tilted_kl", 2e-4),
    "listwise 2e-4": Row("tilted_listwise", 2e-4),
    "reverse 2e-4": Row("tilted_reverse", 2e-4),
    "regression 2e-4": Row("tilted_regression", 2e-4),
    "variance 2e-4": Row("tilted_variance", 2e-4),
    "dpo 2e-4": Row("dpo", 2e-4),
    "pairwise 1e-4": Row("tilted_pairwise", 1e-4),
    "pairwise 2e-4": Row("tilted_pairwise", 2e-4),
    "pairwise 5e-4": Row("tilted_pairwise", 5e-4),
    "pairwise + 0.1 nll 2e-4": Row("pairwise_with_nll", 2e-4),
    "pairwise 2e-4, 16 responses, 4 epochs": Row("tilted_pairwise", 2e-4, 16, {"epochs": 4.0}),
    "pairwise 2e-4, 32 responses, 2 epochs": Row("tilted_pairwise", 2e-4, 32, {"epochs": 2.0, "evaluations": 3}),
    "pairwise 2e-4, 3 epochs": Row("tilted_pairwise", 2e-4, None, {"epochs": 3.0, "evaluations": 4}),
    "pairwise 1e-3, LoRA of rank 16": Row("tilted_pairwise", 1e-3, None, _LORA),
    "pairwise 2e-3, LoRA of rank 16": Row("tilted_pairwise", 2e-3, None, _LORA),
    "pairwise 1e-3, LoRA of rank 64": Row("tilted_pairwise", 1e-3, None, {**_LORA, "lora_r": 64}),
}


class Study:
    """What all rows share: the data, the reference's log-probabilities, the scorers, the test prompts."""

    def __init__(self, run: Run, *, responses: int) -> None:
        self._run = run
        self._responses = responses
        self._reference = run.model(run.config.reference, "reference")
        self._solution = read_solution(run.folder / "dual" / "dual.json")
        self._model = AutoModelForCausalLM.from_pretrained(self._reference, dtype=torch.float32)
        self._data: dict[float, TrainingData] = {}
        self._ref_logp: dict[float, ReferenceLogp] = {}
        names = run.config.needed_scores()
        self._scorers = {name: _load_scorer(run, name) for name in names}
        self._reference_scores = reference_scores(run, "test")
        self._prompt_ids = self._reference_scores.prompt_ids
        prompts = {row["prompt_id"]: row["prompt"] for row in run.prompts_table().to_pylist()}
        self._messages = [prompts[name] for name in self._prompt_ids]
        limit = run.config.sampling.max_new_tokens
        rendered, _ = render_prompts(
            load_tokenizer(self._reference),
            list(zip(self._prompt_ids, self._messages, strict=True)),
            max_new_tokens=limit,
            max_positions=self._model.config.max_position_embeddings,
        )
        self._prompt_tokens = [tuple(int(token) for token in prompt.token_ids) for prompt in rendered]

    def train(self, row: Row, folder: Path) -> dict[str, Any]:
        """Train one row and save its policy."""
        settings, seed = row.settings(), self._run.config.seed
        share = settings.held_out_fraction
        if share not in self._data:
            self._data[share] = read_training_data(
                reference=Path(self._reference),
                **{name: self._run.folder / name for name in ("samples", "tilted", "dual")},
                held_out_fraction=share,
            )
            # By an objective that reads the reference on every response: all rows share the values.
            self._ref_logp[share] = score_reference(
                self._model, self._data[share], settings=ROWS["pairwise 2e-4"].settings(), show_progress=True
            )
        data, ref_logp = _thin(self._data[share], self._ref_logp[share], row.samples_per_prompt)
        set_seed(seed)
        base: PreTrainedModel = AutoModelForCausalLM.from_pretrained(self._reference, dtype=torch.float32)
        policy: Policy = base
        if settings.adapter == "lora":
            adapter = AdapterSettings(settings.lora_r, settings.lora_alpha, settings.lora_target_modules, seed)
            policy = attach_adapter(base, adapter)
        started = time.monotonic()
        fit = fit_policy(
            policy,
            data,
            ref_logp=ref_logp,
            settings=settings,
            seed=seed,
            checkpoints=folder / "checkpoints",
            show_progress=True,
        )
        seconds = time.monotonic() - started
        shutil.rmtree(folder / "checkpoints")
        merged: Any = policy.merge_and_unload() if isinstance(policy, PeftModel) else policy
        save_policy(merged, AutoTokenizer.from_pretrained(self._reference), folder)
        return {
            "train_seconds": seconds,
            "steps": fit.steps,
            "best_step": fit.best_step,
            "held_out": asdict(fit.held_out),
            "curve": list(fit.curve),
        }

    def evaluate(self, folder: Path) -> dict[str, Any]:
        """Draw from a policy on the test prompts, score it, and compare with the promise of the dual."""
        config, k = self._run.config, self._responses
        sampler = TransformersSampler(str(folder), max_new_tokens=config.sampling.max_new_tokens, batch_rows=256)
        requests = [
            SampleRequest(name, tokens, index, sample_seed(config.seed + _EVALUATION_SEED, name, index))
            for name, tokens in zip(self._prompt_ids, self._prompt_tokens, strict=True)
            for index in range(k)
        ]
        drawn = sample_all(sampler, requests)
        rows = [
            ScoreRequest(request.prompt_id, request.sample_index, self._messages[place // k], completion.text)
            for place, (request, completion) in enumerate(zip(requests, drawn, strict=True))
        ]
        scores = {name: _score(scorer, rows) for name, scorer in self._scorers.items()}
        policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        sequences = [(request.prompt_token_ids, done.token_ids) for request, done in zip(requests, drawn, strict=True)]
        logp, ref_logp = (
            score_sequences(model, sequences, token_budget=16384, show_progress=False)
            for model in (policy, self._model)
        )
        policy_scores = JoinedScores(
            prompt_ids=self._prompt_ids,
            prompt_n=np.repeat(np.arange(len(self._prompt_ids)), k),
            sample_index_n=np.tile(np.arange(k), len(self._prompt_ids)),
            reward_n=scores[config.reward],
            score_names=config.constraint_scores(),
            scores_ns=np.column_stack([scores[name] for name in config.constraint_scores()]),
            cut_off_n=np.array([done.finish_reason == "length" for done in drawn]),
        )
        return evaluate_policy(
            reference=self._reference_scores,
            policy=policy_scores,
            log_ratio_n=logp - ref_logp,
            solution=self._solution,
            constraints=read_demands(self._run).constraints,
            n_replicates=2000,
            rng=np.random.default_rng(config.seed),
        )


def _load_scorer(run: Run, name: str) -> SequenceClassificationScorer:
    settings = run.config.scorers[name]
    if not isinstance(settings, SequenceClassificationSettings):
        raise InputError(f"`scorers.{name}.kind` is another; the study scores by classifiers alone")
    return SequenceClassificationScorer(run.model(settings, f"scorers.{name}"))


def _score(scorer: SequenceClassificationScorer, rows: Sequence[ScoreRequest]) -> np.ndarray:
    """Scores of the rows, shape (n,)."""
    values = []
    for found in scorer.score(rows):
        if isinstance(found, RowFailure):
            raise DualignError(f"a response of the policy could not be scored: {found.reason}")
        values.append(found.values[0])
    return np.array(values)


def _thin(data: TrainingData, ref_logp: ReferenceLogp, k: int | None) -> tuple[TrainingData, ReferenceLogp]:
    """The same data with the first k responses of each training prompt, and weights that are theirs."""
    if k is None:
        return data, ref_logp
    train = data.train
    first = np.flatnonzero(np.diff(train.prompt_p, prepend=-1))
    kept = np.flatnonzero(np.arange(len(train)) - first[train.prompt_p] < k)
    thinned = replace(
        train,
        prompt_p=train.prompt_p[kept],
        sequences=train.sequences.select(kept),
        weight=segment_softmax(train.tilt[kept] / data.beta, train.prompt_p[kept]),
        tilt=train.tilt[kept],
        sampler_logp=train.sampler_logp[kept],
        sample_index=train.sample_index[kept],
    )
    return replace(data, train=thinned), replace(ref_logp, train=ref_logp.train[kept])


Results = Mapping[str, Mapping[str, Any]]
"""What is known of each row of a run."""


def write_table(results_r: Sequence[Results], path: Path) -> None:
    """One line a row that every run has, Markdown; means over the runs."""
    head = (
        "training",
        f"closed fraction, mean of {len(results_r)} (each)",
        "estimated beforehand",
        "reward lost",
        "constraint less its prediction",
        "constraint met",
        "KL (predicted)",
        "steps",
        "train s",
    )
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name in (name for name in ROWS if all(name in results for results in results_r)):
        rows = [results[name] for results in results_r]
        closed = [row["evaluation"]["lagrangian"]["closed_fraction"] for row in rows]
        cells = (
            name,
            f"{np.mean(closed):.3f} ({', '.join(f'{value:.2f}' for value in closed)})",
            f"{np.mean([row['training']['held_out']['closed_fraction'] for row in rows]):.3f}",
            f"{np.mean([_reward_lost(row['evaluation']['reward']) for row in rows]):.1%}",
            f"{np.mean([bound['realised'] - bound['predicted'] for row in rows for bound in _bounds(row)]):+.3f}",
            f"{sum(all(bound['status'] != 'violated' for bound in _bounds(row)) for row in rows)} of {len(rows)}",
            _mean_kl(rows, "realised") + f" ({_mean_kl(rows, 'predicted')})",
            f"{rows[0]['training']['steps']}",
            f"{np.mean([row['training']['train_seconds'] for row in rows]):.0f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _reward_lost(reward: Mapping[str, float]) -> float:
    """Of the predicted gain over the reference."""
    return (reward["predicted"] - reward["realised"]) / (reward["predicted"] - reward["reference"])


def _mean_kl(rows: Sequence[Mapping[str, Any]], which: str) -> str:
    return f"{np.mean([row['evaluation']['kl'][which] for row in rows]):.3f}"


def _bounds(row: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    bounds: Sequence[Mapping[str, Any]] = row["evaluation"]["constraints"]
    return bounds


def main() -> None:
    """Train and evaluate the rows, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", default=["embedded"], help="names of runs whose stage 1 is done")
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--only", nargs="*", choices=list(ROWS), default=list(ROWS), help="rows to train")
    parser.add_argument("--responses", type=int, default=16, help="drawn from each policy to each test prompt")
    parser.add_argument("--output", type=Path, help="the table; default: stage2_study/table.md of the first run")
    args = parser.parse_args()
    OBJECTIVES.update(STUDIED)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    runs = [Run(load_config(args.data_dir / "runs" / name / "config.yaml"), name, args.data_dir) for name in args.runs]
    results_r: list[dict[str, Any]] = []
    for run in runs:
        log = run.folder / "stage2_study" / "results.json"
        results_r.append(json.loads(log.read_text()) if log.exists() else {})
    output = args.output or runs[0].folder / "stage2_study" / "table.md"
    output.parent.mkdir(parents=True, exist_ok=True)
    for run, results in zip(runs, results_r, strict=True):
        missing = [name for name in args.only if name not in results]
        study = Study(run, responses=args.responses) if missing else None
        for name in missing:
            assert study is not None
            folder = run.folder / "stage2_study" / name.replace(" ", "_").replace("/", "-")
            training = study.train(ROWS[name], folder)
            results[name] = {"training": training, "evaluation": study.evaluate(folder)}
            (run.folder / "stage2_study" / "results.json").write_text(json.dumps(results, indent=1))
            closed = results[name]["evaluation"]["lagrangian"]["closed_fraction"]
            print(f"{run.name}, {name}: closed fraction {closed:.3f}", flush=True)
            write_table(results_r, output)
    write_table(results_r, output)
    print(output.read_text())


if __name__ == "__main__":
    main()
