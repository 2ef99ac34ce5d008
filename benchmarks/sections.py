"""Sections of Markdown files that commands write, from `<!-- NAME:start -->` to `<!-- NAME:end -->`."""

import re
from pathlib import Path


def section(path: Path, name: str) -> str | None:
    """The text of a section; None where the file or the section does not exist."""
    found = _pattern(name).search(path.read_text(encoding="utf-8")) if path.exists() else None
    return found and found[2]


def write_section(path: Path, name: str, text: str, title: str | None = None) -> None:
    """Replace a section, the rest of the file stays.

    Args:
        path: Markdown file.
        name: of the section.
        text: its new content.
        title: heading of the file, which is made, and the section added to its end, where they do not exist.

    Raises:
        ValueError: when there is no such section and no `title`.
    """
    old = path.read_text(encoding="utf-8") if path.exists() else f"# {title}\n"
    whole = f"<!-- {name}:start -->\n{text}\n<!-- {name}:end -->"
    if _pattern(name).search(old):
        new = _pattern(name).sub(lambda match: whole, old)
    elif title is not None:
        new = f"{old.rstrip()}\n\n{whole}\n"
    else:
        raise ValueError(f"`path` ({path}) lacks the markers <!-- {name}:start --> and <!-- {name}:end -->.")
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(new, encoding="utf-8")
    temporary.replace(path)


def _pattern(name: str) -> re.Pattern:
    return re.compile(f"(<!-- {re.escape(name)}:start -->\n)(.*?)\n(<!-- {re.escape(name)}:end -->)", re.DOTALL)
