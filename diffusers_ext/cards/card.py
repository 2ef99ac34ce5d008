"""Write a card, keep what people wrote in it, and say whether it is stale."""

import difflib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from diffusers.utils import logging

from diffusers_ext.cards import blocks
from diffusers_ext.cards.document import (
    EARLIER,
    append,
    as_it_was,
    block,
    dated,
    get_block,
    join,
    parse_metadata,
    plain,
    remove_block,
    set_block,
    set_metadata,
    split,
    undated,
)
from diffusers_ext.cards.folder import Contents, Weights, read_folder
from diffusers_ext.files import write_atomically
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
# In the text that diffusers puts into a card of its own.
BOILERPLATE = "This is the model card of a 🧨 diffusers {} that has been pushed on the Hub."
STUB = f"{BOILERPLATE} This model card has been automatically generated."
HUB_NAME = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*", re.ASCII)
ADDRESS = re.compile(r"https?://[^\s<>\"']+")

logger = logging.get_logger(__name__)


def write_card(
    folder: str | os.PathLike,
    *,
    repo_id: str | None = None,
    license: str | None = None,
    base_model: str | Sequence[str] | None = None,
    datasets: str | Sequence[str] | None = None,
    samples: bool | None = None,
    output: str | os.PathLike | None = None,
    check: bool = False,
    inherited: Mapping[str, Any] | None = None,
    beside: Mapping[str, Mapping[str, Weights]] | None = None,
) -> Path:
    """Write the README.md of a model, or bring it up to date.

    The card is its own source: text and metadata that people wrote stay to the byte. What stands between comments such
    as `<!-- usage:start -->` and `<!-- usage:end -->` is made anew from the files of the folder; a block that somebody
    removed stays away, and a card written by hand gets usage and architecture at its end. Writing twice changes
    nothing. Pictures, results and facts of a training are marked with the weights that they are of. With other weights
    a picture of ours is drawn anew; the others stay with a note, the results without their entries in the metadata.

    Args:
        folder: of a pipeline, modular pipeline, network, LoRA adapter, or training run.
        repo_id: repository that the snippet loads; None: the one that the card names already, or ".".
        license: of the weights, by its Hub identifier such as `apache-2.0` or `cc-by-nc-4.0`. None: the one that the
            card names, or none, which the card then says.
        base_model: model that this one was made from: its Hub name, which goes into the metadata, or an address, which
            goes into the text in place of an earlier one; or several.
        datasets: Hub names or addresses of the training data.
        samples: whether to draw `samples.png` with a fixed seed. None: where the card has no picture, or one of ours
            of other weights, and drawing takes seconds.
        output: file that gets the card in place of the folder's README.md, which then stays as it is.
        check: change nothing, and raise the difference if there is one.
        inherited: as [`inherit`] returns it, for what neither the card nor the other arguments say.
        beside: weights of the repository that are not in the folder, as [`Contents.with_weights`] takes them.

    Returns:
        The file, written as a whole or not at all.

    Raises:
        ValueError: when the folder holds no model, an argument is not as above, the card's metadata cannot be read, or
            weights of somebody else have no licence; with `check`, when the card is not up to date. Nothing is written
            or drawn then.
    """
    folder = Path(folder).expanduser()
    if (bool(samples), check, output is not None).count(True) > 1:
        raise ValueError("`samples` draws into the folder, `check` writes nothing, `output` another file: give one.")
    here = read_folder(folder)
    contents = here.with_weights(beside or {})
    given = {"license": license, "base_model": base_model, "datasets": datasets}
    present, new = _composed(contents, repo_id, given, inherited)
    if check:
        if present != new:
            lines = [text.splitlines(keepends=True) for text in (present, new)]
            difference = difflib.unified_diff(*lines, "README.md", "README.md as it would be written")
            told = f"The card of {folder} is stale; `diffusers-ext card {folder}` writes it."
            raise StaleCardError(told, "".join(difference))
        return folder / "README.md"
    can_be_drawn = here.digest == contents.digest and output is None
    if samples or (samples is None and can_be_drawn and _needs_picture(contents, present)):
        from diffusers_ext.cards.samples import draw_samples

        draw_samples(here, at_any_cost=bool(samples))
        _, new = _composed(contents, repo_id, given, inherited)
    if _tells_of_earlier(new, "evaluation") and not _tells_of_earlier(present, "evaluation"):
        logger.warning(
            f"The results in the card of {folder.resolve().name} are of earlier weights; they leave its metadata. "
            "`diffusers-ext evaluate` measures these."
        )
    return save_card(folder if output is None else Path(output), new)


