"""Write a card, keep what people wrote in it, and say whether it is stale."""

import difflib
import json
import os
import re
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers_ext.cards import blocks
from diffusers_ext.cards.document import block, get_block, join, parse_metadata, set_block, set_metadata, split
from diffusers_ext.cards.folder import Contents, read_folder
from diffusers_ext.training.config import LICENCE


# Blocks in the order of a new card, with the heading before each; the results are written by `evaluate`.
ORDER = {
    "about": "",
    "origin": "",
    "licence": "",
    "samples": "",
    "usage": "## Usage",
    "architecture": "## What is inside",
    "training": "## Training",
    "evaluation": "## Results of `diffusers-ext evaluate`",
    "limits": "## Limits",
    "citation": "## Citation",
}
# Those whose presence says that the card is kept by this package; results are added to any card.
OWN = tuple(name for name in ORDER if name != "evaluation")
# Beginning of the text that diffusers puts into a card of its own.
BOILERPLATE = "This is the model card of a 🧨 diffusers"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def write_card(
    folder: str | os.PathLike,
    *,
    repo_id: str | None = None,
    license: str | None = None,
    base_model: str | Sequence[str] | None = None,
    datasets: str | Sequence[str] | None = None,
    samples: bool | None = None,
) -> Path:
    """Write the README.md of a model, or bring it up to date.

    The card is its own source: text and metadata that people wrote stay to the byte. What stands between comments such
    as `<!-- usage:start -->` and `<!-- usage:end -->` is made anew from the files of the folder; a block that somebody
    removed stays away, and a card written by hand gets usage and architecture at its end. Writing twice changes
    nothing.

    Args:
        folder: of a pipeline, modular pipeline, network, LoRA adapter, or training run.
        repo_id: repository that the snippet loads; None: the one that the card names already, or ".".
        license: of the weights, by its Hub identifier such as `apache-2.0` or `cc-by-nc-4.0`. None: the one that the
            card names, or none, which the card then says.
        base_model: model that this one was made from: its Hub name, which goes into the metadata, or an address, which
            goes into the text; or several.
        datasets: Hub names of the training data.
        samples: whether to draw `samples.png` with a fixed seed. None: where the card has no picture and drawing takes
            seconds.

    Returns:
        The file, written as a whole or not at all.

    Raises:
        ValueError: when the folder holds no model, the card's metadata cannot be read, or converted weights have no
            licence.
    """
    folder = Path(folder)
    contents = read_folder(folder)
    content = read_card(folder)
    metadata = parse_metadata(split(content)[0])
    if get_block(content, "origin") is not None and not (license or metadata.get("license")):
        raise ValueError(
            f"The weights in {folder} were converted from somebody's checkpoint, and its licence is not known. Look "
            f"it up and give it with `--license`, and where they come from with `--base_model`: "
            f"`diffusers-ext card {folder.name} --license cc-by-nc-4.0 --base_model org/name`."
        )
    if samples or (samples is None and _needs_picture(contents, content)):
        from diffusers_ext.cards.samples import draw_samples

        draw_samples(contents, at_any_cost=bool(samples))
    given = {"license": license, "base_model": base_model, "datasets": datasets}
    return save_card(folder, compose(contents, content, repo_id=repo_id, metadata=given))


def is_stale(folder: str | os.PathLike) -> str | None:
    """What writing the card of a folder would change, as a unified diff; None when it is up to date.

    Raises:
        ValueError: as [`write_card`].
    """
    folder = Path(folder)
    content = read_card(folder)
    new = compose(read_folder(folder), content)
    if new == _read(folder / "README.md"):
        return None
    lines = [text.splitlines(keepends=True) for text in (_read(folder / "README.md"), new)]
    return "".join(difflib.unified_diff(*lines, "README.md", "README.md as it would be written"))


