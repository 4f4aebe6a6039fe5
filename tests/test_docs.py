"""The documentation says what is there: examples, commands, links and the API reference are checked."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import typer

import unicp
from unicp.cli import VERBS, app

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))
READ = [*PAGES, *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"))]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


def blocks(*languages: str) -> list[Any]:
    """The code of these languages in every page, named by page and line."""
    found = []
    for page in READ:
        text = page.read_text("utf-8")
        for match in FENCE.finditer(text):
            if match[2] in languages:
                line = text.count("\n", 0, match.start()) + 1
                found.append(pytest.param(match[3], id=f"{page.relative_to(ROOT)}:{line}"))
    return found


def check_python(code: str) -> list[str]:
    """What of unicp an example names that is not there, or calls in a way that it cannot be called."""
    wrong = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "unicp":
            module = importlib.import_module(node.module or "")
            wrong += [f"{node.module} has no {a.name}" for a in node.names if not hasattr(module, a.name)]
        if isinstance(node, ast.Attribute) and _dotted(node).startswith("unicp.") and _value(node) is None:
            wrong.append(f"there is no {_dotted(node)}")
        if isinstance(node, ast.Call) and _dotted(node.func).startswith("unicp."):
            called = _value(node.func)
            keywords = {word.arg: None for word in node.keywords if word.arg is not None}
            try:
                inspect.signature(called).bind_partial(*[None] * len(node.args), **keywords)
            except TypeError as error:
                wrong.append(f"{_dotted(node.func)}: {error}")
    return wrong


def _dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def _value(node: ast.AST) -> Any:
    value: Any = unicp
    for name in _dotted(node).split(".")[1:]:
        value = getattr(value, name, None)
    return value


def check_command(line: str) -> list[str]:
    """What is wrong with a command that begins with ``unicp``: verbs, options, values. Nothing is run."""
    words = shlex.split(line, comments=True)
    if words[1] not in VERBS:
        return [] if words[1].startswith("-") else [f"there is no verb {words[1]}"]
    command = typer.main.get_command(app).commands[words[1]]  # type: ignore[attr-defined]
    try:
        command.make_context(words[1], words[2:], resilient_parsing=False)
    except Exception as error:  # the parser's own errors; their class is not the same in all versions of typer
        message = getattr(error, "format_message", lambda error=error: str(error))()
        return [] if isinstance(error, click.exceptions.Exit) else [message]
    return []


def commands(code: str) -> list[str]:
    """The lines of a shell block that call unicp, continued lines joined."""
    joined = re.sub(r"\\\n\s*", "", code)
    return [line.strip().partition("-- ")[2] or line.strip() for line in joined.splitlines() if is_command(line)]


def is_command(line: str) -> bool:
    return line.strip().startswith("unicp ") or "-- unicp " in line


@pytest.mark.parametrize("code", blocks("python"))
def test_python_in_the_docs_names_what_is_there(code: str) -> None:
    assert check_python(code) == []


@pytest.mark.parametrize("code", blocks("", "sh", "shell"))
def test_commands_in_the_docs_can_be_given(code: str) -> None:
    assert [wrong for line in commands(code) for wrong in check_command(line)] == []


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("unicp.acelerate(pipe)", "there is no unicp.acelerate"),
        ("from unicp import Budget", "unicp has no Budget"),
        ("unicp.BudgetConfig(speed=2)", "unicp.BudgetConfig: got an unexpected keyword argument 'speed'"),
    ],
)
def test_the_check_of_python_sees_it(code: str, said: str) -> None:
    assert said in check_python(code)


@pytest.mark.parametrize("line", ["unicp genrate x", "unicp generate x --fast", "unicp generate x --steps many"])
def test_the_check_of_commands_sees_it(line: str) -> None:
    assert check_command(line)


def test_every_public_name_is_in_the_reference_and_no_other() -> None:
    text = "\n".join(page.read_text("utf-8") for page in (ROOT / "docs" / "api").glob("*.md"))
    listed = set(re.findall(r"^::: (\S+)", text, re.MULTILINE))
    homes = {f"unicp.{home}.{name}" for name, home in unicp._HOMES.items()}
    assert listed == homes | {"unicp.demo"}


def test_links_within_the_repository_lead_somewhere() -> None:
    """MkDocs checks those between pages; here are those of the README and its like, and every picture."""
    missing = []
    for page in READ:
        text = FENCE.sub("", page.read_text("utf-8"))
        for target in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", text):
            path = (target[0] or target[1]).partition("#")[0]
            if path and "://" not in path and not (page.parent / path).exists():
                missing.append(f"{page.relative_to(ROOT)}: {path}")
    assert not missing, "\n".join(missing)


@pytest.mark.slow
def test_the_first_example_runs_as_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs" / "start.md").read_text("utf-8")
    code = next(match[3] for match in FENCE.finditer(text) if match[2] == "python")
    short = code.replace("num_inference_steps=50", "num_inference_steps=20")
    assert short != code
    namespace: dict[str, Any] = {}
    exec(short, namespace)
    assert namespace["video"].shape == (13, 96, 96, 3)
    assert "budget: 10 of 20 denoising steps computed" in capsys.readouterr().out


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", tmp_path / "site"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "BudgetConfig" in (tmp_path / "site" / "api" / "configs.html").read_text("utf-8")
    assert "--target-speedup" in (tmp_path / "site" / "command-line.html").read_text("utf-8")
    pages = list((tmp_path / "site").rglob("*.html"))
    outside = {
        host
        for page in pages
        for host in re.findall(
            r"<(?:script|link|img)[^>]+(?:src|href)=\"?(https?://[^\"/ >]+)", page.read_text("utf-8")
        )
    }
    assert not outside  # the site loads nothing from elsewhere


def test_the_citation_and_the_package_are_of_one_version() -> None:
    pytest.importorskip("yaml", reason="comes with MkDocs")
    import yaml

    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert cited["version"] == unicp.__version__ and cited["license"] == "Apache-2.0"
    assert json.dumps(cited["references"])
