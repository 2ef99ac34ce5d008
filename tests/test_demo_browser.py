"""The demo as a person uses it: a running app and headless Chromium.

Every test leaves a picture of what it saw last, in the folder that DIFFUSERS_EXT_SCREENSHOTS names or in pytest's own.
"""

import io
import os
import re
import time
import zipfile
from pathlib import Path
from urllib.parse import urlsplit

import browser
import pytest
from browser import Visitor
from PIL import Image
from settings import PRESETS, from_link


if not browser.missing():
    from playwright.sync_api import expect

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(browser.missing() is not None, reason=str(browser.missing())),
]

DESK = {"width": 1440, "height": 900}
PHONE = {"width": 390, "height": 844}
GUIDANCE = "Guidance off against on"
TABS = ("Steps", "Two columns", "Curves", "Sweep", "Take away")
FIRST_PICTURE_SECONDS = 10
STOP_SECONDS = 5  # of two columns on two cores, of which one step takes a fraction of a second

# Notes every change of a column: milliseconds since the call, the status, the first picture.
RECORD = """column => {
    const area = document.querySelector(`#pictures-${column}`);
    const start = performance.now();
    const seen = window.seen = [];
    const note = () => {
        const status = area.querySelector('.result:not([data-old])')?.dataset.status;
        const picture = area.querySelector('img')?.src;
        const last = seen.at(-1);
        if (status && (last?.status !== status || last?.picture !== picture))
            seen.push({milliseconds: performance.now() - start, status, picture});
    };
    new MutationObserver(note).observe(area, {subtree: true, childList: true, attributes: true});
}"""
NEED_NAMES = {
    *("button", "checkbox", "combobox", "img", "image", "link", "listbox", "radio", "slider", "spinbutton", "switch"),
    *("searchbox", "tab", "textbox", "progressbar", "SvgRoot"),
}


@pytest.fixture(scope="module")
def demo(hub_server, tmp_path_factory):
    """The app on its shipped models. The Hub that it could ask is the one of the tests, which knows no model."""
    with browser.running_demo(tmp_path_factory.mktemp("demo") / "demo.log") as running:
        yield running


@pytest.fixture(scope="module")
def chromium():
    with browser.chromium() as running:
        yield running


@pytest.fixture(scope="session")
def screenshots(tmp_path_factory) -> Path:
    folder = Path(os.environ.get("DIFFUSERS_EXT_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder.resolve()


@pytest.fixture
def visit(demo, chromium, screenshots, request):
    """`visit()` opens the page in a browser session of its own; `visit(query, **options)` another address or device.

    When the test is over, no session may have met an error.
    """
    sessions = []

    def open_page(query: str = "", **options) -> Visitor:
        options = {"viewport": DESK, **options}
        page = chromium.new_context(**options).new_page()
        sessions.append((page, browser.watch(page)))
        return Visitor(page, demo.url + query)

    yield open_page
    problems = []
    for number, (page, problems_of_page) in enumerate(sessions):
        name = request.node.name.removeprefix("test_")
        path = screenshots / f"{name}{number or ''}.png"
        page.screenshot(path=path, full_page=True)
        print(path)
        problems += problems_of_page
        page.context.close()
    assert problems == []


def settings(visitor: Visitor) -> dict:
    """The settings in the address bar, where the page puts those of the last run."""
    return from_link(visitor.page.url).to_json()


def drawn(visitor: Visitor, **steps: int) -> Visitor:
    """The visitor, after a short comparison."""
    for column, number in (steps or {"a": 5, "b": 5}).items():
        visitor.fill("Steps", number, column)
    visitor.draw()
    return visitor


def assert_drawn(visitor: Visitor, preset: str) -> None:
    """All columns are done, and what was drawn is the preset, with the schedulers that it leaves to the models."""
    columns = PRESETS[preset].columns
    assert [visitor.status(column) for column in "abcd"[: len(columns)]] == ["done"] * len(columns)
    expected, actual = PRESETS[preset].to_json(), settings(visitor)
    for wanted, column in zip(expected["columns"], actual["columns"], strict=True):
        wanted["scheduler"] = wanted["scheduler"] or column["scheduler"]
    assert actual == expected


def test_a_preset_draws_and_previews_arrive(visit):
    visitor = visit()
    assert visitor.status("a") == visitor.status("b") == "waiting"
    noise = visitor.pictures("a")
    assert noise == visitor.pictures("b") != [], "the noise that both columns start from"
    visitor.page.evaluate(RECORD, "a")
    visitor.start(GUIDANCE)
    visitor.wait_until_settled()
    seen = visitor.page.evaluate("seen")
    assert_drawn(visitor, GUIDANCE)
    shown = [change for change in seen if change["picture"] not in ("", None, noise[0])]
    assert shown[0]["milliseconds"] < 1000 * FIRST_PICTURE_SECONDS
    assert len({change["picture"] for change in shown if change["status"] == "drawing"}) >= 3
    comparison = PRESETS[GUIDANCE]
    first, second = visitor.pictures("a"), visitor.pictures("b")
    assert len(first) == len(second) == comparison.num_images and first != second
    steps = comparison.columns[0].num_inference_steps
    status = visitor.page.locator("#pictures-a .status").inner_text()
    assert re.search(rf"{steps}\D+{steps} steps.*\d+ evaluations.*\d s.*images/s", status), status


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != GUIDANCE])
def test_every_preset_draws(visit, preset):
    visitor = visit()
    visitor.start(preset)
    visitor.wait_until_settled("abcd"[: len(PRESETS[preset].columns)])
    assert_drawn(visitor, preset)