def regenerate(
    model: str | os.PathLike,
    *,
    output: str | os.PathLike | None = None,
    check: bool = False,
    repo_id: str | None = None,
    license: str | None = None,
    base_model: str | Sequence[str] | None = None,
    datasets: str | Sequence[str] | None = None,
    samples: bool | None = None,
) -> Path:
    """What `diffusers-ext card MODEL` runs: write the card of a folder, or only look whether it is stale.

    Args:
        model: folder.
        output: file that gets the card in place of the folder's README.md, which then stays as it is.
        check: change nothing.
        repo_id, license, base_model, datasets, samples: as in [`write_card`].

    Returns:
        The card's file.

    Raises:
        ValueError: as [`write_card`]; with `check`, when the card is stale, with the difference.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        raise ValueError(
            f"`model` ({str(model)!r}) must be a folder. Fetch a repository with `diffusers-ext pull {model} FOLDER`, "
            "and push the folder when its card is written."
        )
    if check:
        difference = is_stale(folder)
        if difference is not None:
            raise ValueError(f"The card of {folder} is stale; `diffusers-ext card {folder}` writes it.\n{difference}")
        return folder / "README.md"
    if output is None:
        return write_card(
            folder, repo_id=repo_id, license=license, base_model=base_model, datasets=datasets, samples=samples
        )
    given = {"license": license, "base_model": base_model, "datasets": datasets}
    return save_card(Path(output), compose(read_folder(folder), read_card(folder), repo_id=repo_id, metadata=given))


def compose(
    contents: Contents,
    content: str = "",
    *,
    repo_id: str | None = None,
    name: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    given: Mapping[str, str] | None = None,
    call: str | None = None,
) -> str:
    """The text of a card.

    Args:
        contents: of the folder.
        content: the present card; empty for a new one.
        repo_id: repository that the snippet loads.
        name: heading of a new card; None: that of the repository or folder.
        metadata: values to set; those that are None stay.
        given: blocks by name that the folder does not tell: "origin", "training" and so on.
        call: arguments of the pipeline's call in the snippet.
    """
    if repo_id is not None and not re.fullmatch(r"[^\s\"\\`]+", repo_id):
        raise ValueError(f"`repo_id` ({repo_id!r}) must be the name of a repository, such as me/my-model.")
    newline = "\r\n" if "\r\n" in content else "\n"
    front, text = split(content.replace("\r\n", "\n"))
    wanted = _metadata(contents, parse_metadata(front), metadata or {})
    name = name or (repo_id or "").rpartition("/")[2] or contents.folder.resolve().name
    result = _evaluation(contents.folder)
    made = _blocks(contents, text, wanted, repo_id, call) | dict(given or {})
    origin = _origin(made.get("origin") or get_block(text, "origin"), (metadata or {}).get("base_model"))
    if origin:
        made["origin"] = origin
    if result is not None or get_block(text, "evaluation") is not None:
        made["limits"] = blocks.limits(evaluated=True)

    if not text.strip():
        text = f"\n# {name}\n"
        missing = [key for key in ORDER if key != ("about" if "origin" in made else None)]
    elif any(get_block(text, key) is not None for key in OWN):
        missing = ["origin", "training"] + ["samples"] * ("](samples" not in text)
    else:
        missing = ["origin", "usage", "architecture", "training"]
    if not wanted["license"]:
        missing.append("licence")
    for key in ORDER:
        if not made.get(key):
            continue
        if get_block(text, key) is not None:
            text = set_block(text, key, made[key])
        elif key in missing:
            text = _insert(text, key, made[key])

    composed = join(set_metadata(front, {key: value for key, value in wanted.items() if value}), text)
    if result is not None:
        from diffusers_ext.evaluation.report import add_results

        composed = add_results(composed, name, result)
    return composed.replace("\n", newline)


def _blocks(
    contents: Contents, text: str, metadata: Mapping[str, Any], repo_id: str | None, call: str | None
) -> dict[str, str | None]:
    """The blocks that follow from the folder and the metadata, by name; None for those that there is nothing to say
    in. What the snippet loads, and how it calls the pipeline, is taken from the present one where it still fits."""
    usage = get_block(text, "usage") or ""
    repo_id = repo_id or _loaded_name(usage) or blocks.HERE
    call = call or blocks.kept_call(usage, contents)
    base_model = next(iter(_listed(metadata["base_model"])), None)
    return {
        "about": blocks.about(contents),
        "licence": blocks.licence(metadata["license"]),
        "samples": blocks.picture(contents.folder),
        "usage": blocks.usage(contents, repo_id, call, base_model),
        "architecture": blocks.architecture(contents),
        "limits": blocks.limits(evaluated=False),
        "citation": blocks.citation(contents),
    }


def _origin(present: str | None, base_model: str | Sequence[str] | None) -> str:
    """The block on where weights come from, with the addresses that were given."""
    told = [present or ""]
    for address in _listed(base_model):
        if not HUB_NAME.fullmatch(address) and address not in told[0]:
            told.append(f"The weights come from {address}.")
    return "\n\n".join(told).strip()


def _insert(text: str, name: str, content: str) -> str:
    """The text with a new block: before the first of those that follow it in the order of a new card, else at the
    end."""
    piece = "\n\n".join(part for part in (ORDER[name], block(name, content)) if part)
    names = list(ORDER)
    for key in names[names.index(name) + 1 :]:
        heading = re.escape(ORDER[key]) + r"\n\s*" if ORDER[key] else ""
        found = re.search(rf"(?:^{heading})?<!-- {key}:start -->", text, re.MULTILINE)
        if found:
            return f"{text[: found.start()]}{piece}\n\n{text[found.start() :]}"
    return f"{text.rstrip()}\n\n{piece}\n"


def _metadata(contents: Contents, present: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata that the card shall have; those that it has and nobody gave stay."""
    tag = "text-to-image" if contents.reads_text else "unconditional-image-generation"
    if set(contents.parts) == {"classifier"}:
        tag = "image-classification"
    tags = _listed(present.get("tags"))
    ours = {part.class_name for part in contents.networks.values() if blocks.is_ours(part.class_name)}
    tags += [name for name in ("diffusers_ext", *(given.get("tags") or ()), *sorted(ours)) if name not in tags]
    if contents.kind == "lora" and "lora" not in tags:
        tags.append("lora")
    if contents.kind == "modular" and "modular-diffusers" not in tags:
        tags.append("modular-diffusers")
    bases = [name for name in _listed(given.get("base_model")) if HUB_NAME.fullmatch(name)]
    return {
        "license": licence_name(given.get("license")) or present.get("license"),
        "library_name": present.get("library_name") or "diffusers",
        "pipeline_tag": present.get("pipeline_tag") or tag,
        "tags": tags,
        "datasets": _listed(given.get("datasets")) or present.get("datasets"),
        "base_model": (bases[0] if len(bases) == 1 else bases) or present.get("base_model"),
    }


