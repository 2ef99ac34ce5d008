"""Drawing many samples: by one process or several, stopped and taken up again, always the same images.

Sample i of a set starts from a generator of its own, seeded with `seed + i`, and the batches are cut by the number of
the sample, whoever draws them: neither the number of processes nor an interruption changes a bit of an image.
"""

import importlib.metadata
import inspect
import json
import math
from dataclasses import dataclass
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm

from diffusers import DiffusionPipeline

from diffusers_ext.evaluation.drawing import (
    CALL_OPTIONS,
    DrawingOptions,
    check_options,
    drawing,
    open_pipeline,
)
from diffusers_ext.evaluation.samples import SampleFolder, describe_shards
from diffusers_ext.training.config import named_values


@dataclass(frozen=True, kw_only=True)
class SampleConfig(DrawingOptions):
    """Draw samples into a folder: shards, which a second run completes, then one .npz file or a folder of PNG."""

    output: str
    """folder to write; the samples of an earlier run with the same options in it are kept"""
    format: Literal["npz", "png"] = "npz"
    """npz: `samples.npz` with arr_0 (N, H, W, 3), grey repeated, and arr_1 (N,), as the evaluator of guided-diffusion
    reads them; png: `images/000000.png` ... and `labels.json`"""
    num_shards: int = 1
    """machines without a common process group that share the work in one folder"""
    shard_index: int = 0
    """which of them this is: 0 to num_shards - 1; the one that finishes last joins the shards"""


def sample(config: SampleConfig, pipe: DiffusionPipeline | None = None) -> Path:
    """Draw samples into `config.output`, going on where an earlier run with the same options stopped.

    Processes of one group (`torchrun`, `accelerate launch`) share the work. So do runs with the same options apart
    from `shard_index`, on machines that see the same folder.

    Args:
        config: what to draw and how.
        pipe: the pipeline, where it is loaded already. None: `config.model` is loaded.

    Returns:
        `samples.npz` or the folder `images`, which is missing while another machine has shards to draw.

    Raises:
        ValueError: for options that do not fit each other, the pipeline, or the samples in the folder.
    """
    check_options(config)
    if not 0 <= config.shard_index < config.num_shards:
        raise ValueError(
            f"`shard_index` is {config.shard_index} and `num_shards` {config.num_shards}; of so many machines the "
            "first has the index 0, the last one less than their number."
        )
    state = process_group(config.device)
    folder = SampleFolder(Path(config.output), config.num_samples, config.batch_size)
    pipe = open_pipeline(config) if pipe is None else pipe
    if pipe.dtype != getattr(torch, config.dtype):
        raise ValueError(f"`dtype` is {config.dtype}, but `pipe` was loaded with {pipe.dtype}. Load it anew.")
    pipe.to(state.device if config.device == "auto" else config.device)
    with drawing(pipe, config) as (arguments, ids, prompts):
        plan = [False, []]
        if state.is_main_process:
            folder.agree_on(manifest(pipe, config, ids, prompts))
            own = range(config.shard_index, folder.num_shards, config.num_shards)
            plan = [folder.is_merged(config.format), [shard for shard in own if folder.read(shard) is None]]
            for shard in plan[1]:
                folder.file(shard).unlink(missing_ok=True)  # a damaged one would count as drawn
        merged, pending = broadcast_object_list(plan)
        if merged:
            return folder.merged_path(config.format)

        started = folder.num_there()
        title = f"drawing {config.num_samples} samples"
        with tqdm(
            total=config.num_samples, initial=started, unit="img", desc=title, disable=not state.is_main_process
        ) as bar:
            for shard in pending[state.process_index :: state.num_processes]:
                indices = folder.indices(shard)
                labels = None if ids is None else [ids[i % len(ids)] for i in indices]
                texts = None if prompts is None else [prompts[i % len(prompts)] for i in indices]
                folder.write(shard, draw(pipe, config.seed, indices, labels, texts, arguments), labels)
                if state.is_main_process:
                    bar.update(folder.num_there() - bar.n)  # those of the other processes too
            state.wait_for_everyone()
            if state.is_main_process:
                bar.update(folder.num_there() - bar.n)
    if state.is_main_process:
        missing = folder.missing()
        if missing:
            print(f"{describe_shards(folder, missing)} are to come from other machines; the last one joins them.")
        else:
            folder.merge(config.format)
    state.wait_for_everyone()
    return folder.merged_path(config.format)


