"""A temporary directory for each run: those that run at the same time, as under tox, would clean up each other's."""
from __future__ import annotations

import os
import tempfile

import pytest

DIRECTORY = pytest.StashKey["tempfile.TemporaryDirectory[str]"]()


def pytest_configure(config: pytest.Config) -> None:
    """Before the first temporary path is asked for."""
    directory = tempfile.TemporaryDirectory(prefix="smsproxy-tests-", ignore_cleanup_errors=True)
    config.stash[DIRECTORY] = directory
    os.environ["PYTEST_DEBUG_TEMPROOT"] = directory.name


def pytest_unconfigure(config: pytest.Config) -> None:
    """After the last one was cleaned up."""
    config.stash[DIRECTORY].cleanup()
