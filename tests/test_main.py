"""The command: settings, what it says at the start, and how it ends, in this process and as one of its own."""
from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

import main
import providers
from fastsmsing import InMemoryClient, Message
from helpers import HANG, TESTS, Child, request, serving
from providers import Recorder
from restarts import Service
from smsproxy import Entry, MessageStatus, SmsProxy, SmsProxyConfig, SmsProxyError
from sqlite_repository import SqliteRepository

NUMBER, TEXT = "48123456789", "Your parcel is here"
GOOD = {"PhoneNumber": NUMBER, "Content": TEXT}


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


def variable(name: str) -> str:
    return f"SMSPROXY_{name.upper().replace('-', '_')}"


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
    "client": ("fastsmsing:InMemoryClient", "providers:Late", "providers:Late", (
        "", "nowhere:Client", "fastsmsing:Nothing", "fastsmsing", ":x", "fastsmsing:", "main:__version__", ".x:y",
        "a b:c d", "providers:nothing")),
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
REFUSED: list[tuple[list[str], dict[str, str], str]] = [
    *[([f"--{name}={value}"], {}, f"argument --{name}: ") for name, value in BAD],
    *[([], {variable(name): value}, f"argument --{name}: ") for name, value in BAD if value],
    *[([], {"SMSPROXY_API_KEYS": keys}, "argument --api-keys-file: ")
      for keys in ("zqx vkw", "good,zqx\tvkw", "zqxę", ",", " , ,")],
    *[(argv.split(), {}, argv.split()[0]) for argv in ("--unknown 1", "surplus", "--max-d 1", "--port")],
    *[(argv.split(), {}, "--batch-size is the most messages in one request")
      for argv in ("--max-batch-size", "--max-batch-size 100", "--max-batch-size=x")],
    *[([], {f"SMSPROXY_{wrong}": "x"}, f"variable SMSPROXY_{wrong}; did you mean SMSPROXY_{right}?\n")
      for wrong, right in (("CLEINT", "CLIENT"), ("MAXDELAY", "MAX_DELAY"), ("API_KEY", "API_KEYS"))],
]  # fmt: skip


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text("shop key-of-the-file\n")
    return path


def refused(capsys: pytest.CaptureFixture[str], argv: list[str], environ: dict[str, str]) -> str:
    """The one line that these settings are refused with."""
    with pytest.raises(SystemExit) as exit:
        main.parse_args(argv, environ)
    out, err = capsys.readouterr()
    assert (exit.value.code, out, err.count("\n"), err[-1], err[:16]) == (2, "", 1, "\n", "main.py: error: ")
    assert [key for key in ("zqx", "vkw", "good") if key in err] == [], "it shows a key"
    return str(err[16:])


@pytest.mark.parametrize("name", FLAGS)
def test_a_setting_comes_from_its_flag_or_its_variable_or_is_the_default(name: str, keys: Path) -> None:
    default, value, meaning, bad = FLAGS[name]
    value, meaning = (str(keys),) * 2 if name == "api-keys-file" else (value, meaning)
    cases: list[tuple[list[str], dict[str, str], object]] = [
        ([], {}, default), ([f"--{name}", value], {}, meaning), ([], {variable(name): value}, meaning),
        ([f"--{name}", value], {variable(name): bad[-1] or "another"}, meaning), ([], {variable(name): ""}, default),
    ]  # fmt: skip
    for argv, environ, expected in cases:
        assert getattr(main.parse_args(argv, environ), name.replace("-", "_")) == expected, (argv, environ)


