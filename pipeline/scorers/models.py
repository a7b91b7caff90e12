"""Where the models of a recipe are: every one of them is a folder before anything is computed."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pipeline.contracts.artifacts import checkpoint_sha256, content_sha256
from pipeline.contracts.errors import InputError, import_failure
from pipeline.contracts.section import Dtype, Section, nearest

EMBEDDED = "embedded:"
"""Prefix of the names of models that ``dualign prepare`` builds."""
PACKAGE = "package:"
"""Prefix of GGUF files inside of installed Python packages: ``package:NAME/PATH.gguf``."""
_GGUF = ".gguf"
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")


class ModelSettings(Section):
    """A checkpoint: ``embedded:NAME``, a local folder, or a Hub id (the only thing that uses the network); the
    reference also a GGUF file, ``FILE.gguf`` or ``package:NAME/FILE.gguf`` in an installed Python package.

    Code that comes with a model is never run.
    """

    model: str
    """``embedded:NAME``, a folder, or an id on the Hub."""
    revision: str | None = None
    """Branch, tag or commit; a Hub id needs one."""
    dtype: Dtype = "float32"
    """Of weights and arithmetic."""


def is_hub_id(name: str) -> bool:
    """Whether the name of a model is that of a repository on the Hub: not embedded, not a folder, ``owner/name``."""
    return (
        not name.startswith(EMBEDDED)
        and not is_gguf(name)
        and not Path(name).is_dir()
        and _HUB_ID.match(name) is not None
    )


def is_gguf(name: str) -> bool:
    """Whether the name of a model is that of a GGUF file, which `prepare` makes a checkpoint of."""
    return name.startswith(PACKAGE) or (name.lower().endswith(_GGUF) and not Path(name).is_dir())


def find_gguf(name: str, *, setting: str = "reference") -> Path:
    """The GGUF file of a reference; of a package the code is not run.

    Raises:
        InputError: there is no such file, or no such package; the model is another than the reference.
    """
    if setting != "reference":
        raise InputError(f"`{setting}.model` is {name!r}; only the reference can be a GGUF file")
    if not name.startswith(PACKAGE):
        path = Path(name)
    else:
        package, _, inside = name.removeprefix(PACKAGE).partition("/")
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            raise InputError(
                f"`reference.model` is {name!r}, and no Python package {package!r} is installed here; the recipe that "
                "names it says what installs it"
            )
        path = Path(next(iter(spec.submodule_search_locations))) / inside
    if not path.is_file() or path.suffix.lower() != _GGUF:
        raise InputError(f"`reference.model` is {name!r}; there is no such GGUF file ({path})")
    return path


@dataclass(frozen=True)
class Source:
    """Where a model is: a folder, or an id on the Hub with its revision."""

    path: str
    revision: str | None

    @property
    def is_folder(self) -> bool:
        """Whether it is on this machine."""
        return Path(self.path).is_dir()

    @property
    def identity(self) -> str:
        """sha256 of the files of a folder, or of name and revision of a model on the Hub."""
        if self.is_folder:
            return checkpoint_sha256(Path(self.path))
        return content_sha256({"hub": self.path, "revision": self.revision})


Models = Mapping[str, Source]
"""The models of a scorer by the name of their setting, "" for its own; without those that are yet to be built."""


class Locate(Protocol):
    """Finds a model of a recipe: :func:`resolve_model` fetches what is not here, :func:`find_model` does not."""

    def __call__(self, settings: ModelSettings, embedded: Mapping[str, Path], *, setting: str) -> str | None:
        """Its folder, or None where it is not here."""
        ...


_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")
"""What a checkpoint is made of here; other weight formats are neither read nor fetched."""


def resolve_model(settings: ModelSettings, embedded: Mapping[str, Path], *, setting: str) -> str:
    """The folder of a model, or the GGUF file of the reference. One on the Hub is fetched first, unless it is here.

    Args:
        settings: the model as the recipe names it.
        embedded: folders of the embedded models.
        setting: where in the recipe it is named, for messages.

    Raises:
        InputError: an unknown embedded name, a path that is not there, or a Hub model that cannot be fetched.
        MissingExtraError: the model is on the Hub, and huggingface_hub is not installed.
    """
    name = settings.model
    if name.startswith(EMBEDDED):
        key = name.removeprefix(EMBEDDED)
        if key not in embedded:
            raise InputError(f"`{setting}.model` is {name!r}; there is no such embedded model{nearest(key, embedded)}")
        return str(embedded[key])
    if Path(name).is_dir():
        return name
    if is_gguf(name):
        return str(find_gguf(name, setting=setting))
    if not is_hub_id(name):
        raise InputError(
            f"`{setting}.model` is {name!r}; there is no such folder, and it is not a Hub id (owner/name)"
        )
    if settings.revision is None:
        raise InputError(
            f"`{setting}.model` is {name!r}; there is no such folder, and as an id on the Hub it needs its "
            f"`{setting}.revision` too"
        )
    return str(_fetch(name, settings.revision, setting=setting))


def find_model(settings: ModelSettings, embedded: Mapping[str, Path], *, setting: str) -> str | None:
    """The folder of a model that is on this machine, None of one that is not (yet); never uses the network.

    Args:
        settings: the model as the recipe names it.
        embedded: folders of the embedded models.
        setting: where in the recipe it is named, for messages.

    Raises:
        InputError: an unknown embedded name, or an id on the Hub without its revision.
    """
    name = settings.model
    if name.startswith(EMBEDDED):
        folder = Path(resolve_model(settings, embedded, setting=setting))
        return str(folder) if (folder / "config.json").is_file() else None
    if is_gguf(name) and setting == "reference":
        try:
            return str(find_gguf(name))
        except InputError:
            return None
    if is_hub_id(name) and settings.revision is not None:
        return _cached(name, settings.revision)
    if Path(name).is_dir() or is_hub_id(name):
        return resolve_model(settings, embedded, setting=setting)
    return None


def _cached(name: str, revision: str) -> str | None:
    """The folder of a model of the Hub that was fetched before, whole."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        return None
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=list(_FILES), local_files_only=True))
    except (OSError, ValueError):
        return None
    whole = (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))
    return str(folder) if whole else None


def _fetch(name: str, revision: str, *, setting: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError as error:
        raise import_failure(error, package="huggingface_hub", extra="sample", purpose="a model of the Hub") from error
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(_FILES)))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise InputError(
            f"`{setting}.model` is {name!r} at revision {revision!r}, which is neither on this machine nor could be "
            f"fetched from the Hub: {error}"
        ) from error
