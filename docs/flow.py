"""Draws the life of a message: `python docs/flow.py` writes flow.svg beside this file."""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

WIDTH, HEIGHT = 920, 400  # pixels
BOXES = {  # name: x, y, width, height, lines of text
    "shop": (20, 40, 130, 80, ("the shop",)),
    "front": (290, 40, 190, 80, ("HTTP: one loop", "http_front.py", "restapi.py")),
    "repository": (
        620, 40, 280, 170, ("repository", "statuses, and the outbox in order", "memory, SQLite file", "or PostgreSQL"),
    ),
    "senders": (620, 290, 280, 80, ("senders 1 to 4", "behind one circuit breaker")),
    "provider": (20, 290, 130, 80, ("FastSMSing",)),
    "updater": (290, 170, 190, 60, ("status updater",)),
}
ARROWS = (  # points, text, where the text is, how it is anchored
    (((150, 60), (290, 60)), "POST /sms", (220, 52), "middle"),
    (((480, 60), (620, 60)), "save, in groups", (550, 52), "middle"),
    (((290, 100), (150, 100)), "202 and the ID", (220, 118), "middle"),
    (((620, 100), (480, 100)), "saved", (550, 118), "middle"),
    (((650, 210), (650, 290)), "claim: 100 wait, or", (660, 242), "start"),
    ((), "the oldest is due", (660, 260), "start"),
    (((870, 290), (870, 210)), "handed over", (860, 278), "end"),
    (((620, 315), (150, 315)), "one paid request for up to 100 messages", (385, 307), "middle"),
    (((150, 350), (620, 350)), "failed: the breaker opens; one request at a time tries again", (385, 368), "middle"),
    (((85, 290), (85, 200), (290, 200)), "delivery reports", (95, 192), "start"),
    (((480, 185), (620, 185)), "new statuses", (550, 177), "middle"),
    (((620, 330), (590, 330), (590, 215), (480, 215)), "given up, with a reason", (582, 270), "end"),
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
