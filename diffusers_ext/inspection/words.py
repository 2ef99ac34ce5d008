"""Numbers and blocks in a few letters."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from diffusers_ext.inspection.anatomy import Attention, Block


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