@pytest.mark.parametrize(("argv", "environ", "said"), REFUSED)
def test_a_setting_that_is_wrong_unknown_or_gone_is_one_line_that_names_it(
    argv: list[str], environ: dict[str, str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refused(capsys, argv, environ)


@pytest.mark.parametrize(("argv", "expected"), [
    ("--batch-size 3 --max-delay off --senders 2 --max-pending 50 --max-attempts none --max-age NONE --backoff-max 7",
     SmsProxyConfig(3, None, 2, 50, None, 0.5, 7.0, None)),
    ("--batch-size 0 --max-attempts -1", SmsProxyConfig(1, max_attempts=1))])  # fmt: skip
def test_the_settings_make_the_configuration(argv: str, expected: SmsProxyConfig) -> None:
    assert main.parse_args(argv.split(), {}).config == expected


@pytest.mark.parametrize("text", ["", " first , second,,"])
def test_keys_come_from_the_environment_and_from_the_file_by_name(text: str, keys: Path) -> None:
    keys.write_text("third\n\n  shop   fourth  \r\nbatch\tfi,fth")
    of_text = ["first", "second"] if text else []
    assert list(main.parse_args([], {"SMSPROXY_API_KEYS": text}).api_keys.values()) == of_text
    found = main.parse_args(["--api-keys-file", str(keys)], {"SMSPROXY_API_KEYS": text}).api_keys
    assert list(found.values()) == [*of_text, "third", "fourth", "fi,fth"]
    assert (found["shop"], found["batch"]) == ("fourth", "fi,fth")


@pytest.mark.parametrize("content", [
    b"zqx vkw three", "zqxęvkw".encode(), b"zqx\x00vkw", b"zqx\xffvkw", b"\xef\xbb\xbfzqxvkw", b"\n \n",
    b"shop zqx\nshop vkw"])  # fmt: skip
def test_a_bad_keys_file_is_a_line_with_no_key(content: bytes, keys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys.write_bytes(content)
    assert refused(capsys, ["--api-keys-file", str(keys)], {}).startswith("argument --api-keys-file: ")


def test_help_groups_the_flags_shows_their_defaults_and_nothing_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SMSPROXY_API_KEYS", "secret-key")
    code, out, err = ended(capsys, "--help")
    assert (code, err, "secret-key" in out) == (0, "", False)
    groups = re.findall(r"^([a-z ]+):$", out, re.MULTILINE)
    assert groups[-5:] == ["serving", "batching", "the provider", "keeping", "running"]
    texts = dict(re.findall(r"^  --([a-z-]+) ((?:.|\n   )*)", out, re.MULTILINE))
    assert set(FLAGS) | {"version", "check"} == set(texts)
    for name, (default, *_) in FLAGS.items():
        text = {"db": "memory", "max-age": "none"}.get(name, f"{default:g}" if type(default) is float else str(default))
        shown = re.findall(r"\(default: (.*?)\)", " ".join(texts[name].split()))
        assert (name, shown) == (name, [] if name == "api-keys-file" else [text])


def test_version_says_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(capsys, "--version") == (0, f"smsproxy {main.__version__}\n", "")


# Starts that fail, --check, and what is said at the start


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


def test_a_check_needs_no_port_and_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--check", "--db", str(tmp_path / "new.db"), "--client", "providers:Late"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, out, err = ended(capsys, *argv, "--port", str(taken.getsockname()[1]))
    assert (code, "good" in out, err, list(tmp_path.iterdir())) == (0, True, "", [])


@pytest.mark.parametrize("code", ["raise KeyError('TOKEN')\n", "x = = 1\n"])
def test_a_client_whose_module_cannot_be_imported_is_one_line_and_exit_2(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken_at_import.py").write_text(code)
    assert refused(capsys, ["--client", "broken_at_import:x"], {}).startswith("argument --client: ")


def test_a_client_is_found_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shop_of_this_test.py").write_text("class A:\n    from fastsmsing import InMemoryClient\n")
    assert main.parse_args(["--client", "shop_of_this_test:A.InMemoryClient"], {}).make_client is InMemoryClient


CHECKED = ["--client providers:broken", "--client providers:demanding", "--client builtins:dict", "--db {keys}"]
UNCHECKED = ["192.0.2.1", "::ffff:ffff", "a..b", "x" * 70, "1.2.3.4.5"]


@pytest.mark.parametrize("argv", [
    *[f"{argv} --check" for argv in CHECKED], *CHECKED, *[f"--host {host}" for host in UNCHECKED]])  # fmt: skip
def test_a_start_that_cannot_succeed_is_one_line(argv: str, keys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, line = failed(capsys, "--port", "0", *argv.format(keys=keys).split())
    assert (code, "--db" not in argv or str(keys) in line) == (1, True)


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
    assert err.endswith(": error: cannot start: PostgreSQL needs psycopg (psycopg): pip install 'smsproxy[postgres]'\n")


def test_where_the_port_is_taken_nothing_is_sent_and_the_client_is_stopped(
    db: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ids, client = fill(db, 3), Recorder()  # a real one may have threads that would keep the process alive
    monkeypatch.setattr(providers, "Late", lambda: client)
    argv = ["--client", "providers:Late", "--db", str(db), "--max-delay", "0"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, line = failed(capsys, *argv, "--port", str(taken.getsockname()[1]))
    assert (code, "in use" in line, client.stopped.is_set(), client.batches) == (1, True, True, [])
    assert kept(db, ids) == ({MessageStatus.ACCEPTED}, 3)


ALONE = "WARNING .* without API keys"
SAID = [  # flags, what may be said, whether it is
    ("--batch-size 7 --max-delay 2.5", f"INFO .* smsproxy {main.__version__}: .*batch_size=7 .*max_delay=2.5", True),
    ("", "WARNING .* nothing is sent to anybody", True), ("--client providers:Late", "nothing is sent to", False),
    ("", "INFO .* a restart loses them", True), ("--db {keys}.db", "a restart loses them", False),
    *[(f"--host {host}", ALONE, True) for host in ("0.0.0.0", "::", "192.0.2.1", "::1ffe", "localhost.example.com")],
    *[(f"--host {host}", ALONE, False) for host in ("::1", "localhost", "0.0.0.0 --api-keys-file {keys}")],
    ("--host 0.0.0.0 --log-level warning", "WARNING", True), ("--log-level warning", "INFO", False),
    ("--host 0.0.0.0 --log-level error", ".", False),
]  # fmt: skip


@pytest.mark.parametrize(("argv", "pattern", "expected"), SAID)
def test_a_start_tells_its_settings_and_what_is_risky_about_them(
    argv: str, pattern: str, expected: bool, keys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["--check", *argv.format(keys=keys).split()]) == 0
    assert bool(re.search(pattern, capsys.readouterr().err)) == expected


def test_a_line_of_the_log_begins_with_its_time_and_cannot_be_forged() -> None:
    try:
        raise ValueError("zażółć\nline two")
    except ValueError:
        said = ("no\r\n2026 %s", ("\x1b[31m\x85\u2028ż",), sys.exc_info())
    record = logging.LogRecord("smsproxy", logging.ERROR, "", 0, *said)
    lines = main.TextFormatter().format(record).splitlines()
    assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d ERROR ", lines[0])
    assert lines[0].endswith(r" smsproxy: no\r\n2026 \x1b[31m\x85\u2028ż")
    assert (lines[1], lines[-1]) == ("Traceback (most recent call last):", "line two")
    line = main.JsonFormatter().format(record)
    doc = json.loads(line)
    assert "\n" not in line
    assert (doc["level"], doc["logger"], doc["message"]) == ("ERROR", "smsproxy", record.getMessage())
    assert "ValueError: zażółć\nline two" in doc["exception"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", doc["time"])


def test_only_one_socket_that_was_handed_to_this_very_process_is_taken() -> None:
    own = {"LISTEN_PID": str(os.getpid())}
    for environ in ({}, {"LISTEN_PID": "1", "LISTEN_FDS": "1"}, own):
        assert main.passed_socket(environ) is None
    with pytest.raises(SmsProxyError, match="one listening socket"):
        main.passed_socket(own | {"LISTEN_FDS": "2"})


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


def test_it_serves_on_the_socket_handed_over_and_says_when_it_is_ready_and_when_it_stops(tmp_path: Path) -> None:
    command = [sys.executable, str(TESTS.parent / "main.py"), "--port", "1"]
    with contextlib.closing(Service(tmp_path, command)) as service:
        service.start()
        assert request(SimpleNamespace(server_address=("127.0.0.1", service.port)), "POST", "/sms", GOOD)[0] == 202
        assert service.process is not None
        service.process.send_signal(signal.SIGTERM)
        service.wait_for("STOPPING=1")
        assert service.process.wait(HANG) == 0


def post(child: Child, count: int) -> list[str]:
    """The IDs of so many messages, all accepted."""
    return [request(child, "POST", "/sms", GOOD)[1]["ID"] for _ in range(count)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_in_memory_a_signal_flushes_what_lingers_and_the_end_is_0(number: int) -> None:
    with Child("--max-delay", "none", "--client", "providers:Late") as child:
        ids = post(child, 3)
        assert child.end(number) == 0
    assert f"handed over 3 messages at attempt 1: {' '.join(ids)}" in child.log


@pytest.mark.parametrize(("client", "timeout"), [("Down", "0.2"), ("Rejecting", "10"), ("Hanging", "0.1")])
def test_in_memory_the_end_is_1_and_names_what_was_not_handed_over(client: str, timeout: str) -> None:
    argv = ["--max-delay", "none", "--client", f"providers:{client}", "--drain-timeout", timeout]
    with Child("--batch-size", "10", *argv) as child:
        ids = post(child, 6)
        assert child.end() == 1
    assert "6 messages could not be handed over" in child.log
    assert [message_id for message_id in ids if message_id not in child.log] == []


def test_a_durable_end_is_0_at_once_and_the_next_start_sends_the_rest_in_order(db: Path) -> None:
    with Child("--max-delay", "none", "--client", "providers:Late", "--db", str(db)) as child:
        ids = post(child, 3)
        assert child.end() == 0
    assert "3 messages wait in the outbox for the next start" in child.log
    assert kept(db, ids) == ({MessageStatus.ACCEPTED}, 3)
    with Child("--max-delay", "0", "--client", "providers:Late", "--db", str(db)) as child:
        child.wait_for(f"handed over 3 messages at attempt 1: {' '.join(ids)}")
        assert child.end() == 0
    assert kept(db, ids) == ({MessageStatus.DELIVERED}, 0)


def test_a_durable_end_with_a_provider_that_hangs_is_1_and_loses_nothing(db: Path) -> None:
    ids = fill(db, 3)
    argv = ["--max-delay", "0", "--drain-timeout", "0.1", "--client", "providers:Hanging", "--db", str(db)]
    with Child(*argv) as child:
        child.wait_for("the provider hangs")
        assert child.end() == 1
    assert kept(db, ids) == ({MessageStatus.ACCEPTED}, 3)


def test_a_client_that_does_not_read_does_not_eat_the_drain() -> None:
    argv = ["--max-delay", "none", "--client", "providers:Late", "--drain-timeout", str(4 * HANG)]
    with Child(*argv) as child, socket.create_connection(child.server_address) as reader:
        ids = post(child, 1)
        reader.settimeout(0.2)  # nobody reads, so this is when everything is full
        with contextlib.suppress(TimeoutError):
            while True:
                reader.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 1_000)
        assert child.end() == 0
    assert f"handed over 1 messages at attempt 1: {ids[0]}" in child.log


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_while_it_drains_nobody_can_connect_and_a_second_signal_ends_it_at_once(second: int) -> None:
    argv = ["--batch-size", "1", "--client", "providers:Hanging", "--drain-timeout", str(4 * HANG)]
    with Child(*argv) as child:
        post(child, 1)
        child.wait_for("the provider hangs")
        child.process.send_signal(signal.SIGTERM)
        child.wait_for("stopping")
        with pytest.raises(ConnectionRefusedError):
            request(child, "GET", "/healthz")
        assert child.end(second) == 128 + second  # by its own hand: a signal's default action does nothing as PID 1


@pytest.mark.parametrize(("factory", "module", "code"), [
    ("early:x", "ipaddress", -signal.SIGINT), ("early:x", "early", 130), ("providers:interrupted", "unused", 130)])
def test_an_interrupt_before_it_serves_ends_it_quietly(factory: str, module: str, code: int, tmp_path: Path) -> None:
    interrupt = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nraise AssertionError\n"
    (tmp_path / f"{module}.py").write_text(interrupt)  # Python finds it in the place of one of its own
    with Child("--client", factory, path=tmp_path) as child:
        assert child.ended() == code
    assert [line for line in child.log.splitlines() if "WARNING" not in line and "INFO" not in line] == []


def test_a_signal_while_the_senders_start_is_a_stop_like_any_other(db: Path, tmp_path: Path) -> None:
    ids = fill(db, 3)
    (tmp_path / "stopping.py").write_text(
        "import os, signal, threading\nfrom providers import Late\nstart = threading.Thread.start\n"
        "def start_and_signal(thread):\n    start(thread)\n"
        "    if thread.name == 'smsproxy-sender-1': os.kill(os.getpid(), signal.SIGTERM)\n"
        "threading.Thread.start = start_and_signal\n"
    )
    with Child("--db", str(db), "--max-delay", "0", "--client", "stopping:Late", path=tmp_path) as child:
        assert child.ended() == 0
    statuses, waiting = kept(db, ids)
    assert (statuses, waiting) in (({MessageStatus.DELIVERED}, 0), ({MessageStatus.ACCEPTED}, 3))


def test_a_hangup_reads_the_keys_again_and_bad_ones_change_nothing(keys: Path) -> None:
    def open_to(child: Child) -> list[str]:
        headers = {key: {"Authorization": f"Bearer {key}"} for key in ("key-of-the-file", "new-key")}
        return [key for key in headers if request(child, "GET", "/sms/x", None, headers[key])[0] == 200]

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


def test_a_service_without_keys_stays_open(keys: Path) -> None:
    with serving(SmsProxy(Recorder())) as server:
        main.reload_keys(server, str(keys), {})
        assert request(server, "GET", "/sms/x")[0] == 200


@pytest.mark.parametrize(("limit", "connections"), [("-S -n 64", 1000), ("-n 300", 172), ("-n 64", 1)])
def test_the_limit_of_open_files_is_raised_or_fewer_connections_are_allowed(limit: str, connections: int) -> None:
    with Child(before=("sh", "-c", f'ulimit {limit} && exec "$@"', "sh")) as child:
        metrics = request(child, "GET", "/metrics")[1]
        assert f"\nsmsproxy_http_connections_limit {connections}\n".encode() in metrics
        assert child.end() == 0
    warned = re.search(rf"WARNING .* {connections} connections at a time in place of 1000", child.log)
    assert bool(warned) == (connections < 1000)


def test_everything_can_be_set_by_the_environment_and_no_key_number_or_text_is_in_the_log(keys: Path) -> None:
    environ = {"LOG_FORMAT": "json", "LOG_LEVEL": "debug", "BATCH_SIZE": "1", "API_KEYS": "env-key,other-key",
               "API_KEYS_FILE": str(keys), "CLIENT": "providers:Rejecting", "MAX_DELAY": ""}  # fmt: skip
    with Child(**{f"SMSPROXY_{name}": value for name, value in environ.items()}) as child:
        found = [request(child, "POST", "/sms", GOOD, {"Authorization": f"Bearer {key}"})[0]
                 for key in ("env-key", "other-key", "key-of-the-file", "env-key-typo")]  # fmt: skip
        child.wait_for(r"(?s)(gave up 1 messages.*){3}")  # what is given up during the drain would make it a 1
        assert (found, child.end()) == ([202, 202, 202, 401], 0)
    docs = [json.loads(line) for line in child.log.splitlines()]
    assert {tuple(doc)[:5] for doc in docs} == {("time", "level", "logger", "thread", "message")}
    assert sum("gave up 1 messages" in doc["message"] for doc in docs) == 3
    assert "DEBUG" in {doc["level"] for doc in docs}
    assert [secret for secret in ("env-key", "other-key", "key-of-the-file", NUMBER, TEXT) if secret in child.log] == []
