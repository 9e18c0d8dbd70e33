"""The statements of the repository, each of them sent as one transaction and such that repeating it does no harm.

IDs are sorted wherever rows get locked, so that two statements never wait for each other; and messages are locked
before the outbox, by every statement that changes both.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from message_model import TRANSITIONS, Entry

__all__ = [
    "AGES", "CANCEL", "CHECK", "CLAIM", "COUNT", "EXPIRE", "FORGET", "HANDED_OVER", "HASTEN", "IN_OUTBOX", "KNOWN",
    "RELEASE", "RENEW", "SAVE", "SAVE_TOGETHER", "SIZE", "STATUS", "UNSENT", "UPDATE", "columns",
]  # fmt: skip

SAVE = """
SELECT * FROM smsproxy.save(
    %s::text[], %s::text[], %s::bytea[], %s::bytea[], %s::float8[], %s::boolean[], %s::float8[], %s::float8)
"""
SAVE_TOGETHER = SAVE.replace("smsproxy.save(", "smsproxy.save_together(")
KNOWN = """
SELECT id, fingerprint FROM smsproxy.message WHERE id = ANY (%s::text[])
AND (changed_at > clock_timestamp() - %s::float8 * interval '1 s') IS NOT FALSE
"""
STATUS = """
SELECT status, reason FROM smsproxy.message WHERE id = %s
AND (changed_at > clock_timestamp() - %s::float8 * interval '1 s') IS NOT FALSE
"""
TRANSITION = f"""(m.status, g.status) IN ({
    ', '.join(f"('{old.value}', '{new.value}')" for old, all_new in TRANSITIONS.items() for new in sorted(all_new))})"""
# Messages `gone` have left the outbox, so a batch that has no others is over. One whose row is locked is left alone:
# whoever has the lock, or the next renewal, sees that it is empty.
ENDED = """
    DELETE FROM smsproxy.batch WHERE id IN (
        SELECT b.id FROM smsproxy.batch b WHERE b.id = ANY (%(ended)s::bigint[]) AND (
            SELECT true FROM smsproxy.outbox o WHERE o.batch = b.id AND o.id NOT IN (SELECT g.id FROM gone g) LIMIT 1
        ) IS NULL FOR UPDATE SKIP LOCKED)
