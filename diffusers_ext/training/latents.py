"""Latents of a whole dataset, computed once through an autoencoder and kept on disk.

Latent diffusion: Rombach et al., 2022, https://arxiv.org/abs/2112.10752. The encoder gives a Gaussian for each image;
its mean and standard deviation are kept, so that every epoch draws anew, as training on the images would.
"""

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from diffusers import AutoencoderKL

from diffusers_ext.hub.loading import open_folder
from diffusers_ext.training.buckets import Buckets
from diffusers_ext.training.config import TrainingConfig
from diffusers_ext.training.data import ImageData, Plan
from diffusers_ext.training.images import ImageTransform
from diffusers_ext.training.sources import Source


# Rows of one file of the cache: what a kill loses at most.
SHARD_ROWS = 2048
# Images that the encoder sees at once.
ENCODER_BATCH = 16


def open_latents(config: TrainingConfig, source: Source, *, sample_size: int, channels: int) -> "LatentData":
    """Latents of an open split through the autoencoder `config.vae`; computed first where they are not on disk yet.

    They are kept under `config.latents_cache_dir` (None: `latents` in `config.output_dir`), in a folder named by
    everything that they depend on: rows, image size and transforms, and the weights of the autoencoder.

    Args:
        sample_size: height and width of latents; images have as many times more pixels as the autoencoder reduces.
        channels: of latents.

    Raises:
        ValueError: for an autoencoder that cannot be loaded or has other channels, options that change images from
            epoch to epoch other than by mirroring, and images as [`ImageTransform`] refuses them.
    """
    for option, given in {
        "streaming": config.streaming,
        "resize_mode": config.resize_mode == "random_crop",
        "resolutions": bool(config.resolutions),
        "aspect_ratio_bucketing": config.aspect_ratio_bucketing,
    }.items():
        if given:
            raise ValueError(
                f"`{option}` ({getattr(config, option)!r}) cannot be combined with `vae`: latents are computed once, "
                "of one size, from rows that can be read by number. Leave it at its default."
            )
    try:
        folder = open_folder(config.vae, argument="vae")
        vae = AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"`vae` ({config.vae!r}) is no AutoencoderKL that can be loaded: {error}") from error
    if vae.config.latent_channels != channels:
        raise ValueError(
            f"`in_channels` ({channels}) must be {vae.config.latent_channels}, the channels of latents of `vae` "
            f"({config.vae!r})."
        )
    size = sample_size * 2 ** (len(vae.config.block_out_channels) - 1)
    transform = ImageTransform(vae.config.in_channels, config.resize_mode, config.random_flip, config.mixed_modes)
    cache_dir = Path(config.latents_cache_dir or Path(config.output_dir) / "latents").expanduser()
    folder = precompute_latents(source, transform, size, vae, cache_dir, config.dataloader_num_workers)
    return LatentData(source, folder, dict(vae.config), sample_size, config.random_flip)


class LatentData(ImageData):
    """Latents of a split as endless batches, in the order that its images would have.

    `Batch.images` are float32 `(B, C, H, W)`: `(z - shift_factor) * scaling_factor` with z drawn from the Gaussian of
    the image or, by chance, of the mirrored one. Of [`rows`], z is the mean.

    Args:
        source: the open split, for labels and captions.
        folder: what [`precompute_latents`] returned.
        vae_config: of the autoencoder: `latent_channels`, `scaling_factor` and `shift_factor`.
        sample_size: height and width of latents.
        random_flip: take half of the images mirrored.
    """

    latents = True

    def __init__(
        self, source: Source, folder: Path, vae_config: dict[str, Any], sample_size: int, random_flip: bool = False
    ):
        self.source, self.folder, self.sample_size, self.random_flip = source, folder, sample_size, random_flip
        self.channels = vae_config["latent_channels"]
        self.scaling_factor, self.shift_factor = vae_config["scaling_factor"], vae_config.get("shift_factor") or 0.0
        self.num_classes, self.class_names = source.num_classes, source.class_names
        self.buckets, self.members, self.decoded = Buckets((sample_size,)), [np.arange(len(source.table))], None
        self.examples = self._captions_only()
        self.files = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"files": {}}  # open files do not travel to another process

    def _images(self, plan: Plan, examples: list[dict[str, Any]] | None, random: np.ndarray | None) -> torch.Tensor:
        mirrored = np.zeros(len(plan.rows), dtype=bool)
        if random is not None and self.random_flip:
            mirrored = ImageTransform.mirrors(random)
        mean = self._read("mean", plan.rows, mirrored)
        if random is not None:
            noise = np.random.default_rng((plan.seed, plan.number, 0, 4)).standard_normal(mean.shape, np.float32)
            mean += self._read("std", plan.rows, mirrored) * torch.from_numpy(noise)
        return (mean - self.shift_factor) * self.scaling_factor

    def _read(self, name: str, rows: list[int], mirrored: np.ndarray) -> torch.Tensor:
        parts = []
        for row, flip in zip(rows, mirrored):
            shard, offset = divmod(row, SHARD_ROWS)
            if shard not in self.files:
                self.files[shard] = safe_open(shard_path(self.folder, shard), "pt")
            parts.append(self.files[shard].get_slice(name + "_mirrored" * bool(flip))[offset : offset + 1])
        return torch.cat(parts).float()


