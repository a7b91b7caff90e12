"""The iterative baseline: a loop over training, sampling and steps of lambda."""
