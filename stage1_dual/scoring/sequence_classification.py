"""Scores from a sequence classifier: heads of ``AutoModelForSequenceClassification``."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pipeline.contracts.errors import InputError, import_failure
from pipeline.contracts.section import Dtype
from stage1_dual.checkpoints import (
    Heads,
    check_scorer_checkpoint,
    find_heads,
    is_local,
    resolve_head,
    weight_shapes,
)
from stage1_dual.sampling.rendering import load_tokenizer, read_max_positions
from stage1_dual.scoring.batches import batches_by_tokens
from stage1_dual.scoring.checked_network import CheckedNetwork
from stage1_dual.scoring.decoder_heads import DecoderHeads
from stage1_dual.scoring.loading import load_model, resolve_device
from stage1_dual.scoring.outputs import HeadOutput, describe_outputs
from stage1_dual.scoring.shared_prefix import PaddingCounts, can_share
from stage1_dual.scoring.text_scores import Reader, TextNetwork, TextScorer
from stage1_dual.scoring.texts import OverLength, TextReader, check_max_length
from stage1_dual.scoring.vllm_pooling import VllmPooling, require_pooled

if TYPE_CHECKING:
    import torch

Engine = Literal["transformers", "vllm"]

_OF_THE_LANGUAGE_MODEL = ("lm_head.weight",)
"""What reward models have left over from the language model they were made from, and read nowhere."""


class SequenceClassificationScorer(TextScorer):
    """Scores with one or several heads of one classifier, all from one forward pass.

    A score is what the model's own forward pass gives for the row's text alone, whatever is computed beside it. Reward
    models of the layouts of :mod:`stage1_dual.scoring.reward_heads` are classifiers too.

    Args:
        checkpoint: folder of a sequence classifier, or its id on the Hub.
        outputs: the values wanted of each text.
        revision: branch, tag or commit of a Hub model.
        template: see :class:`~stage1_dual.scoring.templates.ScorerTemplate`.
        dtype: of weights and arithmetic; the classification heads are float32 whatever it is.
        max_length: longest text in tokens, or None for the model's own limit.
        over_length: what becomes of a longer text, see :class:`~stage1_dual.scoring.texts.TextReader`.
        token_budget: padded tokens of a batch (speed only).
        share_prefixes: whether the responses to a prompt share its computation, where the model is a decoder with
            full attention and it pays (speed only).
        engine: what computes the scores. With ``vllm`` transformers still computes those that are checked, so that the
            weights are held twice.
        checked_share: share of the texts that ``vllm`` is checked on.
        engine_limit: as :class:`~stage1_dual.scoring.checked_network.CheckedNetwork` takes it.
        device: torch device; ``auto`` for the accelerator that the process sees, or else its CPU.

    Raises:
        MissingExtraError: torch, transformers or the engine is not installed.
        InputError: the checkpoint does not fit or is none that the engine reads, or a weight is missing, unexpected or
            of another shape.
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
        engine: Engine = "transformers",
        checked_share: float = 0.02,
        engine_limit: float = 1e-4,
        device: str = "auto",
    ) -> None:
        for output in outputs:
            check_scorer_checkpoint(checkpoint, head=output.head, template=template, revision=revision)
        found = _read_heads(checkpoint, revision=revision)
        heads = [resolve_head(output.head, found.labels, checkpoint=checkpoint) for output in outputs]
        if engine == "vllm":
            require_pooled(found, checkpoint=checkpoint)
        model = _load_classifier(checkpoint, found, revision=revision, dtype=dtype).to(resolve_device(device))
        if any(output.output == "probability" for output in outputs):
            _require_probabilities(found, model.config.problem_type, checkpoint=checkpoint)
        tokenizer = load_tokenizer(checkpoint, revision=revision)
        positions = _usable_positions(model, read_max_positions(checkpoint, revision=revision))
        longest = check_max_length(max_length, positions=positions, checkpoint=checkpoint)
        texts = TextReader(tokenizer, template, max_length=longest, over_length=over_length)
        reader: Reader = texts
        network: TextNetwork
        if found.layout == "gated":
            from stage1_dual.scoring.reward_heads import GatedNetwork, GatedTextReader, read_header

            header = read_header(tokenizer, checkpoint=checkpoint)
            network = GatedNetwork(model, header=header, token_budget=token_budget, share_prefixes=share_prefixes)
            reader = GatedTextReader(texts, header) if 0 in heads else texts  # the objectives need no gate
        elif found.layout == "two_layers":
            network = DecoderNetwork(model, token_budget=token_budget, share_prefixes=share_prefixes)
        else:
            network = _network(model, token_budget=token_budget, share_prefixes=share_prefixes)
        self._pooling: VllmPooling | None = None
        self._checked: CheckedNetwork | None = None
        self._check = {"share": checked_share, "limit": engine_limit}
        if engine == "vllm":
            self._pooling = VllmPooling(
                checkpoint, heads=found, revision=revision, dtype=dtype, max_length=longest, token_budget=token_budget
            )
            network = self._checked = CheckedNetwork(
                self._pooling,
                network,
                share=checked_share,
                limit=engine_limit,
                cut=partial(up_to_pooled, pad=model.config.get_text_config().pad_token_id),
                names=("vLLM", "transformers", "engine_limit"),
            )
        super().__init__(
            network,
            reader=reader,
            outputs=outputs,
            heads=heads,
            independent=len(found.labels) == 1 or model.config.problem_type == "multi_label_classification",
            description={
                "scorer": "sequence_classification",
                "model": checkpoint,
                "revision": revision,
                "dtype": dtype,
                "labels": [found.labels[index] for index in sorted(found.labels)],
                "outputs": [
                    {**output, "head_index": head}
                    for output, head in zip(describe_outputs(outputs), heads, strict=True)
                ],
            },
        )

    def describe(self) -> Mapping[str, object]:
        """The resolved settings of the scorer, and by vLLM what the check has found so far, JSON-serialisable."""
        if self._checked is None:
            return super().describe()
        found = {"texts": self._checked.checked, "largest_difference": self._checked.largest}
        return {**super().describe(), "engine": "vllm", "engine_check": {**self._check, **found}}

    def close(self) -> None:
        """Free the models."""
        super().close()
        self._checked = None
        if self._pooling is not None:
            self._pooling.close()


