"""Results as HTML: images with what was wanted and what the judge reads, progress, film strips, two columns divided.

Every text that comes from outside is escaped. Images are data URIs in their own size; the browser enlarges them.
"""

import base64
import keyword
import math
import re
from collections.abc import Sequence
from html import escape

from comparison import ColumnState
from observation import MAX_FRAME
from pictures import encoded, reduced
from PIL import Image
from settings import LETTERS


MAX_PREVIEW = 384  # pixels: larger previews travel smaller
MAX_LARGE = 768  # pixels, where images are looked at closely


def png_uri(image: Image.Image) -> str:
    """The image as a PNG inside an address."""
    return _uri(image, "PNG")


def picture_uri(image: Image.Image, limit: int = MAX_PREVIEW) -> str:
    """Small images exactly; those larger than `limit` pixels smaller and with losses, for looking only."""
    return png_uri(image) if max(image.size) <= limit else _uri(reduced(image, limit), "WEBP")


def _uri(image: Image.Image, kind: str) -> str:
    return f"data:image/{kind.lower()};base64,{base64.b64encode(encoded(image, kind)).decode()}"


def column(letter: str, state: ColumnState, noise: Sequence[Image.Image] = ()) -> str:
    """Progress, status line and images of a column, at any time of its run; until there are any, its noise."""
    return (
        f'<section class="result {state.status}" data-status="{state.status}" aria-label="Column {letter}">'
        f"{_progress(letter, state)}{_error(state)}{_grid(letter, state, noise)}</section>"
    )


def waiting(letter: str, noise: Sequence[Image.Image], labels: Sequence[str | None]) -> str:
    """A column before its first run: the noise that its images will start from."""
    hint = "Every column starts from this noise." if noise else "Nothing drawn yet."
    return (
        f'<section class="result ready" data-status="waiting" aria-label="Column {letter}">'
        f'<p class="status"><span class="line">{hint}</span></p><div class="bar"></div>'
        f"{_noise(letter, noise, labels)}</section>"
    )


def refused(letter: str, message: str) -> str:
    """A column whose settings cannot be drawn."""
    return (
        f'<section class="result failed" data-status="failed" aria-label="Column {letter}">'
        f'<p class="error" role="alert">{escape(message)}</p></section>'
    )


def message(text: str, kind: str = "note") -> str:
    """One line for the region that screen readers announce; `kind` is note or warning."""
    return f'<p class="{kind}">{escape(text)}</p>' if text else ""


def status_line(state: ColumnState) -> str:
    """Such as "20/20 steps · 40 evaluations · 1.2 s · 3.3 images/s"."""
    if state.status in ("waiting", "loading"):
        return {"waiting": "waiting for its turn", "loading": "loading the model"}[state.status]
    if not state.num_steps:
        return {"drawing": "starting"}.get(state.status, state.status)
    parts = [f"{state.step}/{state.num_steps} steps"]
    if state.network_evaluations:
        parts.append(f"{state.network_evaluations} evaluation{'s' if state.network_evaluations > 1 else ''}")
    if state.classifier_evaluations:
        parts[-1] += f" + {state.classifier_evaluations} of the classifier"
    parts.append(f"{state.seconds:.1f} s")
    if state.images_per_second:
        parts.append(f"{state.images_per_second:.2g} images/s")
    if state.status in ("stopped", "failed"):
        parts.insert(0, state.status)
    return " · ".join(parts)


def announcement(states: Sequence[ColumnState]) -> str:
    """The state of all columns in one sentence, the same for long stretches of a run: screen readers speak it."""
    if all(state.status in ("waiting", "loading") for state in states):
        return "Loading the models."
    if any(state.status in ("waiting", "loading", "drawing") for state in states):
        return "Drawing."
    words = {"done": "is done", "stopped": "was stopped", "failed": "failed"}
    groups = {}
    for letter, state in zip(LETTERS, states):
        right = _right(state)
        text = f"{words[state.status]} in {state.seconds:.1f} s" if state.status == "done" else words[state.status]
        groups[letter] = text + (f", the judge reads {right[0]} of {right[1]} as wanted" if right else "")
    return "; ".join(f"{letter} {text}" for letter, text in groups.items()) + "."


