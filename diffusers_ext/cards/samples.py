"""A picture of samples for a card: few, from fixed noise, the same at every drawing."""

import io
import threading

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import diffusers
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.utils import logging

from diffusers_ext.cards.blocks import PICTURE, WEIGHTS_OF_PICTURE, is_ours, num_classes
from diffusers_ext.cards.folder import Contents
from diffusers_ext.files import write_atomically


logger = logging.get_logger(__name__)
STEPS = 20
COLUMNS, ROWS = 10, 2
AFFORDABLE = 1e9  # parameters times passes through the networks: seconds on a core
KNOWN = ("ClassConditionalPipeline", "ClassifierGuidedPipeline", "DDPMPipeline", "DDIMPipeline", "DiTPipeline")
# While diffusers loads, parameters that are made get no memory; two loads at once leave it at that for good.
LOADING = threading.Lock()


def draw_samples(contents: Contents, at_any_cost: bool = False) -> None:
    """Draw `samples.png` into the folder: a column for each of the first ten classes, or ten images of any, twice.

    Args:
        contents: of the folder of a pipeline.
        at_any_cost: False leaves out what would take long, or cannot be drawn without an input.

    Raises:
        ValueError: when it is asked for, but the folder holds no pipeline that draws without further inputs.
    """
    denoiser = contents.denoiser
    reason = None
    if contents.kind != "pipeline" or contents.class_name not in KNOWN or denoiser is None or not denoiser.weights:
        reason = f"only complete pipelines of {', '.join(KNOWN)} are drawn"
    elif contents.self_contained and not is_ours(contents.class_name):
        reason = "the code beside its weights would have to be run"
    elif contents.reads_text or denoiser.config.get("low_res_channels"):
        reason = "the pipeline needs a prompt or an image, which is for you to choose"
    elif denoiser.config.get("in_channels") not in (1, 3) and "vae" not in contents.parts:
        reason = "the pipeline draws latents"
    elif denoiser.config.get("sample_size", 0) is None:
        reason = "the network was made for no size"
    if reason is not None:
        if at_any_cost:
            raise ValueError(f"`samples`: nothing can be drawn for {contents.folder}, since {reason}.")
        return
    parameters = sum(
        max(weights.parameters for weights in part.weights.values()) for part in contents.networks.values()
    )
    if parameters * STEPS * COLUMNS * ROWS > AFFORDABLE and not at_any_cost:
        logger.info("%s is large, so no samples are drawn for its card unless `samples` is set.", contents.folder)
        return
    try:
        image = _draw(contents, num_classes(contents))
    except (TypeError, ValueError, RuntimeError) as error:  # a pipeline that cannot draw may still be published
        if at_any_cost:
            raise
        logger.warning("The card of %s has no samples, since none could be drawn: %s", contents.folder, error)
        return
    entries = PngInfo()
    entries.add_text(WEIGHTS_OF_PICTURE, contents.digest)
    content = io.BytesIO()
    image.save(content, format="png", pnginfo=entries)
    write_atomically(contents.folder / PICTURE, content.getvalue())


def _draw(contents: Contents, classes: int | None) -> Image.Image:
    # Ours load the folders of diffusers' pipelines too, and by installed code those that carry some.
    loader = getattr(diffusers, contents.class_name if is_ours(contents.class_name) else "ClassConditionalPipeline")
    with LOADING:
        pipe = loader.from_pretrained(contents.folder, variant=contents.variant, use_safetensors=True)
    if isinstance(pipe.scheduler, DDPMScheduler):
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(desc="Drawing samples for the card")
    columns = min(COLUMNS, classes or COLUMNS)
    arguments = {"class_labels": list(range(columns))} if classes else {"batch_size": columns}
    images = []
    for row in range(ROWS):
        generators = [torch.Generator().manual_seed(row * columns + index) for index in range(columns)]
        images += pipe(**arguments, generator=generators, num_inference_steps=STEPS).images
    width, height = images[0].size
    zoom = max(1, 640 // (columns * width))
    grid = Image.new(images[0].mode, (columns * width * zoom, ROWS * height * zoom))
    for index, image in enumerate(images):
        place = (index % columns * width * zoom, index // columns * height * zoom)
        grid.paste(image.resize((width * zoom, height * zoom), Image.Resampling.NEAREST), place)
    return grid
