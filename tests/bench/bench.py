"""Loads this service and its peers with wrk, one fresh server per run, in turns, and prints what they made of it.

    python tests/bench/bench.py --servers ours,aiohttp,fastapi --cells post:16,get:64,post:16:close

A cell is METHOD:CONNECTIONS, with `:close` for a connection to each request. The server has one core and wrk
another, unless `--unpinned`. Figures are medians over the rounds; the ratio is that of requests per second
to the server named last, of the same round. Linux only.
"""
from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MAIN = HERE.parent.parent / "main.py"
SERVERS = {  # command after the interpreter; {port} and {dir}, a fresh directory, are filled in
    "ours": [str(MAIN), "--port", "{port}"],
    "durable": [str(MAIN), "--port", "{port}", "--db", "{dir}/bench.db"],
    "durable-single": [str(HERE / "single_commits.py"), "--port", "{port}", "--db", "{dir}/bench.db"],
    "fastapi": [str(HERE / "peer_fastapi.py"), "{port}"],
    "aiohttp": [str(HERE / "peer_aiohttp.py"), "{port}"],
    "naive": [str(HERE / "peer_naive.py"), "{port}"],
}
ERRORS = ("connect", "read", "write", "status", "timeout")
START = 20.0  # seconds a server may take to answer its first request


def post(port: int) -> str:
    """Sends one message; returns its ID."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        body = '{"PhoneNumber": "48123456789", "Content": "Your parcel is here"}'
        connection.request("POST", "/sms", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        document = json.loads(response.read())
    finally:
        connection.close()
    if response.status != 202:
        raise RuntimeError(f"answered {response.status}: {document}")
    return str(document["ID"])


def free_port() -> int:
    """A port of the loopback that the system gives to nobody by itself, so that nobody is faster."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as sock, suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port


@contextmanager
def running(name: str, pin: Sequence[str], python: str, directory: str) -> Iterator[tuple[int, int]]:
    """Starts a server; its port and process ID."""
    port = free_port()
    command = [part.format(port=port, dir=directory) for part in SERVERS[name]]
    server = subprocess.Popen(
        [*pin, python, *command], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        end = time.monotonic() + START
        while True:
            try:
                post(port)
                break
            except OSError:
                with suppress(subprocess.TimeoutExpired):
                    server.wait(0.05)  # which ends it at once when the server does
                if server.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"{name} did not start") from None
        yield port, server.pid
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(3)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def load(cell: str, port: int, ids: Sequence[str], seconds: int, pin: Sequence[str]) -> dict[str, Any]:
    """One run of wrk, as the Lua script reports it."""
    method, connections, *flags = cell.split(":")
    command = [*pin, "wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "5s", "-s", str(HERE / "sms.lua"),
               f"http://127.0.0.1:{port}", "--", method, *(flags or ["keep"]), *ids]  # fmt: skip
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    result: dict[str, Any] = json.loads(output[output.index("{") :])
    return result


def measure(name: str, cell: str, options: argparse.Namespace) -> dict[str, float]:
    """One run on a fresh server: requests per second, latency in ms, memory in MiB, errors."""
    pins = [[], []] if options.unpinned else [["taskset", "-c", "0"], ["taskset", "-c", "1"]]
    with contextlib.ExitStack() as undo:
        directory = undo.enter_context(tempfile.TemporaryDirectory(dir=options.dir))
        port, pid = undo.enter_context(running(name, pins[0], options.python, directory))
        ids = [post(port) for _ in range(50)]
        load(cell, port, ids, 1, pins[1])  # to warm up
        result = load(cell, port, ids, options.seconds, pins[1])
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return {
        "rate": result["requests"] / result["microseconds"] * 1e6,
        "p50": result["p50"] / 1e3,
        "p99": result["p99"] / 1e3,
        "memory": pages * os.sysconf("SC_PAGESIZE") / 2**20,
        "errors": sum(result[kind] for kind in ERRORS),
    }


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--servers", default="ours,aiohttp,fastapi", help=f"of: {', '.join(SERVERS)}")
    parser.add_argument("--cells", default="post:16,get:16,post:64,post:256,get:256,post:16:close")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=5, help="of each run")
    parser.add_argument("--unpinned", action="store_true", help="leave the cores to the system, as users do")
    parser.add_argument("--python", default=sys.executable, help="interpreter of all servers")
    parser.add_argument("--dir", help="where databases go; the disk decides about the durable servers")
    options = parser.parse_args()
    names, cells = options.servers.split(","), options.cells.split(",")
    if unknown := [name for name in names if name not in SERVERS]:
        parser.error(f"unknown server {unknown[0]}")
    for tool in ("wrk",) if options.unpinned else ("wrk", "taskset"):
        if shutil.which(tool) is None:
            parser.error(f"{tool} is not installed")
    print("| cell | server | requests/s | ratio | p50, ms | p99, ms | memory, MiB | errors |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    for cell in cells:
        runs: dict[str, list[dict[str, float]]] = defaultdict(list)
        for _ in range(options.rounds):
            for name in names:
                runs[name].append(measure(name, cell, options))
        for name in names:
            median = {key: statistics.median(run[key] for run in runs[name]) for key in runs[name][0]}
            pairs = zip(runs[name], runs[names[-1]], strict=True)
            ratio = statistics.median(run["rate"] / base["rate"] for run, base in pairs)
            errors = sum(run["errors"] for run in runs[name])
            print(f"| {cell} | {name} | {median['rate']:,.0f} | {ratio:.2f} | {median['p50']:.2f} | {median['p99']:.2f}"
                  f" | {median['memory']:.0f} | {errors:.0f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
