"""Data: opening datasets, the order of batches, what happens to an image, and messages about wrong rows."""

import io
from dataclasses import replace
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_ext.training import data as data_module
from diffusers_ext.training.config import UNET_PRESETS, UNetTrainingConfig
from diffusers_ext.training.data import Batch, ImageData, StreamedData, open_data
from diffusers_ext.training.images import ImageTransform, center_crop, convert_mode, fit_image, random_crop


CLASSES = datasets.ClassLabel(names=["a", "b"])


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(params=["in memory", "per batch"])
def decoding(request, monkeypatch):
    if request.param == "per batch":
        monkeypatch.setattr(data_module, "MAX_BYTES_IN_MEMORY", 0)
    return request.param


@pytest.fixture(params=["in memory", "per batch", "streamed"])
def streaming(request, monkeypatch) -> bool:
    """`TrainingConfig.streaming`, with each way of decoding images that are not streamed."""
    if request.param == "per batch":
        monkeypatch.setattr(data_module, "MAX_BYTES_IN_MEMORY", 0)
    return request.param == "streamed"


def config(dataset: str | Path = "digits", **options) -> UNetTrainingConfig:
    return replace(UNET_PRESETS["digits"], dataset=str(dataset), **options)


def encoded(image: Image.Image, kind: str = "png") -> dict:
    file = io.BytesIO()
    image.save(file, kind)
    return {"bytes": file.getvalue(), "path": None}


def numbered(count: int, size: int = 4) -> list[dict]:
    """Greyscale images of one level each, their row number; the top left pixel is white."""
    images = []
    for row in range(count):
        pixels = np.full((size, size), row, dtype=np.uint8)
        pixels[0, 0] = 255
        images.append(encoded(Image.fromarray(pixels)))
    return images


def write(folder: Path, images: list, files: int = 1, split: str = "train", **columns) -> Path:
    """A dataset in parquet; a column may be a list, or (list, type)."""
    features, values = {"image": datasets.Image()}, {"image": images}
    for name, column in columns.items():
        values[name], features[name] = column if isinstance(column, tuple) else (column, None)
        if features[name] is None:
            features[name] = datasets.Dataset.from_dict({name: values[name]}).features[name]
    table = datasets.Dataset.from_dict(values, datasets.Features(features))
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(files):
        table.shard(files, index, contiguous=True).to_parquet(folder / f"{split}-{index:05d}.parquet")
    return folder


def take(data: ImageData, count: int, batch_size: int = 4, **options) -> list[Batch]:
    return list(islice(data.batches(batch_size, seed=0, **options), count))


def assert_same(actual: list[Batch], expected: list[Batch]) -> None:
    assert [batch.rows for batch in actual] == [batch.rows for batch in expected]
    assert [batch.captions for batch in actual] == [batch.captions for batch in expected]
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.images, other.images, rtol=0, atol=0)
        torch.testing.assert_close(one.labels, other.labels, rtol=0, atol=0)


# Where data come from


def test_digits_are_embedded():
    train = open_data(config(), "train", sample_size=8, channels=1, need_labels=True)
    batch = train.rows([3, 0])
    assert len(train) + len(open_data(config(), "test", sample_size=8, channels=1)) == 1797
    assert batch.images.shape == (2, 1, 8, 8) and batch.images.dtype == torch.uint8
    assert batch.labels.tolist() == [3, 0] and train.num_classes == 10 and train.class_names == list("0123456789")
    assert open_data(config(), "train", sample_size=16, channels=3).rows([0]).images.shape == (1, 3, 16, 16)
    assert batch.to("meta").images.device.type == batch.to("meta").labels.device.type == "meta"


def save_parquet_file(table: datasets.Dataset, path: Path) -> Path:
    table.to_parquet(path / "table.parquet")
    return path / "table.parquet"


def save_to_disk(table: datasets.Dataset, path: Path) -> Path:
    table.save_to_disk(path / "saved")
    return path / "saved"


def save_arrow_file(table: datasets.Dataset, path: Path) -> Path:
    return next(save_to_disk(table, path).glob("*.arrow"))