def licence_name(name: str | None) -> str | None:
    """A licence as the metadata of cards name it.

    Raises:
        ValueError: for what is none.
    """
    if name is None:
        return None
    if not LICENCE.fullmatch(name):
        raise ValueError(
            f"`license` ({name!r}) must be an identifier as the Hub has them, such as apache-2.0, mit, openrail, "
            "cc-by-4.0, cc-by-nc-4.0 or other."
        )
    return name.lower()


def _listed(value: str | Sequence[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def _loaded_name(usage: str) -> str | None:
    """What the snippet of a card loads; of an adapter, the adapter."""
    names = re.findall(r'(?:load_lora_adapter|from_pretrained)\(\s*"([^"]+)"', usage)
    return names[-1] if names else None


def _evaluation(folder: Path) -> dict[str, Any] | None:
    path = folder / "evaluation.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _needs_picture(contents: Contents, content: str) -> bool:
    return contents.kind == "pipeline" and blocks.picture(contents.folder) is None and "](samples" not in content


def read_card(folder: Path) -> str:
    """The present card of a folder; empty where there is none, or only what diffusers writes into every repository."""
    content = _read(folder / "README.md")
    return "" if BOILERPLATE in content else content


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8") if path.is_file() else ""
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}). Save it as UTF-8, or remove it for a new card.") from error


def save_card(path: Path, content: str) -> Path:
    """Write a card into a folder, or as a file, unless it says that already."""
    path = path / "README.md" if path.is_dir() else path
    if not path.is_file() or _read(path) != content:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}.unfinished")
        try:
            unfinished.write_bytes(content.encode("utf-8"))
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)
    return path
