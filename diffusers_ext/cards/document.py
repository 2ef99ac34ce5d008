"""Text of a card: metadata in front, and blocks between comments that are rebuilt while all else stays to the byte."""

import re
from typing import Any

import yaml


_FRONT = re.compile(r"\A\s*---[ \t]*\n(.*?)^---[ \t]*(?:\n|\Z)", re.DOTALL | re.MULTILINE)


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
    """YAML in which `values` are set, new ones in their order. Lines of other names and their comments stay."""
    present = parse_metadata(metadata)
    if metadata and not metadata.endswith("\n"):
        metadata += "\n"
    chunks = [chunk for chunk in re.split(r"^(?=[^\s#-].*?:)", metadata, flags=re.MULTILINE) if chunk]
    order = list(values)
    for name, value in values.items():
        if name in present and present[name] == value:
            continue
        new = yaml.safe_dump({name: value}, sort_keys=False, allow_unicode=True)
        named = [_name(chunk) for chunk in chunks]
        if name in named:
            chunks[named.index(name)] = new
        else:
            later = [*order[order.index(name) + 1 :], "model-index"]
            chunks.insert(min((i for i, other in enumerate(named) if other in later), default=len(chunks)), new)
    result = "".join(chunks)
    if parse_metadata(result) != present | values:  # written in a way that lines do not tell apart
        result = yaml.safe_dump(present | values, sort_keys=False, allow_unicode=True)
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


def block(name: str, content: str) -> str:
    return f"<!-- {name}:start -->\n{content}\n<!-- {name}:end -->"


def _pattern(name: str) -> re.Pattern:
    return re.compile(rf"<!-- {name}:start -->\n?(.*?)\n?<!-- {name}:end -->", re.DOTALL)
