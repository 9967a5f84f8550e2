"""Tokens of a student in the space of a teacher's: another width, another grid, and a teacher's features on one scale.

The store keeps tokens as the tower gives them, and channels of vision transformers differ in size by orders of magnitude. Both standardisations come from
the statistics of the whole store, so that a target does not depend on its batch.

Shapes: B pairs, T tokens row by row of a square grid, W their width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdstore.errors import ConfigError, MissingFeature

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Standard:
    """How features are brought to one scale: subtract `mean_W`, then multiply by `factor` ([W] per channel, or a matrix [W, W] from the left)."""

    mean_W: Float64
    factor: Float64


class Standardise(nn.Module):
    """Apply a `Standard`, kept in the checkpoint: a resumed run must not meet other targets."""

    mean_W: Tensor
    factor: Tensor

    def __init__(self, standard: Standard) -> None:
        super().__init__()
        self.register_buffer("mean_W", torch.tensor(standard.mean_W, dtype=torch.float32))
        self.register_buffer("factor", torch.tensor(standard.factor, dtype=torch.float32))

    def forward(self, x_W: Tensor) -> Tensor:
        centred_W = x_W - self.mean_W
        return centred_W * self.factor if self.factor.ndim == 1 else centred_W @ self.factor.T


def on_grid(tokens_BTW: Tensor, count: int) -> Tensor:
    """Bring tokens to a square grid of `count`, by bilinear interpolation between their centres."""
    B, T, W = tokens_BTW.shape
    if count == T:
        return tokens_BTW
    grid_BWHW = tokens_BTW.mT.reshape(B, W, math.isqrt(T), math.isqrt(T))
    return F.interpolate(grid_BWHW, size=math.isqrt(count), mode="bilinear", align_corners=False).flatten(2).mT


def check_grid(count: int, whose: str) -> None:
    """Raise MissingFeature unless so many tokens are a square grid."""
    if math.isqrt(count) ** 2 != count:
        raise MissingFeature(f"{whose} gives {count} tokens, which are no square grid.", "Choose a loss without theia and unic, or tokens of a square grid.")


def channel_standard(mean_W: Float64, variance_W: Float64) -> Standard:
    """Give every channel mean 0 and variance 1; a channel that never varies stays 0."""
    return Standard(mean_W, np.divide(1, np.sqrt(variance_W), out=np.zeros_like(variance_W), where=variance_W > 0))


def phi_s_standard(mean_W: Float64, covariance_WW: Float64) -> Standard:
    """Give every channel mean 0 and variance 1 by a rotation and one number: y = H U' (x - mean) / sqrt(mean eigenvalue).

    PHI-S (Ranzinger et al. 2024, arXiv 2410.01680): U are the eigenvectors of the covariance, H is an orthonormal Hadamard matrix, which spreads every
    eigenvalue over all channels alike. Distances keep their proportions, unlike with a number per channel. Raises ConfigError for a width without an H.
    """
    eigenvalues_W, vectors_WW = np.linalg.eigh(covariance_WW)
    vectors_WW *= np.sign(vectors_WW[np.abs(vectors_WW).argmax(axis=0), np.arange(len(vectors_WW))])  # an eigenvector's sign is arbitrary
    return Standard(mean_W, hadamard(len(mean_W)) @ vectors_WW.T / math.sqrt(eigenvalues_W.clip(min=0).mean()))


def hadamard(width: int) -> Float64:
    """Return an orthonormal Hadamard matrix: Paley's of a prime q = 3 mod 4, of order q + 1, doubled as often as it takes (Sylvester).

    That is every common width (768 = 12 * 64, 1152 = 72 * 16, 1664 = 104 * 16, ...). Raises ConfigError for others.
    """
    for doublings in reversed(range(width.bit_length())):
        order, remainder = divmod(width, 2**doublings)
        if not remainder and (base := np.ones((1, 1)) if order == 1 else _paley(order)) is not None:
            for _ in range(doublings):
                base = np.block([[base, base], [base, -base]])
            return base / math.sqrt(width)
    raise ConfigError(f"There is no Hadamard matrix at hand for {width} channels.", 'Standardise each channel: --set token_standard="channel".')


def _paley(order: int) -> Float64 | None:
    """Return Paley's first Hadamard matrix of this order (Paley 1933), None where order - 1 is no prime of the form 4 k + 3."""
    q = order - 1
    if q % 4 != 3 or any(q % d == 0 for d in range(2, math.isqrt(q) + 1)):
        return None
    residue = -np.ones(q)
    residue[np.arange(1, q) ** 2 % q] = 1
    residue[0] = 0
    skew = np.zeros((order, order))
    skew[0, 1:], skew[1:, 0] = 1, -1
    skew[1:, 1:] = residue[np.subtract.outer(np.arange(q), np.arange(q)) % q]
    return skew + np.eye(order)
