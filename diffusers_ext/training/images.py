"""One image: read it, bring its mode and its size to what a network takes. Pillow only."""

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps


# Smallest and largest share of the shorter side that a random crop keeps.
CROP_FRACTIONS = (0.8, 1.0)
GREYSCALE_MODES = ("1", "L", "LA", "La", "I;16", "I;16B", "I;16L", "I;16N")
# Of the EXIF tag Orientation: the values that swap height and width.
ORIENTATION, SIDEWAYS = 0x0112, (5, 6, 7, 8)


class MixedModes(ValueError):
    """Greyscale and colour images in one dataset."""


@dataclass(frozen=True)
class ImageTransform:
    """From a stored image to the pixels of a batch.

    Args:
        channels: 1 (greyscale) or 3 (colour).
        resize_mode: `fit` ([`fit_image`]), `center_crop` ([`center_crop`]) or `random_crop` ([`random_crop`]).
        random_flip: mirror half of the images from left to right.
        mixed_modes: `error` refuses a dataset that mixes greyscale images (modes 1, L, LA and 16 bits) with others,
            `convert` converts all. What is not mixed in this sense is converted always, see [`convert_mode`].

    Stored images are what `datasets.Image(decode=False)` gives: `{"bytes", "path"}` or None. Every method takes the
    number or name of the row and raises a ValueError with it for an image that is missing, unreadable or of another
    kind than `greyscale` says (None does not ask).
    """

    channels: int
    resize_mode: Literal["fit", "center_crop", "random_crop"] = "fit"
    random_flip: bool = False
    mixed_modes: Literal["error", "convert"] = "error"

    def __post_init__(self):
        if self.channels not in (1, 3):
            raise ValueError(
                f"`in_channels` ({self.channels}) must be 1 (greyscale) or 3 (colour) to train on images."
            )

    def __call__(
        self,
        stored: dict[str, Any] | None,
        size: tuple[int, int],
        row: int | str,
        greyscale: bool | None = None,
        random: np.ndarray | None = None,
    ) -> np.ndarray:
        """Pixels uint8 `(C, H, W)` of one image.

        Args:
            size: height and width in pixels.
            random: four numbers in [0, 1), three for a random crop and one for mirroring; None neither mirrors nor
                crops by chance.
        """
        with self._open(stored, row, greyscale) as image:
            image = convert_mode(image, self.channels)
            if self.resize_mode == "random_crop" and random is not None:
                image = random_crop(image, size, random)
            else:
                image = (fit_image if self.resize_mode == "fit" else center_crop)(image, size)
            pixels = np.asarray(image).reshape(*size, self.channels).transpose(2, 0, 1)
        return pixels[:, :, ::-1] if random is not None and self.random_flip and self.mirrors(random) else pixels

    @staticmethod
    def mirrors(random: np.ndarray) -> np.ndarray:
        """Whether these numbers, `(..., 4)` or more, mirror their image."""
        return random[..., 3] < 0.5

    def is_greyscale(self, stored: dict[str, Any] | None, row: int | str) -> bool:
        """Whether the mode of an image has no colours; reads its header only."""
        with self._open(stored, row) as image:
            return image.mode in GREYSCALE_MODES

    def size(self, stored: dict[str, Any] | None, row: int | str, greyscale: bool | None = None) -> tuple[int, int]:
        """Height and width of an image, held upright, in pixels; reads its header only."""
        with self._open(stored, row, greyscale) as image:
            return image.size if _orientation(image) in SIDEWAYS else image.size[::-1]

    @contextmanager
    def _open(
        self, stored: dict[str, Any] | None, row: int | str, greyscale: bool | None = None
    ) -> Iterator[Image.Image]:
        path = stored["path"] if stored is not None else None
        try:
            if stored is None or (stored["bytes"] is None and path is None):
                raise ValueError("there is none")
            with Image.open(path if stored["bytes"] is None else io.BytesIO(stored["bytes"])) as image:
                self._check_mode(image, row, greyscale)
                yield image
        except MixedModes:
            raise
        except Exception as error:  # Pillow's plugins raise many types
            where = "" if path is None else f" ({path})"
            raise ValueError(
                f"The image of row {row}{where} cannot be read: {error}. Remove or replace it."
            ) from error

    def _check_mode(self, image: Image.Image, row: int | str, greyscale: bool | None) -> None:
        found = image.mode in GREYSCALE_MODES
        if greyscale is None or self.mixed_modes == "convert" or found == greyscale:
            return
        kinds = ("a greyscale", "colour") if found else ("a colour", "greyscale")
        raise MixedModes(
            f"The image of row {row} is {kinds[0]} one (mode {image.mode!r}), but row 0 is {kinds[1]}. Remove or "
            f'convert such rows, or set `mixed_modes` to "convert" to bring all images to {self.channels} channel(s).'
        )