class DecoderNetwork:
    """A classifier that reads the last token of a decoder: what Llama, Mistral, Qwen, GPT-2 and their like are.

    Such a model pools the last token that is not its padding id. What follows that token cannot reach it, so it is
    left out; the trailing EOS of a model that pads with its EOS is among it, as in the model's own forward pass.
    """

    def __init__(self, model: Any, *, token_budget: int, share_prefixes: bool) -> None:
        self._pad = model.config.get_text_config().pad_token_id
        self._heads = DecoderHeads(
            model.base_model, model.score, token_budget=token_budget, share_prefixes=share_prefixes
        )

    @property
    def counts(self) -> PaddingCounts:
        """The tokens that went through the model so far, with and without padding."""
        return self._heads.counts

    def logits(self, token_ids: Sequence[Sequence[int]], groups: Sequence[Hashable]) -> np.ndarray:
        """Raw outputs of all heads for each text, float64, shape (n, heads)."""
        return self._heads.logits([up_to_pooled(ids, pad=self._pad) for ids in token_ids], groups)


def up_to_pooled(token_ids: Sequence[int], *, pad: int | None) -> Sequence[int]:
    """The tokens up to the last that is not padding, which is the one that a decoder's head reads; at least one."""
    end = len(token_ids)
    while end > 1 and token_ids[end - 1] == pad:
        end -= 1
    return token_ids[:end]


class WholeNetwork:
    """A classifier with a forward pass of its own (BERT and its like, sliding windows), in masked batches."""

    def __init__(self, model: Any, *, token_budget: int) -> None:
        self._model = model
        self._token_budget = token_budget
        self.counts = PaddingCounts()
        model.config.use_cache = False  # of keys and values, which nothing here reads again

    def logits(self, token_ids: Sequence[Sequence[int]], groups: Sequence[Hashable]) -> np.ndarray:  # noqa: ARG002
        """Raw outputs of all heads for each text, float64, shape (n, heads)."""
        import torch

        found: dict[int, np.ndarray] = {}
        with torch.inference_mode():
            for places in batches_by_tokens([len(ids) for ids in token_ids], token_budget=self._token_budget):
                logits = self._logits([token_ids[place] for place in places])
                found.update(zip(places, logits.double().cpu().numpy(), strict=True))
        return np.stack([found[place] for place in range(len(token_ids))])

    def _logits(self, token_ids: Sequence[Sequence[int]]) -> torch.Tensor:
        """The raw outputs of a batch, (rows, heads)."""
        import torch

        config = self._model.config.get_text_config()
        # The model pools the last token that is not the padding id. Without such an id it pools the last token of a
        # single text, as it does here with an id that ends no row. Where that id is the EOS too, it passes over
        # trailing EOS, in a padded batch as in a single text.
        filler = config.pad_token_id if config.pad_token_id is not None else _id_that_ends_none(token_ids)
        longest = max(len(ids) for ids in token_ids)
        needed = sum(len(ids) for ids in token_ids)
        self.counts += PaddingCounts(longest * len(token_ids), needed, needed)
        tokens = torch.tensor([[*ids, *[filler] * (longest - len(ids))] for ids in token_ids])
        mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in token_ids])
        before, config.pad_token_id = config.pad_token_id, filler
        try:
            logits: torch.Tensor = self._model(
                input_ids=tokens.to(self._model.device), attention_mask=mask.to(self._model.device)
            ).logits
        finally:
            config.pad_token_id = before
        return logits


