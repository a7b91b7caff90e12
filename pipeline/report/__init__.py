"""Results for people: the table at the end of each stage, the figures, and one self-contained page."""
