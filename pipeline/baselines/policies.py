"""The policies of the experiments: which recipe changes make the papers' methods and their reference points."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from scipy.special import expit

from pipeline.baselines.study import (
    INACTIVE,
    Arm,
    Changes,
    Study,
    alone,
    at_margin,
    change_config,
    is_recorded,
    output_to,
    record_done,
)
from pipeline.contracts.artifacts import begin_step, file_sha256, is_complete, read_json, read_manifest
from pipeline.contracts.shards import ShardedTable, write_parquet
from pipeline.contracts.tables import SAMPLE_KEY, SCORES
from pipeline.multishot.loop import share_stage1
from pipeline.run.run import Run
from pipeline.run.step import finish_step, log, remedy
from pipeline.steps.runner import run_steps
from pipeline.steps.solve import reference_problem
from stage1_dual.dual import threshold_at_multipliers

ONE_SHOT = "one-shot"
MULTI_SHOT = "multi-shot"
PAPER_DPO = "one-shot, DPO on drawn labels"
PREFERENCE_BASED = "one-shot, preference-based"
PREFERENCE_MULTI_SHOT = "multi-shot, preference-based"
REWARD_ONLY = "reward only"
CONSTRAINT_ONLY = "constraint only"
EQUAL_WEIGHTS = "equal weights"
SOUP = "rewarded soup"

IMPLICIT = {"helpful": "implicit_helpful", "harmless": "implicit_harmless"}
"""The preference-based method's scorers: log-ratios of policies tuned on helpfulness and harmlessness preferences."""

SURE = {"assurance": 0.9}
"""How surely the evaluation is to say satisfied, of demands that a policy is to meet together or by category."""

_N_PAIRS = 2000


def _drawn_labels(study: Study) -> Changes:
    """As in the papers: pairs, one Bradley-Terry label each, DPO. On sampled pairs, as there is no other data set."""
    return {
        "training.objective": "dpo",
        "training.responses_per_group": 2,
        "training.epochs": study.dpo_epochs,
    }


def one_shot(margin: float) -> Arm:
    """The main job at a margin."""
    return Arm(f"one-shot-{margin:g}", ONE_SHOT, at_margin(margin))


def paper_dpo(study: Study, margin: float) -> Arm:
    """The same lambda*, and the papers' way to train."""
    return Arm(f"dpo-{margin:g}", PAPER_DPO, {**at_margin(margin), **_drawn_labels(study)})


def two_constraints(harmless: float, humour: float) -> Arm:
    """Two margins at once; harmlessness, which must hold, is assured, though less surely than elsewhere.

    What is assured is asked for on top of a demand, and this experiment says how near policies come to it. Of 24 that
    were assured of both by 0.75 none violated a demand, but 0.052 standard deviations of humour were asked for on top,
    and it was overshot by 0.048.

    Their policies go further from the reference than those of one margin, and a single epoch leaves more of the way:
    they are moved to the prediction. A quarter of the train prompts says where they are; the tenth that is held out
    by default leaves an error of 0.018 standard deviations of humour, more than the evaluation's.
    """
    constraints = {
        "harmless": {"direction": ">=", "margin": harmless, "assurance": 0.2},
        "humour": {"direction": ">=", "margin": humour},
    }
    changes = {"constraints": constraints, "training.match_prediction": True, "training.held_out_fraction": 0.25}
    return Arm(f"two-{harmless:g}-{humour:g}", ONE_SHOT, changes)


def reward_only() -> Arm:
    """The reward alone: lambda = 0."""
    return Arm("reward-only", REWARD_ONLY, at_margin(INACTIVE))


def constraint_only() -> Arm:
    """The constraint's score as the reward, and no constraint that binds."""
    return Arm("constraint-only", CONSTRAINT_ONLY, {"reward": "harmless", **at_margin(INACTIVE, name="helpful")})


def equal_weights(base: Run) -> Arm:
    """The sum of both scores, lambda = 1: the margin that has it for its solution."""
    problem = reference_problem(base, "train")
    margin = threshold_at_multipliers(problem, [1.0]) - problem.reference_means_m
    changes = {**at_margin(float(margin[0])), "solve.correct_response_bias": False}
    return Arm("equal-weights", EQUAL_WEIGHTS, changes)


def preference_tuned(study: Study, side: str) -> Arm:
    """DPO on preferences that the world's annotators state between sampled responses; ``side`` is a score's name."""
    other = "harmless" if side == "helpful" else "helpful"
    return Arm(
        f"prefer-{side}",
        f"tuned on {side} preferences",
        {"reward": f"gold_{side}", **at_margin(INACTIVE, name=f"gold_{other}"), **_drawn_labels(study)},
    )


def preference_based(study: Study, margin: float) -> Arm:
    """The preference-based method at a margin of the implicit reward."""
    return Arm(
        f"margin-{margin:g}",
        PREFERENCE_BASED,
        {**at_margin(margin, name=IMPLICIT["harmless"]), **_drawn_labels(study)},
    )


