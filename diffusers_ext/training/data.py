"""Labelled images for training, from scikit-learn's digits, a local folder or the Hub, without torchvision."""

import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, Sampler


# Decoded images up to this many bytes are kept in memory (MNIST at 32 px: 61 MB); larger data are decoded per batch.
MAX_BYTES_IN_MEMORY = 2**29


class ImageDataset(Dataset):
    """Square images of one size, uint8 `(C, H, W)`, with an optional class id each.

    Indexed by a list of rows, as a `DataLoader` does with a batch sampler.

    Args:
        rows: sequence of PIL images or of `{"bytes", "path"}` dictionaries, as `datasets.Image(decode=False)` gives.
        labels: class ids `(N,)`, or None.
        sample_size: height and width in pixels.
        channels: 1 (greyscale) or 3 (colour).
        num_classes: number of classes, None without labels.

    Raises:
        ValueError: for another number of channels, a label outside `[0, num_classes)` or an unreadable image; the
            last two name the row.
    """

    def __init__(
        self, rows: Any, labels: np.ndarray | None, sample_size: int, channels: int, num_classes: int | None = None
    ):
        if channels not in (1, 3):
            raise ValueError(f"`in_channels` ({channels}) must be 1 (greyscale) or 3 (colour) to train on images.")
        if labels is not None:
            wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
            if len(wrong):
                raise ValueError(
                    f"The label of row {wrong[0]} ({labels[wrong[0]]}) is out of range: the dataset has {num_classes} "
                    f"classes, so labels lie in [0, {num_classes - 1}]. Remove or relabel such rows ({len(wrong)})."
                )
        self.rows, self.labels, self.num_classes = rows, labels, num_classes
        self.sample_size, self.channels = sample_size, channels
        self.decoded = None
        if len(rows) * channels * sample_size**2 <= MAX_BYTES_IN_MEMORY:
            self.decoded = self._decode(enumerate(rows), len(rows))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Images `(B, C, H, W)` uint8 and class ids `(B,)` int64 (None without labels) of the rows `indices`."""
        if self.decoded is not None:
            images = self.decoded[indices]
        else:
            images = self._decode(((index, self.rows[index]) for index in indices), len(indices))
        return images, None if self.labels is None else torch.from_numpy(self.labels[indices])

    def _decode(self, rows: Iterable[tuple[int, Any]], count: int) -> torch.Tensor:
        images = np.empty((count, self.sample_size, self.sample_size, self.channels), dtype=np.uint8)
        for image, (index, row) in zip(images, rows):
            try:
                if isinstance(row, dict):
                    row = Image.open(row["path"] if row["bytes"] is None else io.BytesIO(row["bytes"]))
                fitted = fit_image(row.convert("L" if self.channels == 1 else "RGB"), self.sample_size)
            except (OSError, SyntaxError, TypeError, AttributeError) as error:  # what PIL raises, and a missing image
                raise ValueError(
                    f"The image of row {index} cannot be read ({error}). Remove or replace it."
                ) from error
            image[:] = np.asarray(fitted).reshape(image.shape)
        return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


class BatchSampler(Sampler[list[int]]):
    """Endless batches of row numbers in an order that depends on (seed, position) only.

    Every epoch is a new permutation; a batch may reach into the next epoch, so that no row is left out.

    Args:
        length: rows of the dataset.
        batch_size: rows per batch.
        seed: of the permutations.
        first: number of the first batch, counted from the start of the training over all processes.
        stride: batches to advance: the number of processes.
    """

    def __init__(self, length: int, batch_size: int, seed: int, first: int = 0, stride: int = 1):
        self.length, self.batch_size, self.seed, self.first, self.stride = length, batch_size, seed, first, stride

    def __iter__(self) -> Iterator[list[int]]:
        batch, orders = self.first, {}
        while True:
            indices = []
            for position in range(batch * self.batch_size, (batch + 1) * self.batch_size):
                epoch, offset = divmod(position, self.length)
                if epoch not in orders:
                    orders = {k: v for k, v in orders.items() if k == epoch - 1}
                    orders[epoch] = np.random.default_rng((self.seed, epoch)).permutation(self.length)
                indices.append(int(orders[epoch][offset]))
            yield indices
            batch += self.stride


def fit_image(image: Image.Image, size: int) -> Image.Image:
    """Bring an image to `size` x `size` pixels.

    An image that fits inside is enlarged by the largest whole factor that still fits (bicubic; 8 to 32 px: four) and
    centred on black (28 to 32 px: a border of two). A larger one is resized so that its shorter side fits, then
    cropped to its centre.
    """
    width, height = image.size
    if max(width, height) <= size:
        factor = size // max(width, height)
        if factor > 1:
            image = image.resize((width * factor, height * factor), Image.Resampling.BICUBIC)
        canvas = Image.new(image.mode, (size, size))
        canvas.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
        return canvas
    scale = size / min(width, height)
    image = image.resize((round(width * scale), round(height * scale)), Image.Resampling.LANCZOS)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def load_images(
    dataset: str,
    split: str = "train",
    *,
    sample_size: int,
    channels: int,
    image_column: str | None = None,
    label_column: str | None = None,
    need_labels: bool = False,
) -> ImageDataset:
    """Open a dataset of images.

    Args:
        dataset: `digits`, or what `datasets.load_dataset` opens: a local folder (parquet, images in class folders)
            or a Hub name.
        split: `train`, `test` or another split of the dataset. Of `digits`, the last 297 rows are `test`.
        sample_size: height and width in pixels of the images to return, see [`fit_image`].
        channels: 1 (greyscale) or 3 (colour).
        image_column, label_column: None finds the only column of type `Image` and `ClassLabel`.
        need_labels: fail when there are no labels, instead of returning images without.

    Raises:
        ValueError: when the split or a column does not exist, or as [`ImageDataset`] does.
    """
    if dataset == "digits":
        rows, labels, num_classes = _sklearn_digits(split)
    else:
        rows, labels, num_classes = _open_dataset(dataset, split, image_column, label_column, need_labels)
    return ImageDataset(rows, labels, sample_size, channels, num_classes)


def _sklearn_digits(split: str) -> tuple[list[Image.Image], np.ndarray, int]:
    from sklearn.datasets import load_digits

    splits = {"train": slice(0, 1500), "test": slice(1500, None)}
    if split not in splits:
        raise ValueError(f"`dataset_split` ({split!r}) must be one of {list(splits)} for the digits.")
    digits = load_digits()
    pixels = np.round(digits.images[splits[split]] * (255 / 16)).astype(np.uint8)  # sixteen grey levels
    return [Image.fromarray(p) for p in pixels], digits.target[splits[split]].astype(np.int64), 10


def _open_dataset(
    name: str, split: str, image_column: str | None, label_column: str | None, need_labels: bool
) -> tuple[Any, np.ndarray | None, int | None]:
    import datasets

    if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise ValueError(f"`dataset` ({name!r}) looks like a local folder, but there is none.")
    splits = datasets.load_dataset(str(Path(name).expanduser()) if name.startswith("~") else name)
    if split not in splits:
        raise ValueError(f"`dataset_split` ({split!r}) must be one of {list(splits)}, the splits of {name!r}.")
    table = splits[split]
    image_column = _find_column(table.features, "image_column", image_column, datasets.Image, required=True)
    label_column = _find_column(table.features, "label_column", label_column, datasets.ClassLabel, need_labels)
    rows = table.cast_column(image_column, datasets.Image(decode=False))[image_column]
    if label_column is None:
        return rows, None, None
    feature = table.features[label_column]
    named = isinstance(feature, datasets.ClassLabel)
    if not named and "int" not in getattr(feature, "dtype", ""):
        raise ValueError(
            f"`label_column` ({label_column!r}) holds {feature}; it must hold integers or the type ClassLabel, which "
            "`Dataset.class_encode_column` makes of text."
        )
    labels = np.array([-1 if label is None else label for label in table[label_column]], dtype=np.int64)
    return rows, labels, feature.num_classes if named else int(labels.max()) + 1


def _find_column(features: dict, option: str, name: str | None, kind: type, required: bool) -> str | None:
    if name is not None:
        if name not in features:
            raise ValueError(f"`{option}` ({name!r}) must be a column of the dataset; it has {list(features)}.")
        return name
    found = [column for column, feature in features.items() if isinstance(feature, kind)]
    if len(found) == 1:
        return found[0]
    if found or required:
        raise ValueError(
            f"`{option}` must be given: of the columns {list(features)}, {len(found)} have the type {kind.__name__}, "
            "so the choice is not clear."
        )
    return None
