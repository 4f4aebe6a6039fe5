"""The house rules that a machine can check: floors, circles, lean import, nothing of one machine in the files."""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import json
import re
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "unicp"

# The packages and modules of src/unicp from the bottom up. A file imports from its own package and from the floors
# below, never from one above or from a neighbour. A new package is added here on purpose.
FLOORS = [
    ["errors", "files", "progress"],
    ["tensors", "specs", "demo"],
    ["policies"],
    ["profiles"],
    ["engine"],
    ["hosts"],
    ["offline"],
    ["bench", "batch"],
    ["cli", "studio", "__main__"],
]
BESIDE = {  # neighbours that may be imported all the same
    "files": {"errors"},
    "demo": {"tensors"},
    "cli": {"studio"},
    "__main__": {"cli"},
}
ONLY = {"demo": {"errors", "tensors"}}  # of all that is below and beside
MAX_CHAIN = 9  # files
# Imports against the floors that have yet to be turned round. One that is mended is taken out of this list.
FLOORS_NOT_YET: list[str] = []
# Circles that have yet to be opened.
CIRCLES_NOT_YET: set[tuple[str, ...]] = set()

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


def _imports(node: ast.AST, package: list[str], kind: str = "loading") -> Iterator[tuple[int, str, str]]:
    """Line, kind and dotted name of everything from unicp that is imported anywhere in a file.

    Kinds are ``"loading"`` for what is imported with the file, ``"calling"`` for what is by a function of it, and
    ``"typing"`` for what only the type checker sees.
    """
    for child in ast.iter_child_nodes(node):
        inside = kind
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) and child in node.body:
            inside = "typing"
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and kind == "loading":
            inside = "calling"
        found: list[str] = []
        if isinstance(child, ast.Import):
            found = [alias.name for alias in child.names]
        elif isinstance(child, ast.ImportFrom):
            base = package[: len(package) + 1 - child.level] if child.level else []
            source = ".".join(base + ([child.module] if child.module else []))
            found = [f"{source}.{alias.name}" for alias in child.names]
        elif isinstance(child, ast.Call) and child.args and isinstance(child.args[0], ast.Constant):
            called = child.func.attr if isinstance(child.func, ast.Attribute) else getattr(child.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(child.args[0].value, str):
                name = child.args[0].value
                dots = len(name) - len(name.lstrip("."))
                found = [".".join([*package[: len(package) + 1 - dots], name[dots:]]) if dots else name]
        yield from ((child.lineno, inside, name) for name in found if name.split(".")[0] == "unicp")
        yield from _imports(child, package, inside)


def _allowed(own: str) -> list[str]:
    """What a package or module may import, itself apart; the lowest first."""
    floor = next(number for number, names in enumerate(FLOORS) if own in names)
    below = [name for names in FLOORS[:floor] for name in names]
    return [name for name in below + sorted(BESIDE.get(own, ())) if name in ONLY.get(own, {name})]


def floor_problems(package: Path) -> list[str]:
    """What is wrong with the floors of a tree like src/unicp, one line each."""
    problems, known = [], {name for names in FLOORS for name in names}
    for entry in sorted(package.iterdir()):
        is_module = entry.suffix == ".py" if entry.is_file() else any(entry.rglob("*.py"))
        if is_module and entry.name != "__init__.py" and entry.stem not in known:
            problems.append(f"{entry.name}: not in FLOORS (tests/test_house.py); add it where its imports allow")
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        own = parts[0]
        if own not in known:
            continue  # unicp/__init__.py has a test of its own; anything else was named above
        allowed = _allowed(own)
        for line, _, name in _imports(ast.parse(path.read_text("utf-8")), ["unicp", *parts[:-1]]):
            target = (name.split(".") + [""])[1]
            if target in (own, *allowed) or name == "unicp.__version__":
                continue
            where = f"{path.relative_to(package)}:{line}: imports {name}"
            if target not in known:
                problems.append(f"{where}; inside the package, import from the module that defines the name")
            else:
                problems.append(f"{where}, but {own} may import only from {allowed}")
    return problems


def test_each_file_imports_only_from_its_own_package_and_floors_below() -> None:
    problems = floor_problems(PACKAGE)
    known = {line: re.sub(r":\d+: imports (\S+?)[,;].*", r" imports \1", line) for line in problems}
    new = [line for line in problems if known[line] not in FLOORS_NOT_YET]
    assert not new, "\n".join(new)
    mended = sorted(set(FLOORS_NOT_YET) - set(known.values()))
    assert not mended, f"mended, so take it out of FLOORS_NOT_YET: {mended}"


@pytest.mark.parametrize(
    ("file", "code", "expected"),
    [
        ("errors.py", "from unicp.profiles import Profile", "errors.py:1: imports unicp.profiles.Profile"),
        ("errors.py", "from unicp import profiles", "errors.py:1: imports unicp.profiles"),
        ("errors.py", "import unicp.engine.clock", "errors.py:1: imports unicp.engine.clock"),
        ("errors.py", "from . import engine", "errors.py:1: imports unicp.engine"),
        ("errors.py", "def f():\n    from unicp import cli", "errors.py:2: imports unicp.cli"),
        ("errors.py", "if TYPE_CHECKING:\n    from unicp import cli", "errors.py:2: imports unicp.cli"),
        ("errors.py", "from .files import video", "errors.py:1: imports unicp.files.video, but errors may import only"),
        ("policies/adacache.py", "from ..hosts import diffusers", "policies/adacache.py:1: imports unicp.hosts"),
        ("policies/__init__.py", "from ..engine.clock import Clock", "policies/__init__.py:1: imports unicp.engine"),
        ("policies/plans/book.py", "from ...profiles import KEY", "policies/plans/book.py:1: imports unicp.profiles"),
        ("policies/edcw.py", "import_module('unicp.engine')", "policies/edcw.py:1: imports unicp.engine"),
        ("policies/edcw.py", "importlib.import_module('..cli', 'unicp.policies')", "edcw.py:1: imports unicp.cli"),
        ("engine/run.py", "from ..hosts.diffusers.hooks import install", "engine/run.py:1: imports unicp.hosts"),
        ("bench/observe.py", "from ..batch import clips", "bench/observe.py:1: imports unicp.batch"),
        ("demo/check.py", "from unicp.files import video", "demo may import only from ['errors', 'tensors']"),
        ("cli/main.py", "import unicp", "cli/main.py:1: imports unicp; inside the package"),
        ("cli/main.py", "from unicp import accelerate", "imports unicp.accelerate; inside the package"),
        ("cli/main.py", "from unicp import *", "imports unicp.*; inside the package"),
        ("helpers.py", "", "helpers.py: not in FLOORS"),
        ("utils/text.py", "", "utils: not in FLOORS"),
    ],
)
def test_floor_check_sees_a_bad_import(tmp_path: Path, file: str, code: str, expected: str) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True, parents=True)
    (tmp_path / file).write_text(code)
    problems = floor_problems(tmp_path)
    assert len(problems) == 1
    assert expected in problems[0]


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("engine/run.py", "import torch\nfrom unicp.policies import Policy\nfrom unicp import errors, __version__"),
        ("files/video.py", "from ..errors import UnicpError\nfrom . import checkpoint"),
        ("policies/edcw.py", "from . import Policy\nfrom .adacache import forced\nfrom ..errors import UnicpError"),
        ("policies/plans/book.py", "from .. import Policy\nfrom .step_plan import StepPlan"),
        ("policies/__init__.py", "from .adacache import forced\nfrom ..errors import UnicpError"),
        ("policies/__init__.py", "import_module(f'{__name__}.{name}')\nimport_module('.edcw', __name__)"),
        ("demo/check.py", "from unicp.demo import scenes\nfrom unicp.tensors.metrics import psnr\nimport unicpish"),
        ("__init__.py", "def __getattr__(name):\n    from unicp.hosts.diffusers.session import Session"),
    ],
)
def test_floor_check_lets_a_good_import_pass(tmp_path: Path, file: str, code: str) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True, parents=True)
    (tmp_path / file).write_text(code)
    assert floor_problems(tmp_path) == []


