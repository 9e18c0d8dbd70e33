"""The command: what it says at the start, and how it ends, in this process and as one of its own."""
from __future__ import annotations

import ast
import contextlib
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

import main
import providers
from command_line import __version__
from fastsmsing import Message
from helpers import HANG, TESTS, Child, request
from providers import Recorder
from receivers import SECRETS, Receiver, hanging, secret_line, verified
from restarts import Service
from smsproxy import Entry, MessageStatus, SmsProxyError
from sqlite_repository import SqliteRepository

NUMBER, TEXT = "48123456789", "Your parcel is here"
GOOD = {"PhoneNumber": NUMBER, "Content": TEXT}
SHOP, OTHER = "key-of-the-file!", "another-long-key"


@pytest.fixture(autouse=True)
def undo(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What the command sees and changes of its process, put back: its name, the environment, the path, the logs."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["/somewhere/main.py"])
    for name in [name for name in os.environ if name.startswith("SMSPROXY_")]:
        monkeypatch.delenv(name)
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    root.handlers.clear()  # the command closes what it finds here
    yield
    root.setLevel(level)
    root.handlers[:] = handlers


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(f"shop {SHOP}\n")
    return path


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
    code = main.main(["--log-level", "error", *argv])
    return (code, *capsys.readouterr())


def failed(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    """Exit code and the one line of a command that cannot run."""
    code, out, err = ended(capsys, *argv)
    assert (out, err.count("\n"), err.startswith("main.py: error: cannot start: ")) == ("", 1, True), err
    return code, err[len("main.py: error: cannot start: ") :]


# Starts that fail, --check, and what is said at the start


OLD = [str(python) for python in Path.home().glob(".pyenv/versions/3.[6-9].*/bin/python")]


@pytest.mark.parametrize("name", ["main.py", "__main__.py"])
def test_a_python_that_is_too_old_gets_one_line(name: str) -> None:
    file = TESTS.parent / name
    assert ast.parse(file.read_text(), feature_version=(3, 6))
    for python in OLD:
        done = subprocess.run([python, str(file)], capture_output=True, text=True, timeout=HANG, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (1, "", "smsproxy needs Python 3.10 or newer\n"), python


def test_a_check_needs_no_port_and_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--check", "--db", str(tmp_path / "new.db"), "--client", "providers:Late"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, out, err = ended(capsys, *argv, "--port", str(taken.getsockname()[1]))
    assert (code, "good" in out, err, list(tmp_path.iterdir())) == (0, True, "", [])


def test_a_check_of_a_client_whose_stop_exits_says_so_and_what_is_good(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = ended(capsys, "--check", "--client", "providers:ExitingStop")
    assert (code, "good" in out, "the client did not stop well: SystemExit" in err) == (0, True, True)


@pytest.mark.parametrize(("host", "code"), [("there", 0), ("away", 1)])
def test_a_check_asks_postgresql_without_making_a_repository_there(
    host: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def check_database(url: str) -> None:
        if "away" in url:
            raise SmsProxyError("it is away")

    double = SimpleNamespace(describe_url=str.upper, check_database=check_database)
    monkeypatch.setitem(sys.modules, "postgres", double)
    argv = ["--check", "--client", "providers:Late", "--db", f"postgresql://{host}"]
    assert ended(capsys, *argv)[::2] == (code, "main.py: error: cannot start: it is away\n" * code)


CLIENTS = ["providers:broken", "providers:exiting", "providers:demanding", "builtins:dict"]
CHECKED = [*[f"--client {client}" for client in CLIENTS], "--db {keys}"]
HOSTS = ["192.0.2.1", "::ffff:ffff", "a..b", "x" * 70, "1.2.3.4.5"]
UNCHECKED = ["--client providers:ExitingSubscribe", *[f"--host {host}" for host in HOSTS]]


@pytest.mark.parametrize("argv", [
    *[f"{argv} --check" for argv in CHECKED], *CHECKED, *UNCHECKED])  # fmt: skip
def test_a_start_that_cannot_succeed_is_one_line(argv: str, keys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, line = failed(capsys, "--port", "0", *argv.format(keys=keys).split())
    named = str(keys) if "--db" in argv else argv.split()[-1] if "--host" in argv else ""
    assert (code, named in line) == (1, True)


@pytest.mark.parametrize("argv", [("--check",), ("--port", "0")])
def test_postgresql_without_its_driver_is_one_line_without_the_password(
    argv: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    for name in [name for name in sys.modules if name.split(".")[0] == "postgres"]:
        monkeypatch.delitem(sys.modules, name)
    code = main.main(["--log-level", "debug", *argv, "--db", "postgresql://shop:hunter2@db.example:5432/sms?x=1"])
    out, err = capsys.readouterr()
    assert (code, out, "hunter2" in err, "db=postgresql " in err) == (1, "", False, True)
    line = err.splitlines()[-1]
    assert "error: cannot start: PostgreSQL needs psycopg 3, pip install 'psycopg[binary]': " in line


def test_where_the_port_is_taken_nothing_is_sent_and_the_client_is_stopped(
    db: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ids, client = fill(db, 3), Recorder()  # a real one may have threads that would keep the process alive
    monkeypatch.setattr(providers, "Late", lambda: client)
    argv = ["--client", "providers:Late", "--db", str(db), "--max-delay", "0"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, line = failed(capsys, *argv, "--port", str(port))
    assert (code, line) == (1, f"cannot listen on 127.0.0.1 port {port}: Address already in use\n")
    assert (client.stopped.is_set(), client.batches) == (True, [])
    assert kept(db, ids) == ({MessageStatus.ACCEPTED}, 3)


def test_an_error_of_the_client_names_the_client(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: object) -> None:
        raise OSError("port in use")

    monkeypatch.setattr(providers.Late, "subscribe", fail)
    monkeypatch.setattr(providers.Late, "stop", fail)
    code, out, err = ended(capsys, "--client", "providers:Late", "--port", "0")
    assert (code, out, err.count("\n")) == (1, "", 2)
    assert "the client did not stop well: OSError: port in use\n" in err
    assert err.endswith("cannot start: the client's subscribe failed: OSError: port in use\n")


ALONE = "WARNING .* without API keys"
SAID = [  # flags, what may be said, whether it is
    ("--batch-size 7 --max-delay 2.5", f"INFO .* smsproxy {__version__}: .*batch_size=7 .*max_delay=2.5", True),
    ("--port 7 --drain-timeout 3", "INFO .* drain_timeout=3.0 .*port=7", True), ("", "None", False),
    ("--api-keys-file {keys} --db {keys}.db", "INFO .* api_keys_file={keys} .*db={keys}.db", True),
    ("", "WARNING .* nothing is sent to anybody", True), ("--client providers:Late", "nothing is sent to", False),
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
    err = capsys.readouterr().err.replace(str(keys), "{keys}")
    assert bool(re.search(pattern, err)) == expected


def test_a_start_in_kubernetes_says_once_what_it_ignores(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SMSPROXY_PORT", "tcp://10.0.0.1:8080")
    monkeypatch.setenv("SMSPROXY_SERVICE_HOST", "10.0.0.1")
    assert main.main(["--check"]) == 0
    said = re.findall("ignored, .*: (.*)", capsys.readouterr().err)
    assert said == ["SMSPROXY_PORT SMSPROXY_SERVICE_HOST"]


@pytest.mark.parametrize(("address", "shown"), [
    (("127.0.0.1", 80), "127.0.0.1 port 80"), (("::1", 80, 0, 0), "::1 port 80"),
    ("/run/sms.socket", "the Unix socket /run/sms.socket"), (b"\0sms", "the Unix socket @sms"),
    ("", "the Unix socket without a name")])  # fmt: skip
def test_a_socket_is_logged_readably(address: object, shown: str) -> None:
    assert main.shown_address(address) == shown


def test_it_serves_on_the_socket_handed_over_and_says_when_it_is_ready_and_when_it_stops(tmp_path: Path) -> None:
    command = [sys.executable, str(TESTS.parent / "main.py"), "--port", "1"]
    with contextlib.closing(Service(tmp_path, command)) as service:
        service.start()
        assert request(SimpleNamespace(server_address=("127.0.0.1", service.port)), "POST", "/sms", GOOD)[0] == 202
        assert service.process is not None
        service.process.send_signal(signal.SIGTERM)
        service.wait_for("STOPPING=1")
        assert service.process.wait(HANG) == 0


# The end


def post(child: Child, count: int) -> list[str]:
    """The IDs of so many messages, all accepted."""
    return [request(child, "POST", "/sms", GOOD)[1]["ID"] for _ in range(count)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_in_memory_a_signal_flushes_what_lingers_and_the_end_is_0(number: int) -> None:
    with Child("--max-delay", "none", "--client", "providers:Late") as child:
        ids = post(child, 3)
        assert child.end(number) == 0
    assert f"handed over 3 messages at attempt 1: {' '.join(ids)}" in child.log
    assert "stopped; nothing is left to be handed over" in child.log
    assert "messages and statuses live in memory: a restart loses them" in child.log


@pytest.mark.parametrize(("client", "timeout"), [("Down", "0.2"), ("Hanging", "0.1")])
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
    assert "stopped; for the next start wait in the outbox: 3 messages" in child.log
    assert kept(db, ids) == ({MessageStatus.ACCEPTED}, 3)
    with Child("--max-delay", "0", "--client", "providers:Late", "--db", str(db)) as child:
        child.wait_for(f"handed over 3 messages at attempt 1: {' '.join(ids)}")
        assert child.end() == 0
    assert kept(db, ids) == ({MessageStatus.DELIVERED}, 0)


def test_a_durable_end_with_a_provider_that_hangs_is_1_and_loses_nothing(db: Path) -> None:
    ids = fill(db, 1)
    argv = ["--max-delay", "0", "--drain-timeout", "0.1", "--client", "providers:Hanging", "--db", str(db)]
    with Child(*argv) as child:
        child.wait_for("the provider hangs")
        assert child.end() == 1
    assert "stopped; 1 message could not be handed over" in child.log
    assert kept(db, ids) == ({MessageStatus.ACCEPTED}, 1)


@pytest.mark.parametrize("host", ["away", "hanging"])
def test_a_durable_end_while_the_database_is_away_or_hangs_is_0_all_the_same(host: str) -> None:
    argv = ["--db", f"postgresql://{host}", "--max-delay", "none", "--client", "postgres_double:Late"]
    with Child(*argv) as child:
        post(child, 1)
        assert child.end() == 0
    assert "stopped; for the next start wait in the outbox: an unknown number of messages" in child.log
    assert "cannot start" not in child.log


@pytest.mark.parametrize("host", ["away", "hanging"])
def test_what_was_not_handed_over_is_counted_also_while_the_database_is_away_or_hangs(host: str) -> None:
    argv = ["--db", f"postgresql://{host}", "--max-delay", "0", "--drain-timeout", "0.1"]
    with Child(*argv, "--batch-size", "1", "--client", "postgres_double:Hanging") as child:
        post(child, 1)
        child.wait_for("the provider hangs")
        assert child.end() == 1
    assert "stopped; 1 message could not be handed over" in child.log


@pytest.mark.parametrize(("client", "status"), [("providers:Receiver", 204), ("providers:Recorder", 404)])
def test_a_client_that_takes_pushed_reports_is_given_them(client: str, status: int) -> None:
    with Child("--client", client) as service:
        assert request(service, "POST", "/reports", b"x")[0] == status
        assert service.end() == 0


def test_a_signal_while_the_database_hangs_at_the_start_ends_it_quietly() -> None:
    with Child("--db", "postgresql://hanging-start", "--client", "postgres_double:Late") as child:
        child.wait_for("the database hangs")
        assert child.end() == 128 + signal.SIGTERM
    assert "cannot start" not in child.log


def test_a_client_that_does_not_read_does_not_eat_the_drain() -> None:
    argv = ["--max-delay", "none", "--client", "providers:Late", "--drain-timeout", str(4 * HANG)]
    with Child(*argv) as child, socket.create_connection(child.server_address) as reader:
        ids = post(child, 1)
        reader.settimeout(0.2)  # nobody reads, so this is when everything is full
        with contextlib.suppress(TimeoutError):
            while True:
                reader.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 1_000)
        assert child.end() == 0
    assert re.search(f"handed over 1 messages? at attempt 1: {ids[0]}", child.log)


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
        headers = {key: {"Authorization": f"Bearer {key}"} for key in (SHOP, OTHER)}
        return [key for key in headers if request(child, "GET", "/sms/x", None, headers[key])[0] == 200]

    with Child("--api-keys-file", str(keys)) as child:
        assert open_to(child) == [SHOP]
        keys.write_text("a b c")
        child.process.send_signal(signal.SIGHUP)
        child.wait_for("ERROR .* the API keys stay as they were: .*line 1")
        assert open_to(child) == [SHOP]
        keys.write_text(f"#shop {SHOP}\nshop {OTHER}")
        child.process.send_signal(signal.SIGHUP)
        child.wait_for("API keys read again: shop")
        assert open_to(child) == [OTHER]
        assert child.end() == 0
    assert [key for key in (SHOP, OTHER) if key in child.log] == []


# The webhook


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_text(secret_line(SECRETS[0]))
    return path


def hooked(receiver: Receiver, secret: Path) -> list[str]:
    return ["--webhook-url", receiver.url("/hunter2", "shop:hunter3@"), "--webhook-secret-file", str(secret)]


def test_a_hangup_reads_the_secrets_again_and_bad_ones_change_nothing(secret: Path) -> None:
    with Receiver() as receiver, Child(*hooked(receiver, secret), "--max-delay", "0") as child:

        def told() -> list[bool]:
            """Whether a message's last report is signed with each of the secrets."""
            (message_id,) = post(child, 1)
            receiver.wait_for(lambda requests: receiver.statuses.get(message_id) == "DELIVERED")
            last = receiver.told[-1]
            return [verified(last.headers, last.body, each) for each in SECRETS]

        assert told() == [True, False]
        secret.write_text("whsec_hunter4")
        child.process.send_signal(signal.SIGHUP)
        child.wait_for("ERROR .* the webhook's secrets stay as they were: .*line 1 must be whsec_")
        assert told() == [True, False]
        secret.write_text("\n".join(map(secret_line, reversed(SECRETS))))
        child.process.send_signal(signal.SIGHUP)
        child.wait_for("secrets of the webhook read again: 2")
        assert told() == [True, True]
        assert b'\nsmsproxy_webhook_requests_total{result="error"} 0\n' in request(child, "GET", "/metrics")[1]
        assert child.end() == 0
    assert receiver.backwards == []
    where = f"webhook=http://127.0.0.1:{receiver.server_address[1]} webhook_secret_file={secret}"
    assert re.search(f"INFO .* {where}", child.log)
    assert [each for each in ("hunter", secret_line(SECRETS[0])[6:]) if each in child.log] == []


def test_the_end_in_memory_tells_what_is_left_and_its_code_is_not_the_receivers(secret: Path) -> None:
    argv = ["--max-delay", "none", "--client", "providers:Late"]
    with Receiver() as receiver, Child(*hooked(receiver, secret), *argv) as child:
        ids = post(child, 3)
        assert child.end() == 0
    assert receiver.statuses == dict.fromkeys(ids, "DELIVERED")
    argv += ["--drain-timeout", "0.5"]
    with Receiver(usually=hanging) as receiver, Child(*hooked(receiver, secret), *argv) as child:
        post(child, 3)
        assert child.end() == 0
    assert "stopped before the webhook told 3 changes" in child.log


def test_a_durable_end_leaves_what_is_untold_to_the_next_start(secret: Path, db: Path) -> None:
    argv = ["--max-delay", "0", "--client", "providers:Late", "--db", str(db), "--drain-timeout", "0.5"]
    with Receiver(usually=hanging) as receiver, Child(*hooked(receiver, secret), *argv) as child:
        ids = post(child, 3)
        child.wait_for(f"handed over .*{ids[-1]}")
        assert child.end() == 0  # the provider reports as it stops
    assert "stopped before the webhook" not in child.log
    with Receiver() as receiver, Child(*hooked(receiver, secret), *argv) as child:
        receiver.wait_for(lambda told: receiver.statuses == dict.fromkeys(ids, "DELIVERED"))
        assert child.end() == 0
    assert re.search("told .* as msg_", child.log)


def test_an_outbox_of_changes_that_cannot_be_used_is_not_the_clients_fault(
    secret: Path, db: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def changes(repository: SqliteRepository) -> None:
        raise SmsProxyError("the disk is full")

    monkeypatch.setattr(SqliteRepository, "changes", changes)
    with Receiver() as receiver:
        code, line = failed(capsys, "--port", "0", "--db", str(db), *hooked(receiver, secret))
    assert (code, line) == (1, "the disk is full\n")


def test_a_check_checks_the_webhook_without_a_request(secret: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Receiver() as receiver:
        argv = hooked(receiver, secret)
        assert ended(capsys, "--check", "--client", "providers:Late", *argv)[0] == 0
        secret.write_text("whsec_hunter4")
        with pytest.raises(SystemExit) as end:
            main.main(["--check", *argv])
    assert (end.value.code, receiver.told) == (2, [])
    out, err = capsys.readouterr()
    assert (out, err.count("\n"), "hunter" in err) == ("", 1, False)


def test_the_limit_of_open_files_decides_how_many_connections_there_are() -> None:
    with Child(before=("sh", "-c", 'ulimit -n 300 && exec "$@"', "sh")) as child:
        assert b"\nsmsproxy_http_connections_limit 172\n" in request(child, "GET", "/metrics")[1]
        assert child.end() == 0


def test_everything_can_be_set_by_the_environment_and_no_key_number_or_text_is_in_the_log(keys: Path) -> None:
    environ = {"LOG_FORMAT": "json", "LOG_LEVEL": "debug", "BATCH_SIZE": "1", "CLIENT": "providers:Rejecting",
               "API_KEYS_FILE": str(keys), "API_KEYS": f"{OTHER},key-of-the-environment"}  # fmt: skip
    with Child(environ={f"SMSPROXY_{name}": value for name, value in environ.items()}) as child:
        found = [request(child, "POST", "/sms", GOOD, {"Authorization": f"Bearer {key}"})[0]
                 for key in (OTHER, "key-of-the-environment", SHOP, f"{SHOP}!")]  # fmt: skip
        child.wait_for(r"(?s)(gave up 1 message.*){3}")  # what is given up during the drain would make it a 1
        assert (found, child.end()) == ([202, 202, 202, 401], 0)
    docs = [json.loads(line) for line in child.log.splitlines()]
    assert {tuple(doc)[:5] for doc in docs} == {("time", "level", "logger", "thread", "message")}
    assert sum("gave up 1 message" in doc["message"] for doc in docs) == 3
    assert "DEBUG" in {doc["level"] for doc in docs}
    assert [secret for secret in (OTHER, "key-of-the-environment", SHOP, NUMBER, TEXT) if secret in child.log] == []
