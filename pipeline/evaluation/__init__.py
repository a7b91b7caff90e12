"""Predicted against realised: does the trained policy keep what the dual promised?"""

from pipeline.evaluation.intervals import mean_interval
from pipeline.evaluation.policy import evaluate_policy, judge, predict_tilt

__all__ = ["evaluate_policy", "judge", "mean_interval", "predict_tilt"]
