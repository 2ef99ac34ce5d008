"""The demo's page and endpoints as clients see them: a real app in this process, with the shipped models."""

import base64
import io
import json
import os
import threading
import time
import zipfile
from collections.abc import Iterator
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import gradio as gr
import numpy as np
import pytest
from app import Page, build, launch, numbers
from catalog import Catalog
from comparison import ColumnState, compare
from endpoints import KEPT, Runs, chosen_column, stopped
from gradio_client import Client
from gradio_client.exceptions import AppError
from judge import load_judge
from pictures import difference
from PIL import Image
from settings import PRESETS, Column, Comparison, SettingsError, from_link, to_link
from starlette.requests import Request as StarletteRequest


FILM = {"model": "film-mnist", "num_inference_steps": 4, "guidance": "classifier-free", "guidance_scale": 2.0}
ADM = {"model": "adm-mnist", "num_inference_steps": 4, "guidance": "classifier", "guidance_scale": 6.0}
TWO = {"columns": [FILM, ADM], "class_labels": ["three", "seven"], "num_images": 2, "seed": 5}
ENDPOINTS = {
    "/models", "/presets", "/check", "/draw", "/watch", "/stop", "/sweep", "/difference", "/code", "/link", "/restore",
    "/download",
}  # fmt: skip


def pixels(uri: str) -> np.ndarray:
    """The image of a data URI."""
    head, data = uri.split(",", 1)
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


@pytest.fixture(scope="module")
def catalog(one_thread) -> Catalog:
    return Catalog.shipped()


