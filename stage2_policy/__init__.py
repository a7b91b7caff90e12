"""Stage 2: fine-tune once on the tilted distribution."""
