"""The named endpoints of the app, for gradio_client: one for every action of the page, by the JSON of its settings.

Also what both share: which runs are under way, so that they can be stopped, and where drawing happens.
"""

import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import gradio as gr
import takeaway
from catalog import Catalog, Stopped
from comparison import ColumnState, compare, sweep
from pictures import difference
from plan import complete
from rendering import png_uri
from settings import LETTERS, PRESETS, Comparison, SettingsError, from_link, to_link


try:
    from spaces import GPU as on_gpu  # a Space with ZeroGPU lends its GPU to the functions that this wraps
except ImportError:

    def on_gpu(function: Callable) -> Callable:
        """Elsewhere the process draws where it is."""
        return function


KEPT = 3600  # seconds for which what was made can be fetched


class Runs:
    """The runs under way. Each is a file, and to stop it is to remove the file: ZeroGPU draws in another process."""

    def __init__(self):
        self._temporary = tempfile.TemporaryDirectory(prefix="diffusers-ext-runs-")  # removed with the process
        self.folder = Path(self._temporary.name)
        self._files: dict[tuple[str | None, str], Path] = {}
        self._lock = threading.RLock()

    def start(self, session: str | None, name: str) -> Path:
        """A new run of a session; an older one of the same name is stopped."""
        path = self.folder / f"{uuid.uuid4().hex}.run"
        path.touch()
        with self._lock:
            older = self._files.pop((session, name), None)
            self._files[session, name] = path
        if older is not None:
            older.unlink(missing_ok=True)
        return path

    def restart(self, session: str | None, name: str) -> Path | None:
        """A new run in place of one that waited in the queue; None where that was stopped meanwhile."""
        with self._lock:
            return self.start(session, name) if self.active(session, name) else None

    def active(self, session: str | None, name: str) -> bool:
        """Whether a session has a run of this name under way."""
        with self._lock:
            return (session, name) in self._files

    def stop(self, session: str | None, name: str) -> bool:
        """Stops a run within one step; False where there is none of this name."""
        with self._lock:
            path = self._files.pop((session, name), None)
        if path is None:
            return False
        path.unlink(missing_ok=True)
        return True

    def end(self, session: str | None, name: str, path: Path) -> None:
        """Forgets a run that is over."""
        with self._lock:
            if self._files.get((session, name)) == path:
                del self._files[session, name]
        path.unlink(missing_ok=True)

    def stop_session(self, session: str | None) -> None:
        """Stops whatever a session has begun."""
        with self._lock:
            names = [name for owner, name in self._files if owner == session]
        for name in names:
            self.stop(session, name)

    @contextmanager
    def running(self, session: str | None, name: str, path: Path | None = None) -> Iterator[Path]:
        """A run for as long as the block lasts: a new one, or that of `path`."""
        path = path or self.start(session, name)
        try:
            yield path
        finally:
            self.end(session, name, path)


def stopped(path: Path) -> Callable[[], bool]:
    """Whether the run of this file was stopped."""
    return lambda: not path.exists()


def chosen_column(comparison: Comparison, column: str | int) -> int:
    """Index of a column given by its letter or its number from 0.

    Raises:
        SettingsError: when there is none.
    """
    letters = LETTERS[: len(comparison.columns)]
    if isinstance(column, str) and len(column) == 1 and column.upper() in letters:
        return letters.index(column.upper())
    if isinstance(column, int) and not isinstance(column, bool) and 0 <= column < len(letters):
        return column
    raise SettingsError(f"There is no such column; the settings have {', '.join(letters)}.")


@contextmanager
def mendable() -> Iterator[None]:
    """Shows what a visitor can mend as the error of the call."""
    try:
        yield
    except SettingsError as error:
        raise gr.Error(str(error), print_exception=False) from error


def results(comparison: Comparison, states: Sequence[ColumnState]) -> dict:
    """A comparison and what was drawn of it, as JSON."""
    return {
        "settings": comparison.to_json(),
        "link": to_link(comparison),
        "columns": [result(state) for state in states],
    }


def result(state: ColumnState) -> dict:
    """A column as JSON."""
    return {
        "status": state.status,
        "error": state.error,
        "images": [png_uri(image) for image in state.images],
        "labels": state.labels,
        "verdicts": state.verdicts and [{"label": name, "probability": value} for name, value in state.verdicts],
        "seconds": state.seconds,
        "steps": state.step,
        "num_steps": state.num_steps,
        "network_evaluations": state.network_evaluations,
        "classifier_evaluations": state.classifier_evaluations,
        "images_per_second": state.images_per_second,
        "classifier_probability": state.probability,
        "probability_steps": state.probability_steps,
        "guidance_norm": state.guidance_norm,
        "norm_steps": state.norm_steps,
    }


