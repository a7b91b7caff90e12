"""What would be sampled, shown before anything is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipeline.run.run import Run
from pipeline.sampling.policies import reference_policy, render_for
from stage1_dual.sampling.rendering import load_tokenizer


def show_prompts(run: Run, *, prompts: Sequence[tuple[str, Sequence[Mapping[str, str]]]]) -> str:
    """What the reference would read of some prompts and how it would be sampled, as text; nothing is written.

    Args:
        run: the run.
        prompts: (prompt_id, messages) of each.

    Raises:
        InputError: the tokenizer or the template cannot be used.
    """
    policy = reference_policy(run)
    settings = run.config.sampling
    tokenizer = load_tokenizer(policy.folder)
    rendered, unusable = render_for(run, policy, tokenizer, prompts)
    lines = [
        f"reference   {policy.folder}",
        f"engine      {settings.engine}, {run.config.reference.dtype}",
        (
            f"sampling    {settings.samples_per_prompt} responses a prompt, at most {settings.max_new_tokens} tokens, "
            f"temperature {settings.temperature:g}, top_p {settings.top_p:g}, top_k {settings.top_k}, "
            f"min_p {settings.min_p:g}"
        ),
        f"BOS         {tokenizer.bos_token_id}",
    ]
    for prompt in rendered:
        lines += [
            "",
            f"prompt {prompt.prompt_id}",
            prompt.text,
            f"{len(prompt.token_ids)} tokens: {prompt.token_ids.tolist()}",
        ]
    for failure in unusable:
        lines += ["", f"prompt {failure.prompt_id}: {failure.reason}"]
    return "\n".join(lines)
