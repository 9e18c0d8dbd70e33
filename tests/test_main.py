"""The command: settings, what it says at the start, and how it ends, in this process and as one of its own."""
from __future__ import annotations

import contextlib
import http.client
import json
import logging
import os
import re
import shutil
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
from fastsmsing import InMemoryClient, Message
from helpers import HANG, Recorder
from restarts import Service
from smsproxy import Entry, MessageStatus, SmsProxyConfig, SmsProxyError
from sqlite_repository import SqliteRepository

NUMBER, TEXT = "48123456789", "Your parcel is here"
GOOD = {"PhoneNumber": NUMBER, "Content": TEXT}
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
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    root.handlers.clear()  # the command closes what it finds here
    yield
    root.setLevel(level)
    root.handlers[:] = handlers
    for number, handler in kept.items():
        signal.signal(number, handler)


# Settings


# Flag → its default, a good value, what that means, bad values.
FLAGS: dict[str, tuple[object, str, object, tuple[str, ...]]] = {
    "host": ("127.0.0.1", "0.0.0.0", "0.0.0.0", ("",)),
    "port": (8080, "9090", 9090, ("", "x", "-1", "65536", "80.5", "nan", "9" * 400, "0x50")),
    "max-connections": (1000, "7", 7, ("", "0", "-1", "1.5", "many", "9" * 400)),
    "api-keys-file": (None, "{keys}", "{keys}", ("", "/nowhere/keys", "/")),
    "batch-size": (100, "7", 7, ("", "x", "1.5", "inf", "9" * 5000)),
    "max-delay": (5.0, "2.5", 2.5, ("", "x", "-1", "nan", "inf", "-0.1")),
    "senders": (4, "7", 7, ("", "0", "x", "1.5", "9" * 400)),
    "max-pending": (100_000, "700", 700, ("", "0", "x", "99", "9" * 400)),
    "client": ("fastsmsing:InMemoryClient", "cli_providers:Late", "cli_providers:Late", ("", "x", "nowhere:x", "fastsmsing:No")),
    "max-attempts": (100, "7", 7, ("", "x", "1.5", "9" * 400)),
    "backoff-base": (0.5, "0.25", 0.25, ("", "x", "-1", "nan", "inf", "none")),
    "backoff-max": (30.0, "60", 60.0, ("", "x", "-1", "nan", "inf", "none")),
    "max-age": (None, "60", 60.0, ("", "x", "-1", "nan", "inf")),
    "db": (None, "some.db", "some.db", ("",)),
    "retention": (259_200.0, "60", 60.0, ("", "x", "-1", "nan", "inf", "none")),
    "lease": (30.0, "10", 10.0, ("", "x", "2.9", "nan", "none")),
    "drain-timeout": (10.0, "2.5", 2.5, ("", "x", "-1", "nan", "inf", "none", "1e10")),
    "log-level": ("info", "DEBUG", "debug", ("", "loud", "10")),
    "log-format": ("text", "JSON", "json", ("", "xml")),
}  # fmt: skip
BAD = [(name, value) for name, (*_, values) in FLAGS.items() for value in values]


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text("shop key-of-the-file\n")
    return path


def attribute(name: str) -> str:
    return name.replace("-", "_")


def variable(name: str) -> str:
    return f"SMSPROXY_{attribute(name).upper()}"


def refused(capsys: pytest.CaptureFixture[str], argv: list[str], environ: dict[str, str]) -> str:
    """The one line that these settings are refused with."""
    with pytest.raises(SystemExit) as exit:
        main.parse_args(argv, environ)
    out, err = capsys.readouterr()
    assert (exit.value.code, out, err.count("\n"), err[-1], err[:16]) == (2, "", 1, "\n", "main.py: error: ")
    return str(err[16:])


def test_every_flag_has_a_case_here() -> None:
    known = set(vars(main.parse_args([], {}))) - {"check", "config", "api_keys", "make_client", "max_batch_size"}
    assert known == {attribute(name) for name in FLAGS}


