"""Reading ahead: order, bounds, errors, ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from cadtrain.data.loader import ReadAhead


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_results_come_in_the_order_of_the_orders(num_workers: int) -> None:
    def make(number: int) -> int:
        time.sleep(0.002 * (number % 3))  # later ones are ready first
        return number * number

    with ReadAhead(make, range(20), num_workers=num_workers) as packs:
        assert list(packs) == [n * n for n in range(20)]
        with pytest.raises(StopIteration):
            next(packs)


def test_no_more_is_read_ahead_than_depth() -> None:
    taken: list[int] = []

    def orders() -> Iterator[int]:
        for number in range(100):
            taken.append(number)
            yield number

    with ReadAhead(lambda n: n, orders(), num_workers=2, depth=5) as packs:
        assert taken == []
        for number in range(20):
            assert next(packs) == number
            assert len(taken) == number + 1 + 5, "as far ahead as depth, and no further"


def test_without_workers_nothing_is_read_before_it_is_asked_for() -> None:
    made: list[int] = []
    with ReadAhead(lambda n: made.append(n) or n, range(5), num_workers=0) as packs:
        assert made == []
        next(packs)
        assert made == [0]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_priming_takes_an_order_and_loses_none(num_workers: int) -> None:
    taken: list[int] = []

    def orders() -> Iterator[int]:
        for number in range(3):
            taken.append(number)
            yield number

    with ReadAhead(lambda n: n, orders(), num_workers=num_workers) as packs:
        packs.prime()
        assert taken[:1] == [0]
        assert list(packs) == [0, 1, 2]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_exception_reaches_the_consumer_at_its_place(num_workers: int) -> None:
    def make(number: int) -> int:
        if number == 3:
            raise RuntimeError("sample 3 is broken")
        return number

    with ReadAhead(make, range(6), num_workers=num_workers) as packs:
        assert [next(packs) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(RuntimeError, match="sample 3 is broken"):
            next(packs)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_exception_in_the_orders_reaches_the_consumer(num_workers: int) -> None:
    def orders() -> Iterator[int]:
        yield 0
        raise ValueError("no plan for this step")

    with ReadAhead(lambda n: n, orders(), num_workers=num_workers) as packs, pytest.raises(ValueError, match="no plan"):
        list(packs)


def test_close_drops_what_waits_and_ends_the_threads() -> None:
    release, started, made = threading.Event(), threading.Event(), []

    def make(number: int) -> int:
        started.set()
        release.wait(5)
        made.append(number)
        return number

    packs = ReadAhead(make, range(10), num_workers=1, depth=4)
    packs.prime()
    assert started.wait(5)
    before = [thread for thread in threading.enumerate() if thread.name.startswith("packs")]
    assert before
    threading.Timer(0.1, release.set).start()
    packs.close()
    assert made == [0], "what was under way ends, what waited is dropped"
    assert not any(thread.is_alive() for thread in before)


def test_leaving_the_block_by_an_error_ends_the_threads() -> None:
    def loop() -> None:
        with ReadAhead(lambda n: n, range(1000), num_workers=2) as packs:
            next(packs)
            raise KeyError("the loop failed")

    with pytest.raises(KeyError):
        loop()
    assert not any(thread.name.startswith("packs") and thread.is_alive() for thread in threading.enumerate())


def test_waiting_is_measured() -> None:
    with ReadAhead(lambda n: time.sleep(0.05), range(2), num_workers=0) as packs:
        list(packs)
        assert 0.1 <= packs.waited_seconds < 1.0
