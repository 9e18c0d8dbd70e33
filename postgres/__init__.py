"""A repository in PostgreSQL, which makes any number of processes one service. README.md has the rules.

Importing this needs psycopg 3: `pip install '.[postgres]'` in a checkout.
"""
from .repository import PostgresRepository
from .schema import check_database
from .urls import describe_url

__all__ = ["PostgresRepository", "check_database", "describe_url"]
