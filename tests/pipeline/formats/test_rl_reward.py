"""The reward of online trainers: the numbers of the dual, what the module makes of scores, what scaling would do."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import load_dataset
from helpers.hand_offs import BETA, MULTIPLIER, SETTINGS, THRESHOLD, make_run, write_tilted
from helpers.solutions import bound, build_solution
from helpers.tiny_models import save_tiny_policy
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.contracts.artifacts import read_json
from pipeline.contracts.errors import InputError
from pipeline.contracts.solution import Solution
from pipeline.formats.rl_reward import make_terms, raw_scores
from pipeline.formats.writing import write_exports
from pipeline.run.run import Run

pytestmark = pytest.mark.slow

SCORERS = """
def score(prompts, completions):
    assert all(prompt[-1]["role"] == "user" for prompt in prompts)
    lengths = [len(text) for text in completions]
    return {"helpful": [0.1 * length for length in lengths], "harm": [float(length % 3) for length in lengths]}
"""


def expected(text: str) -> float:
    """Of the scores above, by the formula: r - lambda (g - b) for a constraint that is `<=`."""
    return 0.1 * len(text) - MULTIPLIER * (len(text) % 3 - THRESHOLD)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = make_run(tmp_path_factory.mktemp("data"))
    write_tilted(run)
    write_exports(run, ["rl-reward"], SETTINGS)
    return run.folder / "exports" / "rl-reward"


def load_module(folder: Path) -> ModuleType:
    """As verl and OpenRLHF load a reward function: a file by its path."""
    spec = importlib.util.spec_from_file_location("handed_on", folder / "dualign_reward.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def module(folder: Path) -> ModuleType:
    (folder / "scorers.py").write_text(SCORERS)
    return load_module(folder)


def test_three_trainers_get_the_same_number(module: ModuleType) -> None:
    prompt, text = [{"role": "user", "content": "walk"}], "call a friend"
    logged: dict[str, float] = {}
    completion = [{"role": "assistant", "content": text}]
    found = module.trl_reward([prompt], [completion], log_metric=logged.__setitem__, trainer_state=None)
    assert found == pytest.approx([expected(text)])
    assert logged == pytest.approx({"score/helpful": 0.1 * len(text), "score/harm": len(text) % 3})
    verl = module.compute_score(data_source="dualign", solution_str=text, ground_truth=json.dumps(prompt))
    assert verl["score"] == pytest.approx(expected(text))
    rendered = "<bos><user>walk<assistant>"
    openrlhf = module.reward_func([rendered + text + "<eos>"], [rendered], [json.dumps(prompt)])
    assert openrlhf["rewards"] == openrlhf["scores"] == pytest.approx(expected(text))
    assert module.beta() == BETA


def test_the_module_needs_the_standard_library_alone(folder: Path) -> None:
    source = (folder / "dualign_reward.py").read_text()
    names = {line.split()[1].split(".")[0] for line in source.splitlines() if line.startswith(("import ", "from "))}
    assert names <= sys.stdlib_module_names | {"__future__"}


def test_examples_are_rows_of_the_tilted_table_with_their_tilt(folder: Path, module: ModuleType) -> None:
    examples = read_json(folder / "examples.json")
    assert len(examples) == 8
    for example in examples:
        scores = example["scores"]
        assert example["reward"] == pytest.approx(scores["helpful"] - MULTIPLIER * (scores["harm"] - THRESHOLD))
        assert module.combine(scores) == pytest.approx(example["reward"])


@pytest.mark.parametrize(
    ("scorers", "message"),
    [
        (None, r"there is no .*scorers\.py; write it with a function score\(prompts, completions\)"),
        ("def score(prompts, completions): return {'helpful': [1.0]}", r"gives no 'harm'; it gives \['helpful'\]"),
        (
            "def score(prompts, completions): return {'helpful': [1.0], 'harm': []}",
            r"gives 0 values of 'harm' for 1 resp",
        ),
        (
            "def score(prompts, completions): return {'helpful': [1.0], 'harm': [float('nan')]}",
            r"the score 'harm' is nan; it must be finite",
        ),
    ],
)
def test_scores_that_are_none_are_refused(folder: Path, scorers: str | None, message: str) -> None:
    path = folder / "scorers.py"
    path.unlink(missing_ok=True)
    if scorers is not None:
        path.write_text(scorers)
    with pytest.raises(ValueError, match=message):
        load_module(folder).trl_reward([[{"role": "user", "content": "walk"}]], ["call"])


def test_text_that_does_not_begin_with_its_prompt_is_refused(module: ModuleType) -> None:
    with pytest.raises(ValueError, match="the response to the prompt 'walk' does not begin with it"):
        module.reward_func(["talk and call"], ["walk"], ["[]"])


def test_coefficients_carry_the_sign_of_the_direction() -> None:
    solution = build_solution(
        bound("kind", ">=", threshold=0.3, multiplier=0.9), bound("harm", "<=", threshold=0.2, multiplier=0.4)
    )
    terms = make_terms(solution, end_of_text="")
    assert [(one.name, one.coefficient, one.threshold) for one in terms.constraints] == [
        ("kind", 0.9, 0.3),
        ("harm", -0.4, 0.2),
    ]


def test_a_constraint_that_is_no_mean_of_a_score_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a solution would be whose tilt reads something else than score minus threshold."""
    write_tilted(run)
    tilt = Solution.tilt

    def of_squares(self: Solution, rows: pa.Table) -> np.ndarray:
        place = rows.schema.get_field_index("constraint_harm")
        return tilt(self, rows.set_column(place, "constraint_harm", pa.array(rows["constraint_harm"].to_numpy() ** 2)))

    monkeypatch.setattr(Solution, "tilt", of_squares)
    with pytest.raises(
        InputError, match=r"`rl-reward` cannot be written: .* something else than the mean of its score"
    ):
        write_exports(run, ["rl-reward"], SETTINGS)


