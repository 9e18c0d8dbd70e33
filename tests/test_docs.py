"""README.md, CONTRIBUTING.md and docs/: every command is run and its output compared; what they name exists.

A page's `sh` blocks are its commands, and the `text` block behind one is what they print. Commands run one by one in a
copy of the project, as a reader would paste them, but on free ports. Servers run on until the next one of their kind.
"""
from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import command_line
import cost_report
import restapi
from cost_report import Policy
from helpers import HANG, until
from http_protocol import Limits
from message_model import LONGEST_LIST, LONGEST_MESSAGE, LONGEST_NUMBER, LONGEST_TIME
from receivers import VERIFY, VERIFY_WITH_LIBRARY
from restapi import CODES, HttpMetrics
from service_metrics import Metric
from smsproxy import Metrics

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
TEXTS = {str(page.relative_to(ROOT)): page.read_text("utf-8") for page in PAGES}
LONGEST_README = 170  # lines
LEFT_OUT = (".git", ".tox", ".venv", ".*_cache", ".coverage*", "build", "dist", "*.egg-info", "__pycache__", "*.pyz")

NETWORK, ITSELF = "it downloads", "it runs the tests, these among them"
NOT_RUN = {
    "python3 -m venv .venv && .venv/bin/pip install tox && .venv/bin/tox -p all": ITSELF,
    "python3 -m venv .venv": "the test has one",
    ".venv/bin/pip install pytest tox": NETWORK,
    ".venv/bin/tox -p all": ITSELF,
    ".venv/bin/tox -e lint": "it is an environment of its own",
    "pip install .": f"{NETWORK}; test_packaging.py builds and installs the package",
    "python tests/bench/bench.py --servers ours,durable,fastapi --rounds 2 --seconds 3": "it takes minutes, and wrk",
    "python tests/bench/bench.py --servers ours,fastapi --rounds 2 --seconds 3 --unpinned --cells post:64,get:16":
        "it takes minutes, and wrk",
}  # fmt: skip

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SAVED = re.compile(r"[Ss]ave (?:it|this)\s+as\s+`([\w.]+)`")
SERVER = re.compile(r"(main\.py|\bsmsproxy|stand_in\.py|receiver\.py)(?!.*(--check|--help|--version|\|\|))")
PORTS = {"stand_in.py": "9090", "receiver.py": "9000"}  # of other servers than the service, on the pages
UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
LOGGED = re.compile(r"\d{4}-\d\d-\d\dT[\d:.+]+ ")  # a line of the service's log, which no page shows
DATE = re.compile(r"\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT")
CODE = re.compile(r"^```\w+\n(.*?)^```$|`([^`\n]+)`", re.MULTILINE | re.DOTALL)


# Commands


def steps(text: str) -> Iterator[tuple[list[str], list[str]]]:
    """The commands of a page, block by block, and the lines that they print."""
    blocks = [(match[1], match[2], match) for match in BLOCK.finditer(text)]
    for number, (kind, body, match) in enumerate(blocks):
        if kind == "sh":
            shown = ""
            if number + 1 < len(blocks) and blocks[number + 1][0] == "text":
                between = text[match.end() : blocks[number + 1][2].start()]
                shown = blocks[number + 1][1] if not between.strip() else ""
            yield body.replace("\\\n", " ").splitlines(), shown.splitlines()


