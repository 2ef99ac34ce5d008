"""Original checkpoints -> a pipeline folder of diffusers: what `diffusers-ext convert` runs."""

import json
import os
import tempfile
from pathlib import Path

from diffusers import DDPMScheduler

from diffusers_ext.conversion.guided_diffusion import to_scheduler_config
from diffusers_ext.conversion.original import complete_flags, load_original, presets
from diffusers_ext.conversion.presets import Preset
from diffusers_ext.models.unet_adm import ADMClassifierModel, ADMUNet2DModel
from diffusers_ext.pipelines.pipeline_classifier_guided import ClassifierGuidedPipeline


_PAPERS = {
    "guided-diffusion": "[Diffusion Models Beat GANs on Image Synthesis](https://arxiv.org/abs/2105.05233)",
    "improved-diffusion": "[Improved Denoising Diffusion Probabilistic Models](https://arxiv.org/abs/2102.09672)",
}
_CARD = """\
---
{licence}library_name: diffusers
pipeline_tag: unconditional-image-generation
tags:
- diffusers_ext
- {codebase}
---

# {name}

{origin}, converted by diffusers_ext.

```python
import diffusers_ext
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{name}")
images = pipe({arguments}).images
```

| | |
|---|---|
{facts}
"""


def convert_checkpoint(
    source: str | os.PathLike,
    *,
    preset: str,
    output: str | os.PathLike,
    classifier: str | os.PathLike | None = None,
    classifier_preset: str | None = None,
    labels: str | os.PathLike | None = None,
    overwrite: bool = False,
) -> Path:
    """Write original checkpoints as a pipeline folder of diffusers.

    The folder holds the UNet, the classifier if there is one, the scheduler of the UNet's process and a card. With
    `diffusers_ext` imported, `DiffusionPipeline.from_pretrained` loads it. As in the scripts of the originals, the
    classifier is taken to know the noise of the UNet's process.

    Args:
        source: checkpoint of the UNet.
        preset: the released checkpoint that it is, such as 256x256_diffusion_uncond. For one of your own, a `.json`
            file of its flags, with its `architecture` among them if that is not guided-diffusion's.
        output: folder to write.
        classifier: checkpoint of the classifier that guides.
        classifier_preset: as `preset`, for the classifier, such as 256x256_classifier.
        labels: names of the classes: a text file with one per line, or a `.json` file with a list, or with an object
            from id to name.
        overwrite: replace `output` if it is not empty.

    Returns:
        `output`.

    Raises:
        FileExistsError: when `output` is not empty and `overwrite` is not set.
        ValueError: for an unknown preset or flag, a file that is no checkpoint or does not fit, networks that do not
            belong together, and another number of labels than classes. Nothing is written then.
    """
    output = Path(output)
    if output.exists() and not overwrite and (output.is_file() or any(output.iterdir())):
        raise FileExistsError(f"`output` ({output}) exists and is not empty. Choose another one, or set `overwrite`.")
    if (classifier is None) != (classifier_preset is None):
        raise ValueError(
            f"`classifier` is {classifier}, `classifier_preset` is {classifier_preset}: give both of them, or neither."
        )
    run = _read_preset(preset, "guided-diffusion/unet")
    unet = load_original(source, run.architecture, config=run.flags)
    if not isinstance(unet, ADMUNet2DModel):
        raise ValueError(f"`preset` ({preset}) is a classifier; give it as `classifier_preset`, and a UNet here.")
    flags = complete_flags(run.architecture, None, run.flags)
    scheduler = DDPMScheduler(**to_scheduler_config(run.architecture, flags, unet))

    guide, classifier_schedule = None, None
    if classifier is not None:
        guide_run = _read_preset(classifier_preset, "guided-diffusion/classifier")
        guide = load_original(classifier, guide_run.architecture, config=guide_run.flags)
        _check_classifier(guide, unet)
        # Kept apart from the scheduler, which may be exchanged for one of another process.
        words = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end")
        classifier_schedule = {word: scheduler.config[word] for word in words}
    num_classes = unet.config.num_class_embeds if guide is None else guide.config.num_classes
    pipeline = ClassifierGuidedPipeline(
        unet=unet,
        scheduler=scheduler,
        classifier=guide,
        id2label=None if labels is None else _read_labels(Path(labels), num_classes),
        classifier_schedule=classifier_schedule,
    )

    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".writing-") as temporary:
        folder = Path(temporary) / "new"
        pipeline.save_pretrained(folder)
        (folder / "README.md").write_text(_card(output.name, pipeline, run, Path(source).name, classifier))
        if output.exists():
            os.replace(output, Path(temporary) / "old")
        os.replace(folder, output)
    return output


