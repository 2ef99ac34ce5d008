"""Batches of images for training: the same ones whoever asks, in an order that depends on the seed only."""

import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from diffusers_ext.training.buckets import BatchOrder, Buckets
from diffusers_ext.training.config import TrainingConfig
from diffusers_ext.training.images import ImageTransform
from diffusers_ext.training.sources import Source, check_label, choose_caption, open_source


# Images are decoded once and kept where they take at most so many bytes decoded (MNIST at 32 px: 61 MB), and encoded;
# others are decoded for every batch.
MAX_BYTES_IN_MEMORY = 2**29
MAX_ENCODED_BYTES = 2**27


@dataclass(frozen=True)
class Batch:
    """What a training step sees."""

    images: torch.Tensor
    """uint8 `(B, C, H, W)`; of latent data, float32 latents"""
    labels: torch.Tensor | None
    """class ids `(B,)`, int64"""
    captions: list[str] | None
    """one per image"""
    rows: list[int]
    """row numbers in the dataset, of a streamed one in its shard (file), for error messages"""

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with its tensors on `device`."""
        labels = None if self.labels is None else self.labels.to(device)
        return replace(self, images=self.images.to(device), labels=labels)


@dataclass(frozen=True)
class Plan:
    """Which rows make a batch, before anything is decoded."""

    number: int
    """of the batch, counted from the start of the training over all processes"""
    seed: int | None
    """None leaves nothing to chance"""
    rows: list[int]
    size: tuple[int, int]
    """height and width of its images in pixels"""
    examples: list[dict[str, Any]] | None = None
    """of a stream: the rows themselves, still encoded"""
    names: list[str] | None = None
    """of a stream: what messages call the rows"""

    def random(self) -> np.ndarray | None:
        """All chance in the batch, `(B, 5)` in [0, 1): four numbers for [`ImageTransform`], one for the caption."""
        if self.seed is None:
            return None
        return np.random.default_rng((self.seed, self.number, 0, 1)).random((len(self.rows), 5))


class ImageData(Dataset):
    """Images of a split, with labels and captions where there are any, as endless batches.

    Batch number n depends on (seed, n) only, and so does every mirrored image and crop in it: P processes that take
    every P-th batch see the batches of one process, and a resumed run goes on where it stopped, whatever the number
    of worker processes. Every epoch is a new permutation, see [`BatchOrder`]; no row is left out.

    Args:
        source: an open split.
        transform: from a stored image to pixels.
        sample_size: height and width in pixels.
        buckets: sizes of batches; None: `sample_size` only. With aspect ratios, opening reads the header of every
            image.

    Raises:
        ValueError: for an image that is missing, unreadable or of another kind (greyscale, colour) than the first;
            names the row. Here when images are kept decoded or put into buckets by aspect ratio, else with the batch.
    """

    latents = False

    def __init__(self, source: Source, transform: ImageTransform, sample_size: int, buckets: Buckets | None = None):
        self.source, self.transform, self.sample_size = source, transform, sample_size
        self.channels = transform.channels
        self.num_classes, self.class_names = source.num_classes, source.class_names
        self.buckets = buckets or Buckets((sample_size,))
        self.decoded = self.examples = None
        self._prepare()

    def _prepare(self) -> None:
        source = self.source
        columns = [name for name in (source.image_column, source.caption_column) if name is not None]
        self.examples = source.table.select_columns(columns)
        self.greyscale = self.transform.is_greyscale(source.first[source.image_column], 0)
        self.members = [np.arange(len(self))]
        if len(self.buckets) > 1:
            self.members = self._sort_into_buckets()
        elif self.buckets.sizes == [[(self.sample_size,) * 2]] and self._fits_in_memory():
            self.decoded = self._decode_all()
            self.examples = self._captions_only()

    def _captions_only(self) -> Any:
        """Table of what must be read row by row beside images; None when that is nothing."""
        column = self.source.caption_column
        return None if column is None else self.source.table.select_columns(column)

    def __len__(self) -> int:
        """Rows of the split.

        Raises:
            TypeError: when it is streamed.
        """
        return len(self.source.table)

    def batches(
        self, batch_size: int, seed: int, first: int = 0, stride: int = 1, num_workers: int = 0
    ) -> Iterator[Batch]:
        """Endless batches number `first`, `first + stride`, `first + 2 * stride`, ...

        Args:
            batch_size: images per batch.
            seed: of order, mirrored images, crops and choice of captions; not negative.
            first: number of the first batch, counted from the start of the training over all processes.
            stride: batches to advance: the number of processes.
            num_workers: processes that decode; batches are the same with any number.
        """
        plans = self.plans(batch_size, seed, first, stride)
        if num_workers == 0 or self.decoded is not None:
            return map(self.__getitem__, plans)
        loader = DataLoader(
            self,
            sampler=_Plans(plans),
            batch_size=None,  # a plan is a whole batch
            num_workers=num_workers,
            worker_init_fn=_leave_interrupts_to_parent,
            generator=torch.Generator(),  # the global one belongs to the training step
        )
        return iter(loader)

    def plans(self, batch_size: int, seed: int, first: int = 0, stride: int = 1) -> Iterator[Plan]:
        """What [`batches`] are made of, in turn."""
        order, number = BatchOrder(self.members, batch_size, seed), first
        while True:
            bucket, rows = order[number]
            yield Plan(number, seed, rows, self.buckets.size(bucket, number))
            number += stride

    def rows(self, indices: list[int]) -> Batch:
        """The given rows at `sample_size`, neither mirrored nor cropped by chance, each with its first caption."""
        return self[Plan(0, None, [int(index) for index in indices], (self.sample_size, self.sample_size))]

    def __getitem__(self, plan: Plan) -> Batch:
        random, examples = plan.random(), plan.examples
        if examples is None and self.examples is not None:
            examples = self.examples.__getitems__(plan.rows)
        captions = self._captions(plan, examples, random)
        return Batch(self._images(plan, examples, random), self._labels(plan), captions, plan.rows)

    def _images(self, plan: Plan, examples: list[dict[str, Any]] | None, random: np.ndarray | None) -> torch.Tensor:
        if self.decoded is not None:
            images = self.decoded[plan.rows]
            if random is None or not self.transform.random_flip:
                return images
            mirrored = torch.from_numpy(self.transform.mirrors(random))
            return torch.where(mirrored[:, None, None, None], images.flip(3), images)
        images = np.empty((len(plan.rows), self.channels, *plan.size), dtype=np.uint8)
        for i, (name, example) in enumerate(zip(plan.names or plan.rows, examples)):
            chance = None if random is None else random[i]
            images[i] = self.transform(example[self.source.image_column], plan.size, name, self.greyscale, chance)
        return torch.from_numpy(images)

    def _labels(self, plan: Plan) -> torch.Tensor | None:
        source = self.source
        if source.labels is not None:
            return torch.from_numpy(source.labels[plan.rows])
        if source.label_column is None:
            return None
        labels = zip((example[source.label_column] for example in plan.examples), plan.names)
        return torch.tensor([check_label(x, self.num_classes, source.label_column, name) for x, name in labels])

    def _captions(self, plan: Plan, examples: list[dict[str, Any]], random: np.ndarray | None) -> list[str] | None:
        column = self.source.caption_column
        if column is None:
            return None
        chances = np.zeros(len(plan.rows)) if random is None else random[:, 4]
        rows = zip(examples, chances, plan.names or plan.rows)
        return [choose_caption(example[column], chance, column, name) for example, chance, name in rows]

    def _sort_into_buckets(self) -> list[np.ndarray]:
        members = [[] for _ in range(len(self.buckets))]
        for row, example in enumerate(self.examples):
            height, width = self.transform.size(example[self.source.image_column], row, self.greyscale)
            members[self.buckets.of_image(height, width)].append(row)
        return [np.array(rows, dtype=np.int64) for rows in members]

    def _fits_in_memory(self) -> bool:
        decoded = len(self) * self.channels * self.sample_size**2
        if self.transform.resize_mode == "random_crop" or decoded > MAX_BYTES_IN_MEMORY:
            return False
        return self.source.encoded_bytes() <= MAX_ENCODED_BYTES

    def _decode_all(self) -> torch.Tensor:
        size = (self.sample_size, self.sample_size)
        images = np.empty((len(self), self.channels, *size), dtype=np.uint8)
        for row, example in enumerate(self.examples):
            images[row] = self.transform(example[self.source.image_column], size, row, self.greyscale)
        return torch.from_numpy(images)


class StreamedData(ImageData):
    """Images that are read as they come, without a copy on disk, as the same kind of endless batches.

    In every epoch the shards (files) are shuffled, and rows within a buffer, both from (seed, epoch). Every process
    reads the whole stream and decodes its own batches only, and so does a resumed run: it reads over what it has seen
    (about 0.05 ms per row from a local disk), which keeps the order of an uninterrupted one. Rows that do not fill a
    batch of their bucket wait for the next epoch.

    Args:
        source, transform, sample_size, buckets: as for [`ImageData`].
        buffer_size: rows to shuffle among, kept encoded; 1 keeps the order within a shard.

    Raises:
        ValueError: as for [`ImageData`], with the batch.
    """

    def __init__(
        self,
        source: Source,
        transform: ImageTransform,
        sample_size: int,
        buckets: Buckets | None = None,
        buffer_size: int = 1000,
    ):
        if buffer_size < 1:
            raise ValueError(f"`shuffle_buffer_size` ({buffer_size}) must be at least 1 row; 1 does not shuffle.")
        self.buffer_size, self.head = buffer_size, []
        super().__init__(source, transform, sample_size, buckets)

    def _prepare(self) -> None:
        self.greyscale = self.transform.is_greyscale(self.source.first[self.source.image_column], 0)

    def __len__(self) -> int:
        raise TypeError("The length of streamed data is not known; set `max_train_steps` rather than epochs.")

    def rows(self, indices: list[int]) -> Batch:
        """As of [`ImageData`]; reads the stream from its beginning to the last of these rows, and keeps them encoded.

        Raises:
            ValueError: for a row behind the end of the stream.
        """
        indices = [int(index) for index in indices]
        if max(indices, default=-1) >= len(self.head):
            self.head = list(islice(self.source.table, max(indices) + 1))
        if max(indices, default=-1) >= len(self.head):
            raise ValueError(f"Row {max(indices)} was asked for, but the streamed split has {len(self.head)} rows.")
        names, examples = [str(index) for index in indices], [self.head[index] for index in indices]
        return self[Plan(0, None, indices, (self.sample_size, self.sample_size), examples, names)]

    def plans(self, batch_size: int, seed: int, first: int = 0, stride: int = 1) -> Iterator[Plan]:
        number, waiting, epoch = 0, [[] for _ in range(len(self.buckets))], 0
        while True:
            for row, name, example in self._epoch(seed, epoch):
                bucket = 0
                if len(waiting) > 1:
                    bucket = self.buckets.of_image(
                        *self.transform.size(example[self.source.image_column], name, self.greyscale)
                    )
                waiting[bucket].append((row, name, example))
                if len(waiting[bucket]) == batch_size:
                    if number >= first and (number - first) % stride == 0:
                        rows, names, examples = (list(column) for column in zip(*waiting[bucket]))
                        yield Plan(number, seed, rows, self.buckets.size(bucket, number), examples, names)
                    waiting[bucket] = []
                    number += 1
            epoch += 1

    def _epoch(self, seed: int, epoch: int) -> Iterator[tuple[int, str, dict[str, Any]]]:
        """Rows of one epoch: number in the shard, name, and what is stored."""
        # `IterableDataset.shuffle` does not say which row it gives, which a message about a wrong row must.
        random = np.random.default_rng((seed, epoch, 0, 3))
        buffer = []
        for row in self._rows_by_shard(random):
            if len(buffer) < self.buffer_size:
                buffer.append(row)
                continue
            chosen = int(random.integers(self.buffer_size))
            yield buffer[chosen]
            buffer[chosen] = row
        for chosen in random.permutation(len(buffer)):
            yield buffer[chosen]

    def _rows_by_shard(self, random: np.random.Generator) -> Iterator[tuple[int, str, dict[str, Any]]]:
        table, shards = self.source.table, self.source.table.num_shards
        for shard in random.permutation(shards):
            for row, example in enumerate(table.shard(shards, int(shard)) if shards > 1 else table):
                yield row, str(row) if shards == 1 else f"{row} of shard {shard}", example


class _Plans(Sampler[Plan]):
    """An iterator of plans as a sampler."""

    def __init__(self, plans: Iterator[Plan]):
        self.plans = plans

    def __iter__(self) -> Iterator[Plan]:
        return self.plans


def _leave_interrupts_to_parent(worker: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def open_data(
    config: TrainingConfig,
    split: str,
    *,
    sample_size: int,
    channels: int,
    need_labels: bool = False,
    need_captions: bool = False,
    num_classes: int | None = None,
    split_option: str = "dataset_split",
) -> ImageData:
    """Open the data of a training.

    Args:
        config: options; those of data are read.
        split: `train`, `test` or another split of the dataset, see [`open_source`].
        sample_size: height and width of what the network sees, in pixels, of latents when `config.vae` is given.
        channels: of what the network sees: 1 (greyscale), 3 (colour) or the channels of latents.
        need_labels, need_captions: fail where there are none, instead of returning images without.
        num_classes: labels must lie below it; None: classes of the dataset, or the largest integer label plus one.
        split_option: the option that `split` comes from, for error messages.

    Raises:
        ValueError: about an option, dataset, split, column or row that does not exist or is not valid; see
            [`open_source`], [`ImageTransform`], [`Buckets`] and [`latents.open_latents`].
    """
    source = open_source(
        config.dataset,
        split,
        config_name=config.dataset_config_name,
        streaming=config.streaming,
        image_column=config.image_column,
        label_column=config.label_column,
        caption_column=getattr(config, "caption_column", None),
        need_labels=need_labels,
        need_captions=need_captions,
        num_classes=num_classes,
        split_option=split_option,
    )
    if getattr(config, "vae", None) is not None:
        from diffusers_ext.training.latents import open_latents

        return open_latents(config, source, sample_size=sample_size, channels=channels)
    transform = ImageTransform(channels, config.resize_mode, config.random_flip, config.mixed_modes)
    buckets = Buckets(
        tuple(getattr(config, "resolutions", ())) or (sample_size,),
        getattr(config, "aspect_ratio_bucketing", False),
        getattr(config, "bucket_step", 8),
        getattr(config, "max_aspect_ratio", 2.0),
    )
    if config.streaming:
        return StreamedData(source, transform, sample_size, buckets, config.shuffle_buffer_size)
    return ImageData(source, transform, sample_size, buckets)
