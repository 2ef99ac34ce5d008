"""Anatomies as text, JSON, a drawing (SVG) and a page (HTML): what `diffusers-ext inspect` shows."""

import json
import math
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from html import escape

from diffusers_ext.inspection import Anatomy, Attention, Block, Network, to_dict


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


# Numbers


def count(number: float) -> str:
    """552814086 -> "552.8 M"."""
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= 0.99995 * limit:
            return f"{number / limit:.1f} {suffix}"
    return f"{number:.0f}"


def parameters(number: int) -> str:
    """As papers write them: thousands, millions, billions."""
    return count(number).replace("G", "B").replace("T", "kB") if number < 1e12 else count(number)


def memory(number: int) -> str:
    for limit, suffix in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number >= limit:
            return f"{number / limit:.1f} {suffix}"
    return f"{number} B"


def size(shape: Sequence[int] | None) -> str:
    return "" if shape is None else "x".join(str(n) for n in shape)


def pixels(resolution: tuple[int, int] | None) -> str:
    """(16, 16) -> "16²"."""
    if resolution is None:
        return ""
    return f"{resolution[0]}²" if resolution[0] == resolution[1] else size(resolution)


def attention(layers: Sequence[Attention]) -> str:
    """ "2 x 16 heads at 16²", by kind."""
    parts: dict[str, int] = {}
    for layer in layers:
        place = pixels(layer.resolution) or f"{layer.queries} tokens"
        kind = "" if layer.kind == "self" else f"{layer.kind}, "
        text = f"{kind}{layer.heads} head{'s' if layer.heads > 1 else ''} at {place}"
        parts[text] = parts.get(text, 0) + 1
    return "; ".join(f"{n} x {text}" if n > 1 else text for text, n in parts.items())


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


def folded(blocks: Sequence[Block]) -> Iterator[list[Block]]:
    """Blocks, those of a run in one list that are the same network at another place."""
    run: list[Block] = []
    for block in blocks:
        if run and _nameless(block) != _nameless(run[0]):
            yield run
            run = []
        run.append(block)
    if run:
        yield run


def _nameless(block: Block) -> Block:
    # The first of a run may keep what all of them share.
    return replace(block, name="", receptive_field=None, activation_bytes=0)


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


# The drawing

_FILLS = {  # fill, edge, meaning
    "in": ("#eceff3", "#77828f", "input, output"),
    "out": ("#eceff3", "#77828f", "input, output"),
    "embedding": ("#e3f3e6", "#4b9560", "embedding"),
    "down": ("#d9e6f7", "#3a6cb0", "down"),
    "mid": ("#e8ddf6", "#7a4db3", "middle"),
    "up": ("#fde5cc", "#cf7a20", "up"),
    "block": ("#d5eeec", "#258783", "transformer or residual block"),
}
_INK, _PALE, _ATTENTION = "#1c2733", "#5c6875", "#b02f5b"
_FONT = "Helvetica, Arial, 'Liberation Sans', sans-serif"
_MARGIN, _PILL, _STEP, _LABEL = 18, 24, 18, 40
_INNER = 52  # between the two arms of a U, for the number of skip connections


