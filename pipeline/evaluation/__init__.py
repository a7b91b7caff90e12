"""Predicted against realised: does the trained policy keep what the dual promised?"""

from pipeline.evaluation.by_category import judge_categories
from pipeline.evaluation.intervals import mean_interval
from pipeline.evaluation.judging import evaluate_policy, judge, predict_tilt

__all__ = ["evaluate_policy", "judge", "judge_categories", "mean_interval", "predict_tilt"]
