"""Draws the columns of a comparison at once, each in a thread of its own; and a sweep of one column."""

import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from catalog import Catalog, Description, Stopped, harmless, new_pipeline
from judge import Judge
from observation import Observation
from pictures import sweep_picture
from PIL.Image import Image
from plan import class_ids, generators, initial_noise, plan, wanted_labels
from settings import Comparison, SettingsError, check_work, shown

import diffusers


MAX_CELLS = 36  # of a sweep
PAUSE = 1 / 6  # seconds between two looks at a comparison, at least
MAX_ERROR = 600  # characters

logger = logging.getLogger(__name__)

# How many runs go on at once in this process: one per core, and one per GPU.
_slots = {
    "cpu": threading.BoundedSemaphore(os.cpu_count() or 1),
    "gpu": threading.BoundedSemaphore(max(1, torch.cuda.device_count())),
}


@dataclass
class ColumnState:
    """What is to be seen of one column at one moment: images and numbers, no tensors."""

    status: Literal["waiting", "loading", "drawing", "done", "stopped", "failed"] = "waiting"
    error: str | None = None  # why it failed
    step: int = 0  # network calls done, those for both predictions of guidance counted once
    num_steps: int = 0  # network calls in all; 0 until the pipeline has counted them
    images: list[Image] = field(default_factory=list)  # latest predicted clean images, at the end the images; own size
    frames: list[list[Image]] = field(
        default_factory=list
    )  # film strip: up to 12 times `images`, the last is `images`
    frame_steps: list[int] = field(default_factory=list)  # `step` of each frame
    seconds: float = 0.0  # of drawing: waiting, loading and watching do not count
    network_evaluations: int = 0  # per image; both predictions of guidance count
    classifier_evaluations: int = 0  # per image, those that guided
    images_per_second: float | None = None
    labels: list[str | None] = field(default_factory=list)  # wanted class of each image
    # Probability of the wanted class, per observed step and image: "classifier", that of the model, reads the noisy
    # sample; "judge" reads the predicted clean image. A kind that the model has not is missing.
    probability: dict[str, list[list[float]]] = field(default_factory=dict)
    probability_steps: list[int] = field(default_factory=list)  # `step` of each row of every kind
    # How far guidance moved the predicted clean image: root mean square over its pixels, per step and image.
    guidance_norm: list[list[float]] = field(default_factory=list)
    norm_steps: list[int] = field(default_factory=list)  # `step` of each row
    verdicts: list[tuple[str, float]] | None = None  # the judge's reading of each image, and its probability


def never() -> bool:
    """A `stop` that never asks to stop."""
    return False


def compare(
    comparison: Comparison, catalog: Catalog, stop: Callable[[], bool] = never, judge: Judge | None = None
) -> Iterator[list[ColumnState]]:
    """Draws all columns at once. A column that fails says so in its state, and leaves the others alone.

    Args:
        comparison: what to draw.
        catalog: where the models are.
        stop: asked in every step of every column; once it was true, all stop.
        judge: reads the images of models that draw digits.

    Yields:
        The states of all columns, at most every `PAUSE` seconds, and last the final ones. Closing the generator stops
        the columns.
    """
    halted, changed, ended = threading.Event(), threading.Event(), threading.Event()

    def stopping() -> bool:
        if not halted.is_set() and stop():
            halted.set()
        return halted.is_set()

    def end() -> None:
        if all(run.ended for run in runs):
            ended.set()
        changed.set()

    runs = [
        _Run(comparison, index, catalog, stopping, judge, changed.set, end) for index in range(len(comparison.columns))
    ]
    try:
        for index, run in enumerate(runs):
            threading.Thread(target=run, name=f"column {index}", daemon=True).start()
        yield [run.state() for run in runs]
        while not all(run.ended or (stopping() and not run.drawing) for run in runs):
            ended.wait(PAUSE)
            changed.wait(1.0)
            changed.clear()
            yield [run.state() for run in runs]
        yield [run.state() for run in runs]
    finally:
        halted.set()


