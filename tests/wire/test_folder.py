"""The sockets' folder: used by its descriptor, so that whoever owns what is around it can make nothing of it."""

from __future__ import annotations

import fcntl
import os
import socket
from typing import TYPE_CHECKING

import pytest

from otel_npu.wire import folder as folder_module
from otel_npu.wire import rendezvous
from otel_npu.wire.folder import PrivateFolder, RendezvousError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "private"


def test_it_is_made_private_and_only_where_it_is_asked_for(path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        PrivateFolder(path)
    PrivateFolder(path, make=True).close()
    assert path.stat().st_mode & 0o777 == 0o700


def test_one_that_its_owner_could_not_enter_is_mended(path: Path) -> None:
    path.mkdir()
    path.chmod(0)
    PrivateFolder(path).close()
    assert path.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("what", ["a file", "a link", "open to others"])
def test_what_is_no_private_folder_is_refused(path: Path, tmp_path: Path, what: str) -> None:
    if what == "a file":
        path.write_text("")
    elif what == "a link":
        (tmp_path / "other").mkdir(mode=0o700)
        path.symlink_to(tmp_path / "other")
    else:
        path.mkdir()
        path.chmod(0o750)
    with pytest.raises(RendezvousError, match="must be a folder of user"):
        PrivateFolder(path, make=True)


def test_a_link_put_in_its_place_leads_nobody_astray(path: Path, tmp_path: Path) -> None:
    """Whoever owns the folder around it can do that at any time, also after it has been looked at."""
    victim = tmp_path / "ssh"
    victim.mkdir(mode=0o700)
    (victim / "lock").write_text("a key")
    (victim / "session.sock").write_text("another")
    with PrivateFolder(path, make=True) as folder:
        path.rename(tmp_path / "moved")
        path.symlink_to(victim)
        with folder.locked():
            folder.remove_socket("session.sock")
    assert (victim / "lock").read_text() == "a key"
    assert (victim / "session.sock").read_text() == "another"
    assert (tmp_path / "moved" / "lock").exists()


def test_nothing_but_a_socket_is_removed(path: Path) -> None:
    with PrivateFolder(path, make=True) as folder:
        (path / "session.sock").write_text("no socket")
        folder.remove_socket("session.sock")
        assert (path / "session.sock").exists()
        folder.remove_socket("missing.sock")


def test_a_lock_is_taken_as_it_is(path: Path) -> None:
    with PrivateFolder(path, make=True) as folder:
        (path / "lock").write_text("what somebody wrote into it")
        with folder.locked():
            pass
    assert (path / "lock").read_text() == "what somebody wrote into it"


def test_a_lock_that_is_held_is_waited_for_but_not_for_ever(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_module, "_LOCK_SECONDS", 0.02)
    with PrivateFolder(path, make=True) as folder:
        with (path / "lock").open("w") as other:
            fcntl.flock(other, fcntl.LOCK_EX)
            with pytest.raises(RendezvousError, match="has been locked for"), folder.locked():
                pass
        with folder.locked():
            pass


def test_a_lock_that_was_removed_while_it_was_waited_for_is_none(path: Path) -> None:
    """Who cleans up folders for temporary files does that."""
    with PrivateFolder(path, make=True) as folder, folder.locked():
        (path / "lock").unlink()
        with folder.locked():
            assert (path / "lock").exists()


@pytest.mark.parametrize("kind", ["fifo", "folder", "link"])
def test_what_is_no_lock_is_refused(path: Path, tmp_path: Path, kind: str) -> None:
    with PrivateFolder(path, make=True) as folder:
        if kind == "fifo":
            os.mkfifo(path / "lock")
        elif kind == "folder":
            (path / "lock").mkdir()
        else:
            (path / "lock").symlink_to(tmp_path / "target")
        with pytest.raises(OSError), folder.locked():
            pass
    assert not (tmp_path / "target").exists()


def test_a_long_path_goes_by_the_descriptor(tmp_path: Path) -> None:
    path = tmp_path / ("long" * 30)
    with PrivateFolder(path, make=True) as folder:
        assert len(folder.address("session.sock")) < 108
        with rendezvous.listen(path / "session.sock"):
            connection = rendezvous.connect(path / "session.sock")
            assert connection is not None
            connection.close()


def test_who_is_refused_finds_nobody_there_and_who_waits_is_still_taken(tmp_path: Path) -> None:
    """So a relay that leaves loses nobody between its last look and its end."""
    path = tmp_path / "session.sock"
    with rendezvous.listen(path) as listener:
        waiting = rendezvous.connect(path)
        assert waiting is not None
        listener.shutdown(socket.SHUT_RD)
        assert rendezvous.connect(path) is None
        accepted, _ = listener.accept()
        accepted.close()
        waiting.close()
    rendezvous.withdraw(path)
    assert not path.exists()


def test_a_name_that_somebody_else_has_taken_meanwhile_is_left_to_him(tmp_path: Path) -> None:
    path = tmp_path / "session.sock"
    with rendezvous.listen(path):
        rendezvous.withdraw(path)
        assert path.exists()


def test_to_withdraw_where_the_folder_has_gone_is_no_error(tmp_path: Path) -> None:
    rendezvous.withdraw(tmp_path / "gone" / "session.sock")
