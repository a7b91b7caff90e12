"""The run of dualign: configuration, steps, evaluation, report and command line."""
