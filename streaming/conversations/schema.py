"""The tables that conversations are kept in, and the way there from every older version of them."""

import sqlite3

MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE conversation (
        id TEXT PRIMARY KEY,
        owner TEXT NOT NULL,
        title TEXT NOT NULL,
        leaf TEXT,
        pinned INTEGER NOT NULL,
        created_at REAL NOT NULL,
        updated_at REAL NOT NULL,
        deleted_at REAL
    ) STRICT;
    CREATE INDEX conversation_by_owner ON conversation (owner, updated_at);
    CREATE TABLE message (
        number INTEGER PRIMARY KEY,
        conversation TEXT NOT NULL REFERENCES conversation (id) ON DELETE CASCADE,
        id TEXT NOT NULL,
        parent TEXT,
        role TEXT NOT NULL,
        content TEXT NOT NULL,
        created_at REAL NOT NULL,
        token_ids BLOB NOT NULL,
        in_reasoning INTEGER NOT NULL,
        reason TEXT,
        error TEXT,
        model TEXT NOT NULL,
        seed INTEGER,
        settings TEXT NOT NULL,
        stats TEXT NOT NULL,
        rating INTEGER NOT NULL,
        note TEXT NOT NULL,
        UNIQUE (conversation, id)
    ) STRICT;
    CREATE INDEX message_being_written ON message (role) WHERE reason IS NULL;
    CREATE VIRTUAL TABLE search USING fts5 (content, tokenize = 'trigram');
    CREATE TRIGGER message_gone AFTER DELETE ON message BEGIN
        DELETE FROM search WHERE rowid = old.number;
    END;
    """,
)
"""The statements that lead from each version to the next, oldest first; never changed once released.

`token_ids` are little-endian 32-bit numbers, `settings` and `stats` JSON objects; `search` has the rowids (`number`) of
the messages whose text stands still. Trigrams find parts of words, in languages without spaces as well.
"""

VERSION = len(MIGRATIONS)


class NewerSchema(Exception):
    """The tables were made by a later Brook than this one."""


def migrate(connection: sqlite3.Connection) -> None:
    """Bring the tables to this version, all or nothing.

    Raises:
        NewerSchema: they are of a later version already.
    """
    [version] = connection.execute("PRAGMA user_version").fetchone()
    if version > VERSION:
        raise NewerSchema
    for number, script in enumerate(MIGRATIONS[version:], start=version + 1):
        try:
            connection.executescript(f"BEGIN IMMEDIATE; {script}; PRAGMA user_version = {number}; COMMIT;")
        except sqlite3.Error:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
