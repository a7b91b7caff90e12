"""Time to solve the dual: ours against projected gradient, L-BFGS-B, and cvxpy with Clarabel and SCS.

    python benchmarks/dual_solvers.py [--quick] [--sizes 1000x128x1 ...] [--limit 300] [--output FILE]

All contestants get the same arrays: Gaussian scores (gaussian_population.py) at a margin of half a standard deviation
over the reference mean, beta = 1 in standard deviations of the reward. A size is prompts x responses x constraints; a
trailing "h" (1000x128x1h) makes scores six times as large and beta 0.1, about the scale of the papers' reward models.

Three measures, all on the first lam >= 0 that a contestant puts forward, by one NumPy function for all:

- gap 1e-6 and 1e-9: the duality gap, |D(lam) - primal value of the policy tilted by lam| = |<lam, slack>|, over
  max(beta, sd of r within prompts, <lam, sd of g within prompts>), where that policy also misses no threshold by more
  than so many sd of its score: without it lam = 0 would have no gap. Anyone can compute it.
- distance 1e-9: D(lam) - D* over the same scale, D* = D at our certified lam*. It is quadratic in the error of lam:
  1e-9 is five digits of lam or fewer. Nobody who does not know D* can stop there, so it favours those who do not
  prove their answer.
- KKT 1e-8: the largest |min(lam s / beta, slack / s)| with s the sd of g within prompts; what our answers satisfy.

Time runs from the arrays to that lam and includes building the problem (ours: validation, feasibility, solution and
certificate; cvxpy: modelling and compiling). Taking the measures, imports and a warm-up on a small problem are not
counted. Each contestant runs in a process of its own under a limit of time and of address space; its times are
medians of up to 15 repeats. Those who take less than a second a try then run again, in turn and in one process, so
that moments when the machine is slow are so for all, and none finds its memory as it left it: their times are medians
of that run-off. Times alone, repeat after repeat, are kept in the file of --output.

Contestants:
- ours: DualProblem.from_arrays and solve_dual.
- projected gradient from lam = 1 with a constant step: 1; beta / G and beta / G^2 with G the largest norm of g - b
  (the papers' step for their smoothness constant, and for the constant that holds); 4 and its restarts with ever
  smaller steps, as in the papers' code; and the best constant step, found by a search that is not counted.
- scipy's L-BFGS-B from lam = 0 with a vectorised value and gradient: default tolerances, and tight ones.
- cvxpy, log_sum_exp over the responses of every prompt, with Clarabel and SCS: default tolerances, then tight ones
  where the defaults do not reach 1e-9; each try has the limit to itself.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from gaussian_population import GaussianPopulation

from pipeline.contracts.arrays import FloatArray
from stage1_dual.dual import DualProblem, solve_dual

OURS = "ours"
_GAPS = {"gap 1e-6": 1e-6, "gap 1e-9": 1e-9}
_KKT = "KKT 1e-8"
_KKT_RESIDUAL = 1e-8
_DISTANCE = "distance 1e-9"
_DISTANCE_REACHED = 1e-9
GOALS = (*_GAPS, _DISTANCE, _KKT)
_REPEATS = 15
_REPEAT_SECONDS = 3.0
_QUICK_SECONDS = 1.0
_RUN_OFF_REPEATS = 50
_RUN_OFF_SECONDS = 45.0
_MOST_STEPS = 10_000


class OverError(Exception):
    """Every goal is reached, or the time is up: the contestant need not go on."""


@dataclass(frozen=True)
class Size:
    """What to draw."""

    n_prompts: int
    n_responses: int
    n_constraints: int
    is_hard: bool

    @classmethod
    def parse(cls, text: str) -> Size:
        """From "1000x128x3" or "1000x128x3h"."""
        prompts, responses, constraints = text.removesuffix("h").split("x")
        return cls(int(prompts), int(responses), int(constraints), text.endswith("h"))

    def __str__(self) -> str:
        return f"{self.n_prompts}x{self.n_responses}x{self.n_constraints}{'h' if self.is_hard else ''}"

    def draw(self, seed: int) -> Arrays:
        """The arrays every contestant gets."""
        population = GaussianPopulation(
            n_constraints=self.n_constraints,
            beta=0.1 if self.is_hard else 1.0,
            scale=6.0 if self.is_hard else 1.0,
        )
        r_pk, g_pkm = population.draw(
            np.random.default_rng(seed), n_prompts=self.n_prompts, n_responses=self.n_responses
        )
        return Arrays(r_pk, g_pkm, np.mean(g_pkm, axis=(0, 1)) + population.margins_m, population.beta)


@dataclass(frozen=True)
class Arrays:
    """Rewards (p, k), constraint scores (p, k, m), thresholds (m,), KL strength."""

    r_pk: FloatArray
    g_pkm: FloatArray
    b_m: FloatArray
    beta: float

    def dual(self) -> Callable[[FloatArray], tuple[float, FloatArray]]:
        """D and its gradient, written as one would for scipy: two passes of BLAS and one of exp."""
        n_prompts, n_responses, n_constraints = self.g_pkm.shape
        reward_pk = self.r_pk / self.beta
        scores_nm = ((self.g_pkm - self.b_m) / self.beta).reshape(-1, n_constraints)

        def value_and_gradient(lam_m: FloatArray) -> tuple[float, FloatArray]:
            work_pk = reward_pk + (scores_nm @ lam_m).reshape(n_prompts, n_responses)
            top_p1 = work_pk.max(axis=1, keepdims=True)
            work_pk -= top_p1
            np.exp(work_pk, out=work_pk)
            mass_p1 = work_pk.sum(axis=1, keepdims=True)
            value = self.beta * float(np.mean(top_p1 + np.log(mass_p1 / n_responses)))
            work_pk /= mass_p1
            return value, self.beta / n_prompts * (work_pk.reshape(-1) @ scores_nm)

        return value_and_gradient


class Judge:
    """Knows the answer, keeps the clock, and notes when a goal is first reached."""

    def __init__(self, arrays: Arrays, limit: float) -> None:
        problem = DualProblem.from_arrays(arrays.r_pk, arrays.g_pkm, thresholds=arrays.b_m, beta=arrays.beta)
        solution = solve_dual(problem)
        self.lam_star_m = solution.multipliers
        self.hess_mm = solution.hessian
        self._beta, self._score_scale_m = problem.beta, problem.score_scale_m
        self._dual = arrays.dual()
        self._d_star = self._dual(self.lam_star_m)[0]
        self._least_scale = max(arrays.beta, problem.reward_scale)
        self._limit = limit

    def start(self) -> None:
        """Begin a try."""
        self.seconds: dict[str, float] = {}
        self.best_gap = self.best_kkt = self.lam_error = np.inf
        self.n_steps = 0
        self.elapsed = 0.0
        self._started = time.perf_counter()

    def judge(self, lam_m: FloatArray, known: tuple[float, FloatArray] | None = None) -> None:
        """Take note of ``lam_m``; ``known`` are D and its gradient where the contestant has them.

        Raises:
            OverError: there is nothing left to reach, or no time.
        """
        self.elapsed += time.perf_counter() - self._started
        self.n_steps += 1
        # A solver of cones leaves -1e-12 where it means 0.
        lam_m = np.maximum(lam_m, 0.0)
        value, slack_m = known or self._dual(lam_m)
        scale = max(self._least_scale, float(lam_m @ self._score_scale_m))
        missed = float(np.max(-slack_m / self._score_scale_m))
        gap = max(abs(float(lam_m @ slack_m)) / scale, missed)
        residual_m = np.minimum(lam_m * self._score_scale_m / self._beta, slack_m / self._score_scale_m)
        kkt = float(np.max(np.abs(residual_m)))
        self.best_gap, self.best_kkt = min(self.best_gap, gap), min(self.best_kkt, kkt)
        self.lam_error = min(self.lam_error, float(np.max(np.abs(lam_m - self.lam_star_m))))
        for goal, target in _GAPS.items():
            if gap <= target:
                self.seconds.setdefault(goal, self.elapsed)
        # Rounding can put D below D*.
        if value - self._d_star <= _DISTANCE_REACHED * scale:
            self.seconds.setdefault(_DISTANCE, self.elapsed)
        if kkt <= _KKT_RESIDUAL:
            self.seconds.setdefault(_KKT, self.elapsed)
        if len(self.seconds) == len(GOALS) or self.elapsed > self._limit:
            raise OverError
        self._started = time.perf_counter()

    def run(self, contestant: Try, arrays: Arrays) -> dict[str, object]:
        """One try of ``contestant``, timed."""
        self.start()
        try:
            note = contestant(arrays, self.judge)
            self.elapsed += time.perf_counter() - self._started
        except OverError:
            note = f"over {self._limit:g} s" if self.elapsed > self._limit else ""
        return {
            "seconds": {goal: self.seconds.get(goal) for goal in GOALS},
            "elapsed": self.elapsed,
            "gap": self.best_gap,
            "kkt": self.best_kkt,
            "lam_error": self.lam_error,
            "steps": self.n_steps,
            "note": note,
        }


Report = Callable[..., None]
Try = Callable[[Arrays, Report], str]


def try_ours(arrays: Arrays, report: Report) -> str:
    """Feasibility, solution and certificate from the raw arrays."""
    problem = DualProblem.from_arrays(arrays.r_pk, arrays.g_pkm, thresholds=arrays.b_m, beta=arrays.beta)
    report(solve_dual(problem).multipliers)
    return ""


def _steps(arrays: Arrays, report: Report, step: float, n_steps: int) -> Iterator[FloatArray]:
    dual = arrays.dual()
    lam_m = np.ones(len(arrays.b_m))
    for _ in range(n_steps):
        value, gradient_m = dual(lam_m)
        report(lam_m, (value, gradient_m))
        lam_m = np.maximum(lam_m - step * gradient_m, 0.0)
        yield lam_m


def try_constant_step(step_of: Callable[[Arrays], float], arrays: Arrays, report: Report) -> str:
    """Projected gradient from lam = 1."""
    step = step_of(arrays)
    for _ in _steps(arrays, report, step, _MOST_STEPS):
        pass
    return f"{_MOST_STEPS} steps of {step:.3g}"


def largest_norm(arrays: Arrays) -> float:
    """G, the largest Euclidean norm of g - b over all responses."""
    return float(np.sqrt(np.max(np.sum((arrays.g_pkm - arrays.b_m) ** 2, axis=2))))


def try_restarts(arrays: Arrays, report: Report) -> str:
    """200 steps from lam = 1, again with a smaller step until the last five iterates agree to 1e-5."""
    step = 4.0
    for restart in range(10):
        path: list[FloatArray] = []
        for lam_m in _steps(arrays, report, step, 200):
            path.append(lam_m)
            if len(path) >= 10 and np.max(np.ptp(path[-5:], axis=0)) < 1e-5:
                return f"stops with step {step:.3g}"
        step /= 2.0 ** (restart + 1)
    return "gives up after 10 restarts"


def best_step(arrays: Arrays, judge: Judge) -> float:
    """The constant step that needs the fewest steps, over a grid around what is best for the quadratic at lam*."""
    eigenvalues = np.linalg.eigvalsh(judge.hess_mm)
    centre = 2.0 / (eigenvalues[0] + eigenvalues[-1])
    best, fewest = centre, 2_000
    for factor in (1.0, 0.9, 1.1, 0.8, 1.2, 0.7, 0.6, 1.4, 0.5, 0.3, 0.1, 0.03):
        judge.start()
        try:
            for _ in _steps(arrays, judge.judge, factor * centre, fewest):
                pass
        except OverError:
            if judge.n_steps < fewest and len(judge.seconds) == len(GOALS):
                best, fewest = factor * centre, judge.n_steps
    return float(best)


def try_lbfgsb(options: Any, arrays: Arrays, report: Report) -> str:
    """scipy.optimize.minimize as it comes."""
    from scipy.optimize import OptimizeResult, minimize

    n_constraints = len(arrays.b_m)

    def callback(intermediate_result: OptimizeResult[Any]) -> None:
        report(np.asarray(intermediate_result.x, dtype=np.float64))

    result = minimize(
        arrays.dual(),
        np.zeros(n_constraints),
        jac=True,
        method="L-BFGS-B",
        bounds=[(0.0, None)] * n_constraints,
        callback=callback,
        options=options,
    )
    return str(result.message)


def try_cvxpy(solver: str, options: dict[str, float], arrays: Arrays, report: Report) -> str:
    """One log_sum_exp a prompt, vectorised."""
    import cvxpy

    cp: Any = cvxpy  # its functions are not declared
    n_prompts, n_responses, n_constraints = arrays.g_pkm.shape
    lam = cp.Variable(n_constraints, nonneg=True)
    scores_nm = ((arrays.g_pkm - arrays.b_m) / arrays.beta).reshape(-1, n_constraints)
    exponent = cp.reshape(scores_nm @ lam, (n_prompts, n_responses), order="C") + arrays.r_pk / arrays.beta
    problem = cp.Problem(cp.Minimize(cp.sum(cp.log_sum_exp(exponent, axis=1)) * (arrays.beta / n_prompts)))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Solution may be inaccurate")
        problem.solve(solver=solver, **options)
    if lam.value is not None:
        report(np.asarray(lam.value, dtype=np.float64))
    return str(problem.status)


# Each name's tries, in order, until one reaches the smallest gap.
CONTESTANTS: dict[str, tuple[Try, ...]] = {
    OURS: (try_ours,),
    "projected gradient, step 1": (partial(try_constant_step, lambda _: 1.0),),
    "projected gradient, step beta/G": (
        partial(try_constant_step, lambda arrays: arrays.beta / largest_norm(arrays)),
    ),
    "projected gradient, step beta/G^2": (
        partial(try_constant_step, lambda arrays: arrays.beta / largest_norm(arrays) ** 2),
    ),
    "projected gradient, restarts from step 4": (try_restarts,),
    "projected gradient, best constant step": (),
    "L-BFGS-B": (partial(try_lbfgsb, {}),),
    "L-BFGS-B, tight": (partial(try_lbfgsb, {"ftol": 1e-16, "gtol": 1e-12}),),
    "cvxpy, Clarabel": (
        partial(try_cvxpy, "CLARABEL", {}),
        partial(try_cvxpy, "CLARABEL", {"tol_gap_abs": 1e-11, "tol_gap_rel": 1e-11, "tol_feas": 1e-11}),
    ),
    "cvxpy, SCS": (
        partial(try_cvxpy, "SCS", {}),
        partial(try_cvxpy, "SCS", {"eps_abs": 1e-9, "eps_rel": 1e-9, "max_iters": 10**7}),
    ),
}


def _tries(name: str, arrays: Arrays, judge: Judge) -> tuple[Try, ...]:
    if CONTESTANTS[name]:
        return CONTESTANTS[name]
    step = best_step(arrays, judge)
    return (partial(try_constant_step, lambda _: step),)


def _compete(name: str, size: Size, seed: int, limit: float, memory_bytes: int, pipe: Connection) -> None:
    """In a process of its own: every try of one contestant, told to the parent as it goes."""
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    try:
        arrays = size.draw(seed)
        judge = Judge(arrays, limit)
        tries = _tries(name, arrays, judge)
        small = Size(20, 8, size.n_constraints, is_hard=False).draw(seed)
        small_judge = Judge(small, limit)
        for contestant in tries:
            small_judge.run(contestant, small)
            spent = 0.0
            for _ in range(_REPEATS):
                pipe.send({"event": "start"})
                figures = judge.run(contestant, arrays)
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
                pipe.send({"event": "done", "peak_bytes": peak, **figures})
                spent += judge.elapsed
                if spent > _REPEAT_SECONDS:
                    break
            pipe.send({"event": "next"})
            if judge.best_gap <= min(_GAPS.values()):
                break
    except MemoryError:
        pipe.send({"event": "memory"})
    pipe.send({"event": "end"})


def _peak_bytes(pid: int | None) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


@dataclass(frozen=True)
class Outcome:
    """What one contestant did at one size: the repeats of each try, peak memory, and what ended it before its time."""

    tries: list[list[dict[str, Any]]]
    peak_bytes: int
    cut_short: str

    @property
    def is_quick(self) -> bool:
        """Whether repeats cost little."""
        seconds = [one["elapsed"] for repeats in self.tries for one in repeats]
        return not self.cut_short and max(seconds, default=np.inf) <= _QUICK_SECONDS


def compete(name: str, size: Size, *, seed: int, limit: float, memory_bytes: int) -> Outcome:
    """Run one contestant once through."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_compete, args=(name, size, seed, limit, memory_bytes, sender))
    process.start()
    sender.close()
    tries: list[list[dict[str, Any]]] = [[]]
    end, peak, is_timed = "", 0, False
    while not end:
        # A contestant that comes back to the judge is stopped there; this is for those that do not.
        if not receiver.poll(1.05 * limit + 5.0 if is_timed else 600.0):
            end = f"over {limit:g} s" if is_timed else "set-up over 600 s"
            peak = max(peak, _peak_bytes(process.pid))
            break
        try:
            message = receiver.recv()
        except EOFError:
            process.join()
            end = f"ended by signal {-(process.exitcode or 0)} under {memory_bytes / 2**30:g} GiB"
            break
        is_timed = message["event"] == "start"
        if message["event"] == "done":
            tries[-1].append(message)
            peak = max(peak, message["peak_bytes"])
        elif message["event"] == "next":
            tries.append([])
        elif message["event"] == "memory":
            end = f"out of memory ({memory_bytes / 2**30:g} GiB)"
        elif message["event"] == "end":
            break
    process.kill()
    process.join()
    return Outcome([one for one in tries if one], peak, end)


