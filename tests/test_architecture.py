"""The house's rules that a program can check: who may import whom, how large a room may be, who touches the process."""
from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Set
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = {path.stem: path for path in sorted(ROOT.glob("*.py"))}
POSTGRES = {f"postgres.{path.stem}": path for path in sorted(ROOT.glob("postgres/*.py"))}
PRODUCT = {**MODULES, **POSTGRES}

# What each module may import from the house: what it does import, so a row changes only on purpose.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "__main__": ("main",),
    "main": (
        "command_line", "fastsmsing", "http_front", "http_protocol", "incident_log", "process_control",
        "restapi", "smsproxy", "sqlite_repository", "worker_threads",
    ),
    "command_line": ("fastsmsing", "process_control", "smsproxy"),
    "process_control": (),
    # HTTP
    "restapi": (
        "bulk_requests", "fastsmsing", "http_exchange", "http_protocol", "pushed_reports", "request_decoding",
        "request_groups", "response_counts", "smsproxy",
    ),
    "bulk_requests": ("http_exchange", "http_protocol", "request_decoding", "request_groups", "smsproxy"),
    "pushed_reports": ("fastsmsing", "http_exchange", "http_protocol", "request_groups", "smsproxy"),
    "request_groups": ("http_exchange",),
    "request_decoding": ("http_protocol", "smsproxy"),
    "http_front": ("http_connection", "http_exchange", "http_protocol", "incident_log", "response_counts"),
    "http_connection": ("http_exchange", "http_protocol"),
    "http_exchange": ("http_protocol", "incident_log", "response_counts"),
    "http_protocol": (),
    "response_counts": (),
    # the domain
    "smsproxy": (
        "base_repository", "batch_scheduler", "batching_client", "client_statistics", "fastsmsing",
        "incident_log", "memory_repository", "message_ids", "message_model", "service_metrics",
        "status_updater", "webhook_client", "webhook_message", "webhook_sender", "worker_threads",
    ),
    "batching_client": (
        "base_repository", "batch_dispatcher", "batch_scheduler", "batch_sender", "fastsmsing", "incident_log",
        "message_model", "service_metrics", "worker_threads",
    ),
    "batch_sender": (
        "base_repository", "batch_dispatcher", "batch_scheduler", "circuit_breaker", "fastsmsing", "incident_log",
        "message_model", "service_metrics", "worker_threads",
    ),
    "batch_dispatcher": ("batch_outbox", "batch_scheduler", "incident_log", "message_model", "worker_threads"),
    "batch_scheduler": ("batch_outbox", "circuit_breaker", "fastsmsing", "message_model"),
    "circuit_breaker": (),
    "status_updater": (
        "base_repository", "incident_log", "message_ids", "message_model", "service_metrics", "worker_threads",
    ),
    "webhook_client": (
        "batch_dispatcher", "batch_scheduler", "change_outbox", "incident_log", "message_model", "service_metrics",
        "webhook_sender", "worker_threads",
    ),
    "webhook_sender": ("change_outbox", "incident_log", "webhook_message", "worker_threads"),
    "webhook_message": ("change_outbox", "message_model"),
    "client_statistics": ("incident_log", "message_model"),
    "service_metrics": ("message_model",),
    "incident_log": ("message_ids",),
    "worker_threads": ("incident_log", "message_model"),
    # repositories
    "sqlite_repository": (
        "base_repository", "group_commit", "incident_log", "message_model", "sqlite_changes", "sqlite_file",
        "sqlite_tables",
    ),
    "sqlite_changes": (
        "batch_outbox", "change_outbox", "group_commit", "message_model", "sqlite_file", "sqlite_tables",
    ),
    "sqlite_tables": ("base_repository", "fastsmsing", "message_model", "sqlite_claims", "sqlite_file"),
    "sqlite_claims": ("base_repository", "message_model"),
    "sqlite_file": ("message_model",),
    "group_commit": ("incident_log", "message_model"),
    "memory_repository": ("base_repository", "memory_changes", "memory_outbox", "message_model"),
    "memory_outbox": ("base_repository", "message_model"),
    "memory_changes": ("batch_outbox", "change_outbox", "message_model"),
    "base_repository": ("batch_outbox", "change_outbox", "fastsmsing", "message_model"),
    "change_outbox": ("batch_outbox", "message_model"),
    "batch_outbox": (),
    # values
    "message_model": ("fastsmsing",),
    "message_ids": (),
    "fastsmsing": (),
}
MAY_POSTGRES_IMPORT = ("base_repository", "change_outbox", "fastsmsing", "incident_log", "message_model")

