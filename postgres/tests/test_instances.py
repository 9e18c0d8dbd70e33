"""Several processes of the whole command on one database, with what goes wrong in the life of a service."""
from __future__ import annotations

import os
import random
import signal
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster import HANG, Bouncer, Cluster, until
from service import Instance, Load, Request, Service

LEASE = 3.0  # seconds; the shortest that the command takes
SENDERS = 2
FLAGS = ("--lease", f"{LEASE}", "--batch-size", "20", "--max-delay", "0.1", "--senders", f"{SENDERS}")


def backlog(cluster: Cluster, url: str) -> int:
    return int(cluster.sql(url, "SELECT count(*) FROM smsproxy.outbox")[0][0])


def await_sent(service: Service, ids: Sequence[str]) -> None:
    """Returns when the provider took all these messages."""
    until(lambda: service.sent().issuperset(ids), "the last request")


def await_delivery(instance: Instance, message_id: str) -> None:
    """Returns when an instance says that the message is delivered."""
    until(lambda: instance.call("GET", f"/sms/{message_id}")[1]["Status"] == "DELIVERED", "the delivery report")


def last_requests(service: Service, instance: Instance) -> list[Request]:
    """The requests that an instance had under way, or had just ended, when it was killed: one a sender."""
    ours = [request for request in service.requests() if request.instance == instance.name]
    return list({request.thread: request for request in ours}.values())


def stop_in_requests(service: Service, instance: Instance) -> list[Request]:
    """Stops a process; if a sender is in no request, lets it go on and returns nothing.

    A sender that is stopped after its look at the lease and before its request makes the request when it wakes up: no
    look can be late enough. It takes microseconds, and milliseconds when threads compete, so a test would meet it.
    """
    instance.signal(signal.SIGSTOP)
    assert instance.process is not None
    os.waitid(os.P_PID, instance.process.pid, os.WSTOPPED)
    found = [request for request in last_requests(service, instance) if request.end is None]
    if len(found) < SENDERS:
        instance.signal(signal.SIGCONT)
        return []
    return found


def check_nothing_lost(service: Service, load: Load, interrupted: Sequence[Request] = ()) -> None:
    """Every accepted message was taken, and once more at most for each interrupted request that it was in."""
    assert not set(load.accepted) - service.sent()
    excused = Counter(message_id for request in interrupted for message_id in request.ids)
    taken = service.taken()
    assert not [message_id for message_id in taken if len(taken[message_id]) > 1 + excused[message_id]]


def test_every_instance_accepts_and_every_instance_knows_all_messages(tmp_path: Path, url: str) -> None:
    with Service(tmp_path, url, 2, *FLAGS).running() as instances:
        ids = [instance.post()[1]["ID"] for instance in instances for _ in range(5)]
        for instance in instances:
            for message_id in ids:
                await_delivery(instance, message_id)
            assert instance.call("GET", "/healthz")[0] == 200


def test_the_same_idempotency_key_at_two_instances_at_once_is_one_message(tmp_path: Path, url: str) -> None:
    service = Service(tmp_path, url, 2, *FLAGS)
    barrier = threading.Barrier(8)

    def post(number: int) -> list[tuple[int, str]]:
        answers = []
        for key in range(20):
            barrier.wait(HANG)
            status, document = service.instances[number % 2].post(key=f"order-{key}")
            answers.append((status, document.get("ID", document)))
        return answers

    with service.running(), ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(post, range(8)))
        assert answers == [answers[0]] * 8
        assert {status for status, _ in answers[0]} == {202}
        ids = [message_id for _, message_id in answers[0]]
        assert len(set(ids)) == 20
        await_sent(service, ids)
        status, _ = service.instances[0].post("another text", key="order-1")
        assert status == 422
    assert sorted(each for request in service.requests() for each in request.ids) == sorted(ids)


def test_what_one_instance_accepted_another_cancels_and_of_a_cancel_and_a_claim_one_gets_it(
    tmp_path: Path, url: str
) -> None:
    service = Service(tmp_path, url, 2, *FLAGS)
    with service.running() as (one, other), ThreadPoolExecutor(4) as pool:
        ids = [one.post(MaxDelay=0.2 + number / 100)[1]["ID"] for number in range(60)]
        patient = one.post(MaxDelay=600)[1]["ID"]
        statuses = list(pool.map(lambda each: other.call("DELETE", f"/sms/{each}")[0], reversed([*ids, patient])))[::-1]
        cancelled = {each for each, status in zip([*ids, patient], statuses, strict=True) if status == 200}
        assert patient in cancelled
        assert set(statuses) <= {200, 409}
        await_sent(service, [each for each in ids if each not in cancelled])
        cancelled_now = {"Status": "FAILED", "Reason": "cancelled"}
        assert [one.call("GET", f"/sms/{each}")[1] for each in cancelled] == [cancelled_now] * len(cancelled)
    assert service.taken().keys() == set(ids) - cancelled


def test_what_an_instance_that_died_had_accepted_leaves_when_it_is_due_and_what_is_patient_rides_with_it(
    tmp_path: Path, url: str
) -> None:
    service = Service(tmp_path, url, 2, *FLAGS)
    with service.running() as (dies, stays):
        ids = [dies.post(MaxDelay=delay)[1]["ID"] for delay in (600, 2, 600)]
        dies.signal(signal.SIGKILL)
        dies.wait()
        await_sent(service, ids)
        (request,) = service.requests()
        assert (request.instance, request.ids) == (stays.name, [ids[1], ids[0], ids[2]])


