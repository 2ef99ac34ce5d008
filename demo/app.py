"""The demo: models, schedulers and guidance side by side, from the same noise. A Gradio app and Hugging Face Space.

`python demo/app.py` serves it from a checkout, `make demo` with everything installed.
"""

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from random import randrange
from typing import Any


os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import gradio as gr
import rendering
import torch
import tyro
from catalog import Catalog, Description
from comparison import ColumnState
from endpoints import KEPT, Endpoints, chosen_column
from judge import load_judge
from pictures import difference
from PIL import Image
from plan import generators, initial_noise, wanted_labels
from settings import (
    LETTERS,
    MAX_COLUMNS,
    MAX_IMAGES,
    MAX_PROMPT,
    MAX_SCALE,
    MAX_SEED,
    PRESETS,
    Column,
    Comparison,
    SettingsError,
    from_link,
    to_link,
)

from diffusers.utils import logging


FOLDER = Path(__file__).parent
CONCURRENCY = max(2, os.cpu_count() or 1)  # comparisons at once; their columns share the processor's cores
MAX_WAITING = 64  # calls in the queue; later ones are told that it is full
SYSTEM_FONTS = ("ui-sans-serif", "system-ui", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
MONO_FONTS = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "Liberation Mono", "monospace")


@dataclass(frozen=True)
class Drawn:
    """What a session keeps of its last comparison."""

    comparison: Comparison
    states: list[ColumnState]


def theme() -> gr.themes.Base:
    """Calm greys, one accent, system fonts: nothing is fetched from elsewhere."""
    return gr.themes.Base(
        primary_hue=gr.themes.colors.indigo,
        neutral_hue=gr.themes.colors.slate,
        spacing_size=gr.themes.sizes.spacing_sm,
        radius_size=gr.themes.sizes.radius_md,
        text_size=gr.themes.sizes.text_md,
        font=SYSTEM_FONTS,
        font_mono=MONO_FONTS,
    ).set(
        body_background_fill="#f4f5f8",
        body_background_fill_dark="#0e1117",
        block_background_fill="transparent",
        block_background_fill_dark="transparent",
        block_border_width="0px",
        block_shadow="none",
        block_shadow_dark="none",
        block_padding="0px",
        block_label_text_color="#4b5565",
        block_title_text_color="#4b5565",
        block_title_text_color_dark="#a9b4c4",
        block_title_text_size="12px",
        block_title_text_weight="500",
        body_text_color="#1a2130",
        body_text_color_dark="#e6eaf1",
        body_text_color_subdued="#4b5565",
        body_text_color_subdued_dark="#a9b4c4",
        input_background_fill="#ffffff",
        input_background_fill_dark="#1b212c",
        input_border_color="#cdd3dd",
        input_border_color_dark="#3a4352",
        input_border_width="1px",
        input_padding="6px 10px",
        input_text_size="14px",
        button_primary_background_fill="#3f4fc4",
        button_primary_background_fill_hover="#3342ab",
        button_primary_background_fill_dark="#9aa7ff",
        button_primary_background_fill_hover_dark="#b3bdff",
        button_primary_text_color="#ffffff",
        button_primary_text_color_dark="#0e1117",
        slider_color="#3f4fc4",
        slider_color_dark="#9aa7ff",
    )


@dataclass
class Panel:
    """The controls of one column, in the order of `names`.

    `settled` holds the model and the guidance that the controls follow: a dropdown that is only left says `input` too.
    """

    controls: dict[str, gr.components.Component]
    settled: gr.State
    pictures: gr.HTML
    frame: gr.Column

    names = ("model", "scheduler", "steps", "guidance", "scale", "start", "end", "eta", "dtype")


def build(catalog: Catalog, judge=None) -> gr.Blocks:
    """The page and its endpoints, to be started by `launch`."""
    return Page(catalog, judge).demo


def launch(demo: gr.Blocks, **options: Any):
    """Starts the page; `options` are those of `gr.Blocks.launch`. No file is served but those that the app made."""
    return demo.launch(
        theme=theme(),
        css_paths=FOLDER / "style.css",
        js=(FOLDER / "page.js").read_text(encoding="utf-8"),
        footer_links=["api"],
        ssr_mode=False,
        mcp_server=False,
        max_file_size="1kb",  # nothing here takes a file
        **options,
    )


