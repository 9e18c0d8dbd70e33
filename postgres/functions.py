"""The functions in PostgreSQL: what takes several steps under a lock, or has to see what others committed meanwhile.

The statements of a function see what was committed while it waited for a lock, which the parts of one statement would
not; and a client that hangs holds no lock, because none of its answers is needed before the end.

**Locks** are taken in this order: `pulse`, the row 'claim' of `mutex`, messages, the outbox; and rows of one table in
order of their IDs. Rows of `batch` come before all of these when they have been locked by an owner that renews or
releases; whoever else wants them skips those that are locked. New messages are locked before `pulse`, and so are
messages on their way back, but nobody waits for what he cannot see. Should two statements deadlock all the same, the
server aborts one, and it is sent again.

**The front.** A look reads the index of what waits from `front` on. Before it are the dead entries of all that left
since the last vacuum, and a transaction that stays open for an hour, a `pg_dump` perhaps, keeps vacuum from removing
them. The invariant: in every snapshot, nothing that waits is due before the `front` of the same snapshot. New messages
may be due before everything that waits, and are visible only when their transaction commits, so:

1. Whoever puts messages into the outbox calls `pull_back` afterwards, in a statement of its own. It moves `front` and
   `next_front` back to when the first of them is due, in the same transaction.
2. `beat` moves the front in three steps, about a second apart. The first publishes `next_front`: when the first message
   that waits is due. The second, which has seen that one committed, notes its own transaction ID in `settled`. The
   third waits until all transactions up to that ID have ended. Then it sets `front` to `next_front`, or to when the
   first message is due now if that is earlier, and publishes the next `next_front`.

So no message gets behind the front, however long its commit takes. If its transaction ended before the third step, that
step saw it. If not, its ID is higher than `settled`, or yet to come; so it got the ID after the publication was
committed, and its `pull_back`, which comes after that, saw `next_front` and moved it back.
"""
from __future__ import annotations

__all__ = ["FUNCTIONS"]

TIMES = r"""
-- So many seconds later; times that are further away than PostgreSQL can tell are infinity.
CREATE FUNCTION smsproxy.later(moment timestamptz, seconds float8) RETURNS timestamptz LANGUAGE sql STABLE AS $$
    SELECT CASE WHEN seconds < 1e9 THEN moment + seconds * interval '1 s' ELSE 'infinity' END;
$$;

-- Seconds from one moment to another, which may be infinity or NULL.
CREATE FUNCTION smsproxy.seconds(since timestamptz, until timestamptz) RETURNS float8 LANGUAGE sql STABLE AS $$
    SELECT CASE WHEN until < 'infinity' THEN extract(epoch FROM until - since)::float8 ELSE 'Infinity' END;
$$;

-- The time of a change, rounded up to whole slices, so that most changes leave the index of these times alone.
CREATE FUNCTION smsproxy.changed(slice float8) RETURNS timestamptz LANGUAGE sql VOLATILE AS $$
    SELECT to_timestamp(ceil(extract(epoch FROM clock_timestamp()) / slice) * slice);
$$;
"""

