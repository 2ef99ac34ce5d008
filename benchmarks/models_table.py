"""Tables of backbones and of trained models for the README: counted from the classes, read from the model cards."""

from pathlib import Path

import tyro
from huggingface_hub import ModelCard
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
        results = ModelCard.load(folder / "README.md").data.eval_results or []
        evaluation = ", ".join(f"{result.metric_name}: {result.metric_value:g}" for result in results)
        lines.append(
            f"| [{folder.name}](model_cards/{folder.name}/README.md) | "
            f"{', '.join(f'`{type(network).__name__}`' for network in networks)} | "
            f"{', '.join(f'{network.num_parameters():,}' for network in networks)} | {size / 1e6:.1f} MB | "
            f"{evaluation or '–'} |"
        )
    return "\n".join(lines)


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
