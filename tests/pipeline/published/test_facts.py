"""The facts of models are those of their configurations."""

import pytest

from pipeline.config.loading import RECIPES, load_config
from pipeline.published import read_data_set_facts, read_model_facts
from pipeline.scorers.models import is_hub_id


def llama_parameters(*, layers, hidden, kv_width, intermediate, vocabulary, tied, biases):
    attention = 2 * hidden**2 + 2 * hidden * kv_width + (hidden + 2 * kv_width if biases else 0)
    layer = attention + 3 * hidden * intermediate + 2 * hidden
    return vocabulary * hidden * (1 if tied else 2) + layers * layer + hidden


@pytest.mark.parametrize(
    ("name", "tied", "biases"),
    [
        ("PKU-Alignment/alpaca-7b-reproduced", False, False),
        ("meta-llama/Llama-2-7b-hf", False, False),
        ("Qwen/Qwen2.5-0.5B-Instruct", True, True),
        ("Qwen/Qwen2.5-1.5B-Instruct", True, True),
    ],
)
def test_the_number_of_weights_follows_from_the_configuration(name, tied, biases):
    facts = read_model_facts()[name]
    shape = facts.model_dump(include={"layers", "hidden", "kv_width", "intermediate", "vocabulary"})
    assert facts.parameters == llama_parameters(**shape, tied=tied, biases=biases)


def test_every_hub_name_of_a_recipe_has_its_facts():
    for recipe in RECIPES.glob("*.yaml"):
        config = load_config(recipe)
        for model in config.checkpoints().values():
            assert not is_hub_id(model.model) or model.model in read_model_facts()
        assert not is_hub_id(config.prompts.source) or config.prompts.source in read_data_set_facts()
