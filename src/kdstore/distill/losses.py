"""The losses that there are: terms, and recipes that sum them.

A term is a pure function of `Features`; a recipe is a weighted sum of terms. `LOSSES`, at the end, holds both, and `parse_loss` reads either name or
a sum such as "clip + crd + 2000*fd". What losses own and train (projectors, the scale of ICL) is in objective.py, so that no term has state.

Every name has one meaning: open_clip's distillation loss is the recipe `soft-ce` (1 : 1 with the task), its soft part alone is the term `teacher-ce`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from kdstore.distill import contrastive, matching
from kdstore.errors import ConfigError, UnknownName

FD_WEIGHT = 2000.0
FD_COS_WEIGHT = 2 * FD_WEIGHT / 512
"""MSE of unit rows is (2/D)(1 - cos), so this is what the published weight amounts to at D = 512, the width of its authors' teacher."""

Part = Literal["image projector", "text projector", "cross scale", "fusion", "tokens", "summary", "synthetic captions", "bias", "masked patches"]

IMAGES, TOKENS = ("image/embedding",), ("image/tokens",)
EMBEDDINGS = ("image/embedding", "text/embedding")
LOGITS = (*EMBEDDINGS, "logit_scale")
ODDS = (*EMBEDDINGS, "logit_bias")
PROJECTORS: tuple[Part, ...] = ("image projector", "text projector")


@dataclass(frozen=True)
class Term:
    """A loss of its own: its function, what it needs from the store, and which parts of the run it uses.

    `family` says what it makes of a teacher's image-text logits: a softmax or a sigmoid ('' neither). A `joint` term is a function of the features beside
    each teacher, any other is summed over teachers; `rows` is the smallest batch in which it is defined.
    """

    value: Callable[..., Tensor]
    needs: tuple[str, ...] = ()
    uses: tuple[Part, ...] = ()
    family: Literal["", "softmax", "sigmoid"] = ""
    joint: bool = False
    rows: int = 2

    @property
    def summary(self) -> str:
        """First line of the function's docstring."""
        return (self.value.__doc__ or "").strip().splitlines()[0]


@dataclass(frozen=True)
class Recipe:
    """A weighted sum of terms under one name."""

    sum: str
    about: str

    @property
    def summary(self) -> str:
        """The sum and where it is from."""
        return f"{self.sum}: {self.about}"


def parse_loss(text: str) -> dict[str, float]:
    """Read a loss, "clip-kd" or "clip + 1*crd + 2000*fd", as weights by name of term; recipes are expanded, equal terms added.

    Raises UnknownName for a name that `LOSSES` does not hold and ConfigError for anything that is no sum of positive multiples.
    """
    weights: dict[str, float] = {}
    position = 0
    while True:
        match = _SUMMAND.match(text, position)
        weight = float(match["weight"] or 1) if match else 0.0
        if match is None or not 0 < weight < math.inf or text[match.end() : match.end() + 1] not in ("", "+"):
            raise ConfigError(f"The loss '{text}' is no sum of weighted names (at '{text[position:]}').", 'Write for example "clip + 1*crd + 2000*fd".')
        entry = LOSSES.get(match["name"])
        if entry is None:
            raise UnknownName.of("loss", match["name"], LOSSES, "All: kdstore list losses.")
        for name, inner in ({match["name"]: 1.0} if isinstance(entry, Term) else parse_loss(entry.sum)).items():
            weights[name] = weights.get(name, 0.0) + weight * inner
        position = match.end() + 1
        if position > len(text):
            return weights


def describe_losses() -> dict[str, str]:
    """Return one line about each loss by name."""
    return {name: entry.summary for name, entry in LOSSES.items()}


def terms_of(weights: dict[str, float]) -> dict[str, Term]:
    """Return the terms of a parsed loss by name."""
    return {name: term for name in weights if isinstance(term := LOSSES[name], Term)}


def needs_of(weights: dict[str, float]) -> tuple[str, ...]:
    """Names of everything that a parsed loss needs from a store: arrays, `logit_scale` and `logit_bias`."""
    return tuple(dict.fromkeys(need for term in terms_of(weights).values() for need in term.needs))


def parts_of(weights: dict[str, float]) -> frozenset[Part]:
    """Names of everything that a parsed loss uses beside the embeddings of one caption."""
    return frozenset(part for term in terms_of(weights).values() for part in term.uses)