def draw(
    pipe: DiffusionPipeline,
    seed: int,
    indices: range,
    labels: list[int] | None,
    prompts: list[str] | None,
    arguments: dict[str, Any],
) -> np.ndarray:
    """Images `(n, H, W, C)`, uint8, of the samples `indices`, each from a generator of its own on the CPU.

    Args:
        pipe: a pipeline of images.
        seed: sample i has `torch.Generator().manual_seed(seed + i)`.
        indices: numbers of the samples.
        labels: class id of each, or None.
        prompts: text for each, or None.
        arguments: others of the call.
    """
    known = inspect.signature(pipe.__call__).parameters
    per_image = {"class_labels": labels, "prompt": prompts}
    arguments = arguments | {name: value for name, value in per_image.items() if value is not None}
    if "batch_size" in known:
        arguments["batch_size"] = len(indices)
    arguments["generator"] = [torch.Generator().manual_seed(seed + index) for index in indices]
    with torch.random.fork_rng(), torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        torch.manual_seed(seed + indices[0])  # for a scheduler that takes noise from elsewhere than the generators
        images = np.asarray(pipe(**arguments, output_type="np").images, dtype=np.float32)
    if images.ndim != 4 or images.shape[3] not in (1, 3):
        raise ValueError(f"{type(pipe).__name__} draws arrays of shape {images.shape}, not images (B, H, W, 1 or 3).")
    if not np.isfinite(images).all():
        raise ValueError(
            f"The samples {indices[0]} to {indices[-1]} are not finite. Use `dtype` float32, or more steps or another "
            "`scheduler`."
        )
    return (images.clip(0, 1) * 255).round().astype(np.uint8)


def process_group(device: str) -> PartialState:
    """Place of this process among those that `torchrun` or `accelerate launch` started.

    Raises:
        ValueError: for a device that this machine does not have.
    """
    kind = device.partition(":")[0]
    if kind not in ("auto", "cpu") and not (hasattr(torch, kind) and getattr(torch, kind).is_available()):
        raise ValueError(f"`device` is {device!r}, which this machine does not have. Use 'auto' or 'cpu'.")
    on_cpu = device == "cpu" or not torch.accelerator.is_available()
    return PartialState(cpu=on_cpu, timeout=timedelta(days=1))  # some processes may have more left to draw


def manifest(
    pipe: DiffusionPipeline, config: DrawingOptions, ids: list[int] | None, prompts: list[str] | None
) -> dict[str, Any]:
    """All that an image depends on: the options with the defaults of pipeline and scheduler filled in."""
    scheduler = {name: value for name, value in pipe.scheduler.config.items() if not name.startswith("_")}
    scheduler = {name: str(value) if value in (math.inf, -math.inf) else value for name, value in scheduler.items()}
    device = torch.device(pipe.device).type
    options = {
        "model": f"{type(pipe).__name__} with weights {fingerprint(pipe)}",
        "num_samples": config.num_samples,
        "batch_size": config.batch_size,
        "seed": config.seed,
        "scheduler": {"class": type(pipe.scheduler).__name__} | scheduler,
        **{name: getattr(config, name) for name in CALL_OPTIONS},
        "call_options": named_values("call_options", config.call_options),
        "class_labels": ids,
        "prompts": prompts,
        "dtype": config.dtype,
        "device": device,
        "cpu_threads": config.cpu_threads if device == "cpu" else None,
    }
    libraries = {name: importlib.metadata.version(name) for name in ("torch", "diffusers")}
    return {"source": config.model, "options": options, "versions": libraries}


def fingerprint(pipe: DiffusionPipeline) -> str:
    """First 16 digits of the SHA-256 of all weights and configs, wherever they were loaded from."""
    digest = sha256()
    for name, component in sorted(pipe.components.items()):
        if isinstance(component, torch.nn.Module):
            config = component.config if isinstance(component.config, dict) else component.config.to_dict()
            config = {key: value for key, value in config.items() if not key.startswith("_")}
            digest.update(f"{name} {json.dumps(config, sort_keys=True, default=str)}".encode())
            for key, value in sorted(component.state_dict().items()):
                digest.update(key.encode())
                digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