ROLES = {"smsproxy", "restapi", "fastsmsing", "main", "__main__"}  # the names that were given; others have two words
# Rules: decided from what they are told.
PURE = {"batch_scheduler", "circuit_breaker", "http_protocol", "message_model", "webhook_message"}
IMPURE = {"threading", "socket", "selectors", "time", "logging", "queue"}
SETTING_SIGNALS = ("signal.signal", "signal.set_wakeup_fd", "signal.pthread_sigmask", "signal.setitimer")
ASKS = {"postgres/tests/cluster.py"}  # it waits for what another process does, which can only be asked for
LIMITS = {"module": 300, "class": 200, "function": 40}  # lines of code, without blank ones, comments and docstrings
# What is still larger, with its lines at the most; each is to be split, and leaves this table then.
TOO_LARGE: dict[str, int] = {}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


@cache
def imported(path: Path) -> frozenset[str]:
    """The top-level names that a file imports from anywhere but its own package."""
    names: set[str] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return frozenset(names)


def uses(path: Path, *dotted: str) -> list[str]:
    """Which of these names, each with its module, a file uses."""
    used = {ast.unparse(node) for node in ast.walk(tree(path)) if isinstance(node, (ast.Attribute, ast.Name))}
    used |= {f"{node.module}.{alias.name}" for node in ast.walk(tree(path))
             if isinstance(node, ast.ImportFrom) for alias in node.names}  # fmt: skip
    return [name for name in dotted if name in used]


# Imports


def test_the_table_has_a_row_for_every_module_and_for_nothing_else() -> None:
    assert sorted(MAY_IMPORT) == sorted(MODULES)


@pytest.mark.parametrize("name", sorted(MODULES.keys() & MAY_IMPORT.keys()))
def test_a_module_imports_what_the_table_says_and_the_table_says_nothing_else(name: str) -> None:
    assert sorted(imported(MODULES[name]) & MODULES.keys()) == sorted(MAY_IMPORT[name])


def test_postgres_imports_what_the_table_says_and_the_table_says_nothing_else() -> None:
    found = {name for path in POSTGRES.values() for name in imported(path)} & MODULES.keys()
    assert sorted(found) == sorted(MAY_POSTGRES_IMPORT)


def test_imports_run_in_no_circle() -> None:
    houses = ({name: imported(path) & MODULES.keys() for name, path in MODULES.items()},
              {name: set(_siblings(path)) for name, path in POSTGRES.items()})  # fmt: skip
    for house in houses:
        assert set(TopologicalSorter(house).static_order()) == house.keys()


def _siblings(path: Path) -> Iterator[str]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield f"postgres.{node.module}"


def test_only_postgres_imports_anything_from_outside_and_only_psycopg() -> None:
    def foreign(names: Set[str]) -> set[str]:
        return set(names - sys.stdlib_module_names - MODULES.keys())

    assert {name: foreign(imported(path)) for name, path in MODULES.items() if foreign(imported(path))} == {}
    assert {name for path in POSTGRES.values() for name in foreign(imported(path))} == {"psycopg"}


def test_modules_with_rules_import_nothing_that_waits_or_tells_the_time() -> None:
    found = {name: imported(MODULES[name]) & IMPURE for name in PURE & MODULES.keys()}
    assert [name for name, names in found.items() if names] == [], found


def test_the_name_of_a_module_has_two_words_so_that_it_hides_none_of_the_shops() -> None:
    assert [name for name in MODULES.keys() - ROLES if "_" not in name] == []


# The process


def test_only_the_command_reads_flags_and_the_environment() -> None:
    names = ("os.environ", "os.environb", "os.getenv", "sys.argv", "argparse.ArgumentParser")
    assert {name for name, path in PRODUCT.items() if uses(path, *names)} == {"main", "command_line"}