def save_splits_to_disk(table: datasets.Dataset, path: Path) -> Path:
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(path / "splits")
    return path / "splits"


@pytest.mark.parametrize("streaming", [False, True], ids=["on disk", "streamed"])
@pytest.mark.parametrize("save", [save_parquet_file, save_arrow_file, save_to_disk, save_splits_to_disk])
def test_files_and_saved_datasets_are_opened(save, streaming, tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    table = datasets.Dataset.from_dict({"image": numbered(4), "label": [0, 1, 0, 1]}, features)
    options = config(save(table, tmp_path), streaming=streaming)
    data = open_data(options, "train", sample_size=4, channels=1, need_labels=True)
    (batch,) = take(data, 1)
    assert batch.images[:, 0, 3, 3].tolist() == batch.rows and batch.labels.tolist() == [r % 2 for r in batch.rows]
    assert data.class_names == ["a", "b"]
    with pytest.raises(ValueError, match=r"`dataset_split` \('valid'\) must be one of \['train'"):
        open_data(options, "valid", sample_size=4, channels=1)


def test_images_in_class_folders_are_read(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        Image.new("L", (4, 4)).save(tmp_path / "pets" / name / "0.png")
    data = open_data(config(tmp_path / "pets"), "train", sample_size=4, channels=1, need_labels=True)
    assert sorted(data.rows([0, 1]).labels.tolist()) == [0, 1] and data.class_names == ["cat", "dog"]


@pytest.mark.parametrize("streaming", [False, True], ids=["on disk", "streamed"])
def test_captions_beside_a_folder_of_images_are_read(streaming, tmp_path):
    folder = tmp_path / "captioned"
    folder.mkdir()
    for row in range(3):
        Image.new("L", (4, 4), row).save(folder / f"{row}.png")
    (folder / "metadata.csv").write_text("file_name,text\n0.png,nought\n1.png,one\n2.png,two\n")
    data = open_data(config(folder, streaming=streaming), "train", sample_size=4, channels=1, need_captions=True)
    (batch,) = take(data, 1, batch_size=3)
    words = ["nought", "one", "two"]
    assert sorted(batch.captions) == words and batch.captions == [words[i] for i in batch.images[:, 0, 0, 0]]
    assert batch.labels is None and data.num_classes is None


def test_only_the_files_of_a_configuration_are_read(tmp_path):
    write(tmp_path / "d" / "small", numbered(2))
    write(tmp_path / "d" / "large", numbered(5))
    card = "".join(f"- config_name: {name}\n  data_dir: {name}\n" for name in ("small", "large"))
    (tmp_path / "d" / "README.md").write_text(f"---\nconfigs:\n{card}---\n")
    large = config(tmp_path / "d", dataset_config_name="large")
    assert len(open_data(large, "train", sample_size=4, channels=1)) == 5
    assert len(open_data(large, "train[:2]", sample_size=4, channels=1)) == 2
    with pytest.raises(ValueError, match="`dataset` .* cannot be opened: .*[Cc]onfig"):
        open_data(config(tmp_path / "d"), "train", sample_size=4, channels=1)


def test_columns_are_found_by_their_type(decoding, tmp_path):
    colours = [encoded(Image.new("RGB", (4, 4), colour)) for colour in ("white", "black")]
    folder = write(tmp_path / "d", colours, target=([0, 1], datasets.ClassLabel(names=["white", "black"])))
    data = open_data(config(folder), "train", sample_size=4, channels=1)
    batch = data.rows([1, 0])
    assert (data.decoded is None) == (decoding == "per batch")
    assert batch.images.flatten(1).unique(dim=1).tolist() == [[0], [255]]
    assert batch.labels.tolist() == [1, 0] and data.num_classes == 2


def test_labels_can_be_integers_or_missing(tmp_path):
    folder = write(tmp_path / "d", numbered(2), group=[3, 0])
    assert open_data(config(folder), "train", sample_size=4, channels=3).rows([0]).labels is None
    data = open_data(config(folder, label_column="group"), "train", sample_size=4, channels=3)
    assert data.rows([0, 1]).labels.tolist() == [3, 0] and data.num_classes == 4
    with pytest.raises(ValueError, match=r"label of row 0 \(3\) is out of range: .* \[0, 2\]"):
        open_data(config(folder, label_column="group"), "train", sample_size=4, channels=3, num_classes=3)


def test_unknown_labels_matter_only_where_labels_are_needed(tmp_path):
    folder = write(tmp_path / "two", numbered(2), fine=([1, 0], CLASSES), coarse=([0, 0], CLASSES))
    assert open_data(config(folder), "train", sample_size=4, channels=1).rows([0]).labels is None
    with pytest.raises(ValueError, match="`label_column` must be given: .* 2 have the type ClassLabel"):
        open_data(config(folder), "train", sample_size=4, channels=1, need_labels=True)
    folder = write(tmp_path / "d", numbered(2), label=([None, None], datasets.ClassLabel(names=["a", "b"])))
    assert open_data(config(folder), "train", sample_size=4, channels=1).rows([0]).labels is None
    with pytest.raises(ValueError, match="label of row 0 .* is missing"):
        open_data(config(folder), "train", sample_size=4, channels=1, need_labels=True)


# Order


def test_every_epoch_holds_every_row_in_an_order_of_its_own(tmp_path):
    data = open_data(config(write(tmp_path / "d", numbered(10))), "train", sample_size=4, channels=1)
    rows = sum((batch.rows for batch in take(data, 5)), [])
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10))
    assert rows[:10] != rows[10:] and rows[:10] != list(range(10))
    assert rows != sum((batch.rows for batch in islice(data.batches(4, seed=1), 5)), [])


