"""One SQLite connection that never lets a chat down: where the file is of no use, it goes on in memory and says so."""

import logging
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout

from streaming.conversations.schema import NewerSchema, migrate

logger = logging.getLogger(__name__)

NAME = "conversations.db"
BUSY_TIMEOUT_S = 2.0
"""How long a write waits for a program that locks the file."""
MEMORY_ONLY = "conversations are kept only until Brook ends"

# What can be wrong with a file (SQLite's primary result codes), in words; anything else is a mistake in the code.
_FAILURES = {
    sqlite3.SQLITE_PERM: "cannot be written",
    sqlite3.SQLITE_BUSY: "is locked by another program",
    sqlite3.SQLITE_LOCKED: "is locked by another program",
    sqlite3.SQLITE_READONLY: "cannot be written",
    sqlite3.SQLITE_IOERR: "cannot be read or written",
    sqlite3.SQLITE_CORRUPT: "is damaged",
    sqlite3.SQLITE_FULL: "has no room left on its disk",
    sqlite3.SQLITE_CANTOPEN: "cannot be opened",
    sqlite3.SQLITE_NOTADB: "is damaged",
}
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)

T = TypeVar("T")


class Database:
    """The conversations' database in a folder, or in memory for None. Safe to use from any thread.

    `notice` is one sentence for people where something is not as it should be, else empty. One process at a time has
    the file; a second one is given memory. A damaged file is renamed, never deleted.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.notice = ""
        self._lock = threading.Lock()
        self._guard: FileLock | None = None
        self._path = None if folder is None else folder / NAME
        self._connection = _connect_memory() if self._path is None else self._open(self._path)

    def run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Do `work` in one transaction; where the file fails, do it again on a copy in memory, from then on."""
        with self._lock:
            try:
                return _transact(self._connection, work)
            except sqlite3.Error as error:
                if self._path is None or _code(error) not in _FAILURES:
                    raise
                self._fall_back(self._path, error)
            return _transact(self._connection, work)

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            self._connection.close()
            if self._guard is not None:
                self._guard.release()

    def _open(self, path: Path) -> sqlite3.Connection:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._guard = FileLock(path.with_suffix(".lock"), timeout=0, thread_local=False)
            self._guard.acquire()
            return self._connect_or_set_aside(path)
        except Timeout:
            self._tell(f"Another Brook uses {path.parent}: give this one a --data-dir of its own, until then")
        except NewerSchema:
            self._tell(f"{path} was written by a newer Brook: update this one, until then")
        except OSError as error:
            self._tell(f"{path.parent} cannot be written ({error.strerror}):")
        except sqlite3.Error as error:
            if _code(error) not in _FAILURES:
                raise
            self._tell(f"{path} {_FAILURES[_code(error)]}:")
        self._path = None
        return _connect_memory()

    def _connect_or_set_aside(self, path: Path) -> sqlite3.Connection:
        try:
            return _connect(path)
        except sqlite3.DatabaseError as error:
            if _code(error) not in _DAMAGED:
                raise
        aside = path.with_name(f"{path.stem}-damaged-{time.strftime('%Y%m%d-%H%M%S')}{path.suffix}")
        for suffix in ("", "-wal", "-shm"):
            part = path.with_name(path.name + suffix)
            if part.exists():
                part.rename(aside.with_name(aside.name + suffix))
        self.notice = f"The conversations' file was damaged: it is set aside as {aside}, and a new one is begun."
        logger.warning(self.notice)
        return _connect(path)

    def _fall_back(self, path: Path, error: sqlite3.Error) -> None:
        """Go on in memory, with all that can still be read."""
        memory = _connect_memory()
        try:
            self._connection.backup(memory)
            _check(memory)
        except sqlite3.Error:
            memory.close()
            memory = _connect_memory()
        self._connection.close()
        self._connection, self._path = memory, None
        self._tell(f"{path} {_FAILURES[_code(error)]}: from now on")

    def _tell(self, what: str) -> None:
        self.notice = f"{what} {MEMORY_ONLY}."
        logger.warning(self.notice)


def _transact(connection: sqlite3.Connection, work: Callable[[sqlite3.Connection], T]) -> T:
    connection.execute("BEGIN")
    try:
        result = work(connection)
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    return result


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
    try:
        _check(connection)
        _prepare(connection)
        # With a write-ahead log, what is committed outlives a killed process without waiting for the disk each time.
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        return connection
    except BaseException:
        connection.close()
        raise


def _connect_memory() -> sqlite3.Connection:
    return _prepare(sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False))


def _check(connection: sqlite3.Connection) -> None:
    """Raise where the pages of a database do not fit together."""
    [found] = connection.execute("PRAGMA quick_check(1)").fetchone()
    if found != "ok":
        error = sqlite3.DatabaseError(found)
        error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
        raise error


def _prepare(connection: sqlite3.Connection) -> sqlite3.Connection:
    connection.row_factory = sqlite3.Row
    connection.execute("PRAGMA foreign_keys = ON")
    migrate(connection)
    return connection


def _code(error: sqlite3.Error) -> int:
    """Give SQLite's primary result code; -1 where the error did not come from SQLite."""
    return getattr(error, "sqlite_errorcode", -1) & 0xFF
