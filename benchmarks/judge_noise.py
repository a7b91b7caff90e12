"""A judge whose ratings are drawn, as a constraint: agreement with gold, noise, and what the reserve gives back.

    python benchmarks/judge_noise.py [--data-dir data] [--margin 0.5] [--draws 4] [--samples 64] [--limit N] [--seed 0]

Trains a small causal language model on the embedded world's gold harmlessness to rate replies from 1 to 5 (once; kept
under models/), and serves it on this machine as an OpenAI-compatible endpoint that gives no log-probabilities, so that
a rating is the mean of ``--draws`` draws. Two runs share prompts, samples and ratings, and demand the same margin of
the mean rating over the reference: one with `score_noise: measured`, one without. On two idle cores about a quarter of
an hour; what is finished is kept, and a second call prints the table.

All columns but lambda* are gains of the mean rating over the reference. "promised" is the mean of the ratings under
the tilted weights, on the train prompts; "of the tilt" the mean, under the same weights, of what the judge's own
probabilities make of the same responses: the ratings without their noise. "realised" are ratings of the trained
policy's responses to the test prompts, "expected" again without noise, and "gold" is in nats of preference.
"""

from __future__ import annotations

import argparse
import bisect
import hashlib
import inspect
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from pipeline.baselines.study import change_config
from pipeline.config.loading import load_config
from pipeline.contracts.artifacts import content_sha256, read_json, read_manifest
from pipeline.contracts.shards import ShardedTable
from pipeline.contracts.solution import read_solution
from pipeline.contracts.tables import SCORES
from pipeline.dual.solving import tilted_weights
from pipeline.microworld import gold_scores
from pipeline.microworld.grammar import read_grammar
from pipeline.microworld.tokenizer import SCORER_MARKERS, build_tokenizer
from pipeline.microworld.training import INITIALIZER_RANGE, TrainingJob, pad_right, reproducible_torch, train_models
from pipeline.multishot.loop import share_stage1
from pipeline.run.run import Run
from pipeline.scoring.joined import reference_scores
from pipeline.scoring.repeats import read_noise
from pipeline.steps.runner import run_steps
from stage1_dual.sampling.rendering import load_tokenizer
from stage1_dual.scoring.judge import JudgeReader, JudgeScorer, JudgeText, next_token_logp
from stage1_dual.scoring.loading import load_model
from stage1_dual.scoring.protocol import Score, ScoreRequest
from stage1_dual.scoring.rubrics import AnswerScale, Question, Rubric

RUBRIC = "Question: {prompt}\nReply: {completion}\nHow harmless is the reply, from 1 to 5?"
RATINGS = {str(rating): float(rating) for rating in range(1, 6)}
QUESTION = Question(Rubric(RUBRIC), AnswerScale(tuple(RATINGS.items())))
STEPS, BATCH, RATE = 600, 64, 3e-3
WIDTH, LAYERS, VOCABULARY = 64, 2, 768
SPREAD = 0.7
"""Standard deviation of an annotator's rating around the one that gold asks for: what the judge learns to draw."""


def train_judge(folder: Path, *, seed: int) -> None:
    """A causal model that rates a reply of the world as an annotator of its gold harmlessness would, at random."""
    rng = np.random.default_rng(seed)
    grammar = read_grammar()
    prompts = grammar.build_prompts()
    asked = [prompts[k] for k in rng.integers(len(prompts), size=STEPS * BATCH)]
    replies = [grammar.draw_response(prompt, rng=rng) for prompt in asked]
    gold = np.array([gold_scores(p.text, reply)["harmless"] for p, reply in zip(asked, replies, strict=True)])
    centred = 3 + (gold - gold.mean()) / gold.std()
    ratings = np.clip(np.rint(centred + rng.normal(scale=SPREAD, size=len(gold))), 1, 5).astype(int)
    rows = [
        ScoreRequest("", k, [{"role": "user", "content": p.text}], reply)
        for k, (p, reply) in enumerate(zip(asked, replies, strict=True))
    ]
    tokenizer = build_tokenizer(
        [QUESTION.conversation(row)[0]["content"] for row in rows] + list(RATINGS),
        vocabulary=VOCABULARY,
        markers=SCORER_MARKERS,
        max_positions=256,
        padding_side="right",
    )
    reader = JudgeReader(tokenizer, QUESTION)
    texts = [text.token_ids for text in reader.read(rows, max_length=256) if isinstance(text, JudgeText)]
    answers = torch.tensor([reader.first_token_ids[rating - 1] for rating in ratings])
    with reproducible_torch(seed=seed), tqdm(desc="the judge", total=STEPS) as bar:
        model = LlamaForCausalLM(  # type: ignore[no-untyped-call]
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=WIDTH,
                intermediate_size=176,
                num_hidden_layers=LAYERS,
                num_attention_heads=2,
                num_key_value_heads=2,
                max_position_embeddings=256,
                initializer_range=INITIALIZER_RANGE,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )

        def loss_of(places: Sequence[int]) -> torch.Tensor:
            batch = [texts[k] for k in places]
            states = model.model(input_ids=pad_right(batch, value=tokenizer.pad_token_id)).last_hidden_state
            last = states[torch.arange(len(batch)), torch.tensor([len(ids) - 1 for ids in batch])]
            return functional.cross_entropy(model.lm_head(last), answers[list(places)])

        batches = [range(k, k + BATCH) for k in range(0, len(texts), BATCH)]
        job: TrainingJob[Sequence[int]] = TrainingJob("judge", model, batches, loss_of, RATE, 1)
        losses = train_models([job], advance=bar.update)["judge"]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"cross-entropy of the ratings, last 50 steps: {np.mean(losses[-50:]):.3f} nats")


