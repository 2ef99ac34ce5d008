"""The `diffusers-ext` command: train, sample, evaluate, convert, inspect, card, export, push, pull."""

import argparse
import difflib
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
import yaml
from huggingface_hub import CommitInfo

from diffusers_ext.evaluation.evaluate import EvaluateConfig
from diffusers_ext.evaluation.sampling import SampleConfig
from diffusers_ext.training.config import (
    CLASSIFIER_PRESETS,
    UNET_PRESETS,
    ClassifierTrainingConfig,
    TrainingConfig,
    UNetTrainingConfig,
    as_arguments,
)


TRAININGS = {"unet": UNET_PRESETS, "classifier": CLASSIFIER_PRESETS}


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
    license: str | None = None
    """licence of the original weights, as the Hub names it, such as mit or cc-by-nc-4.0; known for released presets"""
    base_model: str | None = None
    """where the original weights come from: a Hub id, or an address"""


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


@dataclass(frozen=True)
class Card:
    """Write the model card of a folder anew, keeping what people wrote in it."""

    model: tyro.conf.Positional[str]
    """folder of a pipeline, model, adapter or training run, or a Hub id, whose card goes to --output"""
    license: str | None = None
    """licence of the weights, as the Hub names it, such as apache-2.0 or cc-by-nc-4.0"""
    base_model: str | None = None
    """model that these weights come from: a Hub id, or an address"""
    datasets: tuple[str, ...] | None = None
    """data sets that the weights were trained on, by Hub name"""
    samples: bool | None = None
    """draw the grid of samples anew, or never; by default where it is missing or of other weights"""
    check: bool = False
    """change nothing; print the difference and fail if the card is not up to date"""
    output: Path | None = None
    """file to write instead of the folder's README.md"""


@dataclass(frozen=True)
class Export:
    """Write a folder that is exactly what `push` would upload."""

    model: tyro.conf.Positional[str]
    """folder of a pipeline, model, adapter or training run, or a Hub id"""
    folder: tyro.conf.Positional[Path]
    """folder to write, or an earlier export to bring up to date"""
    self_contained: bool = False
    """bring the code along, so that the pipeline loads with trust_remote_code=True where diffusers_ext is missing"""
    variant: str | None = None
    """which weights to take, such as fp16 for diffusion_pytorch_model.fp16.safetensors"""


