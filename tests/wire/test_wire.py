"""The wire: frames as they are packed, a sender that never blocks, and the place where both ends meet."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import stat
import threading
from typing import TYPE_CHECKING

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from otel_npu import semconv
from otel_npu.drops import Drops
from otel_npu.settings import SESSION
from otel_npu.wire import channel as channel_module
from otel_npu.wire import frames, rendezvous
from otel_npu.wire.channel import Channel
from otel_npu.wire.frames import MAX_STAGES
from tests.helpers.built import hello, request, request_end, scheduled, stage, step, unfinished, updated

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# Frames


@pytest.mark.parametrize(
    "frame",
    [
        hello(),
        step(),
        step(trace_id=b"", span_id=b"", stages=[]),
        step(
            error="ValueError",
            attributes={"text": "ü", "flag": True, "number": -(1 << 63), "share": 0.5, "list": ["a", "b"]},
            links=[b"l" * 25] * 3,
            dropped={"pool_exhausted": 2},
            stages=[stage(), stage(parent=0, device_ns=None), stage(parent=1, device_ns=-5)],
        ),
        unfinished(),
        frames.Ping(0, -5, 1000, 2000),
        request(request_id="a request's id; of the user's"),
        scheduled(requests=[1, 2], tokens=[1, 3], prefills=[False, True], total_tokens=9, total_requests=3),
        scheduled(trace_id=b"", total_tokens=0, total_requests=0, ended=[1], preempted=[2]),
        updated(requests=[1, 2], new_tokens=[1, 0], finished=[2]),
        request_end(),
        frames.Flush(1, 2.5),
    ],
    ids=lambda frame: type(frame).__name__,
)
def test_a_frame_arrives_as_it_was_sent(frame: msgspec.Struct) -> None:
    assert frames.decode_frame(frames.encode(frame)) == frame


def test_a_bad_frame_costs_no_other_of_its_packet() -> None:
    good = step(3)
    inside = frames.encode(frames.Several([]))
    sent = [step(1), step(2, opened_ns=-1), ("nonsense",), msgspec.Raw(inside), good]
    taken = frames.frames_in(frames.encode(("several", sent)))
    assert frames.decode_frame(taken[4]) == good
    for bad in taken[1:4]:
        with pytest.raises(ValueError):
            frames.decode_frame(bad)


def test_a_packet_that_is_cut_off_is_refused() -> None:
    packet = frames.encode(("several", [step(1), step(2)]))
    with pytest.raises(ValueError):
        frames.frames_in(packet[:-5])


@pytest.mark.parametrize(
    ("frame", "why"),
    [
        (step(span_id=b""), "span id of 0 bytes"),
        (step(stages=[stage()] * 1025), "length <= 1024"),
        (step(links=[b"short"]), "link of 5 bytes"),
        (frames.Ping(0, 0, 2000, 1000), "seen before"),
        (unfinished(now_ns=0), "in the future"),
        (request(key=b""), "request key"),
        (request(trace_id=b"\0" * 16), "all zero"),
        (request(parent_span_id=b""), "parent span id"),
        (scheduled(span_id=b""), "span id"),
        (scheduled(requests=[1], tokens=[], prefills=[True]), "1 requests with 0 counts"),
        (scheduled(requests=[1], tokens=[2], prefills=[True]), "more in its parts"),
        (updated(requests=[1]), "1 requests with 0 counts of new tokens"),
        (updated(span_id=b"1"), "span id of 1 bytes"),
        (request_end(key=b"123"), "request key of 3 bytes"),
    ],
)
def test_a_frame_that_says_what_can_not_be_is_refused_with_the_reason(frame: msgspec.Struct, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        frames.decode_frame(frames.encode(frame))


def is_taken_or_refused(packet: bytes) -> None:
    """Whatever else `decode_frame` raises fails the test."""
    with contextlib.suppress(ValueError):
        frames.decode_frame(packet)


@given(st.binary(max_size=200))
def test_whatever_bytes_come_they_are_a_frame_or_a_value_error(packet: bytes) -> None:
    is_taken_or_refused(packet)


GOOD = frames.encode(step(stages=[stage(attributes={"a": [1, 2]}), stage(parent=0)], links=[b"l" * 25]))


@given(st.integers(0, len(GOOD) - 1), st.binary(min_size=1, max_size=4))
def test_a_damaged_frame_is_a_frame_or_a_value_error(at: int, damage: bytes) -> None:
    is_taken_or_refused(GOOD[:at] + damage + GOOD[at + len(damage) :])


def test_the_largest_step_fits_into_a_frame() -> None:
    stages = [stage(name="n" * 20, entered_ns=1 << 62, exited_ns=1 << 62, device_ns=1 << 62)] * MAX_STAGES
    assert len(frames.encode(step(stages=stages, links=[b"l" * 25] * 1000))) < frames.MAX_FRAME_BYTES


# The sending end


class Line:
    """A channel, the other end of its socket, and what it counts."""

    def __init__(self, *, connected: bool = True) -> None:
        self.drops = Drops()
        self.greetings = 0
        self.channel = Channel(self.hello, self.drops)
        self.peer: socket.socket | None = None
        if connected:
            self.connect()

    def hello(self) -> frames.Hello:
        self.greetings += 1
        return hello(pid=self.greetings)

    def connect(self) -> None:
        self.close_peer()
        ours, self.peer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.peer.setblocking(False)
        self.channel.attach(ours)

    def close_peer(self) -> None:
        if self.peer is not None:
            self.peer.close()

    def arrived(self) -> list[frames.Frame]:
        """What has arrived and not been read yet."""
        assert self.peer is not None
        packets: list[frames.Frame] = []
        try:
            while packet := self.peer.recv(frames.MAX_FRAME_BYTES):
                packets += map(frames.decode_frame, frames.frames_in(packet))
        except BlockingIOError:
            pass
        return packets

    def send(self, number: int, *, filler: int = 0, dropped: dict[str, int] | None = None) -> None:
        frame = step(number, attributes={"filler": "x" * filler}, dropped=dropped or {})
        self.channel.send(frames.encode(frame), frame.dropped)

    def all_that_waits(self) -> list[frames.Frame]:
        """What has arrived when nothing waits any more."""
        packets = self.arrived()
        while not self.channel.empty:
            self.channel.send_deferred()
            self.channel.drain()
            packets += self.arrived()
        return packets

    def numbers(self) -> list[int]:
        return step_numbers(self.arrived())


def step_numbers(arrived: list[frames.Frame]) -> list[int]:
    return [frame.number for frame in arrived if isinstance(frame, frames.Step)]


@pytest.fixture
def line() -> Iterator[Line]:
    made = Line()
    yield made
    made.channel.close()
    made.close_peer()


def test_a_connection_begins_with_a_hello(line: Line) -> None:
    assert (line.arrived(), line.greetings) == ([], 0)  # nobody knows the device yet
    line.send(1)
    line.send(2)
    first, *rest = line.arrived()
    assert first == hello(pid=1)
    assert rest == [step(1, attributes={"filler": ""}), step(2, attributes={"filler": ""})]


def test_it_says_hello_again_when_what_it_says_has_changed(line: Line) -> None:
    line.send(1)
    line.channel.greet_again()
    line.send(2)
    assert [type(frame).__name__ for frame in line.arrived()] == ["Hello", "Step", "Hello", "Step"]


def test_a_full_socket_never_blocks_and_what_waits_goes_in_order(line: Line) -> None:
    for number in range(1000):
        line.send(number, filler=4000)
    assert not line.channel.empty
    assert step_numbers(line.all_that_waits()) == list(range(1000))
    assert line.drops.take_line() == ""


def test_what_comes_while_others_wait_does_not_overtake_them(line: Line) -> None:
    for number in range(200):
        line.send(number, filler=4000)
    assert not line.channel.empty
    received = line.numbers()  # now there is room again
    line.send(200)
    received += step_numbers(line.all_that_waits())
    assert received == list(range(201))


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Line]:
    """A channel that is not connected yet, and may keep little."""
    monkeypatch.setattr(channel_module, "MAX_BACKLOG_BYTES", 50_000)
    made = Line(connected=False)
    yield made
    made.channel.close()
    made.close_peer()


def test_without_a_relay_frames_wait_and_are_bounded(waiting: Line) -> None:
    line = waiting
    size = len(frames.encode(step(1, attributes={"filler": "x" * 900})))
    for number in range(1000):
        line.send(number, filler=900)
        assert line.channel._backlog_bytes == sum(len(frame) for frame, _ in line.channel._backlog) <= 50_000
    kept = len(line.channel._backlog)
    assert kept == pytest.approx(50_000 / size, abs=2)
    assert line.drops.take_unsent() == {"backlog_full": 1000 - kept}
    line.connect()
    assert step_numbers(line.all_that_waits()) == list(range(1000 - kept, 1000))  # the newest
    assert line.channel._backlog_bytes == 0


def test_counts_in_a_frame_that_is_dropped_go_with_a_later_one(waiting: Line) -> None:
    """Else a long outage would be known only by what was dropped at its end."""
    line = waiting
    for number in range(1000):
        line.send(number, filler=100, dropped=line.drops.take_unsent())
    kept = len(line.channel._backlog)
    line.connect()
    told = sum(sum(frame.dropped.values()) for frame in line.all_that_waits() if isinstance(frame, frames.Step))
    assert told + sum(line.drops.take_unsent().values()) == 1000 - kept


def test_a_frame_too_large_for_a_packet_is_counted(line: Line) -> None:
    line.send(1, filler=frames.MAX_FRAME_BYTES, dropped={"bad_link": 2})
    line.send(2)
    assert line.numbers() == [2]
    assert line.drops.take_unsent() == {"bad_frame": 1, "bad_link": 2}


def test_threads_share_it_and_each_ones_frames_stay_in_order(line: Line) -> None:
    def send(first: int) -> None:
        for number in range(first, first + 500):
            line.send(number, filler=500)

    threads = [threading.Thread(target=send, args=(thread * 1000,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    received: list[int] = []
    while any(thread.is_alive() for thread in threads):
        received += line.numbers()
        line.channel.drain()
    received += step_numbers(line.all_that_waits())
    assert len(received) == 2000
    for sender in range(4):
        mine = [number for number in received if number // 1000 == sender]
        assert mine == list(range(sender * 1000, sender * 1000 + 500))


def test_what_is_deferred_goes_with_the_128th_of_it(line: Line) -> None:
    for number in range(128):
        assert line.arrived() == []
        line.channel.defer({}, updated, 1 + number)
    numbers = [frame.span_id for frame in line.arrived()[1:] if isinstance(frame, frames.Updated)]
    assert numbers == [number.to_bytes(8, "big") for number in range(1, 129)]


def test_what_is_deferred_goes_when_the_first_of_it_has_waited_for_long(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = itertools.chain([0, 250_000_000], itertools.repeat(250_000_001)).__next__
    monkeypatch.setattr(channel_module, "perf_counter_ns", now)
    line.channel.defer({}, updated)
    line.channel.defer({}, updated)
    assert line.arrived() == []
    line.channel.defer({}, updated)
    assert len(line.arrived()) == 1 + 3


def test_what_is_deferred_goes_before_whatever_is_sent_after_it_and_when_it_is_asked_for(line: Line) -> None:
    line.channel.defer({}, updated)
    line.send(1)
    line.channel.defer({}, updated)
    assert not line.channel.empty
    line.channel.send_deferred()
    assert line.channel.empty
    kinds = [type(frame) for frame in line.arrived()]
    assert kinds == [frames.Hello, frames.Updated, frames.Step, frames.Updated]


def test_a_deferred_frame_that_can_not_be_sent_costs_no_other(line: Line) -> None:
    bad = updated(keep="\udcff")
    large = scheduled(kind="k" * frames.MAX_FRAME_BYTES)
    for frame in (updated(closed_ns=1), bad, large, updated(closed_ns=2)):
        line.channel.defer({semconv.BAD_LINK: 1}, lambda each: each, frame)
    line.channel.defer({semconv.BAD_LINK: 1}, frames.Updated)
    line.channel.send_deferred()
    assert [frame.closed_ns for frame in line.arrived()[1:] if isinstance(frame, frames.Updated)] == [1, 2]
    assert line.drops.take_unsent() == {semconv.BAD_FRAME: 2, semconv.INTERNAL_ERROR: 1, semconv.BAD_LINK: 3}


def test_what_a_signal_handler_raises_while_frames_are_made_costs_one_of_them(line: Line) -> None:
    def struck() -> frames.Updated:
        raise KeyboardInterrupt

    line.channel.defer({}, updated, 1)
    line.channel.defer({}, struck)
    line.channel.defer({}, updated, 2)
    with pytest.raises(KeyboardInterrupt):
        line.channel.send_deferred()
    line.channel.send_deferred()
    numbers = [frame.span_id[-1] for frame in line.arrived()[1:] if isinstance(frame, frames.Updated)]
    assert numbers == [1, 2]
    assert line.drops.take_unsent() == {semconv.INTERRUPTED: 1}


def test_it_notices_that_the_relay_has_gone_and_begins_anew_with_the_next(line: Line) -> None:
    line.send(1)
    assert not line.channel.hung_up()
    line.close_peer()
    line.send(2)  # no error
    assert line.channel.hung_up()
    assert not line.channel.connected
    assert not line.channel.hung_up()  # it says so once
    line.send(3)
    line.connect()
    line.send(4)
    assert [type(frame).__name__ for frame in line.arrived()] == ["Hello", "Step", "Step", "Step"]
    assert line.drops.take_line() == ""


def test_a_connection_that_is_closed_while_it_is_looked_at_was_not_closed_by_the_program(
    line: Line, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def closed_meanwhile(_: object) -> bool:
        monkeypatch.undo()
        line.channel.close()
        return False

    monkeypatch.setattr(line.channel, "_is_ours", closed_meanwhile)
    assert not line.channel.hung_up()
    assert not line.channel.connected
    assert caplog.records == []


def test_to_look_for_the_end_takes_no_answer_away(line: Line) -> None:
    assert line.peer is not None
    line.peer.send(b"answer")
    assert not line.channel.hung_up()
    assert line.channel.receive(1) == b"answer"


def test_no_answer_is_an_empty_one(line: Line) -> None:
    assert line.channel.receive(0) == b""
    assert line.channel.receive(-1) == b""
    line.close_peer()
    assert line.channel.receive(float("inf")) == b""
    line.channel.close()
    assert line.channel.receive(1) == b""


def test_what_is_in_the_socket_when_it_is_closed_still_arrives(line: Line) -> None:
    for number in range(20):
        line.send(number)
    line.channel.close()
    assert line.numbers() == list(range(20))


# Where both ends meet


def test_the_first_to_ask_makes_the_session_and_leaves_it_to_its_children(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SESSION, raising=False)
    session = rendezvous.session_id()
    assert os.environ[SESSION] == session == rendezvous.session_id()
    monkeypatch.setenv(SESSION, "given")
    assert rendezvous.session_id() == "given"


@pytest.mark.parametrize("session", ["../up", "a/b", "a b", "x" * 33, "ü", "."])
def test_a_session_that_can_not_be_a_files_name_is_refused(monkeypatch: pytest.MonkeyPatch, session: str) -> None:
    monkeypatch.setenv(SESSION, session)
    with pytest.raises(rendezvous.RendezvousError, match=f"^{SESSION}=.*: takes 1 to 32 letters"):
        rendezvous.session_id()


def test_the_folder_is_private_whatever_the_umask(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    before = os.umask(0)
    try:
        path = rendezvous.socket_path("session")
    finally:
        os.umask(before)
    assert path == tmp_path / f"otel-npu-{os.getuid()}" / "session.sock"
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_without_a_runtime_folder_it_lies_in_the_temporary_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    for value in ("", str(tmp_path / "missing")):
        monkeypatch.setenv("XDG_RUNTIME_DIR", value)
        assert rendezvous.socket_path("session").parent.parent == tmp_path


def test_where_nobody_listens_there_is_no_connection(tmp_path: Path) -> None:
    path = tmp_path / "session.sock"
    assert rendezvous.connect(path) is None
    rendezvous.listen(path).close()
    assert path.exists()  # left behind by a relay that was killed
    assert rendezvous.connect(path) is None
    with rendezvous.listen(path):
        connection = rendezvous.connect(path)
        assert connection is not None
        connection.close()


def test_only_one_at_a_time_makes_or_removes_a_socket(tmp_path: Path) -> None:
    path = tmp_path / "session.sock"
    order: list[str] = []
    waiting = threading.Event()

    def second() -> None:
        waiting.set()
        with rendezvous.session_lock(path):
            order.append("second")

    with rendezvous.session_lock(path):
        thread = threading.Thread(target=second)
        thread.start()
        waiting.wait()
        thread.join(0.05)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_an_answer_that_nobody_read_does_not_hide_that_the_relay_has_gone(line: Line) -> None:
    assert line.peer is not None
    line.peer.send(frames.encode(frames.Flushed(1, complete=True)))  # too late for the flush that asked
    assert not line.channel.hung_up()
    line.close_peer()
    assert line.channel.hung_up()
    assert not line.channel.connected
