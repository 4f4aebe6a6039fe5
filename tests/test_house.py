"""The house rules that a machine can check: floors, file length, lean import, nothing of one machine in the files."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "unicp"

# The modules of src/unicp from the bottom up. A file imports from its own floor and from earlier ones, never from a
# later one. A new module is added here on purpose, at the place where its imports allow it to stand.
FLOORS = [
    "errors",
    "metrics",
    "video",
    "checkpoint",
    "specs",
    "fill",
    "step_plans",
    "planning",
    "efforts",
    "slicing",
    "maps",
    "policies",
    "pricing",
    "report",
    "profiles",
    "engine",
    "session",
    "calibration",
    "kinds",
    "inspection",
    "tuner",
    "tuning",
    "demo",
    "bench",
    "batch",
    "cli",
    "__main__",
]
ONLY = {"demo": {"errors", "metrics"}}  # floors that may import less than everything before them
MAX_LINES = 400

PUBLIC = [
    "accelerate",
    "restore",
    "Session",
    "SessionReport",
    "AdaCacheConfig",
    "ScheduleConfig",
    "ModelSpec",
    "register_spec",
    "UnicpError",
    "demo",
    "__version__",
]


# --- floors ---------------------------------------------------------------------------------------------------------


def _names_of_ours(tree: ast.AST, package: list[str]) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything from unicp that is imported anywhere in a file, functions included."""
    for node in ast.walk(tree):
        found: list[str] = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            source = ".".join(base + ([node.module] if node.module else []))
            found = [f"unicp.{alias.name}" for alias in node.names] if source == "unicp" else [source]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                name = node.args[0].value
                dots = len(name) - len(name.lstrip("."))
                found = [".".join([*package[: len(package) + 1 - dots], name[dots:]]) if dots else name]
        yield from ((node.lineno, name) for name in found if name.split(".")[0] == "unicp")


def floor_problems(package: Path) -> list[str]:
    """What is wrong with the floors of a tree like src/unicp, one line each."""
    problems = []
    for entry in sorted(package.iterdir()):
        is_module = entry.suffix == ".py" if entry.is_file() else any(entry.rglob("*.py"))
        if is_module and entry.name != "__init__.py" and entry.stem not in FLOORS:
            problems.append(f"{entry.name}: not in FLOORS (tests/test_house.py); add it where its imports allow")
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        own = parts[0]
        if own not in FLOORS:
            continue  # unicp/__init__.py has a test of its own; anything else was named above
        allowed = ONLY.get(own, set(FLOORS[: FLOORS.index(own)])) | {own}
        for line, name in _names_of_ours(ast.parse(path.read_text("utf-8")), ["unicp", *parts[:-1]]):
            target = (name.split(".") + [""])[1]
            if target in allowed or name == "unicp.__version__":
                continue
            where = f"{path.relative_to(package)}:{line}: imports {name}"
            if target not in FLOORS:
                problems.append(f"{where}; inside the package, import from the module that defines the name")
            else:
                problems.append(f"{where}, but {own} may import only from {sorted(allowed, key=FLOORS.index)}")
    return problems