@dataclass(frozen=True)
class Push:
    """Upload a model to the Hugging Face Hub as one commit, with a model card; or the demo as a Space."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="MODEL REPO-ID")] = ()
    """folder of a pipeline, model, adapter or training run, and repository such as me/my-model, made if need be;
    with --space, folders of pipelines that the demo shows beside its own"""
    space: str | None = None
    """upload the demo as this Space instead, such as me/my-space; made if it is not there"""
    self_contained: bool = False
    """bring the code along, so that the pipeline loads with trust_remote_code=True where diffusers_ext is missing"""
    private: bool = False
    """make the repository or Space private, if it has to be made"""
    revision: str | None = None
    """branch to write to, by default main; made if it is not there"""
    commit_message: str | None = None
    """by default it names what is uploaded"""
    create_pr: bool = False
    """open a pull request instead of writing to the branch"""
    variant: str | None = None
    """which weights to take, such as fp16"""
    license: str | None = None
    """licence of the weights, as the Hub names it, such as apache-2.0; by default that of the card"""
    base_model: str | None = None
    """model that these weights come from: a Hub id, or an address; by default that of the card"""
    token: str | None = None
    """access token; better: `hf auth login`, or the environment variable HF_TOKEN, which no shell history keeps"""


@dataclass(frozen=True)
class Pull:
    """Download a model from the Hugging Face Hub, checked file by file, and print where it lies."""

    repo_id: tyro.conf.Positional[str]
    """repository, such as me/my-model"""
    folder: tyro.conf.Positional[Path | None] = None
    """folder to write; by default the model stays in the cache that diffusers loads from"""
    revision: str | None = None
    """branch, tag or commit"""
    variant: str | None = None
    """which weights to take, such as fp16"""
    token: str | None = None
    """access token; better: `hf auth login`, or the environment variable HF_TOKEN, which no shell history keeps"""


def main(args: list[str] | None = None) -> None:
    """Run the command. What the user can mend ends it with one line instead of a traceback.

    Args:
        args: command line without the program's name; None takes that of the process.
    """
    args = sys.argv[1:] if args is None else args
    name = " ".join(["diffusers-ext", *args[: 2 if args[:1] == ["train"] else 1]])
    try:
        _run(_parse(args))
    except (ValueError, FloatingPointError, ImportError, OSError) as error:
        sys.exit(f"{name}: {error}")
    except KeyboardInterrupt:
        print(f"{name}: interrupted. What is complete was kept; the same command goes on from there.", file=sys.stderr)
        sys.exit(130)


def _run(command: object) -> None:
    if isinstance(command, Convert):
        from diffusers_ext.conversion.convert import convert_checkpoint

        convert_checkpoint(**asdict(command))
    elif isinstance(command, Inspect):
        from diffusers_ext.inspection import inspect_models

        text = inspect_models(**asdict(command))
        if command.output is None:
            print(text, end="")
    elif isinstance(command, SampleConfig):
        from diffusers_ext.evaluation.sampling import sample

        sample(command)
    elif isinstance(command, EvaluateConfig):
        from diffusers_ext.evaluation.evaluate import evaluate

        evaluate(command)
    elif isinstance(command, Card):
        print(_write_card(command))
    elif isinstance(command, Export | Push | Pull):
        print(_transfer(command))
    elif command.dry_run:
        from diffusers_ext.training.dry_run import describe

        print(describe(command), end="")
    else:
        from diffusers_ext.training.loop import train

        train(command)


def _write_card(command: Card) -> Path:
    from diffusers_ext.cards import write_card
    from diffusers_ext.hub.loading import open_folder

    is_local = Path(command.model).expanduser().is_dir()
    folder = open_folder(command.model)
    if not is_local and command.output is None and not command.check:
        raise ValueError(
            f"`output` is missing: {command.model!r} is on the Hub, whose card `push` writes. Name the file to write."
        )
    options = asdict(command)
    repo_id = None if is_local else options["model"]
    del options["model"]
    return write_card(folder, repo_id=repo_id, **options)


def _transfer(command: Export | Push | Pull) -> object:
    """Where the model is now: a folder, or an address on the Hub."""
    from diffusers_ext import hub
    from diffusers_ext.hub.loading import open_folder

    options = asdict(command)
    if isinstance(command, Export):
        return hub.export(open_folder(options.pop("model")), **options)
    if isinstance(command, Push):
        commit = _push(options)
        return commit.pr_url or (f"{commit.repo_url}/tree/{command.revision}" if command.revision else commit.repo_url)
    return hub.pull(**options)


def _push(options: dict[str, Any]) -> CommitInfo:
    from diffusers_ext import hub

    names, space = options.pop("names"), options.pop("space")
    if space is not None:
        of_models = [name for name in ("self_contained", "variant", "license", "base_model") if options.pop(name)]
        if of_models:
            raise ValueError(f"`{of_models[0]}` is for models; it cannot be used with `space`. Leave it out.")
        return hub.push_space(space, names, **options)
    if len(names) != 2:
        raise ValueError(
            f"`push` takes a folder and a repository, such as `push my-digits me/my-digits`, and got {len(names)} "
            "names; or `--space me/my-space` for the demo."
        )
    return hub.push(*names, **options)


def _parse(args: list[str]) -> object:
    """The options of a subcommand. Of a training they come from the preset, a file and the command line, in this
    order: what the file says stands before what was typed, where the last word counts."""
    presets = {}
    if args[:1] == ["train"] and len(args) > 1 and args[1] in TRAININGS:
        presets = TRAININGS[args[1]]
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        first.add_argument("--preset")
        first.add_argument("--config")
        typed = first.parse_known_args(args[2:])[0]
        in_file = {} if typed.config is None else read_options(Path(typed.config), type(presets["digits"]))
        preset = typed.preset or in_file.pop("preset", None)
        if preset not in presets and preset is not None and typed.preset is None:
            raise ValueError(f"`preset` in {typed.config} is {preset!r}; it must be one of {', '.join(presets)}.")
        presets = {args[1]: presets.get(preset, presets["digits"])}
        from_file = as_arguments(in_file)  # so that they are checked like typed ones
        try:
            return _typed([*args[:2], *from_file, *args[2:]], presets)
        except SystemExit as stopped:
            if stopped.code and from_file:
                print(f"The options of {typed.config}, as typed: {' '.join(from_file)}", file=sys.stderr)
            raise
    return _typed(args, presets)


def _typed(args: list[str], presets: dict[str, TrainingConfig]) -> object:
    return tyro.cli(_commands(presets), prog="diffusers-ext", args=args, use_underscores=True)


def _commands(defaults: dict[str, TrainingConfig]) -> type:
    """The subcommands, with the presets that trainings start from."""
    unet = defaults.get("unet", UNET_PRESETS["digits"])
    classifier = defaults.get("classifier", CLASSIFIER_PRESETS["digits"])
    tasks = (
        Annotated[UNetTrainingConfig, tyro.conf.subcommand("unet", default=unet)]
        | Annotated[ClassifierTrainingConfig, tyro.conf.subcommand("classifier", default=classifier)]
    )
    return (
        Annotated[tasks, tyro.conf.subcommand("train", description="Train a component of a pipeline.")]
        | Annotated[SampleConfig, tyro.conf.subcommand("sample")]
        | Annotated[EvaluateConfig, tyro.conf.subcommand("evaluate")]
        | Annotated[Convert, tyro.conf.subcommand("convert")]
        | Annotated[Inspect, tyro.conf.subcommand("inspect")]
        | Annotated[Card, tyro.conf.subcommand("card")]
        | Annotated[Export, tyro.conf.subcommand("export")]
        | Annotated[Push, tyro.conf.subcommand("push")]
        | Annotated[Pull, tyro.conf.subcommand("pull")]
    )


def read_options(path: Path, config_class: type[TrainingConfig]) -> dict[str, Any]:
    """Options of a training by name, out of a YAML or JSON file.

    Raises:
        ValueError: for a file that cannot be read, and names that are no options.
    """
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f" in line {error.problem_mark.line + 1}"
        raise ValueError(f"`config` ({str(path)!r}) cannot be read as YAML: {error.problem}{line}.") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"`config` ({str(path)!r}) cannot be read: {error}") from error
    options = {} if options is None else options
    if not isinstance(options, dict):
        raise ValueError(
            f"`config` ({str(path)!r}) holds a {type(options).__name__}; it must hold `option: value` lines."
        )
    names = [field.name for field in fields(config_class)]
    for name in options:
        if name not in names:
            near = difflib.get_close_matches(str(name), names, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else " `--help` lists them."
            raise ValueError(f"`config` ({str(path)!r}) holds {name!r}, which is no option of this training.{hint}")
    return {name: value for name, value in options.items() if name not in ("config", "dry_run")}


if __name__ == "__main__":
    main()
