"""Flags and environment variables become one value with all settings.

`read_settings` ends the process with one line and exit code 2 when a setting is wrong, unknown or misspelt. No line
shows an API key, a secret, or any part of a URL.
"""
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import importlib
import math
import operator
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, cast
from urllib.parse import unquote

from fastsmsing import FastSmsingClient
from process_control import EndedBySignal
from smsproxy import RETENTION, SmsProxyConfig, ValidationError, WebhookConfig, WebhookTarget, webhook_secrets

__all__ = [
    "FLAGS", "KeySource", "Settings", "VARIABLES", "__version__", "is_url", "program", "read_secrets", "read_settings",
]  # fmt: skip

__version__ = "0.2.0"

MOST = 1_000_000_000  # the largest number of any flag: 31 years in seconds, which every clock and database can add
SHORTEST_KEY = 16  # characters of an API key: 95 bits if they are random letters and digits
QUOTED = 40  # characters of a wrong value that are shown
LIKE_A_URL = re.compile(r"://|:.*@|password\s*=", re.DOTALL | re.IGNORECASE)  # or like a connection string
PATH = re.compile(r"\.{0,2}/(?!/)|[A-Za-z]:[\\/]")  # how a name begins that can be nothing else
FLAG = re.compile(r"(--[A-Za-z][A-Za-z0-9-]*|-[A-Za-z])(=.*)?", re.DOTALL)  # and its value
KEYS_FILE = "argument --api-keys-file"
SECRET_FILE = "argument --webhook-secret-file"
KEYS_VARIABLE = "environment variable SMSPROXY_API_KEYS"


# Kinds of values


def number(
    kind: type, low: float = -math.inf, high: float = MOST, *, above: bool = False, optional: bool = False
) -> Callable[[str], Any]:
    """A flag's type: a number within bounds, or `none` where the setting can be off; `above` excludes `low` itself."""

    def parse(text: str) -> Any:
        if optional and text.lower() in ("none", "off"):
            return None
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if low <= value <= high and not (above and value == low):
            return value
        noun = "a whole number" if kind is int else "a number"
        bounds = f"{low:.0f} to {high:.0f}" if low > -math.inf else f"at most {high:.0f}"
        bounds = f"more than {low:.0f} and at most {high:.0f}" if above else bounds
        raise argparse.ArgumentTypeError(f"{shown(text)} is not {noun}, {bounds}{', or none' if optional else ''}")

    return parse


def shown(text: str) -> str:
    """A wrong value as messages show it: nothing of what may hold a password."""
    if LIKE_A_URL.search(text):
        return "this value"
    return repr(text if len(text) <= QUOTED else text[:QUOTED] + "...")


def words(value: str) -> str:
    """A flag's type: a non-empty string."""
    if not value:
        raise argparse.ArgumentTypeError("must not be empty")
    return value


def choice(*values: str) -> Callable[[str], str]:
    """A flag's type: one of a few words."""

    def parse(value: str) -> str:
        if value.lower() not in values:
            raise argparse.ArgumentTypeError(f"{shown(value)} is not one of {', '.join(values)}")
        return value.lower()

    return parse


def is_url(db: str | None) -> bool:
    """Whether the database is PostgreSQL."""
    return (db or "").startswith(("postgresql://", "postgres://"))


def database(value: str) -> str:
    """A flag's type: a file, or the URL of a PostgreSQL database. What only resembles a URL or a connection string is
    refused: SQLite would make a file of that name. The message does not show it, since it may hold a password."""
    text = unquote(words(value))
    if not is_url(value) and (LIKE_A_URL.search(text) or (re.search("[:=]", text) and not PATH.match(text))):
        raise argparse.ArgumentTypeError(
            "must be a SQLite file (./NAME if the name has a colon or an equals sign) or a postgresql:// URL"
        )
    return value


