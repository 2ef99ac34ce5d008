"""The README: its Python runs as printed, and what it names exists."""

import re

import pytest


FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def readme(root) -> str:
    return (root / "README.md").read_text(encoding="utf-8")


def test_python_blocks_run_in_order(root, readme, tmp_path, fresh_python, hub, hub_token):
    model = root / "model_cards"
    if not (model / "adm-mnist" / "model_index.json").is_file():
        pytest.skip("needs the trained model in model_cards/adm-mnist")
    (tmp_path / "model_cards").symlink_to(model)
    blocks = [code for language, code in FENCE.findall(readme) if language == "python"]
    assert blocks
    fresh_python("\n".join(blocks), tmp_path, HF_HUB_OFFLINE="0")
    assert hub.exists("me/my-digits") and "pipeline.py" in hub.files("me/my-digits-alone")


def test_tests_that_are_named_exist(root, readme):
    named = re.findall(r"`(test_\w+)`", readme)
    tests = "".join(path.read_text() for path in (root / "tests").glob("test_*.py"))
    assert named and [name for name in named if f"def {name}(" not in tests and f"class {name}" not in tests] == []


def test_length(readme):
    assert len(readme.splitlines()) < 200


def test_linked_files_and_commands_exist(root, readme):
    links = re.findall(r"\]\(([^)#:]+)\)", readme)
    scripts = re.findall(r"(?:python |`)(benchmarks/\w+\.py)", readme)
    targets = re.findall(r"^make (\S+)", readme, re.MULTILINE)
    assert links and targets
    assert [path for path in links + scripts if not (root / path).exists()] == []
    makefile = (root / "Makefile").read_text()
    assert [target for target in targets if f"\n{target}:" not in makefile] == []