class _Run:
    """One column: a thread runs it, others look at its state.

    Args:
        changed: called when there is something new to see.
        end: called when nothing more will come.
    """

    def __init__(self, comparison, index, catalog, stop, judge, changed, end):
        self.comparison, self.index, self.catalog, self.stop = comparison, index, catalog, stop
        self.judge, self.changed, self.end = judge, changed, end
        self.ended = self.drawing = False
        self._state = ColumnState()
        self._observation: Observation | None = None

    def __call__(self) -> None:
        final = self._state
        try:
            final = self._draw()
        except Stopped:
            final = self._stopped()
        except Exception as error:  # whatever it is, the other columns go on
            final = replace(self.state(), status="failed", error=message(error))
            if not isinstance(error, SettingsError):
                logger.exception("Column %d of %s failed", self.index, self.comparison)
        finally:
            self._state, self._observation, self.ended = final, None, True
            self.end()

    def state(self) -> ColumnState:
        """What is to be seen now."""
        state, observation = self._state, self._observation
        if observation is not None:
            return _seen(state, observation)
        if not self.ended and not self.drawing and self.stop():
            return replace(state, status="stopped")
        return state

    def _show(self, **news) -> None:
        self._state = replace(self._state, **news)
        self.changed()

    def _draw(self) -> ColumnState:
        self._show(status="loading")
        description = self.catalog.describe(self.comparison.columns[self.index].model)
        self._show(labels=wanted_labels(self.comparison, description))
        judge = self.judge if self.judge is not None and self.judge.reads(description) else None
        with _drawing(self.comparison, self.index, self.catalog, description, self.stop, self._show) as (pipe, call):
            observation = Observation(
                pipe,
                num_images=self.comparison.num_images,
                guidance=self.comparison.columns[self.index].guidance,
                class_ids=class_ids(self.comparison, description),
                size=(self.comparison.height or description.height, self.comparison.width or description.width),
                latent=description.latent,
                judge=judge,
                stop=self.stop,
                changed=self.changed,
            )
            self.drawing = True  # from here on, whoever stops this waits for its end
            if self.stop():
                raise Stopped
            self._show(status="drawing")
            self._observation = observation
            observation.begin()
            try:
                images = pipe(**call).images
            finally:
                observation.end()
        observation.close_film(images)
        verdicts = None if judge is None else judge.verdicts(images, description.labels)
        seconds = observation.seconds
        return replace(
            _seen(self._state, observation),
            status="done",
            images=images,
            verdicts=verdicts,
            images_per_second=len(images) / seconds if seconds else None,
        )

    def _stopped(self) -> ColumnState:
        state = replace(self.state(), status="stopped")
        if state.images and state.frame_steps[-1:] != [state.step]:
            state.frames.append(state.images)
            state.frame_steps.append(state.step)
        return state


def _seen(state: ColumnState, observation: Observation) -> ColumnState:
    """A state with what has been observed since; lists are copies, since the run goes on."""
    images = observation.images()
    with observation.lock:
        return replace(
            state,
            step=observation.step,
            num_steps=observation.num_steps,
            images=images,
            frames=list(observation.frames),
            frame_steps=list(observation.frame_steps),
            seconds=observation.seconds,
            network_evaluations=observation.network_evaluations,
            classifier_evaluations=observation.classifier_evaluations,
            probability={kind: list(rows) for kind, rows in observation.probability.items()},
            probability_steps=list(observation.probability_steps),
            guidance_norm=list(observation.guidance_norm),
            norm_steps=list(observation.norm_steps),
        )


@contextmanager
def _drawing(
    comparison: Comparison,
    index: int,
    catalog: Catalog,
    description: Description,
    stop: Callable[[], bool],
    show: Callable[..., None],
) -> Iterator[tuple]:
    """A pipeline of its own for one column, and the arguments of its call, while a model and a slot are there.

    Raises:
        SettingsError: for what does not fit the model.
        Stopped: when `stop` says so while this waits.
    """
    column = comparison.columns[index]
    steps = plan(comparison, index, description)
    with catalog.borrow(column.model, column.dtype, stop) as shared:
        show(status="waiting")
        with _slot(shared.device, stop):
            scheduler = getattr(diffusers, steps.scheduler)
            scheduler = scheduler.from_config(shared.scheduler.config, **steps.scheduler_options)
            guider = None
            if steps.guider is not None:
                name, options = steps.guider
                guider = getattr(diffusers, name)(**options)
            pipe = new_pipeline(shared, scheduler, guider)
            pipe.set_progress_bar_config(disable=True)
            sources = generators(comparison)
            noise = initial_noise(comparison, description, sources)
            start = {} if noise is None else {"sample": noise}
            yield pipe, {**steps.call, **start, "generator": sources}