@pytest.mark.parametrize("files", [1, 3])
def test_every_epoch_of_a_stream_holds_every_row(files, tmp_path):
    options = config(write(tmp_path / "d", numbered(12), files), streaming=True, shuffle_buffer_size=5)
    data = open_data(options, "train", sample_size=4, channels=1)
    levels = torch.cat([batch.images[:, 0, 3, 3] for batch in take(data, 6)]).tolist()
    assert sorted(levels[:12]) == sorted(levels[12:]) == list(range(12))
    assert levels[:12] != levels[12:] and levels[:12] != list(range(12))


STREAMED = {"streaming": True, "shuffle_buffer_size": 7}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"resize_mode": "random_crop"},
        {"resolutions": (4, 8)},
        STREAMED,
        STREAMED | {"aspect_ratio_bucketing": True, "resolutions": (16, 32)},
    ],
    ids=lambda options: ", ".join(options) or "default",
)
def test_processes_resumed_runs_and_workers_share_the_batches_of_one(options, decoding, tmp_path):
    labels = ([row % 3 for row in range(10)], datasets.ClassLabel(3))
    captions = [[f"{row}", f"number {row}"] for row in range(10)]
    folder = write(tmp_path / "d", numbered(10, size=9), files=2, label=labels, text=captions)
    options = config(folder, random_flip=True, caption_column="text", **options)
    data = open_data(options, "train", sample_size=8, channels=1, need_labels=True)
    expected = take(data, 9)
    ranks = [take(data, 3, first=3 + rank, stride=2) for rank in range(2)]
    assert_same([batch for turn in zip(*ranks) for batch in turn], expected[3:])
    again = open_data(options, "train", sample_size=8, channels=1, need_labels=True)
    random_state = torch.get_rng_state()
    assert_same(take(again, 7, first=2, num_workers=2), expected[2:])
    torch.testing.assert_close(torch.get_rng_state(), random_state)
    assert {len(text) for batch in expected for text in batch.captions} == {1, 8}  # either caption is seen
    for batch in expected:
        assert [int(text[-1]) % 3 for text in batch.captions] == batch.labels.tolist()


