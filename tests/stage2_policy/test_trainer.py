from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.train_settings import changed
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TrainingArguments

from pipeline.contracts.errors import InputError
from stage2_policy.callbacks import TrainingDivergedError
from stage2_policy.data import Skipped, read_training_data
from stage2_policy.held_out import estimate_held_out
from stage2_policy.logprobs import IGNORED, score_sequences
from stage2_policy.losses import tilted_nll
from stage2_policy.settings import TrainSettings
from stage2_policy.step_sampler import StepSampler
from stage2_policy.tilted_trainer import TiltedTrainer
from stage2_policy.trainer import TrainResult, train_policy

pytestmark = pytest.mark.slow

SETTINGS = TrainSettings(
    learning_rate=1e-3,
    epochs=8,
    tokens_per_step=300,
    tokens_per_microbatch=160,
    responses_per_group=2,
    held_out_fraction=0.25,
    evaluations=6,
    patience=6,
)

_RUN = """
import json, sys, torch
from pathlib import Path
from stage2_policy.settings import TrainSettings
from stage2_policy.trainer import train_policy
torch.set_num_threads(1)
folders, output, settings = json.loads(sys.argv[1])
train_policy(
    **{name: Path(path) for name, path in folders.items()},
    output=Path(output), settings=TrainSettings(**settings), seed=1, show_progress=False,
)
"""


@pytest.fixture(scope="module")
def trained(stage_one: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainResult, Path]:
    torch.set_num_threads(1)
    output = tmp_path_factory.mktemp("policy")
    return train_policy(**vars(stage_one), output=output, settings=SETTINGS, seed=1, show_progress=False), output


def curve(output: Path) -> list[dict[str, float]]:
    log = json.loads((output / "training_log.json").read_text())
    timings = ("train_runtime", "train_samples_per_second", "train_steps_per_second")
    return [entry for entry in log if not any(name in entry for name in timings)]


@pytest.mark.parametrize("objective", ["tilted_nll", "tilted_pairwise", "dpo"])
def test_whole_batch_steps_lower_the_objective(objective: str, stage_one: Any, tmp_path: Path) -> None:
    settings = changed(
        SETTINGS, objective=objective, learning_rate=2e-4, epochs=12, tokens_per_step=10_000, responses_per_group=100
    )
    result = train_policy(**vars(stage_one), output=tmp_path, settings=settings, seed=1, show_progress=False)
    losses = [entry["loss"] for entry in curve(tmp_path) if "loss" in entry]

    assert len(losses) == 12
    assert losses[-1] < losses[0] - 0.01
    assert result.stop_reason == "all epochs done"
    assert result.n_train_prompts + result.n_held_out_prompts == 8


@pytest.mark.parametrize("objective", ["tilted_nll", "tilted_pairwise", "dpo"])
def test_the_size_of_a_microbatch_changes_nothing(objective: str, stage_one: Any, tmp_path: Path) -> None:
    curves = []
    for tokens in (10_000, 120):
        settings = changed(SETTINGS, objective=objective, epochs=1, tokens_per_microbatch=tokens)
        train_policy(**vars(stage_one), output=tmp_path / str(tokens), settings=settings, seed=1, show_progress=False)
        curves.append(curve(tmp_path / str(tokens)))

    assert len(curves[0]) > 4
    for one, many in zip(*curves, strict=True):
        assert many == pytest.approx(one, rel=1e-4, abs=1e-5)


def test_kept_checkpoint_is_the_best_of_the_curve(stage_one: Any, trained: tuple[TrainResult, Path]) -> None:
    result, output = trained
    evaluated = {entry["step"]: entry["eval_loss"] for entry in curve(output) if "eval_loss" in entry}
    kept = min((step for step in evaluated if step > 0), key=lambda step: evaluated[step])

    assert result.best_step == kept
    held_out = read_training_data(**vars(stage_one), held_out_fraction=0.25).held_out
    model = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    logp = score_sequences(model, held_out.sequences, token_budget=1000, show_progress=False)
    reference = AutoModelForCausalLM.from_pretrained(stage_one.reference, dtype=torch.float32)
    ref_logp = score_sequences(reference, held_out.sequences, token_budget=1000, show_progress=False)
    gap = estimate_held_out(held_out, logp=logp, ref_logp=ref_logp, beta=0.5).loss
    assert gap == pytest.approx(evaluated[kept], abs=1e-4)
    assert gap == pytest.approx(result.held_out.loss, abs=1e-4)


def test_curve_begins_at_the_reference(trained: tuple[TrainResult, Path]) -> None:
    first = curve(trained[1])[0]

    assert first["step"] == 0
    assert first["eval_closed_fraction"] == pytest.approx(0, abs=1e-9)
    assert trained[0].held_out_reference.kl == pytest.approx(0, abs=1e-9)


