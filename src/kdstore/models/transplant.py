"""Moving weights between models: whole towers, or the front part of each matrix of a larger tower.

The second is what TinyCLIP (Wu et al. 2023, arXiv 2309.12314) calls manual inheritance: a narrower and shallower student starts with the front rows and
columns of a trained model and with some of its layers. Which heads or channels matter most is not asked; TinyCLIP's automatic form learns masks to find
out, and is not here.

A tower's weights are named as open_clip names them inside the tower, so that a text tower of `CLIP` and one of `CustomTextCLIP` are the same thing.
"""

from __future__ import annotations

import re
from typing import Any, Literal

import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor

from kdstore.errors import ModelError

Side = Literal["image", "text"]
Weights = dict[str, Tensor]

FIXED = {"conv1.weight": (1, 2, 3), "token_embedding.weight": (0,)}
"""Axes that are no width: colours and pixels of a patch, and the vocabulary. A part of them would mean something else."""

_BLOCK = re.compile(r"(transformer\.resblocks\.)(\d+)(\..+)")


def tower_of(clip: Any, side: Side) -> Any:
    """Return the module of a tower; the text tower of `CLIP` is the model itself."""
    return clip.visual if side == "image" else getattr(clip, "text", clip)


def tower_weights(clip: Any, side: Side) -> Weights:
    """Return the weights and buffers of a tower by their names inside it; they share memory with the model."""
    return {inside: tensor for name, tensor in clip.state_dict().items() if (inside := _inside(clip, side, name)) is not None}


def put_tower(clip: Any, side: Side, weights: Weights, origin: str) -> None:
    """Copy `weights` into a tower; raises ModelError that names the first weight that does not fit, and `origin`, where they come from."""
    for name, tensor in tower_weights(clip, side).items():
        if name not in weights:
            raise ModelError(f"The {side} tower of the student has {name}, which {origin} lacks.", "Start from weights of the same architecture.")
        if tensor.shape != weights[name].shape:
            found = f"The {side} tower does not fit: {name} is {_size(weights[name])} in {origin} and {_size(tensor)} in the student."
            raise ModelError(found, "Start from weights of the same architecture, or inherit those of a larger one with init=inherit:MODEL.")
        tensor.copy_(weights[name])


def inherit(clip: Any, side: Side, source: Any, origin: str, layers: str) -> None:
    """Copy into a tower the front part of each weight of the larger tower of `source`; raises ModelError that names what cannot be inherited.

    `layers`: `even` spreads the student's layers over the source's, with the first and the last of them; `first` takes the first. Heads stay whole, because
    queries, keys and values are cut one by one and heads must be of one width.
    """
    depth, width = _heads(tower_of(clip, side), side, "the student")
    source_depth, source_width = _heads(tower_of(source, side), side, origin)
    if width != source_width:
        raise ModelError(f"Heads of the {side} tower are {source_width} wide in {origin} and {width} in the student.", _SMALLER)
    if depth > source_depth:
        raise ModelError(f"The {side} tower has {source_depth} layers in {origin}, and the student has {depth}.", _SMALLER)
    taken = list(range(depth)) if layers == "first" else even_layers(depth, source_depth)
    weights = tower_weights(source, side)
    for name, tensor in tower_weights(clip, side).items():
        named = _BLOCK.sub(lambda m: f"{m[1]}{taken[int(m[2])]}{m[3]}", name)
        if named not in weights:
            raise ModelError(f"The {side} tower of the student has {name}, which {origin} lacks.", _SMALLER)
        tensor.copy_(_front(weights[named], tensor.shape, name, side, origin))


def even_layers(count: int, of: int) -> list[int]:
    """Choose `count` of `of` layers as evenly as can be, the first and the last among them (of a single one: the first)."""
    return [0] if count == 1 else [(2 * i * (of - 1) + count - 1) // (2 * (count - 1)) for i in range(count)]


_SMALLER = "Inherit from a ViT of the same patches and pixels, as wide and as deep or more, with heads of the same width."


def _inside(clip: Any, side: Side, name: str) -> str | None:
    """Return the name inside a tower of a weight of the model, None if it is not in that tower."""
    if side == "image":
        return name.removeprefix("visual.") if name.startswith("visual.") else None
    if hasattr(clip, "text"):
        return name.removeprefix("text.") if name.startswith("text.") else None
    return None if name.startswith(("visual.", "logit_")) else name


def _heads(tower: Any, side: Side, owner: str) -> tuple[int, int]:
    """Return the number of layers and the width of a head."""
    blocks = getattr(getattr(tower, "transformer", None), "resblocks", None)
    if blocks is None or (side == "image" and not isinstance(tower, VisionTransformer)):
        hint = "Give both a ViT of open_clip, or take the text tower alone with text_tower=copied."
        raise ModelError(f"Weights are inherited by a transformer from a transformer, and the {side} tower of {owner} is a {type(tower).__name__}.", hint)
    return len(blocks), tower.transformer.width // blocks[0].attn.num_heads


def _front(whole: Tensor, shape: torch.Size, name: str, side: Side, origin: str) -> Tensor:
    """Return the front part of a weight; what lies stacked in it (queries, keys and values) is cut apart first."""
    fixed = (0,) if (side, name) == ("image", "positional_embedding") else FIXED.get(name, ())
    axes = list(enumerate(zip(shape, whole.shape, strict=False)))
    smaller = whole.ndim == len(shape) and all(new == old or (new < old and axis not in fixed) for axis, (new, old) in axes)
    if not smaller:
        raise ModelError(f"{name} of the {side} tower cannot be inherited: it is {_size(whole)} in {origin} and {_size(shape)} in the student.", _SMALLER)
    if ".in_proj_" in name:
        return torch.cat([part[tuple(slice(size) for size in (shape[0] // 3, *shape[1:]))] for part in whole.chunk(3)])
    return whole[tuple(slice(size) for size in shape)]


def _size(of: Tensor | torch.Size) -> str:
    return " x ".join(map(str, of.shape if isinstance(of, Tensor) else of)) or "a single number"