def test_a_stream_has_no_length_but_rows_from_its_beginning():
    data = open_data(config(streaming=True), "train", sample_size=8, channels=1, need_labels=True)
    assert type(data) is StreamedData
    with pytest.raises(TypeError, match="length of streamed data is not known"):
        len(data)
    on_disk = open_data(config(), "train", sample_size=8, channels=1, need_labels=True)
    for rows in ([5, 2], [20, 0]):
        assert_same([data.rows(rows)], [on_disk.rows(rows)])
    with pytest.raises(ValueError, match="Row 5000 was asked for, but the streamed split has 1500 rows"):
        data.rows([5000])


# From a stored image to pixels


@pytest.mark.parametrize(
    "width, height, size, box",
    [
        (28, 28, 32, (2, 2, 30, 30)),  # padded
        (8, 8, 32, (0, 0, 32, 32)),  # four times as large
        (10, 5, 32, (1, 8, 31, 23)),  # three times, then padded
        (100, 50, 32, (0, 0, 32, 32)),  # the middle
    ],
)
def test_white_images_fill_the_expected_box(width, height, size, box):
    pixels = np.asarray(fit_image(Image.new("L", (width, height), 255), size))
    expected = np.zeros((size, size), dtype=np.uint8)
    expected[box[1] : box[3], box[0] : box[2]] = 255
    np.testing.assert_array_equal(pixels, expected)