def run_off(outcomes: dict[str, Outcome], size: Size, seed: int, limit: float) -> dict[str, Outcome]:
    """Contestants again, each once a turn; meant for a process of its own."""
    arrays = size.draw(seed)
    judge = Judge(arrays, limit)
    tries = {name: _tries(name, arrays, judge)[: len(outcome.tries)] for name, outcome in outcomes.items()}
    found: dict[str, list[list[dict[str, Any]]]] = {name: [[] for _ in of_name] for name, of_name in tries.items()}
    order = np.random.default_rng(seed)
    started = time.perf_counter()
    # Once through before it counts: the first time round a contestant imports what it needs.
    for number in range(1 + _RUN_OFF_REPEATS):
        # In another order each time: who follows a long run of its own kind finds caches and memory ready.
        for name in order.permutation(list(tries)):
            for place, contestant in enumerate(tries[name]):
                figures = judge.run(contestant, arrays)
                if number > 0:
                    found[name][place].append(figures)
        if number > 0 and time.perf_counter() - started > _RUN_OFF_SECONDS:
            break
    return {name: replace(outcome, tries=found[name]) for name, outcome in outcomes.items()}


def compete_at(
    names: list[str], size: Size, *, seed: int, limit: float, memory_bytes: int
) -> Iterator[dict[str, Any]]:
    """All contestants at one size; the row of each."""
    outcomes: dict[str, Outcome] = {}
    for name in names:
        print(f"{size}: {name}", file=sys.stderr)
        outcomes[name] = compete(name, size, seed=seed, limit=limit, memory_bytes=memory_bytes)
    alone = {name: _summarise(outcome.tries) for name, outcome in outcomes.items()}
    quick = {name: outcome for name, outcome in outcomes.items() if outcome.is_quick}
    if quick:
        print(f"{size}: run-off of {len(quick)}", file=sys.stderr)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            outcomes |= pool.submit(run_off, quick, size, seed, limit).result()
    for name, outcome in outcomes.items():
        yield {
            "size": str(size),
            "contestant": name,
            **_summarise(outcome.tries),
            "alone": {goal: alone[name][goal] for goal in GOALS},
            "peak_gib": outcome.peak_bytes / 2**30,
            "cut_short": outcome.cut_short,
        }