def film(states: Sequence[ColumnState]) -> str:
    """A scrubber over the steps of all columns, and all steps as strips; the browser shows a step in the columns."""
    shown = [(letter, state) for letter, state in zip(LETTERS, states) if state.frames]
    if not shown:
        return nothing("Draw something, then go through its steps here.")
    last = max(len(state.frames) for _, state in shown) - 1
    columns = "".join(_film_column(letter, state) for letter, state in shown)
    return (
        '<div class="film"><label class="scrubber"><span>Step by step</span>'
        f'<input type="range" id="scrubber" min="0" max="{last}" value="{last}" step="1" aria-label="Step of the run" '
        f'aria-valuetext="the end"></label><div class="film-columns">{columns}</div></div>'
    )


def _film_column(letter: str, state: ColumnState) -> str:
    last = len(state.frames) - 1
    strip = "".join(
        f'<button type="button" class="frame" data-frame="{k}" data-step="{step}" '
        f'aria-label="Column {letter}, step {step}" aria-pressed="{"true" if k == last else "false"}">'
        + "".join(f'<img class="crisp" src="{picture_uri(image, MAX_FRAME)}" alt="">' for image in frame)
        + f"<span>{step}</span></button>"
        for k, (step, frame) in enumerate(zip(state.frame_steps, state.frames))
    )
    return (
        f'<section class="film-column" data-column="{letter.lower()}" aria-label="Steps of column {letter}">'
        f'<p class="status">{chip(letter)}<span class="line">step <output>{state.frame_steps[last]}</output> of '
        f'{state.num_steps}</span></p><div class="strip">{strip}</div></section>'
    )


def divided(first: str, second: str, states: dict[str, ColumnState], index: int | None) -> str:
    """Two columns over each other, divided by a line that moves; `index` of one image, or None for all."""
    grids = []
    for letter in (first, second):
        images = states[letter].images
        chosen = images if index is None else images[index : index + 1]
        cells = "".join(
            f'<img class="crisp" src="{picture_uri(image, MAX_LARGE)}" alt="Column {letter}, image '
            f'{(index or 0) + i + 1}">'
            for i, image in enumerate(chosen)
        )
        grids.append(f'<div class="grid" {_per_row(len(chosen))}>{cells}</div>')
    return (
        f'<section aria-label="{first} over {second}"><p class="status"><span class="line">{chip(first)} on the left, '
        f"{chip(second)} on the right of the line</span></p>"
        f'<div class="divided" style="--split: 50%">'
        f'<div class="under">{grids[1]}</div><div class="over">{grids[0]}</div>'
        f'<span class="line" aria-hidden="true"></span>'
        f'<input type="range" id="slider" min="0" max="100" value="50" step="1" '
        f'aria-label="Divide between {first} and {second}"></div></section>'
    )


def differences(first: str, second: str, pictures: Sequence[tuple[Image.Image, float]]) -> str:
    """Pictures of differences, with the root mean square of each."""
    cells = "".join(
        f'<figure class="cell"><img class="crisp" src="{picture_uri(picture, MAX_LARGE)}" alt="Difference between the '
        f'columns {first} and {second}, image {i + 1}"><figcaption><span>{rms:.3f}</span></figcaption></figure>'
        for i, (picture, rms) in enumerate(pictures)
    )
    mean = sum(rms for _, rms in pictures) / len(pictures)
    return (
        f'<section aria-label="Difference between {first} and {second}"><p class="status"><span class="line">'
        f'{chip(second)} is <i class="brighter">brighter</i> or <i class="darker">darker</i> than {chip(first)}</span>'
        f'<span class="score" title="1 is the difference of black and white">root mean square {mean:.3f}</span></p>'
        f'<div class="grid" {_per_row(len(pictures))}>{cells}</div></section>'
    )


def sweep_progress(share: float) -> str:
    """Progress bar of a sweep."""
    return _bar("bar", "Sweep", share)


def nothing(text: str) -> str:
    """What stands where a result will be."""
    return f'<p class="nothing">{escape(text)}</p>'


def chip(letter: str) -> str:
    """The letter of a column in its colour."""
    return f'<b class="chip {letter}" title="Column {letter}">{letter}</b>'


