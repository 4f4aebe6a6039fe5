"""The archives of a release: every file of the package is in them, and the installed wheel works on its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.test_house import ROOT, project_files

BUILD = """
import sys, hatchling.build as backend
print(backend.build_sdist(sys.argv[1]) if sys.argv[2] == "sdist" else backend.build_wheel(sys.argv[1]))
"""


def build(kind: str, source: Path, folder: Path) -> Path:
    """An archive of a source tree, as pip has it built."""
    done = subprocess.run([sys.executable, "-c", BUILD, folder, kind], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("sdist", ROOT, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the unpacked sdist, as from a package index: what is not in that is not in this either."""
    folder = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (source,) = folder.iterdir()
    return build("wheel", source, folder)


def test_the_sdist_has_every_file_of_the_project(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    files = {path.relative_to(ROOT) for path in project_files()}
    files -= {path for path in files if path.parts[0] == "zoo" and len(path.parts) > 2}  # weights: a repository's thing
    missing = {path.as_posix() for path in files} - packed
    assert not missing, f"not in the sdist: {sorted(missing)}; does a line of .gitignore match?"


def test_the_wheel_has_every_file_of_the_package_and_no_other(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    package = ROOT / "src"
    files = {path.relative_to(package).as_posix() for path in project_files() if path.is_relative_to(package)}
    assert packed == files, "these are in one of the two only; does a line of .gitignore match?"


def test_no_file_of_the_project_is_ignored() -> None:
    """One that is, was added by force: git forgets it at the next rename, and hatchling leaves it out at once."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    asked = ["git", "ls-files", "--cached", "--ignored", "--exclude-standard"]
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "", ".gitignore matches files that are tracked"


# --- installed: make test-wheel -------------------------------------------------------------------------------------

Run = Callable[..., str]
STEPS = ("--steps", "6")
PROMPTS = ["a red ball bouncing slowly over a gray background", "a blue square moving left over a white background"]


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Iterator[Run]:
    """Runs a program of an environment that has the wheel and what that asks for, in a folder that has nothing else."""
    with tempfile.TemporaryDirectory() as place:
        environment, folder = Path(place, "environment"), Path(place, "folder")
        venv.create(environment, with_pip=True)
        folder.mkdir()
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
        kept |= {"PYTHONNOUSERSITE": "1", "HF_HUB_OFFLINE": "1"}

        def run(program: str, *arguments: str | Path) -> str:
            done = subprocess.run(
                [environment / "bin" / program, *arguments], cwd=folder, env=kept, capture_output=True, text=True
            )
            assert done.returncode == 0, f"{program} {arguments}\n{done.stdout}\n{done.stderr}"
            return done.stdout

        pip = ("-m", "pip", "--disable-pip-version-check", "--quiet")
        run("python", *pip, "install", "-c", ROOT / "constraints.txt", wheel)
        run("python", *pip, "check")
        found = Path(run("python", "-c", "import unicp; print(unicp.__file__)").strip())
        assert found.is_relative_to(environment), f"not the wheel's: {found}"
        run.folder = folder  # type: ignore[attr-defined]
        yield run


@pytest.mark.wheel
def test_models_of_the_wheel(installed: Run) -> None:
    said = installed("unicp", "models")
    assert "WanTransformer3DModel" in said


@pytest.mark.wheel
def test_generate_and_inspect_of_the_wheel(installed: Run) -> None:
    said = installed("unicp", "generate", PROMPTS[0], "--method", "adacache", *STEPS, "--compare", "-o", "one.mp4")
    assert "PSNR" in said
    record = json.loads((installed.folder / "one.json").read_text())
    assert record["prompt"] == PROMPTS[0] and record["report"]["step_count"] == 6
    assert (installed.folder / "one.mp4").stat().st_size > 1000
    assert "of 6 denoising steps computed" in installed("unicp", "inspect", "one.mp4")


@pytest.mark.wheel
def test_the_profile_of_the_wheel(installed: Run) -> None:
    installed("unicp", "calibrate", PROMPTS[0], *STEPS, "-o", "demo.safetensors")
    assert "WanPipeline with UniPCMultistepScheduler, 6 steps" in installed("unicp", "inspect", "demo.safetensors")
    said = installed("unicp", "generate", PROMPTS[0], "--method", "demo.safetensors", *STEPS, "-o", "profiled.mp4")
    assert "unicp" in said and (installed.folder / "profiled.mp4").exists()


@pytest.mark.wheel
def test_compare_of_the_wheel_writes_its_report(installed: Run) -> None:
    methods = "adacache,first-block-cache=0.1,fewer-steps=3"
    said = installed("unicp", "compare", PROMPTS[0], "--methods", methods, *STEPS, "--report", "page.html")
    assert "fewer-steps steps=3" in said
    page = (installed.folder / "page.html").read_text()
    assert page.count("</script>") == 2 and "data:image/webp" in page and "first-block-cache" in page
    figures = json.loads((installed.folder / "page.json").read_text())
    assert not figures["failures"]
    assert {point["method"] for point in figures["points"]} == {"adacache", "first-block-cache", "fewer-steps"}


@pytest.mark.wheel
def test_batch_of_the_wheel(installed: Run) -> None:
    (installed.folder / "prompts.txt").write_text("\n".join(PROMPTS))
    installed("unicp", "batch", "prompts.txt", "-o", "videos", "--method", "adacache", *STEPS)
    videos = sorted((installed.folder / "videos").glob("*.mp4"))
    assert len(videos) == 2
    assert {json.loads(video.with_suffix(".json").read_text())["prompt"] for video in videos} == set(PROMPTS)


PLUG_INS = """
import sys
from importlib.metadata import entry_points

found = {}
for group in ("sglang.multimodal_gen.plugins", "vllm_omni.general_plugins"):
    (entry,) = [entry for entry in entry_points(group=group) if entry.name == "unicp"]
    assert entry.dist.name == "unicp" and callable(entry.load()), group
    found[group] = entry.value
heavy = {"torch", "diffusers", "numpy"} & set(sys.modules)
assert not heavy, f"finding the plug-ins loads {sorted(heavy)}"
import unicp
from unicp.hosts.guider import FillGuider
print(found["sglang.multimodal_gen.plugins"], found["vllm_omni.general_plugins"], FillGuider.__name__)
"""


@pytest.mark.wheel
def test_servers_find_the_plug_ins_of_the_wheel(installed: Run) -> None:
    """By the loader that they use, in an environment that has none of them."""
    said = installed("python", "-c", PLUG_INS)
    assert said.split() == ["unicp.hosts.sglang:register", "unicp.hosts.vllm_omni:register", "FillGuider"]
