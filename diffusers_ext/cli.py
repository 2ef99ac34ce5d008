"""The `diffusers-ext` command: `train unet`, `train classifier`, `convert`, `inspect`."""

import argparse
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from diffusers_ext.training.config import (
    CLASSIFIER_PRESETS,
    UNET_PRESETS,
    ClassifierTrainingConfig,
    UNetTrainingConfig,
)


@dataclass(frozen=True)
class Convert:
    """Write original checkpoints as a pipeline folder of diffusers."""

    source: tyro.conf.Positional[Path]
    """checkpoint of the UNet, transformer or denoiser"""
    preset: str
    """released checkpoint that it is, such as 256x256_diffusion_uncond, or a .json file of its flags"""
    output: Path
    """folder to write"""
    classifier: Path | None = None
    """checkpoint of the classifier that guides"""
    classifier_preset: str | None = None
    """as --preset, for the classifier, such as 256x256_classifier"""
    vae: str | None = None
    """folder or Hub name of the AutoencoderKL whose latents the model draws, as DiT's; it is saved along"""
    labels: Path | None = None
    """names of the classes: text, one per line, or .json"""
    overwrite: bool = False
    """replace the folder if it is not empty"""


@dataclass(frozen=True)
class Inspect:
    """Show the anatomy of networks: shapes, parameters, FLOPs, memory, attention and receptive field of each block."""

    models: tyro.conf.Positional[tuple[str, ...]]
    """presets (256x256_diffusion_uncond, composable/film), folders of models or pipelines, Hub ids (org/repo or
    org/repo/unet); A+B shows two networks as one, such as 256x256_diffusion_uncond+256x256_classifier"""
    size: int | None = None
    """height and width of the images in pixels; by default that of the config"""
    format: Literal["table", "json", "svg", "html"] | None = None
    """by default that of --output's suffix, else table"""
    output: Path | None = None
    """file to write instead of printing"""
    titles: tuple[str, ...] = ()
    """headings, one for each model; by default the names"""
    batch_size: int = 1
    """number of images"""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """of weights and images; by default that of the weights in a folder, else float32"""
    effective: Literal["auto", "always", "never"] = "auto"
    """whether to measure the effective receptive field, which needs weights: auto where it takes seconds"""


def main(args: list[str] | None = None) -> None:
    """Run the command.

    Args:
        args: command line without the program's name; None takes that of the process.
    """
    args = sys.argv[1:] if args is None else args
    command = tyro.cli(_commands(args), prog="diffusers-ext", args=args, use_underscores=True)
    if isinstance(command, Convert):
        from diffusers_ext.conversion.convert import convert_checkpoint

        convert_checkpoint(**asdict(command))
    elif isinstance(command, Inspect):
        from diffusers_ext.inspection import inspect_models

        try:
            text = inspect_models(**asdict(command))
        except ValueError as error:
            sys.exit(f"diffusers-ext inspect: {error}")
        if command.output is None:
            print(text, end="")
    elif command.dry_run:
        for name, value in asdict(command).items():
            print(f"{name}: {value}")
    else:
        from diffusers_ext.training.loop import train

        train(command)


def _commands(args: list[str]) -> type:
    """The subcommands; the preset named in `args` gives the defaults of a training's other options."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset")
    preset = parser.parse_known_args(args)[0].preset
    unet = UNET_PRESETS.get(preset, UNET_PRESETS["digits"])
    classifier = CLASSIFIER_PRESETS.get(preset, CLASSIFIER_PRESETS["digits"])
    tasks = (
        Annotated[UNetTrainingConfig, tyro.conf.subcommand("unet", default=unet)]
        | Annotated[ClassifierTrainingConfig, tyro.conf.subcommand("classifier", default=classifier)]
    )
    train = tyro.conf.subcommand("train", description="Train a component of a pipeline.")
    convert = tyro.conf.subcommand("convert")
    inspect = tyro.conf.subcommand("inspect")
    return Annotated[tasks, train] | Annotated[Convert, convert] | Annotated[Inspect, inspect]


if __name__ == "__main__":
    main()