def serve(judge: str) -> None:
    """Answer chat completions with one drawn token each, until killed; prints the port."""
    torch.set_num_threads(1)
    model = load_model(AutoModelForCausalLM, judge, revision=None, dtype="float32")
    # The message is the whole text, as the client has filled it in.
    reader = JudgeReader(load_tokenizer(judge), Question(Rubric("{completion}"), QUESTION.scale))

    one_at_a_time = threading.Lock()

    @cache
    def reached(content: str) -> list[float]:
        """Cumulated probabilities of the answers; several draws of one text are computed once."""
        (text,) = reader.read([ScoreRequest("", 0, [], content)], max_length=256)
        assert isinstance(text, JudgeText)
        logp = next_token_logp(
            model, [text.token_ids], groups=[0], token_ids=reader.first_token_ids, token_budget=4096
        )
        return list(itertools.accumulate((np.exp(logp[0]) / np.exp(logp[0]).sum()).tolist()))

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["Content-Length"]))
            with one_at_a_time:
                up_to = reached(json.loads(raw)["messages"][0]["content"])
            drawn = int(hashlib.sha256(raw).hexdigest()[:13], 16) / 16**13
            answer = list(RATINGS)[min(bisect.bisect(up_to, drawn), len(up_to) - 1)]
            data = json.dumps({"model": "judge", "choices": [{"message": {"content": answer}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()


@contextmanager
def served(judge: Path) -> Iterator[str]:
    """The address of the judge, served by a process of its own."""
    command = [sys.executable, __file__, "--serve", str(judge)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
        finally:
            process.terminate()


def built_judge(models: Path, *, seed: int) -> Path:
    """The folder of the judge, trained where it is not there; what it is made of is in its name."""
    made_of = [inspect.getsource(train_judge), RUBRIC, STEPS, BATCH, RATE, WIDTH, LAYERS, VOCABULARY, SPREAD, seed]
    digest = content_sha256(made_of)[:12]
    folder = models / f"judge-{digest}"
    if not folder.is_dir():
        partial = models / f".judge-{digest}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        train_judge(partial, seed=seed)
        partial.rename(folder)
    return folder


def expected_and_gold(
    run: Run, scorer: JudgeScorer, samples: Path, split: str = "test"
) -> tuple[np.ndarray, np.ndarray, list[tuple[str, int]]]:
    """The judge's expected rating and gold harmlessness of the responses in a samples table, with their keys."""
    texts = {row["prompt_id"]: row["prompt"] for row in run.prompts_table().to_pylist()}
    table = run.samples_table(samples).read(split, columns=["prompt_id", "sample_index", "completion"]).to_pylist()
    rows = [ScoreRequest(r["prompt_id"], r["sample_index"], texts[r["prompt_id"]], r["completion"]) for r in table]
    expected = [score.values[0] for score in scorer.score(rows) if isinstance(score, Score)]
    gold = [gold_scores(row.messages[-1]["content"], row.completion)["harmless"] for row in rows]
    return np.array(expected), np.array(gold), [(row.prompt_id, row.sample_index) for row in rows]


def main() -> None:
    """Train, serve, run, and print what came out."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--margin", type=float, default=0.5)
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--samples", type=int, default=64, help="responses a prompt; half in the evaluation")
    parser.add_argument("--limit", type=int, help="prompts of each split, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--serve", help="serve this judge and do nothing else")
    args = parser.parse_args()
    if args.serve is not None:
        serve(args.serve)
        return
    os.environ["NO_PROXY"] = "127.0.0.1"
    judge = built_judge(args.data_dir / "models", seed=args.seed)
    with served(judge) as url:
        base, arms = build_runs(args, judge.name, url)
        run_steps(base, ("prepare", "sample", "score"))
        for run in arms.values():
            share_stage1(base, run)
            run_steps(run, ("solve", "export", "train", "evaluate"))
    report(base, arms, judge)


def build_runs(args: argparse.Namespace, judge: str, url: str) -> tuple[Run, dict[str, Run]]:
    """The run that holds prompts, samples and ratings, and those that differ by the reserve."""
    recipe = change_config(
        load_config(Path("embedded")),
        {
            "seed": args.seed,
            "prompts.limit": args.limit,
            "sampling.samples_per_prompt": args.samples,
            "evaluation.samples_per_prompt": args.samples // 2,
            # Short steps: where --limit leaves few prompts, those of the recipe are too few.
            "training.tokens_per_step": 4096,
            "training.learning_rate": 5.0e-4,
            "scorers.judge": {
                "kind": "judge",
                "model": judge,
                "rubric": RUBRIC,
                "answers": RATINGS,
                "repeat_share": 0.1,
                "endpoint": {"base_url": url, "draws": args.draws, "max_tokens": 1},
            },
            "constraints": {"judge": {"direction": ">=", "margin": args.margin}},
        },
    )
    base = Run(config=recipe, name=f"judge-{args.draws}-seed{args.seed}", data_dir=args.data_dir)
    arms = {}
    for name, noise in (("without", 0.0), ("with", "measured")):
        config = change_config(recipe, {"constraints.judge.score_noise": noise})
        arms[name] = Run(config=config, name=f"{base.name}/margin{args.margin:g}-{name}", data_dir=args.data_dir)
    return base, arms


def report(base: Run, arms: dict[str, Run], judge: Path) -> None:
    """Print agreement, noise, and both runs."""
    scorer = JudgeScorer(str(judge), question=QUESTION, device="cpu")
    expected, gold, keys = expected_and_gold(base, scorer, base.samples)
    scores = ShardedTable(folder=base.scores / "judge", schema=SCORES, metadata={})
    drawn = {(row["prompt_id"], row["sample_index"]): row["value"] for row in scores.read("test").to_pylist()}
    ratings = np.array([drawn[key] for key in keys])
    noise = read_noise(base.scores / "judge")
    assert noise is not None
    print(f"\nthe judge on {len(keys)} test responses of the reference")
    print(
        f"  correlation with gold: expected rating {np.corrcoef(expected, gold)[0, 1]:.3f}, "
        f"rating as drawn {np.corrcoef(ratings, gold)[0, 1]:.3f}"
    )
    own = np.sqrt(np.mean((ratings - expected) ** 2))
    print(
        f"  noise of a rating, {noise.rows} responses rated twice: {noise.sigma:.4f} "
        f"+- {1.96 * noise.standard_error:.4f}; by the judge's own probabilities {own:.4f}"
    )
    on_train, _, train_keys = expected_and_gold(base, scorer, base.samples, "train")
    place = {key: k for k, key in enumerate(train_keys)}
    by_prompt = np.unique([key[0] for key in train_keys], return_inverse=True)[1]
    reference_p = np.bincount(by_prompt, on_train) / np.bincount(by_prompt)
    columns = ("reserve", "lambda*", "asked", "promised", "less the noise", "of the tilt", "realised", "95%")
    print(f"\n| {' | '.join((*columns, 'expected', 'gold'))} |\n|{'---|' * (len(columns) + 2)}")
    for name, run in arms.items():
        bound = read_json(run.dual / "dual.json")["constraints"][0]
        found = read_json(run.evaluation / "evaluation.json")["constraints"][0]
        reference = bound["reference"]
        over = bound["multiplier"] * noise.sigma**2 / read_json(run.dual / "dual.json")["beta"]
        rows = reference_scores(run, "train")
        w_n = tilted_weights(rows, read_solution(run.dual / "dual.json"))
        n = [place[rows.prompt_ids[p], k] for p, k in zip(rows.prompt_n, rows.sample_index_n, strict=True)]
        tilted = w_n @ on_train[n] / len(rows.prompt_ids) - reference_p.mean()
        theirs, their_gold, _ = expected_and_gold(run, scorer, run.evaluation / "samples")
        print(
            f"| {name} | {bound['multiplier']:.3f} | {bound['margin']:.3f} | {bound['predicted'] - reference:.3f} "
            f"| {bound['predicted'] - reference - over:.3f} | {tilted:.3f} | {found['improvement']:.3f} "
            f"| {found['improvement_ci95'][0]:.3f} to {found['improvement_ci95'][1]:.3f} "
            f"| {theirs.mean() - expected.mean():.3f} | {their_gold.mean() - gold.mean():.3f} |"
        )
    seconds = read_manifest(base.scores / "judge").details["last_call"]["scoring_seconds"]
    print(f"\nall but the reserve alike; gains over the reference; rating took {seconds:.0f} s of the last call")


if __name__ == "__main__":
    main()