def _summarise(tries: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Median seconds to each goal in the first try that reaches it; the best figures of all tries."""
    summary: dict[str, Any] = dict.fromkeys(GOALS)
    for repeats in tries:
        for goal in GOALS:
            seconds = [repeat["seconds"][goal] for repeat in repeats]
            if summary[goal] is None and None not in seconds:
                summary[goal] = statistics.median(seconds)
    best = {name: min((repeats[-1][name] for repeats in tries), default=None) for name in ("gap", "kkt", "lam_error")}
    endings = [
        {
            "seconds": statistics.median(one["elapsed"] for one in repeats),
            "steps": repeats[-1]["steps"],
            "note": repeats[-1]["note"],
        }
        for repeats in tries
    ]
    return {**summary, **best, "tries": endings}


def machine_facts() -> dict[str, object]:
    """What the times depend on."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("numpy", "scipy", "cvxpy", "clarabel", "scs")},
    }


HEADER = (
    f"| size | contestant | {' | '.join(f'{goal}, s | / ours' for goal in GOALS)} "
    "| best gap | best error of λ | GiB | tries |"
)


def format_row(row: dict[str, Any], ours: dict[str, Any]) -> str:
    """One line of the table."""
    cells = [row["size"], row["contestant"]]
    for goal in GOALS:
        if row[goal] is None:
            cells += [row["cut_short"] or "no", ""]
        else:
            cells += [f"{row[goal]:.3g}", f"{row[goal] / ours[goal]:.3g}" if ours.get(goal) else ""]
    cells += ["" if row[name] is None else f"{row[name]:.0e}" for name in ("gap", "lam_error")]
    cells.append(f"{row['peak_gib']:.2f}")
    endings = [
        ", ".join([f"{one['seconds']:.3g} s", f"iterates {one['steps']}", *([one["note"]] if one["note"] else [])])
        for one in row["tries"]
    ]
    cells.append("; ".join([*endings, row["cut_short"]] if row["cut_short"] else endings))
    return f"| {' | '.join(cells)} |"