@pytest.mark.parametrize("name", FLAGS)
def test_a_setting_comes_from_its_flag_or_its_variable_or_is_the_default(name: str, keys: Path) -> None:
    default, value, meaning, bad = FLAGS[name]
    value, meaning = (str(keys),) * 2 if name == "api-keys-file" else (value, meaning)
    cases: list[tuple[list[str], dict[str, str], object]] = [
        ([], {}, default), ([f"--{name}", value], {}, meaning), ([], {variable(name): value}, meaning),
        ([f"--{name}", value], {variable(name): bad[-1] or "another"}, meaning), ([], {variable(name): ""}, default),
    ]  # fmt: skip
    for argv, environ, expected in cases:
        assert getattr(main.parse_args(argv, environ), attribute(name)) == expected, (argv, environ)


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_bad_value_is_one_line_that_names_the_flag(name: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, [f"--{name}={value}"], {}).startswith(f"argument --{name}: ")
    if value:
        assert refused(capsys, [], {variable(name): value}).startswith(f"argument --{name}: ")


@pytest.mark.parametrize("argv", [["--unknown"], ["--unknown", "1"], ["surplus"], ["--max-d", "1"], ["--port"]])
def test_an_unknown_flag_is_one_line(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert argv[0] in refused(capsys, argv, {})


@pytest.mark.parametrize("argv", [["--max-batch-size"], ["--max-batch-size", "100"], ["--max-batch-size=x"]])
def test_the_setting_that_is_gone_says_what_took_its_place(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "--batch-size is the most messages in one request" in refused(capsys, argv, {})


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("SMSPROXY_CLEINT", "SMSPROXY_CLIENT"), ("SMSPROXY_MAXDELAY", "SMSPROXY_MAX_DELAY"), ("SMSPROXY_API_KEY", "SMSPROXY_API_KEYS"),
     ("SMSPROXY_MAX_BATCH_SIZE", "SMSPROXY_BATCH_SIZE")],
)  # fmt: skip
def test_a_misspelt_variable_is_one_line_with_the_nearest_name(wrong: str, right: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, [], {wrong: "x"}) == f"unknown environment variable {wrong}; did you mean {right}?\n"


def test_the_settings_make_the_configuration() -> None:
    argv = "--batch-size 3 --max-delay off --senders 2 --max-pending 50 --max-attempts none --max-age NONE --backoff-max 7"
    expected = SmsProxyConfig(3, None, 2, 50, None, 0.5, 7.0, None)
    assert main.parse_args(argv.split(), {}).config == expected
    assert main.parse_args(["--batch-size", "0", "--max-attempts", "-1"], {}).config == SmsProxyConfig(batch_size=1, max_attempts=1)


