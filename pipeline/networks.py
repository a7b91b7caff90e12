"""Networks from checkpoints, the same ones whoever samples, scores or trains them.

Every weight is accounted for, nothing is drawn at random in training that was not in scoring, and a merged adapter is
compared with what it was merged from. Only safetensors are read, and no code that comes with a model is run.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.contracts.errors import InputError, import_failure

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

log = logging.getLogger("dualign")

MERGE_LIMIT = 0.1
"""Mean absolute difference of a merged model's log-probabilities to its source's above which it is refused, nats a
token: what `sampling.logp_limit` allows between sampler and training stack by default. Rounding merged weights to
bfloat16 makes 0.001 to 0.01 on models of random weights, an adapter on a tied head 0.64."""

_ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PROBE_ROWS, _PROBE_TOKENS = 4, 32


def load_network(
    model_class: Any,
    checkpoint: str | Path,
    *,
    dtype: torch.dtype,
    what: str,
    revision: str | None = None,
    left_over: Collection[str] = (),
    **more: Any,
) -> Any:
    """A network in evaluation mode, from safetensors only.

    Args:
        model_class: a class of transformers, or an auto class.
        checkpoint: folder, or id on the Hub.
        dtype: of weights and arithmetic.
        what: such as ``"the scorer"``, for messages.
        revision: of a model on the Hub.
        left_over: names of weights that a checkpoint may hold beside the model's own; they are read by nobody, and
            that is said.
        more: further arguments of ``from_pretrained``: a configuration, a device map, a quantisation.

    Raises:
        InputError: the checkpoint cannot be loaded, or a weight is missing, unexpected or of another shape.
    """
    from safetensors import SafetensorError

    try:
        with quiet():
            model, loading = model_class.from_pretrained(
                checkpoint,
                revision=revision,
                dtype=dtype,
                trust_remote_code=False,
                use_safetensors=True,
                local_files_only=Path(checkpoint).is_dir(),
                ignore_mismatched_sizes=True,  # reported below, with the others
                output_loading_info=True,
                **more,
            )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise InputError(f"transformers cannot load {what} {checkpoint}: {error}") from error
    unexpected = set(loading["unexpected_keys"])
    if unread := sorted(unexpected & set(left_over)):
        log.info("%s %s holds %s, which is no part of the model", what, checkpoint, ", ".join(unread))
    loading["unexpected_keys"] = unexpected - set(left_over)
    for kind in ("missing", "unexpected", "mismatched"):
        keys = sorted(key if isinstance(key, str) else key[0] for key in loading[f"{kind}_keys"])
        if keys:
            raise InputError(
                f"{what} {checkpoint} has {len(keys)} {kind} weights ({', '.join(keys[:3])}): "
                f"{type(model).__name__} would not be the trained model"
            )
    if getattr(model, "generation_config", None) is not None:
        model.generation_config = plain_generation(model.generation_config)
    return model.eval()


def check_weights(model_class: Any, checkpoint: str | Path, *, what: str) -> None:
    """Compare a folder's weights with those its class has, by name and shape, without reading them.

    A checkpoint that is quantised is left to the engine that reads it.

    Raises:
        InputError: as :func:`load_network`.
    """
    import torch
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"the configuration of {what} {checkpoint} cannot be read: {error}") from error
    if getattr(config, "quantization_config", None) is None:
        load_network(model_class, checkpoint, dtype=torch.float32, what=what, device_map="meta")


def plain_generation(former: GenerationConfig) -> GenerationConfig:
    """A generation configuration that draws from the model itself, with the special tokens of another one.

    Defaults that bend the distribution (top-p, top-k, temperature) are not the policy's; some contradict each other,
    and transformers then refuses to save the model.
    """
    from transformers import GenerationConfig

    return GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=former.bos_token_id,
        eos_token_id=former.eos_token_id,
        pad_token_id=former.pad_token_id,
        do_sample=True,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
    )


def without_dropout(config: PreTrainedConfig) -> PreTrainedConfig:
    """A model's configuration with every kind of dropout at zero, in place: it is then one policy, not a random one.

    Log-probabilities of the reference are computed without it; a policy that drops activations in training starts
    from another distribution than the one its loss compares it with.
    """
    from transformers import PreTrainedConfig

    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):  # of the text part of a larger model
            without_dropout(value)
        elif "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    return config


def require_determined(model: PreTrainedModel, *, what: str) -> None:
    """Refuse a model that computes something else in training mode than in evaluation mode.

    Raises:
        InputError: names the largest difference of a logit.
    """
    import torch

    ids = _probe(model)[:1].to(model.device)
    with torch.no_grad():
        expected = model.train(False)(input_ids=ids).logits
        found = model.train()(input_ids=ids).logits
    model.train(False)
    difference = float((found - expected).abs().max())
    if difference > 1e-3 * float(expected.abs().max()):
        raise InputError(
            f"{what} computes otherwise in training than in evaluation (a logit differs by {difference:.3g}): "
            "something besides dropout is random there, and the policy is not what the reference is compared with"
        )


def write_merged(
    checkpoint: str | Path,
    adapter: str | Path,
    output: Path,
    *,
    what: str,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a causal language model with an adapter's weights added to its own, and prove that it is the same model.

    The sum is made in float32. Where the adapter changes a head that shares its weights with the embedding, the merged
    model has a head of its own: the shared matrix would be changed in both places.

    Args:
        checkpoint: folder of the base model.
        adapter: folder of the adapter.
        output: folder to write.
        what: such as ``"`reference.adapter`"``, for messages.
        dtype: of the weights written; that of the base model's where not given.

    Raises:
        MissingExtraError: peft is not installed.
        InputError: the model or the adapter cannot be loaded, they do not fit, or the merged model gives other
            log-probabilities than the model with its adapter.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        from peft import PeftModel
    except ImportError as error:
        raise import_failure(error, package="peft", extra="train", purpose="merging an adapter") from error
    require_safe_adapter(adapter, what=what)
    try:
        written = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False, local_files_only=True).dtype
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"the configuration of {checkpoint} cannot be read: {error}") from error
    base = load_network(AutoModelForCausalLM, checkpoint, dtype=torch.float32, what="the base model")
    try:
        with quiet():
            tuned: Any = PeftModel.from_pretrained(base, adapter).eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{what}, {adapter}, does not fit {checkpoint}: {error}") from error
    expected = _probe_logp(tuned)
    _separate_tied_head(tuned)
    with quiet():
        merged = tuned.merge_and_unload()
    if merged.get_input_embeddings().weight is not merged.get_output_embeddings().weight:
        merged.config.get_text_config().tie_word_embeddings = merged.config.tie_word_embeddings = False
    with quiet():
        merged.to(dtype or written or torch.float32).save_pretrained(output)
    make_readable(output)
    del base, tuned, merged
    found = _probe_logp(load_network(AutoModelForCausalLM, output, dtype=torch.float32, what="the merged model"))
    difference = float((found - expected).abs().mean())
    if not difference <= MERGE_LIMIT:
        raise InputError(
            f"{what} is {adapter}: merged into {checkpoint} it gives other log-probabilities than beside it, by "
            f"{difference:.3g} nats a token in the mean (at most {MERGE_LIMIT:g} allowed): the merged model would not "
            "be the model with its adapter"
        )
    log.info("merged %s into %s: log-probabilities differ by %.2g nats a token", adapter, checkpoint, difference)


def require_safe_adapter(adapter: str | Path, *, what: str) -> None:
    """Refuse an adapter whose weights are not in safetensors.

    Raises:
        InputError: the folder has no adapter_model.safetensors.
    """
    if not (Path(adapter) / _ADAPTER_WEIGHTS).is_file():
        other = sorted(path.name for path in Path(adapter).glob("adapter_model.*"))
        raise InputError(
            f"{what} is {str(adapter)!r}, which has no {_ADAPTER_WEIGHTS}"
            + (f", only {', '.join(other)}; other weight formats are not read" if other else "")
        )


def make_readable(folder: Path) -> None:
    """Give the files of a folder the mode that others need to read them; the writer of safetensors gives 0600."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(0o644)


