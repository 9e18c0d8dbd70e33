"""Draws the life of a message: `python docs/flow.py` writes flow.svg beside this file."""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

WIDTH, HEIGHT = 950, 440  # pixels
BOXES = {  # name: x, y, width, height, lines of text
    "shop": (20, 40, 120, 80, ("the shop",)),
    "front": (230, 40, 170, 80, ("HTTP: one loop", "http_front", "restapi")),
    "domain": (480, 40, 170, 80, ("the domain", "smsproxy", "batching_client")),
    "repository": (
        740, 40, 190, 210,
        ("repository", "statuses, and the outbox", "in order of due:", "memory, SQLite file", "or PostgreSQL"),
    ),
    "webhook": (230, 180, 170, 70, ("webhook", "webhook_sender")),
    "updater": (480, 180, 170, 70, ("status updater", "status_updater")),
    "provider": (20, 330, 120, 80, ("FastSMSing",)),
    "senders": (480, 330, 170, 80, ("senders 1 to 4", "batch_sender")),
    "dispatcher": (740, 330, 190, 80, ("dispatcher", "batch_dispatcher", "batch_scheduler: rules")),
}  # fmt: skip
ARROWS = (  # points, text, where the text is, how it is anchored
    (((140, 60), (230, 60)), "POST /sms", (185, 52), "middle"),
    (((230, 100), (140, 100)), "202, the ID", (185, 118), "middle"),
    (((400, 60), (480, 60)), "a group", (440, 52), "middle"),
    (((480, 100), (400, 100)), "accepted", (440, 118), "middle"),
    (((650, 60), (740, 60)), "save", (695, 52), "middle"),
    (((740, 100), (650, 100)), "saved", (695, 118), "middle"),
    (((800, 250), (800, 330)), "a batch: the first is due,", (792, 282), "end"),
    ((), "or 100 are near", (792, 300), "end"),
    (((850, 330), (850, 250)), "look", (858, 294), "start"),
    (((740, 355), (650, 355)), "jobs", (695, 347), "middle"),
    (((650, 390), (740, 390)), "ended", (695, 408), "middle"),
    (((480, 355), (140, 355)), "one paid request for up to 100 messages", (310, 347), "middle"),
    (((140, 390), (480, 390)), "taken, rejected, or failed: the breaker opens", (310, 408), "middle"),
    (((60, 330), (60, 300), (520, 300), (520, 250)), "delivery reports", (70, 292), "start"),
    (((580, 330), (580, 250)), "given up", (588, 318), "start"),
    (((650, 215), (740, 215)), "statuses", (695, 207), "middle"),
    (((740, 150), (315, 150), (315, 180)), "changes of a status, as an outbox", (560, 143), "middle"),
    (((230, 215), (80, 215), (80, 120)), "told, signed", (90, 207), "start"),
)


def parts() -> Iterator[str]:
    """The elements of the picture."""
    yield (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
           'font-size="13">')  # fmt: skip
    yield "<title>The life of a message, from POST /sms to its last delivery report</title>"
    yield '<defs><marker id="head" markerWidth="9" markerHeight="8" refX="8" refY="4" orient="auto">'
    yield '<path d="M0 0L9 4L0 8z" fill="#0072b2"/></marker></defs>'
    yield f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>'
    for points, text, (x, y), anchor in ARROWS:
        line = " ".join(f"{across},{down}" for across, down in points)
        if line:
            yield f'<polyline points="{line}" fill="none" stroke="#0072b2" stroke-width="1.5" marker-end="url(#head)"/>'
        yield f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="#444">{text}</text>'
    for x, y, width, height, lines in BOXES.values():
        yield f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="#eef4fa" stroke="#0072b2"/>'
        for number, text in enumerate(lines):
            top = y + height / 2 + 18 * (number - (len(lines) - 1) / 2) + 5
            weight = "normal" if number else "bold"
            yield f'<text x="{x + width / 2}" y="{top}" text-anchor="middle" font-weight="{weight}">{text}</text>'
    yield "</svg>"


def draw() -> str:
    """The picture as SVG."""
    return "\n".join((*parts(), ""))


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(draw())
