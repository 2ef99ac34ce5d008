"""What is taken away from the demo: Python that draws the same pixels as pasted, and a zip."""

import ast
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from catalog import Catalog
from comparison import ColumnState, compare
from PIL import Image
from settings import LETTERS, Column, Comparison, from_link
from takeaway import archive, code
from test_demo_catalog import class_conditional, composable, dit, stable_diffusion, unet_of_diffusers

import diffusers
from diffusers import DDPMPipeline, DDPMScheduler


ROOT = Path(__file__).resolve().parents[1]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def catalog():
    return Catalog.shipped()


def columns(model: str, *changes: dict) -> list[Column]:
    return [Column(**{"model": model, "num_inference_steps": 3, **change}) for change in changes]


FREE = {"guidance": "classifier-free", "guidance_scale": 2.5}
CLASSIFIER = {"guidance": "classifier", "guidance_scale": 6.0}
KINDS = [
    *columns(
        "film-mnist",
        {},
        FREE,
        {**FREE, "dtype": "bfloat16"},
        {**FREE, "guidance_interval": (0.3, 0.7), "scheduler": "DDPMScheduler"},
        {"guidance": "adaptive-projected", "guidance_scale": 4.0, "guidance_interval": (0.0, 0.5)},
        {**FREE, "scheduler": "DDIMScheduler", "eta": 0.5},
        {"scheduler": "DPMSolverSDEScheduler"},
    ),
    *columns(
        "dit-gqa-mnist",
        {},
        {**FREE, "scheduler": "EulerAncestralDiscreteScheduler"},
        {**FREE, "scheduler": "HeunDiscreteScheduler", "dtype": "bfloat16"},
    ),
    *columns(
        "adm-mnist",
        {},
        CLASSIFIER,
        {**CLASSIFIER, "scheduler": "DDIMScheduler"},
        {**CLASSIFIER, "scheduler": "DDPMScheduler", "guidance_interval": (0.0, 0.6)},
        {"guidance": "classifier-mean", "guidance_scale": 6.0, "scheduler": "DDPMScheduler"},
        {"guidance": "adaptive-projected", "guidance_scale": 3.0, "dtype": "bfloat16"},
    ),
    *columns("dilated-mnist", {}, {"scheduler": "DDPMScheduler"}, {"scheduler": "UniPCMultistepScheduler"}),
]


def comparisons(kinds: list[Column], **shared: object) -> list[Comparison]:
    return [Comparison(columns=tuple(kinds[i : i + 4]), **shared) for i in range(0, len(kinds), 4)]


def last_states(comparison: Comparison, catalog: Catalog) -> list[ColumnState]:
    *_, states = compare(comparison, catalog)
    assert [state.error for state in states] == [None] * len(states)
    return states


RUN = """
import os
from pathlib import Path

for file in sorted(Path.cwd().glob("*/code.py")):
    os.chdir(file.parent)
    exec(compile(file.read_text(), str(file), "exec"), {})
"""


def of_shipped_models() -> list[Comparison]:
    groups = comparisons(KINDS, class_labels=("three", "8"), num_images=3, seed=7)
    groups.append(replace(groups[0], class_labels=(), columns=groups[0].columns[:1], num_images=1))
    groups.append(Comparison(columns=tuple(columns("dilated-mnist", {})), num_images=2, height=24, width=40))
    return groups


def of_other_pipelines(folder: Path) -> tuple[Catalog, list[Comparison]]:
    """Pipelines of diffusers, as themselves and in ours; autoguidance; texts."""
    pipelines = {
        "ddpm": DDPMPipeline(unet_of_diffusers(), DDPMScheduler()),
        "dit": dit(),
        "auto": class_conditional(guide_model=composable(block_out_channels=(16, 16))),
        "sd": stable_diffusion(),
    }
    for name, pipe in pipelines.items():
        pipe.save_pretrained(folder / name)
    changes = [{}, FREE, {"guidance": "autoguidance", "guidance_scale": 2.0}, FREE]
    text = {"prompt": "a \"cat\"\nin \\ the #1 'hat'", "negative_prompt": "dog"}
    groups = [
        Comparison(columns=tuple(columns(name, change)), class_labels=("1", "2"), num_images=2, **text)
        for name, change in zip(pipelines, changes, strict=True)
    ]
    return Catalog({name: folder / name for name in pipelines}), groups


