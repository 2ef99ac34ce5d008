"""The README's table of schedulers: the guided pipeline against the exact answer, with every scheduler of diffusers.

    python benchmarks/schedulers_table.py                    # prints the table (minutes)
    python benchmarks/schedulers_table.py --update README.md # and puts it between the markers of that file

The data are a Gaussian mixture, so the best denoiser and classifier are known in closed form at every noise level, and
a sample guided by the classifier must equal the one of classifier-free guidance from the same noise. The bench is
`../shared/checks/schedulers_analytic.py`; its own command runs the pipelines with
`--impl benchmarks.schedulers_table:sample` (classifier guidance) and
`--impl benchmarks.schedulers_table:sample_class_conditional` (classifier-free guidance).
"""

import importlib.util
import itertools
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import tyro
from sections import write_section

from diffusers import SchedulerMixin

from diffusers_ext.guidance import REFUSED_SCHEDULERS
from diffusers_ext.pipelines import ClassConditionalPipeline, ClassifierGuidedPipeline


BENCH = Path(__file__).resolve().parents[2] / "shared" / "checks" / "schedulers_analytic.py"
NETWORKS = {
    "vp": "noise, image or v of a variance-preserving process",
    "flow": "velocity of a flow",
    "edm": "EDM's preconditioning",
    "own": "what the scheduler's own model predicts, in its own time",
}


def sample(
    *,
    scheduler: SchedulerMixin,
    unet: torch.nn.Module,
    classifier: torch.nn.Module | None = None,
    class_label: int | None = None,
    guidance_scale: float = 0.0,
    num_inference_steps: int = 50,
    generator: torch.Generator | None = None,
    shape: tuple[int, ...] = (8, 3, 2, 2),
) -> torch.Tensor:
    """Samples of the pipeline in data space, of shape `shape`; guided where there is a classifier."""
    pipe = ClassifierGuidedPipeline(unet=unet, scheduler=scheduler, classifier=classifier)
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        class_labels=class_label,
        guidance_scale=guidance_scale,
        num_inference_steps=num_inference_steps,
        generator=generator,
        batch_size=shape[0],
        output_type="latent",
    ).images


def sample_class_conditional(
    *,
    scheduler: SchedulerMixin,
    unet: torch.nn.Module,
    classifier: torch.nn.Module | None = None,
    class_label: int | None = None,
    guidance_scale: float = 1.0,
    num_inference_steps: int = 50,
    generator: torch.Generator | None = None,
    shape: tuple[int, ...] = (8, 3, 2, 2),
) -> torch.Tensor:
    """Samples of the class-conditional pipeline in data space; the label alone guides, `classifier` is not used."""
    pipe = ClassConditionalPipeline(unet=with_null_class(unet), scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        class_labels=class_label,
        guidance_scale=guidance_scale if class_label is not None else None,
        num_inference_steps=num_inference_steps,
        generator=generator,
        batch_size=shape[0],
        output_type="latent",
    ).images


def with_null_class(unet: torch.nn.Module) -> torch.nn.Module:
    """The exact denoiser of the bench, whose null label is -1, told the label that our networks have for that."""
    classes = len(unet.config.means)
    unet.register_to_config(num_class_embeds=classes, null_class=True)

    def translate(module: torch.nn.Module, inputs: tuple, options: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        labels = options["class_labels"]
        return inputs, options | {"class_labels": torch.where(labels == classes, -1, labels)}

    unet.register_forward_pre_hook(translate, with_kwargs=True)
    return unet


def load_bench() -> ModuleType:
    """The test bench as a module."""
    spec = importlib.util.spec_from_file_location(BENCH.stem, BENCH)
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    return bench


def network(case: dict[str, Any]) -> str:
    """Which row of the table a configuration of the bench belongs to."""
    space = case["space"].partition("_")[0]
    return space if space in NETWORKS else "own"


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table of `rows`: results of the bench (or their `note`), with the `network` of each configuration."""
    lines = ["| the network predicts | schedulers | configurations | largest deviation |", "|---|---|---|---|"]
    for key, description in NETWORKS.items():
        passed = [row for row in rows if row["network"] == key and "note" not in row]
        names = sorted({row["name"].removesuffix("Scheduler") for row in passed})
        deviation = max((row["d3"] for row in passed), default=float("nan"))
        lines.append(f"| {description} | {', '.join(names)} | {len(passed)} | {deviation:.0e} |")

    by_reason = sorted(REFUSED_SCHEDULERS.items(), key=lambda item: (item[1][0], item[0]))
    refused = []
    for reason, group in itertools.groupby(by_reason, key=lambda item: item[1][0]):
        names = [name.removesuffix("Scheduler") for name, _ in group]
        refused.append(f"{', '.join(names)} ({reason})")
    lines += ["", "Refused before any network is run, with an error that names the reason and an alternative:"]
    return "\n".join([*lines, "; ".join(refused) + "."])


def main(
    samples: int = 1024, only: str = "", threads: int = 1, update: Path | None = None, results: Path | None = None
) -> None:
    """Runs the bench and prints the table.

    Args:
        samples: images per configuration.
        only: run the configurations whose label contains this.
        threads: CPU threads.
        update: file whose lines between the markers are replaced by the table.
        results: JSON file with the results of a run; written if it does not exist, else used in place of a run.
    """
    if results is not None and results.exists():
        rows = json.loads(results.read_text())
    else:
        if not BENCH.is_file():
            sys.exit(f"The test bench is not at {BENCH}.")
        torch.set_num_threads(threads)
        bench = load_bench()
        rows = []
        for case in bench.cases():
            if case.get("skip") or only.lower() not in case["label"].lower():
                continue
            rows.append(bench.run_case(case, sample, samples) | {"network": network(case)})
            print(rows[-1], file=sys.stderr, flush=True)
        if results is not None:
            results.write_text(json.dumps(rows, indent=1))
    table = markdown(rows)
    print(table)
    if update is not None:
        write_section(update, "schedulers", table)


if __name__ == "__main__":
    tyro.cli(main)