def receiver(value: str) -> WebhookTarget:
    """A flag's type: the URL of the webhook's receiver. The message does not show it, since it may hold a password."""
    try:
        return WebhookTarget.of(value)
    except ValidationError as error:
        raise argparse.ArgumentTypeError(error.problem) from None


# Flags

Flag = tuple[str, Callable[[str], Any], "str | None", str]  # name, kind, default as it would be written, meaning

FLAGS: dict[str, tuple[Flag, ...]] = {
    "serving": (
        ("host", words, "127.0.0.1", "address to listen on"),
        ("port", number(int, 0, 65535), "8080", "port to listen on; 0 picks a free one and logs it"),
        ("max-connections", number(int, 1), "1000", "connections open at a time"),
        ("api-keys-file", words, None, "file with API keys, one a line, as NAME KEY; SIGHUP reads it again"),
    ),
    "batching": (
        ("batch-size", number(int), "100", "the most messages in one request; 1 or less: no batching"),
        ("max-delay", number(float, 0, optional=True), "5",
         "longest linger of a message that does not say its own, in seconds; none: it waits for a full batch"),
        ("senders", number(int, 1), "4", "requests to the provider at a time"),
        ("max-pending", number(int, 1), "100000", "messages accepted and not yet handed over; more get a 503"),
    ),
    "the provider": (
        ("client", words, "fastsmsing:InMemoryClient", "MODULE:FACTORY that makes the FastSmsingClient"),
        ("max-attempts", number(int, optional=True), "100", "tries per batch, or none for no limit"),
        ("backoff-base", number(float, 0), "0.5", "seconds before the second try; doubled for each one after it"),
        ("backoff-max", number(float, 0), "30", "the longest wait between two tries, in seconds"),
        ("max-age", number(float, 0, above=True, optional=True), "none",
         "seconds after which a message that does not say its own is not sent any more"),
    ),
    "keeping": (
        ("db", database, None, "SQLite file or postgresql:// URL that keeps messages and statuses (default: memory)"),
        ("retention", number(float, 0), f"{RETENTION:g}", "seconds to remember a message after a change; 0: for ever"),
        ("lease", number(float, 3), "30", "PostgreSQL: seconds until others send the batches of a dead process"),
    ),
    "the webhook": (
        ("webhook-url", receiver, None, "http or https URL that is told of every change of a status"),
        ("webhook-secret-file", words, None, "file with one or two whsec_ secrets that sign; SIGHUP reads it again"),
    ),
    "running": (
        ("drain-timeout", number(float, 0), "10", "seconds to hand over what is pending when told to stop"),
        ("log-level", choice("debug", "info", "warning", "error"), "info", "least level that is logged"),
        ("log-format", choice("text", "json"), "text", "text for people, json for machines"),
    ),
}  # fmt: skip


def _variable(flag: str) -> str:
    return "SMSPROXY_" + flag.upper().replace("-", "_")


VARIABLES = {"SMSPROXY_API_KEYS"} | {_variable(name) for flags in FLAGS.values() for name, *_ in flags}

# What Kubernetes puts into the environment of each container for a Service whose name begins with "smsproxy".
SERVICE_LINK = re.compile(
    r"""SMSPROXY(_\w+)?_(
        SERVICE_HOST=[0-9A-Fa-f.:]+ | SERVICE_PORT(_\w+)?=\d+
      | PORT(_\d+_(TCP|UDP|SCTP))?=(tcp|udp|sctp)://.+
      | PORT_\d+_(TCP|UDP|SCTP)_(PROTO=(tcp|udp|sctp) | PORT=\d+ | ADDR=[0-9A-Fa-f.:]+)
    )""",
    re.VERBOSE,
)


# API keys