def test_pasted_code_draws_the_same_pixels(catalog, tmp_path, fresh_python):
    """The code of every column as pasted, all in one fresh process, against what the demo draws."""
    others, groups = of_other_pipelines(tmp_path / "models")
    drawn = {}
    for i, comparison in enumerate([*of_shipped_models(), *groups]):
        models = others if comparison in groups else catalog
        for j, state in enumerate(last_states(comparison, models)):
            place = tmp_path / f"{i:02}{LETTERS[j]}"
            place.mkdir()
            (place / "model_cards").symlink_to(ROOT / "model_cards")
            description = models.describe(comparison.columns[j].model)
            (place / "code.py").write_text(code(comparison, j, description), encoding="utf-8")
            drawn[place] = comparison.columns[j], state.images
    fresh_python(RUN, tmp_path, OMP_NUM_THREADS="2")
    for place, (column, images) in drawn.items():
        files = sorted(place.glob("*.png"))
        assert len(files) == len(images) > 0, column
        for file, image in zip(files, images, strict=True):
            with Image.open(file) as saved:
                assert saved.mode == image.mode and np.array_equal(saved, image), (column, file.name)


def test_code_reads_as_one_would_write_it(catalog):
    comparison = Comparison(columns=(Column(**FREE),), class_labels=("three", "eight"))
    assert code(comparison, 0, catalog.describe("film-mnist")) == (
        """\
import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler

import diffusers_ext  # from here on, diffusers knows its classes

torch.set_num_threads(1)  # on several, sums have other last bits
pipe = DiffusionPipeline.from_pretrained("model_cards/film-mnist")
pipe.scheduler = DPMSolverMultistepScheduler.from_config(
    pipe.scheduler.config, thresholding=True, sample_max_value=1.0
)

# One source of noise per image, so that none depends on the others.
generators = [torch.Generator().manual_seed(seed) for seed in range(0, 4)]
images = pipe(
    # three, eight, three, eight
    class_labels=[3, 8, 3, 8],
    num_inference_steps=20,
    guidance_scale=2.5,
    generator=generators,
).images
for i, image in enumerate(images):
    image.save(f"A-film-mnist-{i}.png")
"""
    )


def test_code_for_a_gpu(catalog):
    lines = code(Comparison(columns=(Column(),)), 0, catalog.describe("film-mnist"), device="cuda").splitlines()
    assert 'pipe.to("cuda")' in lines and not any("set_num_threads" in line for line in lines)


HOSTILE = 'x"""\n__import__("os").system("touch pwned")\n\r\u2028\x00\'#{1/0}'


def test_texts_stay_texts_in_code(catalog):
    """Whatever a model's config or a visitor brings is data: parsed, the code calls nothing else than it should."""
    description = replace(
        catalog.describe("film-mnist"), source=HOSTILE, labels=(HOSTILE, *"123456789"), takes_prompt=True
    )
    prompt = HOSTILE.replace("\x00", "").replace("\r", "").replace("\u2028", "")
    column = Column(model="{1/0}\"'#x", **FREE)
    source = code(Comparison(columns=(column,), class_labels=("0",), prompt=prompt), 0, description)
    tree = ast.parse(source)
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert names <= {
        "torch", "DiffusionPipeline", "DPMSolverMultistepScheduler", "pipe", "generators", "seed", "range", "images",
        "i", "image", "enumerate",
    }  # fmt: skip
    constants = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    assert HOSTILE in constants and prompt in constants
    assert source.isascii() or source.replace("\n", "").isprintable()


