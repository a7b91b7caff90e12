"""Score samples: one protocol, sequence classifiers, and the resumable table of scores."""
