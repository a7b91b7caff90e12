"""The dual on a table that does not fit in memory: time and peak memory of `dualign solve --table`.

    python benchmarks/dual_scale.py --rows 100_000_000 --folder /some/large/disk

Writes a table of that many scored rows with two constraints (128 responses a prompt, prompt ids as hexadecimal text,
rows in the order of the prompts), runs the command line on it in a process of its own, and prints what the kernel says
about that process. The table is kept between runs of the same size.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from pipeline.contracts.solution import Solution

N_RESPONSES = 128
CHUNK_PROMPTS = 8_192


def write_table(path: Path, n_rows: int) -> None:
    """Jointly Gaussian scores with a mean of their own on every prompt."""
    schema = pa.schema([("prompt_id", pa.string()), *((name, pa.float64()) for name in ("r", "g", "h"))])
    rng = np.random.default_rng(0)
    n_prompts = -(-n_rows // N_RESPONSES)
    partial = path.with_suffix(".partial")
    with pq.ParquetWriter(partial, schema, compression="zstd") as writer:
        for first in tqdm(range(0, n_prompts, CHUNK_PROMPTS), desc="writing the table"):
            size = min(CHUNK_PROMPTS, n_prompts - first)
            g, h, noise = rng.normal(size=(3, size, N_RESPONSES))
            r = -0.46 * g - 0.2 * h + 0.86 * noise
            columns = [(values + rng.normal(size=(size, 1))).reshape(-1) for values in (r, g, h)]
            ids = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(first, first + size)]
            column = pa.array(ids, pa.string()).take(pa.array(np.repeat(np.arange(size), N_RESPONSES)))
            writer.write_table(pa.table([column, *columns], schema=schema))
    partial.rename(path)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--folder", type=Path, required=True, help="where the table and the results go")
    options = parser.parse_args()
    table = options.folder / f"scores-{options.rows}.parquet"
    options.folder.mkdir(parents=True, exist_ok=True)
    if not table.is_file():
        write_table(table, options.rows)
    output = options.folder / f"solved-{options.rows}"
    asked = ["--reward", "r", "--constraint", "g >= ref + 0.5", "--constraint", "h >= ref + 0.1", "--beta", "1"]
    command = [
        str(Path(sys.executable).with_name("dualign")),
        "solve",
        "--table",
        str(table),
        *asked,
        "--output",
        str(output),
    ]
    started = time.monotonic()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.monotonic() - started
    if status:
        raise SystemExit(f"dualign solve ended with {os.waitstatus_to_exitcode(status)}")
    dual = json.loads((output / "dual.json").read_text())
    solution = Solution.from_document(dual, source=output / "dual.json")
    multipliers = ", ".join(f"{one.multiplier:.4f}" for one in solution.constraints)
    size = table.stat().st_size / 2**30
    print(f"{solution.n_samples:,} rows of {solution.n_prompts:,} prompts, table of {size:.2f} GiB")
    print(f"lambda* {multipliers}; KKT residual {dual['kkt_residual']:.1e}; {dual['n_evaluations']} evaluations")
    cpu, peak = usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20
    print(f"wall {wall:.1f} s; CPU {cpu:.1f} s; peak memory {peak:.2f} GiB")


if __name__ == "__main__":
    main()