def test_a_raw_score_that_no_term_reads_is_refused() -> None:
    """As a table has them whose constraint is on something that is made of a score."""
    terms = make_terms(build_solution(bound("tail", "<=", threshold=0.2, multiplier=0.4)), end_of_text="")
    table = pa.table({"reward": [1.0], "constraint_tail": [1.0], "score_harm": [3.0]})
    with pytest.raises(InputError, match=r"no term of reward\.json reads score_harm of the hand-off table"):
        raw_scores(table, terms)
    assert raw_scores(table.drop_columns("score_harm"), terms) == [{"helpful": 1.0, "tail": 1.0}]


def ascend(
    value: np.ndarray, score: np.ndarray, lam: float, *, ref_logp: np.ndarray, beta: float, scaled: str
) -> np.ndarray:
    """Where policy gradients with scaled advantages come to rest, a table of policies (p, y).

    Steps of natural gradients, computed exactly. Advantages are constants in the gradient, as a trainer has them, the
    KL divergence is a response's, and 1e-4 is added to a deviation as in TRL.
    """
    logits = ref_logp.copy()
    for _ in range(600):
        logp = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        policy = np.exp(logp)
        advantage = np.zeros_like(policy)
        for weight, part in [(1.0, value), (lam, score)] if scaled == "each" else [(1.0, value + lam * score)]:
            centred = weight * (part - (policy * part).sum(1, keepdims=True))
            advantage += centred if scaled == "no" else centred / (deviation(policy, part) + 1e-4)
        logits = logp + 0.1 / beta * (advantage - beta * (logp - ref_logp))
    return policy


def deviation(policy: np.ndarray, of: np.ndarray) -> np.ndarray:
    mean = (policy * of).sum(1, keepdims=True)
    return np.sqrt((policy * (of - mean) ** 2).sum(1, keepdims=True))


