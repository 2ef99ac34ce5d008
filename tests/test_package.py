"""What is built, and from where it can be imported."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import diffusers_ext


TOP_LEVEL = ("CHANGELOG.md", "LICENSE", "MANIFEST.in", "Makefile", "README.md", "constraints.txt", "pyproject.toml")
FOLDERS = ("benchmarks", "diffusers_ext", "pipelines", "tests")


@pytest.fixture(scope="module")
def built(root, tmp_path_factory) -> Path:
    """A folder with the sdist of a copy of the sources, and the wheel that was built from this sdist."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in TOP_LEVEL:
        shutil.copy(root / name, source)
    for name in FOLDERS:
        shutil.copytree(root / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", output, source]
    build = subprocess.run(command, capture_output=True, text=True)
    assert build.returncode == 0, build.stdout + build.stderr
    return output


def files_below(folder: Path, prefix: str) -> set[str]:
    """Python files of `folder`, named as they should be installed below `prefix`."""
    return {f"{prefix}/{path.relative_to(folder).as_posix()}" for path in folder.rglob("*.py")}


def test_wheel_holds_every_module_and_nothing_else(root, built):
    (wheel,) = built.glob("*.whl")
    modules = files_below(root / "diffusers_ext", "diffusers_ext")
    modules |= files_below(root / "pipelines", "diffusers_ext/pipelines")
    data = {path.relative_to(root).as_posix() for path in (root / "diffusers_ext").rglob("*.yaml")}
    metadata = f"diffusers_ext-{diffusers_ext.__version__}.dist-info"

    content = set(zipfile.ZipFile(wheel).namelist())

    package = {name for name in content if not name.startswith(metadata)}
    assert package == modules | data | {"diffusers_ext/py.typed"}
    assert {f"{metadata}/licenses/LICENSE", f"{metadata}/entry_points.txt"} <= content


def test_sdist_holds_sources_and_tests(root, built):
    (sdist,) = built.glob("*.tar.gz")
    top = f"diffusers_ext-{diffusers_ext.__version__}"
    with tarfile.open(sdist) as archive:
        content = set(archive.getnames())
    expected = {f"{top}/{name}" for name in TOP_LEVEL}
    for folder in FOLDERS:
        expected |= files_below(root / folder, f"{top}/{folder}")
    assert expected <= content


# An editable installation, if there is one, must not help.
IMPORTS = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if not finder.__module__.startswith("__editable__")]
import diffusers_ext, diffusers_ext.pipelines
print(diffusers_ext.__file__)
print(diffusers_ext.pipelines.__file__)
"""


def test_wheel_is_complete_without_the_checkout(built, tmp_path, fresh_python):
    (wheel,) = built.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path)
    process = fresh_python(IMPORTS, tmp_path, PYTHONPATH=str(tmp_path))
    installed = tmp_path / "diffusers_ext"
    assert process.stdout.split() == [str(installed / "__init__.py"), str(installed / "pipelines" / "__init__.py")]


def test_checkout_runs_without_installation(root, tmp_path, fresh_python):
    process = fresh_python(IMPORTS, tmp_path, PYTHONPATH=str(root))
    assert process.stdout.split() == [
        str(root / "diffusers_ext" / "__init__.py"),
        str(root / "pipelines" / "__init__.py"),
    ]


def test_wheel_version_is_the_package_version(built):
    assert [path.name.split("-")[1] for path in built.glob("*.whl")] == [diffusers_ext.__version__]
