"""Latents: what is kept of a dataset, that it is computed once, and what a kill or another option does to it."""

import json
import multiprocessing
import os
import signal
from dataclasses import replace
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffusers import AutoencoderKL

from diffusers_ext.training import latents as latents_module
from diffusers_ext.training.config import UNET_PRESETS, UNetTrainingConfig
from diffusers_ext.training.data import Batch, open_data
from diffusers_ext.training.latents import LatentData, shard_path


ROWS = 10


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    monkeypatch.setattr(latents_module, "SHARD_ROWS", 4)
    monkeypatch.setattr(latents_module, "ENCODER_BATCH", 3)


def save_vae(folder: Path, seed: int = 0, **options) -> str:
    torch.manual_seed(seed)
    options = {"scaling_factor": 0.5, "shift_factor": 0.25, "in_channels": 3, "out_channels": 3} | options
    sizes = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 2, "sample_size": 16}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    AutoencoderKL(**sizes, **blocks, **options).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def config(tmp_path, monkeypatch) -> UNetTrainingConfig:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    random = np.random.default_rng(0)
    images = [Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(ROWS)]
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(5), "text": datasets.Value("string")}
    labels, captions = [row % 5 for row in range(ROWS)], [f"number {row}" for row in range(ROWS)]
    columns = {"image": images, "label": labels, "text": captions}
    (tmp_path / "d").mkdir()
    table = datasets.Dataset.from_dict(columns, datasets.Features(features))
    table.to_parquet(tmp_path / "d" / "train-0.parquet")
    paths = {"dataset": str(tmp_path / "d"), "output_dir": str(tmp_path / "run"), "vae": save_vae(tmp_path / "vae")}
    return replace(UNET_PRESETS["digits"], **paths)


def open_latents(config: UNetTrainingConfig) -> LatentData:
    data = open_data(config, "train", sample_size=8, channels=2, need_labels=True, need_captions=True)
    assert (
        data.latents and data.sample_size == 8 and data.channels == 2 and data.num_classes == 5 and len(data) == ROWS
    )
    return data


def take(data: LatentData, count: int, **options) -> list[Batch]:
    return list(islice(data.batches(4, seed=0, **options), count))


