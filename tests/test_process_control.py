"""The process and what surrounds it, without the service; signals are tried in processes of their own."""
from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from helpers import HANG, TESTS
from process_control import (
    JsonFormatter,
    ProcessError,
    Signals,
    TextFormatter,
    allowed_connections,
    notify,
    passed_socket,
    within,
)

# Log lines


def test_a_line_of_the_log_begins_with_its_time_and_cannot_be_forged() -> None:
    try:
        raise ValueError("zażółć\nline two \x1b[2J\x85")
    except ValueError:
        said = ("no\r\n2026 %s", ("\x1b[31m\x85\u2028ż",), sys.exc_info())
    record = logging.LogRecord("smsproxy", logging.ERROR, "", 0, *said)
    lines = TextFormatter().format(record).split("\n")
    assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d ERROR ", lines[0])
    assert lines[0].endswith(r" smsproxy: no\r\n2026 \x1b[31m\x85\u2028ż")
    assert (lines[1], lines[-1]) == ("    Traceback (most recent call last):", r"    line two \x1b[2J\x85")
    assert {line[:4] for line in lines[1:]} == {"    "}
    assert all(line.isprintable() for line in lines)
    text = JsonFormatter().format(record)
    doc = json.loads(text)
    assert "\n" not in text
    assert (doc["level"], doc["logger"], doc["message"]) == ("ERROR", "smsproxy", record.getMessage())
    assert "ValueError: zażółć\nline two \x1b[2J\x85" in doc["exception"]
    assert text.isascii()
    assert text.isprintable()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", doc["time"])


# systemd

OWN = {"LISTEN_PID": str(os.getpid())}


def test_without_a_socket_for_this_very_process_none_is_taken() -> None:
    for environ in ({}, {"LISTEN_PID": "1", "LISTEN_FDS": "1"}, OWN, OWN | {"LISTEN_FDS": "0"}):
        assert passed_socket(environ) is None


@pytest.mark.parametrize("count", ["2", "x"])
def test_more_than_one_socket_is_refused(count: str) -> None:
    with pytest.raises(ProcessError, match=f"^one listening socket can be handed over, not {count}$"):
        passed_socket(OWN | {"LISTEN_FDS": count})


@pytest.mark.parametrize(("kind", "said"), [
    ("socket.socket()", "the socket that was handed over does not listen"),
    ("open('/dev/null')", "what was handed over as a socket is none: Socket operation on non-socket"),
    ("socket.create_server(('127.0.0.1', 0))", "listens: True, inherited: False")])  # fmt: skip
def test_only_a_socket_that_listens_is_taken(kind: str, said: str) -> None:
    program = (
        f"import os, socket\nfrom process_control import *\nkind = {kind}\nos.dup2(kind.fileno(), 3)\n"
        "try:\n    taken = passed_socket({'LISTEN_PID': str(os.getpid()), 'LISTEN_FDS': '1'})\n"
        "    print(f'listens: {taken.getsockname()[1] > 0}, inherited: {taken.get_inheritable()}')\n"
        "except ProcessError as error:\n    print(error)\nos._exit(0)\n"
    )
    command = [sys.executable, "-c", f"import sys\n{program}".replace("os._exit", "sys.stdout.flush()\nos._exit")]
    done = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True, timeout=HANG, check=False)
    assert (done.stdout, done.stderr) == (f"{said}\n", "")


@pytest.mark.parametrize("name", ["{path}/notify", "@smsproxy-test"])
def test_systemd_is_told_at_its_path_or_its_abstract_name_and_nobody_else_is(name: str, tmp_path: Path) -> None:
    address = name.format(path=tmp_path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(address.replace("@", "\0"))
        receiver.settimeout(HANG)
        notify({"NOTIFY_SOCKET": address}, "READY=1")
        assert receiver.recv(100) == b"READY=1"
    notify({"NOTIFY_SOCKET": address}, "nobody listens")
    notify({}, "nobody listens")


# Time


def test_a_call_that_hangs_is_left_alone_and_others_return_or_raise() -> None:
    ended = threading.Event()
    with pytest.raises(TimeoutError):
        within(0.01, ended.wait)
    ended.set()
    assert within(HANG, lambda: "done") == "done"
    with pytest.raises(KeyError):
        within(HANG, lambda: os.environ["MISSING"])


# File descriptors


@pytest.mark.parametrize(("limit", "connections"), [("-S -n 64", 1000), ("-n 300", 172), ("-n 64", 1)])
def test_the_limit_of_open_files_is_raised_or_fewer_connections_are_allowed(limit: str, connections: int) -> None:
    program = "from process_control import *; print(allowed_connections(1000))"
    command = ["sh", "-c", f'ulimit {limit} && exec "$@"', "sh", sys.executable, "-c", program]
    done = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True, timeout=HANG, check=False)
    assert int(done.stdout) == connections
    warned = f"at most {connections} connections at a time, not 1000" in done.stderr
    assert warned == (connections < 1000)