FRONT = r"""
-- Called first by whoever claims, and last by whoever renews; does something about once a second. A silence of more
-- than half a lease means that owners may have been unable to renew: from its end they get the time of a whole lease.
CREATE FUNCTION smsproxy.beat(lease float8) RETURNS void LANGUAGE plpgsql
SET enable_sort = off AS $$  -- a plan made while the table was empty would read and sort all of it once it is full
DECLARE
    early timestamptz := clock_timestamp() - least(1, lease / 10) * interval '1 s';
    late timestamptz := clock_timestamp() + interval '1 s';  -- so only by another server's clock
BEGIN
    IF EXISTS (SELECT FROM smsproxy.pulse p WHERE p.seen_at BETWEEN early AND late) THEN
        RETURN;
    END IF;
    UPDATE smsproxy.pulse p SET seen_at = clock_timestamp(),
        resumed_at = CASE WHEN p.seen_at > late OR p.seen_at < clock_timestamp() - lease / 2 * interval '1 s'
            THEN clock_timestamp() ELSE p.resumed_at END,
        front = CASE WHEN p.settled < s.oldest THEN least(p.next_front, s.first) ELSE p.front END,
        next_front = CASE WHEN p.settled < s.oldest THEN s.first ELSE p.next_front END,
        published = CASE WHEN p.settled < s.oldest THEN pg_current_xact_id() ELSE p.published END,
        settled = CASE WHEN p.settled < s.oldest THEN NULL WHEN p.settled IS NOT NULL THEN p.settled
            WHEN pg_visible_in_snapshot(p.published, pg_current_snapshot()) THEN pg_current_xact_id() END
    FROM (SELECT pg_snapshot_xmin(pg_current_snapshot()) AS oldest, coalesce((
              SELECT o.due FROM smsproxy.outbox o
              WHERE o.batch IS NULL AND o.due >= (SELECT q.front FROM smsproxy.pulse q) ORDER BY o.due LIMIT 1
          ), 'infinity') AS first) s
    WHERE p.seen_at NOT BETWEEN early AND late;  -- another process may have been faster
END $$;

-- Called after messages were put into the outbox, with when the first of them is due.
CREATE FUNCTION smsproxy.pull_back(first timestamptz) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    UPDATE smsproxy.pulse p SET front = least(p.front, first), next_front = least(p.next_front, first)
    WHERE p.front > first OR p.next_front > first;
END $$;
"""

SAVE = r"""
-- Returns the IDs of those that were saved: the others are known already.
CREATE FUNCTION smsproxy.save(ids text[], phone_numbers text[], contents bytea[], fingerprints bytea[],
                              lingers float8[], defaults boolean[], max_ages float8[], retention float8)
RETURNS SETOF text LANGUAGE plpgsql AS $$
DECLARE
    moment timestamptz := clock_timestamp();
    saved text[];
    first timestamptz;
BEGIN
    WITH given AS (
        SELECT * FROM unnest(ids, phone_numbers, contents, fingerprints, lingers, defaults, max_ages)
        WITH ORDINALITY AS g(id, phone_number, content, fingerprint, linger, default_linger, max_age, place)
    ), stored AS (
        INSERT INTO smsproxy.message AS m (id, fingerprint) SELECT g.id, g.fingerprint FROM given g ORDER BY g.id
        ON CONFLICT (id) DO UPDATE
        SET status = 'ACCEPTED', reason = NULL, changed_at = NULL, fingerprint = excluded.fingerprint
        WHERE m.changed_at <= moment - retention * interval '1 s' RETURNING m.id
    ), queued AS (
        INSERT INTO smsproxy.outbox AS o (id, phone_number, content, accepted_at, due, expires, default_linger)
        SELECT g.id, g.phone_number, g.content, moment, smsproxy.later(moment, g.linger),
            smsproxy.later(moment, g.max_age), g.default_linger
        FROM given g JOIN stored s ON s.id = g.id ORDER BY g.place RETURNING o.id, o.due
    )
    SELECT array_agg(q.id), min(q.due) INTO saved, first FROM queued q;
    PERFORM smsproxy.pull_back(first);
    RETURN QUERY SELECT unnest(saved);
END $$;

-- The same for all or none. Of two that race for an ID the second one waits for the first, in order of the IDs; what it
-- had saved before is undone with it.
CREATE FUNCTION smsproxy.save_together(ids text[], phone_numbers text[], contents bytea[], fingerprints bytea[],
                                       lingers float8[], defaults boolean[], max_ages float8[], retention float8)
RETURNS SETOF text LANGUAGE plpgsql AS $$
DECLARE
    saved text[];
BEGIN
    saved := ARRAY(SELECT smsproxy.save(
        ids, phone_numbers, contents, fingerprints, lingers, defaults, max_ages, retention));
    IF cardinality(saved) < cardinality(ids) THEN
        RAISE EXCEPTION USING ERRCODE = 'SMS01';
    END IF;
    RETURN QUERY SELECT unnest(saved);
EXCEPTION WHEN SQLSTATE 'SMS01' THEN
    RETURN;
END $$;
"""

