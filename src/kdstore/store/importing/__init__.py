"""Stores out of features that others computed: the layouts that labs have, read as strangers' files are read."""

from __future__ import annotations

from kdstore.store.importing.config import ImportConfig
from kdstore.store.importing.run import IMPORTS, Imported, import_store

__all__ = ["IMPORTS", "ImportConfig", "Imported", "import_store"]