"""
UPDATE = f"""
WITH found AS MATERIALIZED (
    SELECT m.id, m.status AS before, g.status, g.reason,
        {TRANSITION} AND (g.reason IS NULL OR m.changed_at IS NULL)
        -- One that was accepted anew while this waited for its lock: the report is on the one before.
        AND (m.changed_at IS NOT NULL OR EXISTS (SELECT FROM smsproxy.outbox o WHERE o.id = m.id)) AS allowed
    FROM unnest(%(ids)s::text[], %(statuses)s::text[], %(reasons)s::text[]) AS g(id, status, reason)
    JOIN smsproxy.message m ON m.id = g.id COLLATE "C"
    WHERE (m.changed_at > clock_timestamp() - %(retention)s::float8 * interval '1 s') IS NOT FALSE
    ORDER BY m.id FOR UPDATE OF m
), done AS (
    UPDATE smsproxy.message m SET status = f.status, reason = f.reason, changed_at = smsproxy.changed(%(slice)s::float8)
    FROM found f WHERE m.id = f.id AND f.allowed
), gone AS (
    DELETE FROM smsproxy.outbox WHERE id IN (SELECT id FROM found WHERE allowed) RETURNING id, batch IS NULL AS waited
), ended AS ({ENDED})
SELECT id, before, allowed, (SELECT count(*) FROM gone), (SELECT count(*) FROM gone WHERE waited) FROM found
"""
HANDED_OVER = f"""
WITH found AS MATERIALIZED (
    SELECT m.id FROM unnest(%(ids)s::text[]) AS g(id) JOIN smsproxy.message m ON m.id = g.id COLLATE "C"
    WHERE m.changed_at IS NULL ORDER BY m.id FOR UPDATE OF m
), gone AS (
    -- An ID that was forgotten meanwhile and accepted anew has a later number than all of its old batch.
    DELETE FROM smsproxy.outbox WHERE id IN (SELECT id FROM found) AND seq <= %(last)s::bigint
    RETURNING id, batch IS NULL AS waited
), done AS (
    UPDATE smsproxy.message SET changed_at = smsproxy.changed(%(slice)s::float8) WHERE id IN (SELECT id FROM gone)
), ended AS ({ENDED})
SELECT count(*), count(*) FILTER (WHERE waited) FROM gone
"""
CLAIM = "SELECT * FROM smsproxy.claim(%s::uuid, %s::bigint, %s::float8, %s::boolean, %s::float8)"
RENEW = "SELECT * FROM smsproxy.renew(%s::uuid, %s::bigint[], %s::float8)"
RELEASE = "SELECT smsproxy.release(%s::uuid, %s::bigint[], %s::text[])"
UNSENT = """
SELECT o.id FROM smsproxy.outbox o JOIN smsproxy.batch b ON b.id = o.batch
WHERE o.batch = %s::bigint AND b.owner = %s::uuid
"""
IN_OUTBOX = "SELECT count(*) FROM smsproxy.outbox WHERE id = ANY (%s::text[])"
CANCEL = "SELECT * FROM smsproxy.cancel(%s, %s::float8, %s::float8)"
EXPIRE = "SELECT * FROM smsproxy.expire(%s::bigint, %s::float8)"
HASTEN = "SELECT smsproxy.hasten(%s::float8, %s::bigint)"
COUNT = "SELECT count(*), count(*) FILTER (WHERE batch IS NULL) FROM smsproxy.outbox"
AGES = """
SELECT coalesce(extract(epoch FROM clock_timestamp() - min(accepted_at)), 0)::float8,
    coalesce(-smsproxy.seconds(clock_timestamp(), min(due)), 0)
FROM smsproxy.outbox
"""
FORGET = """
WITH alone AS MATERIALIZED (
    SELECT name FROM smsproxy.mutex WHERE name = 'forget' FOR UPDATE SKIP LOCKED
), due AS MATERIALIZED (
    SELECT id FROM smsproxy.message WHERE changed_at <= clock_timestamp() - %(retention)s::float8 * interval '1 s'
    AND EXISTS (SELECT FROM alone) ORDER BY changed_at LIMIT %(step)s FOR UPDATE SKIP LOCKED
), gone AS (
    DELETE FROM smsproxy.message WHERE id IN (SELECT id FROM due) RETURNING id
), untold AS (
    -- Whoever tells drops these itself; this is for changes that nobody tells any more.
    DELETE FROM smsproxy.change WHERE seq IN (
        SELECT f.seq FROM (SELECT seq, changed_at FROM smsproxy.change ORDER BY seq LIMIT %(step)s) f
        WHERE f.changed_at <= clock_timestamp() - %(retention)s::float8 * interval '1 s')
)
SELECT (SELECT count(*) FROM gone), (
    SELECT extract(epoch FROM changed_at - clock_timestamp())::float8 + %(retention)s::float8 FROM smsproxy.message
    WHERE changed_at IS NOT NULL AND id NOT IN (SELECT id FROM due) ORDER BY changed_at LIMIT 1
)
"""
CHECK = "UPDATE smsproxy.mutex SET name = name WHERE name = 'check' RETURNING name"
SIZE = """
SELECT sum(pg_total_relation_size(c.oid))::bigint FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = 'smsproxy' AND c.relkind = 'r'
"""


def columns(entries: Sequence[Entry]) -> tuple[list[Any], ...]:
    """What `SAVE` takes, but for the last parameter."""
    messages = [entry.message for entry in entries]
    return (
        [message.message_id for message in messages],
        [message.phone_number for message in messages],
        [message.message.encode() for message in messages],
        [entry.fingerprint for entry in entries],
        [float(entry.linger) for entry in entries],
        [entry.default_linger for entry in entries],
        [float(entry.max_age) for entry in entries],
    )
