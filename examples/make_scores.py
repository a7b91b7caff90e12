"""Write ``scores.csv`` anew from the default run: ``make stage1``, then ``python examples/make_scores.py``.

The prompts are those whose id, a hash, comes first in each split.
"""

import csv
from pathlib import Path

import pyarrow.parquet as pq

RUN = Path("data/runs/embedded")
N_PROMPTS = {"train": 120, "test": 40}
N_RESPONSES = 32
SCORES = ("helpful", "harmless", "humour")


def main() -> None:
    """Join the run's tables by key and write the first responses of some prompts."""
    prompts = sorted(pq.read_table(RUN / "prompts" / "data").to_pylist(), key=lambda row: row["prompt_id"])
    kept = [row for split, n in N_PROMPTS.items() for row in [one for one in prompts if one["split"] == split][:n]]
    samples = pq.read_table(RUN / "samples" / "data", columns=["prompt_id", "sample_index", "completion"])
    words = {(row["prompt_id"], row["sample_index"]): len(row["completion"].split()) for row in samples.to_pylist()}
    scores = {
        name: {
            (row["prompt_id"], row["sample_index"]): row["value"]
            for row in pq.read_table(RUN / "scores" / name / "data").to_pylist()
        }
        for name in SCORES
    }
    with (Path(__file__).parent / "scores.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["prompt_id", "sample_index", "split", "category", *SCORES, "words"])
        for prompt in kept:
            for index in range(N_RESPONSES):
                key = (prompt["prompt_id"], index)
                values = [f"{scores[name][key]:.3f}" for name in SCORES]
                writer.writerow([key[0][:8], index, prompt["split"], prompt["category"], *values, words[key]])


if __name__ == "__main__":
    main()
