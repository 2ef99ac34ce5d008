"""Anatomies as tables, JSON and a page (HTML)."""

import json
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from diffusers_ext.inspection.anatomy import Anatomy, Network, to_dict
from diffusers_ext.inspection.drawing import clean, draw
from diffusers_ext.inspection.words import attention, count, folded, memory, parameters, pixels, size


FORMATS = ("table", "json", "svg", "html")
TERMINAL_WIDTH = 120

_NOTES = """\
FLOPs: torch's counter, one forward pass, a multiply-add counts 2. Memory: tensors alive on the meta device, without
workspaces; attention is fused. Activations: what autograd keeps for the backward pass. Training step: AdamW.
Field: input pixels that the middle of a block's output depends on, normalisation statistics aside."""


def render(anatomies: Sequence[Anatomy], format: str) -> str:
    """Text of `format`, one of `FORMATS`."""
    if format == "json":
        return json.dumps(to_dict(anatomies), indent=2) + "\n"
    if format == "svg":
        return draw(anatomies)
    tables = _tables(anatomies)
    if format == "html":
        return _page(anatomies, tables)
    return "\n".join(_text(table) for table in tables) + f"\n{_NOTES}\n"


def field(network: Network) -> str:
    """The theoretical receptive field in words."""
    found = network.receptive_field
    if found.size is None:
        return f"whole image ({size(found.inside)})" + ("" if found.exact else ", perhaps more")
    if found.size == (0, 0):
        return "none"
    beyond = "" if found.size == found.inside else f", of which {size(found.inside)} inside the image"
    return f"{size(found.size)} pixels{beyond}"


# Tables


