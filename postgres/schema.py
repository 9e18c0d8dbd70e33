"""The tables and functions in PostgreSQL, and how a database gets them.

All of it lives in the schema `smsproxy`, so that neither another application nor a `search_path`
can get in the way. What runs in several steps under a lock is a function: its statements see what
others committed while it waited for the lock, which the parts of one statement would not, and a
client that hangs holds no lock, because none of its answers is needed before the end.
"""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

from message_model import RepositoryUnavailableError

from .connections import Database

if TYPE_CHECKING:
    import psycopg

__all__ = ["MIGRATIONS", "check_database", "prepare"]

START_TIMEOUT = 30.0  # seconds for the first connection's work; another process may be creating the tables

MIGRATION_LOCK = 0x534D5350  # "SMSP": the advisory lock of a transaction that creates or migrates

# Each script leads from the schema version that is its index to the next one.
MIGRATIONS = (
    r"""
    CREATE TABLE smsproxy.message (
        id text COLLATE "C" PRIMARY KEY,  -- "C": compared as bytes, so UUIDs of version 7 come in order of time
        status text NOT NULL DEFAULT 'ACCEPTED',
        reason text,  -- why the service itself made it FAILED
        changed_at timestamptz,  -- NULL while the message is in the outbox
        fingerprint bytea  -- of the request, when it came with an idempotency key
    -- A message changes up to three times soon after it came. With room left in its page the new version
    -- stays there (a HOT update), and the index on id does not grow with it.
    ) WITH (fillfactor = 60, autovacuum_vacuum_scale_factor = 0.05, autovacuum_analyze_scale_factor = 0.05);
    CREATE INDEX message_changed ON smsproxy.message (changed_at) WHERE changed_at IS NOT NULL;

    -- Sees inserts and deletes only: which messages are claimed is kept in `batch`.
    CREATE TABLE smsproxy.outbox (
        seq bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,  -- in order of acceptance
        id text COLLATE "C" NOT NULL UNIQUE,
        accepted_at timestamptz NOT NULL DEFAULT clock_timestamp(),
        phone_number text NOT NULL,
        content bytea NOT NULL  -- UTF-8; a text column refuses NUL
    -- Each row dies soon. A share of the table says nothing about a table that is empty most of the time, so
    -- vacuum starts after a number of rows, at full speed, or the looks at the front have dead rows to pass.
    ) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000, autovacuum_vacuum_cost_delay = 0,
            autovacuum_vacuum_insert_scale_factor = 0, autovacuum_vacuum_insert_threshold = 20000,
            autovacuum_analyze_scale_factor = 0, autovacuum_analyze_threshold = 20000);

    CREATE TABLE smsproxy.batch (
        id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        owner uuid NOT NULL,  -- one start of one process
        lease_until timestamptz NOT NULL,
        seqs bigint[] NOT NULL  -- its messages in the outbox; some may have left it
    ) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 200,
            autovacuum_vacuum_cost_delay = 0);

    -- Rows to lock: one claims at a time, and one forgets. A lock makes no new version of the row.
    CREATE TABLE smsproxy.mutex (name text PRIMARY KEY) WITH (fillfactor = 50);
    INSERT INTO smsproxy.mutex VALUES ('claim'), ('forget'), ('check');

    -- When the database was last at work for any instance, and since when without a gap.
    CREATE TABLE smsproxy.pulse (
        one boolean PRIMARY KEY DEFAULT true CHECK (one),
        seen_at timestamptz NOT NULL DEFAULT clock_timestamp(),
        resumed_at timestamptz NOT NULL DEFAULT '-infinity',
        front bigint NOT NULL DEFAULT 0  -- the outbox has no message before this seq, or one that came just now
    ) WITH (fillfactor = 50);
    INSERT INTO smsproxy.pulse DEFAULT VALUES;

    -- Called first by whoever claims or renews. A silence of more than half a lease means that owners may have
    -- been unable to renew: from its end they get the time of a whole lease. At most once a second it also moves
    -- `front`, so that a look does not pass the dead rows of all messages that left since the last vacuum. The
    -- margin covers saves that commit in another order than that of their numbers; what it misses is found a second later.
    CREATE FUNCTION smsproxy.beat(lease float8) RETURNS void LANGUAGE sql AS $$
        UPDATE smsproxy.pulse SET seen_at = clock_timestamp(),
            resumed_at = CASE WHEN seen_at > clock_timestamp() + interval '1 s'  -- another server's clock
                OR seen_at < clock_timestamp() - lease / 2 * interval '1 s' THEN clock_timestamp() ELSE resumed_at END,
            front = coalesce((SELECT seq - 1000 FROM smsproxy.outbox ORDER BY seq LIMIT 1), front)
        WHERE seen_at < clock_timestamp() - least(1, lease / 10) * interval '1 s'
            OR seen_at > clock_timestamp() + interval '1 s';
    $$;

    -- What waits at the front of the outbox, not before `first` and claimed by nobody, at most `most` of it.
    CREATE FUNCTION smsproxy.look(first bigint, claimed bigint[], most bigint, OUT seqs bigint[], OUT oldest timestamptz)
    LANGUAGE plpgsql
    -- A plan made while the table was empty would read and sort all of it once it is full.
    SET enable_seqscan = off SET enable_bitmapscan = off SET enable_sort = off SET jit = off AS $$
    BEGIN
        SELECT array_agg(f.seq ORDER BY f.seq), min(f.accepted_at) INTO seqs, oldest
        FROM (SELECT o.seq, o.accepted_at FROM smsproxy.outbox o
              WHERE o.seq >= first AND o.seq <> ALL (claimed) ORDER BY o.seq LIMIT most) AS f;
    END $$;

    -- Takes over the oldest batch whose lease ran out, if the database was there long enough for its owner to renew.
    CREATE FUNCTION smsproxy.take_over(me uuid, lease float8, OUT batch_id bigint, OUT batch_seqs bigint[])
    LANGUAGE plpgsql AS $$
    BEGIN
        LOOP
            UPDATE smsproxy.batch b SET owner = me, lease_until = clock_timestamp() + lease * interval '1 s'
            WHERE b.id = (SELECT e.id FROM smsproxy.batch e WHERE e.lease_until < clock_timestamp()
                          AND (SELECT resumed_at FROM smsproxy.pulse) < clock_timestamp() - lease * interval '1 s'
                          ORDER BY e.seqs[1], e.id LIMIT 1)
                AND b.lease_until < clock_timestamp()  -- its owner may have renewed it while we waited for the row
            RETURNING b.id, b.seqs INTO batch_id, batch_seqs;
            EXIT WHEN batch_id IS NULL OR EXISTS (SELECT FROM smsproxy.outbox o WHERE o.seq = ANY (batch_seqs));
            DELETE FROM smsproxy.batch b WHERE b.id = batch_id;  -- all its messages left otherwise
        END LOOP;
    END $$;

    -- One look without the lock, which ends it most of the time, and one under it. The first row tells of the
    -- outbox and has no `id`; the others are the messages of the batch, if there is one.
    CREATE FUNCTION smsproxy.claim(me uuid, size bigint, delay float8, lease float8)
    RETURNS TABLE (batch bigint, waiting bigint, due float8, id text, phone_number text, content bytea, age float8)
    LANGUAGE plpgsql AS $$
    DECLARE
        found_seqs bigint[];
        oldest timestamptz;
        taken bigint[];
    BEGIN
        PERFORM smsproxy.beat(lease);
        FOR locked IN 0..1 LOOP
            IF locked = 1 THEN
                PERFORM FROM smsproxy.mutex WHERE name = 'claim' FOR UPDATE;
            END IF;
            SELECT l.seqs, l.oldest INTO found_seqs, oldest 
            FROM smsproxy.look((SELECT p.front FROM smsproxy.pulse p),
                               ARRAY(SELECT unnest(b.seqs) FROM smsproxy.batch b), size + 1) l;
            waiting := coalesce(cardinality(found_seqs), 0);
            due := CASE WHEN waiting >= size THEN 0 WHEN waiting > 0 AND delay IS NOT NULL
                   THEN greatest(0, delay - greatest(0, extract(epoch FROM clock_timestamp() - oldest))) END;
            EXIT WHEN due IS DISTINCT FROM 0
                AND NOT EXISTS (SELECT FROM smsproxy.batch b WHERE b.lease_until < clock_timestamp());
            CONTINUE WHEN locked = 0;
            SELECT t.batch_id, t.batch_seqs INTO batch, taken FROM smsproxy.take_over(me, lease) t;
            IF batch IS NULL AND due = 0 THEN
                taken := found_seqs[1:least(size, waiting)];
                waiting := waiting - cardinality(taken);
                INSERT INTO smsproxy.batch AS b (owner, lease_until, seqs)
                VALUES (me, clock_timestamp() + lease * interval '1 s', taken) RETURNING b.id INTO batch;
            END IF;
        END LOOP;
        RETURN NEXT;
        IF batch IS NOT NULL THEN
            RETURN QUERY SELECT batch, NULL::bigint, NULL::float8, o.id, o.phone_number, o.content,
                greatest(0, extract(epoch FROM clock_timestamp() - o.accepted_at))::float8
            FROM smsproxy.outbox o WHERE o.seq = ANY (taken) ORDER BY o.seq;
        END IF;
    END $$;

    -- Renews those of the batches that are still ours and have messages in the outbox, ends those that have none,
    -- and returns the ones renewed.
    CREATE FUNCTION smsproxy.renew(me uuid, ids bigint[], lease float8) RETURNS SETOF bigint LANGUAGE plpgsql AS $$
    BEGIN
        PERFORM smsproxy.beat(lease);
        PERFORM FROM smsproxy.batch b WHERE b.id = ANY (ids) AND b.owner = me ORDER BY b.id FOR UPDATE;
        DELETE FROM smsproxy.batch b WHERE b.id = ANY (ids) AND b.owner = me
            AND NOT EXISTS (SELECT FROM smsproxy.outbox o WHERE o.seq = ANY (b.seqs));
        RETURN QUERY UPDATE smsproxy.batch b SET lease_until = clock_timestamp() + lease * interval '1 s'
            WHERE b.id = ANY (ids) AND b.owner = me RETURNING b.id;
    END $$;
    """,
)