class StaleCardError(ValueError):
    """A card is not as it would be written; `difference` is a unified diff."""

    def __init__(self, message: str, difference: str) -> None:
        super().__init__(f"{message}\n{difference}")
        self.difference = difference


def is_stale(folder: str | os.PathLike) -> str | None:
    """What writing the card of a folder would change, as a unified diff; None when it is up to date.

    Raises:
        ValueError: as [`write_card`].
    """
    try:
        write_card(folder, check=True)
    except StaleCardError as error:
        return error.difference
    return None


def _composed(
    contents: Contents, repo_id: str | None, given: Mapping[str, Any], inherited: Mapping[str, Any] | None
) -> tuple[str, str]:
    """The card of a folder as it is, and as it should be."""
    present = _read(contents.folder / "README.md")
    new = compose(contents, without_stub(present), repo_id=repo_id, metadata=given, inherited=inherited)
    front, text = split(plain(new))
    if get_block(text, "origin") is not None and not parse_metadata(front).get("license"):
        raise ValueError(
            f"The weights in {repo_id or contents.folder.resolve().name} were converted from somebody's checkpoint, "
            "and its licence is not known. Look it up and give it with `--license`, and where they come from with "
            "`--base_model`: `diffusers-ext card FOLDER --license cc-by-nc-4.0 --base_model org/name`."
        )
    return present, new