def test_each_file_imports_only_from_its_own_floor_and_earlier_ones() -> None:
    problems = floor_problems(PACKAGE)
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    ("file", "code", "expected"),
    [
        ("errors.py", "from unicp.session import Session", "errors.py:1: imports unicp.session"),
        ("errors.py", "from unicp import session", "errors.py:1: imports unicp.session"),
        ("errors.py", "import unicp.engine.clock", "errors.py:1: imports unicp.engine.clock"),
        ("errors.py", "from . import engine", "errors.py:1: imports unicp.engine"),
        ("errors.py", "def f():\n    from unicp import cli", "errors.py:2: imports unicp.cli"),
        ("policies/adacache.py", "from ..engine import hooks", "policies/adacache.py:1: imports unicp.engine"),
        ("policies/__init__.py", "from ..engine.clock import Clock", "policies/__init__.py:1: imports unicp.engine"),
        ("policies/edcw.py", "import_module('unicp.engine')", "policies/edcw.py:1: imports unicp.engine"),
        ("policies/edcw.py", "importlib.import_module('..cli', 'unicp.policies')", "edcw.py:1: imports unicp.cli"),
        ("demo/check.py", "from unicp.engine import clock", "demo may import only from ['errors', 'metrics', 'demo']"),
        ("cli/main.py", "import unicp", "cli/main.py:1: imports unicp; inside the package"),
        ("cli/main.py", "from unicp import accelerate", "imports unicp.accelerate; inside the package"),
        ("cli/main.py", "from unicp import *", "imports unicp.*; inside the package"),
        ("helpers.py", "", "helpers.py: not in FLOORS"),
        ("utils/text.py", "", "utils: not in FLOORS"),
    ],
)
def test_floor_check_sees_a_bad_import(tmp_path: Path, file: str, code: str, expected: str) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(code)
    problems = floor_problems(tmp_path)
    assert len(problems) == 1
    assert expected in problems[0]


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("session.py", "import torch\nfrom unicp.engine import hooks\nfrom unicp import errors, __version__"),
        ("policies/edcw.py", "from . import Policy\nfrom .adacache import forced\nfrom ..errors import UnicpError"),
        ("policies/__init__.py", "from .adacache import forced\nfrom ..errors import UnicpError"),
        ("policies/__init__.py", "import_module(f'{__name__}.{name}')\nimport_module('.edcw', __name__)"),
        ("demo/check.py", "from unicp.demo import scenes\nfrom unicp.metrics import psnr\nimport unicpish"),
        ("__init__.py", "def __getattr__(name):\n    from unicp.session import Session"),
    ],
)
def test_floor_check_lets_a_good_import_pass(tmp_path: Path, file: str, code: str) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(code)
    assert floor_problems(tmp_path) == []


# --- length ---------------------------------------------------------------------------------------------------------


def test_no_file_is_too_long() -> None:
    long = []
    for path in project_files():
        if path.suffix == ".py":
            lines = len(path.read_text("utf-8").splitlines())
            if lines > MAX_LINES:
                long.append(f"{path.relative_to(ROOT)} has {lines} lines")
    assert not long, "aim at 300 lines a file; split these by what they are about: " + ", ".join(long)


# --- lean import ----------------------------------------------------------------------------------------------------

PROBE = """
import json, os, sys
modules, environment = set(sys.modules), dict(os.environ)
import unicp
new = {name.split(".")[0] for name in set(sys.modules) - modules} - set(sys.stdlib_module_names) - {"unicp"}
changed = sorted(k for k in {*environment, *os.environ} if environment.get(k) != os.environ.get(k))
print(json.dumps({
    "file": unicp.__file__, "imported": sorted(new), "environment": changed,
    "dir": dir(unicp), "all": list(getattr(unicp, "__all__", [])),
}))
"""


@pytest.fixture(scope="module")
def fresh_import() -> dict:
    """What `import unicp` did in an interpreter of its own."""
    done = subprocess.run([sys.executable, "-c", PROBE], cwd=ROOT / "src", capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert Path(seen["file"]) == PACKAGE / "__init__.py"
    return seen


def test_lean_import_loads_nothing_but_the_standard_library(fresh_import: dict) -> None:
    assert fresh_import["imported"] == [], "`import unicp` must load only names; import these where they are used"


def test_lean_import_leaves_the_environment_alone(fresh_import: dict) -> None:
    assert fresh_import["environment"] == []


@pytest.mark.parametrize("where", ["dir", "all"])
def test_public_names_are_listed(fresh_import: dict, where: str) -> None:
    missing = [name for name in PUBLIC if name not in fresh_import[where]]
    assert not missing, f"not in {'dir(unicp)' if where == 'dir' else 'unicp.__all__'}: {missing}"


def test_every_listed_name_is_there() -> None:
    import unicp

    missing = [name for name in {*PUBLIC, *getattr(unicp, "__all__", [])} if not hasattr(unicp, name)]
    assert not missing, f"unicp has no {sorted(missing)}"
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = unicp.no_such_name


def test_the_version_is_the_installed_one() -> None:
    import unicp

    assert unicp.__version__ == importlib.metadata.version("unicp")


def _eager_imports(body: list[ast.stmt]) -> Iterator[str]:
    """Modules imported when a file is loaded: not in functions, not under TYPE_CHECKING."""
    for node in body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from _eager_imports(node.orelse)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _eager_imports([child for child in ast.walk(node) if child is not node and is_import(child)])


def is_import(node: ast.AST) -> bool:
    return isinstance(node, ast.Import | ast.ImportFrom)


def test_the_package_root_imports_the_rest_lazily() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text("utf-8"))
    eager = {name for name in _eager_imports(tree.body) if name.split(".")[0] not in sys.stdlib_module_names}
    assert eager <= {"unicp.errors", ".errors"}, f"unicp/__init__.py loads {sorted(eager)}; use __getattr__"


