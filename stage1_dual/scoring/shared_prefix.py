"""A decoder over many texts of which some begin alike: what they share is computed once.

The responses to one prompt repeat the prompt. A decoder's keys and values of the shared beginning do not depend on
what follows, so that one pass over it serves all its continuations.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stage1_dual.scoring.batches import batches_by_tokens

if TYPE_CHECKING:
    import torch

# The second pass and the copies of the keys cost about as much as this share of a text's tokens (measured with
# benchmarks/scoring_rate.py --prefix): below it, texts are computed whole.
_WORTH = 0.25
# The keys and values of a batch, copied for every row, may hold this many times the tokens of its budget.
_CACHE_FACTOR = 4


@dataclass(frozen=True)
class PaddingCounts:
    """Tokens that went through a model.

    Attributes:
        computed: with padding.
        needed: without padding, shared beginnings once.
        read: of all texts, whole.
    """

    computed: int = 0
    needed: int = 0
    read: int = 0

    def __add__(self, other: PaddingCounts) -> PaddingCounts:
        return PaddingCounts(self.computed + other.computed, self.needed + other.needed, self.read + other.read)


def can_share(model: Any) -> bool:
    """Whether every layer of a decoder attends to all that comes before a token, and to nothing after it.

    Others (sliding windows, recurrent or bidirectional layers) keep other things than keys and values, or look ahead;
    they are computed text by text, with a mask. So are models that count positions by themselves and would count the
    padding between a beginning and what follows it.
    """
    config = model.config.get_text_config()
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    if "local" in getattr(config, "attention_layers", ()):
        return False
    if getattr(model, "_is_stateful", False) or getattr(config, "use_bidirectional_attention", False):
        return False
    if any(getattr(module, "is_causal", None) is False for module in model.modules()):
        return False
    layers = getattr(config, "layer_types", None)
    if layers is not None:
        return all(layer == "full_attention" for layer in layers)
    return getattr(config, "sliding_window", None) is None


def shared_lengths(
    token_ids: Sequence[Sequence[int]], groups: Sequence[Hashable], *, limits: Sequence[int] | None = None
) -> list[int]:
    """How many tokens of each text are worth computing once for its group, 0 for a text that is computed whole.

    At least the last token of every text is left to compute.

    Args:
        token_ids: of each text.
        groups: texts of one group may begin alike.
        limits: the longest beginning of each text that may be shared; all but its last token where not given.
    """
    members: dict[Hashable, list[int]] = {}
    for place, group in enumerate(groups):
        members.setdefault(group, []).append(place)
    lengths = [0] * len(token_ids)
    for places in members.values():
        common = _common_length([token_ids[place] for place in places])
        if limits is not None:
            common = min(common, *(limits[place] for place in places))
        total = sum(len(token_ids[place]) for place in places)
        if common * (len(places) - 1) > _WORTH * total:
            for place in places:
                lengths[place] = common
    return lengths


def iterate_forward(
    forward: Callable[..., Any],
    token_ids: Sequence[Sequence[int]],
    *,
    shared: Sequence[int],
    token_budget: int,
    device: torch.device,
    announce: Callable[[Sequence[int]], object] = len,
) -> Iterator[tuple[list[int], Any, list[int], PaddingCounts]]:
    """Run a decoder over texts in batches.

    Args:
        forward: the model; called with ``input_ids`` and, where texts share a beginning, with ``attention_mask``,
            ``position_ids``, ``past_key_values`` and ``use_cache``.
        token_ids: of each text, BOS included, at least one token.
        shared: for each text, the tokens of its beginning that it shares, as :func:`shared_lengths` gives them.
        token_budget: padded tokens of a batch.
        device: where the model is.
        announce: told before each call of the model how many tokens of each of its rows are no padding.

    Yields:
        Places of a batch's texts; the model's output for what follows their beginnings, padded on the right; the
        number of those tokens of each text; and what it cost.
    """
    whole = [place for place, length in enumerate(shared) if not length]
    for batch in batches_by_tokens([len(token_ids[place]) for place in whole], token_budget=token_budget):
        places = [whole[k] for k in batch]
        texts = [token_ids[place] for place in places]
        announce([len(text) for text in texts])
        # No mask: padding comes after all that a decoder looks at.
        output = forward(input_ids=_right_padded(texts, device), use_cache=False)
        needed = sum(len(text) for text in texts)
        counts = PaddingCounts(len(texts) * max(len(text) for text in texts), needed, needed)
        yield places, output, [len(text) for text in texts], counts
    for bundle in _bundles(token_ids, shared, token_budget=token_budget):
        yield from _forward_bundle(
            forward, token_ids, bundle, token_budget=token_budget, device=device, announce=announce
        )


def _common_length(texts: Sequence[Sequence[int]]) -> int:
    """Tokens that all texts begin with, short of the last token of the shortest."""
    ordered = [tuple(text) for text in texts]
    first, last = min(ordered), max(ordered)  # in lexical order all others lie between these two
    limit = min(len(text) for text in texts) - 1
    length = 0
    while length < limit and first[length] == last[length]:
        length += 1
    return length


def _bundles(
    token_ids: Sequence[Sequence[int]], shared: Sequence[int], *, token_budget: int
) -> Iterator[list[tuple[tuple[int, ...], list[int]]]]:
    """Distinct beginnings of similar length, with the places of their texts, as many as one pass may compute."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for place, length in enumerate(shared):
        if length:
            groups.setdefault(tuple(token_ids[place][:length]), []).append(place)
    beginnings = list(groups)
    for places in batches_by_tokens([len(beginning) for beginning in beginnings], token_budget=token_budget):
        yield [(beginnings[place], groups[beginnings[place]]) for place in places]