def test_policy_is_an_ordinary_checkpoint(
    stage_one: Any, trained: tuple[TrainResult, Path], reference_model: PreTrainedModel
) -> None:
    output = trained[1]
    policy = AutoModelForCausalLM.from_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    original = AutoTokenizer.from_pretrained(stage_one.reference)
    messages = [{"role": "user", "content": "call a friend"}]

    assert type(policy) is type(reference_model)
    assert tokenizer.chat_template == original.chat_template
    assert tokenizer.apply_chat_template(messages, tokenize=False) == original.apply_chat_template(
        messages, tokenize=False
    )
    assert {path.suffix for path in output.iterdir()} <= {".safetensors", ".json", ".jinja", ".md"}
    generation = policy.generation_config
    assert (generation.temperature, generation.top_p, generation.top_k) == (1.0, 1.0, 0)
    assert generation.eos_token_id == reference_model.generation_config.eos_token_id


def test_bending_defaults_of_the_reference_are_not_handed_on(reference: Path, tmp_path: Path) -> None:
    from stage2_policy.saving import save_policy

    model = AutoModelForCausalLM.from_pretrained(reference)
    model.generation_config.update(do_sample=True, top_p=0.8, temperature=0.6, top_k=20, repetition_penalty=1.1)
    save_policy(model, AutoTokenizer.from_pretrained(reference), tmp_path)

    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert saved.get("repetition_penalty", 1.0) == 1.0
    assert (saved["do_sample"], saved["temperature"], saved["top_p"], saved["top_k"]) == (True, 1.0, 1.0, 0)