def convert_mode(image: Image.Image, channels: int) -> Image.Image:
    """An upright greyscale (`channels` 1) or RGB (3) image of 8 bits; of an animation, the first frame.

    Sixteen bits of grey are scaled to eight. Transparent images are laid over white, as on a page. Palettes, CMYK and
    other colour spaces become RGB.

    Raises:
        ValueError: for 32 bits a pixel (modes I and F), which have no agreed range.
    """
    if _orientation(image) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F"):
        raise ValueError(f"its mode {image.mode!r}, 32 bits a pixel, has no agreed range; save it with 8 or 16 bits")
    if image.mode.startswith("I;16"):
        image = Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if channels == 1 else "RGB")


def fit_image(image: Image.Image, size: int | tuple[int, int]) -> Image.Image:
    """Bring an image to `size` (height, width; an int is both) with as little interpolation as possible.

    An image that fits inside is enlarged by the largest whole factor that still fits (bicubic; 8 to 32 px: four) and
    centred on black (28 to 32 px: a border of two). A larger one is resized (Lanczos) so that it just covers `size`,
    then cropped to its centre.
    """
    height, width = _both(size)
    if image.height <= height and image.width <= width:
        factor = min(height // image.height, width // image.width)
        if factor > 1:
            image = image.resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC)
        canvas = Image.new(image.mode, (width, height))
        canvas.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
        return canvas
    return _crop(_cover(image, height, width, Image.Resampling.LANCZOS), height, width)


def center_crop(image: Image.Image, size: int | tuple[int, int]) -> Image.Image:
    """Resize an image so that it just covers `size` (height, width; an int is both), and crop its centre, as ADM does.

    Dhariwal and Nichol, 2021 (https://arxiv.org/abs/2105.05233): halved by 2x2 boxes while it is at least twice too
    large, which keeps high frequencies from folding, then bicubic. Smaller images are enlarged.
    """
    height, width = _both(size)
    image = _cover(_halve(image, height, width), height, width, Image.Resampling.BICUBIC)
    return _crop(image, height, width)


def random_crop(image: Image.Image, size: int | tuple[int, int], random: np.ndarray) -> Image.Image:
    """As [`center_crop`], but the crop keeps a random 80 to 100% of the shorter side, anywhere in the image.

    Args:
        random: three numbers in [0, 1): of the share, and of the position from top and from left.
    """
    height, width = _both(size)
    side = min(height, width)
    smallest, largest = (math.ceil(side / fraction) for fraction in reversed(CROP_FRACTIONS))
    scale = (smallest + int(random[0] * (largest - smallest + 1))) / side
    cover = math.ceil(height * scale - 1e-6), math.ceil(width * scale - 1e-6)
    image = _cover(_halve(image, *cover), *cover, Image.Resampling.BICUBIC)
    return _crop(image, height, width, random[1:])


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 for upright; of a PNG, Pillow would decode the pixels to look behind them."""
    if image.format == "PNG" and "exif" not in image.info:
        return 1
    return image.getexif().get(ORIENTATION, 1)


def _both(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def _halve(image: Image.Image, height: int, width: int) -> Image.Image:
    while image.height >= 2 * height and image.width >= 2 * width:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    return image


def _cover(image: Image.Image, height: int, width: int, resampling: Image.Resampling) -> Image.Image:
    scale = max(height / image.height, width / image.width)
    return image.resize((max(width, round(image.width * scale)), max(height, round(image.height * scale))), resampling)


def _crop(image: Image.Image, height: int, width: int, random: np.ndarray | None = None) -> Image.Image:
    """Cut out `height` x `width` at the centre, or where two numbers in [0, 1) say."""
    top, left = image.height - height, image.width - width
    if random is None:
        top, left = top // 2, left // 2
    else:
        top, left = int(random[0] * (top + 1)), int(random[1] * (left + 1))
    return image.crop((left, top, left + width, top + height))
