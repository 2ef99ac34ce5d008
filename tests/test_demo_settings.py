"""Settings of the demo: bounds, JSON, links, presets, and what strangers may send."""

import base64
import dataclasses
import gzip
import json
import string
import time

import pytest
import settings
from settings import (
    GUIDANCE,
    LETTERS,
    MAX_COLUMNS,
    MAX_LINK,
    MAX_PROMPT,
    MAX_SEED,
    MAX_WORK,
    PRESETS,
    Column,
    Comparison,
    SettingsError,
    from_link,
    to_link,
)


EVERYTHING = Comparison(
    columns=(
        Column(
            model="me/model",
            scheduler="DDIMScheduler",
            num_inference_steps=30,
            guidance="classifier",
            guidance_scale=3.5,
            guidance_interval=(0.25, 0.75),
            eta=0.5,
            dtype="bfloat16",
        ),
        Column(),
    ),
    class_labels=("three", "7", "crane, bird"),
    num_images=6,
    seed=MAX_SEED,
    prompt='a "cat"\nunder a 🌳, گربه\u200cها',
    negative_prompt="blurry \\ ünscharf",
    height=64,
    width=128,
)


def a_column(**values: object) -> dict:
    return {"columns": [values]}


def settings_with(**values: object) -> dict:
    return {"columns": [{}], **values}


def encoded(content: bytes) -> str:
    return "?s=" + base64.urlsafe_b64encode(content).decode().rstrip("=")


HOSTILE_SETTINGS = {
    "null": None,
    "list": [],
    "text": '{"columns": [{}]}',
    "number": 7,
    "no columns": {},
    "columns null": {"columns": None},
    "columns empty": {"columns": []},
    "columns object": {"columns": {}},
    "columns text": {"columns": "abcd"},
    "five columns": {"columns": [{}] * 5},
    "million columns": {"columns": [{}] * 10**6},
    "column null": {"columns": [None]},
    "column list": {"columns": [[[[[[]]]]]]},
    "unknown key": settings_with(trust_remote_code=True),
    "unknown key of a column": a_column(custom_pipeline="evil"),
    "long key": settings_with(**{"k" * 10**6: 1}),
    "million keys": settings_with(**{f"k{i}": 1 for i in range(10**6)}),
    "class attribute": settings_with(__class__="x"),
    "prompt of a megabyte": settings_with(prompt="x" * 2**20),
    "negative prompt of a megabyte": settings_with(negative_prompt="ü" * 2**20),
    "prompt null": settings_with(prompt=None),
    "prompt list": settings_with(prompt=["x"]),
    "prompt nested": settings_with(prompt=[[[[["x"]]]]]),
    "prompt with NUL": settings_with(prompt="a\0b"),
    "prompt with escape": settings_with(prompt="\x1b[31mred"),
    "prompt that turns the direction": settings_with(prompt="abc\u202edcba"),
    "prompt with an isolate": settings_with(prompt="\u2066abc"),
    "prompt with invisible tags": settings_with(prompt="x" + "".join(chr(0xE0000 + ord(c)) for c in "ignore")),
    "prompt with half a pair": settings_with(prompt="\ud83d"),
    "prompts too long for a link": settings_with(prompt="🌳" * 1000, negative_prompt="🌳" * 1000),
    "million labels": settings_with(class_labels=["three"] * 10**6),
    "labels text": settings_with(class_labels="three"),
    "labels numbers": settings_with(class_labels=[3]),
    "labels nested": settings_with(class_labels=[["three"]]),
    "labels object": settings_with(class_labels={"three": 1}),
    "long label": settings_with(class_labels=["3" * 10**6]),
    "empty label": settings_with(class_labels=[""]),
    "label of two lines": settings_with(class_labels=["three\nimport os"]),
    "no images": settings_with(num_images=0),
    "many images": settings_with(num_images=13),
    "images true": settings_with(num_images=True),
    "images float": settings_with(num_images=4.0),
    "images text": settings_with(num_images="4"),
    "images in unicode digits": settings_with(num_images="\uff14"),
    "seed huge": settings_with(seed=10**1000),
    "seed of 100000 digits": settings_with(seed=1 << 10**6),
    "seed negative": settings_with(seed=-1),
    "seed NaN": settings_with(seed=float("nan")),
    "seed false": settings_with(seed=False),
    "only a height": settings_with(height=64),
    "size no multiple": settings_with(height=65, width=64),
    "size huge": settings_with(height=2048, width=2048),
    "size text": settings_with(height="64", width="64"),
    "model number": a_column(model=1),
    "model null": a_column(model=None),
    "model empty": a_column(model=""),
    "model space": a_column(model=" film-mnist"),
    "model long": a_column(model="a" * 10**6),
    "model traversal": a_column(model="../../etc"),
    "model traversal inside": a_column(model="model_cards/../../secret"),
    "model traversal with backslashes": a_column(model="a\\..\\..\\b"),
    "model with NUL": a_column(model="film-mnist\0"),
    "model of two lines": a_column(model="film-mnist\nevil"),
    "scheduler path": a_column(scheduler="os.system"),
    "scheduler dunder call": a_column(scheduler="__import__('os')"),
    "scheduler in look-alikes": a_column(scheduler="DDIMScһeduler"),
    "scheduler long": a_column(scheduler="A" * 10**6),
    "scheduler number": a_column(scheduler=1),
    "steps zero": a_column(num_inference_steps=0),
    "steps many": a_column(num_inference_steps=251),
    "steps true": a_column(num_inference_steps=True),
    "steps infinite": a_column(num_inference_steps=float("inf")),
    "guidance unknown": a_column(guidance="more"),
    "guidance list": a_column(guidance=["none"]),
    "guidance object": a_column(guidance={}),
    "scale NaN": a_column(guidance_scale=float("nan")),
    "scale infinite": a_column(guidance_scale=float("inf")),
    "scale negative": a_column(guidance_scale=-1),
    "scale huge": a_column(guidance_scale=10**400),
    "scale true": a_column(guidance_scale=True),
    "scale text": a_column(guidance_scale="2"),
    "interval one number": a_column(guidance_interval=[0.5]),
    "interval three numbers": a_column(guidance_interval=[0, 0.5, 1]),
    "interval million numbers": a_column(guidance_interval=[0] * 10**6),
    "interval reversed": a_column(guidance_interval=[1, 0]),
    "interval NaN": a_column(guidance_interval=[0, float("nan")]),
    "interval text": a_column(guidance_interval="01"),
    "interval null": a_column(guidance_interval=None),
    "eta above 1": a_column(eta=1.5),
    "eta null": a_column(eta=None),
    "dtype unknown": a_column(dtype="float64"),
    "dtype list": a_column(dtype=[]),
}

