"""What an outage of FastSMSing costs: the real batching client in virtual time, over five seeds; prints a table.

    python tests/outage_report.py [--seeds 5]

The shop sends 20 messages a second, all settings have their defaults, and a request takes 0.3 s. FastSMSing is gone
some 20 s after the start. *Requests meanwhile* are those that fail, each of them perhaps billed. *The next request
afterwards* is the longest time from the moment that FastSMSing is back until a request starts.
"""
from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from simulation import Shop, World, away

__all__ = ["outage", "report"]

BEGIN = 20.0, 1.0  # seconds; and so much later for each seed, since a batch leaves every 5 s
OUTAGES = {"1 s": 1.0, "5 s": 5.0, "30 s": 30.0, "60 s": 60.0, "30 min": 1800.0}
HEAD = """\
| FastSMSing is away for | messages `FAILED` | requests meanwhile | the next request afterwards |
|---|---:|---:|---:|"""


def outage(seconds: float, seed: int) -> tuple[int, int, float]:
    """How many messages are `FAILED` after an outage, how many requests failed, and when the next one started."""
    begin = BEGIN[0] + BEGIN[1] * seed
    world, end = World(), begin + seconds
    shop = Shop(world, away(begin, end), latency=0.3, seed=seed)
    shop.load(end + 40.0, rate=2.0)
    shop.stop()
    if not shop.delivered_once():
        raise RuntimeError("a message was lost or sent twice")
    failed = sum(not request.ok for request in shop.requests)
    return len(shop.failed), failed, min(request.start for request in shop.requests if request.start >= end) - end


def report(seeds: Sequence[int]) -> Iterator[str]:
    """The lines of the table, one by one."""
    yield from HEAD.splitlines()
    for name, seconds in OUTAGES.items():
        failed, requests, waits = zip(*(outage(seconds, seed) for seed in seeds), strict=True)
        spread = f"{min(requests)}" if min(requests) == max(requests) else f"{min(requests)} to {max(requests)}"
        yield f"| {name} | {max(failed)} | {spread} | {max(waits):.1f} s |"


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description="What an outage of FastSMSing costs.")
    parser.add_argument("--seeds", type=int, default=5, help="how many random backoffs to try (default: 5)")
    logging.disable()  # every failure
    for line in report(range(parser.parse_args(argv).seeds)):
        print(line, flush=True)


if __name__ == "__main__":
    main()
