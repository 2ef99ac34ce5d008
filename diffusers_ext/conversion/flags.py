"""What an original codebase builds a network with: flags, and their defaults there."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from diffusers import ModelMixin


Flags = dict[str, Any]

REQUIRED = object()


@dataclass(frozen=True)
class Codebase:
    """An architecture: our class for it, and what builds the network there, with the flags and their defaults."""

    model_class: type[ModelMixin]
    builders: Mapping[str, Flags]


def complete(
    flags: Mapping[str, Any], defaults: Mapping[str, Any], ignored: Collection[str], builder: str, architecture: str
) -> Flags:
    """`flags` with the defaults of those left out, and the `builder`'s name; without those that are `ignored`.

    Args:
        flags: what the user or a preset gives.
        defaults: every flag that `builder` takes; `REQUIRED` where it has no default.
        ignored: flags that may be given and change nothing in the network and its process.
        builder: what builds the network in the codebase of `architecture`.
        architecture: name of the architecture, for errors.

    Raises:
        ValueError: when a flag is unknown, is missing, or is not a truth value though its default is one.
    """
    unknown = sorted(set(flags) - set(defaults) - set(ignored))
    if unknown:
        raise ValueError(
            f"`config` has flags that {builder!r} of {architecture!r} does not know: {', '.join(unknown)}. "
            f"Valid: {', '.join(sorted(set(defaults) | set(ignored)))}."
        )
    flags = {"builder": builder} | dict(defaults) | {key: flags[key] for key in flags if key in defaults}
    for key, value in flags.items():
        if isinstance(defaults.get(key), bool) and not isinstance(value, bool):
            raise ValueError(f"`config` has {key}={value!r}, which must be True or False.")
    missing = [key for key, value in flags.items() if value is REQUIRED]
    if missing:
        raise ValueError(f"`config` lacks flags that {builder!r} of {architecture!r} needs: {', '.join(missing)}.")
    return flags


def pop_builder(flags: Flags, builders: Collection[str], default: str, architecture: str) -> str:
    """Take the `builder` out of `flags`, without the module it is in there.

    Raises:
        ValueError: when it is not one of `builders`.
    """
    builder = (flags.pop("builder", None) or default).rpartition(".")[2]
    if builder not in builders:
        raise ValueError(f"`builder` ({builder!r}) does not build {architecture!r}. Valid: {', '.join(builders)}.")
    return builder