def _read_preset(name: str, architecture: str) -> Preset:
    """What is known of a checkpoint: a released one, or one whose flags are in a file."""
    if not name.endswith(".json"):
        if name not in presets:
            raise ValueError(
                f"`preset` ({name!r}) is unknown. Valid: {', '.join(presets)}, or a `.json` file of flags."
            )
        return presets[name]
    flags = json.loads(Path(name).read_text())
    return Preset(flags.pop("architecture", architecture), flags, url=None, licence=None)


def _check_classifier(classifier: ADMClassifierModel, unet: ADMUNet2DModel) -> None:
    if not isinstance(classifier, ADMClassifierModel):
        raise ValueError("`classifier_preset` is a UNet; give it as `preset`.")
    channels = unet.config.in_channels - unet.config.low_res_channels
    seen, drawn = classifier.config, unet.config
    if (seen.sample_size, seen.in_channels) != (drawn.sample_size, channels):
        raise ValueError(
            f"`classifier` is for {seen.sample_size} px images of {seen.in_channels} channels, the UNet for "
            f"{drawn.sample_size} px images of {channels}: they do not belong together."
        )


def _read_labels(path: Path, num_classes: int | None) -> dict[int, str]:
    text = path.read_text()
    if path.suffix == ".json":
        content = json.loads(text)
        labels = {int(key): label for key, label in content.items()} if isinstance(content, dict) else content
    else:
        labels = text.splitlines()
    if not isinstance(labels, dict):
        labels = dict(enumerate(labels))
    if sorted(labels) != list(range(num_classes or 0)):
        raise ValueError(f"`labels` ({path}) names {len(labels)} classes, but the networks know {num_classes or 0}.")
    return labels


def _card(
    name: str, pipeline: ClassifierGuidedPipeline, run: Preset, source: str, classifier: str | os.PathLike | None
) -> str:
    """Model card: where the weights come from, how their authors sample, and what the folder holds."""
    unet, guide, scheduler = pipeline.unet, pipeline.classifier, pipeline.scheduler.config
    codebase = run.architecture.partition("/")[0]
    file = f"[`{source}`]({run.url})" if run.url else f"`{source}`"
    origin = f"{file}, a UNet of [{codebase}](https://github.com/openai/{codebase}) ({_PAPERS[codebase]})"
    if guide is not None:
        origin += f" with the noise-aware classifier `{Path(classifier).name}`"

    arguments = []
    if unet.config.low_res_channels:
        arguments.append("low_res=[PIL.Image.open(path)]")
    elif guide is None and unet.config.num_class_embeds is None:
        arguments.append("batch_size=4")
    if guide is not None or unet.config.num_class_embeds is not None:
        arguments.append("class_labels=[0]")
    if guide is not None:
        arguments.append('guidance_mode="mean"')
        if run.classifier_scale is not None:
            arguments.append(f"guidance_scale={run.classifier_scale}")
    arguments.append(f"num_inference_steps={run.num_inference_steps or scheduler.num_train_timesteps}")

    facts = {
        "UNet": f"{unet.num_parameters():,} parameters",
        "classifier": guide and f"{guide.num_parameters():,} parameters",
        "images": f"{unet.config.sample_size} px",
        "classes known to the UNet": unet.config.num_class_embeds,
        "classes known to the classifier": guide and guide.config.num_classes,
        "process": f"{scheduler.num_train_timesteps} steps, betas `{scheduler.beta_schedule}`",
        "variance": f"`{scheduler.variance_type}`",
        "sampling steps of the authors": run.num_inference_steps and f"{run.num_inference_steps}, ancestral",
        "classifier scale of the authors": guide and run.classifier_scale,
        "licence of the weights": run.licence and run.licence.upper(),
    }
    return _CARD.format(
        licence=f"license: {run.licence}\n" if run.licence else "",
        codebase=codebase,
        name=name,
        origin=origin,
        arguments=", ".join(arguments),
        facts="\n".join(f"| {fact} | {value} |" for fact, value in facts.items() if value is not None),
    )