def feature_weight(weights: dict[str, float], teacher_dim: int) -> float:
    """What the loss puts on (1 - cos) of each modality through `fd`, `mfd` and `fd-cos`, the only number in which FD runs of different teachers compare."""
    return (weights.get("fd", 0.0) + weights.get("mfd", 0.0)) * 2 / teacher_dim + weights.get("fd-cos", 0.0)


_SUMMAND = re.compile(r"\s*(?:(?P<weight>\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+)\s*(?:\*\s*|\s))?(?P<name>[A-Za-z][\w-]*)\s*")

LOSSES: dict[str, Term | Recipe] = {
    "clip": Term(contrastive.clip),
    "clip-both": Term(contrastive.clip_both, uses=("synthetic captions",)),
    "siglip": Term(contrastive.siglip, uses=("bias",)),
    "siglip-literal": Term(contrastive.siglip_literal, uses=("bias",)),
    "crd": Term(contrastive.crd, LOGITS, family="softmax"),
    "icl": Term(contrastive.icl, EMBEDDINGS, (*PROJECTORS, "cross scale")),
    "icl-exp": Term(contrastive.icl_exp, EMBEDDINGS, (*PROJECTORS, "cross scale")),
    "cross-kd": Term(contrastive.cross_kd, LOGITS, (*PROJECTORS, "cross scale"), family="softmax"),
    "afd": Term(contrastive.afd, EMBEDDINGS, ("fusion",)),
    "fd": Term(matching.fd, EMBEDDINGS, PROJECTORS, rows=1),
    "mfd": Term(matching.mfd, EMBEDDINGS, (*PROJECTORS, "masked patches"), rows=1),
    "fd-cos": Term(matching.fd_cos, EMBEDDINGS, PROJECTORS, rows=1),
    "gd": Term(matching.gd, LOGITS, PROJECTORS, family="softmax"),
    "gd-true": Term(matching.gd_true, LOGITS, PROJECTORS, family="softmax"),
    "affinity": Term(contrastive.affinity, EMBEDDINGS, family="softmax"),
    "teacher-ce": Term(contrastive.teacher_ce, LOGITS, family="softmax"),
    "reinforced": Term(contrastive.reinforced, LOGITS, ("synthetic captions",), family="softmax", joint=True),
    "siglip-kd": Term(contrastive.siglip_kd, ODDS, ("bias",), family="sigmoid", joint=True),
    "siglip-ce": Term(contrastive.siglip_ce, ODDS, ("bias",), family="sigmoid"),
    "vl": Term(contrastive.vl, EMBEDDINGS, ("image projector",), family="softmax"),
    "pvl": Term(contrastive.pvl, IMAGES, ("image projector",)),
    "udist": Term(contrastive.udist, IMAGES),
    "rkd-d": Term(matching.rkd_d, EMBEDDINGS),
    "rkd-a": Term(matching.rkd_a, EMBEDDINGS, rows=3),
    "dist": Term(contrastive.dist, LOGITS, family="softmax"),
    "logit-std": Term(contrastive.logit_std, EMBEDDINGS, family="softmax"),
    "theia": Term(matching.theia, TOKENS, ("tokens",), rows=1),
    "unic": Term(matching.unic, (*IMAGES, *TOKENS), ("tokens", "summary"), joint=True, rows=1),
    "none": Recipe("clip", "no teacher, the task alone"),
    "clip-kd": Recipe(f"clip + crd + icl + {FD_WEIGHT:g}*fd", "CLIP-KD as published"),
    "clip-kd-free": Recipe(f"clip + crd + icl + {FD_COS_WEIGHT:g}*fd-cos", "CLIP-KD with an FD weight that is the same for every teacher"),
    "soft-ce": Recipe("clip + teacher-ce", "open_clip's distillation loss"),
    "mobileclip": Recipe("reinforced", "MobileCLIP's weights (0, 1): v1 small models and 12M pairs, v2"),
    "mobileclip-b": Recipe("0.25*clip-both + 0.75*reinforced", "MobileCLIP-B's weights on 1B pairs"),
    "dime-fm": Recipe("0.7*vl + 0.3*pvl", "DIME-FM's defaults"),
    "rkd": Recipe("rkd-d + 2*rkd-a", "RKD's weights"),
}
