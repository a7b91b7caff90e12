"""The whole run on models of your own: prepare, sample, score, solve, export, train, evaluate, report.

    make setup
    .venv/bin/python examples/own_models.py [--run NAME] [OPTIONS OF dualign run]
    .venv/bin/python examples/own_models.py --reference.model /models/my-chat-model --limit 20

It runs ``dualign run --config examples/own_models.yaml`` and shows what came out. Without options the models are those
of the embedded world, which is built first (two minutes, once). Run again, it takes seconds: finished steps are kept.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq

import dualign

RECIPE = Path(__file__).parent / "own_models.yaml"
DID_NOT_PAY = 6
"""Everything is written, and the policy is no better than the reference."""


def main() -> int:
    """Run the recipe, print the verdicts and a response before and after; the exit code of ``dualign run``."""
    parser = argparse.ArgumentParser(description="the whole run on models of your own", allow_abbrev=False)
    parser.add_argument("--run", default="own-models", help="name of the run")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="holds runs/ and models/")
    options, settings = parser.parse_known_args()
    command = ["run", "--config", str(RECIPE), "--run", options.run, "--data-dir", str(options.data_dir), *settings]
    code = subprocess.run([sys.executable, "-m", "pipeline", *command], check=False).returncode
    if code not in (0, DID_NOT_PAY):
        return code

    run = dualign.load_run(options.data_dir / "runs" / options.run)
    print(f"\ntrust in lambda*: {run.dual['trust']['verdict']}; evaluation: {run.evaluation['status']}")
    print(f"closed fraction: {run.evaluation['lagrangian']['closed_fraction']:.2f} of the way to the tilted optimum")

    after = pq.read_table(run.folder / "evaluation" / "samples" / "data").slice(0, 1).to_pylist()[0]
    before = next(row for row in run.tilted.to_pylist() if row["prompt_id"] == after["prompt_id"])
    print(f"\nprompt:    {before['prompt'][-1]['content']}")
    print(f"reference: {before['completion']}")
    print(f"policy:    {after['completion']}")
    print(f"\nthe page: {run.folder / 'report' / 'report.html'}; the policy: {run.policy_path}")
    return code


if __name__ == "__main__":
    sys.exit(main())
