"""Workers that hang, die and are left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import numpy as np
import pytest

from cadtrain.errors import EnvironmentFault, GeometryError, SchemaError
from cadtrain.geometry.sandbox import KernelPool

HELD: list[np.ndarray] = []


def behave(item: object) -> object:
    """What the item says: sleep, die, raise, or give it back."""
    match item:
        case ("sleep", seconds):
            time.sleep(seconds)  # type: ignore[arg-type]
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "exit":
            os._exit(3)
        case "geometry":
            raise GeometryError("empty", "nothing is left")
        case "schema":
            raise SchemaError("expected a list.", json_path="$.sequence", where="part.json")
        case "bug":
            raise KeyError("missing")
        case "unpicklable":
            return lambda: None
        case "lacking":
            raise EnvironmentFault("no kernel here.")
        case ("die once", marker):
            if not os.path.exists(marker):
                open(marker, "w").close()
                os.kill(os.getpid(), signal.SIGKILL)
        case ("take", mib):
            np.ones(int(mib) * 2**17).sum()
        case ("hold", mib):
            HELD.append(np.ones(int(mib) * 2**17))
            return os.getpid()
        case "pid":
            return os.getpid()
        case "threads":
            return os.environ["OMP_NUM_THREADS"]
    return item


def plain_pool(workers: int = 2, limit: float = 20.0) -> KernelPool:
    return KernelPool(workers, limit, preload=())


def test_outcomes_come_in_order_whatever_takes_longest() -> None:
    items = [("sleep", 0.4), 1, 2, ("sleep", 0.1), *range(4, 20)]
    with plain_pool() as pool:
        outcomes = list(pool.map(behave, items))
    assert [outcome.index for outcome in outcomes] == list(range(20))
    assert [outcome.value for outcome in outcomes] == items
    assert all(outcome.is_ok for outcome in outcomes)


def test_unordered_outcomes_come_when_they_are_there() -> None:
    items = [("sleep", 3), *range(1, 12)]
    with plain_pool() as pool:
        outcomes = list(pool.map_unordered(behave, items))
    assert outcomes[-1].index == 0  # eleven others did not wait for it
    assert sorted(outcome.index for outcome in outcomes) == list(range(12))
    assert all(outcome.value == items[outcome.index] for outcome in outcomes)


def test_an_item_whose_worker_dies_is_tried_again_as_often_as_asked(tmp_path: object) -> None:
    items = [("die once", f"{tmp_path}/marker"), "kill", 2]
    with KernelPool(1, 20.0, preload=(), crash_retries=1) as pool:
        outcomes = list(pool.map(behave, items))
    assert [o.value for o in outcomes] == [items[0], None, 2]
    assert outcomes[1].failure is not None
    assert outcomes[1].failure.reason == "the worker process ended with signal 9, 2 times"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_what_an_item_took_is_its_own() -> None:
    with plain_pool(1) as pool:
        outcomes = list(pool.map(behave, [0, ("take", 200), ("sleep", 0.2), "bug"]))
    plain, large, slow, failed = (outcome.peak_mib or 0.0 for outcome in outcomes)
    assert large > plain + 180
    assert slow < plain + 60  # the peak of the item before is not counted again
    assert 0 < failed < plain + 60
    assert 0.2 <= outcomes[2].seconds < 2
    assert outcomes[0].seconds < 0.2


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_worker_that_has_grown_is_replaced() -> None:
    with KernelPool(1, 20.0, preload=(), recycle_mib=300) as pool:
        small, large, after = (o.value for o in pool.map(behave, [("hold", 1), ("hold", 400), ("hold", 1)]))
    assert small == large
    assert after != large


def test_a_hang_and_a_crash_cost_their_own_items_only() -> None:
    items: list[object] = [0, ("sleep", 60), 2, "kill", 4, "segfault", "exit", 7]
    begin = time.monotonic()
    with plain_pool(limit=1.0) as pool:
        outcomes = list(pool.map(behave, items))
    assert time.monotonic() - begin < 30
    failures = {o.index: (o.failure.kind, o.failure.reason) for o in outcomes if o.failure}
    assert failures == {
        1: ("time_limit", "not done after 1 s"),
        3: ("crashed", "the worker process ended with signal 9"),
        5: ("crashed", "the worker process ended with signal 11"),
        6: ("crashed", "the worker process ended with exit code 3"),
    }
    assert [o.value for o in outcomes if o.is_ok] == [0, 2, 4, 7]


def test_what_a_function_raises_is_a_failure_with_a_kind() -> None:
    with plain_pool(1) as pool:
        outcomes = list(pool.map(behave, ["geometry", "schema", "bug", "unpicklable", "threads"]))
    kinds = [outcome.failure.kind if outcome.failure else None for outcome in outcomes]
    assert kinds == ["geometry", "schema", "error", "error", None]
    assert outcomes[0].failure is not None
    assert outcomes[0].failure.reason == "empty: nothing is left"
    assert outcomes[1].failure is not None
    assert outcomes[1].failure.reason == "part.json: $.sequence: expected a list."
    assert outcomes[2].failure is not None
    assert "KeyError: 'missing'" in outcomes[2].failure.reason
    assert "behave" in outcomes[2].failure.detail
    assert outcomes[4].value == "1"


def test_items_are_taken_only_as_far_ahead_as_the_window() -> None:
    taken: list[int] = []

    def source() -> Iterator[object]:
        for number in range(40):
            taken.append(number)
            yield ("sleep", 0.5) if number == 0 else number

    with plain_pool() as pool:
        outcomes = pool.map(behave, source(), window=6)
        next(outcomes)
        assert len(taken) <= 6
        for outcome in outcomes:
            assert len(taken) - outcome.index <= 7


def test_a_machine_that_lacks_something_ends_the_run() -> None:
    with plain_pool(1) as pool, pytest.raises(EnvironmentFault, match="no kernel here"):
        list(pool.map(behave, [1, "lacking", 3]))
    with (
        KernelPool(1, 5.0, preload=("cadtrain.no_such_module",)) as pool,
        pytest.raises(EnvironmentFault, match="cannot load"),
    ):
        list(pool.map(behave, [1]))


def test_a_map_left_early_leaves_the_pool_in_order() -> None:
    with plain_pool() as pool:
        for outcome in pool.map(behave, [0, ("sleep", 60), ("sleep", 60)]):
            assert outcome.value == 0
            break
        assert [o.value for o in pool.map(behave, [5, 6])] == [5, 6]


def test_nothing_to_do_starts_no_worker_for_long() -> None:
    with plain_pool() as pool:
        assert list(pool.map(behave, [])) == []


def is_alive(process_id: int) -> bool:
    try:
        with open(f"/proc/{process_id}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


PARENT = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits it ignored
import os, signal, sys, time
from cadtrain.geometry.sandbox import KernelPool
from tests.geometry.test_sandbox import behave
if __name__ == "__main__":
    with KernelPool(1, 100.0, preload=()) as pool:
        for outcome in pool.map(behave, ["pid", ("sleep", 90)], window=1):
            print(outcome.value, flush=True)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_parent(tmp_path: object, how: signal.Signals) -> None:
    script = f"{tmp_path}/parent.py"
    with open(script, "w") as file:
        file.write(PARENT)
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    environment = os.environ | {"PYTHONPATH": root}
    parent = subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    time.sleep(0.5)  # the worker now sleeps on its second item
    parent.send_signal(how)
    _, talk = parent.communicate(timeout=20)
    deadline = time.monotonic() + 10
    while is_alive(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(worker)
    if how is signal.SIGINT:
        assert talk.strip().splitlines()[-1] == "KeyboardInterrupt"
        assert talk.count("Traceback") == 1