HOSTILE_LINKS = {
    "empty": "",
    "nothing in it": "?s=",
    "other parameter": "?x=abc",
    "megabyte": "?s=" + "A" * 2**20,
    "no base64": "?s=<script>alert(1)</script>",
    "broken base64": "?s=AAAAA",
    "base64 of half a text": to_link(EVERYTHING)[:-7],
    "not UTF-8": encoded(b"\xff\xfe\xff"),
    "UTF-16": encoded('{"columns": [{}]}'.encode("utf-16")),
    "gzip bomb": encoded(gzip.compress(b"\0" * 10**6)),
    "deep": encoded(b"[" * 3000),
    "deep object": encoded(b'{"columns":' * 300),
    "NaN": encoded(b'{"columns": [{"eta": NaN}]}'),
    "infinity": encoded(b'{"columns": [{"guidance_scale": 1e999}]}'),
    "number of 4000 digits": encoded(b'{"columns": [{}], "seed": ' + b"9" * 4000 + b"}"),
    "number of 4400 digits": encoded(b'{"columns": [{}], "seed": ' + b"9" * 4400 + b"}"),
    "pickle": encoded(b"\x80\x04\x95cos\nsystem\n."),
    "unicode digits": "?s=\uff11\uff12\uff13",
    "two lines": "?s=AAAA\nAAAA",
    "another type": b"?s=AAAA",
    "nothing": None,
}


@pytest.mark.parametrize("data", HOSTILE_SETTINGS.values(), ids=HOSTILE_SETTINGS)
def test_hostile_settings_are_refused_at_once(data):
    refused_at_once(Comparison.from_json, data)


@pytest.mark.parametrize("link", HOSTILE_LINKS.values(), ids=HOSTILE_LINKS)
def test_hostile_links_are_refused_at_once(link):
    refused_at_once(from_link, link)


def refused_at_once(read, value):
    begin = time.thread_time()
    with pytest.raises(SettingsError) as caught:
        read(value)
    assert time.thread_time() - begin < 0.1
    message = str(caught.value)
    assert 20 < len(message) < 400
    assert message.isprintable()  # also no direction of writing turned, no escapes for a terminal
    for text in texts_in(value):
        repeated = [text[i : i + 81] for i in range(0, min(len(text) - 80, 2000), 20)]
        assert not any(part in message for part in repeated)


