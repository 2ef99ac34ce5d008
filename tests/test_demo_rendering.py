"""What the demo's page shows of results: escaped, labelled, and with the right images."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import rendering
from comparison import ColumnState
from PIL import Image


HOSTILE = "<img src=x onerror=alert(1)>\"'&${1}{{2}}"


def image(value: int, side: int = 8) -> Image.Image:
    return Image.fromarray(np.full((side, side), value, np.uint8))


def state(**changes) -> ColumnState:
    """A column that has drawn two images in two observed steps, one of them as wanted."""
    final = [image(200), image(100)]
    given = {
        "status": "done", "step": 20, "num_steps": 20, "images": final, "frames": [[image(1), image(2)], final],
        "frame_steps": [1, 20], "seconds": 1.25, "network_evaluations": 40, "classifier_evaluations": 20,
        "images_per_second": 1.6, "labels": ["three", "seven"], "verdicts": [("three", 0.984), ("one", 0.7)],
        "probability": {"judge": [[0.1, 0.3], [0.9, 0.7]]}, "probability_steps": [10, 20],
        "guidance_norm": [[3.0, 1.0], [0.0, 0.0]], "norm_steps": [10, 20],
    }  # fmt: skip
    return ColumnState(**given | changes)


class Tags(HTMLParser):
    """Tags of HTML with their attributes; open ones have to be closed in order."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("img", "input", "line"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


def pixels(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))))


def test_status_line():
    assert (
        rendering.status_line(state()) == "20/20 steps · 40 evaluations + 20 of the classifier · 1.2 s · 1.6 images/s"
    )
    assert rendering.status_line(ColumnState("loading")) == "loading the model"
    assert rendering.status_line(ColumnState("drawing")) == "starting"
    assert rendering.status_line(ColumnState("failed", error="no")) == "failed"
    assert rendering.status_line(state(status="stopped", step=5)).startswith("stopped · 5/20 steps")


def test_column_shows_the_images_what_was_wanted_and_what_is_read():
    html = rendering.column("B", state())
    tags = Tags(html)
    shown = tags.all("img")
    assert [pixels(tag["src"]).tolist() for tag in shown] == [np.asarray(i).tolist() for i in state().images]
    assert shown[0]["alt"] == "Column B, image 1, wanted three, the judge reads three"
    assert "✓ 98 %" in html and "✗" in html and "1 of 2 as wanted" in html
    progress = next(tag for tag in tags.all("div") if tag.get("role") == "progressbar")
    assert progress["aria-valuenow"] == "100" and tags.all("section")[0]["data-status"] == "done"


def test_column_shows_its_noise_until_there_are_images():
    html = rendering.column("A", state(images=[], step=0, verdicts=None, status="loading"), [image(7), image(9)])
    assert [pixels(tag["src"])[0, 0] for tag in Tags(html).all("img")] == [7, 9]


@pytest.mark.parametrize(
    "html",
    [
        rendering.column("A", state(labels=[HOSTILE, HOSTILE], verdicts=[(HOSTILE, 0.5), (HOSTILE, 0.5)])),
        rendering.column("A", state(labels=[HOSTILE, None], verdicts=[("one", 0.5), (HOSTILE, 0.5)])),
        rendering.column("A", ColumnState("failed", error=HOSTILE)),
        rendering.waiting("A", [image(1)], [HOSTILE]),
        rendering.refused("A", HOSTILE),
        rendering.message(HOSTILE, "warning"),
        rendering.codes({"A": f"prompt = '{HOSTILE}'  # {HOSTILE}"}),
    ],
    ids=["labels", "verdicts", "error", "waiting", "refused", "message", "code"],
)
def test_text_from_outside_is_escaped(html):
    tags = Tags(html)
    assert all("onerror" not in attributes and attributes.get("src") != "x" for _, attributes in tags.tags)
    assert "<img src=x" not in html and "&lt;img src=x" in html


def test_code_keeps_its_text():
    text = 'import torch  # "three" & <more>\nimages = pipe(class_labels=[3], scale=2.5, name="if")\n'
    html = rendering.codes({"A": text})
    shown = re.search(r"<code>(.*?)</code>", html, re.DOTALL).group(1)
    plain = re.sub(r"<[^>]*>", "", shown)
    assert plain.replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", '"').replace("&amp;", "&") == text
    assert '<i class="keyword">import</i>' in shown and '<i class="number">2.5</i>' in shown


def test_film_has_a_scrubber_over_the_longest_strip_and_every_frame():
    tags = Tags(rendering.film([state(), ColumnState("failed"), state(frames=[[image(5)]], frame_steps=[3])]))
    assert tags.all("input")[0]["max"] == "1"
    assert [(tag["data-frame"], tag["data-step"]) for tag in tags.all("button")] == [
        ("0", "1"),
        ("1", "20"),
        ("0", "3"),
    ]
    assert [tag["data-column"] for tag in tags.all("section")] == ["a", "c"]


def test_divided_shows_one_image_or_all_of_both_columns():
    states = {"A": state(), "C": state(images=[image(3), image(4)])}
    every, one = (Tags(rendering.divided("A", "C", states, index)).all("img") for index in (None, 1))
    assert [pixels(tag["src"])[0, 0] for tag in every] == [3, 4, 200, 100]  # the right one lies below
    assert [pixels(tag["src"])[0, 0] for tag in one] == [4, 100]
    assert one[0]["alt"] == "Column C, image 2"


def test_curves_are_means_over_images():
    html = rendering.curves([state(), state(probability={}, guidance_norm=[], norm_steps=[])])
    tags = Tags(html)
    assert [tag["aria-label"] for tag in tags.all("svg")] == [
        "Probability of the wanted class, says the judge, at the end: A 0.80",
        "Norm of the guidance, at most: A 2.00",
    ]
    # 380 units from noise to image, 180 from 0 to the top of the axis, which is 1 and 2.
    assert [tag["points"] for tag in tags.all("polyline")] == ["234.0,154.0 424.0,46.0", "234.0,10.0 424.0,190.0"]
    assert "curve" not in rendering.curves([ColumnState()]) and "Draw guided images" in rendering.curves([])


def test_announcement_is_the_same_while_drawing():
    drawing = [state(status="drawing", step=step) for step in (3, 4)]
    assert {rendering.announcement([one, state()]) for one in drawing} == {"Drawing."}
    assert rendering.announcement([state(), state(status="stopped", verdicts=None)]) == (
        "A is done in 1.2 s, the judge reads 1 of 2 as wanted; B was stopped."
    )


def test_large_pictures_travel_smaller():
    large = Image.fromarray(np.random.default_rng(0).integers(0, 256, (600, 800, 3), np.uint8))
    assert Image.open(io.BytesIO(base64.b64decode(rendering.picture_uri(large).split(",")[1]))).size == (384, 288)
    np.testing.assert_array_equal(pixels(rendering.png_uri(large)), np.asarray(large))
