"""The package as shipped: one version, a wheel that works outside the clone, types that a checker sees."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import batchtrim

ROOT = Path(__file__).resolve().parents[1]
# What needs no extra and no second process: a wheel that passes it is whole.
FAST = ("test_schedules.py", "test_selection.py", "test_trimmer.py", "test_compat.py", "test_public_surface.py")

pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="not in a checkout")


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def run(*words: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [str(word) for word in words], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_the_version_is_in_one_place() -> None:
    version = batchtrim.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+([ab]\d+|rc\d+|\.dev\d+)?", version)
    assert project()["project"]["dynamic"] == ["version"], "the build reads it"
    assert (ROOT / project()["tool"]["hatch"]["version"]["path"]).samefile(Path(batchtrim.__file__))
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_the_development_tools_are_pinned() -> None:
    pinned = {line.partition("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    for group in project()["dependency-groups"].values():
        for requirement in group:
            if isinstance(requirement, dict):  # another group, which is looked at by itself
                assert requirement["include-group"] in project()["dependency-groups"]
                continue
            name = re.split(r"[\[><=]", requirement)[0]
            assert name.lower() in pinned, f"{name} has no exact version in constraints.txt"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a source distribution and a wheel made from it, by the tools of this environment: no network."""
    pytest.importorskip("build")
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    return folder


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(built: Path) -> None:
    wheel = contents(only(built, "*.whl"))
    package = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src").rglob("*") if path.is_file()}
    package = {name for name in package if "__pycache__" not in name and ".egg-info" not in name}
    info = f"batchtrim-{batchtrim.__version__}.dist-info"
    assert {name for name in wheel if not name.startswith(info)} == package
    for name in ("py.typed", *(f"lab/present/{each}" for each in ("page.css", "page.js", "gallery.css", "gallery.js"))):
        assert f"batchtrim/{name}" in wheel
    assert f"{info}/licenses/LICENSE" in wheel
    assert b"License-Expression: Apache-2.0" in wheel[f"{info}/METADATA"]


@pytest.mark.slow
def test_the_source_distribution_builds_the_same_wheel(built: Path, tmp_path: Path) -> None:
    with tarfile.open(only(built, "*.tar.gz")) as archive:
        archive.extractall(tmp_path, filter="data")
    source = only(tmp_path, "batchtrim-*")
    assert (source / "tests" / "golden" / "mbtrim.csv").exists()
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", tmp_path, source, cwd=tmp_path)
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", tmp_path / "tree", ROOT, cwd=tmp_path)
    assert contents(only(tmp_path, "*.whl")) == contents(only(tmp_path / "tree", "*.whl"))


@pytest.mark.slow
def test_the_wheel_works_in_an_environment_of_its_own(built: Path, tmp_path: Path) -> None:
    """A fresh environment with the wheel; torch and pytest are this one's, by a .pth file that comes after it."""
    venv.create(tmp_path / "venv")
    python = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    wheel = only(built, "*.whl")
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])", cwd=tmp_path).strip())
    here = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (site / "torch-and-pytest.pth").write_text("\n".join(here) + "\n")
    where = run(python, "-c", "import batchtrim; print(batchtrim.__file__)", cwd=tmp_path, PYTHONPATH="")
    assert Path(where.strip()).is_relative_to(site)
    tests = tmp_path / "tests"
    tests.mkdir()
    for name in (*FAST, "conftest.py", "oracles.py", "tiers.py"):
        (tests / name).write_bytes((ROOT / "tests" / name).read_bytes())
    (tests / "golden").symlink_to(ROOT / "tests" / "golden")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slow\n")
    out = run(python, "-m", "pytest", "-q", "-m", "not slow", "tests", cwd=tmp_path, PYTHONPATH=str(tests))
    assert re.search(r"\d+ passed", out)
    entry = python.with_name("batchtrim")
    assert "selective_backprop" in run(entry, "methods", cwd=tmp_path, PYTHONPATH="")


@pytest.mark.slow
def test_types_are_seen_from_outside(tmp_path: Path) -> None:
    """tests/typed_usage.py by pyright: every ``assert_type`` holds, and each line that must be an error is one."""
    checker = Path(sys.executable).with_name("pyright")
    if not checker.exists():
        pytest.skip("pyright is not installed")
    (tmp_path / "pyrightconfig.json").write_text(
        f'{{"typeCheckingMode": "strict", "extraPaths": ["{Path(batchtrim.__file__).parents[1].as_posix()}"],'
        ' "reportUnnecessaryTypeIgnoreComment": "error", "reportMissingTypeStubs": "none"}'
    )
    (tmp_path / "usage.py").write_bytes((ROOT / "tests" / "typed_usage.py").read_bytes())
    run(checker, "--pythonpath", sys.executable, "-p", tmp_path, cwd=tmp_path)