@dataclass(frozen=True)
class Table:
    """Rows of text under a heading; columns in `right` hold numbers."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    right: frozenset[int] = frozenset()


def _tables(anatomies: Sequence[Anatomy]) -> list[Table]:
    tables = []
    for anatomy in anatomies:
        for network in anatomy.networks:
            tables += [_block_table(anatomy, network), _fact_table(network)]
    if len(anatomies) > 1:
        tables += [_comparison(anatomies), _resolution_table(anatomies)]
    return tables


def _block_table(anatomy: Anatomy, network: Network) -> Table:
    rows = []
    for run in folded(network.blocks):
        first, last = run[0], run[-1]
        name = first.name or "(elsewhere)"
        if len(run) > 1:
            name = f"{first.name} .. {last.name.rpartition('.')[2]}, each"
        rows.append(
            (
                name,
                size(first.output_shape[1:]) if first.output_shape else "",
                "" if first.channels is None else str(first.channels),
                size(first.resolution),
                attention(first.attention),
                parameters(first.parameters),
                count(first.flops),
                memory(last.activation_bytes),
                size(last.receptive_field),
            )
        )
    activations = memory(network.memory.activations)
    rows.append(("total", "", "", "", "", parameters(network.parameters), count(network.flops), activations, ""))
    names = f"{anatomy.title}: {network.name}" if anatomy.title != network.name else network.name
    header = ("block", "output", "channels", "pixels", "attention", "params", "FLOPs", "activations", "field")
    return Table(f"{names} ({network.model_class})", header, tuple(rows), frozenset({2, 5, 6, 7, 8}))


def _facts(network: Network) -> dict[str, str]:
    used, found, precision = network.memory, network.receptive_field, network.precision
    facts = {
        "class": network.model_class,
        "input": size(network.input_shape),
        "output": size(network.output_shape),
        "parameters": f"{network.parameters:,} ({parameters(network.parameters)})",
        "FLOPs of a forward pass": f"{count(network.flops)} ({count(network.flops / 2)} multiply-adds)",
        "memory: weights": memory(used.weights),
        "memory: peak of a forward pass": memory(used.forward_peak),
        "memory: activations for backward": memory(used.activations),
        "memory: peak of a training step": f"{memory(used.training_peak)}, in {_PHASES[used.training_peak_in]}",
        "memory: gradients, AdamW's moments": f"{memory(used.gradients)}, {memory(used.optimizer)}",
        "receptive field, theoretical": field(network),
        "receptive field, effective": (
            f"{found.effective:.1f} px ({found.effective_of})" if found.effective is not None else found.effective_of
        ),
        "attention at": _attention_places(network),
        "dtype": precision.dtype,
        "float32 when loaded in half": (
            f"{', '.join(precision.kept_in_float32)} ({parameters(precision.kept_in_float32_parameters)})"
            if precision.kept_in_float32
            else "nothing (no `_keep_in_fp32_modules`)"
        ),
        "not cast by layerwise casting": (
            f"{', '.join(precision.not_cast)} ({parameters(precision.not_cast_parameters)})"
            if precision.not_cast
            else "no pattern of its own"
        ),
        "computed in float32 in half": _shortened(precision.computed_in_float32) or "nothing",
    }
    if found.unknown_operations:
        facts["taken to mix all pixels"] = ", ".join(found.unknown_operations)
    return facts


_PHASES = {"forward": "the forward pass", "backward": "the backward pass", "optimizer": "the optimizer's step"}


def _shortened(names: Sequence[str]) -> str:
    """Names that differ in numbers only, once."""
    patterns: dict[str, int] = {}
    for name in names:
        pattern = re.sub(r"\d+", "*", name)
        patterns[pattern] = patterns.get(pattern, 0) + 1
    parts = [f"{pattern} ({n})" if n > 1 else pattern.replace("*", "0") for pattern, n in patterns.items()]
    return ", ".join(parts[:6]) + (f" and {len(parts) - 6} more" if len(parts) > 6 else "")


def _attention_places(network: Network) -> str:
    places = {layer.resolution: None for block in network.blocks for layer in block.attention if layer.resolution}
    tokens = any(layer.resolution is None for block in network.blocks for layer in block.attention)
    words = [pixels(place) for place in sorted(places, reverse=True)] + ["tokens"] * tokens
    return ", ".join(words) or "none"


def _fact_table(network: Network) -> Table:
    return Table("", ("", ""), tuple(_facts(network).items()))


def _comparison(anatomies: Sequence[Anatomy]) -> Table:
    rows = []
    keys = [dict.fromkeys(key for a in anatomies for n in a.networks for key in _facts(n))]
    for key in keys[0]:
        values = [" + ".join(_facts(network).get(key, "") for network in a.networks) for a in anatomies]
        if key in ("parameters", "FLOPs of a forward pass", "memory: weights"):
            number = {
                "parameters": lambda n: n.parameters,
                "FLOPs of a forward pass": lambda n: n.flops,
                "memory: weights": lambda n: n.memory.weights,
            }[key]
            style: Callable = {"parameters": parameters, "memory: weights": memory}.get(key, count)
            values = [
                " + ".join(style(number(n)) for n in a.networks)
                + (f" = {style(sum(number(n) for n in a.networks))}" if len(a.networks) > 1 else "")
                for a in anatomies
            ]
        rows.append((key, *values))
        if key == "parameters":
            for kind in ("down", "mid", "up", "block"):
                numbers = [sum(b.kind == kind for n in a.networks for b in n.blocks) for a in anatomies]
                if any(numbers):
                    word = "blocks" if kind == "block" else f"{kind} blocks"
                    rows.append((word, *(str(number) for number in numbers)))
            rows.append(("widths", *(" + ".join(_widths(network) for network in a.networks) for a in anatomies)))
    return Table("comparison", ("", *(a.title for a in anatomies)), tuple(rows))


def _widths(network: Network) -> str:
    """Channels from level to level."""
    chosen = [b.channels for b in network.blocks if b.kind in ("down", "mid", "block") and b.channels]
    widths = [str(width) for i, width in enumerate(chosen) if i == 0 or width != chosen[i - 1]]
    return "-".join(widths)


def _resolution_table(anatomies: Sequence[Anatomy]) -> Table:
    rows = []
    resolutions = {b.resolution for a in anatomies for n in a.networks for b in n.blocks if b.resolution}
    for resolution in sorted(resolutions, reverse=True):
        row = [size(resolution)]
        for anatomy in anatomies:
            blocks = [b for n in anatomy.networks for b in n.blocks if b.resolution == resolution]
            heads = sorted({layer.heads for b in blocks for layer in b.attention})
            text = f"{parameters(sum(b.parameters for b in blocks))}, {count(sum(b.flops for b in blocks))}FLOPs"
            if heads:
                layers = sum(len(b.attention) for b in blocks)
                text += f", {layers} attention ({'/'.join(str(h) for h in heads)} heads)"
            row.append(text if blocks else "–")
        rows.append(tuple(row))
    return Table(
        "by resolution (parameters, FLOPs, attention layers)", ("pixels", *(a.title for a in anatomies)), tuple(rows)
    )


def _text(table: Table) -> str:
    """Aligned columns; long cells continue on the next line, so that a terminal of 120 columns holds it."""
    rows = [table.header, *table.rows] if any(table.header) else list(table.rows)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    limit = TERMINAL_WIDTH - 2 * (len(widths) - 1)
    while sum(widths) > limit:
        widest = max(range(len(widths)), key=widths.__getitem__)
        widths[widest] -= max(1, min(widths[widest] - 8, sum(widths) - limit) // 4)
    lines = [table.title, "=" * min(len(table.title), TERMINAL_WIDTH)] if table.title else []
    for index, row in enumerate(rows):
        cells = [textwrap.wrap(cell, width) or [""] for cell, width in zip(row, widths)]
        for part in range(max(len(cell) for cell in cells)):
            texts = []
            for column, cell in enumerate(cells):
                text = cell[part] if part < len(cell) else ""
                texts.append(text.rjust(widths[column]) if column in table.right else text.ljust(widths[column]))
            lines.append("  ".join(texts).rstrip())
        if index == 0 and any(table.header) or row[0] and index < len(rows) - 1 and rows[index + 1][0] == "total":
            lines.append("  ".join("-" * width for width in widths))
    return "\n".join(lines) + "\n"


# The page

_STYLE = """
:root { color-scheme: light dark; }
body { font-family: Helvetica, Arial, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; }
.figure { overflow-x: auto; } svg { max-width: 100%; height: auto; }
.table { overflow-x: auto; } table { border-collapse: collapse; font-size: 0.85rem; margin: 0.5rem 0 1.5rem; }
th, td { border-bottom: 1px solid #8885; padding: 0.25rem 0.6rem; text-align: left; vertical-align: top; }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
p { color: #777; font-size: 0.85rem; white-space: pre-line; }
"""


def _page(anatomies: Sequence[Anatomy], tables: Sequence[Table]) -> str:
    title = clean(" | ".join(anatomy.title for anatomy in anatomies))
    parts = [f'<div class="figure">{draw(anatomies)}</div>']
    for table in tables:
        rows = [table.header, *table.rows] if any(table.header) else list(table.rows)
        lines = []
        for index, row in enumerate(rows):
            tag = "th" if index == 0 and any(table.header) else "td"
            cells = "".join(
                f"<{tag}{' class=' + chr(34) + 'number' + chr(34) if i in table.right else ''}>{clean(cell)}</{tag}>"
                for i, cell in enumerate(row)
            )
            lines.append(f"<tr>{cells}</tr>")
        heading = f"<h2>{clean(table.title)}</h2>\n" if table.title else ""
        body = "\n".join(lines)
        parts.append(f'{heading}<div class="table"><table>\n{body}\n</table></div>')
    body = "\n".join(parts)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{_STYLE}</style>\n</head>\n'
        f"<body>\n<h1>{title}</h1>\n{body}\n<p>{clean(_NOTES)}</p>\n</body>\n</html>\n"
    )