class Page:
    """The layout, and what its controls do. `demo` is the `gr.Blocks`."""

    shared_names = ("classes", "images", "seed", "prompt", "negative_prompt", "height", "width")

    def __init__(self, catalog: Catalog, judge=None):
        self.catalog = catalog
        self.endpoints = Endpoints(catalog, judge, CONCURRENCY)
        self.first = next(iter(PRESETS.values()))
        for name in catalog.names:
            with suppress(SettingsError):  # its column says why, when it draws
                catalog.describe(name)
        with gr.Blocks(
            title="diffusers_ext: guidance side by side",
            analytics_enabled=False,
            fill_width=True,
            delete_cache=(KEPT, KEPT),
        ) as self.demo:
            self._layout()
            self._events()
            self.endpoints.register()
        self.demo.queue(max_size=MAX_WAITING, default_concurrency_limit=CONCURRENCY)

    # Layout

    def _layout(self) -> None:
        shared, columns = self.control_values(self.first)
        self.drawn = gr.State(None, time_to_live=KEPT)
        with gr.Row(elem_id="head"):
            gr.HTML(
                '<div class="title"><span class="mark" aria-hidden="true"><i></i><i></i><i></i><i></i></span>'
                "<div><h1>Diffusion models side by side</h1>"
                "<p>From the same noise: what models, schedulers and guidance change.</p></div></div>",
                elem_id="title",
            )
            with gr.Row(elem_id="presets"):
                self.presets = [gr.Button(name, size="sm", elem_classes="preset") for name in PRESETS]
            self.theme = gr.Button("◐", size="sm", elem_id="theme", min_width=0)
        with gr.Column(elem_id="shared"):
            with gr.Row(elem_id="bar", elem_classes="card"):
                self.shared = {
                    "classes": gr.Dropdown(
                        label="Classes",
                        multiselect=True,
                        max_choices=MAX_IMAGES,
                        elem_id="classes",
                        **shared["classes"],
                    ),
                    "images": gr.Number(
                        label="Images",
                        elem_id="images",
                        elem_classes="short",
                        **shared["images"],
                    ),
                    "seed": gr.Number(
                        label="Seed",
                        elem_id="seed",
                        elem_classes="short",
                        **shared["seed"],
                    ),
                }
                self.dice = gr.Button("⚄", size="sm", elem_id="dice", min_width=0)
                self.lock = gr.Checkbox(True, label="Lock seed", elem_id="lock", container=False)
                self.count = gr.Radio(
                    ["2", "3", "4"], value=str(max(2, len(self.first.columns))), label="Columns", elem_id="count"
                )
                with (
                    gr.Accordion(
                        "Size",
                        open=False,
                        visible=shared["height"].pop("visible"),
                        elem_id="sizes",
                        elem_classes="more",
                    ) as self.sizes,
                    gr.Row(elem_classes="fields"),
                ):
                    for name in ("height", "width"):
                        self.shared[name] = gr.Number(
                            label=f"{name.capitalize()}, 0 for its own",
                            elem_id=name,
                            elem_classes="size",
                            min_width=60,
                            **shared[name],
                        )
                self.draw = gr.Button("Draw", variant="primary", elem_id="draw", size="md", min_width=0)
                self.stop = gr.Button(
                    "Stop", variant="secondary", elem_id="stop", size="md", min_width=0, interactive=False
                )
            with gr.Row(
                visible=shared["prompt"].pop("visible"), elem_id="texts", elem_classes=["card", "fields"]
            ) as self.texts:
                for name, label in (("prompt", "Prompt"), ("negative_prompt", "Negative prompt")):
                    self.shared[name] = gr.Textbox(
                        label=label, max_length=MAX_PROMPT, lines=1, elem_id=name, elem_classes="wide", **shared[name]
                    )
        hint = "Press Draw, or one of the four comparisons at the top: each sets everything and draws."
        self.live = gr.HTML(rendering.message(hint), elem_id="live")
        with gr.Row(elem_id="columns", equal_height=False):
            self.panels = [self._panel(index, columns[index]) for index in range(MAX_COLUMNS)]
        with gr.Tabs(elem_id="closer", overflow_behavior="wrap"):
            with gr.Tab("Steps", id="steps"):
                self.film = gr.HTML(rendering.film([]), elem_id="film")
            with gr.Tab("Two columns", id="pair"):
                self._pair()
            with gr.Tab("Curves", id="curves"):
                self.curves = gr.HTML(rendering.curves([]), elem_id="curves")
            with gr.Tab("Sweep", id="sweep-tab"):
                self._sweep()
            with gr.Tab("Take away", id="take"):
                self._take_away()

    def _panel(self, index: int, values: dict[str, dict[str, Any]]) -> Panel:
        """A column: its controls, and below them what it draws."""
        letter = LETTERS[index]
        shown = index < max(2, len(self.first.columns))
        with gr.Column(
            visible=shown, min_width=320, elem_id=f"column-{letter.lower()}", elem_classes=["card", "column"]
        ) as frame:
            with gr.Row(elem_classes=["fields", "one"]):
                gr.HTML(rendering.chip(letter), elem_classes="letter", min_width=0)
                model = gr.Dropdown(
                    label="Model", allow_custom_value=True, elem_classes="wide", min_width=120, **values["model"]
                )
                scheduler = gr.Dropdown(label="Scheduler", elem_classes="wide", min_width=120, **values["scheduler"])
                steps = gr.Number(
                    label="Steps",
                    elem_classes="short",
                    min_width=60,
                    **values["steps"],
                )
            with gr.Row(elem_classes="fields"):
                guidance = gr.Dropdown(
                    label="Guidance", elem_classes=["wide", "guidance"], min_width=120, **values["guidance"]
                )
                scale = gr.Slider(
                    0,
                    MAX_SCALE,
                    step=0.1,
                    label="Scale",
                    buttons=[],
                    elem_classes="wide scale",
                    min_width=120,
                    **values["scale"],
                )
                with gr.Accordion("More", open=False, elem_classes="more"), gr.Row(elem_classes="fields"):
                    small = {"elem_classes": "short", "min_width": 60}
                    start = gr.Number(label="From", step=0.05, **small, **values["start"])
                    end = gr.Number(label="To", step=0.05, **small, **values["end"])
                    eta = gr.Number(label="Eta", step=0.05, **small, **values["eta"])
                    dtype = gr.Dropdown(label="Precision", elem_classes="wide", min_width=90, **values["dtype"])
            pictures = gr.HTML(
                self.started(self.first, index), elem_id=f"pictures-{letter.lower()}", elem_classes="pictures"
            )
        controls = dict(zip(Panel.names, (model, scheduler, steps, guidance, scale, start, end, eta, dtype)))
        return Panel(controls, gr.State(self.settled(values)), pictures, frame)

    def _pair(self) -> None:
        letters = list(LETTERS[: max(2, len(self.first.columns))])
        with gr.Row(elem_classes="fields"):
            self.left = gr.Radio(letters, value="A", label="Left", elem_id="left")
            self.right = gr.Radio(letters, value="B", label="Right", elem_id="right")
            self.image = gr.Dropdown([("all images", -1)], value=-1, label="Image", elem_id="image", min_width=120)
        with gr.Row(elem_id="pair"):
            self.divided = gr.HTML(rendering.nothing("Draw something, then compare two columns here."))
            self.difference = gr.HTML("", elem_id="difference")

    def _sweep(self) -> None:
        letters = list(LETTERS[: max(2, len(self.first.columns))])
        with gr.Row(elem_classes="fields"):
            self.sweep_column = gr.Radio(letters, value=letters[-1], label="Column", elem_id="sweep-column")
            self.scales = gr.Textbox("0, 1, 2, 4, 8", label="Guidance scales", max_length=200, min_width=140)
            self.sweep_steps = gr.Textbox("2, 5, 10, 20", label="Numbers of steps", max_length=200, min_width=140)
            self.draw_sweep = gr.Button("Draw the sweep", size="md", elem_id="draw-sweep", min_width=0)
        self.sweep_note = gr.HTML(
            rendering.nothing("One picture of every scale with every number of steps, all from the same noise."),
            elem_id="sweep-note",
        )
        self.sweep_picture = gr.Image(
            visible=False,
            show_label=False,
            label="Sweep",
            format="png",
            type="pil",
            interactive=False,
            elem_id="sweep",
            buttons=["download", "fullscreen"],
        )

    def _take_away(self) -> None:
        with gr.Row(elem_classes="fields"):
            self.link = gr.Textbox("", label="Link", interactive=False, max_lines=1, elem_id="link")
            self.copy = gr.Button("Copy link", size="md", elem_id="copy-link", min_width=0)
            self.zip = gr.DownloadButton("Download zip", size="md", elem_id="download", interactive=False, min_width=0)
        self.code = gr.HTML(
            rendering.nothing("Draw something: here will be the Python that draws it."), elem_id="code"
        )

    # What the controls show

    def control_values(self, comparison: Comparison) -> tuple[dict[str, dict], list[dict[str, dict]]]:
        """Value, choices and visibility of every control: those that are shared, and those of each column."""
        columns = list(comparison.columns)
        columns += self.spare_columns(columns)
        per_column = [self.column_values(column, self.catalog.described(column.model)) for column in columns]
        shared = {
            "classes": {"value": list(comparison.class_labels)},
            "images": {"value": comparison.num_images},
            "seed": {"value": comparison.seed},
            "prompt": {"value": comparison.prompt},
            "negative_prompt": {"value": comparison.negative_prompt},
            "height": {"value": comparison.height},
            "width": {"value": comparison.width},
        }
        for name, update in self.shared_values([columns[i].model for i in range(len(comparison.columns))]).items():
            shared[name] |= update
        shared["classes"]["choices"] = list(dict.fromkeys([*shared["classes"]["choices"], *comparison.class_labels]))
        shared["prompt"]["visible"] |= bool(comparison.prompt or comparison.negative_prompt)
        return shared, per_column

    def spare_columns(self, columns: Sequence[Column]) -> list[Column]:
        """What further columns begin with: models that no column has yet, guided as they can be."""
        spare = []
        for name in self.catalog.names:
            description = self.catalog.described(name)
            if description is not None and name not in {column.model for column in columns}:
                kind = similar_guidance("classifier", description)
                spare.append(Column(model=name, guidance=kind, guidance_scale=description.guidance[kind]))
        return [*spare, *[columns[-1]] * MAX_COLUMNS][: MAX_COLUMNS - len(columns)]

    def shared_values(self, models: Sequence[str]) -> dict[str, dict[str, Any]]:
        """What the models in use make of the shared controls: the classes, texts, sizes."""
        known = [description for description in map(self.catalog.described, models) if description is not None]
        labels = list(dict.fromkeys(label for description in known for label in description.labels))
        return {
            "classes": {"choices": labels},
            "prompt": {"visible": any(description.takes_prompt for description in known)},
            "height": {"visible": any(description.resizable for description in known)},
        }

    def column_values(self, column: Column, description: Description | None) -> dict[str, dict[str, Any]]:
        """Value, choices and visibility of every control of a column."""
        names = self.catalog.names
        if description is None:
            schedulers, kinds, etas, dtypes = ([column.scheduler] if column.scheduler else []), {}, (), [column.dtype]
        else:
            schedulers, kinds = [description.default_scheduler, *description.schedulers], description.guidance
            etas, dtypes = description.eta_schedulers, description.dtypes
        scheduler = column.scheduler or (description.default_scheduler if description else None)
        kinds = dict.fromkeys([*kinds, column.guidance])
        start, end = column.guidance_interval
        guided = column.guidance != "none"
        return {
            "model": {"choices": list(dict.fromkeys([*names, column.model])), "value": column.model},
            "scheduler": {
                "choices": [
                    (name.removesuffix("Scheduler"), name) for name in dict.fromkeys([*schedulers, scheduler]) if name
                ],
                "value": scheduler,
            },
            "steps": {"value": column.num_inference_steps},
            "guidance": {"choices": [(kind_title(kind), kind) for kind in kinds], "value": column.guidance},
            "scale": {"value": column.guidance_scale, "interactive": guided},
            "start": {"value": start, "interactive": guided},
            "end": {"value": end, "interactive": guided},
            "eta": {"value": column.eta, "visible": scheduler in etas or column.eta > 0},
            "dtype": {"choices": list(dict.fromkeys([*dtypes, column.dtype])), "value": column.dtype},
        }

    def fill(self, comparison: Comparison) -> dict:
        """Updates that set the whole page to a comparison."""
        shared, columns = self.control_values(comparison)
        texts, sizes = shared["prompt"].pop("visible"), shared["height"].pop("visible")
        updates = {self.shared[name]: gr.update(**shared[name]) for name in self.shared_names}
        updates |= {self.texts: gr.update(visible=texts), self.sizes: gr.update(visible=sizes)}
        for panel, values in zip(self.panels, columns):
            updates |= {panel.controls[name]: gr.update(**values[name]) for name in Panel.names}
            updates[panel.settled] = self.settled(values)
        count = max(2, len(comparison.columns))
        updates[self.count] = gr.update(value=str(count))
        return updates | self.show_columns(count)

    def settled(self, values: dict[str, dict[str, Any]]) -> tuple[str, str]:
        """Model and guidance that the controls of a column follow; no model where it was not looked up yet."""
        model = values["model"]["value"]
        return model if self.catalog.described(model) else "", values["guidance"]["value"]

    def show_columns(self, count: int) -> dict:
        """Updates that show so many columns, and offer them where one is chosen."""
        letters = list(LETTERS[:count])
        updates = {panel.frame: gr.update(visible=index < count) for index, panel in enumerate(self.panels)}
        updates |= {
            self.left: gr.update(choices=letters, value="A"),
            self.right: gr.update(choices=letters, value="B"),
        }
        return updates | {self.sweep_column: gr.update(choices=letters, value=letters[-1])}

    def start_pictures(self, comparison: Comparison) -> dict:
        """Updates that show the noise from which every column will start."""
        return {panel.pictures: self.started(comparison, index) for index, panel in enumerate(self.panels)}

    def started(self, comparison: Comparison, index: int) -> str:
        """A column before it is drawn: the noise from which it will start."""
        column = comparison.columns[min(index, len(comparison.columns) - 1)]
        noise = self.noise_of(comparison, column.model)
        try:
            labels = wanted_labels(comparison, self.catalog.described(column.model)) if noise else []
        except SettingsError:
            labels = [None] * len(noise)
        return rendering.waiting(LETTERS[index], noise, labels)

    def noise_of(self, comparison: Comparison, model: str) -> list[Image.Image]:
        """The noise from which a model starts; of models that may have to be fetched first, none."""
        description = self.catalog.described(model)
        return noise_pictures(comparison, description) if description else []

    # What happens

    def _events(self) -> None:
        private = {"api_visibility": "private"}
        quick = {"queue": False, "show_progress": "hidden"} | private
        # `read` checks what controls send. Gradio would refuse choices that its copy of the page does not know yet.
        raw = {"preprocess": False}
        controls = [self.count, *(self.shared[name] for name in self.shared_names)]
        controls += [control for panel in self.panels for control in panel.controls.values()]
        frames = [panel.frame for panel in self.panels]
        pictures = [panel.pictures for panel in self.panels]
        settled = [panel.settled for panel in self.panels]
        whole = [*controls, *settled, *frames, self.texts, self.sizes, self.left, self.right, self.sweep_column]
        busy = [self.draw, self.stop, self.draw_sweep, *self.presets]
        results = [self.film, self.curves, self.divided, self.difference, self.image, self.link, self.zip, self.code]

        loaded = self.demo.load(self.on_load, None, [*whole, *pictures, self.live, self.lock], **quick)
        loaded.then(None, None, None, js="() => window.demoPage.ready()", **private)
        self.theme.click(None, None, None, js="() => window.demoPage.toggleTheme()", **private)
        self.dice.click(lambda: randrange(MAX_SEED), None, self.shared["seed"], **quick)
        self.count.input(
            self.on_count,
            controls,
            [*frames, self.left, self.right, self.sweep_column, self.shared["classes"], self.texts, self.sizes],
            **raw,
            **quick,
        )
        for index, panel in enumerate(self.panels):
            values, letter = list(panel.controls.values()), LETTERS[index].lower()
            panel.controls["model"].input(
                None, None, None, js=f"() => window.demoPage.changing('{letter}')", **private
            )
            changed = panel.controls["model"].input(
                self.model_changed(index),
                [panel.settled, *controls],
                [*values, panel.settled, self.shared["classes"], self.texts, self.sizes, panel.pictures],
                **raw,
                show_progress="minimal",
                show_progress_on=panel.pictures,
                **private,
            )
            changed.then(None, None, None, js=f"() => window.demoPage.changed('{letter}')", **private)
            panel.controls["guidance"].input(
                self.on_guidance,
                [panel.settled, *values],
                [panel.settled, *(panel.controls[name] for name in ("scale", "start", "end"))],
                **raw,
                **quick,
            )
            panel.controls["scheduler"].input(self.on_scheduler, values, panel.controls["eta"], **raw, **quick)

        starts = [
            self.draw.click(
                self.on_begin,
                [self.shared["seed"], self.lock],
                [self.shared["seed"], self.live, *busy],
                **raw,
                **quick,
            )
        ]
        for button, preset in zip(self.presets, PRESETS.values()):
            starts.append(
                button.click(self.preset_chosen(preset), None, [*whole, self.lock, self.live, *busy], **quick)
            )
        for started in starts:
            started.failure(lambda: self.busy(False), None, busy, **quick)
            drawn = started.then(
                self.on_draw,
                controls,
                [*pictures, self.live, self.drawn],
                **raw,
                show_progress="hidden",
                concurrency_id="draw",
                concurrency_limit=CONCURRENCY,
                **private,
            )
            drawn.failure(lambda: self.busy(False), None, busy, **quick)
            finished = drawn.success(self.on_finish, [self.drawn, self.left, self.right], [*results, *busy], **quick)
            finished.failure(lambda: self.busy(False), None, busy, **quick)
            finished.success(None, self.link, None, js="(link) => window.demoPage.remember(link)", **private)
        self.stop.click(self.on_stop, None, self.live, **quick)
        gr.on(
            [self.left.input, self.right.input, self.image.input],
            self.on_pair,
            [self.drawn, self.left, self.right, self.image],
            [self.divided, self.difference],
            **quick,
        )
        started = self.draw_sweep.click(lambda: self.busy(True), None, busy, **quick)
        swept = started.then(
            self.on_sweep,
            [self.sweep_column, self.scales, self.sweep_steps, *controls],
            [self.sweep_note, self.sweep_picture],
            **raw,
            show_progress="hidden",
            concurrency_id="draw",
            concurrency_limit=CONCURRENCY,
            **private,
        )
        for ended in (swept.success, swept.failure):
            ended(lambda: self.busy(False), None, busy, **quick)
        self.copy.click(None, self.link, None, js="(link) => window.demoPage.copyLink(link)", **private)
        self.demo.unload(self.on_unload)

    def busy(self, drawing: bool) -> list:
        """Updates of the buttons: while something is drawn only Stop can be pressed."""
        rest = [gr.update(interactive=not drawing) for _ in (self.draw_sweep, *self.presets)]
        return [gr.update(interactive=not drawing), gr.update(interactive=drawing), *rest]

    def named(self, values: Sequence) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """What the controls send, by name: those that are shared, and those of every column in use."""
        count, *values = values
        size, columns = len(Panel.names), values[len(self.shared_names) :]
        in_use = [dict(zip(Panel.names, columns[index * size :])) for index in range(int(count))]
        return dict(zip(self.shared_names, values)), in_use

    def read(self, values: Sequence) -> Comparison:
        """The comparison that the controls show.

        Raises:
            SettingsError: for what cannot be drawn.
        """
        shared, in_use = self.named(values)
        columns = [
            {
                "model": column["model"].strip() if isinstance(column["model"], str) else column["model"],
                "scheduler": column["scheduler"] or None,
                "num_inference_steps": whole(column["steps"]),
                "guidance": column["guidance"],
                "guidance_scale": column["scale"],
                "guidance_interval": [column["start"], column["end"]],
                "eta": column["eta"],
                "dtype": column["dtype"],
            }
            for column in in_use
        ]
        return Comparison.from_json(
            {
                "columns": columns,
                "class_labels": shared["classes"] or [],
                "num_images": whole(shared["images"]),
                "seed": whole(shared["seed"]),
                "prompt": shared["prompt"] or "",
                "negative_prompt": shared["negative_prompt"] or "",
                "height": whole(shared["height"]) or None,
                "width": whole(shared["width"]) or None,
            }
        )

    def on_load(self, request: gr.Request) -> dict:
        """The page as its link says, or the first preset."""
        if "s" not in request.query_params:  # the page is made that way
            return {self.live: gr.skip()}
        try:
            comparison = from_link(f"?{request.url.query}")
            note = rendering.message("Restored from the link. Press Draw for the same images.")
        except SettingsError as error:
            comparison = self.first
            note = rendering.message(f"The link could not be restored: {error}", "warning")
        return self.fill(comparison) | self.start_pictures(comparison) | {self.live: note, self.lock: True}

    def on_count(self, *values) -> dict:
        """More or fewer columns."""
        shared, columns = self.named(values)
        models = [column["model"] or "" for column in columns]
        return self.show_columns(len(columns)) | self.shared_updates(models, shared["classes"])

    def shared_updates(self, models: Sequence[str], classes: Sequence[str] | None) -> dict:
        """Updates of the shared controls for the models in use. Classes that none of them knows leave."""
        shared = self.shared_values(models)
        labels, chosen = shared["classes"]["choices"], classes or []
        known = [label for label in chosen if label in labels] if labels else chosen
        return {
            self.shared["classes"]: gr.update(choices=labels or chosen, value=known),
            self.texts: gr.update(**shared["prompt"]),
            self.sizes: gr.update(**shared["height"]),
        }

    def model_changed(self, index: int):
        """What another model in a column changes: schedulers, guidance, precision, and what is shared."""
        panel = self.panels[index]

        def on_model(request: gr.Request, settled: tuple[str, str], *values) -> dict:
            shared, columns = self.named(values)
            models, now = [(column["model"] or "").strip() for column in columns], columns[index]
            if models[index] == settled[0]:
                return {panel.settled: settled}
            try:
                description = self.catalog.describe(models[index])
            except SettingsError as error:
                return {
                    panel.settled: ("", settled[1]),
                    panel.pictures: rendering.refused(LETTERS[index], str(error)),
                }
            keep = now["guidance"] in description.guidance
            guidance = now["guidance"] if keep else similar_guidance(now["guidance"], description)
            column = Column(model=models[index], guidance=guidance, guidance_scale=description.guidance[guidance])
            if now["scheduler"] in description.schedulers:
                column = replace(column, scheduler=now["scheduler"])
            if now["dtype"] in description.dtypes:
                column = replace(column, dtype=now["dtype"])
            updates = self.column_values(column, description)
            del updates["model"], updates["steps"], updates["start"]["value"], updates["end"]["value"]
            if keep:
                del updates["scale"]["value"]
            if updates["eta"]["visible"]:
                del updates["eta"]["value"]
            changed = {panel.controls[name]: gr.update(**update) for name, update in updates.items()}
            changed |= self.shared_updates(models, shared["classes"]) | {panel.settled: (models[index], guidance)}
            if not self.endpoints.runs.active(request.session_hash, "page"):
                try:
                    changed[panel.pictures] = self.started(self.read(values), index)
                except SettingsError:  # another field is wrong, which is said when it draws
                    changed[panel.pictures] = rendering.waiting(LETTERS[index], [], [])
            return changed

        return on_model

    def on_guidance(self, settled: tuple[str, str], *values) -> tuple:
        """Another kind of guidance has another scale that works well."""
        now = dict(zip(Panel.names, values))
        if now["guidance"] == settled[1]:
            return settled, gr.skip(), gr.skip(), gr.skip()
        description = self.catalog.described(now["model"])
        guided = now["guidance"] != "none"
        scale = description.guidance.get(now["guidance"], now["scale"]) if description else now["scale"]
        scale, ends = gr.update(value=scale, interactive=guided), gr.update(interactive=guided)
        return (settled[0], now["guidance"]), scale, ends, ends

    def on_scheduler(self, *values) -> dict:
        """Eta is for schedulers that have it."""
        now = dict(zip(Panel.names, values))
        description = self.catalog.described(now["model"])
        has_eta = description is not None and now["scheduler"] in description.eta_schedulers
        return gr.update(visible=has_eta) if has_eta else gr.update(visible=False, value=0)

    def on_begin(self, request: gr.Request, seed: int | None, locked: bool) -> list:
        """Before drawing: a new seed where it is not locked. From now on it can be stopped, in the queue as well."""
        self.endpoints.runs.start(request.session_hash, "page")
        new = gr.skip() if locked else randrange(MAX_SEED)
        return [new, rendering.message("Waiting for a free place."), *self.busy(True)]

    def preset_chosen(self, preset: Comparison):
        """Sets the page to a preset."""
        buttons = [self.draw, self.stop, self.draw_sweep, *self.presets]

        def on_preset(request: gr.Request) -> dict:
            self.endpoints.runs.start(request.session_hash, "page")
            note = rendering.message("Waiting for a free place.")
            return self.fill(preset) | {self.lock: True, self.live: note} | dict(zip(buttons, self.busy(True)))

        return on_preset

    def on_draw(self, request: gr.Request, *values) -> Iterator[tuple]:
        """Draws the columns, and shows them on the way."""
        skip, session = [gr.skip()] * MAX_COLUMNS, request.session_hash
        run = self.endpoints.runs.restart(session, "page")
        if run is None:
            yield *skip, rendering.message("Stopped before it began."), gr.skip()
            return
        try:
            comparison = self.read(values)
        except SettingsError as error:
            self.endpoints.runs.end(session, "page", run)
            yield *skip, rendering.message(str(error), "warning"), gr.skip()
            return
        noise = [self.noise_of(comparison, column.model) for column in comparison.columns]
        for states in self.endpoints.states(comparison, session, "page", run):
            shown = [rendering.column(*column) for column in zip(LETTERS, states, noise)]
            shown += [gr.skip()] * (MAX_COLUMNS - len(shown))
            yield *shown, rendering.message(rendering.announcement(states)), gr.skip()
        # Once more what there is to say: the answer to Stop may have come between.
        yield *skip, rendering.message(rendering.announcement(states)), Drawn(comparison, states)

    def on_finish(self, request: gr.Request, drawn: Drawn | None, left: str, right: str) -> list:
        """After drawing: everything to look closer at and to take away."""
        busy = self.busy(self.endpoints.runs.active(request.session_hash, "page"))  # another one may have begun
        if drawn is None:
            return [*[gr.skip()] * 8, *busy]
        comparison, states = drawn.comparison, drawn.states
        images = [("all images", -1)]
        for i in range(comparison.num_images):
            label = next((state.labels[i] for state in states if i < len(state.labels) and state.labels[i]), None)
            images.append((f"{i + 1}: {label}" if label else str(i + 1), i))
        return [
            rendering.film(states),
            rendering.curves(states),
            *self.on_pair(drawn, left, right, -1),
            gr.update(choices=images, value=-1),
            to_link(comparison),
            gr.update(value=str(self.endpoints.archive(comparison, states)), interactive=True),
            self.codes(drawn),
            *busy,
        ]

    def codes(self, drawn: Drawn) -> str:
        """The Python of every column that has drawn."""
        letters = [letter for letter, state in zip(LETTERS, drawn.states) if state.images]
        return rendering.codes(
            {letter: self.endpoints.code(drawn.comparison, LETTERS.index(letter)) for letter in letters}
        )

    def on_stop(self, request: gr.Request) -> str:
        """Stops what this page draws."""
        self.endpoints.runs.stop_session(request.session_hash)
        return rendering.message("Stopping.")

    def on_pair(self, drawn: Drawn | None, left: str, right: str, image: int | None) -> tuple[str, str]:
        """Two columns over each other, and their difference."""
        if drawn is None:
            return gr.skip(), gr.skip()
        states = dict(zip(LETTERS, drawn.states))
        for letter in (left, right):
            if letter not in states or not states[letter].images:
                return rendering.nothing(f"Column {letter} has drawn nothing."), ""
        index = None if image is None or image < 0 else image
        chosen = [
            states[letter].images if index is None else [states[letter].images[index]] for letter in (left, right)
        ]
        try:
            pairs = [difference([first], [second]) for first, second in zip(*chosen, strict=True)]
            picture = rendering.differences(left, right, [(image, rms[0]) for image, rms in pairs])
        except (SettingsError, ValueError) as error:
            picture = rendering.nothing(str(error))
        return rendering.divided(left, right, states, index), picture

    def on_sweep(self, request: gr.Request, letter: str, scales: str, steps: str, *values) -> Iterator[tuple]:
        """Draws the sweep of a column."""
        try:
            comparison = self.read(values)
            index = chosen_column(comparison, letter)
            scales, steps = numbers("Guidance scales", scales, float), numbers("Numbers of steps", steps, int)
            yield rendering.sweep_progress(0), gr.skip()
            picture, session = None, request.session_hash
            for share, picture in self.endpoints.pictures(comparison, index, scales, steps, session, "sweep"):
                if picture is None:
                    yield rendering.sweep_progress(share), gr.skip()
                else:
                    yield "", gr.update(value=picture, visible=True)
            if picture is None:
                yield rendering.nothing("Stopped."), gr.skip()
        except (SettingsError, gr.Error) as error:
            yield rendering.message(str(error), "warning"), gr.skip()

    def on_unload(self, request: gr.Request) -> None:
        """A page that was closed draws no further."""
        self.endpoints.runs.stop_session(request.session_hash)