def test_only_process_control_installs_signal_handlers() -> None:
    calls = {(name, *map(ast.unparse, node.args)) for name, path in PRODUCT.items() for node in ast.walk(tree(path))
             if isinstance(node, ast.Call) and ast.unparse(node.func) in SETTING_SIGNALS}  # fmt: skip
    elsewhere = {call for call in calls if call[0] != "process_control"}
    # The default in place of Python's own handler is none: a Ctrl-C during the imports is no traceback.
    assert elsewhere == {(name, "signal.SIGINT", "signal.SIG_DFL") for name in ("main", "__main__")}


def test_nothing_sleeps_probes_or_keeps_state_in_a_module() -> None:
    found = {name: uses(path, "hasattr", "time.sleep") for name, path in PRODUCT.items()}
    for name, path in PRODUCT.items():
        found[name] += [ast.unparse(node) for node in ast.walk(tree(path)) if isinstance(node, ast.Global)]
        found[name] += [ast.unparse(node) for node in tree(path).body if _is_mutable_variable(node)]
    assert {name: each for name, each in found.items() if each} == {}


def _is_mutable_variable(node: ast.stmt) -> bool:
    """Whether it assigns a list, a dictionary or a set to a name of the module that is not written as a constant."""
    if not isinstance(node, (ast.Assign, ast.AnnAssign)):
        return False
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    variable = any(isinstance(each, ast.Name) and not each.id.isupper() and each.id[:2] != "__" for each in targets)
    return variable and isinstance(node.value, (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp))


# Sizes


DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def rooms() -> Iterator[tuple[str, str, ast.AST, Path]]:
    """Each module, class and function of the product: its name, its kind, its node, its file."""
    for module, path in PRODUCT.items():
        yield module, "module", tree(path), path
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ClassDef):
                yield f"{module}:{node.name}", "class", node, path
            elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield f"{module}:{node.name}:{node.lineno}", "function", node, path


def lines_of_code(node: ast.AST, path: Path) -> int:
    """Its lines without blank ones, comments and docstrings."""
    skipped: set[int] = set()
    for each in ast.walk(node):
        if isinstance(each, DOCUMENTED) and ast.get_docstring(each):
            skipped.update(range(each.body[0].lineno, (each.body[0].end_lineno or 0) + 1))
    first, last = getattr(node, "lineno", 1), getattr(node, "end_lineno", sys.maxsize)
    lines = enumerate(path.read_text("utf-8").splitlines(), 1)
    code = [line.strip() for number, line in lines if first <= number <= last and number not in skipped]
    return sum(line != "" and not line.startswith("#") for line in code)


def test_every_room_can_be_read_in_one_sitting() -> None:
    sizes = {name: (lines_of_code(node, path), LIMITS[kind]) for name, kind, node, path in rooms()}
    too_large = {name: size for name, (size, limit) in sizes.items() if size > limit}
    assert {name for name, size in too_large.items() if size > TOO_LARGE.get(name, 0)} == set(), too_large
    assert TOO_LARGE.keys() - too_large.keys() == set(), "these are small enough now: out of the table"


def test_a_class_has_one_condition_at_most() -> None:
    def conditions(node: ast.AST) -> int:
        calls = [ast.unparse(each.func) for each in ast.walk(node) if isinstance(each, ast.Call)]
        return sum(call.endswith("Condition") for call in calls)

    assert [name for name, kind, node, _ in rooms() if kind == "class" and conditions(node) > 1] == []


def test_every_module_and_what_is_public_in_it_says_what_it_is() -> None:
    silent = [f"{name}:{getattr(node, 'name', '')}" for name, path in PRODUCT.items()
              for node in (tree(path), *tree(path).body) if isinstance(node, DOCUMENTED) and not ast.get_docstring(node)
              and not getattr(node, "name", "").startswith("_")]  # fmt: skip
    assert silent == []


# Tests


def test_no_test_sleeps() -> None:
    files = [path for folder in ("tests", "postgres/tests") for path in ROOT.glob(f"{folder}/**/*.py")]
    assert {str(path.relative_to(ROOT)) for path in files if uses(path, "time.sleep")} == ASKS
