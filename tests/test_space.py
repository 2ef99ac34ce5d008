"""The demo as a Space: what is uploaded, what is refused, and that it runs with nothing else around it."""

import json
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import settings
import tomllib
import yaml
from catalog import Catalog
from comparison import MAX_CELLS
from gradio_client import Client
from hub_repository import check_card
from huggingface_hub import snapshot_download
from packaging.requirements import Requirement

from diffusers import DDIMScheduler

from diffusers_ext import ClassConditionalPipeline, DilatedConvDenoiserModel
from diffusers_ext.cli import main
from diffusers_ext.hub import HubError, PushConflictError, push_space
from diffusers_ext.hub.spaces import PUSHED, build_space


FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def readme(root) -> str:
    return (root / "demo" / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def front_matter(readme) -> dict:
    return yaml.safe_load(readme.split("---")[1])


@pytest.fixture(scope="module")
def clone(root, tmp_path_factory) -> Path:
    """A small clone: the demo, the package, and one of the shipped models."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("demo", "diffusers_ext", "pipelines"):
        shutil.copytree(root / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(root / "model_cards" / "dilated-mnist", folder / "model_cards" / "dilated-mnist")
    shutil.copy(root / "LICENSE", folder)
    return folder


@pytest.fixture
def changed_clone(clone, tmp_path) -> Path:
    """A copy of the clone that a test may change."""
    return Path(shutil.copytree(clone, tmp_path / "changed"))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Folder of a tiny pipeline."""
    unet = DilatedConvDenoiserModel(sample_size=8, in_channels=1, hidden_channels=(8, 8), time_embedding_dim=8)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    ClassConditionalPipeline(unet=unet, scheduler=DDIMScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture
def name(request) -> str:
    """A name for the test's own Space."""
    return f"me/{request.node.name.split('[')[0].removeprefix('test_')[:60]}"


# The files of the demo


def test_front_matter(root, readme, front_matter):
    needed = "title emoji colorFrom colorTo sdk sdk_version python_version app_file license models short_description"
    assert set(needed.split()) <= set(front_matter)
    assert check_card(readme, "space") == ([], [])
    assert len(front_matter["emoji"]) == 1 and len(front_matter["short_description"]) <= 60
    assert (root / "demo" / front_matter["app_file"]).is_file()
    constraints = (root / "constraints.txt").read_text()
    assert f"\ngradio=={front_matter['sdk_version']}\n" in constraints


def test_requirements_are_those_of_the_package_and_the_demo(root):
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    wanted = {str(Requirement(line)) for line in project["dependencies"] + project["optional-dependencies"]["demo"]}
    lines = (root / "demo" / "requirements.txt").read_text().splitlines()
    assert {str(Requirement(line)) for line in lines if not line.startswith("#")} == wanted


def test_readme_names_what_there_is(root, readme):
    linked = [path for path in re.findall(r"\]\(([^)#:]+)\)", readme) if not (root / "demo" / path).exists()]
    assert linked == []
    code = "".join(path.read_text() for path in (root / "demo").glob("*.py"))
    documented = set(re.findall(r"`DIFFUSERS_EXT_DEMO_(\w+)`", readme))
    read = re.findall(r'(?:_number\(["]|_flag\(["]|ENVIRONMENT\}|DIFFUSERS_EXT_DEMO_)([A-Z_]*[A-Z])', code)
    assert documented and documented == set(read)
    defaults = dict(re.findall(r"^\| `DIFFUSERS_EXT_DEMO_(\w+)` \|.*\| (\d+) \|$", readme, re.MULTILINE))
    catalog = Catalog.shipped()
    values = {"CAPACITY": catalog.capacity, "HUB": catalog.allow_hub, "MAX_BYTES": catalog.max_bytes}
    values |= {"MAX_WORK": settings.max_work(), "TRUST_REMOTE_CODE": catalog.trust_remote_code}
    assert {name: int(value) for name, value in defaults.items()} == values
    limits = (
        f"{settings.MAX_COLUMNS} columns, {settings.MAX_IMAGES} images, {settings.MAX_STEPS} steps, "
        f"guidance scales to {settings.MAX_SCALE:g}, prompts of {settings.MAX_PROMPT} characters, "
        f"images of {settings.MAX_SIZE} pixels, {MAX_CELLS} cells"
    )
    assert limits in " ".join(readme.split())


# What a Space holds


def test_space_holds_the_app_the_package_and_the_models(root, tmp_path):
    build_space(tmp_path, root)
    found = {path.relative_to(tmp_path).as_posix(): path for path in tmp_path.rglob("*") if path.is_file()}
    modules = {path.relative_to(root).as_posix(): path for path in (root / "diffusers_ext").rglob("*.py")}
    modules |= {f"diffusers_ext/{path.relative_to(root).as_posix()}": path for path in root.glob("pipelines/*.py")}
    app = {path.relative_to(root / "demo").as_posix(): path for path in (root / "demo").glob("*.*")}
    assert {"app.py", "README.md", "requirements.txt"} <= set(app) and "diffusers_ext/pipelines/__init__.py" in modules
    for name, path in {**modules, **app, "LICENSE": root / "LICENSE"}.items():
        assert found[name].read_bytes() == path.read_bytes(), name
    options = {path.relative_to(root).as_posix() for path in (root / "diffusers_ext").rglob("*.yaml")}
    assert options and options | {"diffusers_ext/py.typed"} <= set(found)
    for folder in (root / "model_cards").iterdir():
        for weights in folder.rglob("*.safetensors"):
            assert found[weights.relative_to(root).as_posix()].read_bytes() == weights.read_bytes()
    assert not [name for name in found if "__pycache__" in name or name.startswith((".", "tests/", "benchmarks/"))]


def test_only_pictures_that_the_readme_shows(changed_clone, tmp_path):
    pictures = changed_clone / "demo" / "screenshots"
    pictures.mkdir(exist_ok=True)
    (pictures / "unseen.png").write_bytes(b"\x89PNG")
    (pictures / "shown.png").write_bytes(b"\x89PNG")
    (changed_clone / "demo" / ".gradio").mkdir()
    (changed_clone / "demo" / ".gradio" / "certificate.pem").write_text("hidden")
    with (changed_clone / "demo" / "README.md").open("a") as file:
        file.write("\n![As seen](screenshots/shown.png)\n")
    build_space(tmp_path / "space", changed_clone)
    assert (tmp_path / "space" / "screenshots" / "shown.png").is_file()
    assert not (tmp_path / "space" / "screenshots" / "unseen.png").exists()
    assert not (tmp_path / "space" / ".gradio").exists()


# Pushing


def test_push_and_push_again(hub, hub_token, name, changed_clone, model):
    """One commit each; what is gone goes, what somebody added stays; nothing is committed where nothing changed."""
    first = push_space(name, [model], clone=changed_clone, private=True)
    space = f"spaces/{name}"
    assert first.commit_url.startswith(f"{hub.endpoint}/{space}/commit/") and hub.repository(space).private
    files = hub.files(space)
    assert files["app.py"] == (changed_clone / "demo" / "app.py").read_bytes()
    assert files[f"model_cards/tiny/{WEIGHTS}"] == (model / WEIGHTS).read_bytes()
    tree = hub.repository(space).commits[first.oid].files
    assert tree[f"model_cards/tiny/{WEIGHTS}"].lfs and not tree["app.py"].lfs
    assert set(json.loads(files[PUSHED])["files"]) == set(files) - {PUSHED, ".gitattributes"}
    assert len(hub.commits(space)) == 2

    assert push_space(name, [model], clone=changed_clone).oid == first.oid
    hub.write(space, {"notes.md": b"mine"})
    (changed_clone / "demo" / "judge.py").rename(changed_clone / "demo" / "critic.py")
    push_space(name, clone=changed_clone, commit_message="Renamed")
    after = set(hub.files(space))
    assert {"notes.md", "critic.py"} <= after and "judge.py" not in after
    assert not [path for path in after if path.startswith("model_cards/tiny/")]
    assert len(hub.commits(space)) == 4


def test_settings_of_the_space_are_left_alone(hub, hub_token, name, clone):
    push_space(name, clone=clone)
    hub.clear_log()
    push_space(name, clone=clone, revision="next")
    asked = {f"{method} {path}" for method, path, _ in hub.log if method not in ("GET", "HEAD")}
    kinds = ("/preupload/", "/commit/", "/branch/", "/validate-yaml", "/info/lfs/", "/upload/")
    assert asked and not [request for request in asked if not any(kind in request for kind in kinds)]
    assert hub.branches(f"spaces/{name}") == ["main", "next"]


def test_what_was_edited_in_the_space_is_not_overwritten(hub, hub_token, name, changed_clone):
    space, page = f"spaces/{name}", changed_clone / "demo" / "README.md"
    push_space(name, clone=changed_clone)
    edited = page.read_text().replace("Side by Side", "of Mine")
    hub.write(space, {"README.md": edited.encode()})
    with pytest.raises(PushConflictError, match="README.md"):
        push_space(name, clone=changed_clone)
    page.write_text(edited)
    (changed_clone / "demo" / "extra.py").write_text("ANSWER = 1\n")
    push_space(name, clone=changed_clone)
    assert hub.files(space)["README.md"].decode() == edited
    hub.write(space, {"later.py": b"ANSWER = 2\n", "model_cards/dilated-mnist/unet/config.json": b"{}"})
    (changed_clone / "demo" / "later.py").write_text("ANSWER = 3\n")
    with pytest.raises(PushConflictError, match="later.py.* and 1 more"):
        push_space(name, clone=changed_clone)


def test_somebody_was_faster(hub, hub_token, name, changed_clone):
    push_space(name, clone=changed_clone)
    (changed_clone / "demo" / "extra.py").write_text("ANSWER = 1\n")
    hub.before(r"POST .*/commit/", lambda: hub.write(f"spaces/{name}", {"notes.md": b"mine"}))
    with pytest.raises(PushConflictError, match="meanwhile"):
        push_space(name, clone=changed_clone)
    assert "extra.py" not in hub.files(f"spaces/{name}")
    hub.cut(r"POST .*/commit/", part="response")
    commits = len(hub.commits(f"spaces/{name}"))
    push_space(name, clone=changed_clone)  # whose answer gets lost, and is not sent twice
    assert len(hub.commits(f"spaces/{name}")) == commits + 1


@pytest.mark.parametrize(
    "files", [{"app.py": b"print('theirs')"}, {PUSHED: b"[]"}, {PUSHED: b'{"files": {"app.py": 1}}'}, {PUSHED: b"{"}]
)
def test_a_space_of_something_else_is_refused(hub, hub_token, clone, files):
    name = "me/theirs"
    if hub.exists(f"spaces/{name}"):
        hub.delete(f"spaces/{name}")
    hub.create(f"spaces/{name}")
    before = hub.write(f"spaces/{name}", files)
    with pytest.raises(ValueError, match="app.py" if "app.py" in files else "cannot be read"):
        push_space(name, clone=clone)
    assert hub.commits(f"spaces/{name}")[0] == before


def test_a_new_space_made_on_the_web_is_filled(hub, hub_token, name, clone):
    hub.create(f"spaces/{name}")
    hub.write(f"spaces/{name}", {"README.md": b"---\nsdk: gradio\n---\n"})
    push_space(name, clone=clone)
    assert "app.py" in hub.files(f"spaces/{name}")


@pytest.mark.parametrize("place", ["demo/notes.md", "diffusers_ext/notes.py", "model_cards/dilated-mnist/README.md"])
def test_tokens_stay_here(hub, hub_token, changed_clone, place):
    with (changed_clone / place).open("a") as file:
        file.write(f'\ntoken = "{hub_token}"\n')
    with pytest.raises(ValueError, match="access token") as caught:
        push_space("me/secrets", clone=changed_clone)
    assert hub_token not in str(caught.value) and not hub.exists("spaces/me/secrets")


def test_models_that_cannot_be_shown(hub, hub_token, clone, model, tmp_path):
    spaced = Path(shutil.copytree(model, tmp_path / "my model"))
    twin = Path(shutil.copytree(model, tmp_path / "dilated-mnist"))
    cases = {"me/hub-id": "no folder", model / "unet": "model_index.json", spaced: "Rename", twin: "shipped"}
    for folder, told in cases.items():
        with pytest.raises(ValueError, match=told):
            push_space("me/refused", [folder], clone=clone)
    with pytest.raises(ValueError, match="demo/"):
        push_space("me/refused", clone=tmp_path)
    with pytest.raises(HubError, match="token"):
        push_space("me/refused", clone=clone, token=False)
    assert not hub.exists("spaces/me/refused")


def test_an_installed_package_alone_says_what_to_do(clone, tmp_path, fresh_python):
    shutil.copytree(clone / "diffusers_ext", tmp_path / "site" / "diffusers_ext")
    shutil.copytree(clone / "pipelines", tmp_path / "site" / "diffusers_ext" / "pipelines")
    code = f"""
import os, sys
sys.meta_path = [f for f in sys.meta_path if not getattr(f, "__module__", "").startswith("__editable__")]
from diffusers_ext.cli import main
for folder in ({str(tmp_path)!r}, {str(clone)!r}):
    os.chdir(folder)
    try:
        main(["push", "--space", "me/x"])
    except SystemExit as stopped:
        print(stopped.code)
"""
    alone, in_clone = fresh_python(code, tmp_path, PYTHONPATH=str(tmp_path / "site"), HF_TOKEN="").stdout.splitlines()
    assert "in a clone of the repository" in alone
    assert "access token" in in_clone  # it goes on


@pytest.mark.parametrize(
    "line, told",
    [
        ("push", "takes a folder and a repository"),
        ("push one two three", "takes a folder and a repository"),
        ("push --space me/x --variant fp16", "`variant`"),
        ("push --space me/x --self_contained", "`self_contained`"),
        ("push --space not/a/name", "no name of a repository"),
    ],
)
def test_errors_of_the_command_are_one_line(line, told, hub_token):
    with pytest.raises(SystemExit) as stopped:
        main(line.split())
    assert told in stopped.value.code and len(stopped.value.code.splitlines()) == 1


# It runs with nothing else around it

# Neither an installation of this package nor what only its extras bring must help.
ALONE = """
import importlib.machinery, runpy, sys
class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        missing = ("datasets", "matplotlib", "sklearn", "scipy", "torchmetrics", "tensorboard", "trackio", "peft")
        return None if name in missing else super().find_spec(name, path, target)
sys.meta_path = [importlib.machinery.BuiltinImporter, importlib.machinery.FrozenImporter, Finder]
sys.path.insert(0, sys.argv[1])
sys.argv = ["app.py", "--server-name", "127.0.0.1", "--server-port", sys.argv[2]]
import diffusers_ext
print("package:", diffusers_ext.__file__, flush=True)
runpy.run_path("app.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def space(root, model, tmp_path_factory, hub_server):
    """Folder, address and output of a Space that was pushed, downloaded, and runs offline in a process of its own."""
    token = hub_server.add_token("me", "write")
    push_space("me/runs", [model], token=token)
    place = tmp_path_factory.mktemp("space")
    folder = Path(snapshot_download("me/runs", repo_type="space", local_dir=place / "here", token=token))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    output = place / "output.txt"
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(place), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with output.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", ALONE, str(folder), str(port)],
            cwd=folder,
            env=environment,
            stdout=file,
            stderr=file,
        )
    try:
        deadline = time.monotonic() + 120
        while True:
            assert process.poll() is None and time.monotonic() < deadline, output.read_text()
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.2)
        yield folder, f"http://127.0.0.1:{port}", output
    finally:
        process.terminate()
        process.wait(timeout=30)


def test_a_downloaded_space_draws(space, hub_server):
    folder, address, output = space
    assert f"package: {folder / 'diffusers_ext' / '__init__.py'}" in output.read_text()
    client = Client(address, verbose=False)
    models = {model["name"]: model for model in client.predict(api_name="/models")}
    assert {"film-mnist", "adm-mnist", "dit-gqa-mnist", "dilated-mnist", "tiny"} <= set(models)
    columns = [{"model": "film-mnist", "num_inference_steps": 2}, {"model": "tiny", "num_inference_steps": 2}]
    result = client.predict({"columns": columns, "num_images": 1}, api_name="/draw")
    assert [column["status"] for column in result["columns"]] == ["done", "done"], result["columns"]
    assert all(column["images"][0].startswith("data:image/png;base64,") for column in result["columns"])


def test_python_of_the_readme_runs(space, readme, tmp_path, fresh_python):
    blocks = [code for language, code in FENCE.findall(readme) if language == "python"]
    code = "\n".join(blocks)
    named = set(re.findall(r'api_name="(/\w+)"', code))
    assert code.count("http://127.0.0.1:7860") == 1
    client = Client(space[1], verbose=False)
    assert named == set(client.view_api(return_format="dict", print_info=False)["named_endpoints"])
    told = fresh_python(code.replace("http://127.0.0.1:7860", space[1]), tmp_path).stdout
    assert re.findall(r"^[AB] \w+", told, re.MULTILINE) == ["A done", "B done"]
    assert {"A-three.png", "B-seven.png", "sweep.png"} <= {path.name for path in tmp_path.iterdir()}
