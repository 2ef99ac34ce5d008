"""Original checkpoints -> a pipeline folder of diffusers: what `diffusers-ext convert` runs."""

import json
import os
import tempfile
from pathlib import Path

from diffusers import AutoencoderKL, DDPMScheduler, ModelMixin
from diffusers.utils import logging

from diffusers_ext.cards.card import check_names, compose, licence_name, save_card
from diffusers_ext.cards.folder import read_folder
from diffusers_ext.conversion.original import complete_flags, load_original, presets, to_scheduler_config
from diffusers_ext.conversion.presets import Preset
from diffusers_ext.hub.loading import open_folder
from diffusers_ext.models.transformer_dit_gqa import GQADiTTransformer2DModel
from diffusers_ext.models.unet_adm import ADMClassifierModel, ADMUNet2DModel
from diffusers_ext.pipelines.pipeline_class_conditional import ClassConditionalPipeline
from diffusers_ext.pipelines.pipeline_classifier_guided import ClassifierGuidedPipeline


Pipeline = ClassifierGuidedPipeline | ClassConditionalPipeline
logger = logging.get_logger(__name__)

_INTENDED = "blob/main/model-card.md"

# Repository of each codebase, what its networks are, and the paper.
_ORIGINS = {
    "guided-diffusion": (
        "openai/guided-diffusion",
        "UNet",
        "[Diffusion Models Beat GANs on Image Synthesis](https://arxiv.org/abs/2105.05233)",
    ),
    "improved-diffusion": (
        "openai/improved-diffusion",
        "UNet",
        "[Improved Denoising Diffusion Probabilistic Models](https://arxiv.org/abs/2102.09672)",
    ),
    "ddim": ("ermongroup/ddim", "UNet", "[Denoising Diffusion Implicit Models](https://arxiv.org/abs/2010.02502)"),
    "dit": (
        "facebookresearch/DiT",
        "transformer",
        "[Scalable Diffusion Models with Transformers](https://arxiv.org/abs/2212.09748)",
    ),
    "mnist-dilated": (
        "Jackson-Kang/Pytorch-Diffusion-Model-Tutorial",
        "denoiser",
        "[Denoising Diffusion Probabilistic Models](https://arxiv.org/abs/2006.11239)",
    ),
}


def convert_checkpoint(
    source: str | os.PathLike,
    *,
    preset: str,
    output: str | os.PathLike,
    classifier: str | os.PathLike | None = None,
    classifier_preset: str | None = None,
    vae: str | os.PathLike | None = None,
    labels: str | os.PathLike | None = None,
    license: str | None = None,
    base_model: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write original checkpoints as a pipeline folder of diffusers.

    The folder holds the denoiser, the classifier or autoencoder if there is one, the scheduler of the denoiser's
    process and a card. With `diffusers_ext` imported, `DiffusionPipeline.from_pretrained` loads it: UNets of
    guided-diffusion and improved-diffusion as a `ClassifierGuidedPipeline`, all others as a
    `ClassConditionalPipeline`. As in the scripts of the originals, the classifier is taken to know the noise of the
    UNet's process.

    Args:
        source: checkpoint of the denoiser.
        preset: the released checkpoint that it is, such as 256x256_diffusion_uncond or DiT-XL-2-256x256. For one of
            your own, a `.json` file of its flags, with its `architecture` among them if that is not
            guided-diffusion/unet.
        output: folder to write.
        classifier: checkpoint of the classifier that guides a UNet of guided-diffusion or improved-diffusion.
        classifier_preset: as `preset`, for the classifier, such as 256x256_classifier.
        vae: folder or Hub id of the `AutoencoderKL` whose latents the denoiser knows, such as
            stabilityai/sd-vae-ft-mse for DiT. Without it the pipeline draws latents.
        labels: names of the classes: a text file with one per line, or a `.json` file with a list, or with an object
            from id to name.
        license: of the weights, by its Hub identifier such as `cc-by-nc-4.0`; None: that of the released checkpoint.
            The card says so where it is known for neither, and cannot be published then.
        base_model: where the weights come from: a name on the Hub, or an address.
        overwrite: replace `output` if it is not empty.

    Returns:
        `output`.

    Raises:
        FileExistsError: when `output` is not empty and `overwrite` is not set.
        OSError: when there is no autoencoder at `vae`.
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
    license = licence_name(license)
    check_names("base_model", base_model)
    run = _read_preset(preset, "guided-diffusion/unet")
    guide_run = None if classifier is None else _read_preset(classifier_preset, "guided-diffusion/classifier")
    model = load_original(source, run.architecture, config=run.flags)
    if isinstance(model, ADMClassifierModel):
        raise ValueError(f"`preset` ({preset}) is a classifier; give it as `classifier_preset`, and a UNet here.")
    flags = complete_flags(run.architecture, None, run.flags)
    scheduler = DDPMScheduler(**to_scheduler_config(run.architecture, flags, model))
    if isinstance(model, ADMUNet2DModel):
        if vae is not None:
            raise ValueError(f"`vae` ({vae}) was given, but {run.architecture!r} knows images, not latents.")
        pipeline = _classifier_guided(model, scheduler, classifier, guide_run, labels)
    else:
        if classifier is not None:
            raise ValueError(
                f"`classifier` ({classifier}) was given, but it guides UNets of guided-diffusion and "
                f"improved-diffusion only, not of {run.architecture!r}."
            )
        pipeline = _class_conditional(model, scheduler, vae, labels)

    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".writing-") as temporary:
        folder = Path(temporary) / "new"
        pipeline.save_pretrained(folder)
        parts = {"classifier": classifier, "vae": vae}
        if license is None and (guide_run is None or guide_run.licence == run.licence):
            license = run.licence
        if license is None:
            logger.warning(
                "The licence of these weights is not known, so they cannot be pushed. When you know it, record it: "
                f"`diffusers-ext card {output} --license ... --base_model ...`."
            )
        _write_card(folder, output.name, pipeline, run, Path(source).name, parts, license, base_model)
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


