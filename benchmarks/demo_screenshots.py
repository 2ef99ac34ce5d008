"""Takes the pictures of the demo that its README shows: light, dark, on a phone, and while it draws.

`make screenshots` starts the demo, clicks a preset in headless Chromium, and writes them.
"""

import io
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import tyro
from browser import APP, Visitor, chromium, missing, running_demo
from PIL import Image


if TYPE_CHECKING:
    from playwright.sync_api import Page


MAX_BYTES = 300_000  # of one picture: a clone of the repository carries them all
GAP = 40  # pixels between the two screens of the phone
VIEWS = {
    "light": {"viewport": {"width": 1440, "height": 900}, "color_scheme": "light"},
    "dark": {"viewport": {"width": 1440, "height": 900}, "color_scheme": "dark"},
    "phone": {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "is_mobile": True},
}
HALF_WAY = "() => document.querySelector('#pictures-b [role=progressbar]')?.ariaValueNow >= 40"


def screen(page: "Page") -> Image.Image:
    """What the window shows now."""
    return Image.open(io.BytesIO(page.screenshot(animations="disabled"))).convert("RGB")


def save_small(image: Image.Image, path: Path) -> None:
    """Writes a PNG within `MAX_BYTES`: with all its colours where they fit, else with 256."""
    for candidate in (image, image.quantize(256, dither=Image.Dither.NONE)):
        candidate.save(path, optimize=True)
        if path.stat().st_size <= MAX_BYTES:
            return
    raise RuntimeError(f"{path.name} has {path.stat().st_size} bytes with 256 colours; {MAX_BYTES} is the limit.")


def main(output: Path = APP.parent / "screenshots", preset: str = "Guidance off against on") -> None:
    """Takes all pictures.

    Args:
        output: folder to write `light.png`, `dark.png`, `phone.png` and `drawing.png` into.
        preset: the comparison that they show.
    """
    if missing():
        raise SystemExit(missing())
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, running_demo(Path(folder) / "log") as demo, chromium() as browser:
        for name, view in VIEWS.items():
            page = browser.new_page(**view)
            visitor = Visitor(page, demo.url)
            visitor.start(preset)
            if name == "light":
                page.wait_for_function(HALF_WAY)
                save_small(screen(page), output / "drawing.png")
            visitor.wait_until_settled()
            page.mouse.move(0, 0)
            picture = screen(page)
            if name == "phone":  # beside the top of the page, what a thumb finds below
                page.locator("#column-b").evaluate("column => column.scrollIntoView()")
                top, below = picture, screen(page)
                picture = Image.new("RGB", (top.width + GAP + below.width, top.height), "white")
                picture.paste(top)
                picture.paste(below, (top.width + GAP, 0))
            save_small(picture, output / f"{name}.png")
            page.close()
    for path in sorted(output.glob("*.png")):
        print(f"{path} {path.stat().st_size // 1000} kB")


if __name__ == "__main__":
    tyro.cli(main)
