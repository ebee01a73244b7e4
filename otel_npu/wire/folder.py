"""A folder that belongs to one user alone, held by a descriptor while something is done in it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

_PRIVATE: Final = 0o700
_LOCK: Final = "lock"
_LOCK_SECONDS: Final = 1.0
_LOOK_AGAIN_SECONDS: Final = 0.005
_MAX_ADDRESS_BYTES: Final = 107  # of a socket's name, by the kernel


class RendezvousError(OSError):
    """The folder or the peer can't be trusted; the message says which and why."""


class PrivateFolder:
    """A folder that only this user can enter.

    Whoever owns the folder around it can rename it, or put another or a link in its place. So it is opened once,
    without following links, looked at, and used by its descriptor.

    Args:
        path: Where it is.
        make: Whether to make it if it is not there.

    Raises:
        FileNotFoundError: There is none.
        RendezvousError: It belongs to somebody else, or lets others in, or is no folder.
        OSError: It can't be made or opened.
    """

    def __init__(self, path: Path, *, make: bool = False) -> None:
        self.path = path
        if make:
            with contextlib.suppress(FileExistsError):
                path.mkdir(mode=_PRIVATE)
        try:
            self._descriptor = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except NotADirectoryError:
            raise self._bad() from None
        try:
            self._check()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> PrivateFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of it."""
        os.close(self._descriptor)

    def address(self, name: str) -> str:
        """The address of the socket of this name. Longer than a socket's name may be it goes by the descriptor."""
        address = str(self.path / name)
        fits = len(os.fsencode(address)) <= _MAX_ADDRESS_BYTES
        return address if fits else f"/proc/self/fd/{self._descriptor}/{name}"

    def restrict(self, name: str) -> None:
        """Let this user read and write a file in it, and nobody else, whatever the umask."""
        os.chmod(name, 0o600, dir_fd=self._descriptor)

    def remove_socket(self, name: str) -> None:
        """Remove the socket of this name, if there is one, and nothing but a socket."""
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISSOCK(os.stat(name, dir_fd=self._descriptor, follow_symlinks=False).st_mode):
                os.unlink(name, dir_fd=self._descriptor)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Held by whoever makes or removes a socket in it.

        Raises:
            RendezvousError: The lock is no file, or somebody holds it for longer than that takes.
        """
        deadline = time.monotonic() + _LOCK_SECONDS
        while True:
            with contextlib.ExitStack() as closing:
                descriptor = self._open_lock()
                closing.callback(os.close, descriptor)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise RendezvousError(
                            f"{self.path / _LOCK} has been locked for {_LOCK_SECONDS:.0f} s"
                        ) from None
                else:
                    # One for all sessions, and it stays: to remove a lock file is to let two hold it. Somebody else,
                    # who cleans up, may have done so.
                    if self._is_the_lock(descriptor):
                        yield
                        return
            time.sleep(_LOOK_AGAIN_SECONDS)

    def _open_lock(self) -> int:
        flags = os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            descriptor = os.open(_LOCK, flags | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=self._descriptor)
        except FileExistsError:
            descriptor = os.open(_LOCK, flags, dir_fd=self._descriptor)
        else:
            os.fchmod(descriptor, 0o600)  # whatever the umask
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise RendezvousError(f"{self.path / _LOCK} is no file")
        return descriptor

    def _is_the_lock(self, descriptor: int) -> bool:
        try:
            there = os.stat(_LOCK, dir_fd=self._descriptor, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return os.path.samestat(there, os.fstat(descriptor))

    def _check(self) -> None:
        status = os.fstat(self._descriptor)
        if status.st_uid != os.getuid() or status.st_mode & 0o077:
            raise self._bad()
        if stat.S_IMODE(status.st_mode) != _PRIVATE:  # made under a umask that leaves its owner nothing
            Path(f"/proc/self/fd/{self._descriptor}").chmod(_PRIVATE)

    def _bad(self) -> RendezvousError:
        return RendezvousError(f"{self.path} must be a folder of user {os.getuid()} with mode 0700, and is not")
