"""What is seen of a run: progress bar, metrics as JSON lines and as a picture, and trackers."""

import contextlib
import importlib.util
import json
import os
import sys
import time
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from tqdm.auto import tqdm

from diffusers_ext.training.config import TrainingConfig


TRACKERS = ("tensorboard", "trackio", "wandb")
LOGS = "logs"  # folder of the trackers in the run folder
METRICS_PICTURE = "metrics.png"


def trackers(report_to: str) -> list[str]:
    """Names of the trackers that `report_to` means; `all` means those that are installed.

    Raises:
        ImportError: when the package of a tracker is missing.
    """
    if report_to == "all":
        return [name for name in TRACKERS if importlib.util.find_spec(name)]
    if report_to == "none":
        return []
    if importlib.util.find_spec(report_to) is None:
        raise ImportError(f"`report_to` ({report_to!r}) needs a package that is missing: pip install {report_to}")
    return [report_to]


class RunLog:
    """Means of metrics since the last line, written to `metrics.jsonl`, the progress bar and the trackers.

    `metrics.jsonl` has the same lines whether a run was interrupted or not, but for `images_per_second`.

    Args:
        accelerator: made with `log_with=trackers(config.report_to)`.
        config: options, written to `config.json`.
        total_steps: optimizer steps of the whole run.
        images_per_step: images of one optimizer step, of all processes.
    """

    def __init__(self, accelerator: Accelerator, config: TrainingConfig, total_steps: int, images_per_step: int):
        self.accelerator, self.config, self.images_per_step = accelerator, config, images_per_step
        self.output_dir = Path(config.output_dir)
        self.path = self.output_dir / "metrics.jsonl"
        self.lines = 0  # of the file
        self.totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])  # sum and count by name
        self.bar = tqdm(
            desc=self.output_dir.resolve().name,
            total=total_steps * images_per_step,
            unit="img",
            unit_scale=True,
            mininterval=0.5 if sys.stderr.isatty() else 30,
            disable=not accelerator.is_main_process,
        )

    def start(self, step: int) -> None:
        """Begin at a step, after the state is loaded: what an interrupted run wrote later is written again."""
        self.bar.n = self.bar.initial = step * self.images_per_step
        if self.accelerator.is_main_process:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
            kept = [line for line in lines[: self.lines] if line.endswith("\n")]
            self.lines = len(kept)
            _replace(self.path, "".join(kept))
            _replace(self.output_dir / "config.json", json.dumps(asdict(self.config), indent=2) + "\n")
        names = trackers(self.config.report_to)
        if names:
            self._start_trackers(names, step)
        self.restart_clock()

    def _start_trackers(self, names: list[str], step: int) -> None:
        run_name = self.output_dir.resolve().name
        if "trackio" in names:  # it writes to the user's cache by default; read when it is imported
            os.environ.setdefault("TRACKIO_DIR", str(self.output_dir.resolve() / LOGS / "trackio"))
        options = {k: v if isinstance(v, int | float | str) else str(v) for k, v in asdict(self.config).items()}
        own_options = {
            "tensorboard": {"purge_step": step + 1},
            "trackio": {"name": run_name, "resume": "allow", "embed": False},
            "wandb": {"name": run_name, "dir": str(self.output_dir)},
        }
        self.accelerator.init_trackers(run_name, options, {name: own_options[name] for name in names})

    def restart_clock(self) -> None:
        self.clock, self.steps_since = time.perf_counter(), 0

    def add(self, metrics: dict[str, list[float]]) -> None:
        """Take the metrics of a step, one number for each forward pass, into the means of the next line."""
        for name, values in metrics.items():
            self.totals[name][0] += sum(values)
            self.totals[name][1] += len(values)

    def advance(self) -> None:
        self.steps_since += 1
        self.bar.update(self.images_per_step)

    def write_means(self, step: int, **metrics: float) -> None:
        """Write the means over all processes since the last line, which must all ask, with `metrics` and the speed."""
        means = {name: total / count for name, (total, count) in self._gathered().items()}
        self.totals.clear()
        speed = self.steps_since * self.images_per_step / (time.perf_counter() - self.clock)
        self.write(step, **means, **metrics, images_per_second=speed)
        shown = {"loss": means["loss"]} if "loss" in means else {}
        shown |= {"lr": metrics["learning_rate"], "memory": f"{memory_in_use(self.accelerator.device) / 1e9:.2f}GB"}
        self.bar.set_postfix(shown, refresh=False)
        self.restart_clock()

    def write(self, step: int, **metrics: float) -> None:
        """Write a line, by the main process."""
        if metrics and self.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, **metrics}) + "\n")
                file.flush()
                os.fsync(file.fileno())
            self.lines += 1
        self.accelerator.log(metrics | {"memory_gb": memory_in_use(self.accelerator.device) / 1e9}, step=step)

    def write_images(self, step: int) -> None:
        """Send the pictures that a validation wrote, FOLDER/STEP.png and NAME.png and the like, to the trackers."""
        pictures = {path: path.parent.name for path in self.output_dir.glob(f"*/{step:07d}*.png")}
        pictures |= {path: path.stem for path in self.output_dir.glob("[!.]*.png") if path.name != METRICS_PICTURE}
        for path, name in sorted(pictures.items()):
            image = Image.open(path).convert("RGB")
            for tracker in self.accelerator.trackers:
                if tracker.name == "tensorboard":
                    tracker.log_images({name: np.asarray(image)[None]}, step=step, dataformats="NHWC")
                elif tracker.name == "wandb":
                    tracker.log_images({name: [image]}, step=step)
                elif tracker.name == "trackio":
                    import trackio

                    tracker.log({name: trackio.Image(image, caption=f"step {step}")}, step=step)

    def draw(self) -> None:
        """Draw `metrics.png`, by the main process; without matplotlib there is none."""
        with contextlib.suppress(ImportError):
            if self.accelerator.is_main_process:
                draw_metrics(self.path, self.output_dir / METRICS_PICTURE)

    def _gathered(self) -> dict[str, list[float]]:
        """Sums and counts over all processes."""
        if self.accelerator.num_processes == 1 or not self.totals:
            return self.totals
        names = sorted(self.totals)
        dtype = torch.float32 if self.accelerator.device.type == "mps" else torch.float64
        values = torch.tensor([self.totals[name] for name in names], dtype=dtype, device=self.accelerator.device)
        return dict(zip(names, self.accelerator.reduce(values, "sum").tolist()))

    def state_dict(self) -> dict[str, Any]:
        return {"lines": self.lines, "totals": {name: list(value) for name, value in self._gathered().items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.lines = state["lines"]
        if self.accelerator.is_main_process:  # the sums are those of all processes
            self.totals.update({name: list(value) for name, value in state["totals"].items()})
        else:
            self.totals.update({name: [0.0, 0] for name in state["totals"]})


def memory_in_use(device: torch.device) -> int:
    """Largest memory of this process so far in bytes: allocated on a CUDA device, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        import psutil  # accelerate needs it

        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def draw_metrics(source: Path, target: Path) -> None:
    """Draw the losses, the norm of the gradient and the learning rate of a `metrics.jsonl` over the steps.

    Args:
        source: the file.
        target: picture to write.
    """
    from matplotlib.figure import Figure

    curves: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for line in source.read_text().splitlines():
        metrics = json.loads(line)
        if "learning_rate" in metrics:  # not that of a validation
            for name in metrics.keys() - {"step", "images_per_second", "nonfinite_steps"}:
                curves[name].append((metrics["step"], metrics[name]))
    alone = ("grad_norm", "learning_rate")
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for panel, names in zip(figure.subplots(1, 3), (sorted(curves.keys() - {*alone}), *([name] for name in alone))):
        for name in names:
            panel.plot(*zip(*curves[name]), label=name, marker="." if len(curves[name]) < 20 else None)
        panel.set_xlabel("step")
        if names and curves:
            panel.legend()
    temporary = target.with_name(f".{target.name}")
    figure.savefig(temporary, format="png", dpi=90)
    temporary.replace(target)


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text)
    temporary.replace(path)
