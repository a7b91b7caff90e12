"""The commands of ``dualign``: what each takes and does; `pipeline.cli` starts the one that is asked for."""