def main(arguments: list[str] | None = None) -> None:
    """Run every contestant at every size and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", help="prompts x responses x constraints, with h for a small beta")
    parser.add_argument("--contestants", nargs="+", choices=list(CONTESTANTS), default=list(CONTESTANTS))
    parser.add_argument("--limit", type=float, help="seconds a try may take (default 300)")
    parser.add_argument("--memory-gib", type=float, default=16.0, help="address space of a contestant")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="the smallest size with a limit of 30 s")
    parser.add_argument("--output", type=Path, help="JSON file for the machine's facts and the rows")
    args = parser.parse_args(arguments)
    default_sizes = ["1000x128x1"] if args.quick else ["1000x128x1", "1000x128x3", "20000x128x3", "1000x128x1h"]
    limit = args.limit or (30.0 if args.quick else 300.0)
    facts = machine_facts()
    print(", ".join(f"{name} {value}" for name, value in facts.items()), end="\n\n")
    print(HEADER)
    print("|" + "---|" * (HEADER.count("|") - 1))
    rows: list[dict[str, Any]] = []
    memory_bytes = int(args.memory_gib * 2**30)
    for size in map(Size.parse, args.sizes or default_sizes):
        of_size = list(compete_at(args.contestants, size, seed=args.seed, limit=limit, memory_bytes=memory_bytes))
        ours = next((row for row in of_size if row["contestant"] == OURS), {})
        for row in of_size:
            print(format_row(row, ours), flush=True)
        rows += of_size
    if args.output:
        text = json.dumps({"machine": facts, "limit_s": limit, "seed": args.seed, "rows": rows}, indent=1)
        args.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