def test_where_the_limit_suffices_nothing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    assert (allowed_connections(1), caplog.records) == (1, [])


# Signals

PROGRAM = """\
import os, signal, sys, threading, time
import process_control
from process_control import Reactions, Signals
process_control.OVERRUN = process_control.EXIT_TIME = 0.2
def nothing(): pass
def kill(*numbers):
    for number in numbers:
        os.kill(os.getpid(), number)
over = threading.Event()
with Signals() as signals:
    {body}
print("not reached", flush=True)
"""
SERVES = "signals.react(Reactions({stop}, lambda: print('reload', flush=True), {wake}, {takes})); "


def outcome(body: str) -> tuple[int, str, str]:
    """Exit code and output of a program that does this under `Signals`."""
    command = [sys.executable, "-c", PROGRAM.replace("{body}", body)]
    done = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True, timeout=HANG, check=False)
    return done.returncode, done.stdout, done.stderr


def serving(stop: str = "nothing", takes: float = 100.0, wake: str = "nothing") -> str:
    return SERVES.format(stop=stop, takes=takes, wake=wake)


WAIT = "threading.Event().wait()"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_it_serves_ends_it_quietly(number: int) -> None:
    assert outcome(f"kill({int(number)})") == (128 + number, "", "")


def test_a_signal_while_it_serves_is_a_stop_and_a_hangup_a_reload() -> None:
    body = "kill(signal.SIGHUP, signal.SIGTERM); over.wait(); signals.exiting(7); sys.exit(7)"
    assert outcome(serving(stop="over.set") + body) == (7, "reload\n", "")


def test_a_signal_wakes_what_the_main_thread_waits_in() -> None:
    assert outcome(serving(wake="over.set") + "kill(signal.SIGHUP); over.wait(); sys.exit(3)") == (3, "reload\n", "")


def test_a_hangup_before_it_serves_does_nothing() -> None:
    assert outcome("kill(signal.SIGHUP); sys.exit(3)") == (3, "", "")


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_at_once(first: int, second: int) -> None:
    assert outcome(serving() + f"kill({int(first)}, {int(second)}); {WAIT}") == (128 + second, "", "")


def test_a_second_signal_ends_it_also_while_the_main_thread_hangs_in_a_call_of_the_system() -> None:
    later = "threading.Timer(0.0, kill, (signal.SIGTERM, signal.SIGINT)).start(); "
    code, *output = outcome(serving() + later + "signal.sigwait([signal.SIGUSR1])")  # no handler of Python's runs in it
    assert (code in (128 + signal.SIGTERM, 128 + signal.SIGINT), output) == (True, ["", ""])


def test_an_end_that_overruns_its_deadline_is_cut_short_with_a_line() -> None:
    code, out, err = outcome(serving(takes=0.0) + f"kill(signal.SIGTERM); {WAIT}")
    assert (code, out, err) == (1, "", "the end took too long, and is cut short\n")


def test_an_end_that_keeps_to_its_deadline_is_not_cut_short() -> None:
    body = "kill(signal.SIGTERM); over.wait(0.3); signals.exiting(0); sys.exit(0)"  # longer than OVERRUN
    assert outcome(serving(takes=100.0) + body) == (0, "", "")


def test_a_start_that_swallows_the_signal_is_cut_short_as_if_it_had_not() -> None:
    body = f"\n    try: kill(signal.SIGTERM)\n    except SystemExit: {WAIT}"
    assert outcome(body) == (128 + signal.SIGTERM, "", "")


@pytest.mark.parametrize("code", [0, 1])
def test_an_exit_that_a_thread_holds_up_is_cut_short_with_its_own_code(code: int) -> None:
    body = "kill(signal.SIGTERM); over.wait(); threading.Thread(target=threading.Event().wait).start(); "
    exits = f"signals.exiting({code}); sys.exit({code})"
    assert outcome(serving(stop="over.set") + body + exits) == (code, "", "")


def test_without_an_end_everything_is_put_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
    threads = set(threading.enumerate())
    with Signals():
        assert len(set(threading.enumerate()) - threads) == 1
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)] == before
    assert signal.set_wakeup_fd(-1) == -1
    assert set(threading.enumerate()) == threads
