"""Buckets: sizes of batches, which rows they hold, and that nothing is left out."""

from collections import Counter
from dataclasses import replace
from itertools import islice

import datasets
import numpy as np
import pytest
from PIL import Image

from diffusers_ext.training.buckets import RESOLUTION_RUN, BatchOrder, Buckets, bucket_sizes
from diffusers_ext.training.config import UNET_PRESETS
from diffusers_ext.training.data import open_data


@pytest.mark.parametrize("side, step, ratio", [(64, 8, 2.0), (256, 64, 3.0), (32, 16, 1.0), (96, 4, 1.5)])
def test_sizes_have_about_the_area_of_the_square(side, step, ratio):
    sizes = bucket_sizes(side, step, ratio)
    assert (side, side) in sizes and sorted((w, h) for h, w in sizes) == sizes
    for height, width in sizes:
        assert height % step == width % step == 0
        assert height * width <= side**2 < (min(height, width)) * (max(height, width) + step)
        assert max(height, width) <= ratio * min(height, width)


def test_an_image_belongs_to_the_nearest_aspect_ratio():
    buckets = Buckets((32,), True, step=8, max_aspect_ratio=2.0)
    assert buckets.sizes == [[(40, 24)], [(32, 32)], [(24, 40)]] or buckets.sizes == [
        [(24, 40)],
        [(32, 32)],
        [(40, 24)],
    ]
    size_of = {image: buckets.size(buckets.of_image(*image), 0) for image in [(50, 60), (30, 50), (500, 100), (7, 7)]}
    assert size_of == {(50, 60): (32, 32), (30, 50): (24, 40), (500, 100): (40, 24), (7, 7): (32, 32)}


def test_resolutions_come_in_turns_and_keep_the_aspect_ratio():
    buckets = Buckets((32, 64), True, step=8, max_aspect_ratio=2.0)
    wide = buckets.of_image(30, 50)
    assert buckets.size(wide, 0) == (24, 40) and buckets.size(wide, RESOLUTION_RUN) == (48, 80)
    assert [buckets.size(wide, n)[0] for n in range(4 * RESOLUTION_RUN)] == (
        [24] * RESOLUTION_RUN + [48] * RESOLUTION_RUN
    ) * 2
    assert len(Buckets((16, 24))) == 1 and Buckets((16, 24)).size(0, RESOLUTION_RUN) == (24, 24)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"resolutions": (0, 8)}, r"`resolutions` \(\(0, 8\)\) must be sizes in pixels"),
        ({"resolutions": (20,)}, r"`bucket_step` \(8\) must divide `resolutions`"),
        ({"resolutions": (16,), "step": 0}, r"`bucket_step` \(0\) must divide"),
        ({"resolutions": (16,), "max_aspect_ratio": 0.5}, r"`max_aspect_ratio` \(0.5\) .* at least 1"),
    ],
)
def test_wrong_options_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Buckets(**{"aspect_ratio_bucketing": True} | arguments)


def test_rows_of_every_bucket_are_seen_equally_often_and_none_is_left_out():
    members = [np.arange(0, 13), np.arange(13, 50), np.empty(0, dtype=int), np.arange(50, 53)]
    order = BatchOrder(members, batch_size=4, seed=0)
    batches = [order[number] for number in range(12 * 53 // 4)]  # twelve epochs
    for bucket, rows in batches:
        assert set(rows) <= set(members[bucket].tolist())
    seen = Counter(row for _, rows in batches for row in rows)
    assert set(seen) == set(range(53)) and set(seen.values()) <= {11, 12, 13}
    for index in (0, 1):  # each bucket is a sequence of permutations
        rows = [row for bucket, rows in batches for row in rows if bucket == index]
        assert sorted(rows[: len(members[index])]) == members[index].tolist()
    buckets = [bucket for bucket, _ in batches]
    assert buckets[:12].count(1) in (8, 9) and len(set(buckets[:12])) == 2  # shuffled within the epoch
    assert BatchOrder(members, 4, seed=0)[100] == batches[100]  # addressed without those before
    assert [order[number] for number in (70, 3, 71)] == [batches[70], batches[3], batches[71]]


def test_batches_larger_than_the_dataset_repeat_it():
    order = BatchOrder([np.arange(3)], batch_size=8, seed=1)
    for number in range(5):
        assert set(Counter(order[number][1]).values()) <= {2, 3, 4}


@pytest.fixture
def shapes(tmp_path, monkeypatch):
    """Twelve images, wide, tall and square in turn, whose level is their row number."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    sizes = [(50, 30), (30, 50), (40, 40)]
    images = [Image.new("L", sizes[row % 3], row) for row in range(12)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(3)})
    (tmp_path / "d").mkdir()
    table = datasets.Dataset.from_dict({"image": images, "label": [row % 3 for row in range(12)]}, features)
    table.to_parquet(tmp_path / "d" / "train-0.parquet")
    return replace(UNET_PRESETS["digits"], dataset=str(tmp_path / "d"), resize_mode="center_crop")


@pytest.mark.parametrize("streaming", [False, True], ids=["on disk", "streamed"])
def test_batches_have_one_size_each_and_hold_every_row_once_an_epoch(streaming, shapes):
    options = replace(shapes, streaming=streaming, shuffle_buffer_size=4, aspect_ratio_bucketing=True)
    data = open_data(options, "train", sample_size=32, channels=1, need_labels=True)
    batches = list(islice(data.batches(2, seed=0), 12))
    for batch in batches:
        assert tuple(batch.images.shape[2:]) == [(24, 40), (40, 24), (32, 32)][batch.labels[0]]
        assert len(set(batch.labels.tolist())) == 1
        assert batch.images.flatten(1).unique(dim=1).flatten().tolist() == batch.rows
    for epoch in (batches[:6], batches[6:]):
        assert sorted(row for batch in epoch for row in batch.rows) == list(range(12))
    if not streaming:
        assert data.rows([0, 1, 2]).images.shape == (3, 1, 32, 32)


def test_several_resolutions_without_aspect_ratios_are_squares(shapes):
    data = open_data(replace(shapes, resolutions=(8, 16)), "train", sample_size=16, channels=3)
    sizes = [tuple(batch.images.shape[1:]) for batch in islice(data.batches(3, seed=0), 2 * RESOLUTION_RUN)]
    assert sizes == [(3, 8, 8)] * RESOLUTION_RUN + [(3, 16, 16)] * RESOLUTION_RUN
