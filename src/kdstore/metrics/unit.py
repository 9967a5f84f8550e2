"""Rows of length one, which every similarity here is taken of."""

from __future__ import annotations

import numpy as np

from kdstore.errors import EvaluationError


def unit_rows(row_RD: np.ndarray) -> np.ndarray:
    """Return rows of length one, float32; a zero row stays zero."""
    row_RD = np.asarray(row_RD, np.float32)
    return row_RD / np.maximum(np.linalg.norm(row_RD, axis=1, keepdims=True), np.finfo(np.float32).tiny)


def finite_unit_rows(row_RD: np.ndarray, what: str) -> np.ndarray:
    """Return rows of length one, float32; raises EvaluationError for no rows and for values that are not finite, of `what`."""
    if row_RD.ndim != 2 or len(row_RD) == 0:
        raise EvaluationError(f"Expected {what} of shape (rows, width), found {row_RD.shape}.", "Give at least one row.")
    bad = int((~np.isfinite(row_RD)).any(axis=1).sum())
    if bad:
        raise EvaluationError(f"{bad} of {len(row_RD)} {what} are not finite.", "Leave invalid rows out.")
    return unit_rows(row_RD)