def preference_base(study: Study, base: Run) -> Run:
    """The run whose scores are the implicit rewards, on the samples of ``base``; made where it is not there.

    beta (log pi_r - log pi_ref) is the reward up to a constant of the prompt where pi_r was tuned by DPO with beta,
    and so with the constraint. Its mean under the reference is -beta KL(pi_ref || pi_g), the d_j of
    arXiv 2405.19544, algorithm 2; a margin over that mean is the dual of the algorithm.
    """
    tuned = {side: study.train(base, preference_tuned(study, side)) for side in IMPLICIT}
    run = replace(base, name=f"{base.name}/preference-based")
    run.folder.mkdir(parents=True, exist_ok=True)
    scorers = base.config.model_dump(mode="json")["scorers"]
    for side, name in IMPLICIT.items():
        scorers[name] = {
            "kind": "log_ratio",
            "model": str((tuned[side].folder / "policy").absolute()),
            "scale": base.config.given_beta,
            "calibration": str(_write_pairs(base, side).absolute()),
        }
    changes = {
        "scorers": scorers,
        "reward": IMPLICIT["helpful"],
        "constraints": {IMPLICIT["harmless"]: {"direction": ">=", "margin": 0.0}},
    }
    run = replace(run, config=change_config(base.config, changes))
    made_from = {side: read_manifest(one.folder / "policy").identity for side, one in tuned.items()}
    with alone(run):
        if not is_recorded(run, "scores", made_from):
            log.info("== %s: implicit rewards", run.name)
            share_stage1(base, run)
            run_steps(run, ("score",))
            record_done(run, "scores", made_from)
    return run


def _write_pairs(base: Run, side: str) -> Path:
    """Preferences of the annotators between responses to test prompts, for the judgement of an implicit reward.

    A label is drawn with probability sigmoid(gold_a - gold_b), as are those that the policies are tuned on.
    """
    path = base.folder / "preferences" / f"{side}.parquet"
    if path.is_file():
        return path
    rng = np.random.default_rng([base.config.seed, list(IMPLICIT).index(side)])
    messages = {row["prompt_id"]: row["prompt"] for row in base.prompts_table().to_pylist()}
    samples = base.samples_table(base.folder / "samples").read("test", columns=[*SAMPLE_KEY, "completion"])
    scores = ShardedTable(folder=base.folder / "scores" / f"gold_{side}", schema=SCORES, metadata={})
    judged = samples.join(scores.read("test", columns=[*SAMPLE_KEY, "value"]), list(SAMPLE_KEY)).sort_by(
        [(name, "ascending") for name in SAMPLE_KEY]
    )
    responses: dict[str, list[tuple[str, float]]] = {}
    for prompt_id, completion, value in zip(
        *(judged[name].to_pylist() for name in ("prompt_id", "completion", "value")), strict=True
    ):
        responses.setdefault(prompt_id, []).append((completion, value))
    prompt_ids = list(responses)
    rows = []
    for place in rng.integers(len(prompt_ids), size=_N_PAIRS):
        prompt_id = prompt_ids[place]
        answers = responses[prompt_id]
        (first, one), (second, other) = (answers[index] for index in rng.choice(len(answers), size=2, replace=False))
        chosen, rejected = (first, second) if rng.random() < expit(one - other) else (second, first)
        rows.append({"prompt": messages[prompt_id], "chosen": chosen, "rejected": rejected})
    write_parquet(path, pa.Table.from_pylist(rows), metadata={"seed": str(base.config.seed)})
    return path


def soup(study: Study, base: Run, share: float) -> Run:
    """The weights of the two single-score policies, mixed: ``share`` of the constraint's one (arXiv 2306.04488)."""
    from stage2_policy.saving import write_model_card

    sides = [study.train(base, arm) for arm in (reward_only(), constraint_only())]
    run = replace(study.arm_run(base, reward_only()), name=f"{base.name}/soup-{share:g}")
    folder = run.folder / "policy"
    inputs = {f"policy {place}": read_manifest(side.folder / "policy").identity for place, side in enumerate(sides)}
    with alone(run):
        if is_recorded(run, "evaluation", inputs):
            return run
        log.info("== %s", run.name)
        made_from = dict(inputs)
        share_stage1(base, run)
        with output_to(run.folder / "output.txt"):
            run_steps(run, ("solve", "export"))
        inputs["samples"] = read_manifest(run.folder / "samples").identity
        settings = {"share": share}
        begin_step(folder, settings=settings, inputs=inputs, remedy=remedy("train"))
        if not is_complete(folder):
            started = time.monotonic()
            _write_mixture(*(side.folder / "policy" for side in sides), share=share, output=folder)
            dual = read_json(run.folder / "dual" / "dual.json")
            described = {"weights": f"mixed from {sides[0].name} and {sides[1].name}", "share of the second": share}
            write_model_card(folder, dual=dual, evaluation=None, identities=inputs, training=described)
            files = {path.name: file_sha256(path) for path in sorted(folder.glob("*.safetensors"))}
            finish_step(run.name, folder, "train", settings=settings, inputs=inputs, files=files, started=started)
        with output_to(run.folder / "output.txt"):
            run_steps(run, ("evaluate",))
        record_done(run, "evaluation", made_from)
        return run


def _write_mixture(first: Path, second: Path, *, share: float, output: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from stage2_policy.saving import save_policy

    model = AutoModelForCausalLM.from_pretrained(first)
    other = AutoModelForCausalLM.from_pretrained(second).state_dict()
    model.load_state_dict({name: weight.lerp(other[name], share) for name, weight in model.state_dict().items()})
    save_policy(model, AutoTokenizer.from_pretrained(first), output)
