"""The dual of a constrained alignment problem on scored samples: pure NumPy and SciPy.

    problem = DualProblem.from_arrays(reward_pk, constraints_pkm, thresholds=b_m, beta=1.0)
    solution = solve_dual(problem)      # certified, or an error that says why and what to do
    problem.tilted_weights(solution.multipliers)

Print a problem or a solution to read it as a table.

The sign convention, everywhere: a constraint score g is higher-better, slack = E[g] - threshold >= 0 means satisfied,
and lam >= 0. This module is the whole public interface: other packages import from here and from no module below. It
imports neither torch nor pandas, and no part of SciPy before something needs it.
"""

from pipeline.contracts.errors import InputError
from stage1_dual.dual.blocks import SampleBlock
from stage1_dual.dual.certificate import Certificate, certify
from stage1_dual.dual.cvar import Tail, TailSolution, fix_tails, maximise_over_tails, reference_tail
from stage1_dual.dual.diagnostics import Diagnostics, diagnose
from stage1_dual.dual.dual_function import DualEvaluation, build_normaliser, evaluate_dual, tilt
from stage1_dual.dual.dual_solution import DualSolution
from stage1_dual.dual.errors import (
    InfeasibilityCertificate,
    InfeasibleError,
    KlBudgetError,
    NotCertifiedError,
    TooFewRowsError,
)
from stage1_dual.dual.feasibility import AttainableMeans, Feasibility
from stage1_dual.dual.frontier import Frontier, solve_frontier, threshold_at_multipliers
from stage1_dual.dual.grouping import GroupedSamples, UngroupedScores, group_in_memory
from stage1_dual.dual.heldout import HeldoutPrediction, predict_heldout
from stage1_dual.dual.inference import (
    BootstrapIntervals,
    Estimates,
    PromptSample,
    ResponseBias,
    StandardErrors,
    bootstrap_intervals,
    sandwich_standard_errors,
)
from stage1_dual.dual.on_disk import OnDiskPartition, group_on_disk
from stage1_dual.dual.pilot import Pilot
from stage1_dual.dual.pilot_rows import PilotRows
from stage1_dual.dual.planned_sizes import (
    SamplePlan,
    SizeRequest,
    plan_sizes,
    reward_cost,
    top_up,
    why_not_so_many,
)
from stage1_dual.dual.problem import LARGEST_KL_SHARE, DualProblem
from stage1_dual.dual.response_ladder import LadderRung, ResponseLadder, climb_ladder
from stage1_dual.dual.samples import Partition, PassRunner, SampleScores
from stage1_dual.dual.slack_prediction import FEWEST_PROMPTS, LARGEST_CONFIDENCE, Prediction
from stage1_dual.dual.solver import MAX_EVALUATIONS, DualMinimum, minimise_dual, solve_dual
from stage1_dual.dual.tail_index import pareto_k
from stage1_dual.dual.threads import ThreadExecutor
from stage1_dual.dual.tightening import Demand, TightenedSolution, correct_response_bias, solve_tightened
from stage1_dual.dual.tilting import Normaliser, Tilt
from stage1_dual.dual.trust import LIMITS, Trust, judge_trust
from stage1_dual.dual.uncertainty import Uncertainty, quantify_uncertainty

__all__ = [
    "FEWEST_PROMPTS",
    "LARGEST_CONFIDENCE",
    "LARGEST_KL_SHARE",
    "LIMITS",
    "MAX_EVALUATIONS",
    "AttainableMeans",
    "BootstrapIntervals",
    "Certificate",
    "Demand",
    "Diagnostics",
    "DualEvaluation",
    "DualMinimum",
    "DualProblem",
    "DualSolution",
    "Estimates",
    "Feasibility",
    "Frontier",
    "GroupedSamples",
    "HeldoutPrediction",
    "InfeasibilityCertificate",
    "InfeasibleError",
    "InputError",
    "KlBudgetError",
    "LadderRung",
    "Normaliser",
    "NotCertifiedError",
    "OnDiskPartition",
    "Partition",
    "PassRunner",
    "Pilot",
    "PilotRows",
    "Prediction",
    "PromptSample",
    "ResponseBias",
    "ResponseLadder",
    "SampleBlock",
    "SamplePlan",
    "SampleScores",
    "SizeRequest",
    "StandardErrors",
    "Tail",
    "TailSolution",
    "ThreadExecutor",
    "TightenedSolution",
    "Tilt",
    "TooFewRowsError",
    "Trust",
    "Uncertainty",
    "UngroupedScores",
    "bootstrap_intervals",
    "build_normaliser",
    "certify",
    "climb_ladder",
    "correct_response_bias",
    "diagnose",
    "evaluate_dual",
    "fix_tails",
    "group_in_memory",
    "group_on_disk",
    "judge_trust",
    "maximise_over_tails",
    "minimise_dual",
    "pareto_k",
    "plan_sizes",
    "predict_heldout",
    "quantify_uncertainty",
    "reference_tail",
    "reward_cost",
    "sandwich_standard_errors",
    "solve_dual",
    "solve_frontier",
    "solve_tightened",
    "threshold_at_multipliers",
    "tilt",
    "top_up",
    "why_not_so_many",
]