def prepare(database: Database) -> None:
    """Creates what is missing; raises `RepositoryUnavailableError` when the database cannot be used."""
    with database.start(START_TIMEOUT) as db:
        _check_settings(db)
        _migrate(db)


def check_database(url: str) -> None:
    """Raises `RepositoryUnavailableError` when a start would fail. Only looks: it creates and changes nothing."""
    database = Database(url, 1)
    try:
        with database.start(START_TIMEOUT) as db:
            _check_settings(db)
            may_create = "SELECT has_database_privilege(current_database(), 'CREATE')"
            if _version(db) < len(MIGRATIONS) and not _value(db, may_create):
                raise RepositoryUnavailableError("the tables are missing or old, and this role may not create any")
    finally:
        database.close()


def _migrate(db: psycopg.Connection[Any]) -> None:
    """Creates what is missing, one process at a time; raises `RepositoryUnavailableError` when the schema is newer."""
    if _version(db) == len(MIGRATIONS):
        return
    with db.transaction():  # all or nothing, and the lock ends with it
        db.execute("SELECT pg_advisory_xact_lock(%s)", (MIGRATION_LOCK,))
        version = _version(db)  # another process may have been faster
        if version == 0:
            db.execute("CREATE SCHEMA IF NOT EXISTS smsproxy")
            db.execute("CREATE TABLE smsproxy.version (version int NOT NULL)")
            db.execute("INSERT INTO smsproxy.version VALUES (0)")
        for script in MIGRATIONS[version:]:
            db.execute(script)  # without parameters, so that one call may have many statements
        db.execute("UPDATE smsproxy.version SET version = %s", (len(MIGRATIONS),))


