"""The package: what is in it, and that it is the same service however it is installed and started."""
from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping
from email.parser import BytesHeaderParser
from pathlib import Path

import pytest

import restarts
from helpers import request
from restarts import HANG, ROOT

DATA = {"openapi.json", "page.html"}
LEFT_OUT = (".git", ".tox", ".venv", ".*_cache", ".coverage*", "build", "dist", "*.egg-info", "__pycache__")
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, f'build_{sys.argv[1]}')(sys.argv[2]))"


def run(
    *command: str | Path, cwd: Path = ROOT, environ: Mapping[str, str] = {}
) -> subprocess.CompletedProcess[str]:
    """Runs a program to its end, its output taken as text; its environment has no settings of ours."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SMSPROXY_", "PYTHONPATH"))}
    words, env = [str(word) for word in command], {**inherited, **environ}
    return subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, timeout=10 * HANG, check=False)


def build(kind: str, source: Path, target: Path) -> Path:
    """The wheel or the sdist of a directory, built without the network."""
    done = run(sys.executable, "-W", "ignore", "-c", BUILD, kind, target, cwd=source)
    assert done.returncode == 0, done.stderr
    return target / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project in which other things lie around: a client of the shop, and what builds before left."""
    pytest.importorskip("setuptools", "77")
    directory = tmp_path_factory.mktemp("source") / "project"
    shutil.copytree(ROOT, directory, ignore=shutil.ignore_patterns(*LEFT_OUT))
    (directory / "shop_client.py").write_text("import smsproxy\n")
    (directory / "secret_notes.json").write_text("{}")
    for stale in ("main.py", "smsproxy_service/gone_module.py"):
        (directory / "build" / "lib" / stale).parent.mkdir(parents=True, exist_ok=True)
        (directory / "build" / "lib" / stale).write_text("raise AssertionError('of an older build')\n")
    return directory


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def venv(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the service in it, and a foreign package of the name postgres beside it."""
    there = tmp_path_factory.mktemp("venv")
    assert run(sys.executable, "-m", "venv", "--without-pip", there).returncode == 0
    install(wheel, python=there / "bin" / "python")
    packages = next(there.glob("lib/python*/site-packages"))
    (packages / "postgres").mkdir()
    (packages / "postgres" / "__init__.py").write_text("raise AssertionError('somebody else\\'s package')\n")
    return there


def install(
    wheel: Path, *options: str, python: Path | str = sys.executable, environ: Mapping[str, str] = {}
) -> None:
    """Installs the wheel for a Python, which need not have pip."""
    pip = (sys.executable, "-m", "pip", "--python", str(python), "--quiet", "--disable-pip-version-check")
    done = run(*pip, "install", "--no-deps", "--no-index", "--ignore-installed", *options, wheel, environ=environ)
    assert done.returncode == 0, done.stderr


# What is in it


def test_everything_lies_in_one_directory_and_nothing_that_lies_around_is_there(wheel: Path) -> None:
    modules = {str(path.relative_to(ROOT)) for path in (*ROOT.glob("*.py"), *ROOT.glob("postgres/*.py"))}
    with zipfile.ZipFile(wheel) as archive:
        names = {tuple(name.split("/", 1)) for name in archive.namelist()}
        metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        headers = BytesHeaderParser().parsebytes(archive.read(metadata))
    assert {rest for top, rest in names if top == "smsproxy_service"} == modules | DATA
    assert {top for top, _ in names} == {"smsproxy_service", metadata.split("/")[0]}
    assert [each for each in headers.get_all("Requires-Dist", []) if "extra ==" not in each] == []


def test_the_sdist_holds_what_its_tests_need(source: Path, tmp_path: Path) -> None:
    with tarfile.open(build("sdist", source, tmp_path)) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    listed = run("git", "ls-files").stdout.split() if (ROOT / ".git").exists() else []
    missing = set(listed) - held - {".gitignore"}
    assert (missing, [name for name in held if "shop_client" in name or "secret" in name]) == (set(), [])
    assert {"tests/test_packaging.py", "deploy/package_build.py", "docs/flow.py", "tox.ini"} <= held


# That it serves


def serves(directory: Path, *command: str | Path) -> None:
    """Starts it with a client that imports fastsmsing, sends one message, ends it."""
    environ = ("/usr/bin/env", f"PYTHONPATH={ROOT / 'tests'}")
    with restarts.serving(directory, command=(*environ, *map(str, command))) as service:
        there = Address(service.port)
        for path, name in (("/openapi.json", "openapi.json"), ("/", "page.html")):
            answer = request(there, "GET", path)[1]
            assert answer if isinstance(answer, dict) else answer == (ROOT / name).read_bytes()
        assert request(there, "POST", "/sms", {"PhoneNumber": "48123456789", "Content": "Hi"})[0] == 202
        assert service.stop() == 0


class Address:
    """A port of this machine."""

    def __init__(self, port: int) -> None:
        self.server_address = ("127.0.0.1", port)


STARTED = {
    "the command": ("{venv}/bin/smsproxy",),
    "-m": ("{venv}/bin/python", "-m", "smsproxy_service"),
    "the directory": (sys.executable, "{root}"),
    "main.py": (sys.executable, "{root}/main.py"),
}


@pytest.mark.parametrize("how", STARTED)
def test_it_serves_however_it_is_started(how: str, venv: Path, tmp_path: Path) -> None:
    serves(tmp_path, *(word.format(venv=venv, root=ROOT) for word in STARTED[how]))


@pytest.mark.parametrize("how", ["the command", "-m"])
def test_a_foreign_package_of_the_name_postgres_is_not_mistaken_for_ours(how: str, venv: Path, tmp_path: Path) -> None:
    words = [word.format(venv=venv) for word in STARTED[how]]
    done = run(*words, "--db", "postgresql://shop:hunter2@127.0.0.1:1/sms", "--check", cwd=tmp_path)
    assert (done.returncode, "PostgreSQL needs psycopg 3" in done.stderr, "hunter2" in done.stderr) == (1, True, False)
    assert "AssertionError" not in done.stderr


def test_a_client_in_the_working_directory_may_have_modules_of_any_names_but_ours(venv: Path, tmp_path: Path) -> None:
    (tmp_path / "metrics.py").write_text("from fastsmsing import InMemoryClient\nclass Client(InMemoryClient): pass\n")
    checked = run(venv / "bin" / "smsproxy", "--client", "metrics:Client", "--check", cwd=tmp_path)
    assert (checked.returncode, checked.stdout) == (0, "the settings, the client and the database are good\n")


@pytest.fixture(params=["target", "prefix", "user"])
def installed(request: pytest.FixtureRequest, wheel: Path, tmp_path: Path) -> tuple[Path, str]:
    """Where it is installed in other ways, and where Python has to look for it."""
    if request.param == "user" and sys.prefix != sys.base_prefix:
        pytest.skip("pip refuses --user in a virtual environment")
    there = tmp_path / "there"
    options = ["--user"] if request.param == "user" else [f"--{request.param}", str(there)]
    install(wheel, *options, environ={"PYTHONUSERBASE": str(there)})
    return there, str(next(there.rglob("smsproxy_service")).parent)


@pytest.mark.long
def test_it_serves_wherever_it_is_installed(installed: tuple[Path, str], tmp_path: Path) -> None:
    there, packages = installed
    program = there / "bin" / "smsproxy"
    serves(tmp_path, "/usr/bin/env", f"PYTHONPATH={packages}:{ROOT / 'tests'}", program)