def curves(states: Sequence[ColumnState]) -> str:
    """Means over the images by share of the run: probabilities of the wanted class, and what guidance moves."""
    charts = []
    for kind, title, note in (
        ("judge", "Probability of the wanted class, says the judge", "of the predicted clean image"),
        ("classifier", "Probability of the wanted class, says the guiding classifier", "of the noisy image"),
        ("norm", "Norm of the guidance", "root mean square of what it moves the predicted clean image by"),
    ):
        lines = {}
        for letter, state in zip(LETTERS, states):
            norm = kind == "norm"
            steps = state.norm_steps if norm else state.probability_steps
            values = state.guidance_norm if norm else state.probability.get(kind, [])
            points = [(s / state.num_steps, sum(v) / len(v)) for s, v in zip(steps, values) if v and state.num_steps]
            if points:
                lines[letter] = points
        if lines:
            charts.append(_chart(f"plot-{kind}", title, note, lines, None if kind == "norm" else 1.0))
    if not charts:
        return nothing("Draw guided images, then see here when they take the shape of their class.")
    return f'<div class="charts">{"".join(charts)}</div>'


def codes(texts: dict[str, str]) -> str:
    """Python of the columns by letter, each with a button that copies it."""
    blocks = "".join(
        f'<section class="code" id="code-{letter.lower()}" aria-label="Python of column {letter}">'
        f'<p class="status">{chip(letter)}<span class="line">Python that draws column {letter}</span>'
        f'<button type="button" class="copy" aria-label="Copy the Python of column {letter}">Copy</button></p>'
        f'<pre tabindex="0"><code>{_coloured(text)}</code></pre></section>'
        for letter, text in texts.items()
    )
    return f'<div class="codes">{blocks}</div>'


_PYTHON = re.compile(
    r"(?P<comment>#[^\n]*)|(?P<string>\"[^\"\n]*\"|'[^'\n]*')|(?P<number>\b\d[\d_.e-]*\b)|"
    rf"(?P<keyword>\b(?:{'|'.join(keyword.kwlist)})\b)"
)


def _coloured(text: str) -> str:
    """Python as HTML with its comments, strings, numbers and keywords marked."""
    parts, end = [], 0
    for match in _PYTHON.finditer(text):
        parts += [escape(text[end : match.start()]), f'<i class="{match.lastgroup}">{escape(match.group())}</i>']
        end = match.end()
    return "".join(parts) + escape(text[end:])


def _chart(name: str, title: str, note: str, lines: dict[str, list[tuple[float, float]]], top: float | None) -> str:
    """Lines over the share of the run from 0 to 1, as SVG; `top` of the axis, or None for that of the values."""
    # A probability matters at the end; what guidance moves is zero there, so its peak says more.
    word = "at the end" if top else "at most"
    says = {
        letter: f"{points[-1][1] if top else max(value for _, value in points):.2f}"
        for letter, points in lines.items()
    }
    top = top or _round_up(max(value for points in lines.values() for _, value in points))
    left, right, upper, lower = 44, 424, 10, 190

    def at(share: float, value: float) -> str:
        return f"{left + share * (right - left):.1f},{lower - min(value / top, 1) * (lower - upper):.1f}"

    ticks = "".join(
        f'<line class="rule" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>'
        for value, y in ((top * k / 4, lower - k / 4 * (lower - upper)) for k in range(0, 5, 2))
    )
    axis = "".join(
        f'<text x="{left + share * (right - left)}" y="{lower + 18}" text-anchor="{anchor}">{text}</text>'
        for share, anchor, text in ((0, "start", "noise"), (0.5, "middle", "half of the run"), (1, "end", "image"))
    )
    paths = "".join(
        f'<polyline class="{letter}" points="{" ".join(at(*point) for point in points)}"><title>Column {letter}'
        f"</title></polyline>"
        f'<circle class="{letter}" cx="{at(*points[-1]).split(",")[0]}" cy="{at(*points[-1]).split(",")[1]}" r="3"/>'
        for letter, points in lines.items()
    )
    legend = f"<span>{word}</span>" + "".join(f"{chip(letter)}<span>{text}</span>" for letter, text in says.items())
    spoken = ", ".join(f"{letter} {text}" for letter, text in says.items())
    return (
        f'<figure class="chart" id="{name}"><figcaption><b>{title}</b><small>{note}</small>'
        f'<span class="legend">{legend}</span></figcaption>'
        f'<svg viewBox="0 0 440 216" role="img" aria-label="{title}, {word}: {spoken}">'
        f"{ticks}{axis}{paths}</svg></figure>"
    )


