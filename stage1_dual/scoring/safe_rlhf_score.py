"""Scores from Beaver's reward and cost models, and any score model in the layout of safe-rlhf."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.contracts.errors import InputError, import_failure
from pipeline.contracts.section import Dtype
from stage1_dual.checkpoints import check_score_model_checkpoint, is_local
from stage1_dual.sampling.rendering import load_tokenizer, read_max_positions
from stage1_dual.scoring.decoder_heads import DecoderHeads
from stage1_dual.scoring.loading import load_model, resolve_device
from stage1_dual.scoring.outputs import HeadOutput, describe_outputs
from stage1_dual.scoring.text_scores import TextScorer
from stage1_dual.scoring.texts import OverLength, TextReader, check_max_length

BEAVER_TEMPLATE = "BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:{completion}"
"""How safe-rlhf writes a conversation; it appends the tokenizer's EOS, in training and where it scores samples."""


class SafeRlhfScorer(TextScorer):
    """Scores with a score model of safe-rlhf (see :mod:`stage1_dual.scoring.safe_rlhf_model` for the format).

    The score is that of the last token, normalised as the checkpoint's configuration says. A cost is positive where a
    text is unsafe: give an output ``Affine(sign=-1)`` for a score of which more is safer.

    Args:
        checkpoint: folder of a score model, or its id on the Hub.
        outputs: the values wanted of each text; ``head`` is an index below the checkpoint's ``score_dim``.
        revision: branch, tag or commit of a Hub model.
        template: see :class:`~stage1_dual.scoring.templates.ScorerTemplate`; None for :data:`BEAVER_TEMPLATE` and the
            tokenizer's EOS.
        dtype: of weights and arithmetic; head and normaliser are float32 whatever it is.
        max_length: longest text in tokens, or None for the model's own limit.
        over_length: what becomes of a longer text, see :class:`~stage1_dual.scoring.texts.TextReader`.
        token_budget: padded tokens of a batch (speed only).
        share_prefixes: whether the responses to a prompt share its computation (speed only).
        device: torch device; ``auto`` for the accelerator that the process sees, or else its CPU.

    Raises:
        MissingExtraError: torch or transformers is not installed.
        InputError: the checkpoint does not fit, or a weight is missing, unexpected or of another shape.
    """

    def __init__(
        self,
        checkpoint: str,
        *,
        outputs: Sequence[HeadOutput] = (HeadOutput(),),
        revision: str | None = None,
        template: str | None = None,
        dtype: Dtype = "float32",
        max_length: int | None = None,
        over_length: OverLength = "flag",
        token_budget: int = 4096,
        share_prefixes: bool = True,
        device: str = "auto",
    ) -> None:
        heads = [_index(output) for output in outputs]
        for head in heads:
            check_score_model_checkpoint(checkpoint, head=head, template=template, revision=revision)
        positions = read_max_positions(checkpoint, revision=revision)
        tokenizer = load_tokenizer(checkpoint, revision=revision)
        reader = TextReader(
            tokenizer,
            template if template is not None else BEAVER_TEMPLATE + (tokenizer.eos_token or ""),
            max_length=check_max_length(max_length, positions=positions, checkpoint=checkpoint),
            over_length=over_length,
        )
        try:
            from transformers import AutoConfig

            from stage1_dual.scoring.safe_rlhf_model import SafeRlhfScoreModel, ScoreReader, score_type
        except ImportError as error:
            raise import_failure(
                error, package="transformers", extra="sample", purpose="scoring with transformers"
            ) from error
        config = AutoConfig.from_pretrained(
            checkpoint, revision=revision, trust_remote_code=False, local_files_only=is_local(checkpoint)
        )
        kind = score_type(config)
        model = load_model(SafeRlhfScoreModel, checkpoint, revision=revision, dtype=dtype, config=config)
        model.to(resolve_device(device))
        super().__init__(
            DecoderHeads(model.model, ScoreReader(model), token_budget=token_budget, share_prefixes=share_prefixes),
            reader=reader,
            outputs=outputs,
            heads=heads,
            independent=True,
            description={
                "scorer": "safe_rlhf_score",
                "model": checkpoint,
                "revision": revision,
                "dtype": dtype,
                "score_type": kind,
                "do_normalize": bool(getattr(config, "do_normalize", False)),
                "outputs": describe_outputs(outputs),
            },
        )


def _index(output: HeadOutput) -> int:
    if not isinstance(output.head, int) or output.output != "logit":
        raise InputError(f"a score model of safe-rlhf has scores by index, and no probabilities; {output} is neither")
    return output.head