def compose(
    contents: Contents,
    content: str = "",
    *,
    repo_id: str | None = None,
    name: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    given: Mapping[str, str] | None = None,
    call: str | None = None,
    inherited: Mapping[str, Any] | None = None,
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
        inherited: license, base_model, datasets and origin where neither the card nor `metadata` says them.
    """
    if repo_id is not None and not re.fullmatch(r"[^\s\"\\`]+", repo_id):
        raise ValueError(f"`repo_id` ({repo_id!r}) must be the name of a repository, such as me/my-model.")
    front, text = split(plain(content))
    present, metadata, inherited = parse_metadata(front), metadata or {}, inherited or {}
    wanted = _metadata(contents, present, metadata, inherited, repo_id)
    name = name or (repo_id or "").rpartition("/")[2] or contents.folder.resolve().name
    made = _blocks(contents, text, wanted, repo_id, call) | dict(given or {})
    origin = made.get("origin") or get_block(text, "origin") or inherited.get("origin")
    origin = _origin(origin, metadata.get("base_model"))
    if origin:
        made["origin"] = origin
    result = _evaluation(contents.folder)
    tables = get_block(text, "evaluation")
    if result is not None or tables is not None:
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
            text = insert(text, key, made[key])

    values = {key: value for key, value in wanted.items() if value}
    if _tells_of_earlier(text, "evaluation"):
        values["model-index"] = without_results(present.get("model-index"))
    composed = join(set_metadata(front, values), text)
    if result is not None:
        composed = _with_results(contents, composed, name, result)
    return as_it_was(composed, content)


def _with_results(contents: Contents, content: str, name: str, result: dict[str, Any]) -> str:
    """The card with what evaluation.json says, unless that is of earlier weights."""
    from diffusers_ext.evaluation.report import add_results, table

    try:
        told = get_block(content, "evaluation")
        if told is None or undated(told)[0] != table(result):
            return add_results(content, name, result, contents.digest)
        return (
            content
            if _tells_of_earlier(content, "evaluation")
            else add_results(content, name, result, undated(told)[1])
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"`folder`: {contents.folder / 'evaluation.json'} is not as `diffusers-ext evaluate` writes it "
            f"({type(error).__name__}: {error})."
        ) from error


def _tells_of_earlier(content: str, name: str) -> bool:
    return EARLIER in (get_block(content, name) or "")


def _blocks(
    contents: Contents, text: str, metadata: Mapping[str, Any], repo_id: str | None, call: str | None
) -> dict[str, str | None]:
    """The blocks that follow from the folder and the metadata, by name; None for those that there is nothing to say
    in. What the snippet loads, and how it calls the pipeline, is taken from the present one where it still fits."""
    usage = get_block(text, "usage") or ""
    repo_id = repo_id or _loaded_name(usage) or blocks.HERE
    call = call or blocks.kept_call(usage, contents)
    base_model = next(iter(_listed(metadata["base_model"])), None)
    samples = blocks.picture(contents)
    if samples is None and "](samples" in (get_block(text, "samples") or ""):
        samples = blocks.NO_PICTURE
    made = {
        "about": blocks.about(contents),
        "licence": blocks.licence(metadata["license"]),
        "samples": samples,
        "usage": blocks.usage(contents, repo_id, call, base_model),
        "architecture": blocks.architecture(contents),
        "limits": blocks.limits(evaluated=False, draws=set(contents.parts) != {"classifier"}),
        "citation": blocks.citation(contents),
    }
    for name in ("training", "evaluation"):
        told = get_block(text, name)
        if told is not None and contents.digest is not None:
            made[name] = dated(*undated(told), contents.digest)
    return made


def _origin(present: str | None, base_model: str | Sequence[str] | None) -> str:
    """The block on where weights come from; addresses that are given replace those that were."""
    told = (present or "").split("\n\n")
    addresses = [f"The weights come from {name}." for name in _listed(base_model) if ADDRESS.fullmatch(name)]
    if addresses:
        told = [part for part in told if not re.fullmatch(r"The weights come from \S+\.", part)] + addresses
    return "\n\n".join(told).strip()


def insert(text: str, name: str, content: str) -> str:
    """The text with a new block: before the first of those that follow it in the order of a new card, else at the
    end."""
    piece = "\n\n".join(part for part in (ORDER[name], block(name, content)) if part)
    names = list(ORDER)
    for key in names[names.index(name) + 1 :]:
        heading = re.escape(ORDER[key]) + r"\n\s*" if ORDER[key] else ""
        found = re.search(rf"(?:^{heading})?<!-- {key}:start -->", text, re.MULTILINE)
        if found:
            return f"{text[: found.start()]}{piece}\n\n{text[found.start() :]}"
    return append(text, piece)


def _metadata(
    contents: Contents,
    present: Mapping[str, Any],
    given: Mapping[str, Any],
    inherited: Mapping[str, Any],
    repo_id: str | None,
) -> dict[str, Any]:
    """Metadata that the card shall have; those that it has and nobody gave stay."""
    tag = "text-to-image" if contents.reads_text else "unconditional-image-generation"
    if set(contents.parts) == {"classifier"}:
        tag = "image-classification"
    ours = {part.class_name for part in contents.networks.values() if blocks.is_ours(part.class_name)}
    tags = [name for name in _listed(present.get("tags")) if name in ours or not blocks.is_our_network(name)]
    tags += [name for name in ("diffusers_ext", *(given.get("tags") or ()), *sorted(ours)) if name not in tags]
    if contents.kind == "lora" and "lora" not in tags:
        tags.append("lora")
    if contents.kind == "modular" and "modular-diffusers" not in tags:
        tags.append("modular-diffusers")
    bases = [name for name in check_names("base_model", given.get("base_model")) if not ADDRESS.fullmatch(name)]
    if not bases and not present.get("base_model"):
        bases = [name for name in _listed(inherited.get("base_model")) if name != repo_id]
    licences = licence_name(given.get("license")) or present.get("license") or inherited.get("license")
    datasets = check_names("datasets", given.get("datasets"))
    return {
        "license": licences,
        "library_name": present.get("library_name") or "diffusers",
        "pipeline_tag": present.get("pipeline_tag") or tag,
        "tags": tags,
        "datasets": datasets or present.get("datasets") or inherited.get("datasets"),
        "base_model": (bases[0] if len(bases) == 1 else bases) or present.get("base_model"),
    }


def check_names(argument: str, names: str | Sequence[str] | None) -> list[str]:
    """Names of models or data sets as a list.

    Raises:
        ValueError: for what is neither a name on the Hub nor an address.
    """
    for name in _listed(names):
        if not isinstance(name, str) or not (HUB_NAME.fullmatch(name) or ADDRESS.fullmatch(name)):
            raise ValueError(
                f"`{argument}` ({name!r}) must be a name on the Hub, such as org/name, or an address that begins with "
                "https://."
            )
    return _listed(names)


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
    loads = (r"load_lora_adapter", r"^pipe = .*?(?:from_pretrained|init_pipeline)", r"from_pretrained")
    found = (re.search(rf'{load}\(\s*"([^"]+)"', usage, re.MULTILINE) for load in loads)
    return next((name[1] for name in found if name), None)


def _evaluation(folder: Path) -> dict[str, Any] | None:
    path = folder / "evaluation.json"
    if not path.is_file():
        return None
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"`folder`: {path} is no JSON file ({error}).") from error
    if not isinstance(result, dict):
        raise ValueError(f"`folder`: {path} must hold an object, as `diffusers-ext evaluate` writes it.")
    return result


def without_results(index: Any) -> list[Any] | None:
    """The `model-index` of a card without what `diffusers-ext evaluate` has measured; None where nothing is left."""

    def is_measured(metric: Any) -> bool:
        arguments = metric.get("args") if isinstance(metric, dict) else None
        return (
            isinstance(arguments, dict) and "seed" in arguments and bool({"num_samples", "num_images"} & {*arguments})
        )

    models = []
    for model in index if isinstance(index, list) else ():
        results = []
        for result in model.get("results") or ():
            metrics = [metric for metric in result.get("metrics") or () if not is_measured(metric)]
            if metrics:
                results.append(result | {"metrics": metrics})
        if results:
            models.append(model | {"results": results})
    return models or None


def _needs_picture(contents: Contents, content: str) -> bool:
    if contents.kind != "pipeline":
        return False
    if blocks.picture(contents) is not None:
        return blocks.drawn_with(contents.folder) not in (None, contents.digest)
    return get_block(content, "samples") is not None or "](samples" not in content


def merge_cards(local: str, remote: str) -> str:
    """The card to push: the local one where people wrote text in it, else that of the repository with what only the
    local one tells: metadata, origin, training and results."""
    local, remote = without_stub(local), without_stub(remote)
    if not remote.strip() or _has_own_text(local):
        return local
    local_front, local_text = split(plain(local))
    front, text = split(plain(remote))
    if not text.strip():
        text = local_text
    for name in ("origin", "training", "evaluation"):
        new = get_block(local_text, name)
        if new is not None:
            text = set_block(text, name, new) if get_block(text, name) is not None else insert(text, name, new)
    present = parse_metadata(front)
    values = {
        name: value
        for name, value in parse_metadata(local_front).items()
        if value and (name in ("license", "datasets", "base_model", "model-index") or name not in present)
    }
    return as_it_was(join(set_metadata(front, values), text), remote)


def _has_own_text(content: str) -> bool:
    """Whether people wrote more than a title into a card."""
    text = split(plain(content))[1]
    for name, heading in ORDER.items():
        text = remove_block(text, name)
        if heading:
            text = re.sub(rf"^{re.escape(heading)}[ \t]*$", "", text, flags=re.MULTILINE)
    return bool(re.sub(r"\A\s*# .*", "", text).strip())


def without_stub(content: str) -> str:
    """A card without the sections that diffusers writes into every repository, as far as nobody has filled them."""
    if BOILERPLATE.partition("{}")[0] not in content:
        return content
    front, text = split(plain(content))
    stubs = [
        ModelCard.from_template(ModelCardData(), model_description=STUB.format(kind)) for kind in ("pipeline", "model")
    ]
    unfilled = {section.strip() for stub in stubs for section in _sections(stub.text)}
    kept = "".join(section for section in _sections(text) if section.strip() not in unfilled)
    return as_it_was(join(front, f"\n{kept}"), content)


def _sections(text: str) -> list[str]:
    return re.split(r"^(?=#+ )", text, flags=re.MULTILINE)


def read_card(folder: Path) -> str:
    """The present card of a folder, without the stub of diffusers; empty where there is none."""
    return without_stub(_read(folder / "README.md"))


def _read(path: Path) -> str:
    return decode(path.read_bytes(), path) if path.is_file() else ""


def decode(content: bytes, path: object) -> str:
    """The text of a card."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}). Save it as UTF-8, or remove it for a new card.") from error


def save_card(path: Path, content: str) -> Path:
    """Write a card into a folder, or as a file, unless it says that already."""
    path = path / "README.md" if path.is_dir() else path
    if not path.is_file() or _read(path) != content:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    return path