def _read_heads(checkpoint: str, *, revision: str | None) -> Heads:
    try:
        from transformers import PreTrainedConfig
    except ImportError as error:
        raise import_failure(
            error, package="transformers", extra="sample", purpose="scoring with transformers"
        ) from error
    try:
        config, _ = PreTrainedConfig.get_config_dict(
            checkpoint, revision=revision, local_files_only=is_local(checkpoint)
        )
    except (OSError, ValueError) as error:
        raise InputError(f"the configuration of {checkpoint} cannot be read: {error}") from error
    return find_heads(config, weight_shapes(Path(checkpoint)) if is_local(checkpoint) else {}, checkpoint=checkpoint)


def _load_classifier(checkpoint: str, heads: Heads, *, revision: str | None, dtype: Dtype) -> Any:
    import torch
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoConfig

    config = AutoConfig.from_pretrained(
        checkpoint, revision=revision, trust_remote_code=False, local_files_only=is_local(checkpoint)
    )
    load = partial(load_model, checkpoint=checkpoint, revision=revision, dtype=dtype, config=config)
    if heads.layout == "gated":
        from stage1_dual.scoring.reward_heads import GatedRewardModel

        return load(GatedRewardModel)
    if len(config.id2label) != len(heads.labels):  # the weights say it where the configuration does not
        config.num_labels = len(heads.labels)
    if heads.layout == "two_layers":
        from stage1_dual.scoring.reward_heads import TwoLayerRewardModel

        return load(TwoLayerRewardModel, left_over=_OF_THE_LANGUAGE_MODEL)
    classes: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    if type(config) not in classes:
        raise InputError(f"transformers has no sequence classifier for the {config.model_type!r} of {checkpoint}")
    base = classes[type(config)]
    if dtype == "float32":
        return load(base, left_over=_OF_THE_LANGUAGE_MODEL)
    # Logits of a head in bfloat16 take few distinct values, and the head is small enough to be exact: it keeps its
    # float32 weights while the body is loaded in less.
    model_class = type(base.__name__, (base,), {"_keep_in_fp32_modules_strict": {"score", "classifier"}})
    model = load(model_class, left_over=_OF_THE_LANGUAGE_MODEL)
    head = getattr(model, "score", None) or getattr(model, "classifier", None)
    if not isinstance(head, torch.nn.Module):
        raise InputError(f"{base.__name__} has neither `score` nor `classifier`; score with dtype float32")
    head.register_forward_pre_hook(lambda _, inputs: tuple(part.float() for part in inputs))
    return model


def _require_probabilities(heads: Heads, problem_type: str | None, *, checkpoint: str) -> None:
    if problem_type == "regression" or heads.layout == "gated":
        raise InputError(f"the scorer {checkpoint} is a regression: it has no probabilities; use `output: logit`")


def _usable_positions(model: Any, positions: int) -> int:
    """The longest text: RoBERTa and its like count positions from behind the padding id, which they have rows for."""
    for name, module in model.named_modules():
        padding = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and padding is not None:
            return min(positions, int(module.num_embeddings - padding - 1))
    return positions


def _network(model: Any, *, token_budget: int, share_prefixes: bool) -> DecoderNetwork | WholeNetwork:
    from transformers import GPT2ForSequenceClassification
    from transformers.modeling_layers import GenericForSequenceClassification

    # transformers defines the pooling of the last token in these two; both leave everything else to the decoder.
    pools_last = isinstance(model, GenericForSequenceClassification | GPT2ForSequenceClassification)
    if pools_last and can_share(model):
        return DecoderNetwork(model, token_budget=token_budget, share_prefixes=share_prefixes)
    return WholeNetwork(model, token_budget=token_budget)


def _id_that_ends_none(token_ids: Sequence[Sequence[int]]) -> int:
    last = {ids[-1] for ids in token_ids}
    return next(token for token in range(len(last) + 1) if token not in last)
