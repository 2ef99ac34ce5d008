"""Draws digits with classifier guidance: one column per class, one row per guidance scale, the same noise in a column.

`make sample` runs it with the trained model of this repository; `--help` lists what can be changed.
"""

import time
from pathlib import Path

import torch
import tyro
from PIL import Image, ImageDraw, ImageFont, ImageOps

from diffusers import DDIMScheduler, DiffusionPipeline

import diffusers_ext  # noqa: F401, for DiffusionPipeline to find our classes


ROOT = Path(__file__).resolve().parents[1]
MARGIN = 64  # pixels left of the grid and above it, for the captions


def draw_grid(rows: list[list[Image.Image]], row_captions: list[str], column_captions: list[str]) -> Image.Image:
    """One picture of equally large images with captions to the left and above."""
    width, height = rows[0][0].size
    size = (MARGIN + width * len(column_captions), MARGIN // 2 + height * len(rows))
    grid = Image.new(rows[0][0].mode, size, "white")
    draw = ImageDraw.Draw(grid)
    font = ImageFont.load_default(size=15)
    for column, caption in enumerate(column_captions):
        draw.text((MARGIN + (column + 0.5) * width, MARGIN / 4), caption, fill="black", font=font, anchor="mm")
    for row, (images, caption) in enumerate(zip(rows, row_captions, strict=True)):
        top = MARGIN // 2 + row * height
        draw.text((MARGIN / 2, top + height / 2), caption, fill="black", font=font, anchor="mm")
        for column, image in enumerate(images):
            grid.paste(image, (MARGIN + column * width, top))
    return grid


def main(
    model: str = str(ROOT / "model_cards" / "adm-mnist"),
    output: Path = Path("samples/adm-mnist.png"),
    class_labels: tuple[int, ...] = tuple(range(10)),
    guidance_scales: tuple[float, ...] = (0.0, 1.0, 2.0, 4.0),
    num_inference_steps: int = 50,
    zoom: int = 2,
    seed: int = 0,
    device: str = "cpu",
) -> None:
    """Draws a grid of guided samples with DDIM.

    Args:
        model: folder or Hub repository of a `ClassifierGuidedPipeline`.
        output: PNG file to write.
        class_labels: one column each.
        guidance_scales: one row each; 0 does not look at the label.
        num_inference_steps: steps of DDIM.
        zoom: pixels of the picture per pixel of a sample.
        seed: the images of column i start from the noise of seed + i.
        device: where to run.
    """
    start = time.perf_counter()
    pipe = DiffusionPipeline.from_pretrained(model).to(device)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)

    rows = []
    for scale in guidance_scales:
        pipe.set_progress_bar_config(desc=f"guidance scale {scale:g}")
        images = pipe(
            class_labels=list(class_labels),
            guidance_scale=scale,
            num_inference_steps=num_inference_steps,
            generator=[torch.Generator().manual_seed(seed + i) for i in range(len(class_labels))],
        ).images
        rows.append([ImageOps.scale(image, zoom, Image.Resampling.NEAREST) for image in images])

    grid = draw_grid(rows, [f"scale {scale:g}" for scale in guidance_scales], [str(label) for label in class_labels])
    output.parent.mkdir(parents=True, exist_ok=True)
    grid.save(output)
    print(f"{output} (columns: class, rows: guidance scale) in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    tyro.cli(main)