def test_killed_run_continues_to_the_same_curve_and_policy(
    stage_one: Any, trained: tuple[TrainResult, Path], tmp_path: Path
) -> None:
    folders = {name: str(path) for name, path in vars(stage_one).items()}
    command = [sys.executable, "-c", _RUN, json.dumps([folders, str(tmp_path), SETTINGS.model_dump()])]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("checkpoints/checkpoint-*/trainer_state.json")) and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "training_log.json").exists()
    # What a kill in the middle of writing a checkpoint leaves.
    torn = tmp_path / "checkpoints" / "checkpoint-10000"
    torn.mkdir()
    (torn / "trainer_state.json").write_text('{"epoch": 1')

    subprocess.run(command, check=True, capture_output=True, timeout=240)

    whole, continued = curve(trained[1]), curve(tmp_path)
    assert [entry["step"] for entry in continued] == [entry["step"] for entry in whole]
    for before, after in zip(whole, continued, strict=True):
        assert after == pytest.approx(before, rel=1e-5, abs=1e-6)
    weights, again = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (trained[1], tmp_path))
    for name, tensor in weights.items():
        torch.testing.assert_close(again[name], tensor, rtol=0, atol=1e-5)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("adapter", ["none", "lora"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_policy_that_does_not_move_stays_at_the_reference(
    dtype: Any, adapter: Any, stage_one: Any, tmp_path: Path
) -> None:
    # Only where both log-probabilities of a ratio come from the same arithmetic.
    settings = changed(SETTINGS, learning_rate=1e-12, epochs=1, evaluations=1, dtype=dtype, adapter=adapter)
    result = train_policy(**vars(stage_one), output=tmp_path, settings=settings, seed=1, show_progress=False)

    assert result.held_out.kl == pytest.approx(0, abs=1e-7)
    assert result.held_out.ratio == pytest.approx(1, abs=1e-6)


def test_divergence_stops_with_the_reason(stage_one: Any, tmp_path: Path) -> None:
    settings = changed(SETTINGS, objective="tilted_nll", learning_rate=1e30, warmup_ratio=0.0)

    with pytest.raises(TrainingDivergedError, match=r"training diverged: .* at step \d+ of \d+; try a learning_rate"):
        train_policy(**vars(stage_one), output=tmp_path, settings=settings, seed=1, show_progress=False)


def test_a_run_that_gets_no_better_stops_early(stage_one: Any, tmp_path: Path) -> None:
    settings = changed(SETTINGS, objective="dpo", learning_rate=0.05, evaluations=40, patience=2)
    result = train_policy(**vars(stage_one), output=tmp_path, settings=settings, seed=1, show_progress=True)

    assert result.best_step < result.steps
    assert result.stop_reason == "the held-out gap has not fallen in 2 evaluations"


@pytest.mark.parametrize("interrupted", ["compute_loss", "_load_best_model"])
def test_a_run_killed_near_its_early_stop_still_stops(
    interrupted: str, stage_one: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = changed(SETTINGS, objective="dpo", learning_rate=0.05, evaluations=40, patience=2)
    whole = train_policy(**vars(stage_one), output=tmp_path / "whole", settings=settings, seed=1, show_progress=False)
    original = getattr(TiltedTrainer, interrupted)

    def interrupt(self: TiltedTrainer, *args: Any, **kwargs: Any) -> Any:
        # One evaluation from the end, or when the run has stopped and nothing is saved yet.
        if interrupted == "_load_best_model" or self.state.global_step == whole.steps - 1:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(TiltedTrainer, interrupted, interrupt)
    with pytest.raises(KeyboardInterrupt):
        train_policy(**vars(stage_one), output=tmp_path / "cut", settings=settings, seed=1, show_progress=False)
    monkeypatch.undo()
    continued = train_policy(
        **vars(stage_one), output=tmp_path / "cut", settings=settings, seed=1, show_progress=False
    )

    assert continued.stop_reason == whole.stop_reason
    assert continued.best_step == whole.best_step
    assert continued.held_out.loss == pytest.approx(whole.held_out.loss, rel=1e-5)
    # A run that had stopped takes a step before it is asked again.
    assert whole.steps <= continued.steps <= whole.steps + (interrupted == "_load_best_model")


def test_responses_of_negligible_weight_are_skipped_and_counted(stage_one: Any, tmp_path: Path) -> None:
    settings = changed(SETTINGS, objective="tilted_nll", epochs=1, negligible_mass=0.05)
    whole = train_policy(
        **vars(stage_one),
        output=tmp_path / "a",
        settings=changed(settings, negligible_mass=0.0),
        seed=1,
        show_progress=False,
    )
    result = train_policy(**vars(stage_one), output=tmp_path / "b", settings=settings, seed=1, show_progress=False)

    assert whole.skipped == Skipped(0, 0.0, 0.0)
    assert result.n_responses + result.skipped.n_responses == whole.n_responses
    assert result.skipped.n_responses > 3
    assert 0 < result.skipped.mass_mean <= result.skipped.mass_max <= 0.05
    card = (tmp_path / "b" / "README.md").read_text()
    assert f"| responses skipped for their weight | {result.skipped.n_responses}, of tilted weight" in card


def test_trained_tokens_are_the_sampled_tokens(
    stage_one: Any,
    rows: Sequence[Mapping[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from stage2_policy import tilted_trainer

    seen = []
    original: Callable[..., torch.Tensor] = tilted_trainer.sequence_logp

    def record(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        for row, place in enumerate(batch.prefix_of_row):
            prefix = batch.prefix_ids[place][batch.prefix_mask[place] == 1].tolist()
            completion = batch.targets[row][batch.targets[row] != IGNORED].tolist()
            last, *fed = batch.input_ids[row, : len(completion)].tolist()
            assert fed == completion[:-1]
            seen.append(((*prefix, last), tuple(completion)))
        return original(model, batch)

    monkeypatch.setattr(tilted_trainer, "sequence_logp", record)
    settings = changed(SETTINGS, epochs=1, evaluations=1)
    train_policy(**vars(stage_one), output=tmp_path, settings=settings, seed=1, show_progress=False)

    train = set(read_training_data(**vars(stage_one), held_out_fraction=0.25).train.prompt_ids)
    sampled = [
        (tuple(row["prompt_token_ids"]), tuple(row["completion_token_ids"]))
        for row in rows
        if row["prompt_id"] in train
    ]
    assert sorted(seen) == sorted(sampled)


def test_a_second_device_without_a_launcher_is_left_alone(
    stage_one: Any, reference_model: PreTrainedModel, tmp_path: Path
) -> None:
    data = read_training_data(**vars(stage_one), held_out_fraction=0.25)
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    args._n_gpu = 2  # what transformers finds on a machine with two
    trainer = TiltedTrainer(
        reference_model,
        args,
        row_loss=tilted_nll,
        train=data.train,
        ref_logp=np.zeros(len(data.train)),
        held_out=data.held_out,
        held_out_ref_logp=np.zeros(len(data.held_out)),
        sampler=StepSampler(
            data.train.lengths,
            data.train.prompt_p,
            tokens_per_step=300,
            tokens_per_microbatch=300,
            responses_per_group=2,
            seed=0,
        ),
        beta=0.5,
        label_seed=0,
        token_budget=300,
        callbacks=[],
    )

    assert trainer.args.n_gpu == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective": "dpoo"}, r"objective\n.*there is no such objective; did you mean `dpo`\?"),
        ({"learning_rate": 0.0}, r"learning_rate\n.*greater than 0"),
        ({"report_to": ("nope",)}, r"there is no such tracker"),
    ],
)
def test_a_changed_copy_of_settings_is_checked_before_any_work(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    nowhere = tmp_path / "nowhere"
    with pytest.raises(ValidationError, match=message):
        train_policy(
            reference=nowhere,
            samples=nowhere,
            tilted=nowhere,
            dual=nowhere,
            output=tmp_path,
            settings=SETTINGS.model_copy(update=change),
            seed=1,
            show_progress=False,
        )


@pytest.mark.parametrize(
    ("change", "pairs", "message"),
    [
        ({"report_to": ("comet_ml",)}, False, r"`report_to` names `comet_ml`, which is not installed here; there is"),
        ({"objective": "tilted_nll"}, True, r"the objective is `tilted_nll`, .*; on pairs of a data set it must be"),
    ],
)
def test_what_settings_need_is_looked_for_before_any_work(
    change: dict[str, Any], pairs: bool, message: str, tmp_path: Path
) -> None:
    nowhere = tmp_path / "nowhere"
    with pytest.raises(InputError, match=message):
        train_policy(
            reference=nowhere,
            samples=nowhere,
            tilted=nowhere,
            dual=nowhere,
            output=tmp_path,
            settings=changed(SETTINGS, **change),
            seed=1,
            show_progress=False,
            pairs=nowhere if pairs else None,
        )
