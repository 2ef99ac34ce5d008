"""What 16-bit arithmetic and gradient checkpointing change about a training step: memory and speed, as ratios.

    python benchmarks/training_memory.py                         # prints the table
    python benchmarks/training_memory.py --update benchmarks/RESULTS.md
    python benchmarks/training_memory.py --device cuda --models adm/cifar-32 composable/film dit/32px

The memory of a variant is the peak of a process of its own above what that process held before it built the network
(CUDA: what torch's allocator had handed out). Speeds are measured in turns: every round runs all variants of a network
one after the other, and a ratio is the median of the ratios of one round.
"""

import multiprocessing
import platform
import re
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from sections import write_section

from diffusers_ext.models import PRESETS


@dataclass(frozen=True)
class Options:
    models: tuple[str, ...] = ("adm/mnist-32", "composable/film-mnist", "dit/mnist")
    """named sizes, see `diffusers_ext.models.PRESETS`"""
    batch_size: int = 64
    """images of a step"""
    steps: int = 3
    """timed steps of a round"""
    rounds: int = 3
    """how often all variants are measured"""
    device: str = "cpu"
    """where to train"""
    threads: int = 1
    """CPU threads of torch"""
    update: Path | None = None
    """Markdown file to write the table into"""


@dataclass(frozen=True)
class Variant:
    """One way to run a training step."""

    name: str
    dtype: torch.dtype | None = None
    checkpointing: bool = False


@dataclass(frozen=True)
class Measurement:
    """Of a step: bytes at its peak, and seconds."""

    peak_bytes: int
    seconds: float


def variants(device: str) -> list[Variant]:
    """float32 first; float16 on GPUs only, as CPUs have no arithmetic for it."""
    chosen = [Variant("float32"), Variant("float32, checkpointing", checkpointing=True)]
    for dtype in (torch.bfloat16, torch.float16) if device.startswith("cuda") else (torch.bfloat16,):
        name = str(dtype).removeprefix("torch.")
        chosen += [Variant(name, dtype), Variant(f"{name}, checkpointing", dtype, checkpointing=True)]
    return chosen


def main(options: Options) -> None:
    """Measure and print a table."""
    rows = ["| network | step | memory | memory, ratio | images/s, ratio |", "|---|---|---|---|---|"]
    print("\n".join(rows))
    for model in options.models:
        chosen = variants(options.device)
        rounds = [{v.name: in_process(model, v, options) for v in chosen} for _ in range(options.rounds)]
        for variant in chosen:
            peak = statistics.median(r[variant.name].peak_bytes for r in rounds)
            memory = statistics.median(r[variant.name].peak_bytes / r["float32"].peak_bytes for r in rounds)
            speed = statistics.median(r["float32"].seconds / r[variant.name].seconds for r in rounds)
            rows.append(f"| {model} | {variant.name} | {peak / 2**20:,.0f} MB | {memory:.2f} | {speed:.2f} |")
            print(rows[-1], flush=True)
    device = torch.cuda.get_device_name() if options.device.startswith("cuda") else _processor()
    told = (
        f"`python benchmarks/training_memory.py`, {device}, CPU threads: {options.threads}, "
        f"torch {torch.__version__}, batches of {options.batch_size}: a step of forward, backward and AdamW with "
        "float32 weights."
    )
    if options.update is not None:
        name = f"training-memory-{options.device.partition(':')[0]}"
        write_section(options.update, name, f"{told}\n\n" + "\n".join(rows), title="Results")


def in_process(model: str, variant: Variant, options: Options) -> Measurement:
    """Measure in a process of its own, whose memory nobody has used before, with everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["diffusers_ext.models"])
    with context.Pool(1) as pool:
        return pool.apply(measure, (model, variant, options))


def measure(model: str, variant: Variant, options: Options) -> Measurement:
    """Peak memory and duration of a training step on random images."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = torch.device(options.device)
    before = _held(device)
    model_class, network_options = PRESETS[model]
    network = model_class(**network_options).to(device).train()
    if variant.checkpointing:
        network.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    config = network.config
    sample = torch.randn(options.batch_size, config.in_channels, config.sample_size, config.sample_size, device=device)
    timesteps = torch.randint(1000, (options.batch_size,), device=device)
    arguments = {}
    if config.num_class_embeds is not None:
        arguments["class_labels"] = torch.randint(config.num_class_embeds, (options.batch_size,), device=device)

    def step() -> None:
        with torch.autocast(device.type, variant.dtype, enabled=variant.dtype is not None):
            output = network(sample, timesteps, **arguments).sample
            loss = F.mse_loss(output.float(), torch.zeros_like(output, dtype=torch.float32))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # makes the optimizer's moments and warms up
    times = []
    for _ in range(options.steps):
        _wait(device)
        start = time.perf_counter()
        step()
        _wait(device)
        times.append(time.perf_counter() - start)
    return Measurement(_peak(device) - before, statistics.median(times))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _held(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _status("VmRSS")


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def _status(word: str) -> int:
    """Bytes that the kernel counts for this process."""
    return int(re.search(rf"{word}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def _processor() -> str:
    names = re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__, use_underscores=True))
