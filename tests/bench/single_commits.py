"""The command with every change committed by itself, to measure what the group commit is worth."""
from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import main
import sqlite_repository
from group_commit import GroupCommit


class SingleCommit(GroupCommit):
    """A transaction for each item, whoever waits meanwhile."""

    def change(self, change: Callable[[Sequence[Any]], list[Any]], items: Sequence[Any]) -> list[Any]:
        """See `GroupCommit`."""
        return [result for item in items for result in super(SingleCommit, self).change(change, [item])]

    def _commit(self, jobs: Sequence[Any]) -> None:
        for job in jobs:
            super()._commit([job])


if __name__ == "__main__":
    sqlite_repository.GroupCommit = SingleCommit  # type: ignore[attr-defined]
    sys.exit(main.main())