def _version(db: psycopg.Connection[Any]) -> int:
    # Read from the catalog: `to_regclass` may remember from before the lock that there was no such table.
    if not _value(db, "SELECT count(*) FROM pg_catalog.pg_tables WHERE schemaname = 'smsproxy' AND tablename = 'version'"):
        return 0
    version = int(_value(db, "SELECT version FROM smsproxy.version"))
    if version > len(MIGRATIONS):
        raise RepositoryUnavailableError(f"the schema has version {version}, newer than this program's {len(MIGRATIONS)}")
    return version


# Settings that would break a promise, the values that do, and the promise.
REFUSED = {
    "synchronous_commit": (("off",), "a message that was accepted could be lost"),
    "fsync": (("off",), "a message that was accepted could be lost"),
    "default_transaction_isolation": (("repeatable read",), "a message could be claimed twice"),
    "transaction_read_only": (("on",), "this server is a standby, or set to read only"),
}


def _check_settings(db: psycopg.Connection[Any]) -> None:
    """Raises `RepositoryUnavailableError` when the server cannot keep what the service promises."""
    for name, (values, promise) in REFUSED.items():
        value = _value(db, "SELECT current_setting(%s)", name)
        if value in values:
            raise RepositoryUnavailableError(f"{name} is {value}: {promise}")
    encoding = _value(db, "SELECT current_setting('server_encoding')")
    if encoding != "UTF8":
        raise RepositoryUnavailableError(f"the database's encoding is {encoding}, not UTF8")


def _value(db: psycopg.Connection[Any], sql: str, *parameters: Any) -> Any:
    row = db.execute(sql, parameters or None).fetchone()
    return row[0] if row else None
