"""Addresses of stores, as they may be shown and written: a query, a user name and a password are somebody's secret."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urlsplit


def is_address(name: str) -> bool:
    """Tell an address (`s3://`, `https://`, ...) from a path."""
    return "://" in name


def redacted(url: str) -> str:
    """Return a URL without what may be secret in it: user, password, query and fragment; nothing of one that a raw '/', '?' or '#' in a password cuts."""
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises ValueError where it is the beginning of a password
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}" if parts.scheme else url.partition("?")[0]
    except ValueError:
        return "a URL that cannot be read"


def store_name(place: str) -> str:
    """Return the name of a store at an address or in a folder, as a folder or a run may have it."""
    if not is_address(place):
        return Path(place).resolve().name
    last = redacted(place).rstrip("/").rpartition("/")[2].partition("@")[0]
    return re.sub(r"[^\w.-]", "-", last).strip(".") or "store"
