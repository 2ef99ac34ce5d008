"""Tables of backbones and of trained models for the README: counted from the classes, read from the model cards."""

import math
from pathlib import Path

import tyro
from huggingface_hub import EvalResult, ModelCard
from sections import write_section

from diffusers import AutoModel

import diffusers_ext
from diffusers_ext.conversion import presets
from diffusers_ext.inspection.sources import build, find_sources
from diffusers_ext.models import PRESETS


ROOT = Path(__file__).resolve().parents[1]
NETWORKS = ("unet", "transformer", "classifier")


def backbones() -> str:
    """One row per class: its named sizes, the released checkpoints that it loads, and numbers of parameters."""
    sizes, checkpoints, counts = {}, {}, {}
    for name in (*PRESETS, *presets):
        (source,) = find_sources(name)
        key = source.model_class.__name__
        if name in PRESETS:
            sizes.setdefault(key, []).append(name)
        elif presets[name].url is not None:
            checkpoints.setdefault(key, []).append(name)
        counts.setdefault(key, []).append(build(source).num_parameters())
    lines = ["| class | what it is | named sizes | released checkpoints | parameters |", "|---|---|---|---|---|"]
    for name in diffusers_ext.__all__:
        if name not in counts:
            continue
        what = getattr(diffusers_ext, name).__doc__.strip().split("\n")[0].rstrip(".")
        names = ", ".join(f"`{size}`" for size in sizes.get(name, ()))
        low, high = min(counts[name]), max(counts[name])
        lines.append(
            f"| `{name}` | {what} | {names} | {len(checkpoints.get(name, ())) or '–'} | "
            f"{millions(low)} to {millions(high)} |"
        )
    return "\n".join(lines)


def trained_models() -> str:
    """One row per folder of `model_cards/`: its networks, and the evaluation that its card states."""
    lines = ["| model | networks | parameters | size | evaluation |", "|---|---|---|---|---|"]
    for folder in sorted(path.parent for path in (ROOT / "model_cards").glob("*/model_index.json")):
        networks = [AutoModel.from_pretrained(str(folder / name)) for name in NETWORKS if (folder / name).is_dir()]
        size = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
        evaluation = headline(ModelCard.load(folder / "README.md").data.eval_results or [])
        lines.append(
            f"| [{folder.name}](model_cards/{folder.name}/README.md) | "
            f"{', '.join(f'`{type(network).__name__}`' for network in networks)} | "
            f"{', '.join(f'{network.num_parameters():,}' for network in networks)} | {size / 1e6:.1f} MB | "
            f"{evaluation} |"
        )
    return "\n".join(lines)


def headline(results: list[EvalResult]) -> str:
    """The first guidance scale of a sweep that 98% of the samples follow, or the one that most do; without labels, the
    smallest Frechet distance."""
    points: dict[str, dict[str, EvalResult]] = {}
    for result in results:
        name, _, point = result.metric_name.partition(" (")
        points.setdefault(point.removesuffix(")"), {})[name] = result
    if not points:
        return "–"

    def value(point: str, name: str, otherwise: float = 0.0) -> float:
        return points[point][name].metric_value if name in points[point] else otherwise

    enough = [point for point in points if value(point, "accuracy") >= 0.98]
    best = max(points, key=lambda point: (value(point, "accuracy"), -value(point, "FD-pca64", math.inf)))
    chosen = enough[0] if enough else best
    told = [f"{value(chosen, 'accuracy'):.1%} of the wanted class"] if "accuracy" in points[chosen] else []
    told += [f"FD-pca64 {value(chosen, 'FD-pca64'):.2f}"] if "FD-pca64" in points[chosen] else []
    arguments = next(iter(points[chosen].values())).metric_args or {}
    scale = f", guidance scale {arguments['guidance_scale']:g}" if "guidance_scale" in arguments else ""
    return f"{', '.join(told)} ({arguments.get('num_samples')} samples{scale})"


def millions(count: int) -> str:
    return f"{count / 1e6:.1f} M"


def main(update: Path | None = None) -> None:
    """Prints both tables.

    Args:
        update: file whose sections `backbones` and `trained` are replaced by the tables.
    """
    tables = {"backbones": backbones(), "trained": trained_models()}
    for name, table in tables.items():
        print(table, end="\n\n")
        if update is not None:
            write_section(update, name, table)


if __name__ == "__main__":
    tyro.cli(main)