def _forward_bundle(
    forward: Callable[..., Any],
    token_ids: Sequence[Sequence[int]],
    bundle: Sequence[tuple[tuple[int, ...], list[int]]],
    *,
    token_budget: int,
    device: torch.device,
    announce: Callable[[Sequence[int]], object],
) -> Iterator[tuple[list[int], Any, list[int], PaddingCounts]]:
    """One pass over the beginnings, then what follows them by length; both padded on the right."""
    import torch
    from transformers import DynamicCache

    beginnings = [beginning for beginning, _ in bundle]
    begun = torch.tensor([len(beginning) for beginning in beginnings])
    width = int(begun.max())
    announce([len(beginning) for beginning in beginnings])
    past = forward(input_ids=_right_padded(beginnings, device), use_cache=True).past_key_values
    mask = (torch.arange(width) < begun[:, None]).long()  # hides from what follows the padding in between
    counts = PaddingCounts(computed=len(bundle) * width, needed=int(begun.sum()))

    owners = [(place, row) for row, (_, places) in enumerate(bundle) for place in places]
    tails = [token_ids[place][len(bundle[row][0]) :] for place, row in owners]
    costs = [max(len(tail), -(-(width + len(tail)) // _CACHE_FACTOR)) for tail in tails]
    for batch in batches_by_tokens(costs, token_budget=token_budget):
        of_row = torch.tensor([owners[k][1] for k in batch])
        chosen = of_row.to(device)
        lengths = [len(tails[k]) for k in batch]
        longest = max(lengths)
        announce(lengths)
        present = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
        output = forward(
            input_ids=_right_padded([tails[k] for k in batch], device),
            attention_mask=torch.cat([mask[of_row], present], dim=1).to(device),
            position_ids=(begun[of_row][:, None] + torch.arange(longest)).to(device),
            past_key_values=DynamicCache([(layer.keys[chosen], layer.values[chosen]) for layer in past.layers]),
            use_cache=True,
        )
        places = [owners[k][0] for k in batch]
        counts += PaddingCounts(len(batch) * longest, sum(lengths), sum(len(token_ids[place]) for place in places))
        yield places, output, lengths, counts
        counts = PaddingCounts()


def _right_padded(texts: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    import torch

    longest = max(len(text) for text in texts)
    return torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts], device=device)
