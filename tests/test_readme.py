"""What the README shows must work as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from lmd_bench.cli import app
from lmd_bench.method import DataSpec
from lmd_bench.registry import load_method
from lmd_bench.suite_files import load_suite
from lmd_bench.testing import check_method

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    """The one code block of a language."""
    (found,) = re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)
    return str(found)


def test_the_method_in_the_readme_keeps_the_contract(tmp_path: Path) -> None:
    path = tmp_path / "inpainter.py"
    path.write_text(block("python"))
    method = load_method("inpainter", {"inpainter": f"{path}:Inpainter"})
    check_method(method, method.Config(), DataSpec(64, 10), overfit_steps=60, overfit_share=0.8, learning_rate=3e-3)


def test_the_suite_in_the_readme_is_valid(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(block("yaml"))
    suite = load_suite(str(path))
    assert suite.name == yaml.safe_load(block("yaml"))["name"]
    assert "um-mae" not in suite.methods
    for row in suite.methods.values():
        if row.listed_only is not None:
            continue
        method = load_method(row.method, {})
        method.check(method.Config.model_validate(row.options), DataSpec(suite.data.image_size))


def test_every_command_the_readme_names_exists() -> None:
    known = {command.name or str(command.callback.__name__) for command in app.registered_commands if command.callback}
    known |= {str(group.name) for group in app.registered_groups}
    named = set(re.findall(r"(?:`|\n)lmd-bench ([a-z]+)", README))
    assert named <= known
    assert {"run", "profile", "report", "coverage"} <= named


def test_every_file_the_readme_links_to_is_there() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    missing = [link for link in links if not link.startswith("http") and not (ROOT / link).exists()]
    assert not missing
