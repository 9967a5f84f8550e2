"""Every error that a user can cause, one class per thing a caller would do about it.

`message` says what was expected, what was found and where; `hint` is the next command or setting to try.
The command line shows both in one line and exits with 1. Anything else that is raised is a bug and stays a traceback.
"""

from __future__ import annotations

import difflib
import signal
from collections.abc import Iterable


class KdstoreError(Exception):
    """Root of all errors a user can cause; `message` and `hint` are finished sentences."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{sentence(self.message)} {self.hint}".strip()


def sentence(text: str) -> str:
    """End a text with a full stop unless it ends with one: a message may be a library's."""
    return text if text.endswith((".", "?", "!")) else f"{text}."


class ConfigError(KdstoreError, ValueError):
    """A recipe or an option is wrong: correct it and run again."""


class UnknownName(ConfigError):
    """A name that no registry holds: pick one of those listed."""

    @classmethod
    def of(cls, what: str, name: str, known: Iterable[str], hint: str = "") -> UnknownName:
        """Build the error for `name`, with the nearest of the known names (all of them when few)."""
        names = sorted(set(known))
        begun = [known for known in names if name and known.startswith(name)]
        near = list(dict.fromkeys([*begun, *difflib.get_close_matches(name, names, n=4)]))[:4]
        if near:
            said = f"Did you mean {' or '.join(near)}?"
        elif len(names) <= 24:
            said = f"Known: {', '.join(names)}."
        else:
            said = ""
        return cls(f"Unknown {what} '{name}'.", f"{said} {hint}".strip())


class SourceError(KdstoreError, ValueError):
    """The data cannot be read as (key, image, captions): name another source or column."""


class ModelError(KdstoreError, ValueError):
    """A model cannot be built as asked: other tag, other weights or other activation."""


class StoreError(KdstoreError):
    """Something is wrong with a feature store."""


class StoreNotFound(StoreError, FileNotFoundError):
    """There is no store at this path."""


class IncompleteStore(StoreError):
    """The store has no manifest: its extraction has not ended; run it again to resume."""


class DamagedStore(StoreError):
    """Bytes of the store are not those that were written: restore or extract the named files again."""


class CannotRead(StoreError, OSError):
    """A file of a store cannot be read (rights, a failing disk); what it holds is not known."""


class IdentityMismatch(StoreError, ValueError):
    """The store at this path holds other features: choose another path."""


class SignatureError(StoreError):
    """A store is not signed by whom it should be: do not use it."""


class StoreLocked(StoreError):
    """Another process is writing this store: wait for it."""


class MissingFeature(StoreError, ValueError):
    """A stage needs an array that the store does not hold: extract it, or ask for less."""


class JoinError(StoreError, ValueError):
    """Store and source do not describe the same data."""


class TransferError(StoreError, OSError):
    """Files of a store did not come, or were not taken, anywhere: try again later or name another place."""


class DiskFull(KdstoreError, OSError):
    """The disk is full or the file size is limited: free space and run again."""


class CannotWrite(KdstoreError, OSError):
    """A path cannot be written (rights, read-only disk, a file where a folder should be): choose another."""


class Interrupted(KdstoreError):
    """Ctrl-C or another signal came, and what was finished is kept: run the same command again. The command line exits with 128 + `signum`."""

    def __init__(self, message: str, hint: str = "The same command goes on from there (distill: add --resume).", signum: int = signal.SIGINT) -> None:
        super().__init__(message, hint)
        self.signum = signum


class RunError(KdstoreError, ValueError):
    """A run folder cannot be created, resumed or read."""


class ExtractError(KdstoreError, RuntimeError):
    """Parts of an extraction failed on a cluster, each several times; what was done is kept."""


class EvaluationError(KdstoreError, ValueError):
    """Predictions, questions or answers do not fit together."""
