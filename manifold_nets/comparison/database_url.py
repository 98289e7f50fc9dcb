"""Database URLs: what of them may be shown, and where their password comes from."""

from __future__ import annotations

import os
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, quote_plus

from manifold_nets.comparison.errors import StorageError

if TYPE_CHECKING:
    from sqlalchemy import URL

PASSWORD_VARIABLE = "MANIFOLD_NETS_STORAGE_PASSWORD"
_FILE_VARIABLE = f"{PASSWORD_VARIABLE}_FILE"
# Options of drivers that hold a secret; `passfile` is a path.
_SECRET = re.compile(r"pass(?!file)|pwd|secret|token|odbc_connect", re.IGNORECASE)
# Spellings of a secret in a URL or a message.
_SPELLINGS = (str, quote, quote_plus, partial(quote, safe=""))


def redacted(url: str) -> str:
    """The URL without its passwords, for messages and commands; only its scheme if it cannot be parsed.

    Example:
        >>> redacted("postgresql+psycopg://me:abc@host/db?connect_timeout=9&password=abc")
        'postgresql+psycopg://me@host/db?connect_timeout=9'
        >>> redacted("sqlite:///runs.db")
        'sqlite:///runs.db'
    """
    found = _parsed(url)
    if found is None:
        scheme = re.match(r"[\w+]+(?=://)", url)
        return f"{scheme[0] if scheme else ''}://…"
    hidden = [name for name in found.query if _SECRET.search(name)]
    if not hidden and found.password is None:
        return url
    bare = type(found).create(
        found.drivername, found.username, None, found.host, found.port, found.database, found.query
    )
    return bare.difference_update_query(hidden).render_as_string(hide_password=False)


def without_secrets(error: BaseException, url: str) -> str:
    """The first line of a driver's message without the URL's secrets; if empty, the name of its class."""
    found, text = _parsed(url), next(iter(str(error).splitlines()), "")
    if found is None or not text:
        return type(error).__name__
    values = [found.password or "", *(value for name, value in found.query.items() if _SECRET.search(name))]
    secrets = [secret for value in values for secret in ([value] if isinstance(value, str) else value)]
    # The longest first: one may be part of another.
    for written in sorted({spell(secret) for secret in secrets for spell in _SPELLINGS} - {""}, key=len, reverse=True):
        text = text.replace(written, "***")
    return text


def with_password(url: str) -> str:
    """The URL with the password from the environment, if it has none of its own.

    The password is in the variable ``MANIFOLD_NETS_STORAGE_PASSWORD``, or in the first line of the file named by
    ``MANIFOLD_NETS_STORAGE_PASSWORD_FILE``.

    Raises:
        StorageError: that file cannot be read.
    """
    found = _parsed(url)
    if found is None or found.get_backend_name() == "sqlite" or found.password is not None:
        return url
    if not {"password", "passwd"}.isdisjoint(found.query):
        return url
    password, file = os.environ.get(PASSWORD_VARIABLE), os.environ.get(_FILE_VARIABLE)
    if password is None and file:
        try:
            password = Path(file).read_text(encoding="utf-8").partition("\n")[0].removesuffix("\r")
        except (OSError, ValueError) as error:
            expected = "a file whose first line is the password"
            raise StorageError(_FILE_VARIABLE, str(error), expected, "Correct the variable or the file.") from error
    return url if password is None else found.set(password=password).render_as_string(hide_password=False)


def _parsed(url: str) -> URL | None:
    """The parts of the URL; None where they are ambiguous, as with an unquoted @ in the password."""
    try:
        from sqlalchemy import make_url
        from sqlalchemy.exc import ArgumentError
    except ModuleNotFoundError:  # opening the store raises the error that names the extra
        return None
    try:
        found = make_url(url)
    except (ArgumentError, ValueError):
        return None
    if found.get_backend_name() == "sqlite":
        return found
    return None if "@" in f"{found.host}{found.database}" else found
