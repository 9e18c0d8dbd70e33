"""The command: settings, what it says at the start, and how it ends, in this process and as one of its own."""
from __future__ import annotations

import contextlib
import functools
import http.client
import json
import logging
import os
import queue
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import cli_providers
import main
from fastsmsing import InMemoryClient
from helpers import HANG, Recorder
from http_front import Limits
from smsproxy import MessageStatus, SmsProxyConfig
from sqlite_repository import SqliteRepository

GOOD = {"PhoneNumber": "48123456789", "Content": "Your parcel is here"}
HERE = Path(__file__).parent
COMMAND = str(Path(main.__file__).resolve())


@pytest.fixture(autouse=True)
def undo(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What the command changes of its process, put back: the environment it sees, the path, the logs, the signals."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in [name for name in os.environ if name.startswith("SMSPROXY_")]:
        monkeypatch.delenv(name)
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    root.handlers.clear()  # the command closes what it finds here
    yield
    root.setLevel(level)
    root.handlers[:] = handlers
    for number, handler in kept.items():
        signal.signal(number, handler)


# Settings


# Flag → a good value, what it means, bad values.
FLAGS: dict[str, tuple[str, object, tuple[str, ...]]] = {
    "host": ("0.0.0.0", "0.0.0.0", ("",)),
    "port": ("9090", 9090, ("", "x", "-1", "65536", "80.5", "nan", "9" * 400, "0x50")),
    "max-connections": ("7", 7, ("", "0", "-1", "1.5", "many", "9" * 400)),
    "api-keys-file": ("{keys}", "{keys}", ("", "/nowhere/keys", "/")),
    "batch-size": ("7", 7, ("", "x", "1.5", "inf", "9" * 5000)),
    "max-batch-size": ("70", 70, ("", "0", "x", "9", "none")),
    "max-delay": ("2.5", 2.5, ("", "x", "-1", "nan", "inf", "-0.1")),
    "senders": ("7", 7, ("", "0", "x", "1.5", "9" * 400)),
    "max-pending": ("70", 70, ("", "0", "9", "x", "9" * 400)),
    "client": ("cli_providers:Late", "cli_providers:Late", ("", "x", "nowhere:x", "fastsmsing:Nothing")),
    "max-attempts": ("7", 7, ("", "x", "1.5", "9" * 400)),
    "max-age": ("60", 60.0, ("", "x", "-1", "nan", "inf")),
    "db": ("some.db", "some.db", ("",)),
    "retention": ("60", 60.0, ("", "x", "-1", "nan", "inf", "none")),
    "drain-timeout": ("2.5", 2.5, ("", "x", "-1", "nan", "inf", "none", "1e10")),
    "log-level": ("debug", "debug", ("", "loud", "10")),
    "log-format": ("json", "json", ("", "xml")),
}
BAD = [(name, value) for name, (_, _, values) in FLAGS.items() for value in values]
DEFAULTS: dict[str, object] = {
    "host": "127.0.0.1", "port": 8080, "max-connections": 1000, "api-keys-file": None, "batch-size": 10,
    "max-batch-size": 100, "max-delay": 5.0, "senders": 4, "max-pending": 10_000, "client": "fastsmsing:InMemoryClient",
    "max-attempts": 3, "max-age": None, "db": None, "retention": 259_200.0, "drain-timeout": 10.0, "log-level": "info",
    "log-format": "text",
}  # fmt: skip


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text("key-of-the-file\n")
    return path


def attribute(name: str) -> str:
    return name.replace("-", "_")


def variable(name: str) -> str:
    return f"SMSPROXY_{attribute(name).upper()}"


def setting(name: str, argv: list[str], environ: dict[str, str]) -> Any:
    return getattr(main.parse_args(argv, environ), attribute(name))


def refused(capsys: pytest.CaptureFixture[str], argv: list[str], environ: dict[str, str]) -> str:
    """The one line that these settings are refused with."""
    with pytest.raises(SystemExit) as exit:
        main.parse_args(argv, environ)
    out, err = capsys.readouterr()
    assert (exit.value.code, out, err.count("\n"), err[-1]) == (2, "", 1, "\n")
    return str(err)


def test_every_flag_has_a_case_here() -> None:
    known = set(vars(main.parse_args([], {}))) - {"check", "config", "api_keys", "make_client"}
    assert known == {attribute(name) for name in FLAGS} == {attribute(name) for name in DEFAULTS}


@pytest.mark.parametrize("name", FLAGS)
def test_a_flag_is_taken(name: str, keys: Path) -> None:
    value, meaning, _ = FLAGS[name]
    value, meaning = (str(keys),) * 2 if name == "api-keys-file" else (value, meaning)
    assert setting(name, [f"--{name}", value], {}) == meaning


@pytest.mark.parametrize("name", FLAGS)
def test_a_setting_is_taken_from_the_environment(name: str, keys: Path) -> None:
    value, meaning, _ = FLAGS[name]
    value, meaning = (str(keys),) * 2 if name == "api-keys-file" else (value, meaning)
    assert setting(name, [], {variable(name): value}) == meaning


@pytest.mark.parametrize("name", FLAGS)
def test_a_flag_beats_the_environment(name: str, keys: Path) -> None:
    value, meaning, bad = FLAGS[name]
    value, meaning = (str(keys),) * 2 if name == "api-keys-file" else (value, meaning)
    assert setting(name, [f"--{name}", value], {variable(name): bad[-1] or "another"}) == meaning


@pytest.mark.parametrize("name", DEFAULTS)
def test_an_empty_variable_counts_as_unset(name: str) -> None:
    assert setting(name, [], {variable(name): ""}) == setting(name, [], {}) == DEFAULTS[name]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_bad_value_is_one_line_that_names_the_flag(name: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, [f"--{name}={value}"], {})
    assert line.startswith(f"main.py: error: argument --{name}: ")


@pytest.mark.parametrize(("name", "value"), [case for case in BAD if case[1]])
def test_a_bad_variable_is_one_line_that_names_the_flag(
    name: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused(capsys, [], {variable(name): value}).startswith(f"main.py: error: argument --{name}: ")


@pytest.mark.parametrize("argv", [["--unknown"], ["--unknown", "1"], ["surplus"], ["--max-d", "1"], ["--port"]])
def test_an_unknown_flag_is_one_line(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert argv[0] in refused(capsys, argv, {})


@pytest.mark.parametrize("off", ["none", "None", "off"])
def test_delay_and_age_can_be_switched_off(off: str) -> None:
    options = main.parse_args(["--max-delay", off, "--max-age", off], {})
    assert (options.config.max_delay, options.config.max_age) == (None, None)


def test_the_batching_settings_make_the_configuration() -> None:
    argv = "--batch-size 3 --max-batch-size 9 --max-delay 1.5 --senders 2 --max-pending 50 --max-attempts 4 --max-age 60"
    expected = SmsProxyConfig(
        batch_size=3, max_batch_size=9, max_delay=1.5, senders=2, max_pending=50, max_attempts=4, max_age=60.0
    )
    assert main.parse_args(argv.split(), {}).config == expected


@pytest.mark.parametrize(("size", "largest"), [("1", 1), ("0", 1), ("-5", 1), ("2", 20), ("25", 250)])
def test_the_largest_batch_is_ten_times_the_batch_size_if_there_is_batching(size: str, largest: int) -> None:
    assert main.parse_args(["--batch-size", size], {}).config.max_batch_size == largest


def test_words_are_matched_without_regard_to_case() -> None:
    options = main.parse_args(["--log-level", "WARNING", "--log-format", "JSON"], {})
    assert (options.log_level, options.log_format) == ("warning", "json")


# API keys


def keys_of(text: str, path: Path | None = None) -> list[str]:
    argv = ["--api-keys-file", str(path)] if path else []
    found: list[str] = main.parse_args(argv, {"SMSPROXY_API_KEYS": text}).api_keys
    return found


def test_keys_come_from_the_environment_and_from_the_file(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("third\n\n  fourth  \r\nfi,fth")
    assert keys_of(" first , second,,", path) == ["first", "second", "third", "fourth", "fi,fth"]
    assert keys_of("first") == ["first"]
    assert keys_of("", path) == ["third", "fourth", "fi,fth"]
    assert keys_of("") == []


BAD_KEYS = {
    "blank inside": b"zqx vkw", "tab inside": b"zqx\tvkw", "not ASCII": "zqxęvkw".encode(), "control": b"zqx\x00vkw",
    "not UTF-8": b"zqx\xffvkw", "BOM": b"\xef\xbb\xbfzqxvkw", "UTF-16": "zqxvkw".encode("utf-16"), "none": b"\n \n",
}  # fmt: skip


@pytest.mark.parametrize("content", BAD_KEYS.values(), ids=BAD_KEYS)
def test_a_bad_keys_file_is_one_line_that_names_the_flag_and_shows_no_key(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "keys"
    path.write_bytes(content)
    line = refused(capsys, ["--api-keys-file", str(path)], {})
    assert line.startswith("main.py: error: argument --api-keys-file: ")
    assert ("zqx" in line, "vkw" in line) == (False, False)


@pytest.mark.parametrize("text", ["zqx vkw", "good,zqx\tvkw", "zqxę"])
def test_a_bad_key_in_the_environment_is_one_line_that_shows_no_key(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, [], {"SMSPROXY_API_KEYS": text})
    assert ("SMSPROXY_API_KEYS" in line, "zqx" in line, "good" in line) == (True, False, False)


@pytest.mark.parametrize("text", [",", " ", " , ,"])
def test_keys_that_are_set_but_hold_none_do_not_open_the_service(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "SMSPROXY_API_KEYS" in refused(capsys, [], {"SMSPROXY_API_KEYS": text})


# --help, --version, --check


def test_help_groups_the_flags_and_shows_their_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main.main(["--help"])
    out, err = capsys.readouterr()
    assert (exit.value.code, err) == (0, "")
    groups = re.findall(r"^([a-z ]+):$", out, re.MULTILINE)
    assert groups[-5:] == ["serving", "batching", "the provider", "keeping", "running"]
    help_of = {name: " ".join(text.split()) for name, text in re.findall(r"^  --([a-z-]+) ((?:.|\n   )*)", out, re.MULTILINE)}
    assert set(FLAGS) | {"version", "check"} == set(help_of)
    shown = {name: re.findall(r"\(default: (.*?)\)", text) for name, text in help_of.items()}
    assert {name: text[0] for name, text in shown.items() if text} == {
        "host": "127.0.0.1", "port": "8080", "max-connections": "1000", "batch-size": "10",
        "max-batch-size": "10 times the batch size", "max-delay": "5", "senders": "4", "max-pending": "10000",
        "client": "fastsmsing:InMemoryClient", "max-attempts": "3", "max-age": "none", "db": "memory",
        "retention": "259200", "drain-timeout": "10", "log-level": "info", "log-format": "text",
    }  # fmt: skip


def test_help_shows_nothing_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SMSPROXY_API_KEYS", "secret-key")
    monkeypatch.setenv("SMSPROXY_PORT", "nonsense")
    with pytest.raises(SystemExit) as exit:
        main.main(["--help"])
    out = capsys.readouterr().out
    assert (exit.value.code, "secret-key" in out, "nonsense" in out) == (0, False, False)


def test_version_says_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main.main(["--version"])
    assert (exit.value.code, capsys.readouterr()) == (0, (f"smsproxy {main.__version__}\n", ""))


def ended(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    """Exit code and output of a command that ends by itself; only errors are logged."""
    try:
        code = main.main(["--log-level", "error", *argv])
    except SystemExit as exit:
        code = int(str(exit.code))
    return (code, *capsys.readouterr())


def failed(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    """Exit code and the one line of a command that cannot run."""
    code, out, err = ended(capsys, *argv)
    assert (out, err.count("\n"), err.startswith("main.py: error: ")) == ("", 1, True), err
    return code, err


def test_check_of_good_settings_ends_with_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["--db", str(tmp_path / "new.db")], ["--client", "cli_providers:Late"]):
        code, out, err = ended(capsys, "--check", *argv)
        assert (code, "good" in out, err) == (0, True, "")


def test_check_leaves_the_database_usable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "a.db")
    with contextlib.closing(SqliteRepository(path)) as repository:
        repository.save("1")
    assert [ended(capsys, "--check", "--db", path)[0] for _ in range(2)] == [0, 0]
    with contextlib.closing(SqliteRepository(path)) as repository:
        assert repository.get("1") is MessageStatus.ACCEPTED


def test_check_does_not_need_the_port(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert ended(capsys, "--check", "--port", str(taken.getsockname()[1]))[0] == 0


BAD_CLIENTS = {
    "no such module": "nowhere:Client", "no such name": "fastsmsing:Nothing", "no name": "fastsmsing", "no module": ":x",
    "empty name": "fastsmsing:", "not callable": "main:__version__", "None": "cli_providers:nothing", "relative": ".x:y",
    "no identifier": "a b:c d", "raises": "raises_at_import:x", "does not parse": "does_not_parse:x",
    "misses a module": "misses_a_module:x",
}  # fmt: skip


@pytest.mark.parametrize("client", BAD_CLIENTS.values(), ids=BAD_CLIENTS)
def test_a_client_that_cannot_be_loaded_is_one_line_and_exit_2(
    client: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "raises_at_import.py").write_text("raise KeyError('TOKEN')\n")
    (tmp_path / "does_not_parse.py").write_text("x = = 1\n")
    (tmp_path / "misses_a_module.py").write_text("import no_such_module_anywhere\n")
    code, line = failed(capsys, "--check", "--client", client)
    assert (code, line.startswith("main.py: error: argument --client: ")) == (2, True)


@pytest.mark.parametrize("client", ["cli_providers:broken", "cli_providers:demanding", "builtins:dict", "builtins:object"])
@pytest.mark.parametrize("argv", [("--check",), ("--port", "0")])
def test_a_client_that_cannot_be_made_is_one_line_and_exit_1(
    client: str, argv: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert failed(capsys, *argv, "--client", client)[0] == 1


def test_a_client_is_found_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shop_of_this_test.py").write_text("from fastsmsing import InMemoryClient\nclass A:\n    B = InMemoryClient\n")
    assert main.parse_args(["--client", "shop_of_this_test:A.B"], {}).make_client is InMemoryClient
    assert ended(capsys, "--check", "--client", "shop_of_this_test:A.B")[0] == 0


# A database or an address that cannot be used


def missing_folder(folder: Path) -> Path:
    return folder / "missing" / "a.db"


def folder_itself(folder: Path) -> Path:
    return folder


def garbage(folder: Path) -> Path:
    (folder / "a.db").write_bytes(b"This is no database. " * 500)
    return folder / "a.db"


def damaged(folder: Path) -> Path:
    path = folder / "a.db"
    with contextlib.closing(SqliteRepository(str(path))) as repository:
        for index in range(500):
            repository.save(str(index))
    content = path.read_bytes()
    path.write_bytes(content[:1000] + b"\xff" * (len(content) - 1000))
    return path


def foreign(folder: Path) -> Path:
    with contextlib.closing(sqlite3.connect(folder / "a.db")) as db:
        db.execute("CREATE TABLE customer (name TEXT)")
    return folder / "a.db"


def newer(folder: Path) -> Path:
    path = folder / "a.db"
    SqliteRepository(str(path)).close()
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 99")
    return path


@pytest.mark.parametrize("make", [missing_folder, folder_itself, garbage, damaged, foreign, newer])
@pytest.mark.parametrize("argv", [("--check",), ("--port", "0")])
def test_a_database_that_cannot_be_used_is_one_line_and_exit_1(
    make: Callable[[Path], Path], argv: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make(tmp_path)
    code, line = failed(capsys, *argv, "--db", str(path))
    assert (code, str(path) in line) == (1, True)


def test_a_port_that_is_taken_is_one_line_and_exit_1(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, line = failed(capsys, "--port", str(taken.getsockname()[1]))
    assert (code, "in use" in line) == (1, True)


def test_a_client_is_stopped_when_the_service_cannot_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    client = Recorder()  # a real one may have threads that would keep the process alive
    monkeypatch.setattr(cli_providers, "Late", lambda: client)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, _ = failed(capsys, "--client", "cli_providers:Late", "--port", str(taken.getsockname()[1]))
    assert (code, client.stopped.is_set()) == (1, True)


@pytest.mark.parametrize("host", ["192.0.2.1", "::ffff:ffff", "a..b", "x" * 70, "1.2.3.4.5"])
def test_an_address_that_cannot_be_used_is_one_line_and_exit_1(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert failed(capsys, "--host", host, "--port", "0")[0] == 1


# What is said at the start


def said(capsys: pytest.CaptureFixture[str], *argv: str) -> list[str]:
    """What `--check` logs."""
    assert main.main(["--check", *argv]) == 0
    return str(capsys.readouterr().err).splitlines()


def settings(line: str) -> dict[str, str]:
    return dict(re.findall(r"([a-z_]+)=(\S*)", line))


def test_the_first_line_has_the_effective_settings(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SMSPROXY_MAX_DELAY", "2.5")
    lines = said(capsys, "--batch-size", "7", "--port", "0")
    assert f"smsproxy {main.__version__}" in lines[0]
    found = settings(lines[0])
    assert {attribute(name) for name in FLAGS} <= set(found)
    assert (found["batch_size"], found["max_batch_size"], found["max_delay"]) == ("7", "70", "2.5")
    assert (found["port"], found["host"], found["db"]) == ("0", "127.0.0.1", "None")
    assert len([line for line in lines if "batch_size" in line]) == 1


def test_settings_that_stand_for_others_are_shown_as_what_they_mean(capsys: pytest.CaptureFixture[str]) -> None:
    found = settings(said(capsys, "--batch-size", "0", "--max-attempts", "-1")[0])
    assert (found["batch_size"], found["max_batch_size"], found["max_attempts"]) == ("1", "1", "1")


def test_memory_mode_says_what_a_restart_loses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert [line for line in said(capsys) if "a restart loses" in line] != []
    assert [line for line in said(capsys, "--db", str(tmp_path / "a.db")) if "a restart loses" in line] == []


OPEN = ["0.0.0.0", "::", "192.0.2.1", "shop.example", "::1ffe", "localhost.example.com", "127.0.0.1.example.com"]
LOOPBACK = ["127.0.0.1", "127.1.2.3", "localhost", "::1"]


@pytest.mark.parametrize("host", OPEN)
def test_listening_to_others_without_keys_is_warned_of(
    host: str, keys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    warnings = [line for line in said(capsys, "--host", host) if "WARNING" in line]
    assert [host in line and "API keys" in line for line in warnings] == [True]
    assert [line for line in said(capsys, "--host", host, "--api-keys-file", str(keys)) if "WARNING" in line] == []


@pytest.mark.parametrize("host", LOOPBACK)
def test_listening_on_the_loopback_needs_no_keys(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert [line for line in said(capsys, "--host", host) if "WARNING" in line] == []


# Logs


def test_an_error_in_json_is_one_line_with_its_exception() -> None:
    try:
        raise ValueError("zażółć\nline two")
    except ValueError:
        record = logging.LogRecord("smsproxy", logging.ERROR, "", 0, "batch %d:\nfailed", (5,), sys.exc_info())
    line = main.JsonFormatter().format(record)
    doc = json.loads(line)
    assert ("\n" in line, doc["level"], doc["logger"], doc["message"]) == (False, "ERROR", "smsproxy", "batch 5:\nfailed")
    assert "ValueError: zażółć\nline two" in doc["exception"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", doc["time"])


@pytest.mark.parametrize(("level", "expected"), [("warning", 1), ("error", 0)])
def test_what_is_below_the_level_is_not_logged(
    level: str, expected: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(said(capsys, "--host", "0.0.0.0", "--log-level", level)) == expected


# A whole life in this process


class Listening(logging.Handler):
    """Hands the port that is logged to whoever waits for it, and tells when the end has begun."""

    def __init__(self) -> None:
        super().__init__()
        self.ports: queue.Queue[int] = queue.Queue()
        self.stopping = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        found = re.search(r"listening on \S+ port (\d+)", record.getMessage())
        if found:
            self.ports.put(int(found[1]))
        elif record.getMessage().startswith("stopping"):
            self.stopping.set()


def call(port: int, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=HANG)
    try:
        connection.request(method, path, json.dumps(body) if body else None, headers or {})
        response = connection.getresponse()
        payload = response.read()
        is_json = response.headers.get_content_type() == "application/json"
        return response.status, json.loads(payload) if is_json else payload.decode()
    finally:
        connection.close()


def life(
    clients: Callable[[int], None], *argv: str, number: int = signal.SIGTERM, to_its_thread: bool = True
) -> int:
    """The command on a free port, with clients that are done when the signal comes; its exit code."""
    listening = Listening()
    logger = logging.getLogger("smsproxy.main")
    errors: list[BaseException] = []

    def outside() -> None:
        port = listening.ports.get(timeout=HANG)
        if not port:  # it has ended without listening
            return
        try:
            clients(port)
        except BaseException as error:
            errors.append(error)
        signal.pthread_kill((threading.main_thread() if to_its_thread else thread).ident or 0, number)
        if not listening.stopping.wait(HANG):
            errors.append(AssertionError("the signal was not seen"))
            call(port, "GET", "/healthz")  # wakes it

    thread = threading.Thread(target=outside)
    logger.addHandler(listening)
    thread.start()
    try:
        code = main.main(["--port", "0", *argv])
    finally:
        listening.ports.put(0)
        thread.join(HANG)
        logger.removeHandler(listening)
    assert errors == []
    return code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_ends_with_0(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    def clients(port: int) -> None:
        statuses = [call(port, "POST", "/sms", GOOD)[0] for _ in range(3)]
        assert statuses == [202] * 3

    assert life(clients, "--max-delay", "none", number=number) == 0
    assert "handed over 3 messages at attempt 1" in capsys.readouterr().err


def test_a_signal_that_the_system_gives_to_another_thread_ends_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    patient = functools.partial(Limits, read_timeout=10 * HANG, idle_timeout=10 * HANG)
    monkeypatch.setattr(main, "Limits", patient)  # no deadline of the connection is to wake the loop
    with contextlib.ExitStack() as stack:

        def clients(port: int) -> None:
            held = http.client.HTTPConnection("127.0.0.1", port, timeout=HANG)
            stack.callback(held.close)  # only later, for the same reason
            held.request("GET", "/healthz")
            assert held.getresponse().read() == b'{"Status": "OK"}'

        assert life(clients, to_its_thread=False) == 0


def test_the_flags_reach_the_service(keys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def clients(port: int) -> None:
        key = {"Authorization": "Bearer key-of-the-file"}
        assert call(port, "GET", "/metrics")[0] == 401
        assert call(port, "GET", "/metrics", headers=key)[0] == 200
        assert [call(port, "POST", "/sms", GOOD, key)[0] for _ in range(3)] == [202, 202, 503]
        assert call(port, "GET", "/healthz") == (503, {"Status": "UNAVAILABLE", "Reasons": ["queue full"]})

    argv = ["--max-pending", "2", "--batch-size", "2", "--max-batch-size", "2", "--client", "cli_providers:Hanging"]
    assert life(clients, *argv, "--api-keys-file", str(keys), "--drain-timeout", "0", "--db", str(tmp_path / "a.db")) == 1
    assert "2 messages could not be handed over" in capsys.readouterr().err


def test_very_long_times_are_no_trouble(capsys: pytest.CaptureFixture[str]) -> None:
    def clients(port: int) -> None:
        held = http.client.HTTPConnection("127.0.0.1", port, timeout=HANG)
        held.connect()
        assert call(port, "POST", "/sms", GOOD)[0] == 202
        held.close()

    forever = [f"--{name}=1e10" for name in ("max-delay", "max-age", "retention")]
    assert life(clients, *forever, "--drain-timeout=86400") == 0
    assert "handed over 1 messages" in capsys.readouterr().err


def test_json_logs_are_one_object_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    def clients(port: int) -> None:
        assert [call(port, "POST", "/sms", body)[0] for body in (GOOD, {"Content": "x"})] == [202, 400]

    assert life(clients, "--log-format", "json", "--log-level", "debug", "--batch-size", "1") == 0
    docs = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert {tuple(doc)[:5] for doc in docs} == {("time", "level", "logger", "thread", "message")}
    assert {doc["level"] for doc in docs} >= {"DEBUG", "INFO"}


# Processes of their own


class Child:
    """The command as a process of its own on a free port; its standard error is read as it comes."""

    def __init__(self, *argv: str, **environ: str) -> None:
        env = os.environ | {"PYTHONPATH": f"{HERE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"} | environ
        port = [] if "SMSPROXY_PORT" in environ else ["--port", "0"]
        self.process = subprocess.Popen(
            [sys.executable, COMMAND, *port, *argv], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        self.lines: list[str] = []
        self._changed = threading.Condition()  # guards lines and _over
        self._over = False
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.process.kill()
        self.ended()

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Blocks until a line matches."""
        with self._changed:
            self._changed.wait_for(lambda: self._over or re.search(pattern, self.log), HANG)
            found = re.search(pattern, self.log)
        assert found is not None, self.log
        return found

    @property
    def log(self) -> str:
        return "".join(self.lines)

    @property
    def port(self) -> int:
        """Where it listens; blocks until it does."""
        return int(self.wait_for(r"listening on 127\.0\.0\.1 port (\d+)")[1])

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def ended(self) -> int:
        """Waits for the end; the exit code, negative when a signal was the end."""
        code = self.process.wait(HANG)
        self._reader.join(HANG)
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()
        assert "Traceback" not in self.log
        return code

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._changed:
                self.lines.append(line)
                self._changed.notify_all()
        with self._changed:
            self._over = True
            self._changed.notify_all()


def post(child: Child, count: int) -> list[str]:
    """The IDs of so many messages, all accepted."""
    port = child.port
    found = [call(port, "POST", "/sms", GOOD) for _ in range(count)]
    assert [status for status, _ in found] == [202] * count
    return [doc["ID"] for _, doc in found]


def statuses(path: Path, ids: list[str]) -> set[MessageStatus]:
    with contextlib.closing(SqliteRepository(str(path))) as repository:
        return {repository.get(message_id) for message_id in ids}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_that_is_told_to_stop_flushes_and_applies_the_last_reports(number: int, tmp_path: Path) -> None:
    db = tmp_path / "a.db"
    with Child("--max-delay", "none", "--client", "cli_providers:Late", "--db", str(db)) as child:
        ids = post(child, 3)
        child.signal(number)
        assert child.ended() == 0
    assert f"handed over 3 messages at attempt 1: {' '.join(ids)}" in child.log
    assert statuses(db, ids) == {MessageStatus.DELIVERED}


def test_a_provider_that_hangs_ends_it_with_1_and_the_count() -> None:
    with Child("--batch-size", "1", "--client", "cli_providers:Hanging", "--drain-timeout", "0.1") as child:
        ids = post(child, 6)
        child.signal(signal.SIGTERM)
        assert child.ended() == 1
    assert "6 messages could not be handed over" in child.log
    assert [message_id for message_id in ids if message_id not in child.log] == []


def test_what_a_process_could_not_hand_over_the_next_one_does(tmp_path: Path) -> None:
    db = tmp_path / "a.db"
    with Child("--client", "cli_providers:Hanging", "--drain-timeout", "0", "--db", str(db)) as child:
        ids = post(child, 3)
        child.signal(signal.SIGTERM)
        assert child.ended() == 1
    assert statuses(db, ids) == {MessageStatus.ACCEPTED}
    with Child("--client", "cli_providers:Late", "--db", str(db)) as child:
        child.wait_for("listening on")
        child.signal(signal.SIGTERM)
        assert child.ended() == 0
    assert f"handed over 3 messages at attempt 1: {' '.join(ids)}" in child.log
    assert statuses(db, ids) == {MessageStatus.DELIVERED}


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_while_draining_nobody_can_connect_and_a_second_signal_ends_it_at_once(second: int) -> None:
    with Child("--batch-size", "1", "--client", "cli_providers:Hanging", "--drain-timeout", str(2 * HANG)) as child:
        post(child, 1)
        child.wait_for("the provider hangs")
        child.signal(signal.SIGTERM)
        child.wait_for("stopping")
        with pytest.raises(ConnectionRefusedError):
            call(child.port, "GET", "/healthz")
        child.signal(second)
        assert child.ended() == -second


def test_a_second_process_on_the_same_database_is_one_line_and_exit_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    db = str(tmp_path / "a.db")
    with Child("--db", db) as child:
        child.wait_for("listening on")
        for argv in (("--check",), ("--port", "0")):
            code, line = failed(capsys, *argv, "--db", db)
            assert (code, db in line, "another process" in line) == (1, True, True)
        assert post(child, 1) != []  # the first one does not mind
        child.signal(signal.SIGTERM)
        assert child.ended() == 0


def test_everything_can_be_set_by_the_environment_and_keys_are_shown_nowhere(keys: Path) -> None:
    environ = {"PORT": "0", "LOG_FORMAT": "json", "LOG_LEVEL": "debug", "BATCH_SIZE": "1", "API_KEYS": "env-key,other-key",
               "API_KEYS_FILE": str(keys), "CLIENT": "cli_providers:Late", "MAX_DELAY": ""}  # fmt: skip
    with Child(**{f"SMSPROXY_{name}": value for name, value in environ.items()}) as child:
        for key, status in (("env-key", 202), ("other-key", 202), ("key-of-the-file", 202), ("env-key-typo", 401)):
            assert call(child.port, "POST", "/sms", GOOD, {"Authorization": f"Bearer {key}"})[0] == status
        child.signal(signal.SIGTERM)
        assert child.process.stdout is not None
        out = child.process.stdout.read()
        assert child.ended() == 0
    docs = [json.loads(line) for line in child.lines]
    found = settings(docs[0]["message"])
    assert (found["batch_size"], found["client"], found["max_delay"]) == ("1", "cli_providers:Late", "5.0")
    assert sum("handed over 1 messages" in doc["message"] for doc in docs) == 3
    assert [key for key in ("env-key", "other-key", "key-of-the-file") if key in child.log + out] == []
