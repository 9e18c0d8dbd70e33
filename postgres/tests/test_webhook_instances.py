"""Several processes of the whole command that tell one receiver."""
from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import Bouncer, Cluster, until
from postgres.changes import LEASE
from receivers import SECRETS, Behaviour, Receiver, Told, answer, hanging, secret_line
from service import Load, Service
from test_instances import FLAGS


class Shop(Receiver):
    """A receiver that knows the bytes of each body, and refuses a share of the requests while it is moody."""

    def __init__(self) -> None:
        super().__init__()
        self.bodies: dict[str, set[bytes]] = {}  # by their IDs
        self.moody = False
        self._rng = random.Random(1)

    def came(self, told: Told) -> Behaviour:
        self.bodies.setdefault(told.id, set()).add(told.body)
        return answer(503) if self.moody and self._rng.random() < 0.3 else super().came(told)

    def check(self, statuses: dict[str, str]) -> None:
        """It was told all of this, nothing backwards, and under each ID one body."""
        until(lambda: self.statuses == statuses, "the last change")
        assert self.backwards == []
        assert {len(bodies) for bodies in self.bodies.values()} == {1}


@pytest.fixture
def shop() -> Iterator[Shop]:
    with Shop() as receiver:
        yield receiver


def hooked(shop: Receiver, directory: Path) -> tuple[str, ...]:
    """The flags of an instance that tells it."""
    secret = directory / "secret"
    secret.write_text(secret_line(SECRETS[0]))
    return (*FLAGS, "--webhook-url", shop.url(), "--webhook-secret-file", str(secret))


def statuses(cluster: Cluster, url: str) -> dict[str, str]:
    """Of all messages that have changed."""
    return dict(cluster.sql(url, "SELECT id, status FROM smsproxy.message WHERE status <> 'ACCEPTED'"))


@pytest.mark.parametrize("count", [2, 3])
def test_every_change_of_every_instance_is_told_and_none_backwards(
    cluster: Cluster, url: str, tmp_path: Path, shop: Shop, count: int
) -> None:
    shop.moody = True
    service = Service(tmp_path, url, count, *hooked(shop, tmp_path), latency=0.05)
    with service.running() as instances:
        with Load(instances) as load:
            load.await_accepted(400)
        until(lambda: set(statuses(cluster, url).values()) == {"DELIVERED"}
              and statuses(cluster, url).keys() >= set(load.accepted), "the last report")  # fmt: skip
        shop.moody = False
        shop.check(statuses(cluster, url))


def test_an_instance_without_a_webhook_has_its_changes_told_by_one_that_has(
    cluster: Cluster, url: str, tmp_path: Path, shop: Shop
) -> None:
    (tmp_path / "without").mkdir()
    without, tells = Service(tmp_path / "without", url, 1, *FLAGS), Service(tmp_path, url, 1, *hooked(shop, tmp_path))
    with without.running() as (first,), tells.running():
        message_id = first.post()[1]["ID"]
        shop.wait_for(lambda told: shop.statuses == {message_id: "DELIVERED"})


def test_two_instances_tell_through_pgbouncer(
    cluster: Cluster, bouncer: Bouncer, url: str, tmp_path: Path, shop: Shop
) -> None:
    service = Service(tmp_path, bouncer.url(url), 2, *hooked(shop, tmp_path))
    with service.running() as instances:
        ids = [instance.post()[1]["ID"] for _ in range(20) for instance in instances]
        shop.wait_for(lambda told: shop.statuses == dict.fromkeys(ids, "DELIVERED"))
    shop.check(statuses(cluster, url))


def kill_the_teller(
    cluster: Cluster, url: str, directory: Path, shop: Shop, count: int, rng: random.Random, end: signal.Signals
) -> tuple[float, int]:
    """Kills or stops, under load, the instance that has a body under way; returns the seconds until the body comes
    again, and how many messages were told of in all."""
    directory.mkdir(exist_ok=True)
    service = Service(directory, url, count, *hooked(shop, directory)[:-4], latency=0.05)
    for instance in service.instances:  # each tells by a path of its own
        path = shop.url(f"/{instance.name}")
        instance._flags = (*instance._flags, "--webhook-url", path, *hooked(shop, directory)[-2:])
    with service.running() as instances:
        with Load(instances) as load:
            load.await_accepted(rng.randrange(50, 300))
            shop.usually, seen = hanging, len(shop.told)
            shop.wait_for(lambda told: len(told) > seen)
            body = shop.told[seen]
            (dies,) = (each for each in instances if f"/{each.name} " in body.line)
            dies.signal(end)
            killed = time.monotonic()
            load.without(dies)
            shop.usually = answer(204)
            load.await_accepted(20)
        shop.wait_for(lambda told: len(told) > seen + 1)
        took = time.monotonic() - killed
        again = shop.told[seen + 1]
        assert (again.id, again.body) == (body.id, body.body)
        until(lambda: not cluster.sql(url, "SELECT id FROM smsproxy.outbox"), "the last hand-over")
        until(lambda: shop.statuses == statuses(cluster, url), "the last change")
        shop.check(statuses(cluster, url))
        if end is signal.SIGSTOP:
            dies.signal(signal.SIGCONT)
            until(lambda: f"another instance tells {body.id}" in dies.log, "the end of the request that was stopped")
            shop.check(statuses(cluster, url))
        return took, len(shop.statuses)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP])
def test_the_body_of_an_instance_that_dies_or_hangs_is_told_by_another_as_it_was(
    cluster: Cluster, url: str, tmp_path: Path, shop: Shop, end: signal.Signals
) -> None:
    took, told = kill_the_teller(cluster, url, tmp_path, shop, 2, random.Random(1), end)
    print(f"\n{end.name} while it told: {took:.1f} s until the body came again; {told} messages told of")
    assert took < LEASE + 5.0


def test_a_stop_hands_the_body_on_at_once(cluster: Cluster, url: str, tmp_path: Path, shop: Shop) -> None:
    """The receiver is away, so the body waits for its next try; the lease is far from its end."""
    shop.usually = answer(503, "Retry-After: 3000")
    service = Service(tmp_path, url, 2, *hooked(shop, tmp_path))
    first, second = service.instances
    try:
        first.launch()
        first.await_ready()
        message_id = first.post()[1]["ID"]
        shop.wait_for(lambda told: len(told) == 1)
        until(lambda: "the webhook's receiver takes nothing" in first.log, "the end of the request")
        second.launch()
        second.await_ready()
        shop.usually = answer(204)
        stopped = time.monotonic()
        first.signal(signal.SIGTERM)
        assert first.wait() == 0
        shop.wait_for(lambda told: len(told) >= 2)
        assert time.monotonic() - stopped < LEASE / 2
        assert shop.bodies.keys() == {shop.told[0].id}
        shop.wait_for(lambda told: message_id in shop.statuses)
    finally:
        for instance in (first, second):
            instance.end()
    shop.check(statuses(cluster, url))


@pytest.mark.long
@pytest.mark.parametrize("seed", range(25))
def test_the_same_25_times_with_three_instances(
    cluster: Cluster, url: str, tmp_path: Path, shop: Shop, seed: int
) -> None:
    took, told = kill_the_teller(cluster, url, tmp_path, shop, 3, random.Random(seed), signal.SIGKILL)
    print(f"\n{told} messages told of, none backwards; the body came again after {took:.1f} s")
