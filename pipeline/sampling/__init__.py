"""From the policies of a run to their tables of samples."""