# --- circles and chains ---------------------------------------------------------------------------------------------

KINDS = [("loading",), ("loading", "calling"), ("loading", "calling", "typing")]
Edges = Mapping[str, Mapping[str, set[str]]]


def imports_between(package: Path) -> Edges:
    """By file what it imports, and the kinds of these imports. The lazy unicp/__init__.py is left out."""
    files: dict[str, str] = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        if parts != ("__init__",):
            files[".".join(["unicp", *(parts[:-1] if parts[-1] == "__init__" else parts)])] = str(
                path.relative_to(package)
            )
    edges: dict[str, dict[str, set[str]]] = {file: {} for file in files.values()}
    for file in files.values():
        inside = ["unicp", *Path(file).parts[:-1]]
        for _, kind, name in _imports(ast.parse((package / file).read_text("utf-8")), inside):
            while name and name not in files:  # a name in a module is that module's
                name = name.rpartition(".")[0]
            if name and files[name] != file:
                edges[file].setdefault(files[name], set()).add(kind)
    return edges


def circles(edges: Edges, kinds: Collection[str]) -> set[tuple[str, ...]]:
    """Files that all import each other, directly or by way of others; each group once, by name."""

    def onward(file: str) -> list[str]:
        return [target for target, found in edges[file].items() if found & set(kinds)]

    reached: dict[str, set[str]] = {}
    for file in edges:
        seen, ahead = set[str](), onward(file)
        while ahead:
            step = ahead.pop()
            if step not in seen:
                seen.add(step)
                ahead += onward(step)
        reached[file] = seen
    return {
        tuple(sorted(other for other in edges if other == file or (other in reached[file] and file in reached[other])))
        for file in edges
        if file in reached[file]
    }


