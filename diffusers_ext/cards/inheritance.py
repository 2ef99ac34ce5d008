"""What the card of a model takes over from the cards of those that its weights were loaded from."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HTTPError

from diffusers_ext.cards.card import read_card
from diffusers_ext.cards.document import get_block, parse_metadata, plain, split, undated
from diffusers_ext.cards.folder import read_folder


INDEXES = ("model_index.json", "modular_model_index.json", "config.json")
REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")
CACHED = re.compile(r"models--(?P<repository>[^/\\]+)[/\\]snapshots[/\\]")


def inherit(folder: Path) -> dict[str, Any]:
    """License, base_model, datasets and the block on the origin of what a pipeline or model was loaded from.

    Args:
        folder: what `save_pretrained` of a loaded pipeline or model wrote, with the names of its sources: folders of
            this machine, whose cards are read, and repositories, which are the `base_model`.

    Returns:
        Values for `inherited` of `write_card`; without a licence where that of some of the weights is asked for.
    """
    licences, bases, datasets, origins = [], [], [], []
    unknown = False
    for name, card in dict(_sources(folder)).items():
        front, text = split(plain(card))
        metadata = parse_metadata(front)
        origin = get_block(text, "origin")
        unknown |= origin is not None and not metadata.get("license")
        licences += _listed(metadata.get("license"))
        datasets += _listed(metadata.get("datasets"))
        bases += [name] if REPOSITORY.fullmatch(name) else _listed(metadata.get("base_model"))
        origins += [] if origin is None else [undated(origin)[0]]
    licences, bases, datasets, origins = (list(dict.fromkeys(told)) for told in (licences, bases, datasets, origins))
    return {
        "license": None if unknown or not licences else licences[0] if len(licences) == 1 else licences,
        "base_model": bases,
        "datasets": datasets,
        "origin": "\n\n".join(origins),
    }


def _sources(folder: Path) -> Iterator[tuple[str, str]]:
    """Name and card of everything that a part of the folder was loaded from; the name is a path or a repository."""
    files = [folder / name for name in INDEXES] + sorted(folder.glob("*/config.json"))
    for file in files:
        name = json.loads(file.read_bytes()).get("_name_or_path") if file.is_file() else None
        if not isinstance(name, str) or not name:
            continue
        cached = CACHED.search(name)
        if cached:
            repository = cached["repository"].replace("--", "/")
            yield repository, _card_of_repository(repository)
        elif Path(name).is_dir():
            place = next((path for path in (Path(name), Path(name).resolve().parent) if _is_source(path)), None)
            if place is not None:
                yield str(place.resolve()), read_card(place)
        elif REPOSITORY.fullmatch(name) and _is_cached(name):
            yield name, _card_of_repository(name)


def _is_source(folder: Path) -> bool:
    try:
        return (folder / "README.md").is_file() and bool(read_folder(folder))
    except ValueError:
        return False


def _is_cached(name: str) -> bool:
    """Whether a name is that of a repository, which loading put into the cache, and not of a folder that is gone."""
    return Path(constants.HF_HUB_CACHE, f"models--{name.replace('/', '--')}").is_dir()


def _card_of_repository(name: str) -> str:
    """The card of a repository; empty where it cannot be read, since then only its licence stays unknown."""
    try:
        return Path(hf_hub_download(name, "README.md", etag_timeout=constants.HF_HUB_ETAG_TIMEOUT)).read_text("utf-8")
    except (OSError, ValueError, HTTPError, HfHubHTTPError):
        return ""


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [entry for entry in value or () if isinstance(entry, str)]
