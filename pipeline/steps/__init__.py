"""The steps of a run: ``dualign X`` is ``pipeline/steps/X.py``."""
