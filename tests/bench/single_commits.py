"""The command with every change committed by itself, to measure what the group commit is worth."""
from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import main
import sqlite_repository

sqlite_repository.GROUP = 1
del sqlite_repository.SqliteRepository.save_all  # the messages of a group are then saved one by one
sys.exit(main.main())
