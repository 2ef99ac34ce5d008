"""A folder of drawn samples: shards that come one by one, a manifest of how they were drawn, and the merged set.

    manifest.json               every option that changes an image, and the versions of the libraries
    shards/000000-000049.npz    images (n, H, W, C) uint8, labels (n,) int64 where there are any
    samples.npz                 arr_0 (N, H, W, 3) uint8, arr_1 (N,) int64, as guided-diffusion's evaluator reads them
    images/000000.png           the same as PNG; their labels in labels.json
    samples.png                 the first images, to be looked at

Every file is written under another name and then renamed, so that a file with its own name is whole.
"""

import json
import os
import shutil
import time
import uuid
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from diffusers.utils import make_image_grid

from diffusers_ext.files import write_atomically


IMAGES_OF_GRID = 64
LEFTOVER_AGE = 24 * 3600  # seconds after which nobody writes a partial file any more


class SampleFolder:
    """Samples that one or many processes draw into one folder.

    Args:
        path: of the folder; it is created.
        num_samples: N, of the whole set.
        batch_size: images per shard: shard k holds the samples k * batch_size to (k + 1) * batch_size - 1.
    """

    def __init__(self, path: Path, num_samples: int, batch_size: int):
        self.path, self.num_samples, self.batch_size = path, num_samples, batch_size
        self.shards = path / "shards"
        self.shards.mkdir(parents=True, exist_ok=True)

    @property
    def num_shards(self) -> int:
        return -(-self.num_samples // self.batch_size)

    def indices(self, shard: int) -> range:
        """Numbers of the samples in a shard."""
        return range(shard * self.batch_size, min((shard + 1) * self.batch_size, self.num_samples))

    def file(self, shard: int) -> Path:
        indices = self.indices(shard)
        return self.shards / f"{indices[0]:06d}-{indices[-1]:06d}.npz"

    def missing(self) -> list[int]:
        """Shards that are not there, or cannot be read to their end."""
        return [shard for shard in range(self.num_shards) if self.read(shard) is None]

    def num_there(self) -> int:
        """Samples whose shard has been written, by any process; the files are not opened."""
        return sum(len(self.indices(shard)) for shard in range(self.num_shards) if self.file(shard).exists())

    def read(self, shard: int) -> tuple[np.ndarray, np.ndarray | None] | None:
        """Images `(n, H, W, C)` uint8 and labels `(n,)` of a shard; None where it is missing or damaged."""
        try:
            with np.load(self.file(shard)) as file:  # each array is checked against its checksum
                images, labels = file["images"], file["labels"] if "labels" in file else None
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None
        return (images, labels) if len(images) == len(self.indices(shard)) else None

    def write(self, shard: int, images: np.ndarray, labels: list[int] | None) -> None:
        """Keep the images `(n, H, W, C)`, uint8, of a shard."""
        arrays = {"images": images} | ({} if labels is None else {"labels": np.array(labels, dtype=np.int64)})
        target = self.file(shard)
        partial = target.with_suffix(".partial")  # one process draws a shard, so the name is free
        with open(partial, "wb") as file:
            np.savez(file, **arrays)
        os.replace(partial, target)

    def agree_on(self, manifest: dict) -> None:
        """Write the manifest, or compare it with the one that is there.

        Args:
            manifest: of `options` and `versions`, each from a name to a value, which must agree, and anything else.

        Raises:
            ValueError: when the folder holds samples drawn with other options; it names the first one.
        """
        file = self.path / "manifest.json"
        if not file.exists():
            write_atomically(file, json.dumps(manifest, indent=2) + "\n")
        kept, asked = json.loads(file.read_text()), json.loads(json.dumps(manifest))
        for part in ("options", "versions"):
            old, new = _flatten(kept[part]), _flatten(asked[part])
            for name in [*new, *(name for name in old if name not in new)]:
                if old.get(name) != new.get(name):
                    raise ValueError(
                        f"`{name}` is {_short(new.get(name))}, but {self.path} holds samples drawn with "
                        f"{_short(old.get(name))}. Use the same to go on with them, or another `output`."
                    )

    def merged_path(self, format: Literal["npz", "png"]) -> Path:
        return self.path / ("samples.npz" if format == "npz" else "images")

    def is_merged(self, format: Literal["npz", "png"]) -> bool:
        """Whether the merged set is there and holds all samples."""
        target = self.merged_path(format)
        if format == "png":
            return target.is_dir() and sum(1 for _ in target.glob("*.png")) == self.num_samples
        return target.exists() and _rows_of_npz(target) == self.num_samples

    def merge(self, format: Literal["npz", "png"]) -> Path:
        """Join all shards, holding one of them in memory at a time, and write the grid `samples.png`.

        Returns:
            `samples.npz` or the folder `images`.

        Raises:
            ValueError: when a shard is missing.
        """
        missing = self.missing()
        if missing:
            raise ValueError(f"{self.path} lacks {describe_shards(self, missing)}; draw them first.")
        target = self.merged_path(format)
        for leftover in self.path.glob(f"{target.name}.*.partial"):
            if _age(leftover) > LEFTOVER_AGE:
                _remove(leftover)
        partial = target.with_name(f"{target.name}.{uuid.uuid4().hex}.partial")  # two machines may finish at once
        try:
            if format == "npz":
                self._write_npz(partial)
            else:
                self._write_png(partial)
                if target.is_dir():
                    shutil.rmtree(target)
            os.replace(partial, target)
        finally:
            _remove(partial)
        self._write_grid()
        return target

    def _contents(self) -> Iterator[tuple[range, np.ndarray, np.ndarray | None]]:
        for shard in range(self.num_shards):
            yield self.indices(shard), *self.read(shard)

    def _write_npz(self, path: Path) -> None:
        first, first_labels = self.read(0)
        header = {"descr": "|u1", "fortran_order": False, "shape": (self.num_samples, *first.shape[1:3], 3)}
        with zipfile.ZipFile(path, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(file, header)
                for _, images, _ in self._contents():
                    file.write(np.ascontiguousarray(np.broadcast_to(images, (*images.shape[:3], 3))).data)
            if first_labels is not None:
                with archive.open("arr_1.npy", "w", force_zip64=True) as file:
                    np.save(file, np.concatenate([labels for _, _, labels in self._contents()]))

    def _write_png(self, path: Path) -> None:
        path.mkdir()
        all_labels = {}
        for indices, images, labels in self._contents():
            for position, index in enumerate(indices):
                to_pil(images[position]).save(path / f"{index:06d}.png")
                if labels is not None:
                    all_labels[f"{index:06d}.png"] = int(labels[position])
        if all_labels:
            write_atomically(self.path / "labels.json", json.dumps(all_labels) + "\n")

    def _write_grid(self) -> None:
        images = []
        for _, shard_images, _ in self._contents():
            images += map(to_pil, shard_images[: IMAGES_OF_GRID - len(images)])
            if len(images) == IMAGES_OF_GRID:
                break
        columns = int(np.ceil(len(images) ** 0.5))
        images += [Image.new(images[0].mode, images[0].size)] * (-len(images) % columns)
        partial = self.path / f"samples.png.{uuid.uuid4().hex}.partial"
        make_image_grid(images, len(images) // columns, columns).save(partial, format="png")
        os.replace(partial, self.path / "samples.png")


@dataclass(frozen=True)
class Samples:
    """Images that a model has drawn, or any others.

    Args:
        images: `(N, C, H, W)`, uint8, C 1 (greyscale) or 3 (colour).
        labels: `(N,)`, int64: what was asked for; None where nothing was.
    """

    images: np.ndarray
    labels: np.ndarray | None

    def __len__(self) -> int:
        return len(self.images)


def read_samples(path: Path, channels: int | None = None) -> Samples:
    """Open `samples.npz` (arrays `arr_0` and `arr_1`) or a folder of images of one size.

    Args:
        path: .npz file; a folder with images, and `labels.json` in it or beside it (name of file -> class id) where
            they have labels; or a folder that `diffusers-ext sample` wrote.
        channels: 1 or 3. None: one where all three agree, as in a greyscale image that the evaluator's format repeats.

    Raises:
        ValueError: where there are no such images.
    """
    if path.is_dir():
        if (path / "samples.npz").exists():
            return read_samples(path / "samples.npz", channels)
        if (path / "images").is_dir():
            return read_samples(path / "images", channels)
        images, labels = _read_folder(path)
    elif path.suffix == ".npz" and path.exists():
        images, labels = _read_npz(path)
    else:
        raise ValueError(f"`samples` ({str(path)!r}) must be an .npz file or a folder of images, which is there.")
    if images.shape[3] == 3 and channels != 3 and all((images[..., 0] == images[..., i]).all() for i in (1, 2)):
        images = images[..., :1]
    if channels == 3 and images.shape[3] == 1:
        images = images.repeat(3, axis=3)
    if channels is not None and images.shape[3] != channels:
        raise ValueError(f"The samples in {path} have {images.shape[3]} channels, where {channels} are wanted.")
    return Samples(np.ascontiguousarray(images.transpose(0, 3, 1, 2)), labels)


def _read_npz(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    with np.load(path) as file:
        images = file["arr_0"] if "arr_0" in file else np.empty(0)
        labels = file["arr_1"] if "arr_1" in file else None
    if images.ndim != 4 or images.shape[3] not in (1, 3) or images.dtype != np.uint8 or len(images) == 0:
        raise ValueError(
            f"{path} must hold images as `arr_0`, uint8 (N, H, W, 3); it has {images.dtype} {images.shape}."
        )
    if labels is not None and labels.shape != (len(images),):
        raise ValueError(f"`arr_1` of {path} has shape {labels.shape}; it must hold one label for each image.")
    return images, None if labels is None else labels.astype(np.int64)


def _read_folder(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
    if not files:
        raise ValueError(f"`samples` ({str(path)!r}) holds neither samples.npz nor images.")
    images = []
    for file in files:
        with Image.open(file) as image:
            images.append(np.atleast_3d(np.asarray(image if image.mode == "L" else image.convert("RGB"))))
        if images[-1].shape != images[0].shape:
            raise ValueError(
                f"{file} has {images[-1].shape} pixels and channels, but {files[0].name} {images[0].shape}; all "
                "samples must have one size and mode."
            )
    names = next((file for file in (path / "labels.json", path.parent / "labels.json") if file.exists()), None)
    if names is None:
        return np.stack(images), None
    labels = json.loads(names.read_text())
    unnamed = [file.name for file in files if file.name not in labels]
    if unnamed:
        raise ValueError(f"{names} has no label of {unnamed[0]}; it must have one for every image, or not be there.")
    return np.stack(images), np.array([labels[file.name] for file in files], dtype=np.int64)


def describe_shards(folder: SampleFolder, shards: list[int]) -> str:
    """Which samples these shards hold, in words."""
    names = [folder.file(shard).stem for shard in shards]
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"{len(names)} of {folder.num_shards} shards ({', '.join(names[:8])}{more})"


def to_pil(image: np.ndarray) -> Image.Image:
    """uint8 `(H, W, C)` -> image."""
    return Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)


def _age(path: Path) -> float:
    """Seconds since a file or folder was written to; 0 where it has gone."""
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _rows_of_npz(path: Path) -> int | None:
    """First dimension of `arr_0`, from its header; None for a damaged file."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
            np.lib.format.read_magic(file)
            return np.lib.format.read_array_header_1_0(file)[0][0]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None


def _flatten(options: dict, prefix: str = "") -> dict:
    """Nested dictionaries as one, with dotted names."""
    flat = {}
    for name, value in options.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