# --- nothing of one machine -----------------------------------------------------------------------------------------

# Written so that this file does not match itself.
FOREIGN = re.compile(
    r"""(?<![\w.-])/(?:wor[k]/|opt/pyp[i]|opt/wheel[s]|root/[.]pyen[v])
      | \b(?:pyp[i]\.org|pyp[i]\.python\.org|pythonhoste[d]\.org|download\.pytorc[h]\.org|registr[y]\.npmjs)""",
    re.VERBOSE,
)
SKIPPED = {".git", ".venv", "build", "dist", "demo-out", "runs", "__pycache__"}


def project_files() -> list[Path]:
    """Every file that is tracked or would be; in an unpacked archive, without git, every file of the tree."""
    asked = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--full-name"]
    try:
        top = subprocess.run(["git", "rev-parse", "--show-toplevel"], cwd=ROOT, capture_output=True, text=True)
        if top.returncode == 0 and Path(top.stdout.strip()).resolve() == ROOT:
            listed = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True).stdout
            return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]
    except FileNotFoundError:
        pass  # no git here
    return [path for path in walk(ROOT) if path.is_file()]


def walk(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        cache = path.name.startswith(".") and path.name.endswith("_cache")
        if path.name not in SKIPPED and not cache and not path.is_symlink():
            yield from walk(path) if path.is_dir() else [path]


def foreign_lines(path: Path) -> list[str]:
    data = path.read_bytes()
    if b"\0" in data:
        return []  # not text
    lines = data.decode("utf-8", "replace").splitlines()
    return [
        f"{path.name}:{number}: {line.strip()[:120]}" for number, line in enumerate(lines, 1) if FOREIGN.search(line)
    ]


def test_no_file_names_a_path_or_host_of_one_machine() -> None:
    files = project_files()
    assert Path(__file__).resolve() in files
    found = [line for path in files for line in foreign_lines(path)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("parts", [("see /wor", "k/main"), ("file:///opt/pyp", "i/simple"), ("https://pyp", "i.org/x")])
def test_foreign_check_sees_a_path_or_host(tmp_path: Path, parts: tuple[str, str]) -> None:
    bad = tmp_path / "notes.txt"
    bad.write_text("fine\n" + "".join(parts))
    assert foreign_lines(bad) == [f"notes.txt:2: {''.join(parts)}"]
    bad.write_text("frame/work/flow, homework/x, a network/\n")
    assert foreign_lines(bad) == []


def test_files_are_found_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    files = project_files()
    assert Path(__file__).resolve() in files
    assert not [path for path in files if ".venv" in path.parts]


def test_every_test_that_the_docs_name_is_there() -> None:
    text = (ROOT / "docs" / "robustness.md").read_text("utf-8")
    file = ""
    for found_file, name in re.findall(r"`(test_\w+\.py)?(?:::)?(test_\w+)?`", text):
        file = found_file or file
        source = (ROOT / "tests" / file).read_text("utf-8")
        assert not name or f"def {name}(" in source, f"{file}::{name}"