def _separate_tied_head(tuned: Any) -> None:
    """Give the head a matrix of its own where an adapter changes one that is the embedding's too."""
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    embedding, head = tuned.get_input_embeddings(), tuned.get_output_embeddings()
    if not any(isinstance(module, BaseTunerLayer) for module in (embedding, head)):
        return
    embedding, head = (
        module.get_base_layer() if isinstance(module, BaseTunerLayer) else module for module in (embedding, head)
    )
    if head.weight is embedding.weight:
        separate: torch.Tensor = head.weight.detach()  # type: ignore[operator]
        head.weight = torch.nn.Parameter(separate.clone(), requires_grad=False)


def _probe(model: Any) -> torch.Tensor:
    """Token ids of a few short rows, the same in every call, shape (rows, tokens)."""
    import torch

    config = model.config.get_text_config()
    length = min(_PROBE_TOKENS, getattr(config, "max_position_embeddings", None) or _PROBE_TOKENS)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.vocab_size, (_PROBE_ROWS, length), generator=generator)


def _probe_logp(model: Any) -> torch.Tensor:
    """Log-probabilities of the probe's tokens, nats, shape (rows, tokens - 1)."""
    import torch

    ids = _probe(model)
    with torch.no_grad():
        logp = model(input_ids=ids).logits[:, :-1].float().log_softmax(-1)
    taken: torch.Tensor = logp.gather(-1, ids[:, 1:, None])[..., 0]
    return taken


@contextmanager
def quiet() -> Iterator[None]:
    """Without the reports, bars and warnings of transformers and peft about what is checked or seen to here."""
    from transformers.utils import logging as transformers_logging

    before = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings():
            # Of peft, on tied heads: :func:`write_merged` sees to them, and compares.
            warnings.filterwarnings("ignore", category=UserWarning, module="peft")
            yield
    finally:
        transformers_logging.set_verbosity(before)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