def test_center_crop_halves_by_boxes_and_then_resizes():
    pixels = np.random.default_rng(0).integers(0, 256, (50, 83), dtype=np.uint8)
    image = Image.fromarray(pixels)
    halved = image.resize((41, 25), Image.Resampling.BOX)  # 16 pixels fit twice into 50, but not into 25
    boxes = np.asarray(image.crop((0, 0, 82, 50)).resize((41, 25), Image.Resampling.BOX))
    np.testing.assert_allclose(boxes, pixels[:, :82].reshape(25, 2, 41, 2).mean((1, 3)), atol=1)
    covering = np.asarray(halved.resize((26, 16), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(np.asarray(center_crop(image, 16)), covering[:, 5:21])
    assert center_crop(Image.new("L", (3, 5)), 16).size == (16, 16)  # enlarged
    assert center_crop(Image.new("L", (100, 100)), (8, 24)).size == (24, 8)


def test_random_crops_keep_most_of_the_shorter_side_anywhere():
    ramp = Image.fromarray(np.broadcast_to(np.arange(200, dtype=np.uint8), (100, 200)).copy())
    crops = [np.asarray(random_crop(ramp, 20, u)) for u in np.random.default_rng(0).random((300, 3))]
    left, right = (np.array([crop[10, column] for crop in crops], dtype=float) for column in (0, -1))
    assert {crop.shape for crop in crops} == {(20, 20)}
    assert left.min() < 5 and right.max() > 194  # reaches both ends
    seen = (right - left) * 20 / 19
    assert 78 < seen.min() < 84 and 96 < seen.max() < 102  # of a shorter side of 100


def test_half_of_the_images_are_mirrored(decoding, tmp_path):
    folder = write(tmp_path / "d", numbered(200))
    (batch,) = take(open_data(config(folder, random_flip=True), "train", sample_size=4, channels=1), 1, batch_size=200)
    mirrored = batch.images[:, 0, 0, 3] == 255
    assert torch.equal(batch.images[:, 0, 0, 0] == 255, ~mirrored)
    assert 70 < mirrored.sum() < 130
    (batch,) = take(open_data(config(folder), "train", sample_size=4, channels=1), 1, batch_size=200)
    assert (batch.images[:, 0, 0, 0] == 255).all()


def sixteen_bits() -> Image.Image:
    return Image.fromarray(np.full((4, 4), 128 * 257, dtype=np.uint16))


@pytest.mark.parametrize(
    "image, grey, colour",
    [
        (Image.new("1", (4, 4), 1), 255, (255, 255, 255)),
        (Image.new("L", (4, 4), 7), 7, (7, 7, 7)),
        (sixteen_bits(), 128, (128, 128, 128)),
        (Image.new("LA", (4, 4), (0, 0)), 255, (255, 255, 255)),  # transparent over white
        (Image.new("RGBA", (4, 4), (255, 0, 0, 0)), 255, (255, 255, 255)),
        (Image.new("RGBA", (4, 4), (255, 0, 0, 255)), 76, (255, 0, 0)),
        (Image.new("RGB", (4, 4), (0, 255, 0)).quantize(), 150, (0, 255, 0)),
        (Image.new("CMYK", (4, 4), (0, 255, 255, 0)), 76, (255, 0, 0)),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else "",
)
def test_every_mode_becomes_greyscale_or_colour(image, grey, colour):
    assert convert_mode(image, 1).getpixel((1, 1)) == pytest.approx(grey, abs=1)
    assert convert_mode(image, 3).getpixel((1, 1)) == colour


def test_the_first_frame_of_an_animation_is_taken_and_rotated_photos_are_turned():
    file = io.BytesIO()
    frames = [Image.new("L", (4, 4), level) for level in (10, 200)]
    frames[0].save(file, "gif", save_all=True, append_images=frames[1:])
    assert ImageTransform(1)({"bytes": file.getvalue(), "path": None}, (4, 4), 0).max() == 10
    photo, file = Image.new("L", (4, 2)), io.BytesIO()
    photo.putpixel((0, 0), 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: the top left pixel goes to the top right
    photo.save(file, "png", exif=exif)
    stored = {"bytes": file.getvalue(), "path": None}
    assert ImageTransform(1).size(stored, 0) == (4, 2)
    assert ImageTransform(1)(stored, (4, 2), 0)[0, 0].tolist() == [0, 255]


# Wrong data


GREY, COLOUR = encoded(Image.new("L", (4, 4))), encoded(Image.new("RGB", (4, 4), "red"))
BROKEN = {"bytes": encoded(Image.effect_noise((64, 64), 50))["bytes"][:400], "path": None}


@pytest.mark.parametrize(
    "rows, options, message",
    [
        ([GREY, GREY, BROKEN], {}, "image of row 2 cannot be read: .*Remove or replace"),
        ([GREY, {"bytes": b"", "path": None}], {}, "image of row 1 cannot be read"),
        ([GREY, None, GREY], {}, "image of row 1 cannot be read: there is none"),
        ([None, GREY], {}, "image of row 0 cannot be read: there is none"),
        ([GREY, GREY, COLOUR, GREY], {}, r"image of row 2 is a colour one \(mode 'RGB'\), but row 0 is grey.*`mixed_"),
        ([COLOUR, GREY], {}, r"image of row 1 is a greyscale one \(mode 'L'\), but row 0 is colour"),
        ([encoded(Image.new("F", (4, 4)), "tiff")], {"mixed_modes": "convert"}, "row 0 cannot be read: its mode 'F'"),
    ],
)
def test_a_wrong_image_is_named(rows, options, message, streaming, tmp_path):
    options = config(write(tmp_path / "d", rows), streaming=streaming, **options)
    with pytest.raises(ValueError, match=message):
        take(open_data(options, "train", sample_size=4, channels=1), 4, batch_size=1)


def test_a_missing_file_is_named(streaming, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for row in range(2):
        Image.new("L", (4, 4)).save(folder / f"{row}.png")
    (folder / "metadata.csv").write_text("file_name,text\n0.png,a\n1.png,b\ngone.png,c\n")
    with pytest.raises(ValueError, match=r"image of row 2 \(.*gone.png\) cannot be read: .*No such file"):
        take(open_data(config(folder, streaming=streaming), "train", sample_size=4, channels=1), 3, batch_size=1)


def test_a_wrong_image_is_named_by_a_worker_and_with_its_shard(tmp_path):
    folder = write(tmp_path / "d", [GREY, GREY, GREY, BROKEN], files=2)
    data = open_data(config(folder, streaming=True), "train", sample_size=4, channels=1)
    with pytest.raises(ValueError, match="image of row 1 of shard 1 cannot be read"):
        take(data, 4, batch_size=1, num_workers=1)


def test_greyscale_and_colour_images_can_be_mixed_if_asked_for(streaming, tmp_path):
    options = config(write(tmp_path / "d", [GREY, COLOUR]), mixed_modes="convert", streaming=streaming)
    (batch,) = take(open_data(options, "train", sample_size=4, channels=3), 1, batch_size=2)
    assert sorted(batch.images[:, :, 0, 0].tolist()) == [[0, 0, 0], [255, 0, 0]]


@pytest.mark.parametrize(
    "columns, options, message",
    [
        ({}, {"split": "test"}, r"`dataset_split` \('test'\) must be one of \['train'\]"),
        ({}, {"image_column": "picture"}, r"`image_column` \('picture'\) must be a column of .* \['image'"),
        ({}, {"need_labels": True}, r"`label_column` must be given: .* 0 have the type ClassLabel"),
        ({"label": ["a", "b"]}, {"label_column": "label"}, r"`label_column` \('label'\) holds .*string"),
        ({"label": [0, -1]}, {"label_column": "label"}, r"label of row 1 \(-1\) is out of range: .* \[0, 0\]"),
        ({"label": [0, None]}, {"label_column": "label"}, r"label of row 1 \(`label_column` 'label'\) is missing"),
        ({"label": ([1, -1], CLASSES)}, {"need_labels": True}, r"label of row 1 \(-1\) is out of range: .* 2 classes"),
        ({}, {"channels": 2}, r"`in_channels` \(2\) must be 1 .* or 3"),
        ({}, {"need_captions": True}, r"`caption_column` must be given: .* 0 have the type string"),
        ({"n": [0, 1]}, {"caption_column": "n"}, r"`caption_column` \('n'\) holds .*int64.*; it must hold texts"),
        ({"text": ["a", None]}, {"need_captions": True}, r"caption of row 1 \(`caption_column` 'text'\) is None"),
        ({"text": [["a"], []]}, {"caption_column": "text"}, r"caption of row 1 .* is \[\]; it must be a text or a"),
        ({"text": [["a"], ["b", None]]}, {"caption_column": "text"}, r"caption of row 1 .* is \['b', None\]"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True], ids=["on disk", "streamed"])
def test_wrong_options_and_columns_are_refused(columns, options, message, streaming, tmp_path):
    integers = isinstance(columns.get("label"), list) and not isinstance(columns["label"][0], str)
    if streaming and integers:
        message = "of streamed integers the number of classes is not known"
    arguments = {name: options[name] for name in options if name in ("channels", "need_labels", "need_captions")}
    fields = {name: options[name] for name in options if name.endswith("column")}
    options_of_run = config(write(tmp_path / "d", numbered(2), **columns), streaming=streaming, **fields)
    with pytest.raises(ValueError, match=message):
        arguments = {"sample_size": 4, "channels": 1} | arguments
        take(open_data(options_of_run, options.get("split", "train"), **arguments), 2, batch_size=1)


@pytest.mark.parametrize("streaming", [False, True], ids=["on disk", "streamed"])
def test_an_empty_or_absent_dataset_is_refused(streaming, tmp_path):
    folder = write(tmp_path / "d", [])
    (tmp_path / "nothing").mkdir()
    (tmp_path / "table.csv").write_text("image\n")
    for name, message in {
        folder: r"`dataset_split` \('train'\) .*is empty",
        tmp_path / "nothing": "`dataset` .* cannot be opened: .*doesn't contain any data files",
        tmp_path / "gone": "`dataset` .* looks like a local file or folder, but there is none",
        tmp_path / "table.csv": "`dataset` .* must end in .parquet or .arrow",
    }.items():
        with pytest.raises(ValueError, match=message):
            open_data(config(name, streaming=streaming), "train", sample_size=4, channels=1)


def test_large_data_are_opened_without_decoding(monkeypatch, tmp_path):
    monkeypatch.setattr(data_module, "MAX_ENCODED_BYTES", 0)
    data = open_data(config(write(tmp_path / "d", [GREY, BROKEN, GREY])), "train", sample_size=4, channels=1)
    assert data.rows([0, 2]).images.shape == (2, 1, 4, 4)
    with pytest.raises(ValueError, match="image of row 1 cannot be read"):
        data.rows([2, 1])