@dataclass(frozen=True, slots=True)
class KeySource:
    """Where API keys come from: a file, and a list from the environment."""

    file: str | None = None
    listed: str = field(default="", repr=False)  # separated by commas

    def read(self) -> dict[str, str]:
        """The keys by name; {} when there is no source. Raises `ValidationError`, which shows nothing that it read."""
        keys: dict[str, str] = {}
        for source, place, name, key in (*self._in_environment(), *self._in_file()):
            if not (re.fullmatch("[!-~]+", key) and name.isprintable()):
                raise ValidationError(source, f"{place} must hold visible ASCII characters only")
            if len(key) < SHORTEST_KEY:
                raise ValidationError(source, f"{place} has a key of less than {SHORTEST_KEY} characters")
            if name in keys:
                raise ValidationError(source, f"{place} has the name of another key")
            keys[name] = key
        if (self.file or self.listed) and not keys:  # meant to be guarded: do not open it
            raise ValidationError(KEYS_FILE if self.file else KEYS_VARIABLE, "has no key")
        return keys

    def _in_environment(self) -> Iterator[tuple[str, str, str, str]]:
        for place, key in enumerate(self.listed.split(","), 1):
            if key.strip():
                yield KEYS_VARIABLE, f"key {place}", f"environment {place}", key.strip()

    def _in_file(self) -> Iterator[tuple[str, str, str, str]]:
        """Each key with its source, its place there and its name; a line that begins with # is a comment."""
        lines = text_of(self.file, KEYS_FILE).splitlines() if self.file else []
        for place, line in enumerate(lines, 1):
            given = line.split()
            if not given or given[0].startswith("#"):
                continue
            if len(given) > 2:
                raise ValidationError(KEYS_FILE, f"line {place} must have NAME KEY, or KEY alone")
            yield KEYS_FILE, f"line {place}", given[0] if len(given) == 2 else f"line {place}", given[-1]


def text_of(file: str, source: str) -> str:
    """What the file holds; raises `ValidationError`, which shows nothing of it."""
    try:
        return Path(file).read_text("utf-8")
    except OSError as error:
        raise ValidationError(source, f"{file} cannot be read: {error.strerror}") from None
    except ValueError:  # its text quotes what was read
        raise ValidationError(source, f"{file} is no text in UTF-8") from None


def read_secrets(file: str) -> tuple[bytes, ...]:
    """What the webhook signs with; raises `ValidationError`, which shows nothing of it."""
    text = text_of(file, SECRET_FILE)
    try:
        return webhook_secrets(text)
    except ValidationError as error:
        raise ValidationError(SECRET_FILE, f"{file} {error.problem}") from None


# Settings


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings of a start, checked."""

    check: bool
    host: str
    port: int
    max_connections: int
    keys: KeySource
    api_keys: Mapping[str, str] = field(repr=False)  # what `keys` held, by name
    client: str
    make_client: Callable[[], FastSmsingClient] = field(repr=False)  # what `client` names
    config: SmsProxyConfig
    db: str | None = field(repr=False)  # it may hold a password
    retention: float
    lease: float
    webhook: WebhookConfig | None
    webhook_secret_file: str | None
    drain_timeout: float
    log_level: str
    log_format: str
    service_links: Sequence[str]  # variables that Kubernetes put into the environment, which are no settings


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Exit 2, as argparse does, without the usage, and without a value that belongs to no flag."""
        message, ignored, _ = message.partition("ignored explicit argument")
        self.exit(2, f"{self.prog}: error: {message}{'takes no value' if ignored else ''}\n")


def program() -> str:
    """What this program was started as: main.py, the single file, or the command."""
    name = Path(sys.argv[0]).name
    return name if name == "main.py" or name.startswith("smsproxy") else "smsproxy"


