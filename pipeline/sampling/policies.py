"""The policies of a run that are sampled from, and how they read its prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.run.run import Run
from stage1_dual.chat_templates import read_template, template_file
from stage1_dual.sampling.rendering import RenderedPrompt, UnusablePrompt, read_max_positions, render_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class SampledPolicy:
    """A policy to sample from.

    Attributes:
        role: ``reference`` or ``policy``, its name among the inputs of what is sampled.
        folder: its checkpoint.
        quantization: vLLM's name of a quantisation to load it with.
    """

    role: str
    folder: str
    quantization: str | None = None


def reference_policy(run: Run) -> SampledPolicy:
    """The reference of the recipe."""
    reference = run.config.reference
    return SampledPolicy("reference", run.model(reference, "reference"), quantization=reference.quantization)


def trained_policy(run: Run) -> SampledPolicy:
    """The policy that the run trains."""
    return SampledPolicy("policy", str(run.policy.absolute()))


def render_for(
    run: Run,
    policy: SampledPolicy,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[tuple[str, Sequence[Mapping[str, str]]]],
) -> tuple[list[RenderedPrompt], list[UnusablePrompt]]:
    """Prompts as a policy of the run reads them, and those that it cannot read.

    Raises:
        InputError: there is no chat template.
    """
    return render_prompts(
        tokenizer,
        prompts,
        template=run.config.reference.template,
        max_new_tokens=run.config.sampling.max_new_tokens,
        max_positions=read_max_positions(policy.folder),
        day=run.config.reference.template_date,
        refuses_control_tokens=run.config.reference.special_tokens_in_prompts == "refuse",
    )


def template_text(template: str | None) -> str | None:
    """A template of the recipe by its content: a file of the same name may change."""
    path = None if template is None else template_file(template)
    return template if path is None else read_template(path, setting="reference.template")
