"""Which rows make which batch, and of which size: endless order, aspect-ratio buckets, several resolutions."""

import math

import numpy as np


# Batches in a row that share a resolution: all processes of a step see one while their number divides it.
RESOLUTION_RUN = 8


class Buckets:
    """Sizes that batches can have. Every image belongs to the bucket whose aspect ratio is nearest to its own.

    A bucket has one size per resolution, of at most as many pixels as the square and within a step of it; batches
    take the resolutions in turn, eight in a row each, so that batches of one step cost the same on up to eight
    processes. Buckets by area: NovelAI (2022), https://github.com/NovelAI/novelai-aspect-ratio-bucketing.

    Args:
        resolutions: sides of the squares, in pixels.
        aspect_ratio_bucketing: False leaves the squares only.
        step: sides of other sizes are multiples of it, in pixels.
        max_aspect_ratio: longer side over shorter side of the longest size.

    Raises:
        ValueError: for no resolution, one that is no multiple of `step`, or a `max_aspect_ratio` below 1.
    """

    def __init__(
        self,
        resolutions: tuple[int, ...],
        aspect_ratio_bucketing: bool = False,
        step: int = 8,
        max_aspect_ratio: float = 2.0,
    ):
        if not resolutions or min(resolutions) < 1:
            raise ValueError(f"`resolutions` ({resolutions}) must be sizes in pixels, at least 1.")
        squares = [[(side, side)] for side in resolutions]
        if aspect_ratio_bucketing:
            if step < 1 or any(side % step for side in resolutions):
                raise ValueError(
                    f"`bucket_step` ({step}) must divide `resolutions` and `sample_size` ({resolutions}): the "
                    "sides of all sizes are its multiples."
                )
            if max_aspect_ratio < 1:
                raise ValueError(
                    f"`max_aspect_ratio` ({max_aspect_ratio}) is longer over shorter side, so at least 1."
                )
            squares = [bucket_sizes(side, step, max_aspect_ratio) for side in resolutions]
        # The coarsest list of aspect ratios names the buckets.
        self.ratios = [_log_ratio(*size) for size in min(squares, key=len)]
        self.sizes = [[min(s, key=lambda size: abs(_log_ratio(*size) - r)) for s in squares] for r in self.ratios]

    def __len__(self) -> int:
        return len(self.sizes)

    def of_image(self, height: int, width: int) -> int:
        """Bucket of an image of that height and width."""
        return int(np.argmin(np.abs(np.array(self.ratios) - _log_ratio(height, width))))

    def size(self, bucket: int, number: int) -> tuple[int, int]:
        """Height and width in pixels of batch `number`, which comes from `bucket`."""
        sizes = self.sizes[bucket]
        return sizes[number // RESOLUTION_RUN % len(sizes)]


def bucket_sizes(side: int, step: int, max_aspect_ratio: float) -> list[tuple[int, int]]:
    """Heights and widths, multiples of `step`, of at most `side**2` pixels and of at most that aspect ratio.

    >>> bucket_sizes(32, 8, 2.0)
    [(24, 40), (32, 32), (40, 24)]
    """
    sizes = {(side, side)}
    for short in range(step, side, step):
        long = side * side // short // step * step
        if long / short <= max_aspect_ratio:
            sizes |= {(short, long), (long, short)}
    return sorted(sizes)


def _log_ratio(height: int, width: int) -> float:
    return math.log(width / height)


class BatchOrder:
    """Endless batches of row numbers, each from one bucket, addressable by number.

    Every bucket is an endless sequence of permutations of its rows, cut into batches, so that no row is left out and
    all are seen equally often; a batch may reach into the next permutation. In the epoch e, counted from 0, come
    those batches of a bucket of n rows that are full after e + 1 epochs: numbers floor(e n / B) to
    floor((e + 1) n / B), buckets shuffled. So rows that do not fill a batch wait for the next epoch, and a bucket of
    fewer rows than a batch repeats them within it.

    Args:
        buckets: row numbers of each.
        batch_size: rows per batch, B.
        seed: of all permutations, not negative.
    """

    def __init__(self, buckets: list[np.ndarray], batch_size: int, seed: int):
        self.buckets = [(index, rows) for index, rows in enumerate(buckets) if len(rows)]
        self.lengths = np.array([len(rows) for _, rows in self.buckets])
        self.batch_size, self.seed = batch_size, seed
        self.permutations = [Permutations(len(rows), seed, index) for index, rows in self.buckets]
        self.epoch, self.turns = -1, np.empty(0)

    def __getitem__(self, number: int) -> tuple[int, list[int]]:
        """Bucket and rows of one batch."""
        epoch = number * self.batch_size // int(self.lengths.sum())  # or a little later
        while self._batches_before(epoch + 1).sum() <= number:
            epoch += 1
        before = self._batches_before(epoch)
        if epoch != self.epoch:
            turns = np.repeat(np.arange(len(self.lengths)), self._batches_before(epoch + 1) - before)
            self.epoch, self.turns = epoch, np.random.default_rng((self.seed, epoch, 0, 2)).permutation(turns)
        offset = number - int(before.sum())
        turn = self.turns[offset]
        batch = int(before[turn] + np.count_nonzero(self.turns[:offset] == turn))
        positions = range(batch * self.batch_size, (batch + 1) * self.batch_size)
        bucket, rows = self.buckets[turn]
        return bucket, [int(rows[i]) for i in self.permutations[turn][positions]]

    def _batches_before(self, epoch: int) -> np.ndarray:
        return epoch * self.lengths // self.batch_size


class Permutations:
    """Endless sequence of permutations of `range(length)`, one after the other.

    Args:
        length: of each.
        seed, stream: the permutation of an epoch depends on (seed, epoch, stream) only.
    """

    def __init__(self, length: int, seed: int, stream: int):
        self.length, self.seed, self.stream, self.cached = length, seed, stream, {}

    def __getitem__(self, positions: range) -> list[int]:
        """What stands at `positions`, which are contiguous."""
        return [int(self._permutation(p // self.length)[p % self.length]) for p in positions]

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch not in self.cached:
            order = np.random.default_rng((self.seed, epoch, self.stream)).permutation(self.length)
            self.cached = {k: v for k, v in self.cached.items() if k == epoch - 1} | {epoch: order}
        return self.cached[epoch]
