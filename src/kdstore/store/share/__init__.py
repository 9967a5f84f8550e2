"""Sharing a store: push it to a place, pull it from one, whole or in part."""

from __future__ import annotations

from kdstore.store.share.choice import Choice
from kdstore.store.share.pull import Pulled, pull_store
from kdstore.store.share.push import Pushed, push_store
from kdstore.store.share.transport import Patience

__all__ = ["Choice", "Patience", "Pulled", "Pushed", "pull_store", "push_store"]
