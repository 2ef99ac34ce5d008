"""Draws digits with trained models: one row per model and guidance scale, one column per class, which is also a seed.

`make sample` draws all models of this repository side by side; `--help` lists what can be changed.
"""

import time
from pathlib import Path

import torch
import tyro
from PIL import Image, ImageDraw, ImageFont, ImageOps

from diffusers import DDIMScheduler, DiffusionPipeline

import diffusers_ext  # noqa: F401, for DiffusionPipeline to find our classes


MODEL_CARDS = Path(__file__).resolve().parents[1] / "model_cards"
HEADER = 32  # pixels above the grid, for the captions of columns


def draw_grid(rows: list[list[Image.Image]], row_captions: list[str], column_captions: list[str]) -> Image.Image:
    """One picture of images in cells of one size, with captions to the left and above."""
    width, height = (max(image.size[side] for row in rows for image in row) for side in (0, 1))
    font = ImageFont.load_default(size=15)
    margin = int(max(font.getlength(line) for caption in row_captions for line in caption.split("\n"))) + 24
    size = (margin + width * len(column_captions), HEADER + height * len(rows))
    grid = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(grid)
    draw.rectangle((margin, HEADER, *size), fill="black")
    for column, caption in enumerate(column_captions):
        draw.text((margin + (column + 0.5) * width, HEADER / 2), caption, fill="black", font=font, anchor="mm")
    for row, (images, caption) in enumerate(zip(rows, row_captions, strict=True)):
        top = HEADER + row * height
        draw.text((margin / 2, top + height / 2), caption, fill="black", font=font, anchor="mm", align="center")
        for column, image in enumerate(images):
            left = margin + column * width + (width - image.width) // 2
            grid.paste(image, (left, top + (height - image.height) // 2))
    return grid


def main(
    models: tuple[str, ...] = tuple(str(path.parent) for path in sorted(MODEL_CARDS.glob("*/model_index.json"))),
    output: Path = Path("samples/models.png"),
    class_labels: tuple[int, ...] = tuple(range(10)),
    guidance_scales: tuple[float, ...] = (),
    num_inference_steps: int = 50,
    zoom: int = 2,
    seed: int = 0,
    device: str = "cpu",
) -> None:
    """Draws a grid of samples with DDIM.

    Args:
        models: folders or Hub repositories of `ClassifierGuidedPipeline` and `ClassConditionalPipeline`.
        output: PNG file to write.
        class_labels: one column each; models that know no classes draw what they like.
        guidance_scales: one row each for every model with classes; by default one row at the pipeline's own scale.
        num_inference_steps: steps of DDIM.
        zoom: pixels of the picture per pixel of a sample.
        seed: the images of column i start from the noise of seed + i.
        device: where to run.
    """
    start = time.perf_counter()
    rows, captions = [], []
    for model in models:
        pipe = DiffusionPipeline.from_pretrained(model).to(device)
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        name = Path(model).name
        network = pipe.components.get("transformer") or pipe.unet
        knows_classes = pipe.components.get("classifier") is not None or network.config.num_class_embeds is not None
        for scale in (guidance_scales or (None,)) if knows_classes else (None,):
            captions.append(name if scale is None else f"{name}\nscale {scale:g}")
            pipe.set_progress_bar_config(desc=captions[-1].replace("\n", ", "))
            condition = {"class_labels": list(class_labels)} if knows_classes else {"batch_size": len(class_labels)}
            images = pipe(
                **condition,
                guidance_scale=scale,
                num_inference_steps=num_inference_steps,
                generator=[torch.Generator().manual_seed(seed + i) for i in range(len(class_labels))],
            ).images
            rows.append([ImageOps.scale(image, zoom, Image.Resampling.NEAREST) for image in images])

    grid = draw_grid(rows, captions, [str(label) for label in class_labels])
    output.parent.mkdir(parents=True, exist_ok=True)
    grid.save(output)
    print(f"{output} (columns: class and seed, rows: model) in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    tyro.cli(main)
