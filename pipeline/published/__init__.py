"""What others published: sizes and licences of models and data sets, and the results of the two papers."""

from pipeline.published.facts import DataSetFacts, ModelFacts, read_data_set_facts, read_model_facts
from pipeline.published.numbers import PublishedNumber, read_numbers

__all__ = [
    "DataSetFacts",
    "ModelFacts",
    "PublishedNumber",
    "read_data_set_facts",
    "read_model_facts",
    "read_numbers",
]
