"""Flags and environment variables: what each is worth, and what is refused in which words."""
from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path

import pytest

from command_line import FLAGS, KeySource, Settings, __version__, read_settings
from fastsmsing import InMemoryClient
from smsproxy import SmsProxyConfig, ValidationError, WebhookConfig, WebhookTarget, webhook_secrets

HUGE = "9" * 400  # digits, as a number of which no float is
SHOP, BATCH = "key-of-the-shop!", "key-of-the-batch"  # just long enough


@pytest.fixture(autouse=True)
def as_main(monkeypatch: pytest.MonkeyPatch) -> None:
    """The name that messages begin with, and the path, which gets the working directory, are as at a start."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["/somewhere/main.py"])


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(f"shop {SHOP}\n")
    return path


def variable(name: str) -> str:
    return f"SMSPROXY_{name.upper().replace('-', '_')}"


URL = "postgresql://u:hunter2@h/db"
MANGLED = (  # by quotes of an environment file, by a typing error, or without the scheme
    f'"{URL}"', f"'{URL}'", f" {URL}", f":{URL}", f"<{URL}>", f"/{URL}", f"./{URL}", f"\ufeff{URL}", f"db={URL}",
    "u:hunter2@h/db", "//u:hunter2@h/db", "/u:hunter2@h/db", "postgresql:/u:hunter2@h/db", "u:hun@\nhunter2@h",
    "'host=h password=hunter2'", '"host=h password=hunter2"', "/host=h Password = hunter2", "? password=hunter2",
    URL.replace(":", "%3A").replace("/", "%2f"), "jdbc:" + URL,
)  # fmt: skip

# Flag → its default, a good value, what that means, bad values.
TABLE: dict[str, tuple[object, str, object, tuple[str, ...]]] = {
    "host": ("127.0.0.1", "0.0.0.0", "0.0.0.0", ("",)),
    "port": (8080, "9090", 9090, ("", "x", "-1", "65536", "80.5", "nan", HUGE, "0x50")),
    "max-connections": (1000, "7", 7, ("", "0", "-1", "1.5", "many", HUGE)),
    "api-keys-file": (None, "{keys}", "{keys}", ("", "/nowhere/keys", "/")),
    "batch-size": (100, "7", 7, ("", "x", "1.5", "inf", "9" * 5000)),
    "max-delay": (5.0, "2.5", 2.5, ("", "x", "-1", "nan", "inf", "-0.1")),
    "senders": (4, "7", 7, ("", "0", "x", "1.5", HUGE)),
    "max-pending": (100_000, "700", 700, ("", "0", "x", "99", HUGE)),
    "client": ("fastsmsing:InMemoryClient", "providers:Late", "providers:Late", (
        "", "nowhere:Client", "fastsmsing:Nothing", "fastsmsing", ":x", "fastsmsing:", "command_line:__version__",
        ".x:y", "a b:c d", "providers:nothing")),
    "max-attempts": (100, "7", 7, ("", "x", "1.5", HUGE)),
    "backoff-base": (0.5, "0.25", 0.25, ("", "x", "-1", "nan", "inf", "none", "30.1")),
    "backoff-max": (30.0, "60", 60.0, ("", "x", "-1", "nan", "inf", "none")),
    "max-age": (None, "60", 60.0, ("", "x", "-1", "nan", "inf", "0")),
    "db": (None, "some.db", "some.db", ("", "mysql://x/hunter2", "host=x password=hunter2", "POSTGRESQL://hunter2@x/y",
                                        "sqlite:///hunter2", "file:hunter2", "dbname = hunter2", *MANGLED)),
    "retention": (259_200.0, "60", 60.0, ("", "x", "-1", "nan", "inf", "none", "1e12")),
    "lease": (30.0, "10", 10.0, ("", "x", "2.9", "nan", "none", "1e12")),
    "drain-timeout": (10.0, "2.5", 2.5, ("", "x", "-1", "nan", "inf", "none", "1e10")),
    "log-level": ("info", "DEBUG", "debug", ("", "loud", "10")),
    "log-format": ("text", "JSON", "json", ("", "xml")),
}  # fmt: skip
BAD = [(name, value) for name, (*_, values) in TABLE.items() for value in values]
REFUSED: list[tuple[list[str], dict[str, str], str]] = [
    *[([f"--{name}={value}"], {}, f"argument --{name}: ") for name, value in BAD],
    *[([], {variable(name): value}, f"argument --{name}: ") for name, value in BAD if value],
    *[([], {variable(name): value}, f"environment variable {variable(name)} is empty; unset it for the default\n")
      for name in (*TABLE, "api-keys") for value in ("", " ")],
    *[(argv.split(), {}, argv.split()[0]) for argv in ("--unknown 1", "--max-d 1", "--port", "-p 1", "--dbb --port 1")],
    *[([flag, URL], {}, f"unrecognized arguments: {flag}\n") for flag in ("--dbb", "--webhook-urll", "-d")],
    (["--dbb", "hunter2", f"--dbc={URL}"], {}, "unrecognized arguments: --dbb --dbc\n"),
    *[([surplus], {}, "unrecognized arguments without a flag\n")
      for surplus in ("surplus", URL, f"-d{URL}", f"--{URL}")],
    ([f"--check={URL}"], {}, "argument --check: takes no value\n"),
    *[([f"--{name}={URL}"], {}, f"argument --{name}: ") for name in ("port", "log-level", "client", "max-age")],
    *[(argv.split(), {}, "--batch-size is the most messages in one request")
      for argv in ("--max-batch-size", "--max-batch-size 100", "--max-batch-size=x")],
    *[([], {f"SMSPROXY_{wrong}": "x"}, f"variable SMSPROXY_{wrong}; did you mean SMSPROXY_{right}?\n")
      for wrong, right in (("CLEINT", "CLIENT"), ("MAXDELAY", "MAX_DELAY"), ("API_KEY", "API_KEYS"))],
]  # fmt: skip


def line(capsys: pytest.CaptureFixture[str], argv: list[str], environ: dict[str, str]) -> str:
    """The one line that these settings are refused with."""
    with pytest.raises(SystemExit) as end:
        read_settings(argv, environ)
    out, err = capsys.readouterr()
    assert (end.value.code, out, err.count("\n"), err[-1], err[:16]) == (2, "", 1, "\n", "main.py: error: ")
    assert [secret for secret in ("zqx", "vkw", "hunter2") if secret in err] == [], "it shows a secret"
    return str(err[16:])


def value(settings: Settings, flag: str) -> object:
    """What a flag became."""
    name = flag.replace("-", "_")
    if name == "api_keys_file":
        return settings.keys.file
    in_config = name in {each.name for each in dataclasses.fields(SmsProxyConfig)}
    return getattr(settings.config if in_config else settings, name)


@pytest.mark.parametrize("name", TABLE)
def test_a_setting_comes_from_its_flag_or_its_variable_or_is_the_default(name: str, keys: Path) -> None:
    default, given, meaning, bad = TABLE[name]
    given, meaning = (str(keys),) * 2 if name == "api-keys-file" else (given, meaning)
    cases: list[tuple[list[str], dict[str, str], object]] = [
        ([], {}, default), ([f"--{name}", given], {}, meaning), ([], {variable(name): given}, meaning),
        ([f"--{name}", given], {variable(name): bad[-1] or "another"}, meaning),
    ]  # fmt: skip
    for argv, environ, expected in cases:
        assert value(read_settings(argv, environ), name) == expected, (argv, environ)


@pytest.mark.parametrize(("name", "given"), [
    ("port", 0), ("port", 65535), ("senders", 1), ("max-connections", 1_000_000_000), ("lease", 3), ("retention", 0),
    ("drain-timeout", 1e9), ("backoff-base", 30)])  # fmt: skip
def test_a_bound_itself_is_allowed(name: str, given: float) -> None:
    assert value(read_settings([f"--{name}={given:.0f}"], {}), name) == given


@pytest.mark.parametrize(("argv", "environ", "said"), REFUSED)
def test_a_setting_that_is_wrong_unknown_or_gone_is_one_line_that_names_it(
    argv: list[str], environ: dict[str, str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in line(capsys, argv, environ)


NO_DATABASE = "must be a SQLite file (./NAME if the name has a colon or an equals sign) or a postgresql:// URL"


@pytest.mark.parametrize(("argv", "said"), [
    ("--port=x", "argument --port: 'x' is not a whole number, 0 to 65535\n"),
    ("--senders=0", "argument --senders: '0' is not a whole number, 1 to 1000000000\n"),
    ("--batch-size=x", "argument --batch-size: 'x' is not a whole number, at most 1000000000\n"),
    (f"--batch-size={HUGE}", f"argument --batch-size: '{HUGE[:40]}...' is not a whole number, at most 1000000000\n"),
    ("--max-age=0", "argument --max-age: '0' is not a number, more than 0 and at most 1000000000, or none\n"),
    ("--retention=1e12", "argument --retention: '1e12' is not a number, 0 to 1000000000\n"),
    ("--backoff-base=31", "argument --backoff-base: must not be more than backoff_max\n"),
    ("--db=mysql://x/y", f"argument --db: {NO_DATABASE}\n")])  # fmt: skip
def test_what_is_refused_says_what_would_be_right(argv: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert line(capsys, [argv], {}) == said


@pytest.mark.parametrize("db", [
    "/var/lib/sms.db", "./a=b", "./file:x", "/srv/day=1/a:b.db", "../x:y", "a@b.db", "/srv/a@b:c",
    "C:\\sms.db", "postgres://x/y", "postgresql://"])  # fmt: skip
def test_what_can_be_a_database_is_taken(db: str) -> None:
    assert read_settings(["--db", db], {}).db == db


@pytest.mark.parametrize(("argv", "expected"), [
    ("--batch-size 3 --max-delay off --senders 2 --max-pending 50 --max-attempts none --max-age NONE --backoff-max 7",
     SmsProxyConfig(3, None, 2, 50, None, 0.5, 7.0, None)),
    ("--batch-size 0 --max-attempts -1", SmsProxyConfig(1, max_attempts=1))])  # fmt: skip
def test_the_settings_make_the_configuration(argv: str, expected: SmsProxyConfig) -> None:
    assert read_settings(argv.split(), {}).config == expected


def test_the_settings_are_one_frozen_value_that_shows_no_secret() -> None:
    settings = read_settings(["--db", "postgresql://u:hunter2@x/y"], {"SMSPROXY_API_KEYS": SHOP})
    assert [secret for secret in ("hunter2", SHOP) if secret in repr(settings)] == []
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.port = 1  # type: ignore[misc]


# The environment of Kubernetes

LINKS = {
    "SMSPROXY_SERVICE_HOST": "10.0.0.1", "SMSPROXY_SERVICE_PORT": "8080", "SMSPROXY_SERVICE_PORT_HTTP": "8080",
    "SMSPROXY_PORT": "tcp://10.0.0.1:8080", "SMSPROXY_PORT_8080_TCP": "tcp://10.0.0.1:8080",
    "SMSPROXY_PORT_8080_TCP_PROTO": "tcp", "SMSPROXY_PORT_8080_TCP_PORT": "8080",
    "SMSPROXY_PORT_8080_TCP_ADDR": "fd00::1", "SMSPROXY_DB_SERVICE_HOST": "10.0.0.2",
    "SMSPROXY_DB_PORT": "tcp://[fd00::2]:5432", "SMSPROXY_DB_PORT_53_UDP": "udp://10.0.0.2:53",
}  # fmt: skip


def test_what_kubernetes_adds_for_a_service_of_this_name_is_no_setting() -> None:
    settings = read_settings([], LINKS)
    assert (settings.port, settings.db, list(settings.service_links)) == (8080, None, sorted(LINKS))


@pytest.mark.parametrize(("name", "text"), [
    ("SMSPROXY_PORT", "tcp:10"), ("SMSPROXY_SERVICE_HOST", "localhost"), ("SMSPROXY_SERVICE_PORT", "tcp"),
    ("SMSPROXY_PORT_8080", "tcp://x"), ("SMSPROXY_PROT", "tcp://10.0.0.1:8080"),
    ("SMSPROXY_HOST_PORT", "80")])  # fmt: skip
def test_what_only_resembles_a_service_link_is_refused(
    name: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line(capsys, [], {name: text})


# API keys


@pytest.mark.parametrize("listed", ["", f" {'1' * 16} , {'2' * 16},,"])
def test_keys_come_from_the_environment_and_from_the_file_by_name(listed: str, keys: Path) -> None:
    keys.write_text(f"# keys\n{'3' * 16}\n\n  shop   {SHOP}  \r\n #old {'x' * 16}\nbatch\tfi,{BATCH}")
    of_list = ["1" * 16, "2" * 16] if listed else []
    environ = {"SMSPROXY_API_KEYS": listed} if listed else {}
    assert list(read_settings([], environ).api_keys.values()) == of_list
    found = read_settings(["--api-keys-file", str(keys)], environ).api_keys
    assert list(found.values()) == [*of_list, "3" * 16, SHOP, f"fi,{BATCH}"]
    assert (found["shop"], found["batch"]) == (SHOP, f"fi,{BATCH}")


@pytest.mark.parametrize(("content", "said"), [
    (b"zqx vkw three", "line 1 must have NAME KEY, or KEY alone"),
    ("zqxęvkwzqxvkwzqxvkw".encode(), "line 1 must hold visible ASCII characters only"),
    (b"zqx\x00vkwzqxvkwzqxvkw", "line 1 must hold visible ASCII characters only"),
    (b"\xef\xbb\xbfzqxvkwzqxvkwzqxvkw", "line 1 must hold visible ASCII characters only"),
    (b"zqx\xffvkw", "keys is no text in UTF-8"),
    (b"\n# zqxvkwzqxvkwzqxvkw\n", "has no key"),
    (b"\nshop zqxvkwzqxvkwzqx", "line 2 has a key of less than 16 characters"),
    (b"zqxvkwzqxvkwzqxvkw zqxvkwzqxvkwzqxvkw\n" * 2, "line 2 has the name of another key")])  # fmt: skip
def test_a_bad_keys_file_is_a_line_with_no_key(
    content: bytes, said: str, keys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys.write_bytes(content)
    shown = line(capsys, ["--api-keys-file", str(keys)], {})
    assert (shown.startswith("argument --api-keys-file: "), shown.endswith(f"{said}\n")) == (True, True), shown


@pytest.mark.parametrize(("listed", "said"), [
    ("zqx vkw zqx vkw zqx vkw", "key 1 must hold visible ASCII characters only"),
    (f"{SHOP},zqx\tvkwzqxvkwzqxvkw", "key 2 must hold visible ASCII characters only"),
    ("zqxęvkwzqxvkwzqxvkw", "key 1 must hold visible ASCII characters only"),
    ("zqxvkw", "key 1 has a key of less than 16 characters"), (" , ,", "has no key")])  # fmt: skip
def test_bad_keys_in_the_environment_are_a_line_with_no_key(
    listed: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert line(capsys, [], {"SMSPROXY_API_KEYS": listed}) == f"environment variable SMSPROXY_API_KEYS: {said}\n"


def test_keys_are_read_anew_from_the_file_and_the_same_list(keys: Path) -> None:
    source = KeySource(str(keys), BATCH)
    keys.write_text(f"newer {'n' * 16}")
    assert source.read() == {"environment 1": BATCH, "newer": "n" * 16}
    keys.unlink()
    with pytest.raises(ValidationError, match=r"--api-keys-file /.*/keys cannot be read: No such file or directory$"):
        source.read()


# The webhook


HOOK = "https://shop:hunter2@shop.example/zqx?token=vkw"
SECRET = "whsec_" + "MfKQ" * 8


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_text(f"# of the shop\n{SECRET}\n")
    return path


def test_the_webhook_has_a_url_and_secrets_or_is_off(secret: Path) -> None:
    given = {"webhook-url": HOOK, "webhook-secret-file": str(secret)}
    argv = [f"--{name}={value}" for name, value in given.items()]
    for settings in (read_settings(argv, {}), read_settings([], {variable(name): given[name] for name in given})):
        assert settings.webhook == WebhookConfig(WebhookTarget.of(HOOK), webhook_secrets(SECRET))
        assert settings.webhook_secret_file == str(secret)
        assert [each for each in ("hunter2", "zqx", "vkw", "MfKQ") if each in repr(settings)] == []
    assert read_settings([], {}).webhook is None


@pytest.mark.parametrize(("url", "file", "what"), [
    (HOOK, "", "--webhook-url: needs --webhook-secret-file"),
    ("", "{file}", "--webhook-secret-file: needs --webhook-url"),
    ("shop:hunter2@zqx", "{file}", "--webhook-url: must be an http:// or https:// URL"),
    (HOOK, "/nowhere/at/all", "--webhook-secret-file: /nowhere/at/all cannot be read: No such file or directory"),
    (HOOK, "/", "--webhook-secret-file: / cannot be read: Is a directory")])  # fmt: skip
def test_a_webhook_that_lacks_something_is_refused(
    url: str, file: str, what: str, secret: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [f"--webhook-url={url}"] * bool(url) + [f"--webhook-secret-file={file.format(file=secret)}"] * bool(file)
    assert what in line(capsys, argv, {})


@pytest.mark.parametrize("held", [b"", b"whsec_zqx\n", b"zqx\xff", b"\n".join([SECRET.encode()] * 3)])
def test_a_wrong_secret_is_refused_and_not_shown(
    held: bytes, secret: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    secret.write_bytes(held)
    refused = line(capsys, ["--webhook-url", HOOK, "--webhook-secret-file", str(secret)], {})
    assert refused.startswith(f"argument --webhook-secret-file: {secret} ")


# The client


def test_a_client_is_found_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shop_of_this_test.py").write_text("class A:\n    from fastsmsing import InMemoryClient\n")
    assert read_settings(["--client", "shop_of_this_test:A.InMemoryClient"], {}).make_client is InMemoryClient


@pytest.mark.parametrize("given", ["shop", "shop:", ":Client"])
def test_a_client_without_its_module_or_factory_is_refused_with_an_example(
    given: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert line(capsys, ["--client", given], {}).endswith(f"'{given}' is not MODULE:FACTORY, such as shop:Client\n")


@pytest.mark.parametrize("code", ["raise KeyError('TOKEN')\n", "x = = 1\n", "raise SystemExit\n"])
def test_a_client_whose_module_cannot_be_imported_is_one_line_and_exit_2(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken_at_import.py").write_text(code)
    assert line(capsys, ["--client", "broken_at_import:x"], {}).startswith("argument --client: ")


# Help


def test_help_groups_the_flags_shows_their_defaults_and_nothing_of_the_environment(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as end:
        read_settings(["--help"], {"SMSPROXY_API_KEYS": SHOP})
    out, err = capsys.readouterr()
    assert (end.value.code, err, SHOP in out) == (0, "", False)
    groups = re.findall(r"^([a-z ]+):$", out, re.MULTILINE)
    assert groups[-6:] == list(FLAGS)
    texts = dict(re.findall(r"^  --([a-z-]+) ((?:.|\n   )*)", out, re.MULTILINE))
    assert set(TABLE) | {"version", "check", "webhook-url", "webhook-secret-file"} == set(texts)
    for name, (default, *_) in TABLE.items():
        text = {"db": "memory", "max-age": "none"}.get(name, f"{default:g}" if type(default) is float else str(default))
        shown = re.findall(r"\(default: (.*?)\)", " ".join(texts[name].split()))
        assert (name, shown) == (name, [] if name == "api-keys-file" else [text])


def test_version_says_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        read_settings(["--version"], {})
    assert (end.value.code, capsys.readouterr().out) == (0, f"smsproxy {__version__}\n")


@pytest.mark.parametrize(("started_as", "name"), [
    ("main.py", "main.py"), ("/bin/smsproxy", "smsproxy"), ("x/smsproxy.pyz", "smsproxy.pyz"), (".", "smsproxy"),
    ("/x/smsproxy_service/__main__.py", "smsproxy")])  # fmt: skip
def test_it_calls_itself_what_it_was_started_as(
    started_as: str, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [started_as])
    with pytest.raises(SystemExit):
        read_settings(["--port=x"], {})
    assert capsys.readouterr().err.startswith(f"{name}: error: ")
