"""What the stages agree on: the problem, the tables, the artifacts and the errors.

The lowest layer of the project. It imports none of the other packages, and neither torch nor transformers.
"""