@pytest.mark.parametrize("beta", [0.8, 1.5])
def test_scaling_a_group_moves_the_optimum_and_the_constraint(beta: float) -> None:
    """What the card says: beta becomes beta sigma_x, and lambda, of separate functions, lambda sigma_r / sigma_g."""
    rng = np.random.default_rng(0)
    shape, lam = (200, 50), 0.5
    ref_logp = rng.normal(size=shape)
    ref_logp -= np.log(np.exp(ref_logp).sum(1, keepdims=True))
    value, score = 0.6 * rng.normal(size=shape), rng.normal(size=shape) * rng.uniform(0.3, 2, size=(200, 1))

    def gibbs(tilt: np.ndarray) -> np.ndarray:
        logits = ref_logp + tilt
        weight = np.exp(logits - logits.max(1, keepdims=True))
        return weight / weight.sum(1, keepdims=True)

    def shown(policy: np.ndarray) -> tuple[float, float]:
        """Mean of the score, and the KL divergence, nats."""
        logp = np.log(np.maximum(policy, 1e-300))
        return float((policy * score).sum(1).mean()), float((policy * (logp - ref_logp)).sum(1).mean())

    total = value + lam * score
    tilted = gibbs(total / beta)
    how = {"ref_logp": ref_logp, "beta": beta}
    summed, grouped, each = (ascend(value, score, lam, scaled=one, **how) for one in ("no", "group", "each"))
    np.testing.assert_allclose(summed, tilted, atol=1e-6)
    shifted = ascend(value, score - 3.0, lam, scaled="no", **how)  # centred at a threshold or not
    np.testing.assert_allclose(shifted, tilted, atol=1e-6)
    assert shown(grouped)[1] > 1.4 * shown(tilted)[1]
    assert abs(shown(grouped)[0] - shown(tilted)[0]) > 0.04
    assert abs(shown(each)[0] - shown(tilted)[0]) > 0.04
    if beta == 1.5:  # where it comes to rest
        np.testing.assert_allclose(grouped, gibbs(total / beta / (deviation(grouped, total) + 1e-4)), atol=1e-3)
        of_each = value / (deviation(each, value) + 1e-4) + lam * score / (deviation(each, score) + 1e-4)
        np.testing.assert_allclose(each, gibbs(of_each / beta), atol=1e-3)


@pytest.mark.parametrize("trainer", ["rloo", "grpo"])
def test_the_trainers_of_trl_read_it(trainer: str, folder: Path, module: ModuleType, tmp_path: Path) -> None:
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    config, kind, options = {
        "rloo": (RLOOConfig, RLOOTrainer, {"normalize_advantages": False}),
        "grpo": (GRPOConfig, GRPOTrainer, {"scale_rewards": "none", "loss_type": "dr_grpo"}),
    }[trainer]
    reference = save_tiny_policy(tmp_path / "reference", bos="template", eos_logit=3.0)
    seen: list[tuple[list[str], list[float]]] = []

    def watched(prompts: list, completions: list, **columns: object) -> list[float]:
        rewards = module.trl_reward(prompts, completions, **columns)
        seen.append(([one[-1]["content"] for one in completions], rewards))
        return rewards

    torch.set_num_threads(1)
    training = kind(
        AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32),
        reward_funcs=watched,
        args=config(
            output_dir=str(tmp_path / "out"),
            beta=module.beta(),
            num_generations=4,
            per_device_train_batch_size=8,
            max_completion_length=8,
            max_steps=2,
            bf16=False,
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            use_cpu=True,
            seed=0,
            **options,
        ),
        train_dataset=load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache")),
        processing_class=AutoTokenizer.from_pretrained(reference),
    )
    training.train()
    assert seen
    for texts, rewards in seen:
        assert rewards == pytest.approx([expected(text) for text in texts])
    logs = [entry for entry in training.state.log_history if "reward" in entry]
    assert logs[0]["reward"] == pytest.approx(np.mean(seen[0][1]), abs=1e-5)
