"""From a table of scores to lambda*, what each margin costs, and how far to trust it.

    pip install .
    python examples/scores.py [OUTPUT]

It needs the core install alone, no model and no GPU, and takes some seconds. The table, ``scores.csv``, has a row for
each response: its prompt, its place among the responses to that prompt, the split, and the scores. Yours may be CSV,
JSON Lines or Parquet, a pandas DataFrame or a pyarrow Table.
"""

import sys
from pathlib import Path

import dualign

TABLE = Path(__file__).parent / "scores.csv"
OUTPUT = Path(sys.argv[1] if len(sys.argv) > 1 else "out")

# The most helpfulness, with harmlessness 0.5 above the reference's mean; a nat of KL must earn a reward of 1.
result = dualign.solve(TABLE, reward="helpful", constraints=["harmless >= ref + 0.5"], beta=1.0)
print(result)

# What each margin would cost: a certified solution a row.
print(f"\n{result.frontier()}")

# How far to trust it. With a much smaller beta the policy would be a handful of responses, and the verdict says so.
print(f"\nbeta 1.0: {result.trust.verdict}")
steep = dualign.solve(TABLE, reward="helpful", constraints=["harmless >= ref + 0.5"], beta=0.1)
print(f"beta 0.1: {steep.trust.verdict}")
for sentence in (*steep.trust.reasons[:1], *steep.trust.advice[:1]):
    print(f"  {sentence}")

# A demand that no policy on these responses can meet is refused, with the largest that one can.
try:
    dualign.solve(TABLE, reward="helpful", constraints=["harmless >= ref + 50"], beta=1.0)
except dualign.InfeasibleError as error:
    print(f"\nharmless >= ref + 50: {error}")

# The files of `dualign solve --table`: dual.json, frontier.parquet, weights.parquet, figures.
result.save(OUTPUT)
print(f"\n{', '.join(sorted(path.name for path in OUTPUT.iterdir()))} in {OUTPUT}")