def test_stop_ends_the_run_and_keeps_the_previews(visit):
    visitor = visit()
    for column in "ab":
        visitor.fill("Steps", 250, column)
    visitor.fill("Images", 6)
    visitor.start()
    visitor.wait_for_pictures("a")
    visitor.wait_for_pictures("b")
    begin = time.monotonic()
    visitor.click("Stop")
    for column in "ab":
        visitor.page.locator(f"#pictures-{column} [data-status=stopped]").wait_for()
    assert time.monotonic() - begin < STOP_SECONDS
    visitor.wait_until_settled()
    kept = visitor.pictures("a")
    assert len(kept) == 6
    visitor.page.wait_for_timeout(1000)
    assert visitor.pictures("a") == kept
    for column in "ab":
        visitor.fill("Steps", 3, column)
    visitor.draw()
    assert visitor.status("a") == "done" and visitor.pictures("a") != kept


def test_a_locked_seed_repeats_and_an_open_one_changes(visit):
    visitor = visit()
    for column in "ab":
        visitor.fill("Steps", 3, column)
    visitor.fill("Seed", 1234)
    visitor.field("Lock seed").check()
    visitor.draw()
    first = visitor.pictures("a")
    visitor.draw()
    assert visitor.pictures("a") == first and visitor.value("Seed") == "1234"
    visitor.field("Lock seed").uncheck()
    visitor.draw()
    seed = visitor.value("Seed")
    assert seed != "1234" and visitor.pictures("a") != first
    assert settings(visitor)["seed"] == int(seed), "the seed that was drawn is the one that is shown"
    visitor.click("New seed")
    expect(visitor.field("Seed")).not_to_have_value(seed)


def test_a_link_restores_settings_and_pixels(visit):
    visitor = visit()
    visitor.fill("Model", "dit-gqa-mnist", "a")
    visitor.fill("Steps", 4, "a")
    visitor.fill("Model", "adm-mnist", "b")
    visitor.fill("Steps", 3, "b")
    visitor.fill("Images", 3)
    visitor.fill("Seed", 77)
    visitor.field("Lock seed").check()
    visitor.draw()
    shared = settings(visitor)
    assert shared["seed"] == 77 and [column["model"] for column in shared["columns"]] == ["dit-gqa-mnist", "adm-mnist"]

    friend = visit("?" + urlsplit(visitor.page.url).query)
    assert friend.value("Model", "a") == "dit-gqa-mnist" and friend.value("Model", "b") == "adm-mnist"
    assert friend.value("Steps", "a") == "4" and friend.value("Images") == "3" and friend.value("Seed") == "77"
    friend.draw()
    assert settings(friend) == shared
    assert friend.pictures("a") == visitor.pictures("a") and friend.pictures("b") == visitor.pictures("b")


