"""Speed of our ADM models against named peers, as ratios.

    python benchmarks/adm_speed.py                # the whole table
    python benchmarks/adm_speed.py --only unet    # our UNet against diffusers' UNet2DModel, same weights
    python benchmarks/adm_speed.py --only guided  # a guided step against an unguided one

The two sides of a row run in turn in one process; a ratio is the median of the ratios of neighbouring runs, so that a
change of the machine's speed hits both sides.
"""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import tyro

from diffusers.utils import logging

from diffusers_ext.guidance import classifier_log_prob_grad
from diffusers_ext.models.unet_adm import ADMClassifierModel, ADMUNet2DModel


@dataclass(frozen=True)
class Options:
    only: Literal["all", "unet", "guided"] = "all"
    """Which part of the table."""
    model_channels: tuple[int, ...] = (64, 192)
    """Base widths of the ADM-64 UNet; 192 is the published one."""
    batch_sizes: tuple[int, ...] = (1, 4, 16)
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    threads: int = 1
    """CPU threads."""
    device: str = "cpu"
    seconds: float = 20.0
    """Time spent on a row, at least three pairs."""


def main(options: Options) -> None:
    logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {options.device}, {options.threads} thread(s)")
    if options.only in ("all", "unet"):
        unet_rows(options)
    if options.only in ("all", "guided"):
        guided_rows(options)


def adm64(model_channels: int) -> ADMUNet2DModel:
    """The 64 px UNet of guided-diffusion (unconditional), or a narrower one."""
    widths = tuple(model_channels * multiplier for multiplier in (1, 2, 3, 4))
    return randomised(ADMUNet2DModel(sample_size=64, out_channels=6, block_out_channels=widths))


def adm64_classifier(model_channels: int) -> ADMClassifierModel:
    """The 64 px classifier of guided-diffusion (128 channels beside a UNet of 192), narrowed with the UNet."""
    width = 32 * max(1, round(model_channels / 48))
    widths = tuple(width * multiplier for multiplier in (1, 2, 3, 4))
    return randomised(ADMClassifierModel(sample_size=64, block_out_channels=widths, attention_head_dim=min(width, 64)))


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """Zero-initialised layers get weights, so that no kernel works on zeros."""
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return model.eval().requires_grad_(False)


def unet_rows(options: Options) -> None:
    print("\nUNet2DModel's time / ours, same architecture and weights (above 1: ours is faster)")
    print(f"{'dtype':9} {'channels':>8} {'batch':>5} {'UNet2DModel':>12} {'ours':>9} {'ratio':>6} {'max diff':>9}")
    for dtype in options.dtypes:
        ratios = []
        for model_channels in options.model_channels:
            ours = adm64(model_channels).to(options.device, getattr(torch, dtype))
            peer = ours.to_diffusers().requires_grad_(False)
            for batch in options.batch_sizes:
                sample = torch.randn(batch, 3, 64, 64, device=options.device, dtype=getattr(torch, dtype))
                timestep = torch.tensor(500, device=options.device)
                difference = (ours(sample, timestep).sample - peer(sample, timestep).sample).abs().max().item()
                ratio, slow, fast = paired(
                    lambda: peer(sample, timestep), lambda: ours(sample, timestep), options.seconds, options.device
                )
                ratios.append(ratio)
                row = (
                    f"{dtype:9} {model_channels:8} {batch:5} {slow:11.3f}s {fast:8.3f}s {ratio:6.2f} {difference:9.1e}"
                )
                print(row, flush=True)
        mean = math.exp(statistics.fmean(map(math.log, ratios)))
        print(f"{dtype:9} geometric mean {mean:.2f}, lowest {min(ratios):.2f}")


def guided_rows(options: Options) -> None:
    print("\nGuided step (UNet and classifier gradient) / unguided step (UNet), 64 px")
    print(f"{'dtype':9} {'channels':>8} {'batch':>5} {'guided':>12} {'unguided':>9} {'ratio':>6}")
    for dtype in options.dtypes:
        for model_channels in options.model_channels:
            unet = adm64(model_channels).to(options.device, getattr(torch, dtype))
            classifier = adm64_classifier(model_channels).to(options.device, getattr(torch, dtype))
            for batch in options.batch_sizes:
                sample = torch.randn(batch, 3, 64, 64, device=options.device, dtype=getattr(torch, dtype))
                timestep = torch.tensor(500, device=options.device)
                labels = torch.zeros(batch, dtype=torch.long, device=options.device)

                def guided() -> None:
                    classifier_log_prob_grad(classifier, sample, timestep, labels)
                    unet(sample, timestep)

                ratio, slow, fast = paired(guided, lambda: unet(sample, timestep), options.seconds, options.device)
                print(f"{dtype:9} {model_channels:8} {batch:5} {slow:11.3f}s {fast:8.3f}s {ratio:6.2f}", flush=True)


@torch.no_grad()
def paired(first: Callable, second: Callable, seconds: float, device: str) -> tuple[float, float, float]:
    """Median of first's time / second's time over neighbouring runs, and the median times in seconds."""

    def timed(call: Callable) -> float:
        if device != "cpu":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    timed(first), timed(second)  # warm up
    pairs = []
    start = time.perf_counter()
    while len(pairs) < 3 or time.perf_counter() - start < seconds:
        # Alternate who goes first, so that neither side always finds the other's data in the cache.
        if len(pairs) % 2:
            pairs.append((timed(first), timed(second)))
        else:
            pairs.append((timed(second), timed(first))[::-1])
    firsts, seconds_ = zip(*pairs)
    ratio = statistics.median(a / b for a, b in pairs)
    return ratio, statistics.median(firsts), statistics.median(seconds_)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
