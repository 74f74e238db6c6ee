"""Rewards that were paid for, on disk: one SQLite file, which runs and processes may share.

A reward is committed before the call that asked for it returns. SQLite's journal makes a commit whole or absent: a
process that is killed loses the calls under way and nothing else. The file grows by about 120 bytes per reward.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vgf_llm.errors import OutputError

_WAIT_SEC = 120.0  # for other processes that write
_VERSION = 2  # of the table and of the key
_ASKED = 500  # keys per query
_TABLE = "CREATE TABLE IF NOT EXISTS rewards (key TEXT PRIMARY KEY, reward REAL NOT NULL, name TEXT NOT NULL)"


def reward_key(name: str, version: str, prompt: str, messages: Any, response: str, columns: dict[str, Any]) -> str:
    """Return the key of a reward: a SHA-256 of all that it depends on.

    Args:
        name: Of the reward.
        version: Of the reward, see `reward_models.signature.version_of`.
        prompt: The conversation before the response as plain text, which functions read.
        messages: The conversation before the response.
        response: The response.
        columns: The columns of the row that the reward reads, with their values.
    """
    parts = [_VERSION, name, version, str(prompt), messages, response, columns]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=repr).encode()).hexdigest()


class RewardCache:
    """Rewards by key.

    Args:
        path: The file; it and its folder are made where they are missing.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def check(self) -> None:
        """Prove that the file can be written.

        Raises:
            OutputError: It cannot, or it is not a cache of rewards.
        """
        with self.opened() as connection, connection:
            connection.execute("BEGIN IMMEDIATE")

    def get(self, keys: Sequence[str]) -> dict[str, float]:
        """Return the rewards that are there, by key.

        Raises:
            OutputError: The file cannot be read.
        """
        found: dict[str, float] = {}
        with self.opened() as connection:
            for start in range(0, len(keys), _ASKED):
                asked = list(keys[start : start + _ASKED])
                query = f"SELECT key, reward FROM rewards WHERE key IN ({', '.join('?' * len(asked))})"
                found |= dict(connection.execute(query, asked))
        return found

    def put(self, name: str, rewards: dict[str, float]) -> None:
        """Keep rewards; they are on disk when this returns. One that is there already stays.

        Raises:
            OutputError: The file cannot be written.
        """
        if not rewards:
            return
        rows = [(key, reward, name) for key, reward in rewards.items()]
        with self.opened() as connection, connection:
            connection.executemany("INSERT OR IGNORE INTO rewards VALUES (?, ?, ?)", rows)

    @contextlib.contextmanager
    def opened(self) -> Iterator[sqlite3.Connection]:
        """Yield a connection that is closed at the end; SQLite's own errors become an OutputError."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.closing(sqlite3.connect(self.path, timeout=_WAIT_SEC)) as connection:
                self._prepare(connection)
                yield connection
        except (sqlite3.Error, OSError) as error:
            raise OutputError(
                f"reward_cache '{self.path}' cannot be used ({error}); name a file in a folder that can be written, "
                "or one that does not exist yet"
            ) from error

    def _prepare(self, connection: sqlite3.Connection) -> None:
        if _version_of(connection) == _VERSION:
            return
        with connection:
            connection.execute("BEGIN IMMEDIATE")
            version = _version_of(connection)  # again: another process may have made the table since
            if version == _VERSION:
                return
            if version != 0 or connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                raise OutputError(
                    f"reward_cache '{self.path}' is a database of something else, or of another version of this "
                    f"package (its version is {version}, expected {_VERSION}); name another file"
                )
            connection.execute(_TABLE)
            connection.execute(f"PRAGMA user_version = {_VERSION}")


def _version_of(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])