def test_a_hostile_link_opens_the_defaults(visit):
    visitor = visit("?s=" + "A" * 3000)
    assert visitor.value("Model", "a") == PRESETS[GUIDANCE].columns[0].model
    expect(visitor.page.locator("#live")).to_contain_text("link could not be restored")


def test_fields_that_are_only_left_change_nothing(visit):
    visitor = drawn(visit(), a=2, b=2)
    pictures = visitor.pictures("b")
    scale = visitor.page.locator("#column-b .scale input[type=number]")
    scale.fill("11")
    for name in ("Model", "Scheduler", "Guidance"):
        visitor.field(name, "b").focus()
        visitor.page.keyboard.press("Tab")
        visitor.page.wait_for_timeout(500)
    assert scale.input_value() == "11"
    assert visitor.status("b") == "done" and visitor.pictures("b") == pictures


def test_another_model_by_the_keyboard_and_drawn_at_once(visit):
    """The choices of its column follow before the draw, although the click comes before they do."""
    visitor = visit()
    visitor.fill("Steps", 2, "a")
    visitor.fill("Steps", 2, "b")
    visitor.field("Model", "b").click()
    visitor.page.keyboard.press("Control+A")
    visitor.page.keyboard.type("film-mnist")
    visitor.page.keyboard.press("Tab")  # into the list of schedulers, which is open when its choices change
    visitor.draw()
    assert visitor.status("b") == "done"
    assert settings(visitor)["columns"][1]["guidance"] == "classifier-free"
    assert visitor.value("Guidance", "b") == "classifier-free"
    assert visitor.page.locator("ul:visible").count() == 0
    visitor.fill("Model", "dilated-mnist", "b")
    expect(visitor.field("Guidance", "b")).to_have_value("none")
    expect(visitor.page.locator("#classes .token")).to_have_count(8)  # column A knows them
    visitor.fill("Model", "dilated-mnist", "a")
    expect(visitor.field("Guidance", "a")).to_have_value("none")
    visitor.draw()
    assert visitor.status("a") == visitor.status("b") == "done"


def test_a_model_that_does_not_exist_leaves_the_other_column_alone(visit):
    visitor = visit()
    visitor.fill("Steps", 3, "a")
    visitor.fill("Model", "nobody/has-this-model", "b")
    visitor.draw()
    assert visitor.status("a") == "done" and visitor.pictures("a")
    assert visitor.status("b") == "failed"
    assert "nobody/has-this-model" in visitor.page.locator("#column-b").get_by_role("alert").inner_text()


@pytest.mark.parametrize("count", [3, 4])
def test_more_columns(visit, count):
    visitor = visit()
    visitor.page.get_by_role("radio", name=str(count), exact=True).check()
    columns = "abcd"[:count]
    for column in columns:
        visitor.page.locator(f"#column-{column}").wait_for()
        visitor.fill("Steps", 3, column)
    visitor.draw(columns)
    assert [visitor.status(column) for column in columns] == ["done"] * count
    assert all(visitor.pictures(column) for column in columns)
    assert visitor.page.locator("#column-d").is_visible() == (count == 4)
    boxes = [visitor.page.locator(f"#column-{column}").bounding_box() for column in columns]
    assert len({round(box["y"]) for box in boxes}) == 1, "columns stand side by side"
    assert visitor.page.evaluate("document.scrollingElement.scrollWidth") <= DESK["width"]


def test_scrubber_goes_through_the_steps(visit):
    visitor = drawn(visit(), a=6, b=3)
    visitor.open_tab("Steps")
    end = visitor.pictures("a"), visitor.pictures("b")
    scrubber = visitor.page.get_by_role("slider", name="Step of the run")
    scrubber.focus()
    visitor.page.keyboard.press("Home")
    start = visitor.pictures("a"), visitor.pictures("b")
    assert start[0] != end[0] and start[1] != end[1]
    visitor.page.keyboard.press("ArrowRight")
    assert visitor.pictures("a") not in (start[0], end[0])
    box = scrubber.bounding_box()
    visitor.page.mouse.click(box["x"] + box["width"] - 3, box["y"] + box["height"] / 2)
    assert (visitor.pictures("a"), visitor.pictures("b")) == end
    visitor.page.get_by_role("button", name="Column B, step 1", exact=True).click()
    assert (visitor.pictures("a"), visitor.pictures("b")) == start