def _classifier_guided(
    unet: ADMUNet2DModel,
    scheduler: DDPMScheduler,
    classifier: str | os.PathLike | None,
    guide_run: Preset | None,
    labels: str | os.PathLike | None,
) -> ClassifierGuidedPipeline:
    guide, classifier_schedule = None, None
    if classifier is not None:
        guide = load_original(classifier, guide_run.architecture, config=guide_run.flags)
        _check_classifier(guide, unet)
        # Kept apart from the scheduler, which may be exchanged for one of another process.
        words = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end")
        classifier_schedule = {word: scheduler.config[word] for word in words}
    num_classes = unet.config.num_class_embeds if guide is None else guide.config.num_classes
    return ClassifierGuidedPipeline(
        unet=unet,
        scheduler=scheduler,
        classifier=guide,
        id2label=None if labels is None else _read_labels(Path(labels), num_classes),
        classifier_schedule=classifier_schedule,
    )


def _class_conditional(
    model: ModelMixin, scheduler: DDPMScheduler, vae: str | os.PathLike | None, labels: str | os.PathLike | None
) -> ClassConditionalPipeline:
    autoencoder = None
    if vae is not None:
        autoencoder = AutoencoderKL.from_pretrained(open_folder(vae, argument="vae"), use_safetensors=True)
        channels = autoencoder.config.latent_channels
        if channels != model.config.in_channels:
            raise ValueError(
                f"`vae` ({vae}) has latents of {channels} channels, the denoiser knows {model.config.in_channels}: "
                "they do not belong together."
            )
    component = "transformer" if isinstance(model, GQADiTTransformer2DModel) else "unet"
    return ClassConditionalPipeline(
        **{component: model},
        scheduler=scheduler,
        vae=autoencoder,
        id2label=None if labels is None else _read_labels(Path(labels), model.config.num_class_embeds),
    )


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


def _write_card(
    folder: Path,
    name: str,
    pipeline: Pipeline,
    run: Preset,
    source: str,
    parts: dict[str, str | os.PathLike | None],
    license: str | None,
    base_model: str | None,
) -> None:
    """Model card with where the weights come from, how their authors sample, and what may be done with them."""
    guide, scheduler = getattr(pipeline, "classifier", None), pipeline.scheduler.config
    model = pipeline.unet or pipeline.transformer
    codebase = run.architecture.partition("/")[0]
    repository, noun, paper = _ORIGINS[codebase]
    file = f"[`{source}`]({run.url})" if run.url else f"`{source}`"
    origin = f"{file}, a {noun} of [{repository.partition('/')[2]}](https://github.com/{repository}) ({paper})"
    classifier, vae = parts["classifier"], parts["vae"]
    if guide is not None:
        origin += f" with the noise-aware classifier `{Path(classifier).name}`"
    if vae is not None:
        origin += f" with the autoencoder `{Path(vae).name if Path(vae).exists() else vae}`"
    origin += ", converted by `diffusers_ext`."
    if codebase == "guided-diffusion" and run.url is not None:
        origin += (
            f" Its authors intend it for research only ([model card](https://github.com/{repository}/{_INTENDED}))."
        )

    arguments = []
    conditional = guide is not None or model.config.num_class_embeds is not None
    if model.config.get("low_res_channels"):
        arguments.append("low_res=low_res")
    elif not conditional:
        arguments.append("batch_size=4")
    if conditional:
        arguments.append("class_labels=[0]")
    if guide is not None:
        arguments.append('guidance_mode="mean"')
    if run.guidance_scale is not None and (guide is not None or model.config.null_class):
        arguments.append(f"guidance_scale={run.guidance_scale}")
    if codebase == "dit" and run.guidance_scale is not None:
        arguments.append("guided_channels=3")  # of four, as its authors' code does
    arguments.append(f"num_inference_steps={run.num_inference_steps or scheduler.num_train_timesteps}")

    scale = 1 if vae is None else 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
    facts = {
        "latents" if codebase == "dit" and vae is None else "images": f"{scale * model.config.sample_size} px",
        f"classes known to the {noun}": model.config.num_class_embeds,
        "classes known to the classifier": guide and guide.config.num_classes,
        "sampling steps of the authors": run.num_inference_steps and f"{run.num_inference_steps}, ancestral",
        "classifier scale of the authors": guide and run.guidance_scale,
        "guidance scale of the authors": model.config.null_class and run.guidance_scale or None,
    }
    rows = "\n".join(f"| {fact} | {value} |" for fact, value in facts.items() if value is not None)
    content = compose(
        read_folder(folder),
        name=name,
        metadata={"license": license, "base_model": base_model, "tags": [codebase]},
        given={"origin": f"{origin}\n\n| | |\n|---|---|\n{rows}"},
        call=", ".join(arguments),
    )
    save_card(folder, content)