def read_settings(argv: Sequence[str] | None, environ: Mapping[str, str]) -> Settings:
    """The settings; a flag beats the environment. Exits with 2 and one line when one is wrong."""
    given, links = _variables(environ)
    parser = _parser(given)
    _refuse_variables(parser, given)
    parsed, surplus = parser.parse_known_args(argv)
    if surplus:  # named without their values: a misspelt --db has a password
        flags = [found[1] for found in map(FLAG.fullmatch, surplus) if found]
        parser.error(f"unrecognized arguments{': ' if flags else ' without a flag'}{' '.join(flags)}")
    options = vars(parsed)
    if options.pop("max_batch_size") is not None:
        parser.error("argument --max-batch-size: is gone; --batch-size is the most messages in one request")
    try:
        config = SmsProxyConfig(**{spec.name: options.pop(spec.name) for spec in dataclasses.fields(SmsProxyConfig)})
        make_client = load(options["client"])
    except ValidationError as error:
        parser.error(f"argument --{error.field.replace('_', '-')}: {error.problem}")
    keys = KeySource(options.pop("api_keys_file"), given.get(_variable("api-keys"), ""))
    try:
        api_keys = keys.read()
        options["webhook"] = _webhook(options.pop("webhook_url"), options["webhook_secret_file"])
    except ValidationError as error:
        parser.error(f"{error.field}: {error.problem}")
    options.update(config=config, make_client=make_client, keys=keys, api_keys=api_keys, service_links=links)
    return Settings(**options)


def _webhook(target: WebhookTarget | None, secret_file: str | None) -> WebhookConfig | None:
    if target is None and secret_file is None:
        return None
    if target is None:
        raise ValidationError(SECRET_FILE, "needs --webhook-url")
    if secret_file is None:
        raise ValidationError("argument --webhook-url", "needs --webhook-secret-file")
    return WebhookConfig(target, read_secrets(secret_file))


def _variables(environ: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Our variables with their values, and the names of those that Kubernetes made."""
    ours = {name: value for name, value in environ.items() if name.startswith("SMSPROXY_")}
    links = [name for name, value in ours.items() if SERVICE_LINK.fullmatch(f"{name}={value}")]
    return {name: value for name, value in ours.items() if name not in links}, sorted(links)


def _refuse_variables(parser: Parser, given: Mapping[str, str]) -> None:
    for variable in sorted(given):
        if variable not in VARIABLES:
            nearest = difflib.get_close_matches(variable, VARIABLES, 1, 0.0)[0]
            parser.error(f"unknown environment variable {variable}; did you mean {nearest}?")
        if not given[variable].strip():
            parser.error(f"environment variable {variable} is empty; unset it for the default")


def _parser(given: Mapping[str, str]) -> Parser:
    parser = Parser(
        prog=program(),
        description="Takes text messages one by one and hands them to FastSMSing in batches, each one paid request.",
        epilog="Every setting can come from the environment, too: --max-delay from SMSPROXY_MAX_DELAY, and so on.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"smsproxy {__version__}")
    parser.add_argument("--check", action="store_true", help="check settings, client and database, then exit")
    parser.add_argument("--max-batch-size", nargs="?", const="", help=argparse.SUPPRESS)
    for title, flags in FLAGS.items():
        group = parser.add_argument_group(title)
        for name, kind, default, meaning in flags:
            value = given.get(_variable(name), default)
            meaning += f" (default: {default})" if default else ""
            group.add_argument(f"--{name}", type=kind, default=value, help=meaning, metavar=name.split("-")[-1].upper())
    return parser


def load(factory: str) -> Callable[[], FastSmsingClient]:
    """The callable that `MODULE:FACTORY` names; modules are found in the working directory, too. Raises
    `ValidationError`, also for whatever the module's own code raises."""
    module, _, name = factory.partition(":")
    if not module or not name:
        raise ValidationError("client", f"{shown(factory)} is not MODULE:FACTORY, such as shop:Client")
    with contextlib.suppress(OSError):  # the directory is gone
        sys.path.append(os.getcwd())
    try:
        found: Any = operator.attrgetter(name)(importlib.import_module(module))
    except EndedBySignal:
        raise
    except BaseException as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValidationError("client", f"{shown(factory)} cannot be loaded as MODULE:FACTORY: {why}") from None
    if not callable(found):
        raise ValidationError("client", f"{shown(factory)} is not callable")
    return cast(Callable[[], FastSmsingClient], found)
