"""What programs give as names, attributes and requests: taken as it is then, and nothing odd ever costs the step."""

from __future__ import annotations

import enum
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import otel_npu
from otel_npu.capture import arguments
from tests.helpers.capturing import MILLISECOND

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from tests.helpers.capturing import Captured


class Phase(str, enum.Enum):
    FORWARD = "forward"


class Kind(enum.Enum):
    SAMPLE = "sample"
    OTHER = (1, 2)


class Level(enum.IntEnum):
    HIGH = 7


class Name(str):
    __slots__ = ()

    def __str__(self) -> str:
        raise AssertionError("asked for its text")


class Unreadable(bytes):
    def decode(self, *_: object, **__: object) -> str:
        raise OSError


NAMES = [
    (Phase.FORWARD, "forward"),
    (Kind.SAMPLE, "sample"),
    (Kind.OTHER, "OTHER"),
    (b"forward\xff", "forward\N{REPLACEMENT CHARACTER}"),
    (Unreadable(b"x"), "Unreadable"),
    (3, "3"),
    (2.5, "2.5"),
    (None, "NoneType"),
    (["a list"], "list"),
    (int, "type"),
    (Name("forward"), "forward"),
    ("\ud800forward", "?forward"),
    ("", ""),
    ("x" * 200_000, "x" * 256),
    ("vorwärts", "vorwärts"),
]


@pytest.mark.parametrize(("name", "text"), NAMES, ids=[repr(text)[:12] for _, text in NAMES])
def test_whatever_is_a_name_is_one_that_can_be_sent(captured: Captured, name: Any, text: str) -> None:
    with otel_npu.step(name):
        captured.stage("before")
        captured.stage(name)
    captured.stage(name)
    step, bare = captured.steps()
    assert (step.kind, [stage.name for stage in step.stages]) == (text, ["before", text])
    assert [stage.name for stage in bare.stages] == [text]
    assert captured.dropped() == {}


@pytest.mark.parametrize(("name", "_"), NAMES, ids=[repr(text)[:12] for _, text in NAMES])
def test_it_is_none_the_worse_while_tracing_is_off(name: Any, _: str) -> None:
    otel_npu.disable()
    with otel_npu.step(name), otel_npu.stage(name), otel_npu.stage(name, layer=1):
        pass


def test_a_function_in_the_place_of_a_name_is_a_clear_error(captured: Captured) -> None:
    for _ in ("on", "off"):
        with pytest.raises(TypeError, match=r'stage\(\) takes a name first: @otel_npu.stage\("forward"\)'):
            otel_npu.stage(len)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r'step\(\) decorates no function, .* with otel_npu.step\("decode"\):'):
            otel_npu.step(len)  # type: ignore[arg-type]
        otel_npu.disable()


def test_what_is_given_to_enable_or_flush_by_mistake_is_a_clear_error(captured: Captured) -> None:
    for _ in ("on", "off"):
        with pytest.raises(TypeError, match=r"enable\(\) takes otel_npu.Settings\(...\), not dict"):
            otel_npu.enable({"device": "cpu"})  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"flush\(\) takes a number of seconds, not str"):
            otel_npu.flush("5")  # type: ignore[arg-type]
        otel_npu.disable()


@pytest.mark.parametrize(
    ("value", "taken"),
    [
        (Level.HIGH, 7),
        (Phase.FORWARD, "forward"),
        (Kind.SAMPLE, "sample"),
        (Path("/models/llama"), "/models/llama"),
        (Path("/models/\udcff"), None),
        ([1, 2.5], [1.0, 2.5]),
        ((True, False), [True, False]),
        ([True, 1], None),
        (math.inf, math.inf),
        (range(3), None),
        (Kind.OTHER, None),
    ],
    ids=repr,
)
def test_a_value_with_one_obvious_meaning_is_kept(captured: Captured, value: Any, taken: Any) -> None:
    captured.stage("forward", value=value)
    (stage,) = captured.step().stages
    assert (stage.attributes or {}) == ({} if taken is None else {"value": taken})
    assert captured.dropped() == ({"bad_attribute": 1} if taken is None else {})


