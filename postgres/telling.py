"""The webhook's side of the database: how changes are recorded, and how the next body is made of them.

**Recording.** A trigger inserts a row into `change`, in the transaction that changes the status. `record_changes` makes
the trigger when the first instance with a webhook starts, so before that the webhook costs nothing; from then on each
instance records, with a webhook or without, whichever version of its statements it sends. To make a trigger locks the
table against writers: it waits for those that have begun, and those that come later find the trigger. So what commits
after `record_changes` is recorded without exception.

**Nothing is lost.** There is no cursor. Transactions commit in another order than that of their times, sequence numbers
or IDs, so whatever a reader has seen, a row from before may still appear. `tell` deletes exactly the rows that it has
read, each by its number, in the transaction that stores the body with them. A row that appears later is found later.

**Nothing is told backwards.** For one message rows are committed in order of `seq`, since the row of the message is
locked from before the number is drawn until the commit. So whoever sees a row sees all earlier ones of its message. A
row whose status is not the message's any more has a later one behind it: it is stale, and dropped. A row that is told
has the newest status that this look could see, and what it could not see is told in a later body. Bodies are made one
after the other: under the lock 'tell', and only while no body is under way.

**Leases.** The body has an owner and a lease as batches have, see `changes.py`. `tell` gives a body that is under way
to its owner, whose claim may have got no answer, and to anybody when its lease has run out.
"""
from __future__ import annotations

__all__ = ["HAND_OVER_BODY", "PENDING", "RECORD", "RELEASE_BODY", "RENEW_BODY", "TELL", "TELLING"]

TELLING = r"""
CREATE FUNCTION smsproxy.record_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO smsproxy.change (id, status) VALUES (new.id, new.status);
    RETURN NULL;
END $$;

-- From now on changes are recorded, or not any more.
CREATE FUNCTION smsproxy.record_changes(wanted boolean) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    FOR locked IN 0..1 LOOP
        IF wanted = EXISTS (SELECT FROM pg_catalog.pg_trigger t
                            WHERE t.tgrelid = 'smsproxy.message'::regclass AND t.tgname = 'record_change') THEN
            RETURN;
        ELSIF locked = 0 THEN
            LOCK TABLE smsproxy.message IN SHARE ROW EXCLUSIVE MODE;  -- another process may be faster
        ELSIF wanted THEN
            CREATE TRIGGER record_change AFTER UPDATE OF status ON smsproxy.message FOR EACH ROW
            WHEN (new.status <> 'ACCEPTED' AND new.status <> old.status) EXECUTE FUNCTION smsproxy.record_change();
        ELSE
            DROP TRIGGER record_change ON smsproxy.message;
            TRUNCATE smsproxy.change, smsproxy.body;
        END IF;
    END LOOP;
END $$;

-- The first changes, in order; those that are stale are told by a later row, or their messages are forgotten.
-- (A message is looked up in an expression, which is no join, so that no plan ever reads all messages.)
CREATE FUNCTION smsproxy.untold(most bigint, retention float8, OUT seen bigint, OUT stale bigint[], OUT seqs bigint[],
                                OUT ids text[], OUT statuses text[], OUT reasons text[], OUT times timestamptz[])
LANGUAGE plpgsql SET enable_sort = off AS $$  -- as in `look`
DECLARE
    forgotten timestamptz := coalesce(clock_timestamp() - retention * interval '1 s', '-infinity');
BEGIN
    SELECT count(*), array_agg(w.seq) FILTER (WHERE NOT w.newest),
        array_agg(w.seq) FILTER (WHERE w.newest), array_agg(w.id) FILTER (WHERE w.newest),
        array_agg(w.status) FILTER (WHERE w.newest), array_agg(w.found[2]) FILTER (WHERE w.newest),
        array_agg(w.changed_at) FILTER (WHERE w.newest)
    INTO seen, stale, seqs, ids, statuses, reasons, times
    FROM (SELECT c.*, coalesce(c.found[1] = c.status AND c.changed_at > forgotten, false) AS newest
          FROM (SELECT f.*, (SELECT ARRAY[m.status, m.reason] FROM smsproxy.message m WHERE m.id = f.id) AS found
                FROM (SELECT * FROM smsproxy.change ORDER BY seq LIMIT most) f OFFSET 0) c) w;
END $$;

-- One look without the lock, which ends it most of the time, and one under it. Returns one row: what waits, and the
-- body, if there is one to tell.
CREATE FUNCTION smsproxy.tell(me uuid, size bigint, horizon float8, flush boolean, gather float8, retention float8,
                              lease float8)
RETURNS TABLE (waiting bigint, due_in float8, full_in float8, near bigint, body_id text, made_at float8,
               ids text[], statuses text[], reasons text[], expires_in float8)
LANGUAGE plpgsql AS $$
DECLARE
    u record;
    moment timestamptz;
    leaves boolean;
BEGIN
    full_in := 'Infinity';
    FOR locked IN 0..1 LOOP
        waiting := 0; due_in := 'Infinity'; near := 0;
        IF locked = 1 THEN
            PERFORM FROM smsproxy.mutex m WHERE m.name = 'tell' FOR UPDATE;
        END IF;
        IF EXISTS (SELECT FROM smsproxy.body) THEN
            EXIT WHEN EXISTS (SELECT FROM smsproxy.body b WHERE b.owner <> me AND b.lease_until >= clock_timestamp());
            CONTINUE WHEN locked = 0;
            UPDATE smsproxy.body b SET owner = me, lease_until = clock_timestamp() + lease * interval '1 s'
            WHERE b.owner = me OR b.lease_until < clock_timestamp();
            EXIT;
        END IF;
        LOOP
            SELECT * INTO u FROM smsproxy.untold(2 * size, retention);  -- most messages change once or twice
            EXIT WHEN locked = 0 OR u.stale IS NULL;
            DELETE FROM smsproxy.change c WHERE c.seq = ANY (u.stale);
            EXIT WHEN u.seen < 2 * size;
        END LOOP;
        moment := clock_timestamp() + interval '1 us';  -- shorter waits may be lost in rounding
        SELECT count(*) FILTER (WHERE t.due <= smsproxy.later(moment, horizon)),
            greatest(0, smsproxy.seconds(moment, min(t.due)))
        INTO near, due_in
        FROM (SELECT unnest(u.times) + gather * interval '1 s' AS due LIMIT size) t;
        waiting := cardinality(u.seqs);
        leaves := coalesce(flush AND waiting > 0 OR due_in = 0 OR near >= size, false);
        EXIT WHEN NOT leaves AND (locked = 1 OR waiting > 0 OR u.seen = 0);
        CONTINUE WHEN locked = 0 OR NOT leaves;
        INSERT INTO smsproxy.body VALUES (
            true, 'msg_' || gen_random_uuid(), round(extract(epoch FROM moment)::numeric, 3),
            u.ids[1:size], u.statuses[1:size], u.reasons[1:size], u.times[1],
            coalesce(u.times[least(size, waiting)] + retention * interval '1 s', 'infinity'),
            me, clock_timestamp() + lease * interval '1 s');
        DELETE FROM smsproxy.change c WHERE c.seq = ANY (u.seqs[1:size]);
        waiting := greatest(0, waiting - size);
    END LOOP;
    waiting := coalesce(waiting, 0);
    due_in := coalesce(due_in, 'Infinity');
    IF waiting >= size THEN
        full_in := greatest(0, smsproxy.seconds(moment, u.times[size]) + gather - horizon);
    END IF;
    SELECT b.id, b.made_at, b.ids, b.statuses, b.reasons, smsproxy.seconds(clock_timestamp(), b.until)
    INTO body_id, made_at, ids, statuses, reasons, expires_in FROM smsproxy.body b WHERE b.owner = me;
    RETURN NEXT;
END $$;
"""