def test_slider_between_two_columns(visit):
    visitor = drawn(visit())
    visitor.open_tab("Two columns")
    divided, slider = visitor.page.locator(".divided"), visitor.page.get_by_role("slider", name=re.compile("Divide"))
    over, under = divided.locator(".over img"), divided.locator(".under img")
    sources = "images => images.map(image => image.src)"
    assert over.evaluate_all(sources) == visitor.pictures("a")
    assert under.evaluate_all(sources) == visitor.pictures("b")

    def left_share() -> float:
        """How much of the left column is to be seen, by what the browser shows at points along a line."""
        return divided.evaluate("""area => {
            const box = area.getBoundingClientRect(), over = area.querySelector('.over');
            for (const element of area.querySelectorAll('*'))
                element.style.pointerEvents = over === element || over.contains(element) ? 'auto' : 'none';
            const inside = k => over.contains(document.elementFromPoint(
                box.x + (k + 0.5) / 50 * box.width, box.y + box.height / 2));
            const share = [...Array(50).keys()].filter(inside).length / 50;
            for (const element of area.querySelectorAll('*')) element.style.pointerEvents = '';
            return share;
        }""")

    slider.scroll_into_view_if_needed()
    middle = left_share()
    assert 0.3 < middle < 0.7
    slider.focus()
    for _ in range(20):
        visitor.page.keyboard.press("ArrowRight")
    further = left_share()
    assert further > middle + 0.1
    box = slider.bounding_box()
    visitor.page.mouse.move(box["x"] + further * box["width"], box["y"] + box["height"] / 2)
    visitor.page.mouse.down()
    visitor.page.mouse.move(box["x"] + 0.2 * box["width"], box["y"] + box["height"] / 2, steps=5)
    visitor.page.mouse.up()
    assert left_share() < middle - 0.1


def test_curves_show_every_guided_column(visit):
    visitor = drawn(visit())
    visitor.open_tab("Curves")
    charts = visitor.page.locator("#curves").get_by_role("img")
    charts.first.wait_for()
    names = [chart.get_attribute("aria-label") or "" for chart in charts.all()]
    assert any("robability" in name for name in names) and any("uidance" in name for name in names), names


def test_sweep_is_one_picture(visit):
    visitor = visit()
    visitor.fill("Images", 1)
    visitor.open_tab("Sweep")
    visitor.page.get_by_label("Guidance scales", exact=True).fill("0, 4")
    visitor.page.get_by_label("Numbers of steps", exact=True).fill("2, 3")
    visitor.click("Draw the sweep")
    picture = visitor.page.locator("#sweep img")
    picture.wait_for(timeout=60_000)
    visitor.page.wait_for_function("() => document.querySelector('#sweep img').naturalWidth > 100")


def test_take_away(visit):
    visitor = drawn(visit())
    visitor.open_tab("Take away")
    assert from_link(visitor.page.get_by_label("Link", exact=True).input_value()).to_json() == settings(visitor)
    visitor.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    visitor.click("Copy link")
    visitor.page.wait_for_timeout(300)
    assert from_link(visitor.page.evaluate("navigator.clipboard.readText()")).to_json() == settings(visitor)
    with visitor.page.expect_download() as download:
        visitor.page.locator("#download").click()
    names = zipfile.ZipFile(download.value.path()).namelist()
    pictures = [name for name in names if name.endswith(".png")]
    assert len(pictures) == len(visitor.pictures("a")) + len(visitor.pictures("b"))
    assert {"settings.json", "A.py", "B.py"} <= set(names)
    assert 'from_pretrained("model_cards/adm-mnist")' in visitor.page.locator("#code-a").inner_text()


def test_two_columns_fit_on_one_screen(visit):
    visitor = drawn(visit())
    for column in "ab":
        box = visitor.page.locator(f"#column-{column}").bounding_box()
        assert box["y"] + box["height"] <= DESK["height"] and box["x"] + box["width"] <= DESK["width"]
    image = visitor.page.locator("#pictures-a img").first
    assert image.evaluate("image => getComputedStyle(image).imageRendering") == "pixelated"
    assert image.bounding_box()["width"] >= 64, "twice the size of the image or more"