def run_round(cluster: Cluster, url: str, directory: Path, rng: random.Random) -> None:
    """Three instances under load; one is killed; one hangs at a random moment, and wakes up when the third did all."""
    service = Service(directory, url, 3, *FLAGS, "--backoff-base", "0.05", latency=0.3, failures=0.1)
    with service.running() as instances, Load(instances) as load:
        dies, hangs, stays = rng.sample(instances, 3)
        load.await_accepted(rng.randrange(50, 400))
        load.without(dies)
        dies.signal(signal.SIGKILL)
        dies.wait()
        load.await_accepted(rng.randrange(50, 200))
        hung = until(lambda: stop_in_requests(service, hangs), "a moment when each sender is in a request")
        load.without(hangs)
        load.stop()
        until(lambda: not backlog(cluster, url), "the hand-over of all messages by the instance that stays")
        before, known = len(service.requests()), cluster.sql(url, "SELECT id FROM smsproxy.message")
        hangs.signal(signal.SIGCONT)
        message_id = hangs.post()[1]["ID"]  # it is awake, and serves
        await_sent(service, [message_id])
        await_delivery(hangs, message_id)
        later = {each for request in service.requests()[before:] for each in request.ids}
        assert not later.intersection(row[0] for row in known)  # of what it held when it was stopped, it sends nothing
        check_nothing_lost(service, load, [*last_requests(service, dies), *hung])
        statuses = {stays.call("GET", f"/sms/{each}")[1]["Status"] for each in load.accepted[:50]}
        # What was taken from those that died is reported to nobody: the provider's stand-in dies with its process.
        assert statuses <= {"DELIVERED", "CONFIRMED", "ACCEPTED"}


def test_one_instance_dies_and_one_hangs_and_nothing_is_lost(cluster: Cluster, url: str, tmp_path: Path) -> None:
    run_round(cluster, url, tmp_path, random.Random(1))


@pytest.mark.long
@pytest.mark.parametrize("seed", range(100, 125))
def test_the_same_25_times(cluster: Cluster, url: str, tmp_path: Path, seed: int) -> None:
    run_round(cluster, url, tmp_path, random.Random(seed))


def test_a_server_that_crashes_under_load_loses_nothing(cluster: Cluster, url: str, tmp_path: Path) -> None:
    service = Service(tmp_path, url, 2, *FLAGS, latency=0.01)
    with service.running() as instances:
        with Load(instances) as load:
            load.await_accepted(100)
            cluster.restart("immediate")
            load.await_accepted(100)
        await_sent(service, load.accepted)
        until(lambda: not backlog(cluster, url), "the record of the last hand-over")
    assert set(load.refused) <= {503}
    check_nothing_lost(service, load)
    assert Cluster.PASSWORD not in "".join(instance.log for instance in instances)


def test_a_rolling_restart_hands_the_work_on_at_once(cluster: Cluster, url: str, tmp_path: Path) -> None:
    """The lease is far longer than the test: what is released need not wait for it."""
    backoff = ("--backoff-base", "600", "--backoff-max", "600")
    service = Service(tmp_path, url, 2, *FLAGS[2:], "--lease", "3600", *backoff, failures=1.0)
    first, second = service.instances
    try:
        first.launch()
        first.await_ready()
        ids = [first.post()[1]["ID"] for _ in range(3)]
        until(lambda: any(request.end for request in service.requests()), "the first request")
        second._environ["JOURNAL_FAILURES"] = "0"
        second.launch()
        second.await_ready()
        first.signal(signal.SIGTERM)
        assert first.wait() == 0
        await_sent(service, ids)
    finally:
        for instance in (first, second):
            instance.end()


def test_three_instances_make_as_many_requests_as_one(cluster: Cluster, url: str, tmp_path: Path) -> None:
    """The same messages at the same moments go to a service of one instance and to one of three."""
    services = []
    for name, database, count in (("one", cluster.create("one"), 1), ("three", url, 3)):
        (tmp_path / name).mkdir()
        services.append(Service(tmp_path / name, database, count, "--max-delay", "0.5", "--batch-size", "20"))
    rng = random.Random(7)
    with services[0].running(), services[1].running(), ThreadPoolExecutor(2) as pool:
        ids: list[list[str]] = [[], []]
        for _ in range(150):
            targets = [rng.choice(service.instances) for service in services]
            for answers, (_, document) in zip(ids, pool.map(Instance.post, targets), strict=True):
                answers.append(document["ID"])
            threading.Event().wait(rng.expovariate(100))  # the trace: arrivals at random times
        for service, answers in zip(services, ids, strict=True):
            await_sent(service, answers)
    one, three = (len(service.requests()) for service in services)
    print(f"requests for 150 messages: {one} with one instance, {three} with three")
    assert three <= 1.1 * one + 1


def test_two_instances_work_through_pgbouncer(bouncer: Bouncer, url: str, tmp_path: Path) -> None:
    service = Service(tmp_path, bouncer.url(url), 2, *FLAGS, latency=0.01)
    with service.running() as instances:
        with Load(instances) as load:
            load.await_accepted(200)
        await_sent(service, load.accepted)
    assert not load.refused
    check_nothing_lost(service, load)


def test_without_a_server_the_command_says_so_in_one_line(tmp_path: Path) -> None:
    service = Service(tmp_path, f"postgresql://smsproxy:{Cluster.PASSWORD}@127.0.0.1:1/none", 1, *FLAGS)
    (instance,) = service.instances
    instance.launch()
    assert instance.wait() == 1
    assert "cannot start: cannot connect to PostgreSQL" in instance.log.splitlines()[-1]
    assert Cluster.PASSWORD not in instance.log
    assert "Traceback" not in instance.log