def longest_chain(edges: Edges) -> tuple[str, ...]:
    """The most files of which each imports the next: when it is loaded, in a function, or for the type checker."""
    under_way: set[str] = set()

    @functools.cache
    def below(file: str) -> tuple[str, ...]:
        under_way.add(file)
        ahead = [target for target in edges[file] if target not in under_way]
        longest = max((below(target) for target in ahead), key=len, default=())
        under_way.discard(file)
        return (file, *longest)

    return max(map(below, edges), key=len, default=())


@pytest.mark.parametrize("kinds", KINDS, ids="+".join)
def test_no_file_imports_what_imports_it(kinds: tuple[str, ...]) -> None:
    found = circles(imports_between(PACKAGE), kinds)
    assert found <= CIRCLES_NOT_YET, f"imports go round in circles: {sorted(found - CIRCLES_NOT_YET)}"
    if kinds == KINDS[-1]:
        assert found == CIRCLES_NOT_YET, f"open now, so take it out: {sorted(CIRCLES_NOT_YET - found)}"


def test_the_longest_chain_of_imports_is_short() -> None:
    chain = longest_chain(imports_between(PACKAGE))
    print(f"\nlongest chain of imports, {len(chain)} files: {' > '.join(chain)}")
    assert len(chain) <= MAX_CHAIN


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({"a": "from . import b", "b": "from . import c", "c": ""}, [set(), set(), set()]),
        ({"a": "from . import b", "b": "from .a import x"}, [{("a.py", "b.py")}] * 3),
        ({"a": "from .b import x", "b": "def f():\n    from . import a"}, [set(), *[{("a.py", "b.py")}] * 2]),
        ({"a": "from .b import x", "b": "if TYPE_CHECKING:\n    from . import a"}, [set(), set(), {("a.py", "b.py")}]),
        ({"p/__init__": "from .a import x", "p/a": "from . import y"}, [{("p/__init__.py", "p/a.py")}] * 3),
        ({"a": "from .b import x", "b": "from .c import x", "c": "import unicp.a"}, [{("a.py", "b.py", "c.py")}] * 3),
    ],
)
def test_circle_check_sees_a_circle(tmp_path: Path, files: dict[str, str], found: list[set[tuple[str, ...]]]) -> None:
    for name, code in files.items():
        (tmp_path / f"{name}.py").parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.py").write_text(code)
    assert [circles(imports_between(tmp_path), kinds) for kinds in KINDS] == found


def test_chains_are_counted_in_files(tmp_path: Path) -> None:
    bodies = ["from .b import x", "def f():\n    from . import c", "if TYPE_CHECKING:\n    from . import d", ""]
    for name, code in zip("abcd", bodies, strict=True):
        (tmp_path / f"{name}.py").write_text(code)
    assert longest_chain(imports_between(tmp_path)) == ("a.py", "b.py", "c.py", "d.py")


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


# --- private names of others ----------------------------------------------------------------------------------------

PRIVATE = re.compile(
    r"""torch\._[a-zA-Z] | torch\.utils(\.|[ ]import[ ])_ | diffusers\.[a-z_.]*\._ | _modeling_parallel
      | _diffusers_hook | _hook_order | _fn_refs | _old_forward | _compiled_call_impl | _call_impl | _orig_mod
      | _torchdynamo | (?<!context)_parallel_config\b | _cp_plan | _flattened_mesh | _init_step_index | \b_step_index
      | \b_cache_config\b | \b_is_cached | \b_progress_bar_config | _identifier_key | _count_prepared
      | _dit_modules | _extra_params | _sp_world_size | _cache_dit_enabled""",
    re.VERBOSE,
)


def test_private_names_of_other_packages_stand_in_one_file() -> None:
    """With the reason for each: what a new release breaks is looked for there."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.relative_to(PACKAGE) != Path("tensors/private.py"):
            lines = enumerate(path.read_text("utf-8").splitlines(), 1)
            found += [
                f"{path.relative_to(PACKAGE)}:{number}: {line.strip()}"
                for number, line in lines
                if PRIVATE.search(line)
            ]
    assert not found, "\n".join(found)


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