CLAIM = r"""
-- The first messages that wait, in order.
CREATE FUNCTION smsproxy.look(most bigint, OUT ids text[], OUT dues timestamptz[])
LANGUAGE plpgsql
-- A plan made while the table was empty would read and sort all of it once it is full.
SET enable_sort = off AS $$
BEGIN
    SELECT array_agg(f.id), array_agg(f.due) INTO ids, dues
    FROM (SELECT o.id, o.due FROM smsproxy.outbox o
          WHERE o.batch IS NULL AND o.due >= (SELECT p.front FROM smsproxy.pulse p)
          ORDER BY o.due, o.seq LIMIT most) AS f;
END $$;

-- Takes over the oldest batch whose lease ran out, if the database was there long enough for its owner to renew.
-- One whose row is locked is being renewed, released or ended. The messages become a new batch, so that whoever had the
-- old one, this process perhaps, can neither renew nor release them.
CREATE FUNCTION smsproxy.take_over(me uuid, lease float8, OUT taken bigint) LANGUAGE plpgsql AS $$
DECLARE
    moment timestamptz := clock_timestamp();
    old bigint;
    locked bigint;
BEGIN
    IF NOT EXISTS (SELECT FROM smsproxy.batch b WHERE b.lease_until < moment)
        OR (SELECT p.resumed_at FROM smsproxy.pulse p) >= moment - lease * interval '1 s' THEN
        RETURN;
    END IF;
    LOOP
        old := (SELECT e.id FROM smsproxy.batch e WHERE e.lease_until < moment ORDER BY e.id LIMIT 1
                FOR UPDATE SKIP LOCKED);
        EXIT WHEN old IS NULL;
        -- Whoever has a message may wait for the pulse, which this transaction may have: the next look does it.
        PERFORM FROM smsproxy.message m WHERE m.id = ANY (ARRAY(SELECT o.id FROM smsproxy.outbox o WHERE o.batch = old))
            FOR UPDATE SKIP LOCKED;
        GET DIAGNOSTICS locked = ROW_COUNT;
        EXIT WHEN locked < (SELECT count(*) FROM smsproxy.outbox o WHERE o.batch = old);
        DELETE FROM smsproxy.batch b WHERE b.id = old;
        CONTINUE WHEN locked = 0;  -- all have left
        INSERT INTO smsproxy.batch AS b (owner, lease_until)
        VALUES (me, clock_timestamp() + lease * interval '1 s') RETURNING b.id INTO taken;
        UPDATE smsproxy.outbox o SET batch = taken WHERE o.batch = old;
        RETURN;
    END LOOP;
END $$;

-- One look without the lock, which ends it most of the time, and one under it. The first row tells of the outbox: how
-- many waited as far as the look went, `size` + 1 at the most, and how many of them were taken. The others are the
-- messages of the batch, if there is one; those of a batch that was taken over did not wait.
CREATE FUNCTION smsproxy.claim(me uuid, size bigint, horizon float8, flush boolean, lease float8)
RETURNS TABLE (batch_id bigint, waited bigint, taken bigint, due_in float8, full_in float8, near bigint,
               id text, phone_number text, content bytea, age float8, linger float8, max_age float8, by_default boolean,
               place bigint)
LANGUAGE plpgsql AS $$
DECLARE
    found_ids text[];
    dues timestamptz[];
    moment timestamptz;
    leaves boolean;
BEGIN
    taken := 0;
    PERFORM smsproxy.beat(lease);
    FOR locked IN 0..1 LOOP
        IF locked = 1 THEN
            PERFORM FROM smsproxy.mutex m WHERE m.name = 'claim' FOR UPDATE;
        END IF;
        SELECT l.ids, l.dues INTO found_ids, dues FROM smsproxy.look(size + 1) l;
        moment := clock_timestamp() + interval '1 us';  -- shorter waits may be lost in rounding
        waited := coalesce(cardinality(dues), 0);
        near := (SELECT count(*) FROM unnest(dues[1:size]) AS d WHERE d <= smsproxy.later(moment, horizon));
        leaves := waited > 0 AND (flush OR near >= size OR dues[1] <= moment);
        EXIT WHEN NOT leaves AND NOT EXISTS (SELECT FROM smsproxy.batch b WHERE b.lease_until < moment);
        CONTINUE WHEN locked = 0;
        SELECT t.taken INTO batch_id FROM smsproxy.take_over(me, lease) t;
        IF batch_id IS NULL AND leaves THEN
            INSERT INTO smsproxy.batch AS b (owner, lease_until)
            VALUES (me, clock_timestamp() + lease * interval '1 s') RETURNING b.id INTO batch_id;
            UPDATE smsproxy.outbox o SET batch = batch_id WHERE o.id = ANY (found_ids[1:size]);
            GET DIAGNOSTICS taken = ROW_COUNT;
        END IF;
    END LOOP;
    due_in := greatest(0, smsproxy.seconds(moment, dues[1]));
    full_in := CASE WHEN cardinality(dues) >= size THEN greatest(0, smsproxy.seconds(moment, dues[size]) - horizon)
               ELSE 'Infinity' END;
    RETURN NEXT;
    RETURN QUERY SELECT batch_id, waited, taken, due_in, full_in, near, o.id, o.phone_number, o.content,
            greatest(0, extract(epoch FROM clock_timestamp() - o.accepted_at))::float8,
            smsproxy.seconds(o.accepted_at, o.due), smsproxy.seconds(o.accepted_at, o.expires), o.default_linger, o.seq
        FROM smsproxy.outbox o WHERE o.batch = batch_id ORDER BY o.due, o.seq;
END $$;
"""

