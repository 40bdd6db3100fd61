"""The order in which steps start: right for any graph, and at a constant cost a step."""

import time
import timeit
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from galdist.config import Sweep
from galdist.schedule import Schedule


def flat(groups: list[list[str]]) -> list[str]:
    return [name for group in groups for name in group]


def test_one_at_a_time_in_order() -> None:
    schedule = Schedule({"a": [], "b": ["a"], "c": [], "d": ["b"]}, 1, {})
    order = []
    while not schedule.over:
        (group,) = schedule.take()
        assert len(group) == 1
        assert schedule.take() == []
        order += group
        schedule.done(group[0])
    assert order == ["a", "b", "c", "d"]


def test_all_that_may_at_the_same_time() -> None:
    schedule = Schedule({"a": [], "b": ["a"], "c": [], "d": ["b", "c"]}, 10, {})
    assert schedule.take() == [["a"], ["c"]]
    schedule.done("c")
    assert schedule.take() == []
    schedule.done("a")
    assert schedule.take() == [["b"]]
    schedule.done("b")
    assert schedule.take() == [["d"]]
    assert not schedule.over
    schedule.done("d")
    assert schedule.over


def test_what_is_read_and_is_not_among_the_steps_is_done() -> None:
    assert Schedule({"b": ["a"]}, 1, {}).take() == [["b"]]


def test_a_failure_blocks_what_depends_on_it_and_nothing_else() -> None:
    schedule = Schedule({"a": [], "b": ["a"], "c": [], "d": ["b", "c"], "e": ["c"]}, 10, {})
    assert flat(schedule.take()) == ["a", "c"]
    assert schedule.failed("a") == [("b", "a"), ("d", "b")]
    schedule.done("c")
    assert schedule.take() == [["e"]]
    schedule.done("e")
    assert schedule.over


def test_what_runs_already_takes_its_room() -> None:
    schedule = Schedule(dict.fromkeys("abcd", ()), 2, {})
    assert schedule.ready == ["a", "b", "c", "d"]
    schedule.start("c")
    assert schedule.take() == [["a"]]
    schedule.put_back("a")
    assert schedule.take() == [["a"]]
    schedule.done("c")
    assert schedule.take() == [["b"]]
    schedule.done("a")
    assert schedule.take() == [["d"]]


def test_members_of_a_sweep_start_together() -> None:
    steps: dict[str, list[str]] = {"x": [], "a-1": [], "y": [], "a-2": [], "b-1": ["a-1"], "b-2": ["a-2"]}
    sweeps = {"a": Sweep(("a-1", "a-2"), None), "b": Sweep(("b-1", "b-2"), None)}
    schedule = Schedule(steps, 10, sweeps)
    assert schedule.take() == [["x"], ["a-1", "a-2"], ["y"]]
    schedule.done("a-2")
    assert schedule.take() == [["b-2"]]


def members(name: str, number: int) -> list[str]:
    return [f"{name}-{n}" for n in range(number)]


def test_at_once() -> None:
    """All of a sweep together, for an array that keeps to the limit; what comes later waits for its turn."""
    steps: dict[str, list[str]] = {name: [] for name in members("a", 4)}
    steps |= {f"b-{n}": [f"a-{n}"] for n in range(4)}
    sweeps = {"a": Sweep(tuple(members("a", 4)), 2), "b": Sweep(tuple(members("b", 4)), 2)}
    schedule = Schedule(steps, 10, sweeps)
    assert schedule.take() == [members("a", 4)]
    schedule.done("a-0")
    assert schedule.take() == [["b-0"]]
    for number in (1, 2, 3):
        schedule.done(f"a-{number}")
    assert schedule.take() == [["b-1"]], "two at once"
    assert schedule.take() == []
    schedule.done("b-0")
    assert schedule.take() == [["b-2"]]


def test_at_once_where_an_earlier_run_left_some() -> None:
    schedule = Schedule(dict.fromkeys(members("a", 5), ()), 10, {"a": Sweep(tuple(members("a", 5)), 2)})
    schedule.start("a-3")
    assert schedule.take() == [["a-0"]]
    assert schedule.take() == []
    schedule.done("a-3")
    assert schedule.take() == [["a-1"]]


def test_at_once_within_the_room_for_all() -> None:
    schedule = Schedule(dict.fromkeys(members("a", 5), ()), 3, {"a": Sweep(tuple(members("a", 5)), 2)})
    assert schedule.take() == [members("a", 3)]
    schedule.done("a-0")
    assert schedule.take() == [], "two are left"
    schedule.done("a-1")
    assert schedule.take() == [["a-3"]]


def test_on_one_machine_at_once_changes_nothing() -> None:
    schedule = Schedule(dict.fromkeys(members("a", 3), ()), 1, {"a": Sweep(tuple(members("a", 3)), 2)})
    for number in range(3):
        assert schedule.take() == [[f"a-{number}"]]
        schedule.done(f"a-{number}")
    assert schedule.over


@given(st.data())
def test_any_graph(data: st.DataObject) -> None:
    """Nothing starts before what it reads is done, and everything that can be done is, whatever fails."""
    number = data.draw(st.integers(1, 12))
    steps = {f"s{i}": [f"s{j}" for j in range(i) if data.draw(st.booleans())] for i in range(number)}
    swept = tuple(name for name in steps if data.draw(st.booleans()))
    sweeps = {"s": Sweep(swept, data.draw(st.none() | st.integers(1, 3)))} if swept else {}
    parallel = data.draw(st.integers(1, 5))
    schedule = Schedule(steps, parallel, sweeps)
    done: set[str] = set()
    failed: set[str] = set()
    blocked: set[str] = set()
    running: list[str] = []
    while not schedule.over:
        for group in schedule.take():
            assert len(group) == 1 or set(group) <= set(swept)
            running += group
        assert running, "it goes on"
        assert len(running) == len(set(running)) <= parallel
        for name in running:
            assert set(steps[name]) <= done
        name = running.pop(data.draw(st.integers(0, len(running) - 1)))
        match data.draw(st.sampled_from(["done", "done", "failed", "put back"])):
            case "done":
                done.add(name)
                schedule.done(name)
            case "failed":
                failed.add(name)
                blocked.update(other for other, _ in schedule.failed(name))
            case _:
                schedule.put_back(name)
    assert done | failed | blocked == set(steps)
    assert not done & blocked
    for name in blocked:
        assert set(steps[name]) & (failed | blocked)


def chain(number: int) -> dict[str, list[str]]:
    return {f"s{n}": sorted({f"s{n - 1}", f"s{n // 2}"}) if n else [] for n in range(number)}


def wide(number: int) -> dict[str, list[str]]:
    return {f"s{n}": ["s0"] if n else [] for n in range(number)}


@pytest.mark.parametrize("graph", [chain, wide])
@pytest.mark.parametrize("at_once", [None, 3])
def test_cost_of_many_steps(graph: Callable[[int], dict[str, list[str]]], at_once: int | None) -> None:
    """Four times the steps take about four times as long."""

    def seconds(number: int) -> float:
        steps = graph(number)
        sweeps = {"s": Sweep(tuple(steps), at_once)}

        def work() -> None:
            schedule = Schedule(steps, 50, sweeps)
            while not schedule.over:
                for name in flat(schedule.take()):
                    schedule.done(name)

        # Without the garbage collector, whose cost is that of every object of the test process.
        return min(timeit.repeat(work, timer=time.process_time, number=1, repeat=3))

    assert seconds(8000) < 25 * seconds(1000)