RECORD = "SELECT smsproxy.record_changes(true)"
TELL = """
SELECT * FROM smsproxy.tell(
    %s::uuid, %s::bigint, %s::float8, %s::boolean, %s::float8, %s::float8, %s::float8)
"""
RENEW_BODY = """
UPDATE smsproxy.body SET lease_until = clock_timestamp() + %s::float8 * interval '1 s'
WHERE id = %s AND owner = %s::uuid RETURNING id
"""
# Nobody's, so that a renewal on its way does not find it any more.
RELEASE_BODY = """
UPDATE smsproxy.body SET lease_until = '-infinity', owner = '00000000-0000-0000-0000-000000000000'
WHERE id = %s AND owner = %s::uuid
"""
HAND_OVER_BODY = "DELETE FROM smsproxy.body WHERE id = %s AND owner = %s::uuid"
# Counts the first thousand. How many the others are about, their numbers tell, and how many messages a thousand have.
PENDING = """
SELECT (f.messages + greatest(0, coalesce((SELECT max(seq) FROM smsproxy.change), 0) - f.last)
        * f.messages / greatest(1, f.changes) + coalesce((SELECT cardinality(ids) FROM smsproxy.body), 0))::bigint,
    coalesce(extract(epoch FROM clock_timestamp() - least(f.since, (SELECT since FROM smsproxy.body))), 0)::float8
FROM (SELECT count(DISTINCT c.id) AS messages, count(*) AS changes, coalesce(max(c.seq), 0) AS last,
          min(c.changed_at) AS since
      FROM (SELECT * FROM smsproxy.change ORDER BY seq LIMIT 1000) c) f
"""
