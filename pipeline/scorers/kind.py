"""What a kind of scorer is: its settings, its check before sampling, its identity and how it starts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, get_args

from pipeline.contracts.section import Section
from pipeline.scorers.models import Models, ModelSettings
from stage1_dual.scoring.outputs import Affine
from stage1_dual.scoring.protocol import Scorer

Check = Callable[[], object]


@dataclass(frozen=True)
class Remote:
    """What a scorer sends elsewhere.

    Attributes:
        url: where to.
        model: as it is called there.
        requests: for each row, one score of it.
        characters: of each request besides prompt and response.
        per_minute: most requests a minute; None for no limit.
    """

    url: str
    model: str
    requests: int
    characters: int
    per_minute: float | None


class ScorerSettings(Section, ABC):
    """A scorer of the recipe. Its value is ``sign * raw + offset``; its bound belongs to the constraint that uses it.

    A kind of scorer is a class derived from this one, with a field ``kind`` whose type is the literal of its name, in
    a file of its own, and a row in ``kinds.py``. Everything else asks the kind.

    Attributes:
        not_identity: names of the settings that say where and how fast it reads, as opposed to what it computes; what
            is read there is in :meth:`identity`.
        uses_device: whether it computes on a torch device; :meth:`start` then gives a call that takes ``device=``.
        scores_any_response: whether it computes the score of any response, as opposed to looking up those of samples.
        folder_setting: name of the setting that is the recipe's own folder where a recipe does not give it.
    """

    not_identity: ClassVar[frozenset[str]] = frozenset()
    uses_device: ClassVar[bool] = True
    scores_any_response: ClassVar[bool] = True
    folder_setting: ClassVar[str | None] = None

    sign: Literal[1, -1] = 1
    """-1 turns the direction of a score round, as of a cost. A bound from above needs none: see ``direction``."""
    offset: float = 0.0
    """Added to ``sign`` times what the scorer computes."""

    @classmethod
    def kind_name(cls) -> str:
        """The name of the kind in a recipe: the value of ``kind``."""
        (name,) = get_args(cls.model_fields["kind"].annotation)
        return str(name)

    @property
    def affine(self) -> Affine:
        """From what the scorer computes to the user's direction and units."""
        return Affine(sign=self.sign, offset=self.offset)

    def checkpoints(self) -> dict[str, ModelSettings | None]:
        """The models this scorer loads, by the name of the setting within it; empty for the scorer itself.

        None stands for the run's reference, from which the scorer's own model was tuned.
        """
        return {}

    @property
    def tokens_at_once(self) -> int:
        """Padded tokens of a batch of its models; 0 where it has none."""
        return 0

    @property
    def copies(self) -> int:
        """How many times the weights of its models are held at once."""
        return 1

    def packages(self) -> tuple[str, ...]:
        """Packages of the extra ``sample`` that it needs besides torch and transformers."""
        return ()

    def remote(self) -> Remote | None:
        """What it sends elsewhere; None for a scorer that computes on this machine."""
        return None

    @property
    def keeps_answers(self) -> bool:
        """Whether what it computes costs money or the like: :meth:`start` then gives a call that takes ``cache=``, a
        folder in which it keeps every answer before it is used.
        """
        return False

    @property
    def repeated_share(self) -> float:
        """Share of the rows that are scored twice to measure its noise, by ``score_again`` of its scorer."""
        return 0.0

    def reads(self) -> tuple[str, ...]:
        """Columns of the samples table it needs besides prompt_id, sample_index and completion."""
        return ()

    def info_columns(self) -> tuple[str, ...] | None:
        """The columns of ``prompts.info_columns`` that it reads, which are then ``row.info``; None for all of them."""
        return ()

    def check(self, models: Models) -> Iterator[Check]:
        """What can be checked before anything expensive, as calls that raise InputError.

        Args:
            models: those of its models that are here already.
        """
        del models
        yield from ()

    def check_new_responses(self) -> None:
        """What can be known of scores of responses that do not exist yet, those of a policy that will be trained.

        Raises:
            InputError: it can have none, or would give those of other responses.
        """

    def shared_settings(self) -> Hashable | None:
        """What scorers of this kind and of the same models share a pass by, where it is equal; None: they never do."""
        return None

    def identity_settings(self) -> Mapping[str, Any]:
        """The settings that determine its values, JSON-serialisable: neither speed nor place."""
        return self.model_dump(mode="json", exclude=set(self.not_identity))

    @abstractmethod
    def identity(self, models: Models) -> str:
        """The sha256 of the checkpoint, code or table it reads; equal for all scorers of one pass."""

    @classmethod
    @abstractmethod
    def start(cls, scorers: Sequence[Self], models: Models) -> Callable[..., Scorer]:
        """What starts the scorer of one pass, called without arguments or with ``device=``; can be pickled.

        Args:
            scorers: the scorers of the pass, in the order of its outputs; one, unless :meth:`shared_settings` says
                what they share.
            models: their models.
        """
