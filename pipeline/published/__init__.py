"""What others published: sizes and licences of models and data sets, and the results of the two papers."""

from pipeline.published.facts import DataSetFacts, ModelFacts, read_data_set_facts, read_model_facts
from pipeline.published.numbers import PublishedNumber, read_numbers
from pipeline.published.points import PublishedPoint, PublishedValue, read_points

__all__ = [
    "DataSetFacts",
    "ModelFacts",
    "PublishedNumber",
    "PublishedPoint",
    "PublishedValue",
    "read_data_set_facts",
    "read_model_facts",
    "read_numbers",
    "read_points",
]