# "NOT EXISTS" would be a join, which may read all that is claimed; "IS NULL" asks for each batch.
LEASES = r"""
-- Renews those of the batches that are still ours and have messages in the outbox, ends those that have none,
-- and returns the ones renewed.
CREATE FUNCTION smsproxy.renew(me uuid, ids bigint[], lease float8) RETURNS SETOF bigint LANGUAGE plpgsql AS $$
BEGIN
    PERFORM FROM smsproxy.batch b WHERE b.id = ANY (ids) AND b.owner = me ORDER BY b.id FOR UPDATE;
    DELETE FROM smsproxy.batch b WHERE b.id = ANY (ids) AND b.owner = me
        AND (SELECT true FROM smsproxy.outbox o WHERE o.batch = b.id LIMIT 1) IS NULL;
    RETURN QUERY UPDATE smsproxy.batch b SET lease_until = clock_timestamp() + lease * interval '1 s'
        WHERE b.id = ANY (ids) AND b.owner = me RETURNING b.id;
    PERFORM smsproxy.beat(lease);
END $$;

-- Puts messages of batches that are still ours back to where they wait, all of them or those with these IDs; returns
-- how many. A batch that has none left ends.
CREATE FUNCTION smsproxy.release(me uuid, batch_ids bigint[], message_ids text[]) RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
    ours bigint[];
    freed bigint;
    first timestamptz;
BEGIN
    ours := ARRAY(SELECT b.id FROM smsproxy.batch b WHERE b.id = ANY (batch_ids) AND b.owner = me
                  ORDER BY b.id FOR UPDATE);
    WITH back AS (
        UPDATE smsproxy.outbox o SET batch = NULL
        WHERE o.batch = ANY (ours) AND (message_ids IS NULL OR o.id = ANY (message_ids)) RETURNING o.due
    )
    SELECT count(*), min(b.due) INTO freed, first FROM back b;
    PERFORM smsproxy.pull_back(first);
    DELETE FROM smsproxy.batch b WHERE b.id = ANY (ours)
        AND (SELECT true FROM smsproxy.outbox o WHERE o.batch = b.id LIMIT 1) IS NULL;
    RETURN freed;
END $$;
"""

