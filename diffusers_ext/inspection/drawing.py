"""Networks as U or column, side by side, in SVG."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape

from diffusers_ext.inspection.anatomy import Anatomy, Block, Network
from diffusers_ext.inspection.words import attention, count, folded, memory, parameters, pixels, size


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


def clean(text: str) -> str:
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
        f'font-weight="{weight}">{clean(text)}</text>'
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
            f'<g class="block" data-kind="{block.kind}"><title>{clean(chr(10).join(facts))}</title>'
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
    """Elements of a network at the origin, how much room they take, and where the first block begins."""

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
            place = f"translate({shift:.1f} {head + 20 + top - drawing.top:.1f})"
            body.append(f'<g transform="{place}">{"".join(drawing.elements)}</g>')
            x += width + 14
        x += gap - 14
    width = x - gap + _MARGIN
    bottom = head + 20 + tallest + 18
    legend, rows = _legend(blocks, width, bottom + 16)
    height = bottom + 20 * rows + 22
    title = " | ".join(anatomy.title for anatomy in anatomies)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'height="{height:.0f}" font-family="{_FONT}" role="img">\n<title>{clean(title)}</title>\n'
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