def kind_title(kind: str) -> str:
    """A kind of guidance as it is offered."""
    return {"classifier-mean": "classifier, mean", "adaptive-projected": "adaptive projected"}.get(kind, kind)


def similar_guidance(kind: str, description: Description) -> str:
    """A kind that a model has, for one that it has not: guided stays guided, where that is possible."""
    kinds = list(description.guidance)
    return next((other for other in kinds if other != "none"), "none") if kind != "none" else kinds[0]


def noise_pictures(comparison: Comparison, description: Description) -> list[Image.Image]:
    """The noise from which the images of a column start, as images; none where it is noise of latents."""
    if description.latent or description.takes_prompt or max(description.height, description.width) > 128:
        return []
    sources = generators(comparison)
    noise = initial_noise(comparison, description, sources)
    if noise is None:
        shape = (1, description.channels, description.height, description.width)
        noise = torch.cat([torch.randn(shape, generator=source) for source in sources])
    pixels = ((noise.clamp(-2, 2) / 4 + 0.5) * 255).byte().movedim(1, -1).numpy()
    return [Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image[..., :3]) for image in pixels]


def whole(value: float | None) -> float | int | None:
    """Numbers of a field without decimals as `int`; anything else as it is, for `Comparison` to refuse."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def numbers(name: str, text: str, kind: type) -> list:
    """Numbers from a field: "0, 1, 2".

    Raises:
        SettingsError: for anything else.
    """
    try:
        return [kind(part) for part in text.replace(",", " ").split()]
    except ValueError as error:
        example = "5, 10, 20" if kind is int else "0, 1, 2.5"
        raise SettingsError(f"{name}: write {'whole ' if kind is int else ''}numbers, such as {example}.") from error


def main(
    models: tuple[str, ...] = (),
    server_name: str | None = None,
    server_port: int | None = None,
    capacity: int | None = None,
) -> None:
    """Serves the demo until it is stopped.

    Args:
        models: folders and Hub names to offer besides the shipped models.
        server_name: address to listen on; 0.0.0.0 for everyone.
        server_port: port to listen on.
        capacity: models in memory at most.
    """
    if capacity is not None:
        os.environ["DIFFUSERS_EXT_DEMO_CAPACITY"] = str(capacity)
    # The terminal is for what its reader can mend: not for a bar per load, nor for schedulers that are only tried.
    logging.disable_progress_bar()
    logging.get_logger("diffusers.schedulers.scheduling_dpmsolver_singlestep").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "Should have t[ab]", module="torchsde")
    torch.set_num_threads(1)  # the columns are the threads, and small networks gain nothing by more
    catalog = Catalog.shipped(models)
    launch(build(catalog, load_judge(catalog.device)), server_name=server_name, server_port=server_port)


if __name__ == "__main__":
    tyro.cli(main)