def test_phone(visit):
    visitor = visit(viewport=PHONE, device_scale_factor=2, is_mobile=True, has_touch=True)
    drawn(visitor)
    for tab in TABS:
        visitor.open_tab(tab)
        assert visitor.page.evaluate("document.scrollingElement.scrollWidth") <= PHONE["width"], tab
    first, second = (visitor.page.locator(f"#column-{column}").bounding_box() for column in "ab")
    assert second["y"] >= first["y"] + first["height"], "columns stand below each other"
    assert first["x"] >= 0 and first["x"] + first["width"] <= PHONE["width"]


def background(visitor: Visitor) -> float:
    """Brightness of the page in its upper left corner, 0 (black) to 255."""
    return Image.open(io.BytesIO(visitor.page.screenshot())).convert("L").getpixel((4, 4))


def test_dark_mode_follows_the_system_and_the_button(visit):
    assert background(visit(color_scheme="light")) > 200
    visitor = visit(color_scheme="dark")
    assert background(visitor) < 60
    drawn(visitor)
    visitor.page.get_by_role("button", name=re.compile("theme|dark|light", re.IGNORECASE)).first.click()
    visitor.page.wait_for_timeout(300)
    assert background(visitor) > 200
    assert visitor.status("a") == "done" and visitor.pictures("a"), "what was drawn stays"


def focused(visitor: Visitor) -> str:
    return visitor.page.evaluate(
        "document.activeElement.getAttribute('aria-label') || document.activeElement.innerText"
    )


def tab_to(visitor: Visitor, name: str, limit: int = 150) -> None:
    """Presses Tab until the element of this name has the focus, and checks that the focus can be seen."""
    for _ in range(limit):
        visitor.page.keyboard.press("Tab")
        if focused(visitor).strip() == name:
            style = "const style = getComputedStyle(document.activeElement)"
            assert visitor.page.evaluate(
                f"() => {{ {style}; return style.outlineStyle !== 'none' || style.boxShadow !== 'none' }}"
            )
            return
    pytest.fail(f"{limit} times Tab do not lead to {name!r}")


def test_keyboard_alone(visit):
    visitor = visit()
    tab_to(visitor, "Draw")
    visitor.page.evaluate(browser.MARK)
    visitor.page.keyboard.press("Enter")
    visitor.wait_until_settled()
    assert visitor.status("a") == visitor.status("b") == "done"
    tab_to(visitor, "Steps")
    visitor.page.keyboard.press("Control+A")
    visitor.page.keyboard.type("250")
    for _ in range(150):
        visitor.page.keyboard.press("Shift+Tab")
        if focused(visitor).strip() == "Draw":
            break
    visitor.page.evaluate(browser.MARK)
    visitor.page.keyboard.press("Enter")
    visitor.wait_for_pictures("a")
    tab_to(visitor, "Stop")
    visitor.page.keyboard.press("Enter")
    visitor.wait_until_settled()
    assert visitor.status("a") == "stopped"


def nameless(visitor: Visitor) -> list[str]:
    """What a screen reader would announce without a name; gradio's icons inside fields that have one do not count."""
    browser_tools = visitor.page.context.new_cdp_session(visitor.page)
    found = []
    for node in browser_tools.send("Accessibility.getFullAXTree")["nodes"]:
        if node["ignored"] or node["role"]["value"] not in NEED_NAMES or node.get("name", {}).get("value"):
            continue
        element = browser_tools.send("DOM.describeNode", {"backendNodeId": node["backendDOMNodeId"]})["node"]
        if element["nodeName"] != "svg" or "role" in element["attributes"]:
            found.append(f"{node['role']['value']}: {element['nodeName']} {element['attributes']}")
    return found


def test_everything_has_a_name(visit):
    visitor = visit()
    assert nameless(visitor) == []
    drawn(visitor)
    labels = visitor.page.locator("#pictures-a img").evaluate_all("images => images.map(image => image.alt)")
    assert len(set(labels)) == len(labels) == PRESETS[GUIDANCE].num_images
    for tab in TABS:
        visitor.open_tab(tab)
        assert nameless(visitor) == [], tab
