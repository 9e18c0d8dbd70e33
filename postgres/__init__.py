"""A repository in PostgreSQL, which makes any number of processes one service. README.md has the rules.

Importing this needs psycopg 3: `pip install 'smsproxy[postgres]'`.
"""
from .repository import PostgresRepository

__all__ = ["PostgresRepository"]