WAITING = r"""
-- Makes a message that waits FAILED as cancelled. Returns whether it is, now or from before, and whether it is now.
-- (For "batch IS NULL" the planner may read the index of all that waits in place of the one on the ID.)
CREATE FUNCTION smsproxy.cancel(message_id text, retention float8, slice float8, OUT cancelled boolean, OUT now boolean)
LANGUAGE plpgsql AS $$
BEGIN
    now := false;
    IF EXISTS (SELECT FROM smsproxy.outbox o WHERE o.id = message_id AND coalesce(o.batch, 0) = 0) THEN
        PERFORM FROM smsproxy.mutex m WHERE m.name = 'claim' FOR UPDATE;
        PERFORM FROM smsproxy.message m WHERE m.id = message_id FOR UPDATE;
        DELETE FROM smsproxy.outbox o WHERE o.id = message_id AND coalesce(o.batch, 0) = 0;
        now := FOUND;
    END IF;
    IF now THEN
        UPDATE smsproxy.message m SET status = 'FAILED', reason = 'cancelled', changed_at = smsproxy.changed(slice)
        WHERE m.id = message_id;
    END IF;
    cancelled := now OR EXISTS (
        SELECT FROM smsproxy.message m WHERE m.id = message_id AND m.reason = 'cancelled'
        AND (m.changed_at > clock_timestamp() - retention * interval '1 s') IS NOT FALSE);
END $$;

-- The first messages that wait and expire, in order.
CREATE FUNCTION smsproxy.expiring(most bigint, OUT ids text[], OUT moments timestamptz[]) LANGUAGE plpgsql
SET enable_sort = off AS $$  -- as in `look`
BEGIN
    SELECT array_agg(f.id), array_agg(f.expires) INTO ids, moments
    FROM (SELECT o.id, o.expires FROM smsproxy.outbox o WHERE o.batch IS NULL AND o.expires < 'infinity'
          ORDER BY o.expires LIMIT most) AS f;
END $$;

-- Makes what waits and is past its expiry FAILED, at most so many messages. The first row has the seconds until the
-- next one expires; the others have the IDs.
CREATE FUNCTION smsproxy.expire(most bigint, slice float8) RETURNS TABLE (message_id text, soonest float8)
LANGUAGE plpgsql AS $$
DECLARE
    moment timestamptz := clock_timestamp();
    first timestamptz := (SELECT e.moments[1] FROM smsproxy.expiring(1) e);
    expired text[];
BEGIN
    IF first <= moment THEN
        PERFORM FROM smsproxy.mutex m WHERE m.name = 'claim' FOR UPDATE;
        expired := ARRAY(SELECT t.id FROM smsproxy.expiring(most) e, unnest(e.ids, e.moments) AS t(id, expires)
                         WHERE t.expires <= moment);
        PERFORM FROM smsproxy.message m WHERE m.id = ANY (expired) ORDER BY m.id FOR UPDATE;
        WITH gone AS (DELETE FROM smsproxy.outbox o WHERE o.id = ANY (expired) RETURNING o.id)
        SELECT array_agg(g.id) INTO expired FROM gone g;
        UPDATE smsproxy.message m SET status = 'FAILED', reason = 'expired', changed_at = smsproxy.changed(slice)
        WHERE m.id = ANY (expired);
        first := (SELECT e.moments[1] FROM smsproxy.expiring(1) e);
    END IF;
    soonest := smsproxy.seconds(moment, first);
    RETURN NEXT;
    RETURN QUERY SELECT unnest(expired), soonest;
END $$;

-- Brings forward what lingers by default and longer than this, at most so many messages; returns how many they were.
CREATE FUNCTION smsproxy.hasten(max_delay float8, most bigint) RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
    found_ids text[];
    first timestamptz;
BEGIN
    found_ids := ARRAY(SELECT o.id FROM smsproxy.outbox o
                       WHERE o.default_linger AND o.due > smsproxy.later(o.accepted_at, max_delay) LIMIT most);
    IF cardinality(found_ids) > 0 THEN
        PERFORM FROM smsproxy.pulse FOR UPDATE;  -- as in `claim`, before the other lock
        PERFORM FROM smsproxy.mutex m WHERE m.name = 'claim' FOR UPDATE;
        WITH earlier AS (
            UPDATE smsproxy.outbox o SET due = least(o.due, smsproxy.later(o.accepted_at, max_delay))
            WHERE o.id = ANY (found_ids) RETURNING o.due
        )
        SELECT min(e.due) INTO first FROM earlier e;
        PERFORM smsproxy.pull_back(first);
    END IF;
    RETURN cardinality(found_ids);
END $$;
"""

FUNCTIONS = TIMES + FRONT + SAVE + CLAIM + LEASES + WAITING
