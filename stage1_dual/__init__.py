"""Stage 1: sample from the reference policy, score, solve the dual."""