@contextmanager
def _slot(device: torch.device, stop: Callable[[], bool]) -> Iterator[None]:
    slots = _slots["cpu" if device.type == "cpu" else "gpu"]
    while not slots.acquire(timeout=0.1):
        if stop():
            raise Stopped
    try:
        yield
    finally:
        slots.release()


def message(error: Exception) -> str:
    """What a visitor reads of an error: what they can mend as it is, the rest short and harmless."""
    if isinstance(error, SettingsError):
        return str(error)
    text = f"{type(error).__name__}: {harmless(error)}"
    return text if len(text) <= MAX_ERROR else text[: MAX_ERROR - 3] + "..."


def sweep(
    comparison: Comparison,
    index: int,
    catalog: Catalog,
    guidance_scales: Sequence[float],
    steps: Sequence[int],
    stop: Callable[[], bool] = never,
) -> Iterator[tuple[float, Image | None]]:
    """Draws one column with every guidance scale and number of steps, always from the same noise.

    Args:
        comparison: what to draw.
        index: of the column.
        catalog: where the models are.
        guidance_scales, steps: rows and columns of the picture, at most `MAX_CELLS` cells.
        stop: asked in every step.

    Yields:
        Share of the work that is done, and None; last, 1 and the picture.

    Raises:
        SettingsError: for what does not fit the model or is too much. Raised by the first `next`.
        Stopped: when `stop` said so.
    """
    if type(index) is not int or not 0 <= index < len(comparison.columns):
        raise SettingsError(
            f"`column` is {shown(index)}; it must be one of the {len(comparison.columns)} columns, from 0 on."
        )
    cells = _cells(comparison, index, guidance_scales, steps)
    total, done = sum(cell.columns[0].num_inference_steps for row in cells for cell in row), 0
    description = catalog.describe(comparison.columns[index].model)
    for cell in (cell for row in cells for cell in row):
        plan(cell, 0, description)
    yield 0.0, None
    rows = []
    for row in cells:
        rows.append([])
        for cell in row:
            with _drawing(cell, 0, catalog, description, stop, lambda **news: None) as (pipe, call):
                Observation(pipe, num_images=cell.num_images, stop=stop, previews=False)
                rows[-1].append(pipe(**call).images)
            done += cell.columns[0].num_inference_steps
            if done < total:
                yield done / total, None
    yield 1.0, sweep_picture(rows, list(guidance_scales), list(steps))


def _cells(
    comparison: Comparison, index: int, guidance_scales: Sequence[float], steps: Sequence[int]
) -> list[list[Comparison]]:
    """A comparison of one column for every cell, checked."""
    for name, values in (("guidance_scales", guidance_scales), ("num_inference_steps", steps)):
        if not isinstance(values, list | tuple) or not 1 <= len(values) <= MAX_CELLS:
            raise SettingsError(f"`{name}` must be a list of 1 to {MAX_CELLS} numbers.")
    if len(guidance_scales) * len(steps) > MAX_CELLS:
        raise SettingsError(
            f"{len(guidance_scales)} guidance scales times {len(steps)} numbers of steps are "
            f"{len(guidance_scales) * len(steps)} cells; a sweep has at most {MAX_CELLS}."
        )
    column = comparison.columns[index]
    if column.guidance == "none":
        raise SettingsError(
            "This column is not guided, so that no guidance scale changes it. Choose a guidance first."
        )
    cells = [
        [
            replace(comparison, columns=(replace(column, guidance_scale=scale, num_inference_steps=count),))
            for count in steps
        ]
        for scale in guidance_scales
    ]
    check_work(comparison.num_images, len(guidance_scales) * sum(steps), "guidance scales")
    return cells