def encoded(config: UNetTrainingConfig, mirrored: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of every row, straight from the images."""
    images = open_data(replace(config, vae=None), "train", sample_size=16, channels=3).rows(range(ROWS)).images
    vae = AutoencoderKL.from_pretrained(config.vae)
    with torch.no_grad():
        gaussian = vae.encode((images.flip(3) if mirrored else images).float() / 127.5 - 1).latent_dist
    return gaussian.mean, gaussian.std


def test_rows_are_the_scaled_means(config):
    batch = open_latents(config).rows([7, 2])
    assert batch.images.dtype == torch.float32 and batch.images.shape == (2, 2, 8, 8)
    torch.testing.assert_close(batch.images, (encoded(config)[0][[7, 2]] - 0.25) * 0.5, rtol=1e-3, atol=1e-3)
    assert batch.labels.tolist() == [2, 2] and batch.captions == ["number 7", "number 2"]


def test_batches_are_drawn_anew_from_the_gaussian_of_each_row(config):
    mean, std = encoded(config)
    batches = take(open_latents(config), 200)
    noise = torch.cat([((b.images / 0.5 + 0.25) - mean[b.rows]) / std[b.rows] for b in batches])
    assert noise.mean().abs() < 0.02 and (noise.std() - 1).abs() < 0.02
    assert sorted(sum((b.rows for b in batches[:5]), [])) == sorted([*range(ROWS)] * 2)


def test_half_of_the_rows_are_mirrored_on_request(config):
    config = replace(config, random_flip=True)
    data = open_latents(config)
    means = torch.stack([encoded(config)[0], encoded(config, mirrored=True)[0]])
    latents = torch.cat([b.images / 0.5 + 0.25 for b in take(data, 50)])
    rows = sum((b.rows for b in take(data, 50)), [])
    nearest = (latents - means[:, rows]).square().flatten(2).mean(2).argmin(0)
    assert 70 < nearest.sum() < 130
    torch.testing.assert_close(data.rows([0]).images, (means[0, :1] - 0.25) * 0.5, rtol=1e-3, atol=1e-3)


def test_processes_resumed_runs_and_workers_share_the_batches_of_one(config):
    data = open_latents(replace(config, random_flip=True))
    expected = take(data, 6)
    ranks = [take(data, 2, first=2 + rank, stride=2) for rank in range(2)]
    shared = [batch for turn in zip(*ranks) for batch in turn]
    for one, other in zip(expected + expected[2:], take(data, 6, num_workers=2) + shared, strict=True):
        assert one.rows == other.rows and one.captions == other.captions
        torch.testing.assert_close(one.images, other.images, rtol=0, atol=0)


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}


def test_latents_are_computed_once_and_unfinished_ones_completed(config):
    folder = open_latents(config).folder
    assert folder.parent == Path(config.output_dir) / "latents"
    before, expected = times(folder), open_latents(config).rows(range(ROWS)).images
    assert len(before) == 3 and times(folder) == before
    assert json.loads((folder / "config.json").read_text())["rows"] == ROWS
    shard_path(folder, 0).unlink()
    shard_path(folder, 1).write_bytes(shard_path(folder, 1).read_bytes()[:200])  # as a power failure leaves it
    torch.testing.assert_close(open_latents(config).rows(range(ROWS)).images, expected, rtol=0, atol=0)
    after = times(folder)
    assert after.keys() == before.keys() and [n for n in after if after[n] == before[n]] == [
        "latents-00002.safetensors"
    ]


def test_another_option_never_meets_latents_that_were_made_without_it(config, tmp_path):
    changes = [
        {},
        {"random_flip": True},
        {"resize_mode": "center_crop"},
        {"mixed_modes": "convert"},
        {"dataset_split": "train[:9]"},
        {"vae": save_vae(tmp_path / "other", seed=1)},
        {"vae": save_vae(tmp_path / "unscaled", scaling_factor=1.0)},
    ]
    folders = set()
    for change in changes:
        changed = replace(config, **change)
        folders.add(open_data(changed, changed.dataset_split, sample_size=8, channels=2).folder)
    folders.add(open_data(config, "train", sample_size=4, channels=2).folder)
    assert len(folders) == len(changes) + 1
    again = replace(config, learning_rate=1.0, train_batch_size=2)
    assert open_data(again, "train", sample_size=8, channels=2).folder in folders
    names = load_file(shard_path(open_latents(replace(config, random_flip=True)).folder, 0)).keys()
    assert names == {"mean", "std", "mean_mirrored", "std_mirrored"}


def killed_in_the_second_file(config: UNetTrainingConfig) -> None:
    """In a process of its own: encode until the second file is about to be written."""
    latents_module.SHARD_ROWS, latents_module.ENCODER_BATCH = 4, 3
    save = latents_module.save_file

    def save_once(tensors, path):
        if path.name.startswith("latents-00001"):
            os.kill(os.getpid(), signal.SIGKILL)
        save(tensors, path)

    latents_module.save_file = save_once
    open_latents(config)


def test_a_killed_run_goes_on_with_the_file_it_was_at(config):
    process = multiprocessing.get_context("fork").Process(target=killed_in_the_second_file, args=(config,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    (folder,) = (Path(config.output_dir) / "latents").iterdir()
    assert list(times(folder)) == ["latents-00000.safetensors"]
    before = times(folder)
    data = open_latents(config)
    assert data.folder == folder and times(folder)["latents-00000.safetensors"] == before["latents-00000.safetensors"]
    torch.testing.assert_close(data.rows([9]).images, (encoded(config)[0][[9]] - 0.25) * 0.5, rtol=1e-3, atol=1e-3)


def encode_and_count(config: UNetTrainingConfig, written) -> None:
    save = latents_module.save_file

    def counted(tensors, path):
        with written.get_lock():
            written.value += 1
        save(tensors, path)

    latents_module.save_file = counted
    open_latents(config)


def test_one_of_two_processes_writes_and_the_other_waits(config):
    context = multiprocessing.get_context("fork")
    written = context.Value("i", 0)
    processes = [context.Process(target=encode_and_count, args=(config, written)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert written.value == 3


@pytest.mark.parametrize(
    "options, message",
    [
        ({"streaming": True}, "`streaming` .* cannot be combined with `vae`"),
        ({"resize_mode": "random_crop"}, "`resize_mode` .* cannot be combined with `vae`"),
        ({"resolutions": (8, 16)}, "`resolutions` .* cannot be combined with `vae`"),
        ({"aspect_ratio_bucketing": True}, "`aspect_ratio_bucketing` .* cannot be combined with `vae`"),
        ({"vae": "/nowhere/vae"}, "`vae` .* is no AutoencoderKL that can be loaded"),
        ({"in_channels": 4}, r"`in_channels` \(4\) must be 2, the channels of latents"),
    ],
)
def test_what_cannot_become_latents_is_refused(options, message, config):
    with pytest.raises(ValueError, match=message):
        open_data(replace(config, **options), "train", sample_size=8, channels=options.get("in_channels", 2))