def precompute_latents(
    source: Source, transform: ImageTransform, size: int, vae: AutoencoderKL, cache_dir: Path, num_workers: int = 0
) -> Path:
    """Write mean and standard deviation of the latents of all images, unless they are there already.

    Files are written one after the other, each at once, so that a killed run goes on with the file it was at. Of
    several processes the first one writes, and the others wait.

    Args:
        source: an open split, not streamed.
        transform: of the images; with `random_flip`, latents of the mirrored images are written too.
        size: height and width of images in pixels.
        vae: moved to the accelerator, if there is one, while it encodes.
        cache_dir: where the folder of these latents lies or will lie.
        num_workers: processes that decode images.

    Returns:
        The folder: `latents-00000.safetensors` and so on, of 2048 rows each, float16 `mean` and `std` `(N, C, H, W)`
        and, of mirrored images, `mean_mirrored` and `std_mirrored`; `config.json` says what they were made of.

    Raises:
        ValueError: names the row of an image that cannot be read or whose latents are not finite.
    """
    from filelock import FileLock  # of huggingface_hub

    made_of = {
        "rows": len(source.table),
        "fingerprint": source.table._fingerprint,  # of the data, by `datasets`
        "image_column": source.image_column,
        "size": size,
        "transform": asdict(transform),
        "vae_config": {name: value for name, value in vae.config.items() if not name.startswith("_")},
        "vae_weights": _digest(vae),
    }
    text = json.dumps(made_of, indent=2, default=str)
    folder = cache_dir / hashlib.sha256(text.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        starts = range(0, len(source.table), SHARD_ROWS)
        shards = [range(start, min(start + SHARD_ROWS, len(source.table))) for start in starts]
        missing = [n for n, rows in enumerate(shards) if not _is_complete(shard_path(folder, n), len(rows))]
        if missing:
            (folder / "config.unfinished").write_text(text)
            os.replace(folder / "config.unfinished", folder / "config.json")
            _write_shards(source, transform, size, vae, folder, {n: shards[n] for n in missing}, num_workers)
    return folder


def shard_path(folder: Path, number: int) -> Path:
    """One file of a folder of latents."""
    return folder / f"latents-{number:05d}.safetensors"


def _is_complete(path: Path, rows: int) -> bool:
    try:
        with safe_open(path, "pt") as file:
            return file.get_slice("std").get_shape()[0] == rows
    except (OSError, SafetensorError):
        return False


def _write_shards(
    source: Source,
    transform: ImageTransform,
    size: int,
    vae: AutoencoderKL,
    folder: Path,
    shards: dict[int, range],
    num_workers: int,
) -> None:
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    vae = vae.to(device).eval()
    batches = [rows[i : i + ENCODER_BATCH] for rows in shards.values() for i in range(0, len(rows), ENCODER_BATCH)]
    images = DataLoader(_Images(source, transform, size), None, sampler=batches, num_workers=num_workers)
    total, done = len(source.table), len(source.table) - sum(map(len, shards.values()))
    with tqdm(total=total, initial=done, desc="Latents", unit="images") as progress:
        batches = iter(images)
        for number, rows in shards.items():
            parts = []
            for _ in range(0, len(rows), ENCODER_BATCH):
                parts.append(_encode(vae, next(batches).to(device), transform.random_flip))
                progress.update(len(parts[-1]["mean"]))
            tensors = {name: torch.cat([part[name] for part in parts]).contiguous() for name in parts[0]}
            for name, values in tensors.items():
                wrong = (~values.isfinite()).flatten(1).any(1).nonzero()
                if len(wrong):
                    raise ValueError(f"The latents of row {rows[int(wrong[0])]} (`{name}`) are not finite in float16.")
            path = shard_path(folder, number)
            save_file(tensors, path.with_suffix(".unfinished"))
            os.replace(path.with_suffix(".unfinished"), path)
    vae.to("cpu")


@torch.no_grad()
def _encode(vae: AutoencoderKL, images: torch.Tensor, random_flip: bool) -> dict[str, torch.Tensor]:
    """Of uint8 images `(B, C, H, W)`: float16 mean and standard deviation, and those of the mirrored images."""
    images = images.float() / 127.5 - 1
    found = {}
    for suffix, seen in {"": images, "_mirrored": images.flip(3)}.items() if random_flip else [("", images)]:
        gaussian = vae.encode(seen).latent_dist
        found |= {f"mean{suffix}": gaussian.mean.half().cpu(), f"std{suffix}": gaussian.std.half().cpu()}
    return found


class _Images(Dataset):
    """Images uint8 `(B, C, H, W)` of a range of rows, for a `DataLoader`."""

    def __init__(self, source: Source, transform: ImageTransform, size: int):
        self.source, self.transform, self.size = source, transform, (size, size)
        self.examples = source.table.select_columns(source.image_column)
        self.greyscale = transform.is_greyscale(source.first[source.image_column], 0)

    def __getitem__(self, rows: range) -> torch.Tensor:
        stored = (example[self.source.image_column] for example in self.examples.__getitems__(list(rows)))
        images = [self.transform(image, self.size, row, self.greyscale) for image, row in zip(stored, rows)]
        return torch.from_numpy(np.stack(images))


def _digest(vae: AutoencoderKL) -> str:
    digest = hashlib.sha256()
    for name, values in sorted(vae.state_dict().items()):
        digest.update(name.encode())
        digest.update(values.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()