def test_so_is_one_of_numpys(captured: Captured) -> None:
    numpy = pytest.importorskip("numpy")
    given = {
        "int64": numpy.int64(3),
        "float32": numpy.float32(1.5),
        "flag": numpy.bool_(True),
        "text": numpy.str_("text"),
        "list": [numpy.int64(1), numpy.int32(2)],
        "row": numpy.arange(2),
        "nothing": numpy.float32("nan"),
    }
    with otel_npu.step("decode", **given, table=numpy.zeros((2, 2)), long=numpy.zeros(1025)):
        captured.stage(numpy.str_("forward"))
    step = captured.step()
    assert step.stages[0].name == "forward"
    attributes = dict(step.attributes or {})
    assert math.isnan(attributes.pop("nothing"))  # type: ignore[arg-type]
    assert attributes == {"int64": 3, "float32": 1.5, "flag": True, "text": "text", "list": [1, 2], "row": [0, 1]}
    assert captured.dropped() == {"bad_attribute": 2}


def test_so_is_one_of_torchs_unless_a_device_would_have_to_be_waited_for(captured: Captured) -> None:
    torch = pytest.importorskip("torch")
    given = {"size": torch.Size([2, 3]), "number": torch.tensor(3), "row": torch.tensor([0.5, 1.5])}
    with otel_npu.step("decode", **given, dtype=torch.float16, elsewhere=torch.empty(1, device="meta")):
        captured.stage("forward")
    assert captured.step().attributes == {"size": [2, 3], "number": 3, "row": [0.5, 1.5]}
    assert captured.dropped() == {"bad_attribute": 2}


def test_what_is_left_out_is_named_once_in_the_log(
    captured: Captured, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arguments, "_named", set())
    for number in range(50):
        captured.stage("forward", odd={}, **{f"odd{number}": {}})
    captured.steps()
    named = [record.getMessage() for record in caplog.records]
    assert named[0] == "attribute 'odd' is left out: a dict is nothing that a span can carry"
    assert len(named) == len(set(named)) == 16  # for whoever looks; the counts have them all
    assert captured.dropped() == {"bad_attribute": 100}


TRACEPARENTS = [f"00-{number:032x}-{number:016x}-01" for number in range(1, 7)]


@pytest.mark.parametrize(
    "given",
    [list, tuple, set, iter, dict.fromkeys, lambda requests: (request for request in requests)],
    ids=["list", "tuple", "set", "iterator", "keys", "generator"],
)
def test_any_iterable_is_a_list_of_requests(captured: Captured, given: Callable[[Iterable[str]], Any]) -> None:
    with otel_npu.step("decode", requests=given(TRACEPARENTS)):
        captured.stage("forward")
    assert len(captured.step().links) == 6
    assert captured.dropped() == {}


@pytest.mark.parametrize(
    "given", [TRACEPARENTS[0], TRACEPARENTS[0].encode(), 3, None], ids=["text", "bytes", "number", "nothing"]
)
@pytest.mark.parametrize("turn_off", [True, False], ids=["off", "on"])
def test_what_is_no_list_of_requests_is_a_clear_error(captured: Captured, given: Any, turn_off: bool) -> None:
    if turn_off:
        otel_npu.disable()
    with pytest.raises(TypeError, match=rf"requests takes a list of requests, not {type(given).__name__}"):
        otel_npu.step("decode", requests=given)


def test_a_list_that_the_program_goes_on_using_is_taken_as_it_was(captured: Captured) -> None:
    """As in a loop that batches continuously: the device is behind, and the loop has gone on."""
    running: list[str] = []
    shape: list[int] = []
    for number in range(3):
        running.append(TRACEPARENTS[number])
        shape[:] = [number, len(running)]
        with otel_npu.step("decode", requests=running, shape=shape), otel_npu.stage("forward", shape=shape):
            captured.device.launch(30 * MILLISECOND)
    running.clear()
    shape[:] = [-1]
    told = [(len(step.links), step.attributes, step.stages[0].attributes) for step in captured.steps()]
    assert told == [(count + 1, {"shape": [count, count + 1]}, {"shape": [count, count + 1]}) for count in range(3)]