def test_keys_come_from_the_environment_and_from_the_file_by_name(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("third\n\n  shop   fourth  \r\nbatch\tfi,fth")
    cases = {(" first , second,,", True): ["first", "second", "third", "fourth", "fi,fth"], ("", True): ["third", "fourth", "fi,fth"],
             ("first", False): ["first"], ("", False): []}  # fmt: skip
    for (text, file), expected in cases.items():
        found = main.parse_args(["--api-keys-file", str(path)] if file else [], {"SMSPROXY_API_KEYS": text}).api_keys
        assert list(found.values()) == expected
        assert [found[name] for name in ("shop", "batch") if name in found] == (["fourth", "fi,fth"] if file else [])


BAD_KEYS = {
    "three words": b"zqx vkw three", "not ASCII": "zqxęvkw".encode(), "control": b"zqx\x00vkw", "not UTF-8": b"zqx\xffvkw",
    "BOM": b"\xef\xbb\xbfzqxvkw", "UTF-16": "zqxvkw".encode("utf-16"), "none": b"\n \n", "name twice": b"shop zqx\nshop vkw",
}  # fmt: skip


@pytest.mark.parametrize("content", BAD_KEYS.values(), ids=BAD_KEYS)
def test_a_bad_keys_file_is_one_line_that_shows_no_key(content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys"
    path.write_bytes(content)
    line = refused(capsys, ["--api-keys-file", str(path)], {})
    assert (line.startswith("argument --api-keys-file: "), "zqx" in line, "vkw" in line) == (True, False, False)


@pytest.mark.parametrize("text", ["zqx vkw", "good,zqx\tvkw", "zqxę", ",", " ", " , ,"])
def test_bad_keys_in_the_environment_are_one_line_that_shows_no_key(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, [], {"SMSPROXY_API_KEYS": text})
    assert ("SMSPROXY_API_KEYS" in line, "zqx" in line, "good" in line) == (True, False, False)


def test_help_groups_the_flags_shows_their_defaults_and_nothing_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SMSPROXY_API_KEYS", "secret-key")
    with pytest.raises(SystemExit) as exit:
        main.main(["--help"])
    out, err = capsys.readouterr()
    assert (exit.value.code, err, "secret-key" in out) == (0, "", False)
    assert re.findall(r"^([a-z ]+):$", out, re.MULTILINE)[-5:] == ["serving", "batching", "the provider", "keeping", "running"]
    help_of = {name: " ".join(text.split()) for name, text in re.findall(r"^  --([a-z-]+) ((?:.|\n   )*)", out, re.MULTILINE)}
    assert set(FLAGS) | {"version", "check"} == set(help_of)
    shown = {name: re.findall(r"\(default: (.*?)\)", help_of[name]) for name in FLAGS}
    for name, (default, *_) in FLAGS.items():
        text = {"db": "memory", "max-age": "none"}.get(name, f"{default:g}" if isinstance(default, float) else str(default))
        assert shown[name] == ([] if name == "api-keys-file" else [text])


def test_version_says_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main.main(["--version"])
    assert (exit.value.code, capsys.readouterr()) == (0, (f"smsproxy {main.__version__}\n", ""))


# Starts that fail, and --check


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


def test_check_of_good_settings_ends_with_0_and_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:  # the port is not needed
        for argv in ([], ["--db", str(tmp_path / "new.db")], ["--client", "cli_providers:Late"]):
            code, out, err = ended(capsys, "--check", "--port", str(taken.getsockname()[1]), *argv)
            assert (code, "good" in out, err) == (0, True, "")
    assert list(tmp_path.iterdir()) == []


BAD_CLIENTS = {
    "no such module": "nowhere:Client", "no such name": "fastsmsing:Nothing", "no name": "fastsmsing", "no module": ":x",
    "empty name": "fastsmsing:", "not callable": "main:__version__", "None": "cli_providers:nothing", "relative": ".x:y",
    "no identifier": "a b:c d", "raises": "raises_at_import:x", "does not parse": "does_not_parse:x",
}  # fmt: skip


@pytest.mark.parametrize("client", BAD_CLIENTS.values(), ids=BAD_CLIENTS)
def test_a_client_that_cannot_be_loaded_is_one_line_and_exit_2(
    client: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "raises_at_import.py").write_text("raise KeyError('TOKEN')\n")
    (tmp_path / "does_not_parse.py").write_text("x = = 1\n")
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


def make_newer(path: Path) -> None:
    SqliteRepository(str(path)).close()
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 99")


BAD_FILES: dict[str, Callable[[Path], object]] = {
    "missing folder": lambda path: path.parent.rmdir(), "a folder": lambda path: path.mkdir(),
    "garbage": lambda path: path.write_bytes(b"This is no database. " * 500), "newer": make_newer,
}  # fmt: skip


@pytest.mark.parametrize("make", BAD_FILES.values(), ids=BAD_FILES)
@pytest.mark.parametrize("argv", [("--check",), ("--port", "0")])
def test_a_database_that_cannot_be_used_is_one_line_and_exit_1(
    make: Callable[[Path], object], argv: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "folder" / "a.db"
    path.parent.mkdir()
    make(path)
    code, line = failed(capsys, *argv, "--db", str(path))
    assert (code, str(path) in line) == (1, True)


@pytest.mark.parametrize("argv", [("--check",), ("--port", "0")])
def test_postgresql_without_its_driver_is_one_line_without_the_password(
    argv: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    for name in [name for name in sys.modules if name.split(".")[0] == "postgres"]:
        monkeypatch.delitem(sys.modules, name)
    code = main.main(["--log-level", "debug", *argv, "--db", "postgresql://shop:hunter2@db.example:5432/sms?x=1"])
    out, err = capsys.readouterr()
    assert (code, out, "hunter2" in err, "db=postgresql://db.example/sms" in err) == (1, "", False, True)
    assert err.splitlines()[-1] == "main.py: error: cannot start: PostgreSQL needs psycopg (psycopg): pip install 'smsproxy[postgres]'"


def test_a_port_that_is_taken_is_one_line_and_the_client_is_stopped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    client = Recorder()  # a real one may have threads that would keep the process alive
    monkeypatch.setattr(cli_providers, "Late", lambda: client)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, line = failed(capsys, "--client", "cli_providers:Late", "--port", str(taken.getsockname()[1]))
    assert (code, "in use" in line, client.stopped.is_set()) == (1, True, True)


@pytest.mark.parametrize("host", ["192.0.2.1", "::ffff:ffff", "a..b", "x" * 70, "1.2.3.4.5"])
def test_an_address_that_cannot_be_used_is_one_line_and_exit_1(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert failed(capsys, "--host", host, "--port", "0")[0] == 1


# What is said at the start


def said(capsys: pytest.CaptureFixture[str], *argv: str) -> list[str]:
    """What `--check` logs."""
    assert main.main(["--check", *argv]) == 0
    return str(capsys.readouterr().err).splitlines()


def test_the_first_line_has_the_effective_settings(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("SMSPROXY_MAX_DELAY", "2.5")
    [line] = [line for line in said(capsys, "--batch-size", "7", "--port", "0") if f"smsproxy {main.__version__}: " in line]
    found = dict(re.findall(r"([a-z_]+)=(\S*)", line))
    assert [found[name] for name in ("batch_size", "max_delay", "port", "host")] == ["7", "2.5", "0", "127.0.0.1"]


def test_the_stand_in_and_memory_are_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stand_in, memory = "WARNING .* nothing is sent to anybody", "a restart loses them"
    real = ["--client", "cli_providers:Late", "--db", str(tmp_path / "a.db")]
    for argv, expected in (([], True), (real, False)):
        log = "\n".join(said(capsys, *argv))
        assert [bool(re.search(word, log)) for word in (stand_in, memory)] == [expected] * 2


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "::1ffe", "localhost.example.com", "127.0.0.1.example.com"])
def test_listening_to_others_without_keys_is_warned_of(host: str, keys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def warned(*argv: str) -> bool:
        return any("WARNING" in line and "without API keys" in line for line in said(capsys, "--host", *argv))

    assert [warned(host), warned(host, "--api-keys-file", str(keys)), warned("::1"), warned("localhost")] == [True] + [False] * 3


def test_a_text_line_begins_with_its_time_and_nothing_in_it_begins_a_line_of_its_own() -> None:
    record = logging.LogRecord("smsproxy", logging.ERROR, "", 0, "no\r\n2026 %s", ("\x1b[31m\x85\u2028ż",), None)
    line = main.TextFormatter().format(record)
    assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d ERROR ", line)
    assert line.endswith(r" smsproxy: no\r\n2026 \x1b[31m\x85\u2028ż")


@pytest.mark.parametrize("formatter", [main.TextFormatter(), main.JsonFormatter()])
def test_an_exception_is_in_the_log_and_in_json_it_is_one_line(formatter: logging.Formatter) -> None:
    try:
        raise ValueError("zażółć\nline two")
    except ValueError:
        record = logging.LogRecord("smsproxy", logging.ERROR, "", 0, "batch %d:\nfailed", (5,), sys.exc_info())
    line = formatter.format(record)
    if isinstance(formatter, main.TextFormatter):
        assert (line.splitlines()[1], line.splitlines()[-1]) == ("Traceback (most recent call last):", "line two")
        return
    doc = json.loads(line)
    assert ("\n" in line, doc["level"], doc["logger"], doc["message"]) == (False, "ERROR", "smsproxy", "batch 5:\nfailed")
    assert "ValueError: zażółć\nline two" in doc["exception"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", doc["time"])


@pytest.mark.parametrize(("level", "expected"), [("warning", 2), ("error", 0)])
def test_what_is_below_the_level_is_not_logged(level: str, expected: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(said(capsys, "--host", "0.0.0.0", "--log-level", level)) == expected


# What the system hands over


@pytest.mark.parametrize("environ", [{}, {"LISTEN_PID": "1", "LISTEN_FDS": "1"}, {"LISTEN_PID": str(os.getpid())}])
def test_a_socket_that_was_handed_to_somebody_else_or_to_nobody_is_not_taken(environ: dict[str, str]) -> None:
    assert main.passed_socket(environ) is None


def test_two_sockets_are_one_too_many() -> None:
    with pytest.raises(SmsProxyError, match="one listening socket"):
        main.passed_socket({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "2"})


@pytest.mark.parametrize("name", ["{path}/notify", "@smsproxy-test"])
def test_systemd_is_told_at_its_path_or_its_abstract_name_and_nobody_else_is(name: str, tmp_path: Path) -> None:
    address = name.format(path=tmp_path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(address.replace("@", "\0"))
        receiver.settimeout(HANG)
        main.notify({"NOTIFY_SOCKET": address}, "READY=1")
        assert receiver.recv(100) == b"READY=1"
    main.notify({"NOTIFY_SOCKET": address}, "nobody listens")
    main.notify({}, "nobody listens")


def test_the_service_serves_on_the_socket_handed_over_and_says_when_it_is_ready_and_when_it_stops(tmp_path: Path) -> None:
    service = Service(tmp_path, [sys.executable, COMMAND, "--port", "1"])
    with contextlib.closing(service):
        service.start()
        assert call(service.port, "POST", "/sms", GOOD)[0] == 202
        assert service.process is not None
        service.process.send_signal(signal.SIGTERM)
        service.wait_for("STOPPING=1")
        assert service.process.wait(HANG) == 0


# Processes of their own


def call(port: int, method: str, path: str, body: Any = None, key: str = "") -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=HANG)
    with contextlib.closing(connection):
        connection.request(method, path, json.dumps(body) if body else None, {"Authorization": f"Bearer {key}"} if key else {})
        response = connection.getresponse()
        payload = response.read()
        is_json = response.headers.get_content_type() == "application/json"
        return response.status, json.loads(payload) if is_json else payload.decode()


class Child:
    """The command as a process of its own on a free port; its standard error is read as it comes."""

    def __init__(self, *argv: str, before: tuple[str, ...] = (), **environ: str) -> None:
        path = os.pathsep.join([*environ.pop("PYTHONPATH", "").split(), str(HERE)])
        command = [*before, sys.executable, COMMAND, *([] if "SMSPROXY_PORT" in environ else ["--port", "0"]), *argv]
        env = os.environ | {"PYTHONPATH": path} | environ
        self.process = subprocess.Popen(command, env=env, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
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

    def post(self, count: int) -> list[str]:
        """The IDs of so many messages, all accepted."""
        found = [call(self.port, "POST", "/sms", GOOD) for _ in range(count)]
        assert [status for status, _ in found] == [202] * count
        return [doc["ID"] for _, doc in found]

    def end(self, number: int = signal.SIGTERM) -> int:
        """Sends the signal and waits for the end; returns the exit code."""
        self.process.send_signal(number)
        return self.ended()

    def ended(self) -> int:
        """Waits for the end; the exit code, negative when a signal was the end."""
        code = self.process.wait(HANG)
        self._reader.join(HANG)
        assert self.process.stderr is not None
        self.process.stderr.close()
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


@pytest.fixture
def db(tmp_path: Path) -> Path:
    return tmp_path / "a.db"


def fill(path: Path, count: int) -> list[str]:
    """So many messages in the outbox of a file that nobody uses; their IDs."""
    ids = [f"message-{number}" for number in range(count)]
    with contextlib.closing(SqliteRepository(str(path))) as repository:
        repository.save_all([Entry(Message(NUMBER, TEXT, message_id)) for message_id in ids])
    return ids


def kept(path: Path, ids: list[str]) -> tuple[set[MessageStatus], int]:
    """The statuses, and how many messages are in the outbox."""
    with contextlib.closing(SqliteRepository(str(path))) as repository:
        return {repository.get(message_id) for message_id in ids}, repository.backlog()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_in_memory_a_signal_flushes_what_lingers_and_the_end_is_0(number: int) -> None:
    with Child("--max-delay", "none", "--client", "cli_providers:Late") as child:
        ids = child.post(3)
        assert child.end(number) == 0
    assert f"handed over 3 messages at attempt 1: {' '.join(ids)}" in child.log


@pytest.mark.parametrize(
    ("client", "argv"),
    [("Down", ["--drain-timeout", "0.2"]), ("Rejecting", []), ("Down", ["--max-attempts", "1"]), ("Hanging", ["--drain-timeout", "0.1"])],
    ids=["down", "rejected", "given up", "hung"],
)  # fmt: skip
def test_in_memory_the_end_is_1_and_names_what_was_not_handed_over(client: str, argv: list[str]) -> None:
    with Child("--batch-size", "10", "--max-delay", "none", "--client", f"cli_providers:{client}", *argv) as child:
        ids = child.post(6)
        assert child.end() == 1
    assert "6 messages could not be handed over" in child.log
    assert [message_id for message_id in ids if message_id not in child.log] == []


def test_a_drain_waits_for_a_provider_that_comes_back(tmp_path: Path) -> None:
    (tmp_path / "coming_back.py").write_text(
        "from helpers import Scripted\nfrom fastsmsing import FastSmsingError\n"
        "def make(): return Scripted(FastSmsingError('down'), FastSmsingError('down'))\n"
    )
    argv = ["--client", "coming_back:make", "--batch-size", "2", "--backoff-base", "0.01"]
    with Child(*argv, PYTHONPATH=str(tmp_path)) as child:
        ids = child.post(1)
        assert child.end() == 0
    assert f"handed over 1 messages at attempt 3: {ids[0]}" in child.log


def test_a_durable_end_is_0_at_once_and_the_next_start_sends_the_rest_in_order(db: Path) -> None:
    with Child("--max-delay", "none", "--client", "cli_providers:Late", "--db", str(db)) as child:
        ids = child.post(3)
        assert child.end() == 0
    assert "3 messages wait in the outbox for the next start" in child.log
    assert kept(db, ids) == ({MessageStatus.ACCEPTED}, 3)
    with Child("--max-delay", "0", "--client", "cli_providers:Late", "--db", str(db)) as child:
        child.wait_for(f"handed over 3 messages at attempt 1: {' '.join(ids)}")
        assert child.end() == 0
    assert kept(db, ids) == ({MessageStatus.DELIVERED}, 0)


@pytest.mark.parametrize("client", ["Down", "Hanging"])
def test_a_durable_end_loses_nothing_when_the_provider_fails(client: str, db: Path) -> None:
    ids = fill(db, 3)
    argv = ["--batch-size", "3", "--drain-timeout", "0.1", "--client", f"cli_providers:{client}", "--db", str(db)]
    with Child(*argv) as child:
        child.wait_for("circuit breaker open" if client == "Down" else "the provider hangs")
        assert child.end() == (0 if client == "Down" else 1)
    assert kept(db, ids) == ({MessageStatus.ACCEPTED}, 3)


def test_a_client_that_does_not_read_does_not_eat_the_drain() -> None:
    argv = ["--max-delay", "none", "--client", "cli_providers:Late", "--drain-timeout", str(4 * HANG)]
    with Child(*argv) as child, socket.create_connection(("127.0.0.1", child.port)) as reader:
        ids = child.post(1)
        reader.settimeout(0.2)  # nobody reads, so this is when everything is full
        with contextlib.suppress(TimeoutError):
            while True:
                reader.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 1_000)
        assert child.end() == 0
    assert f"handed over 1 messages at attempt 1: {ids[0]}" in child.log


def process_of(child: Child, before: tuple[str, ...]) -> int:
    """The ID of the command's process, which may be the child of what started it."""
    parent = child.process.pid
    return int(Path(f"/proc/{parent}/task/{parent}/children").read_text().split()[0]) if before else parent


def can_unshare() -> bool:
    return bool(shutil.which("unshare")) and subprocess.run(["unshare", "-pf", "true"], capture_output=True).returncode == 0


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("before", [(), ("unshare", "-pf", "--kill-child")], ids=["child", "PID 1"])
def test_while_it_drains_nobody_can_connect_and_a_second_signal_ends_it_at_once(before: tuple[str, ...], second: int) -> None:
    if before and not can_unshare():
        pytest.skip("this system makes no PID namespace")
    argv = ["--batch-size", "1", "--client", "cli_providers:Hanging", "--drain-timeout", str(4 * HANG)]
    with Child(*argv, before=before) as child:
        child.post(1)
        child.wait_for("the provider hangs")
        process = process_of(child, before)
        os.kill(process, signal.SIGTERM)
        child.wait_for("stopping")
        with pytest.raises(ConnectionRefusedError):
            call(child.port, "GET", "/healthz")
        os.kill(process, second)
        assert child.ended() == 128 + second


EARLY = {"an import": ([], "ipaddress", -signal.SIGINT), "the import of the client": (["--client", "early:x"], "early", 130),
         "the making of the client": (["--client", "cli_providers:interrupted"], "", 130)}  # fmt: skip


@pytest.mark.parametrize(("argv", "module", "code"), EARLY.values(), ids=EARLY)
def test_an_interrupt_before_it_serves_ends_it_without_a_traceback(argv: list[str], module: str, code: int, tmp_path: Path) -> None:
    if module:  # Python finds it in the place of the real one
        (tmp_path / f"{module}.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nraise AssertionError\n")
    with Child(*argv, PYTHONPATH=str(tmp_path)) as child:
        assert child.ended() == code
    assert [line for line in child.lines if "WARNING" not in line and "INFO" not in line] == []


def test_a_signal_while_the_senders_start_is_a_stop_like_any_other(db: Path, tmp_path: Path) -> None:
    ids = fill(db, 3)
    (tmp_path / "stopping.py").write_text(
        "import os, signal, threading\nfrom cli_providers import Late\nstart = threading.Thread.start\n"
        "def start_and_signal(thread):\n    start(thread)\n"
        "    if thread.name == 'smsproxy-sender-1': os.kill(os.getpid(), signal.SIGTERM)\n"
        "threading.Thread.start = start_and_signal\n"
    )
    with Child("--db", str(db), "--max-delay", "0", "--client", "stopping:Late", PYTHONPATH=str(tmp_path)) as child:
        assert child.ended() == 0
    statuses, waiting = kept(db, ids)
    assert (statuses, waiting) in (({MessageStatus.DELIVERED}, 0), ({MessageStatus.ACCEPTED}, 3))


def test_a_hangup_reads_the_keys_again_and_bad_ones_change_nothing(keys: Path) -> None:
    def open_to(child: Child) -> list[str]:
        return [key for key in ("key-of-the-file", "new-key") if call(child.port, "GET", "/sms/x", key=key)[0] == 200]

    with Child("--api-keys-file", str(keys)) as child:
        assert open_to(child) == ["key-of-the-file"]
        keys.write_text("a b c")
        child.process.send_signal(signal.SIGHUP)
        child.wait_for("ERROR .* the API keys stay as they were: .*line 1")
        assert open_to(child) == ["key-of-the-file"]
        keys.write_text("shop new-key")
        child.process.send_signal(signal.SIGHUP)
        child.wait_for("API keys read again: shop")
        assert open_to(child) == ["new-key"]
        assert child.end() == 0
    assert [key for key in ("key-of-the-file", "new-key") if key in child.log] == []


def test_a_hangup_does_not_end_a_service_without_keys_and_cannot_close_it(tmp_path: Path) -> None:
    with Child() as child:
        child.wait_for("listening on")
        child.process.send_signal(signal.SIGHUP)
        child.wait_for("API keys read again: none")
        assert len(child.post(1)) == 1
        assert child.end() == 0


def test_of_two_processes_with_one_port_the_loser_sends_nothing(db: Path, tmp_path: Path) -> None:
    ids = fill(db, 3)
    taken = tmp_path / "taken"
    with Child() as winner:
        argv = ["--db", str(db), "--max-delay", "0", "--client", "recording_provider:make_client"]
        with Child(*argv, SMSPROXY_PORT=str(winner.port), RECORDING_FILE=str(taken)) as loser:
            assert loser.ended() == 1
    assert (taken.read_text(), "handed over" in loser.log) == ("", False)
    assert kept(db, ids) == ({MessageStatus.ACCEPTED}, 3)


def test_a_second_process_on_the_same_database_is_refused_and_a_check_is_not(db: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Child("--db", str(db)) as child:
        child.wait_for("listening on")
        code, line = failed(capsys, "--port", "0", "--db", str(db))
        assert (code, str(db) in line, "another process" in line) == (1, True, True)
        assert ended(capsys, "--check", "--db", str(db))[0] == 0
        assert len(child.post(1)) == 1  # the first one does not mind
        assert child.end() == 0


@pytest.mark.parametrize(("limit", "connections"), [("-S -n 64", 1000), ("-n 300", 172), ("-n 64", 1)])
def test_the_limit_of_open_files_is_raised_or_fewer_connections_are_allowed(limit: str, connections: int) -> None:
    with Child(before=("sh", "-c", f'ulimit {limit} && exec "$@"', "sh")) as child:
        metrics = call(child.port, "GET", "/metrics")[1]
        assert f"\nsmsproxy_http_connections_limit {connections}\n" in metrics
        assert child.end() == 0
    warned = re.search(rf"WARNING .* {connections} connections at a time in place of 1000", child.log)
    assert bool(warned) == (connections < 1000)


def test_everything_can_be_set_by_the_environment_and_no_key_number_or_text_is_in_the_log(keys: Path) -> None:
    environ = {"PORT": "0", "LOG_FORMAT": "json", "LOG_LEVEL": "debug", "BATCH_SIZE": "1", "API_KEYS": "env-key,other-key",
               "API_KEYS_FILE": str(keys), "CLIENT": "cli_providers:Rejecting", "MAX_DELAY": ""}  # fmt: skip
    with Child(**{f"SMSPROXY_{name}": value for name, value in environ.items()}) as child:
        found = [call(child.port, "POST", "/sms", GOOD, key)[0] for key in ("env-key", "other-key", "key-of-the-file", "env-key-typo")]
        child.wait_for(r"(?s)(gave up 1 messages.*){3}")  # what is given up during the drain would make it a 1
        assert (found, child.end()) == ([202, 202, 202, 401], 0)
    docs = [json.loads(line) for line in child.lines]
    assert {tuple(doc)[:5] for doc in docs} == {("time", "level", "logger", "thread", "message")}
    assert sum("gave up 1 messages" in doc["message"] for doc in docs) == 3
    assert "DEBUG" in {doc["level"] for doc in docs}
    assert [secret for secret in ("env-key", "other-key", "key-of-the-file", NUMBER, TEXT) if secret in child.log] == []
