"""The configuration of a run: its sections, the whole, and how a recipe becomes one."""