def texts_in(value: object) -> list[str]:
    """The texts of a hostile value, down to a few levels, without looking through long lists."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        inside = [*list(value)[:20], *list(value.values())[:20]]
    else:
        inside = value[:20] if isinstance(value, list) else []
    return [text for part in inside for text in texts_in(part)]


@pytest.mark.parametrize("comparison", [EVERYTHING, *PRESETS.values()], ids=["everything", *PRESETS])
def test_json_and_links_restore_everything(comparison):
    data = json.loads(json.dumps(comparison.to_json(), allow_nan=False))
    assert Comparison.from_json(data) == comparison
    link = to_link(comparison)
    assert len(link) <= MAX_LINK and set(link[1:]) <= set(string.ascii_letters + string.digits + "-_=")
    for text in (link, link.removeprefix("?s="), f"https://me-space.hf.space/{link}", f"/?a=1&{link[1:]}&b=2#top?"):
        assert from_link(text) == comparison


def test_json_is_complete():
    data = EVERYTHING.to_json()
    assert list(data) == [field.name for field in dataclasses.fields(Comparison)]
    assert list(data["columns"][1]) == [field.name for field in dataclasses.fields(Column)]


def test_what_is_missing_has_its_default():
    assert Comparison.from_json({"columns": [{}, {"eta": 1}]}) == Comparison(columns=(Column(), Column(eta=1)))


@pytest.mark.parametrize(
    ("low", "high"),
    [
        (Comparison((Column(),), num_images=1, seed=0), Comparison((Column(),), num_images=12, seed=MAX_SEED)),
        (Comparison((Column(),), height=8, width=8), Comparison((Column(),), height=1024, width=1024)),
        (Comparison((Column(num_inference_steps=1),)), Comparison((Column(num_inference_steps=250),))),
        (Comparison((Column(guidance_scale=0),)), Comparison((Column(guidance_scale=20.0),))),
        (Comparison((Column(guidance_interval=(0, 0)),)), Comparison((Column(guidance_interval=(1, 1)),))),
        (Comparison((Column(),)), Comparison((Column(),) * MAX_COLUMNS)),
        (Comparison((Column(),)), Comparison((Column(),), prompt="x" * MAX_PROMPT, negative_prompt="x" * MAX_PROMPT)),
    ],
)
def test_bounds_belong_to_the_range(low, high):
    for comparison in (low, high):
        assert from_link(to_link(comparison)) == comparison


def test_total_work_is_bounded(monkeypatch):
    largest = Comparison(columns=(Column(num_inference_steps=250),) * 4, num_images=12)
    assert largest.num_images * 4 * 250 == MAX_WORK
    monkeypatch.setattr(settings, "MAX_WORK", MAX_WORK - 1)
    with pytest.raises(SettingsError, match="12000 image steps; at most 11999"):
        Comparison.from_json(largest.to_json())


@pytest.mark.parametrize("text", ["many", "0", "-5", "1e3", "\uff11"])
def test_operators_are_told_of_a_limit_that_is_no_number(text, monkeypatch):
    monkeypatch.setenv("DIFFUSERS_EXT_DEMO_MAX_WORK", "500")
    assert settings.max_work() == 500
    monkeypatch.setenv("DIFFUSERS_EXT_DEMO_MAX_WORK", text)
    with pytest.raises(ValueError, match="DIFFUSERS_EXT_DEMO_MAX_WORK.*at least 1"):
        settings.max_work()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (settings_with(num_images=13), ["`num_images`", "13", "1 to 12"]),
        (a_column(num_inference_steps=1000), ["`num_inference_steps`", "1000", "1 to 250"]),
        ({"columns": [{}, {"eta": 2}]}, ["Column B:", "`eta`", "2", "0 to 1"]),
        (a_column(guidance="cfg"), ["Column A:", "`guidance`", "'cfg'", "classifier-free"]),
        (a_column(scheduler="DDIM Scheduler"), ["`scheduler`", "'DDIM Scheduler'", "DDIMScheduler"]),
        (settings_with(seeds=1), ["'seeds'", "seed"]),
        (settings_with(prompt="a\u202eb"), ["`prompt`", "U+202E"]),
        (settings_with(prompt="x" * 1001), ["`prompt`", "1001 characters", "at most 1000"]),
    ],
)
def test_messages_name_argument_value_and_rule(data, says):
    with pytest.raises(SettingsError) as caught:
        Comparison.from_json(data)
    assert all(word in str(caught.value) for word in says)


def test_presets():
    """Both columns of each differ in what its name says alone, so that what is seen is its effect."""
    differences = {
        "Guidance off against on": {"guidance"},
        "DDPM 250 against DPM-Solver++ 20": {"scheduler", "num_inference_steps"},
        "UNet against DiT": {"model"},
        "Classifier against classifier-free": {"model", "guidance", "guidance_scale"},
    }
    assert list(PRESETS) == list(differences)
    for name, comparison in PRESETS.items():
        first, second = comparison.columns
        changed = {
            field.name
            for field in dataclasses.fields(Column)
            if getattr(first, field.name) != getattr(second, field.name)
        }
        assert changed == differences[name]
    assert len(LETTERS) == MAX_COLUMNS and "none" in GUIDANCE