@pytest.fixture(scope="module")
def address(catalog) -> Iterator[str]:
    demo = build(catalog, load_judge())
    _, url, _ = launch(demo, prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
    yield url
    demo.close()


@pytest.fixture(scope="module")
def client(address) -> Client:
    return Client(address, verbose=False)


@pytest.fixture(scope="module")
def drawn(client) -> dict:
    return client.predict(TWO, api_name="/draw")


def test_every_action_is_a_named_endpoint_and_the_pages_events_are_not(client):
    assert set(client.view_api(return_format="dict")["named_endpoints"]) == ENDPOINTS


def test_models_say_what_they_can_do(client):
    models = {model["name"]: model for model in client.predict(api_name="/models")}
    assert {"film-mnist", "adm-mnist", "dit-gqa-mnist", "dilated-mnist"} <= set(models)
    assert "classifier" in models["adm-mnist"]["guidance"] and "classifier-free" in models["film-mnist"]["guidance"]
    assert models["film-mnist"]["labels"][3] == "three"
    assert models["film-mnist"]["default_scheduler"] in models["film-mnist"]["schedulers"]


def test_presets_are_settings_that_can_be_drawn(client):
    presets = client.predict(api_name="/presets")
    assert list(presets) == list(PRESETS)
    for settings in presets.values():
        assert client.predict(settings, api_name="/check")["columns"][0]["scheduler"]


def test_draw_gives_the_images_of_the_comparison(client, catalog, drawn):
    for states in compare(Comparison.from_json(TWO), catalog, judge=load_judge()):
        pass
    assert drawn["settings"] == Comparison.from_json(TWO).to_json()
    assert from_link(drawn["link"]) == Comparison.from_json(TWO)
    for column, state in zip(drawn["columns"], states, strict=True):
        assert column["status"] == "done" and column["error"] is None
        assert column["labels"] == ["three", "seven"] and len(column["images"]) == 2
        for uri, image in zip(column["images"], state.images, strict=True):
            np.testing.assert_array_equal(pixels(uri), np.asarray(image))
        assert column["steps"] == column["num_steps"] == 4 and column["seconds"] > 0
        assert column["images_per_second"] == pytest.approx(2 / column["seconds"], rel=0.01)
        assert [verdict["label"] for verdict in column["verdicts"]] == [name for name, _ in state.verdicts]
    film, adm = drawn["columns"]
    assert film["network_evaluations"] == 8 and film["classifier_evaluations"] == 0
    assert adm["network_evaluations"] == 4 and adm["classifier_evaluations"] == 4
    assert len(adm["classifier_probability"]["classifier"]) == len(adm["probability_steps"])
    assert len(film["guidance_norm"]) == len(film["norm_steps"]) > 0


def test_watch_shows_previews_that_end_with_the_images(client, drawn):
    settings = {**TWO, "columns": [{**FILM, "num_inference_steps": 25}]}
    answers = list(client.submit(settings, api_name="/watch"))
    early = next(answer["columns"][0] for answer in answers if answer["columns"][0]["images"])
    last = answers[-1]["columns"][0]
    assert early["steps"] < 25 and early["status"] == "drawing"
    assert last["status"] == "done" and early["images"] != last["images"]


def test_stop_ends_a_run_early_and_knows_only_its_own_sessions_runs(client, address):
    settings = {"columns": [{"model": "film-mnist", "num_inference_steps": 250}], "num_images": 4}
    job = client.submit(settings, "mine", api_name="/watch")
    while not any(answer["columns"][0]["steps"] for answer in job.outputs()):
        time.sleep(0.05)
    assert Client(address, verbose=False).predict("mine", api_name="/stop") is False
    assert client.predict("mine", api_name="/stop") is True
    column = job.result()["columns"][0]
    assert column["status"] == "stopped" and 0 < column["steps"] < 250
    assert client.predict("mine", api_name="/stop") is False


def test_a_column_that_fails_leaves_the_others_alone(client, drawn):
    missing = {"model": "model-that-does-not-exist"}
    columns = client.predict({**TWO, "columns": [FILM, missing]}, api_name="/draw")["columns"]
    assert columns[0]["images"] == drawn["columns"][0]["images"]
    assert columns[1]["status"] == "failed" and "model-that-does-not-exist" in columns[1]["error"]


def test_sweep_is_one_picture_of_all_cells(client):
    answer = client.predict({**TWO, "num_images": 1}, "A", [0, 2.0], [1, 2, 3], api_name="/sweep")
    height, width, _ = pixels(answer["image"]).shape
    assert answer["status"] == "done" and width > 3 * 32 and height > 2 * 32


def test_difference_is_that_of_the_images(client, drawn):
    answer = client.predict(TWO, "A", "B", api_name="/difference")
    images = [[Image.fromarray(pixels(uri)) for uri in column["images"]] for column in drawn["columns"]]
    picture, rms = difference(*images)
    np.testing.assert_array_equal(pixels(answer["image"]), np.asarray(picture))
    assert answer["rms"] == pytest.approx(rms)
    assert client.predict(TWO, "A", "A", api_name="/difference")["rms"] == [0, 0]


def test_code_is_python_of_the_column(client):
    code = client.predict(TWO, "B", api_name="/code")
    compile(code, "column", "exec")
    assert "model_cards/adm-mnist" in code and "guidance_scale=6.0" in code


def test_link_and_restore_are_inverse(client, address):
    link = client.predict(TWO, api_name="/link")
    complete = Comparison.from_json(TWO).to_json()
    for text in (link, address + link, link.removeprefix("?s=")):
        assert client.predict(text, api_name="/restore") == complete


def test_download_is_a_zip_of_the_images_and_their_settings(client, drawn):
    with zipfile.ZipFile(client.predict(TWO, api_name="/download")) as archive:
        names = archive.namelist()
        settings = json.loads(archive.read(next(name for name in names if name.endswith("settings.json"))))
        images = [name for name in names if name.endswith(".png")]
        first = np.asarray(Image.open(io.BytesIO(archive.read(next(n for n in images if "A-" in n and "three" in n)))))
    assert settings["settings"] == client.predict(TWO, api_name="/check")
    assert len(images) == 4 and sum(name.endswith(".py") for name in names) == 2
    np.testing.assert_array_equal(first, pixels(drawn["columns"][0]["images"][0]))


@pytest.mark.parametrize(
    "settings",
    [
        None,
        [],
        "film-mnist",
        {},
        {"columns": []},
        {"columns": [FILM] * 5},
        {"columns": [FILM], "unknown": 1},
        {"columns": [{**FILM, "model": "../../etc"}]},
        {"columns": [{**FILM, "model": ["film-mnist"]}]},
        {"columns": [{**FILM, "num_inference_steps": 10**9}]},
        {"columns": [{**FILM, "guidance_scale": "1e999"}]},
        {"columns": [FILM], "num_images": 10**6},
        {"columns": [FILM], "class_labels": ["three"] * 10**5},
        {"columns": [FILM], "prompt": "x" * 2**20},
        {"columns": [FILM], "height": 10**6, "width": 10**6},
        {"columns": [FILM], "seed": -1},
    ],
    ids=lambda settings: str(settings)[:40],
)
def test_hostile_settings_are_refused_with_a_reason(client, settings):
    for endpoint in ("/draw", "/check", "/link"):
        with pytest.raises(AppError) as refusal:
            client.predict(settings, api_name=endpoint)
        assert 10 < len(str(refusal.value)) < 600 and "Traceback" not in str(refusal.value)


@pytest.mark.parametrize(
    ("endpoint", "arguments"),
    [
        ("/sweep", (TWO, "E", [1], [2])),
        ("/sweep", (TWO, "A", list(range(50)), [1, 2, 3])),
        ("/sweep", (TWO, "A", ["much"], [2])),
        ("/sweep", (TWO, "A", [1], [10**9])),
        ("/sweep", (TWO, "A", {"a": 1}, None)),
        ("/difference", (TWO, "A", "C")),
        ("/difference", (TWO, "A", {"letter": "B"})),
        ("/code", (TWO, "../../etc/passwd")),
        ("/stop", ("x" * 10**6,)),
        ("/stop", ({"run": 1},)),
        ("/draw", (TWO, ["run"])),
        ("/restore", ("?s=" + "A" * 10**6,)),
        ("/restore", ("javascript:alert(1)",)),
        ("/restore", ({"s": 1},)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_hostile_arguments_are_refused_with_a_reason(client, endpoint, arguments):
    with pytest.raises(AppError) as refusal:
        client.predict(*arguments, api_name=endpoint)
    text = str(refusal.value)
    assert 10 < len(text) < 600 and "Traceback" not in text and "NoneType" not in text


def post(address: str, path: str, body: bytes, kind: str = "application/json") -> bytes:
    """The answer to a bare request without a session."""
    with urlopen(Request(f"{address}gradio_api/{path}", body, {"Content-Type": kind}), timeout=60) as answer:
        return answer.read()


def test_those_without_a_session_do_not_stop_one_another(address):
    slow = {"columns": [FILM | {"num_inference_steps": 60}], "class_labels": ["three"], "num_images": 1}
    answers = []

    def draw():
        answers.append(json.loads(post(address, "run/draw", json.dumps({"data": [slow, "same"]}).encode())))

    thread = threading.Thread(target=draw)
    thread.start()
    while thread.is_alive():
        assert json.loads(post(address, "run/stop", b'{"data": ["same"]}'))["data"] == [False]
        time.sleep(0.05)
    assert answers[0]["data"][0]["columns"][0]["status"] == "done"


def test_files_that_nobody_asked_for_are_refused(address):
    body = (
        b'--x\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n' + bytes(10**6) + b"\r\n--x--\r\n"
    )
    with pytest.raises(HTTPError) as error:
        post(address, "upload", body, "multipart/form-data; boundary=x")
    assert error.value.code == 413


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "../../../../etc/passwd",
        "..%2f..%2f..%2fetc%2fpasswd",
        "{root}/README.md",
        "{root}/model_cards/film-mnist/unet/diffusion_pytorch_model.safetensors",
        "{root}/demo/app.py",
        "model_cards/film-mnist/model_index.json",
        "demo/app.py",
    ],
)
@pytest.mark.parametrize("route", ["/gradio_api/file=", "/file=", "/gradio_api/file/", "/static/", "/assets/"])
def test_only_files_that_the_app_made_are_served(address, root, route, path):
    url = address.rstrip("/") + route + path.format(root=root)
    try:
        with urlopen(url, timeout=30) as answer:
            body, kind = answer.read(), answer.headers.get_content_type()
    except HTTPError as error:
        assert error.code in (403, 404, 405)
    else:  # the page itself, for what is no route
        assert kind == "text/html" and b"root:" not in body and b"gradio" in body


def test_the_page_asks_for_nothing_from_elsewhere(address):
    with urlopen(Request(address, headers={"Accept": "text/html"}), timeout=30) as answer:
        page = answer.read().decode()
    assert "fonts.googleapis.com" not in page.replace('<link rel="preconnect" href="https://fonts.googleapis.com"', "")
    assert "Diffusion models side by side" in page


def test_a_full_queue_says_so(catalog):
    page = Page(catalog)
    page.demo.queue(max_size=1)
    _, url, _ = launch(page.demo, prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
    try:
        client = Client(url, verbose=False)
        slow = {"columns": [{"model": "film-mnist", "num_inference_steps": 250}], "num_images": 2}
        jobs = [client.submit(slow, f"run {i}", api_name="/draw") for i in range(page.endpoints.concurrency + 8)]
        full = []
        while not full:
            full = [job for job in jobs if job.done() and job.exception()]
            time.sleep(0.05)
        assert "queue is full" in str(full[0].exception()).lower()
        while not all(job.done() for job in jobs):
            page.endpoints.runs.stop_session(client.session_hash)
            time.sleep(0.05)
        answers = [job.result() for job in jobs if not job.exception()]
        assert answers and all(answer["columns"][0]["status"] in ("stopped", "done") for answer in answers)
    finally:
        page.demo.close()


@pytest.fixture(scope="module")
def page(catalog) -> Page:
    return Page(catalog)


def visit(query: str) -> gr.Request:
    """A visitor who opens the page with this query."""
    scope = {"type": "http", "method": "GET", "path": "/", "headers": [], "query_string": query.encode()}
    return gr.Request(StarletteRequest({**scope, "server": ("testserver", 80), "scheme": "http"}), session_hash="one")


def control_values(page: Page, updates: dict) -> list:
    """What the controls send after these updates."""
    controls = [page.count, *(page.shared[name] for name in page.shared_names)]
    controls += [panel.controls[name] for panel in page.panels for name in panel.names]
    return [updates[control]["value"] for control in controls]


@pytest.mark.parametrize("name", PRESETS)
def test_a_link_restores_every_control(page, name):
    preset = PRESETS[name]
    updates = page.on_load(visit(to_link(preset).removeprefix("?")))
    restored = page.read(control_values(page, updates))
    assert page.endpoints.checked(restored) == page.endpoints.checked(preset)


@pytest.mark.parametrize("query", ["s=", "s=%00", "s=" + "A" * 5000, "s=e30", "s=WzEsMl0", "s=a&s=b", "s=<script>"])
def test_a_broken_link_gives_the_first_preset_and_a_warning(page, query):
    updates = page.on_load(visit(query))
    assert 'class="warning"' in updates[page.live] and "<script>" not in updates[page.live]
    first = next(iter(PRESETS.values()))
    assert page.endpoints.checked(page.read(control_values(page, updates))) == page.endpoints.checked(first)


def test_a_page_without_a_link_is_left_as_it_was_made(page):
    assert page.on_load(visit("utm_source=elsewhere")) == {page.live: gr.skip()}


def test_what_a_model_cannot_do_is_not_offered(page):
    updates = page.on_load(visit(to_link(Comparison(columns=(Column(), Column()))).removeprefix("?")))
    values = control_values(page, updates)
    values[1 + len(page.shared_names)] = "dilated-mnist"
    changed = page.model_changed(0)(visit(""), ("", ""), *values)
    controls = page.panels[0].controls
    assert [kind for _, kind in changed[controls["guidance"]]["choices"]] == ["none"]
    offered = [name for _, name in changed[controls["scheduler"]]["choices"]]
    assert offered[0] == page.catalog.describe("dilated-mnist").default_scheduler
    assert set(offered) == set(page.catalog.describe("dilated-mnist").schedulers)
    assert changed[controls["scale"]]["interactive"] is False


def test_a_model_that_is_not_there_says_so_in_its_column(page):
    values = control_values(page, page.on_load(visit(to_link(next(iter(PRESETS.values()))).removeprefix("?"))))
    values[1 + len(page.shared_names)] = "<b>../nowhere</b>"
    changed = page.model_changed(0)(visit(""), ("", ""), *values)
    assert set(changed) == {page.panels[0].pictures, page.panels[0].settled}
    assert 'role="alert"' in changed[page.panels[0].pictures] and "<b>.." not in changed[page.panels[0].pictures]


def test_eta_is_shown_where_it_means_something(page):
    values = [page.catalog.names[0], "DDIMScheduler", 20, "none", 1.0, 0.0, 1.0, 0.5, "float32"]
    assert page.on_scheduler(*values)["visible"] is True
    values[1] = "DPMSolverMultistepScheduler"
    assert page.on_scheduler(*values) == gr.update(visible=False, value=0)


def test_an_unlocked_seed_is_new_at_every_draw(page):
    assert page.on_begin(visit(""), 3, True)[0] == gr.skip()
    seeds = {page.on_begin(visit(""), 3, False)[0] for _ in range(8)}
    assert len(seeds) > 1 and all(0 <= seed < 2**31 for seed in seeds)


def test_what_is_stopped_in_the_queue_is_not_drawn(page):
    visitor = visit(to_link(Comparison(columns=(Column(num_inference_steps=1),) * 2, num_images=1)).removeprefix("?"))
    values = control_values(page, page.on_load(visitor))
    page.on_begin(visitor, 3, True)
    page.on_stop(visitor)
    assert [answer[-2] for answer in page.on_draw(visitor, *values)] == [
        '<p class="note">Stopped before it began.</p>'
    ]
    page.on_begin(visitor, 3, True)
    *_, last = page.on_draw(visitor, *values)
    assert [state.status for state in last[-1].states] == ["done", "done"]
    assert not page.endpoints.runs.active(visitor.session_hash, "page")


def test_settings_that_cannot_be_drawn_are_explained_and_leave_nothing_behind(page):
    visitor = visit(to_link(next(iter(PRESETS.values()))).removeprefix("?"))
    values = control_values(page, page.on_load(visitor))
    values[1 + len(page.shared_names) + 2] = 1000
    page.on_begin(visitor, 3, True)
    (answer,) = page.on_draw(visitor, *values)
    assert 'class="warning"' in answer[-2] and "1000" in answer[-2] and "250" in answer[-2]
    assert not page.endpoints.runs.active(visitor.session_hash, "page")


def test_stop_counts_from_the_click_on(page, monkeypatch):
    visitor = visit(to_link(Comparison(columns=(Column(num_inference_steps=1),) * 2, num_images=1)).removeprefix("?"))
    values = control_values(page, page.on_load(visitor))
    page.on_begin(visitor, 3, True)
    monkeypatch.setattr(page, "noise_of", lambda *_: page.on_stop(visitor) and [])  # between the queue and the drawing
    *_, last = page.on_draw(visitor, *values)
    assert [state.status for state in last[-1].states] == ["stopped", "stopped"]


def test_what_a_visitor_has_named_is_not_offered_to_others(root):
    cards = root / "model_cards"
    page = Page(Catalog({"film-mnist": cards / "film-mnist"}, folders=[cards]))
    values = control_values(page, page.on_load(visit(to_link(Comparison(columns=(Column(),) * 2)).removeprefix("?"))))
    values[1 + len(page.shared_names)] = "dilated-mnist"
    assert page.panels[0].controls["guidance"] in page.model_changed(0)(visit(""), ("", ""), *values)
    assert {column.model for column in page.spare_columns([Column()])} == {"film-mnist"}


def test_numbers_of_a_field():
    assert numbers("Scales", "0, 1 2.5,", float) == [0.0, 1.0, 2.5]
    with pytest.raises(SettingsError, match="whole numbers, such as"):
        numbers("Steps", "5, 1.5", int)


def test_columns_are_found_by_letter_and_number():
    comparison = Comparison.from_json(TWO)
    assert [chosen_column(comparison, column) for column in ("A", "b", 0, 1)] == [0, 1, 0, 1]
    for column in ("C", "", 2, -1, True, None, 0.5, ["A"]):
        with pytest.raises(SettingsError, match="no such column"):
            chosen_column(comparison, column)


def test_zips_are_kept_for_a_while(page):
    comparison, states = Comparison(columns=(Column(),)), [ColumnState("failed", error="of no matter")]
    older, newer = (page.endpoints.archive(comparison, states) for _ in range(2))
    moment = time.time() - KEPT - 1
    os.utime(older.parent, (moment, moment))
    page.endpoints.archive(comparison, states)
    assert newer.is_file() and not older.exists()


def test_runs_stop_by_name_and_session():
    runs = Runs()
    try:
        first, second = runs.start("one", "draw"), runs.start("two", "draw")
        assert not stopped(first)() and not stopped(second)()
        assert runs.stop("one", "draw") and stopped(first)() and not stopped(second)()
        third = runs.restart("two", "draw")
        assert stopped(second)() and not stopped(third)() and runs.restart("one", "draw") is None
        runs.stop_session("two")
        assert stopped(third)() and not list(runs.folder.iterdir())
    finally:
        runs.folder.rmdir()


def test_comparisons_of_two_clients_at_once_do_not_mix(address, drawn):
    answers = {}

    def ask(seed: int) -> None:
        settings = {**TWO, "seed": seed}
        answers[seed] = Client(address, verbose=False).predict(settings, api_name="/draw")

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in (5, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [c["images"] for c in answers[5]["columns"]] == [c["images"] for c in drawn["columns"]]
    # Image 0 of seed 6 is image 1 of seed 5, but for its class.
    assert answers[6]["columns"][0]["images"] != answers[5]["columns"][0]["images"]