class Endpoints:
    """The actions on a catalog, as functions of JSON.

    Args:
        catalog: the models.
        judge: reads digits; None for no verdicts.
        concurrency: calls that draw at once; the others wait in the queue.
    """

    def __init__(self, catalog: Catalog, judge, concurrency: int):
        self.catalog, self.judge, self.concurrency = catalog, judge, concurrency
        self.runs = Runs()
        self._zips = tempfile.TemporaryDirectory(prefix="diffusers-ext-zips-")

        # From the process of ZeroGPU no errors arrive but those of Gradio.
        def compared(settings: dict, run: Path) -> Iterator[list[ColumnState]]:
            with mendable():
                yield from compare(Comparison.from_json(settings), catalog, stopped(run), judge)

        def swept(settings: dict, index: int, scales: list, steps: list, run: Path) -> Iterator[tuple]:
            with mendable(), suppress(Stopped):
                yield from sweep(Comparison.from_json(settings), index, catalog, scales, steps, stopped(run))

        self.compared, self.swept = on_gpu(compared), on_gpu(swept)

    def states(
        self, comparison: Comparison, session: str | None, name: str, run: Path | None = None
    ) -> Iterator[list[ColumnState]]:
        """The states of all columns while they are drawn; `run` of `Runs` where it has been started already."""
        with self.runs.running(session, name, run) as run:
            yield from self.compared(comparison.to_json(), run)

    def drawn(self, comparison: Comparison, session: str | None, name: str) -> list[ColumnState]:
        """The final states of all columns."""
        for states in self.states(comparison, session, name):
            pass
        return states

    def pictures(
        self, comparison: Comparison, index: int, scales: Sequence, steps: Sequence, session: str | None, name: str
    ) -> Iterator[tuple]:
        """Progress of a sweep, and its picture at the end, unless it was stopped."""
        with self.runs.running(session, name) as run:
            yield from self.swept(comparison.to_json(), index, scales, steps, run)

    def checked(self, comparison: Comparison) -> Comparison:
        """The comparison with everything that its models fill in.

        Raises:
            SettingsError: for what a model cannot do.
        """
        return complete(comparison, [self.catalog.describe(column.model) for column in comparison.columns])

    def archive(self, comparison: Comparison, states: Sequence[ColumnState]) -> Path:
        """A zip of what was drawn; it can be fetched for `KEPT` seconds."""
        for older in Path(self._zips.name).iterdir():
            with suppress(FileNotFoundError):  # somebody else has just removed it
                if older.stat().st_mtime < time.time() - KEPT:
                    shutil.rmtree(older, ignore_errors=True)
        descriptions = [
            self.catalog.describe(column.model) if state.images else None  # one that failed may not be found again
            for column, state in zip(comparison.columns, states)
        ]
        folder = Path(tempfile.mkdtemp(dir=self._zips.name))
        return takeaway.archive(comparison, states, descriptions, folder, device=self.catalog.device)

    def code(self, comparison: Comparison, index: int) -> str:
        """The Python that draws one column."""
        description = self.catalog.describe(comparison.columns[index].model)
        return takeaway.code(comparison, index, description, device=self.catalog.device)

    def register(self) -> None:
        """Adds the endpoints to the `gr.Blocks` that is being built."""
        draws = {"concurrency_id": "draw", "concurrency_limit": self.concurrency}
        light = {"queue": False}

        def models() -> list[dict]:
            """What every model is and can do: schedulers, kinds of guidance with a good scale, classes."""
            descriptions = []
            for name in self.catalog.names:
                with suppress(SettingsError):  # one that cannot be loaded
                    descriptions.append(asdict(self.catalog.describe(name)))
            return descriptions

        def presets() -> dict:
            """The settings of every preset, by its name."""
            return {name: preset.to_json() for name, preset in PRESETS.items()}

        def check(settings: dict) -> dict:
            """Settings with everything that was left out, or an error that says what cannot be drawn and why."""
            with mendable():
                return self.checked(Comparison.from_json(settings)).to_json()

        def draw(settings: dict, run: str = "", request: gr.Request = None) -> dict:
            """Draws all columns; `run` is a name for /stop. Images are PNG data URIs."""
            with mendable():
                comparison = Comparison.from_json(settings)
                return results(comparison, self.drawn(comparison, session_of(request), run_name(run)))

        def watch(settings: dict, run: str = "", request: gr.Request = None) -> Iterator[dict]:
            """As /draw, with previews while the images form."""
            with mendable():
                comparison = Comparison.from_json(settings)
                for states in self.states(comparison, session_of(request), run_name(run)):
                    yield results(comparison, states)

        def stop(run: str = "", request: gr.Request = None) -> bool:
            """Stops this session's run of that name within one step; false where there is none."""
            with mendable():
                return self.runs.stop(session_of(request), run_name(run))

        def sweep_endpoint(
            settings: dict,
            column: str = "A",
            guidance_scales: list[float] = [0, 1, 2, 4],
            num_inference_steps: list[int] = [5, 10, 20],
            run: str = "",
            request: gr.Request = None,
        ) -> dict:
            """Draws one column with every guidance scale and number of steps, as one picture."""
            with mendable():
                comparison = Comparison.from_json(settings)
                index = chosen_column(comparison, column)
                picture, cells = None, (guidance_scales, num_inference_steps)
                for _, picture in self.pictures(comparison, index, *cells, session_of(request), run_name(run)):
                    pass
                return {
                    "image": picture and png_uri(picture),
                    "guidance_scales": guidance_scales,
                    "num_inference_steps": num_inference_steps,
                    "status": "stopped" if picture is None else "done",
                }

        def difference_endpoint(
            settings: dict, first: str = "A", second: str = "B", request: gr.Request = None
        ) -> dict:
            """Draws two columns and takes one from the other: a picture, and the root mean square per image."""
            with mendable():
                comparison = Comparison.from_json(settings)
                pair = [chosen_column(comparison, column) for column in (first, second)]
                states = self.drawn(comparison, session_of(request), uuid.uuid4().hex)
                for index in pair:
                    if states[index].status != "done":
                        raise SettingsError(f"Column {LETTERS[index]} was not drawn: {states[index].error}")
                picture, rms = difference(*(states[index].images for index in pair))
                return {"image": png_uri(picture), "rms": rms}

        def code(settings: dict, column: str = "A") -> str:
            """The Python that draws one column, as pasted."""
            with mendable():
                comparison = Comparison.from_json(settings)
                return self.code(comparison, chosen_column(comparison, column))

        def link(settings: dict) -> str:
            """The query of the page's address that restores the settings."""
            with mendable():
                return to_link(Comparison.from_json(settings))

        def restore(link: str) -> dict:
            """The settings of a link: a whole address, its query, or the value of `s`."""
            with mendable():
                return from_link(link).to_json()

        for function, name in ((models, "models"), (presets, "presets"), (check, "check"), (code, "code")):
            gr.api(function, api_name=name)
        for function, name in ((stop, "stop"), (link, "link"), (restore, "restore")):
            gr.api(function, api_name=name, **light)
        gr.api(draw, api_name="draw", **draws)
        gr.api(watch, api_name="watch", **draws)
        gr.api(sweep_endpoint, api_name="sweep", **draws)
        gr.api(difference_endpoint, api_name="difference", **draws)
        self._register_download(draws)

    def _register_download(self, draws: dict) -> None:
        """A file needs a component, here a hidden one."""

        def download(settings: dict, request: gr.Request = None) -> str:
            """Draws all columns and packs images, settings and Python into a zip file."""
            with mendable():
                comparison = Comparison.from_json(settings)
                states = self.drawn(comparison, session_of(request), uuid.uuid4().hex)
                return str(self.archive(comparison, states))

        settings = gr.JSON(visible=False, label="settings")
        file = gr.File(visible=False, label="zip")
        gr.on([], download, settings, file, api_name="download", **draws)


def session_of(request: gr.Request) -> str:
    """Who calls. A bare POST may come without a session, and those who do so are not one another."""
    return request.session_hash or uuid.uuid4().hex


def run_name(run: object) -> str:
    """A run's name as given, or one of its own where none is.

    Raises:
        SettingsError: for something else than a short text.
    """
    if not isinstance(run, str) or len(run) > 100:
        raise SettingsError("`run` must be a name of at most 100 characters, which /stop is given too.")
    return f"api-{run}" if run else uuid.uuid4().hex
