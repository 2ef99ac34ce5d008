"""Pictures of pictures: enlarged, side by side, their difference, and a sweep as one table."""

import io
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from settings import SettingsError


MAX_MARGIN = 4  # pixels that are added to the smaller of two images; 28 pixels are compared with 32
PAPER, INK, FAINT = "#ffffff", "#1c1f26", "#667085"
BRIGHTER, DARKER = (255, 150, 50), (80, 170, 255)  # told apart with any colour vision
GAP = 4  # pixels between images of one cell
MAX_TABLE = 2400  # pixels, about, of a table of large images


def enlarge(image: Image.Image, side: int = 320) -> Image.Image:
    """The image with crisp pixels, a whole number of times as large: about `side` pixels, never smaller than it is."""
    factor = max(1, round(side / max(image.size)))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    """The content of an image file of this kind."""
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def reduced(image: Image.Image, limit: int) -> Image.Image:
    """The image, smaller where a side is longer than `limit` pixels."""
    if max(image.size) <= limit:
        return image
    scale = limit / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def contact_sheet(images: Sequence[Image.Image], side: int = 96, columns: int | None = None) -> Image.Image:
    """Images in rows, enlarged to about `side` pixels.

    Args:
        images: at least one, all of one size.
        columns: images per row. None: about as many as rows.
    """
    images = [enlarge(image.convert("RGB"), side) for image in images]
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * (width + GAP) - GAP, rows * (height + GAP) - GAP), PAPER)
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * (width + GAP), i // columns * (height + GAP)))
    return sheet


def difference(first: Sequence[Image.Image], second: Sequence[Image.Image]) -> tuple[Image.Image, list[float]]:
    """What the second images have more and less than the first.

    Smaller images get a black margin, up to `MAX_MARGIN` pixels in all.

    Returns:
        A row of pictures in their own size, orange where the second is brighter, blue where it is darker, black where
        they are equal, a difference of half of all brightness being full colour; and the root mean square of each
        difference, 1 being that of black and white.

    Raises:
        SettingsError: for images that cannot be compared.
    """
    if not first or len(first) != len(second):
        raise SettingsError(
            f"There are {len(first)} images in one column and {len(second)} in the other; draw as many in both."
        )
    pictures, roots = [], []
    for a, b in zip(first, second, strict=True):
        low, high = _common(a, b)
        delta = high - low
        roots.append(float(np.sqrt(np.mean(delta**2))))
        grey = delta.mean(axis=2, keepdims=True)
        strength = np.minimum(2 * np.abs(grey), 1)
        colours = np.where(grey > 0, BRIGHTER, DARKER) * strength
        pictures.append(Image.fromarray(colours.round().astype(np.uint8)))
    return contact_sheet(pictures, side=1, columns=len(pictures)), roots


def sweep_picture(
    rows: Sequence[Sequence[Sequence[Image.Image]]],
    guidance_scales: Sequence[float],
    steps: Sequence[int],
    side: int = 96,
) -> Image.Image:
    """A table of images with captions, on white.

    Args:
        rows: images of each cell, by guidance scale and then by number of steps; all of one size.
        guidance_scales, steps: captions of rows and columns.
        side: about the size of an image; those of many are smaller.
    """
    side = min(side, max(32, 160 // math.ceil(math.sqrt(len(rows[0][0])))))
    most = max(64, MAX_TABLE // (len(steps) * math.ceil(math.sqrt(len(rows[0][0])))))
    cells = [[contact_sheet([reduced(image, most) for image in images], side) for images in row] for row in rows]
    width, height = cells[0][0].size
    font, small = ImageFont.load_default(16), ImageFont.load_default(13)
    captions = [f"{scale:g}" for scale in guidance_scales]
    space, left, top = 10, 34 + int(max(font.getlength(text) for text in captions)) + 10, 52
    table = Image.new("RGB", (left + len(steps) * (width + space) + 2, top + len(rows) * (height + space) + 2), PAPER)
    draw = ImageDraw.Draw(table)
    draw.text((left + (len(steps) * (width + space) - space) / 2, 14), "steps", FAINT, small, anchor="mm")
    turned = Image.new("RGB", (int(small.getlength("guidance scale")) + 2, 18), PAPER)
    ImageDraw.Draw(turned).text((turned.width / 2, 9), "guidance scale", FAINT, small, anchor="mm")
    turned = turned.rotate(90, expand=True)
    middle = top + (len(rows) * (height + space) - space) // 2
    table.paste(turned, (6, max(0, middle - turned.height // 2)))
    for j, count in enumerate(steps):
        draw.text((left + j * (width + space) + width / 2, 36), str(count), INK, font, anchor="mm")
    for i, row in enumerate(cells):
        y = top + i * (height + space)
        draw.text((left - 10, y + height / 2), captions[i], INK, font, anchor="rm")
        for j, cell in enumerate(row):
            table.paste(cell, (left + j * (width + space), y))
    return table


def _common(first: Image.Image, second: Image.Image) -> list[np.ndarray]:
    """Both images `(H, W, 3)` in [0, 1], the smaller one in the middle of a black margin."""
    width, height = max(first.width, second.width), max(first.height, second.height)
    arrays = []
    for image in (first, second):
        if width - image.width > MAX_MARGIN or height - image.height > MAX_MARGIN:
            raise SettingsError(
                f"Images of {first.width}x{first.height} and {second.width}x{second.height} pixels cannot be compared "
                "pixel by pixel. Choose two models that draw the same size."
            )
        padded = Image.new("RGB", (width, height))
        padded.paste(image.convert("RGB"), ((width - image.width) // 2, (height - image.height) // 2))
        arrays.append(np.asarray(padded, dtype=np.float64) / 255)
    return arrays