def _round_up(value: float) -> float:
    """The next of 1, 2, 4 or 8 times a power of ten."""
    if value <= 0:
        return 1.0
    power = 10 ** math.floor(math.log10(value))
    return next(factor * power for factor in (1, 2, 4, 8, 10) if factor * power >= value)


def _progress(letter: str, state: ColumnState) -> str:
    share = state.step / state.num_steps if state.num_steps else 0
    line = f'<p class="status"><span class="line">{escape(status_line(state))}</span>{_score(state)}</p>'
    return line + _bar(f"bar {letter}", f"Progress of column {letter}", share)


def _bar(classes: str, name: str, share: float) -> str:
    percent = round(100 * share)
    return (
        f'<div class="{classes}" role="progressbar" aria-label="{name}" aria-valuemin="0" aria-valuemax="100" '
        f'aria-valuenow="{percent}"><span style="width: {percent}%"></span></div>'
    )


def _score(state: ColumnState) -> str:
    right = _right(state)
    if right is None:
        return ""
    return f'<span class="score" title="The judge is another network">{right[0]} of {right[1]} as wanted</span>'


def _right(state: ColumnState) -> tuple[int, int] | None:
    """How many images the judge reads as wanted, and of how many; None without a judge or classes."""
    if not state.verdicts:
        return None
    wanted = [(label, name) for label, (name, _) in zip(state.labels, state.verdicts) if label is not None]
    return (sum(label == name for label, name in wanted), len(wanted)) if wanted else None


def _error(state: ColumnState) -> str:
    return f'<p class="error" role="alert">{escape(state.error)}</p>' if state.error else ""


def _noise(letter: str, noise: Sequence[Image.Image], labels: Sequence[str | None]) -> str:
    cells = "".join(
        _cell(image, f"Column {letter}, image {i + 1}: noise that becomes {label or 'an image'}", label or "", "")
        for i, (image, label) in enumerate(zip(noise, labels))
    )
    return f'<div class="grid noise" {_per_row(len(noise))}>{cells}</div>' if noise else ""


def _grid(letter: str, state: ColumnState, noise: Sequence[Image.Image]) -> str:
    if not state.images:
        return "" if state.error else _noise(letter, noise, state.labels or [None] * len(noise))
    verdicts = state.verdicts or [None] * len(state.images)
    labels = list(state.labels) or [None] * len(state.images)
    cells = []
    for i, (image, label, verdict) in enumerate(zip(state.images, labels, verdicts)):
        alt = f"Column {letter}, image {i + 1}"
        if label is not None:
            alt += f", wanted {label}"
        if verdict:
            alt += f", the judge reads {verdict[0]}"
        cells.append(_cell(image, alt, label or "", _badge(label, verdict)))
    return f'<div class="grid" {_per_row(len(cells))}>{"".join(cells)}</div>'


def _badge(label: str | None, verdict: tuple[str, float] | None) -> str:
    if verdict is None:
        return ""
    name, probability = verdict
    share = f"{100 * probability:.0f} %"
    title = f'title="The judge, a classifier, reads {escape(name)} with probability {probability:.3f}"'
    if label is None:
        return f'<span class="badge read" {title}>{escape(name)} {share}</span>'
    if label == name:
        return f'<span class="badge right" {title}>✓ {share}</span>'
    return f'<span class="badge wrong" {title}>✗ <span class="word">reads</span> {escape(name)}</span>'


def _cell(image: Image.Image, alt: str, label: str, badge: str) -> str:
    crisp = "crisp" if max(image.size) <= 96 else ""
    caption = f"<figcaption><span>{escape(label)}</span>{badge}</figcaption>" if label or badge else ""
    return (
        f'<figure class="cell"><img class="{crisp}" src="{picture_uri(image)}" alt="{escape(alt)}">{caption}</figure>'
    )


def _per_row(count: int) -> str:
    """Images per row, for full rows: up to 4, 5 or 6."""
    rows = -(-count // 6) if count > 4 else 1
    return f'style="--count: {-(-count // rows) if rows else 1}"'