def _clean(text: str) -> str:
    """Escaped, and without characters that XML forbids."""
    return escape(re.sub(r"[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "?", text))


def text_width(text: str, font_size: float) -> float:
    """Pixels, on the safe side for common sans-serif fonts."""
    return 0.58 * font_size * len(text)


def _fit(text: str, width: float, font_size: float) -> str:
    if text_width(text, font_size) <= width:
        return text
    return text[: max(1, int(width / (0.58 * font_size)) - 1)] + "…"


def _words(
    x: float, y: float, text: str, font_size: float = 11, colour: str = _INK, anchor: str = "middle", weight: int = 400
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{font_size}" fill="{colour}" text-anchor="{anchor}" '
        f'font-weight="{weight}">{_clean(text)}</text>'
    )


def _line(points: Sequence[tuple[float, float]], dashed: bool = False) -> str:
    path = " ".join(f"{'M' if i == 0 else 'L'}{x:.1f} {y:.1f}" for i, (x, y) in enumerate(points))
    style = ' stroke-dasharray="4 3"' if dashed else ""
    return f'<path d="{path}" fill="none" stroke="{_PALE}" stroke-width="1.4"{style} marker-end="url(#arrow)"/>'


@dataclass
class Box:
    """A block and where it is drawn."""

    block: Block
    x: float
    y: float
    width: float
    height: float
    lines: tuple[str, ...]

    @property
    def middle(self) -> tuple[float, float]:
        return self.x + self.width / 2, self.y + self.height / 2

    def svg(self) -> str:
        fill, edge, _ = _FILLS[self.block.kind]
        block = self.block
        facts = [block.name, block.module, f"output {size(block.output_shape)}", f"{block.parameters:,} parameters"]
        facts += [f"{count(block.flops)}FLOPs", f"{memory(block.activation_bytes)} of activations"]
        facts += [attention(block.attention)] * bool(block.attention)
        x, _ = self.middle
        parts = [
            f'<g class="block" data-kind="{block.kind}"><title>{_clean(chr(10).join(facts))}</title>'
            f'<rect x="{self.x:.1f}" y="{self.y:.1f}" width="{self.width:.1f}" height="{self.height:.1f}" rx="5" '
            f'fill="{fill}" stroke="{edge}" stroke-width="1.4"/>'
        ]
        marks = attention_marks(block) if self.height >= 40 else []
        tall = 14 * len(self.lines) + 17 * len(marks)
        y = self.y + (self.height - tall) / 2 + 11.5
        for index, line in enumerate(self.lines):
            first = index == 0 and self.height >= 40
            parts.append(_words(x, y, line, 12 if first else 11, weight=600 if first else 400))
            y += 14
        for mark in marks:
            width = text_width(mark, 10.5) + 8
            parts.append(
                f'<rect class="attention" x="{x - width / 2:.1f}" y="{y - 9:.1f}" width="{width:.1f}" height="15" '
                f'rx="7.5" fill="{_ATTENTION}"/>'
            )
            parts.append(_words(x, y + 2.2, mark, 10.5, "#ffffff"))
            y += 17
        return "".join(parts) + "</g>"


def attention_marks(block: Block) -> list[str]:
    """ "3 × 16 h at 16²": layers, heads and where; for each kind a mark."""
    marks: dict[str, int] = {}
    for layer in block.attention:
        place = pixels(layer.resolution) or f"{layer.queries} tok"
        kind = "" if layer.kind == "self" else f"{layer.kind} "
        text = f"{kind}{layer.heads} h at {place}"
        marks[text] = marks.get(text, 0) + 1
    return [f"{n} × {text}" if n > 1 else text for text, n in marks.items()][:3]


def _box_size(block: Block, widest: int) -> tuple[float, float, tuple[str, ...]]:
    """Width by channels, height by resolution; never too small for the text."""
    lines = (f"{block.channels} ch", parameters(block.parameters))
    marks = attention_marks(block)
    needed = [text_width(line, 12) + 12 for line in lines] + [text_width(mark, 10.5) + 16 for mark in marks]
    side = min(block.resolution) if block.resolution else 1
    width = max(44 + 66 * math.sqrt((block.channels or 0) / widest), *needed)
    height = max(36 + 4 * math.log2(max(side, 1)), 14 * len(lines) + 17 * len(marks) + 8)
    return width, height, lines


def _pill(block: Block, width: float) -> Box:
    text = f"{block.name} {parameters(block.parameters)}"
    if text_width(text, 11) > width - 6:
        text = _fit(block.name, width - 6, 11)
    return Box(block, 0, 0, width, _PILL, (text,))


@dataclass
class Drawing:
    """Elements of a network at the origin, how much room they take, and where its blocks begin below its embeddings."""

    elements: list[str]
    width: float
    height: float
    top: float


def _draw_network(network: Network, widest: int) -> Drawing:
    kinds = {block.kind for block in network.blocks}
    return _draw_u(network, widest) if {"down", "up"} <= kinds else _draw_column(network, widest)


def _draw_u(network: Network, widest: int) -> Drawing:
    blocks = [block for block in network.blocks if block.name]
    of = {kind: [block for block in blocks if block.kind == kind] for kind in _FILLS}
    middles = of["mid"] + of["block"]
    sizes = {block.name: _box_size(block, widest) for block in of["down"] + middles + of["up"]}
    arm = max([sizes[block.name][0] for block in of["down"] + of["up"]] + [104])
    width = _LABEL + 2 * arm + _INNER
    left, right = _LABEL + arm / 2, _LABEL + 1.5 * arm + _INNER
    elements: list[str] = []
    boxes: dict[str, Box] = {}

    def place(block: Block, x: float, y: float, row: float | None = None) -> Box:
        box_width, height, lines = sizes[block.name]
        boxes[block.name] = Box(block, x - box_width / 2, y + ((row or height) - height) / 2, box_width, height, lines)
        return boxes[block.name]

    y = 0.0
    for pair in [of["embedding"][i : i + 2] for i in range(0, len(of["embedding"]), 2)]:
        room = (width - _LABEL - 8 * (len(pair) - 1)) / len(pair)
        for i, block in enumerate(pair):
            pill = _pill(block, room)
            boxes[block.name] = replace(pill, x=_LABEL + i * (room + 8), y=y)
        y += _PILL + 8
    y += 4
    heads = max(len(of["in"]), len(of["out"]))
    for column, chosen in ((_LABEL, of["in"]), (_LABEL + arm + _INNER, of["out"][::-1])):
        for i, block in enumerate(chosen):
            row = heads - len(chosen) + i
            boxes[block.name] = replace(_pill(block, arm), x=column, y=y + row * (_PILL + _STEP - 4))
    y += heads * (_PILL + _STEP - 4) + 4
    top = y
    chain = [boxes[block.name] for block in of["in"]]
    for before, after in zip(chain, chain[1:]):
        elements.append(_line([(left, before.y + _PILL), (left, after.y - 2)]))

    # One row per level; the arms meet at the bottom.
    levels = max(len(of["down"]), len(of["up"]))
    downs = of["down"] + [None] * (levels - len(of["down"]))
    ups = [None] * (levels - len(of["up"])) + of["up"]
    entry = chain[-1] if chain else None
    above_right = boxes[of["out"][0].name] if of["out"] else None
    previous_left, previous_right = entry, above_right
    incoming = {}
    for _, end, tensors in network.skips:
        incoming[end] = incoming.get(end, 0) + tensors
    for down, up in zip(downs, ups[::-1]):
        row = max(sizes[block.name][1] for block in (down, up) if block is not None)
        down_box = None if down is None else place(down, left, y, row)
        up_box = None if up is None else place(up, right, y, row)
        label = next((pixels(block.resolution) for block in (down, up) if block is not None and block.resolution), "")
        elements.append(_words(_LABEL - 8, y + row / 2 + 4, label, 12, _PALE, "end", 600))
        if down_box and previous_left:
            elements.append(_line([(left, previous_left.y + previous_left.height), (left, down_box.y - 2)]))
        if up_box and previous_right:
            elements.append(_line([(right, up_box.y), (right, previous_right.y + previous_right.height + 2)]))
        if down_box and up_box and incoming.get(up.name):
            start, end = down_box.x + down_box.width, up_box.x
            elements.append(_line([(start, y + row / 2), (end - 2, y + row / 2)], dashed=True))
            elements.append(_words((start + end) / 2, y + row / 2 - 5, f"{incoming[up.name]} skips", 10, _PALE))
        previous_left, previous_right = down_box or previous_left, up_box or previous_right
        y += row + _STEP
    centre = _LABEL + arm + _INNER / 2
    middle_boxes = []
    for block in middles:
        middle_boxes.append(place(block, centre, y))
        y += middle_boxes[-1].height + _STEP
    if middle_boxes:
        first, last = middle_boxes[0], middle_boxes[-1]
        label = pixels(first.block.resolution)
        elements.append(_words(_LABEL - 8, first.middle[1] + 4, label, 12, _PALE, "end", 600))
        if previous_left:
            corner = [(left, previous_left.y + previous_left.height), (left, first.middle[1])]
            elements.append(_line([*corner, (first.x - 2, first.middle[1])]))
        if previous_right:
            start = (last.x + last.width, last.middle[1])
            end = (right, previous_right.y + previous_right.height + 2)
            elements.append(_line([start, (right, last.middle[1]), end]))
        for before, after in zip(middle_boxes, middle_boxes[1:]):
            elements.append(_line([(centre, before.y + before.height), (centre, after.y - 2)]))
    outs = [boxes[block.name] for block in of["out"]]
    for before, after in zip(outs, outs[1:]):
        elements.append(_line([(right, before.y), (right, after.y + after.height + 2)]))
    elements += [boxes[block.name].svg() for block in blocks]
    return Drawing(elements, width, y - _STEP, top)


def _draw_column(network: Network, widest: int) -> Drawing:
    """One block below the other; runs of equal ones are thin, with what they are beside them."""
    blocks = [block for block in network.blocks if block.name]
    sizes = {block.name: _box_size(block, widest) for block in blocks if block.kind not in ("in", "out", "embedding")}
    arm = max([box[0] for box in sizes.values()] + [104])
    centre = _LABEL + arm / 2
    width = _LABEL + arm
    elements: list[str] = []
    y = 0.0
    for block in (block for block in blocks if block.kind == "embedding"):
        elements.append(replace(_pill(block, arm), x=_LABEL, y=y).svg())
        y += _PILL + 8
    y += 4
    previous: Box | None = None
    shown = None
    top: float | None = None
    for run in folded([block for block in blocks if block.kind != "embedding"]):
        first = run[0]
        if first.kind in ("in", "out"):
            made = [replace(_pill(block, arm), x=_LABEL) for block in run]
        elif len(run) < 4:
            made = []
            for block in run:
                box_width, height, lines = sizes[block.name]
                made.append(Box(block, centre - box_width / 2, 0, box_width, height, lines))
        else:
            thin = max(6.0, min(18.0, 440 / len(run)))
            box_width = sizes[first.name][0]
            made = [Box(block, centre - box_width / 2, 0, box_width, thin, ()) for block in run]
        start = y
        if top is None and first.kind not in ("in", "out"):
            top = y
        for box in made:
            box.y = y
            if previous is not None and (len(made) < 4 or box is made[0]):
                elements.append(_line([(centre, previous.y + previous.height), (centre, y - 2)]))
            elements.append(box.svg())
            if len(made) < 4 and first.resolution and first.resolution != shown and first.kind not in ("in", "out"):
                shown = first.resolution
                elements.append(_words(_LABEL - 8, y + box.height / 2 + 4, pixels(shown), 12, _PALE, "end", 600))
            previous = box
            y += box.height + (_STEP if len(made) < 4 or box is made[-1] else 3)
        if len(made) >= 4:
            stop = y - _STEP
            if first.resolution and first.resolution != shown:
                shown = first.resolution
                elements.append(_words(_LABEL - 8, (start + stop) / 2 + 4, pixels(shown), 12, _PALE, "end", 600))
            x = centre + made[0].width / 2 + 6
            bracket = f"M{x} {start} h5 V{stop} h-5"
            elements.append(f'<path d="{bracket}" fill="none" stroke="{_PALE}" stroke-width="1.4"/>')
            marks = attention_marks(first)
            texts = [f"{len(run)} blocks of", f"{first.channels} ch", parameters(first.parameters)]
            room = max(text_width(text, 11.5) for text in texts + marks) + 12
            line = (start + stop) / 2 - (15 * len(texts) + 18 * len(marks)) / 2 + 11
            for text in texts:
                elements.append(_words(x + 12, line, text, 11.5, anchor="start"))
                line += 15
            for mark in marks:
                long = text_width(mark, 10.5) + 8
                elements.append(
                    f'<rect class="attention" x="{x + 11:.1f}" y="{line - 10:.1f}" width="{long:.1f}" height="15" '
                    f'rx="7.5" fill="{_ATTENTION}"/>'
                )
                elements.append(_words(x + 15, line + 1.2, mark, 10.5, "#ffffff", "start"))
                line += 18
            width = max(width, x + room + 8)
    return Drawing(elements, width, y - _STEP, top or 0.0)


def draw(anatomies: Sequence[Anatomy]) -> str:
    """SVG of all networks, U or column, side by side and to one scale of widths and heights."""
    blocks = [block for anatomy in anatomies for network in anatomy.networks for block in network.blocks]
    widest = max([block.channels or 0 for block in blocks if block.kind not in ("embedding", "in", "out")] + [1])
    gap, head = 26, 84
    x = float(_MARGIN)
    body: list[str] = []
    drawn = [[_draw_network(network, widest) for network in anatomy.networks] for anatomy in anatomies]
    top = max(drawing.top for drawings in drawn for drawing in drawings)
    tallest = max(top - drawing.top + drawing.height for drawings in drawn for drawing in drawings)
    for index, (anatomy, drawings) in enumerate(zip(anatomies, drawn)):
        captions = [
            (f"{parameters(n.parameters)} parameters", f"{count(n.flops)}FLOPs at {size(n.input_shape[2:])}")
            for n in anatomy.networks
        ]
        widths = [
            max(drawing.width, _LABEL + max(text_width(text, 12) for text in (*caption, network.model_class)))
            for drawing, caption, network in zip(drawings, captions, anatomy.networks)
        ]
        room = sum(widths) + 14 * (len(widths) - 1)
        wanted = text_width(anatomy.title, 17) + 20
        if room < wanted <= 420:
            widths[-1] += wanted - room
            room = wanted
        if index:
            body.append(f'<path class="divider" d="M{x - gap / 2} 24 V{{bottom}}" stroke="#d5dbe3" stroke-width="1"/>')
        body.append(_words(x + room / 2, 36, _fit(anatomy.title, room, 17), 17, weight=700))
        for network, drawing, caption, width in zip(anatomy.networks, drawings, captions, widths):
            middle = x + width / 2 + _LABEL / 2
            body.append(_words(middle, 57, _fit(network.model_class, width, 12), 12, _PALE))
            body.append(_words(middle, 74, caption[0], 13, weight=600))
            body.append(_words(middle, 90, caption[1], 12))
            shift = x + (width - drawing.width) / 2
            body.append(
                f'<g transform="translate({shift:.1f} {head + 20 + top - drawing.top:.1f})">{"".join(drawing.elements)}</g>'
            )
            x += width + 14
        x += gap - 14
    width = x - gap + _MARGIN
    bottom = head + 20 + tallest + 18
    legend, rows = _legend(blocks, width, bottom + 16)
    height = bottom + 20 * rows + 22
    title = " | ".join(anatomy.title for anatomy in anatomies)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'height="{height:.0f}" font-family="{_FONT}" role="img">\n<title>{_clean(title)}</title>\n'
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="6" markerHeight="6" '
        f'orient="auto-start-reverse"><path d="M0 0 L8 4 L0 8 z" fill="{_PALE}"/></marker></defs>\n'
        f'<rect width="{width:.0f}" height="{height:.0f}" rx="10" fill="#fbfcfe" stroke="#d5dbe3"/>\n'
        + "\n".join(body).replace("{bottom}", f"{bottom - 10:.0f}")
        + f"\n{legend}\n</svg>\n"
    )


def _legend(blocks: Sequence[Block], width: float, y: float) -> tuple[str, int]:
    kinds = dict.fromkeys(_FILLS[b.kind][2] for b in blocks if b.name)
    entries = [(meaning, next(style for style in _FILLS.values() if style[2] == meaning)) for meaning in kinds]
    if any(block.attention for block in blocks):
        entries.append(("attention: layers × heads (h) at pixels", (_ATTENTION, _ATTENTION, "")))
    entries.append(("box: width by channels (ch), height by resolution; number: parameters", None))
    x, rows, parts = float(_MARGIN), 1, []
    for text, style in entries:
        long = text_width(text, 11) + (22 if style else 0)
        if x > _MARGIN and x + long > width - _MARGIN:
            x, rows = float(_MARGIN), rows + 1
        line = y + 20 * (rows - 1)
        if style:
            parts.append(
                f'<rect class="legend" x="{x:.1f}" y="{line - 10:.1f}" width="14" height="12" rx="3" '
                f'fill="{style[0]}" stroke="{style[1]}"/>'
            )
        parts.append(_words(x + (20 if style else 0), line, text, 11, _PALE, "start"))
        x += long + 14
    return "".join(parts), rows


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
    title = _clean(" | ".join(anatomy.title for anatomy in anatomies))
    parts = [f'<div class="figure">{draw(anatomies)}</div>']
    for table in tables:
        rows = [table.header, *table.rows] if any(table.header) else list(table.rows)
        lines = []
        for index, row in enumerate(rows):
            tag = "th" if index == 0 and any(table.header) else "td"
            cells = "".join(
                f"<{tag}{' class=' + chr(34) + 'number' + chr(34) if i in table.right else ''}>{_clean(cell)}</{tag}>"
                for i, cell in enumerate(row)
            )
            lines.append(f"<tr>{cells}</tr>")
        heading = f"<h2>{_clean(table.title)}</h2>\n" if table.title else ""
        body = "\n".join(lines)
        parts.append(f'{heading}<div class="table"><table>\n{body}\n</table></div>')
    body = "\n".join(parts)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{_STYLE}</style>\n</head>\n'
        f"<body>\n<h1>{title}</h1>\n{body}\n<p>{_clean(_NOTES)}</p>\n</body>\n</html>\n"
    )
