"""Text of a card: metadata in front, and blocks between comments that are rebuilt while all else stays to the byte."""

import difflib
import re
from typing import Any

import yaml


BOM = "\ufeff"
# Said before what was drawn, measured or trained with other weights than the folder holds now.
EARLIER = "> **Of earlier weights**, not of those that are here now."
_WEIGHTS = re.compile(r"\n<!-- weights: (\w+) -->\Z")
_FRONT = re.compile(r"\A\s*---[ \t]*\n(.*?)^---[ \t]*(?:\n|\Z)", re.DOTALL | re.MULTILINE)


def plain(content: str) -> str:
    r"""The text of a file without byte order mark, its lines ended by `\n`."""
    return content.removeprefix(BOM).replace("\r\n", "\n")


def as_it_was(new: str, old: str) -> str:
    """A text made from `plain(old)`, with the byte order mark of `old` and the end that each line has there; new lines
    end as most do."""
    if "\r\n" in old:
        lines, ends = new.split("\n"), ["\r\n" if old.count("\r\n") * 2 > old.count("\n") else "\n"]
        ends *= len(lines) - 1
        if old.count("\r\n") != old.count("\n"):
            before = old.split("\n")
            kept = [line.removesuffix("\r") for line in before]
            for i, j, size in difflib.SequenceMatcher(None, kept, lines, autojunk=False).get_matching_blocks():
                size = min(size, len(before) - 1 - i, len(ends) - j)
                ends[j : j + size] = ["\r\n" if line.endswith("\r") else "\n" for line in before[i : i + size]]
        new = "".join(line + end for line, end in zip(lines, [*ends, ""]))
    return (BOM if old.startswith(BOM) else "") + new


def split(content: str) -> tuple[str, str]:
    """YAML and text of a card; both may be empty. The lines of `---` belong to neither."""
    found = _FRONT.match(content)
    return (found[1], content[found.end() :]) if found else ("", content)


def join(metadata: str, text: str) -> str:
    return f"---\n{metadata}---\n{text}"


def parse_metadata(metadata: str) -> dict[str, Any]:
    """Values of the YAML.

    Raises:
        ValueError: when it cannot be read, or is no mapping.
    """
    try:
        values = yaml.safe_load(metadata)
    except yaml.YAMLError as error:
        raise ValueError(f"The metadata of the card cannot be read: {error}") from error
    if not isinstance(values, dict | None):
        raise ValueError(f"The metadata of the card must be names with values, not {type(values).__name__}.")
    return values or {}


def set_metadata(metadata: str, values: dict[str, Any]) -> str:
    """YAML in which `values` are set, new ones in their order, and those that are None are removed. Lines of other
    names stay, and so do all comments that stand in lines of their own before a name."""
    present = parse_metadata(metadata)
    if metadata and not metadata.endswith("\n"):
        metadata += "\n"
    chunks = [chunk for chunk in re.split(r"^(?=[^\s#-].*?:)", metadata, flags=re.MULTILINE) if chunk]
    order = list(values)
    for name, value in values.items():
        if present.get(name) == value:
            continue
        new = "" if value is None else yaml.safe_dump({name: value}, sort_keys=False, allow_unicode=True)
        named = [_name(chunk) for chunk in chunks]
        if name in named:
            place = named.index(name)
            comments = re.search(r"(?:^[ \t]*(?:#.*)?\n)*\Z", chunks[place], re.MULTILINE)[0]  # of the next name
            chunks[place] = new + comments
        else:
            later = [*order[order.index(name) + 1 :], "model-index"]
            chunks.insert(min((i for i, other in enumerate(named) if other in later), default=len(chunks)), new)
    result = "".join(chunks)
    wanted = {name: value for name, value in (present | values).items() if value is not None or name not in values}
    try:
        found = parse_metadata(result)
        # As text, since a value may be NaN.
        is_as_wanted = found.keys() == wanted.keys() and all(repr(found[name]) == repr(wanted[name]) for name in found)
    except ValueError:  # such as an alias without its anchor
        is_as_wanted = False
    if not is_as_wanted:  # written in a way that lines do not tell apart
        result = yaml.safe_dump(wanted, sort_keys=False, allow_unicode=True)
    return result


def _name(chunk: str) -> str:
    return chunk.partition(":")[0].strip().strip("\"'")


def get_block(text: str, name: str) -> str | None:
    """What stands between the comments of a block; None where the text has no such block."""
    found = _pattern(name).search(text)
    return found[1] if found else None


def set_block(text: str, name: str, content: str) -> str:
    """The text with another content of a block that it has."""
    return _pattern(name).sub(lambda _: block(name, content), text, count=1)


def remove_block(text: str, name: str) -> str:
    return _pattern(name).sub("", text)


def block(name: str, content: str) -> str:
    return f"<!-- {name}:start -->\n{content}\n<!-- {name}:end -->"


def append(text: str, piece: str) -> str:
    """The text with a paragraph at its end."""
    return text.rstrip("\n") + f"\n\n{piece}\n"


def dated(body: str, digest: str | None, current: str | None) -> str:
    """The content of a block that tells of weights.

    Args:
        body: what it tells.
        digest: of the weights that it tells of; None where that is not known.
        current: of those that are there now.
    """
    if digest is None:
        return body
    earlier = f"{EARLIER}\n\n" if current not in (None, digest) else ""
    return f"{earlier}{body}\n<!-- weights: {digest} -->"


def undated(content: str) -> tuple[str, str | None]:
    """`body` and `digest` that [`dated`] was given."""
    found = _WEIGHTS.search(content)
    return _WEIGHTS.sub("", content).removeprefix(f"{EARLIER}\n\n"), found[1] if found else None


def _pattern(name: str) -> re.Pattern:
    return re.compile(rf"<!-- {name}:start -->\n?(.*?)\n?<!-- {name}:end -->", re.DOTALL)
