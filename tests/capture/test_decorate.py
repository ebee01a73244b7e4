"""Stages round functions and generators of every kind, and copies of what a program holds: alike off and on."""

from __future__ import annotations

import asyncio
import copy
import pickle
from typing import TYPE_CHECKING, Any

import pytest

import otel_npu
from tests.helpers.capturing import MILLISECOND

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Generator, Iterator

    from otel_npu.wire import frames
    from tests.helpers.capturing import Captured


@pytest.fixture(params=["off", "on"])
def either(request: pytest.FixtureRequest) -> None:
    """With tracing off, and with tracing on."""
    if request.param == "on":
        request.getfixturevalue("captured")
    else:
        otel_npu.disable()


def works_five_times(captured: Captured) -> dict[str, Callable[[], object]]:
    """Functions of each kind, each a stage of its name round 5 ms of work, and how to run them to their end."""

    @otel_npu.stage("function")
    def function() -> None:
        for _ in range(5):
            captured.device.launch(MILLISECOND)

    @otel_npu.stage("coroutine")
    async def coroutine() -> None:
        for _ in range(5):
            await asyncio.sleep(0)
            captured.device.launch(MILLISECOND)

    @otel_npu.stage("generator")
    def generator() -> Iterator[int]:
        for number in range(5):
            captured.device.launch(MILLISECOND)
            yield number

    @otel_npu.stage("async generator")
    async def async_generator() -> AsyncIterator[int]:
        for number in range(5):
            await asyncio.sleep(0)
            captured.device.launch(MILLISECOND)
            yield number

    async def drained() -> list[int]:
        return [number async for number in async_generator()]

    return {
        "function": function,
        "coroutine": lambda: asyncio.run(coroutine()),
        "generator": lambda: list(generator()),
        "async generator": lambda: asyncio.run(drained()),
    }


@pytest.mark.parametrize("kind", ["function", "coroutine", "generator", "async generator"])
def test_a_stage_lasts_as_long_as_what_it_decorates_works(captured: Captured, kind: str) -> None:
    run = works_five_times(captured)[kind]
    for _ in range(2):
        captured.device.launch(MILLISECOND)  # of no stage
        run()
    assert [(stage.name, stage.duration_ns) for stage in stages(captured)] == [(kind, 5 * MILLISECOND)] * 2
    assert captured.dropped() == {}


def stages(captured: Captured) -> list[frames.Stage]:
    return [stage for step in captured.steps() for stage in step.stages]


@otel_npu.stage("echo")
def echo() -> Generator[Any, Any, int]:
    """Yields what it is sent, and what is thrown into it; returns how often."""
    said: Any = None
    for _ in range(3):
        try:
            said = yield said
        except KeyError as error:
            said = f"caught {error}"
    return 3


@otel_npu.stage("echo")
async def async_echo() -> AsyncIterator[Any]:
    said: Any = None
    while said != "end":
        try:
            said = yield said
        except KeyError as error:
            said = f"caught {error}"


@pytest.mark.usefixtures("either")
def test_a_generator_takes_what_is_sent_and_thrown_into_it_and_returns() -> None:
    generator: Any = echo()
    assert [next(generator), generator.send(1), generator.throw(KeyError(2))] == [None, 1, "caught 2"]
    with pytest.raises(StopIteration) as ended:
        next(generator)
    assert ended.value.value == 3


@pytest.mark.usefixtures("either")
def test_an_async_generator_takes_what_is_sent_and_thrown_into_it_and_ends() -> None:
    async def use() -> list[Any]:
        generator: Any = async_echo()
        said = [await anext(generator), await generator.asend(1), await generator.athrow(KeyError(2))]
        with pytest.raises(StopAsyncIteration):
            await generator.asend("end")
        return said

    assert asyncio.run(use()) == [None, 1, "caught 2"]


def test_a_generator_that_is_closed_early_is_measured_until_then(captured: Captured) -> None:
    cleaned: list[str] = []

    @otel_npu.stage("generator")
    def generator() -> Iterator[int]:
        try:
            while True:
                captured.device.launch(MILLISECOND)
                yield 1
        finally:
            cleaned.append("generator")

    @otel_npu.stage("async generator")
    async def async_generator() -> AsyncIterator[int]:
        try:
            while True:
                captured.device.launch(MILLISECOND)
                yield 1
        finally:
            cleaned.append("async generator")

    async def use() -> None:
        running: Any = async_generator()
        await anext(running)
        await anext(running)
        await running.aclose()

    for _ in generator():
        break
    asyncio.run(use())
    assert cleaned == ["generator", "async generator"]
    assert {stage.name: stage.duration_ns for stage in stages(captured)} == {
        "generator": MILLISECOND,
        "async generator": 2 * MILLISECOND,
    }


def test_an_exception_out_of_a_generator_marks_its_stage_and_goes_on(captured: Captured) -> None:
    @otel_npu.stage("generator")
    def generator() -> Iterator[int]:
        yield 1
        raise LookupError

    @otel_npu.stage("async generator")
    async def async_generator() -> AsyncIterator[int]:
        yield 1
        raise LookupError

    async def use() -> None:
        async for _ in async_generator():
            pass

    with pytest.raises(LookupError):
        list(generator())
    with pytest.raises(LookupError):
        asyncio.run(use())
    assert [(stage.name, stage.error) for stage in stages(captured)] == [
        ("generator", "LookupError"),
        ("async generator", "LookupError"),
    ]


class Model:
    """Holds a stage and a step, as an object that is made once for all its calls does."""

    def __init__(self) -> None:
        self.forward = otel_npu.stage("forward", layers=48)
        self.step = otel_npu.step("decode", batch=[1, 2])

    def __call__(self, number: int) -> int:
        with self.step, self.forward:
            return number + 1


COPIES = [copy.copy, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("copied", COPIES, ids=["copy", "deepcopy", "pickle"])
@pytest.mark.parametrize("used", [False, True], ids=["unused", "used"])
def test_a_model_that_holds_a_stage_and_a_step_can_be_copied(copied: Callable[[Any], Any], used: bool) -> None:
    model = Model()
    if used:
        model(0)
    assert copied(model)(1) == 2


@pytest.mark.parametrize("copied", COPIES[1:], ids=["deepcopy", "pickle"])
def test_what_a_copy_measures_is_its_own(captured: Captured, copied: Callable[[Any], Any]) -> None:
    model = Model()
    with model.step:  # it is copied while it is open
        other = copied(model)
    other(1)
    first, second = captured.steps()
    assert (first.kind, first.attributes) == (second.kind, second.attributes) == ("decode", {"batch": [1, 2]})
    assert [len(step.stages) for step in (first, second)] == [0, 1]
    assert (second.stages[0].name, second.stages[0].attributes) == ("forward", {"layers": 48})
    assert captured.dropped() == {}