class Reader:
    """Somebody who pastes the commands of a page into terminals of their own."""

    def __init__(self, directory: Path, text: str) -> None:
        self.directory = directory / "project"
        shutil.copytree(ROOT, self.directory, ignore=shutil.ignore_patterns(*LEFT_OUT))
        self.ports = {shown: str(free_port()) for shown in ("8080", *PORTS.values())}
        self.ids: dict[str, str] = {}  # what the page shows, and what it is here
        self._servers: dict[str, subprocess.Popen[bytes]] = {}  # by port
        programs = [block[2] for block in BLOCK.finditer(text) if block[1] == "python"]
        for name, body in zip(SAVED.findall(text), programs, strict=False):  # the last ones need what is not installed
            (self.directory / name).write_text(self._here(body))
        self._programs(directory / "bin")
        (directory / ".curlrc").write_text("silent\nshow-error\n")  # as in a terminal, which it is not
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("SMSPROXY_")}
        path = os.pathsep.join((str(directory / "bin"), inherited.get("PATH", "")))
        self._environ = {**inherited, "PATH": path, "SMSPROXY_PORT": self.ports["8080"], "HOME": str(directory),
                         "PYTHONUNBUFFERED": "1"}  # fmt: skip

    def _programs(self, there: Path) -> None:
        """What is on the path of whoever installed it, and in the virtual environment of whoever works on it."""
        venv = self.directory / ".venv" / "bin"
        for program, starts in (
            (there / "python", ""), (there / "python3", ""), (there / "smsproxy", str(self.directory)),
            (venv / "pytest", "-m pytest -p no:cacheprovider"),
        ):  # fmt: skip
            program.parent.mkdir(parents=True, exist_ok=True)
            program.write_text(f'#!/bin/sh\nexec "{sys.executable}" {starts} "$@"\n')
            program.chmod(0o755)

    def _here(self, text: str) -> str:
        """What a page shows, with the ports and the IDs that there are here."""
        for shown, port in self.ports.items():
            text = re.sub(rf"(?<=[: ]){shown}\b", port, text)
        return UUID.sub(lambda found: self.ids.get(found[0], found[0]), text)

    def follow(self, commands: list[str], shown: list[str]) -> None:
        """Runs them; they have to print what the page shows, or else to exit with 0."""
        printed: list[str] = []
        for number, command in enumerate(commands, 1):
            if command in NOT_RUN:
                continue
            if SERVER.search(command) and not command.startswith("curl"):
                self._serve(command)
                continue
            patient = command.startswith(("curl", "cat")) and "-X" not in command  # what it asks for may take a moment
            deadline = time.monotonic() + (HANG if patient else 0.0)
            got = self._run(command)
            while shown and not self._fits(printed + got, shown, whole=number == len(commands)):
                assert time.monotonic() < deadline, "\n".join((command, "PRINTS", *got, "SHOWN", *shown))
                got = self._run(command)
            printed += got

    def _fits(self, printed: list[str], shown: list[str], *, whole: bool) -> bool:
        """Whether the page shows these lines first, or nothing else; notes which IDs stand for which."""
        found: dict[str, str] = {}
        for line, expected in zip(printed, shown, strict=False):
            names = UUID.findall(expected)
            pattern = re.escape(self._here(expected))
            for name in names:
                if name not in self.ids:
                    pattern = pattern.replace(re.escape(name), f"({found.get(name) or UUID.pattern})", 1)
            pattern = DATE.sub(DATE.pattern.replace("\\", "\\\\"), pattern.replace("\\ ", " "))
            match = re.fullmatch(pattern, line)
            if match is None:
                return False
            found.update(zip([name for name in names if name not in self.ids], match.groups(), strict=True))
        self.ids.update(found)
        return len(printed) == len(shown) if whole else len(printed) <= len(shown)

    def _run(self, command: str) -> list[str]:
        done = subprocess.run(
            ["bash", "-c", self._here(command)], cwd=self.directory, env=self._environ, text=True, timeout=4 * HANG,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip
        assert done.returncode == 0, (command, done.stdout)
        return [line for line in done.stdout.replace("\r", "").splitlines() if not LOGGED.match(line)]

    def _serve(self, command: str) -> None:
        port = self.ports[next((port for name, port in PORTS.items() if name in command), "8080")]
        self._end(port)
        log = open(self.directory.parent / f"{port}.log", "ab")  # noqa: SIM115  the process writes to it
        with log:
            self._servers[port] = process = subprocess.Popen(
                ["bash", "-c", f"exec env {self._here(command)}"], cwd=self.directory, env=self._environ, stdout=log,
                stderr=log, start_new_session=True,
            )  # fmt: skip
        until(lambda: process.poll() is not None or connects(port))
        assert process.poll() is None, (command, Path(log.name).read_text())

    def _end(self, port: str) -> None:
        process = self._servers.pop(port, None)
        if process is not None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(HANG)
            finally:
                process.kill()

    def leave(self) -> None:
        """Ends the servers."""
        for port in list(self._servers):
            self._end(port)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def connects(port: str) -> bool:
    """Whether somebody listens there."""
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", int(port))) == 0


@pytest.mark.parametrize("page", [page for page in TEXTS if "```sh" in TEXTS[page]])
def test_every_command_prints_what_the_page_shows(page: str, tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    reader = Reader(tmp_path, TEXTS[page])
    try:
        for commands, shown in steps(TEXTS[page]):
            reader.follow(commands, shown)
    finally:
        reader.leave()


def test_each_command_that_is_not_run_is_on_a_page() -> None:
    commands = {command for text in TEXTS.values() for some, _ in steps(text) for command in some}
    assert NOT_RUN.keys() - commands == set()


def test_the_webhooks_receivers_are_the_ones_that_are_tested() -> None:
    assert [each for each in (VERIFY, VERIFY_WITH_LIBRARY) if each not in TEXTS["docs/interface.md"]] == []


@pytest.mark.parametrize("page", TEXTS)
def test_every_python_block_compiles(page: str) -> None:
    for match in BLOCK.finditer(TEXTS[page]):
        if match[1] == "python":
            compile(match[2], page, "exec")


# Names


def code(text: str) -> str:
    """What a page has as code, in blocks and in sentences."""
    return "\n".join(block or span for block, span in CODE.findall(text))


def anchors(text: str) -> set[str]:
    """What links may point to within a page: its headings, as GitHub makes anchors of them."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", TEXTS)
def test_every_link_leads_somewhere(page: str) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", TEXTS[page])):
        path, _, anchor = link.partition("#")
        if link.startswith("https://"):
            continue
        target = (ROOT / page).parent / path if path else ROOT / page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text("utf-8"))):
            broken.append(link)
    assert broken == []


OURS = {f"--{name}" for flags in command_line.FLAGS.values() for name, *_ in flags} | {"--check"}
FOREIGN = {"--parallel"}


def flags_of_scripts() -> set[str]:
    """The flags of the programs in tests/ that pages mention."""
    scripts = [*ROOT.glob("tests/*_report.py"), ROOT / "tests/bench/bench.py"]
    return {flag for script in scripts for flag in re.findall(r'"(--[a-z-]+)"', script.read_text("utf-8"))}


@pytest.mark.parametrize("page", TEXTS)
def test_every_flag_exists(page: str) -> None:
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", TEXTS[page])) - OURS - flags_of_scripts() - FOREIGN == set()


MISSPELT = {"SMSPROXY_MAX_DELYA"}  # on purpose


@pytest.mark.parametrize("page", TEXTS)
def test_every_variable_exists(page: str) -> None:
    assert set(re.findall(r"SMSPROXY_[A-Z_]+", TEXTS[page])) - command_line.VARIABLES - MISSPELT == set()
    client = (ROOT / "tests/example_provider/client.py").read_text("utf-8")
    known = {"FASTSMSING_URL", "FASTSMSING_TOKEN"} & set(re.findall("FASTSMSING_[A-Z]+", client))
    known |= {f"FASTSMSING_{name.upper()}" for name in re.findall(r'"([a-z]+_(?:timeout|interval))"', client)}
    assert set(re.findall(r"FASTSMSING_[A-Z_]+", TEXTS[page])) - known == set()


def metrics() -> set[str]:
    """The names of all metrics, those of a histogram's lines, too."""
    sets = (Metrics(), HttpMetrics(""))
    names = {each.name for some in sets for each in vars(some).values() if isinstance(each, Metric)}
    # The front counts these itself.
    names |= set(re.findall(r"# HELP (\w+)", (ROOT / "restapi.py").read_text("utf-8")))
    return names | {name + suffix for name in names for suffix in ("_bucket", "_sum", "_count")}


@pytest.mark.parametrize("page", TEXTS)
def test_every_metric_and_every_alert_exists(page: str) -> None:
    assert set(re.findall(r"\bsmsproxy_[a-z_]+", TEXTS[page])) - metrics() - {"smsproxy_service"} == set()
    alerts = re.findall(r"alert: (\w+)", (ROOT / "deploy/alerts.yaml").read_text("utf-8"))
    assert set(re.findall(r"\bSmsproxy[A-Z]\w+", TEXTS[page])) - set(alerts) == set()


# Files that a reader makes.
EXAMPLES = {"shop.py", "sms.db", "copy.db", "smsproxy.pyz", "receiver.py", "verify.py", "pushed.py"}
FILE = re.compile(r"[\w./-]*\w\.(?:py|md|ini|toml|yaml|json|html|svg|png|conf|service|socket|db|pyz)\b")


@pytest.mark.parametrize("page", TEXTS)
def test_every_file_exists(page: str) -> None:
    folders = [ROOT, (ROOT / page).parent]
    named = {name.removeprefix("/") for name in FILE.findall(code(TEXTS[page]))} - EXAMPLES
    assert [name for name in sorted(named) if not any((folder / name).exists() for folder in folders)] == []


# What has to be complete, and right


def table(text: str, head: str) -> list[list[str]]:
    """The rows of the table whose first column is called so."""
    rows = re.findall(rf"^\| {head} \|.*\n\|[-:| ]+\|\n((?:\|.*\n)+)", text, re.MULTILINE)
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for each in rows for row in each.splitlines()]


def test_the_costs_of_one_linger_for_all_are_those_that_the_report_prints() -> None:
    traces, every = cost_report.traces(20_000, 1), table(TEXTS["docs/cost.md"], "arrivals")
    shown, printed = [*every[::4], *every[-2:]], []  # each takes a while; the failures at the end change most easily
    for name, batch_size, linger, *_ in shown:
        policy = Policy(int(batch_size), float(linger.removesuffix(" s")))
        (row,) = cost_report.rows({name: traces[name]}, [policy])
        cells = [cell.strip() for cell in str(row).split("|")]
        printed.append([*cells[1:4], *cells[5:-1]])  # without the provider's time, which is the same everywhere
    assert printed == shown != []


def defaults(page: str) -> Mapping[str, str]:
    """Each flag in the table of a page, and its default."""
    found: dict[str, str] = {}
    for flags, default, _ in table(TEXTS[page], "flag"):
        names = flags.replace("`", "").split(", ")
        found.update(zip(names, default.split(", ") if len(names) > 1 else [default], strict=True))
    return found


def test_the_pages_tell_every_setting_and_its_default() -> None:
    actual = {f"--{name}": default or "" for flags in command_line.FLAGS.values() for name, _, default, _ in flags}
    assert defaults("docs/operating.md") == actual
    assert defaults("README.md").items() <= actual.items()


def test_the_interface_tells_every_status_code() -> None:
    codes = {int(code) for row in table(TEXTS["docs/interface.md"], "status") for code in re.findall(r"\d{3}", row[0])}
    assert codes == {code for code in CODES if code >= 400}


def test_the_interface_tells_the_limits() -> None:
    limits, text = Limits(), TEXTS["docs/interface.md"]
    told = [f"{size // 1024} KiB" for size in (limits.head, limits.target, restapi.BODY, limits.small_body)]
    told += [f"{size // 2**20} MiB" for size in (restapi.LARGE_BODY, limits.large_bodies)]
    told += [f"{limits.headers} headers", f"{limits.read_timeout:.0f} s in all", f"| {limits.idle_timeout:.0f} s |"]
    told += [f"{LONGEST_NUMBER} digits", f"{LONGEST_MESSAGE:,} characters", f"{LONGEST_TIME:,.0f} s",
             f"{LONGEST_LIST:,} messages"]  # fmt: skip
    assert [each for each in told if each not in text] == []


def test_the_tour_of_the_house_enters_every_room() -> None:
    rooms = {path.stem for path in ROOT.glob("*.py")}
    assert {room for room in rooms if f"`{room}`" not in TEXTS["docs/design.md"]} == set()


def test_the_readme_is_short() -> None:
    assert len(TEXTS["README.md"].splitlines()) <= LONGEST_README
