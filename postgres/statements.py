"""The statements of the repository, each of them sent as one transaction and such that repeating it does no harm.

IDs are sorted wherever rows get locked, so that two statements never wait for each other; and messages are locked
before the outbox, by every statement that changes both.
"""
from message_model import TRANSITIONS

__all__ = [
    "CHECK", "CLAIM", "COUNT", "FORGET", "HANDED_OVER", "KNOWN", "OLDEST", "RELEASE", "RENEW", "SAVE", "SIZE", "STATUS",
    "UNCLAIM", "UPDATE",
]  # fmt: skip

SAVE = """
WITH given AS (
    SELECT * FROM unnest(%s::text[], %s::text[], %s::bytea[], %s::bytea[])
    WITH ORDINALITY AS g(id, phone_number, content, fingerprint, place)
), saved AS (
    INSERT INTO smsproxy.message AS m (id, fingerprint) SELECT id, fingerprint FROM given ORDER BY id
    ON CONFLICT (id) DO UPDATE SET status = 'ACCEPTED', reason = NULL, changed_at = NULL, fingerprint = excluded.fingerprint
    WHERE m.changed_at <= clock_timestamp() - %s::float8 * interval '1 s' RETURNING m.id
)
INSERT INTO smsproxy.outbox (id, phone_number, content)
SELECT g.id, g.phone_number, g.content FROM given g JOIN saved USING (id) ORDER BY g.place RETURNING id
"""
KNOWN = """
SELECT id, fingerprint FROM smsproxy.message WHERE id = ANY (%s::text[])
AND (changed_at > clock_timestamp() - %s::float8 * interval '1 s') IS NOT FALSE
"""
STATUS = """
SELECT status, reason FROM smsproxy.message WHERE id = %s
AND (changed_at > clock_timestamp() - %s::float8 * interval '1 s') IS NOT FALSE
"""
CHANGED_AT = "to_timestamp(ceil(extract(epoch FROM clock_timestamp()) / {0}::float8) * {0}::float8)".format("%(slice)s")
TRANSITION = f"""(m.status, g.status) IN ({
    ', '.join(f"('{old.value}', '{new.value}')" for old, all_new in TRANSITIONS.items() for new in sorted(all_new))})"""
UPDATE = f"""
WITH found AS MATERIALIZED (
    SELECT m.id, m.status AS before, g.status, g.reason, {TRANSITION} AS allowed
    FROM unnest(%(ids)s::text[], %(statuses)s::text[], %(reasons)s::text[]) AS g(id, status, reason)
    JOIN smsproxy.message m ON m.id = g.id COLLATE "C"
    WHERE (m.changed_at > clock_timestamp() - %(retention)s::float8 * interval '1 s') IS NOT FALSE
    ORDER BY m.id FOR UPDATE OF m
), done AS (
    UPDATE smsproxy.message m SET status = f.status, reason = f.reason, changed_at = {CHANGED_AT}
    FROM found f WHERE m.id = f.id AND f.allowed
), gone AS (
    DELETE FROM smsproxy.outbox WHERE id IN (SELECT id FROM found WHERE allowed) RETURNING id
), ended AS (
    DELETE FROM smsproxy.batch WHERE id = ANY (%(ended)s::bigint[]) AND (SELECT count(*) FROM found) >= 0
)
SELECT id, before, allowed, (SELECT count(*) FROM gone) FROM found
"""
HANDED_OVER = f"""
WITH found AS MATERIALIZED (
    SELECT m.id FROM unnest(%(ids)s::text[]) AS g(id) JOIN smsproxy.message m ON m.id = g.id COLLATE "C"
    WHERE m.changed_at IS NULL ORDER BY m.id FOR UPDATE OF m
), done AS (
    UPDATE smsproxy.message SET changed_at = {CHANGED_AT} WHERE id IN (SELECT id FROM found)
), gone AS (
    DELETE FROM smsproxy.outbox WHERE id IN (SELECT id FROM found) RETURNING id
), ended AS (
    DELETE FROM smsproxy.batch WHERE id = ANY (%(ended)s::bigint[]) AND (SELECT count(*) FROM found) >= 0
)
SELECT count(*) FROM gone
"""
CLAIM = "SELECT * FROM smsproxy.claim(%s::uuid, %s::bigint, %s::float8, %s::float8)"
RENEW = "SELECT * FROM smsproxy.renew(%s::uuid, %s::bigint[], %s::float8)"
RELEASE = """
WITH whole AS (
    DELETE FROM smsproxy.batch WHERE id = ANY (%(ended)s::bigint[]) AND owner = %(owner)s::uuid RETURNING id
)
UPDATE smsproxy.batch b SET seqs = ARRAY(
    SELECT s FROM unnest(b.seqs) AS u(s)
    EXCEPT SELECT o.seq FROM smsproxy.outbox o WHERE o.id = ANY (%(ids)s::text[]) ORDER BY 1
) WHERE b.id = %(batch)s AND b.owner = %(owner)s::uuid AND NOT b.id = ANY (%(ended)s::bigint[])
"""
UNCLAIM = "DELETE FROM smsproxy.batch WHERE id = ANY (%s::bigint[]) AND owner = %s::uuid"
COUNT = "SELECT count(*) FROM smsproxy.outbox"
OLDEST = """
SELECT extract(epoch FROM clock_timestamp() - accepted_at)::float8 FROM smsproxy.outbox
WHERE seq >= (SELECT front FROM smsproxy.pulse) ORDER BY seq LIMIT 1
"""
FORGET = """
WITH alone AS MATERIALIZED (
    SELECT name FROM smsproxy.mutex WHERE name = 'forget' FOR UPDATE SKIP LOCKED
), due AS MATERIALIZED (
    SELECT id FROM smsproxy.message WHERE changed_at <= clock_timestamp() - %(retention)s::float8 * interval '1 s'
    AND EXISTS (SELECT FROM alone) ORDER BY changed_at LIMIT %(step)s FOR UPDATE SKIP LOCKED
), gone AS (
    DELETE FROM smsproxy.message WHERE id IN (SELECT id FROM due) RETURNING id
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