def test_archive_holds_images_settings_and_code(catalog, tmp_path):
    comparison = Comparison(
        columns=(*columns("film-mnist", FREE), *columns("dilated-mnist", {})),
        class_labels=("three", "0"),
        num_images=2,
    )
    states = last_states(comparison, catalog)
    descriptions = [catalog.describe(column.model) for column in comparison.columns]
    file = archive(comparison, states, descriptions, tmp_path / "new")
    assert [path.name for path in (tmp_path / "new").iterdir()] == [file.name] and file.suffix == ".zip"
    with zipfile.ZipFile(file) as zipped:
        assert sorted(zipped.namelist()) == [
            "A-film-mnist/0-three.png",
            "A-film-mnist/1-zero.png",
            "A.py",
            "B-dilated-mnist/0-any.png",
            "B-dilated-mnist/1-any.png",
            "B.py",
            "settings.json",
        ]
        record = json.loads(zipped.read("settings.json"))
        for entry, state, i in zip(record["columns"], states, range(2), strict=True):
            assert zipped.read(f"{LETTERS[i]}.py").decode() == code(comparison, i, descriptions[i])
            for name, image in zip(entry["images"], state.images, strict=True):
                with zipped.open(name) as png:
                    assert np.array_equal(Image.open(png), image)
            assert entry["seconds"] == state.seconds and entry["labels"] == state.labels
            assert entry["network_evaluations"] == state.network_evaluations == (6, 3)[i]
    assert from_link(record["link"]) == comparison
    completed = Comparison.from_json(record["settings"])
    assert [column.scheduler for column in completed.columns] == ["DPMSolverMultistepScheduler"] * 2
    assert replace(completed, columns=comparison.columns) == comparison
    assert record["versions"]["diffusers"] == diffusers.__version__
    assert set(record["versions"]) == {"python", "torch", "diffusers", "diffusers_ext", "gradio"}
    assert archive(comparison, states, descriptions, tmp_path / "new") != file  # of somebody else, at the same time


def test_archive_of_failed_columns(catalog, tmp_path):
    comparison = Comparison(columns=(Column(), Column(model="me/none"), Column(eta=1.0)))
    failed = ColumnState(status="failed", error="no such model")
    states = [ColumnState(status="stopped", images=[Image.new("L", (32, 32))], labels=[None]), failed, failed]
    descriptions = [catalog.describe("film-mnist"), None, catalog.describe("film-mnist")]
    with zipfile.ZipFile(archive(comparison, states, descriptions, tmp_path)) as zipped:
        assert sorted(zipped.namelist()) == ["A-film-mnist/0-any.png", "A.py", "settings.json"]
        record = json.loads(zipped.read("settings.json"))
    assert [entry["status"] for entry in record["columns"]] == ["stopped", "failed", "failed"]
    assert record["columns"][1]["error"] == "no such model"


def test_archive_of_hostile_names_stays_inside(tmp_path, catalog):
    image = Image.new("L", (8, 8))
    state = ColumnState(status="done", images=[image, image], labels=["../../etc/passwd", "C:\\x\n" + "y" * 500])
    comparison = Comparison(columns=(Column(model="/etc/cron.d/x"),), num_images=2)
    with zipfile.ZipFile(archive(comparison, [state], [None], tmp_path)) as zipped:
        assert sorted(zipped.namelist()) == [
            "A-etc-cron-d-x/0-etc-passwd.png",
            f"A-etc-cron-d-x/1-C-x-{'y' * 36}.png",
            "settings.json",
        ]


def test_archive_that_fails_leaves_nothing(tmp_path, catalog):
    broken = ColumnState(status="done", images=[Image.new("L", (8, 8))], labels=[None], seconds=object())
    with pytest.raises(TypeError):
        archive(Comparison(columns=(Column(),)), [broken], [catalog.describe("film-mnist")], tmp_path)
    assert list(tmp_path.iterdir()) == []
