"""The tables in PostgreSQL. All of it lives in the schema `smsproxy`, out of the way of other applications."""
from __future__ import annotations

__all__ = ["TABLES"]

TABLES = r"""
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

CREATE TABLE smsproxy.outbox (
    seq bigint GENERATED ALWAYS AS IDENTITY,  -- in order of acceptance
    accepted_at timestamptz NOT NULL,
    due timestamptz NOT NULL,  -- infinity: only a full batch or a flush takes it
    expires timestamptz NOT NULL,  -- infinity: never
    batch bigint,  -- the batch that holds it; NULL while it waits
    default_linger boolean NOT NULL,  -- the caller did not say how long it may linger
    id text COLLATE "C" PRIMARY KEY,
    phone_number text NOT NULL,
    content bytea NOT NULL  -- UTF-8; a text column refuses NUL
-- Each row dies soon. A share of the table says nothing about a table that is empty most of the time, so
-- vacuum starts after a number of rows, at full speed, or the looks have dead rows to pass.
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000, autovacuum_vacuum_cost_delay = 0,
        autovacuum_vacuum_insert_scale_factor = 0, autovacuum_vacuum_insert_threshold = 20000,
        autovacuum_analyze_scale_factor = 0, autovacuum_analyze_threshold = 20000);
-- What waits is in an index of its own, so a look costs the same however much is claimed.
CREATE INDEX outbox_waiting ON smsproxy.outbox (due, seq) WHERE batch IS NULL;
CREATE INDEX outbox_claimed ON smsproxy.outbox (batch) WHERE batch IS NOT NULL;
CREATE INDEX outbox_expiring ON smsproxy.outbox (expires) WHERE batch IS NULL AND expires < 'infinity';

CREATE TABLE smsproxy.batch (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    owner uuid NOT NULL,  -- one start of one process
    lease_until timestamptz NOT NULL
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 200, autovacuum_vacuum_cost_delay = 0);
CREATE INDEX batch_lease ON smsproxy.batch (lease_until);

-- Rows to lock: one claims at a time, one forgets, and one tells. A lock makes no new version of the row.
CREATE TABLE smsproxy.mutex (name text PRIMARY KEY) WITH (fillfactor = 50);
INSERT INTO smsproxy.mutex VALUES ('claim'), ('forget'), ('check'), ('tell');

-- When the database was last at work for any instance, and since when without a gap; and where looks begin.
CREATE TABLE smsproxy.pulse (
    one boolean PRIMARY KEY DEFAULT true CHECK (one),
    seen_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    resumed_at timestamptz NOT NULL DEFAULT '-infinity',
    front timestamptz NOT NULL DEFAULT '-infinity',  -- nothing that waits is due before; see `beat`
    next_front timestamptz NOT NULL DEFAULT '-infinity',  -- what `front` may become
    published xid8 NOT NULL DEFAULT pg_current_xact_id(),  -- the transaction that wrote `next_front`
    settled xid8  -- a transaction that began after that one was committed; NULL: none has
) WITH (fillfactor = 50);
INSERT INTO smsproxy.pulse DEFAULT VALUES;

-- What the webhook has not told; see telling.py. Rows are inserted by a trigger, which is there only if it is wanted.
CREATE TABLE smsproxy.change (
    seq bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,  -- for one message in order of its changes
    changed_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    id text COLLATE "C" NOT NULL,
    status text NOT NULL
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000, autovacuum_vacuum_cost_delay = 0,
        autovacuum_vacuum_insert_scale_factor = 0, autovacuum_vacuum_insert_threshold = 20000,
        autovacuum_analyze_scale_factor = 0, autovacuum_analyze_threshold = 20000);

-- The body that is under way, and by whom; at most one row.
CREATE TABLE smsproxy.body (
    one boolean PRIMARY KEY DEFAULT true CHECK (one),
    id text NOT NULL,
    made_at float8 NOT NULL,  -- seconds since 1970, whole milliseconds
    ids text[] NOT NULL,
    statuses text[] NOT NULL,
    reasons text[] NOT NULL,
    since timestamptz NOT NULL,  -- when the first of these changes happened
    until timestamptz NOT NULL,  -- when the last of these messages is forgotten
    owner uuid NOT NULL,  -- one start of one process
    lease_until timestamptz NOT NULL
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 200, autovacuum_vacuum_cost_delay = 0);
"""
