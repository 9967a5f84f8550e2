"""The classes of towers that open_clip has: what each gives besides its embedding, and which of that is a token.

`last`, the default layer, means the tokens that the tower itself goes on to pool: after its final norm where it norms before it pools,
without one where the norm acts on the pooled vector (CLIPA, ConvNeXt) or on a pooler's queries (CoCa). A layer by its number is the output
of that block, never normed. So what is stored as `last` is what the embedding was made of, in every family.

Nothing here knows devices, precision or compilation: plain functions of (model, input, block), `block` as `block_of` names it.

Shape suffixes: B batch, C channels, H W pixels or grid, D embedding, T patches, L text length, W token width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer

from kdstore.errors import ModelError

RESNET_STAGES = 5  # stem and four stages
BEFORE_POOLING = ("norm", "norm_pre", "final_conv", "conv_head")
"""What timm's trunks call that which follows their last block; also there as an identity, or behind the pooling."""


@dataclass(frozen=True)
class TokenForm:
    """Shape (tokens, width) of one sample's tokens, and what the store's identity says of where they come from."""

    shape: tuple[int, int]
    encoding: dict[str, Any]


def image_embedding(clip: Any, image_BCHW: torch.Tensor) -> torch.Tensor:
    """Embed images [B, D], before normalisation."""
    embedding_BD: torch.Tensor = clip.encode_image(image_BCHW, normalize=False)
    return embedding_BD


def image_tokens(clip: Any, image_BCHW: torch.Tensor, block: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Embed images [B, D] and keep the patches [B, T, W] of a block, row by row of the grid, from one forward pass."""
    return _tower(clip.visual).tokens(clip.visual, image_BCHW, block)


def text_embedding(clip: Any, ids_BL: torch.Tensor) -> torch.Tensor:
    """Embed texts [B, D], before normalisation."""
    embedding_BD: torch.Tensor = clip.encode_text(ids_BL, normalize=False)
    return embedding_BD


def text_tokens(clip: Any, ids_BL: torch.Tensor, block: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Embed texts [B, D] and keep the hidden states of a block [B, L, W], one for each token id (not of a class token that the tower adds), from one pass."""
    text = _text_tower(clip)
    if isinstance(text, HFTextEncoder):
        inside_BL = (ids_BL != text.config.pad_token_id).long()
        out = text.transformer(input_ids=ids_BL, attention_mask=inside_BL)
        return text.proj(text.pooler(out, inside_BL)), out.last_hidden_state
    taken = {"text_indices": 1 if block is None else [block], "normalize_intermediates": block is None and _norms_its_texts(text)}
    out = clip.forward_intermediates(text=ids_BL, normalize=False, **taken)
    return out["text_features"], out["text_intermediates"][0]


def image_token_form(clip: Any, layer: str, image_1CHW: torch.Tensor) -> TokenForm:
    """Tell shape and origin of the tokens of a layer, from forward passes of one image; raises ModelError for a layer that the tower lacks."""
    tower = _tower(clip.visual)
    layers, final = tower.form(clip.visual, image_1CHW)
    place = _place(layer, layers, final, "image")
    _, tokens_1TW = tower.tokens(clip.visual, image_1CHW, block_of(layer))
    return TokenForm((tokens_1TW.shape[1], tokens_1TW.shape[2]), {**place, "prefix_stripped": tower.prefix(clip.visual)})


def text_token_form(clip: Any, layer: str, ids_1L: torch.Tensor) -> TokenForm:
    """Tell shape and origin of the text tokens of a layer; raises ModelError for a layer that the tower lacks."""
    text = _text_tower(clip)
    if not isinstance(text, HFTextEncoder):
        place = _place(layer, len(text.transformer.resblocks), "ln_final" if _norms_its_texts(text) else "none", "text")
    elif layer == "last":
        place = {"layer": "last_hidden_state"}
    else:
        raise ModelError(f"A Hugging Face text tower gives the states of its last layer alone, not of layer {layer}.", "Leave --token-layer out.")
    _, hidden_1LW = text_tokens(clip, ids_1L, block_of(layer))
    return TokenForm((hidden_1LW.shape[1], hidden_1LW.shape[2]), place)


def train_last_blocks(clip: Any, count: int | None) -> list[torch.nn.Module]:
    """Freeze the image tower but for its last `count` blocks and what comes behind them (None: nothing is frozen); returns the modules that are trained.

    Behind a block is what its tower registers after it, which in all families is the order of the forward pass, and the projection of the embedding.
    Raises ModelError for a tower of fewer blocks, or of which none are known.
    """
    visual = clip.visual
    if count is None:
        return [visual.requires_grad_(True)]
    blocks = _tower(visual).blocks(visual)
    if count > len(blocks):
        raise ModelError(f"The image tower has {len(blocks)} blocks that can be trained apart, but the last {count} were asked for.", "Train fewer, or all.")
    named = dict(visual.named_parameters())
    first = next(blocks[-count].parameters())
    start = next(i for i, p in enumerate(named.values()) if p is first)
    for i, (name, p) in enumerate(named.items()):
        p.requires_grad_(i >= start or name == "proj")
    return blocks[-count:]


def block_of(layer: str) -> int | None:
    """Turn a layer's name into what the functions above take: None for `last`, else a block's number, from the end if negative."""
    return None if layer == "last" else -1 if layer == "last-before-norm" else int(layer)


def _place(layer: str, layers: int, final: str, side: str) -> dict[str, Any]:
    """Say which block of how many, and what acts after it; equal tokens are said alike, whatever the layer was called."""
    block = block_of(layer)
    if block is not None and not -layers <= block < layers:
        raise ModelError(f"The {side} tower has {layers} layers, but layer {layer} was asked for.", f"Name one of 0 to {layers - 1}, or of -{layers} to -1.")
    return {"layer": layers - 1 if block is None else block % layers, "layers": layers, "final": final if block is None else "none"}


def _text_tower(clip: Any) -> Any:
    """Return the module that holds the text tower's blocks: `CLIP` is its own."""
    return getattr(clip, "text", clip)


def _norms_its_texts(text: Any) -> bool:
    """Whether the final norm acts on all tokens: CoCa's acts on the class token that it appends, alone."""
    return getattr(text, "cls_emb", None) is None


def _tower(visual: Any) -> _Tower:
    for cls, tower in TOWERS.items():
        if isinstance(visual, cls):
            return tower
    raise ModelError(f"No tokens are known of image towers of the class {type(visual).__name__}.", "Use its embeddings: --tokens none.")


def _rows(feature_BWHW: torch.Tensor) -> torch.Tensor:
    """Lay a grid out row by row: [B, W, h, w] to [B, h * w, W]."""
    return feature_BWHW.flatten(2).transpose(1, 2).contiguous()


def _vit_tokens(visual: Any, image_BCHW: torch.Tensor, block: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    norm = block is None and _vit_final(visual) != "none"
    out = visual.forward_intermediates(image_BCHW, indices=1 if block is None else [block], normalize_intermediates=norm, output_fmt="NLC")
    return out["image_features"], out["image_intermediates"][0]


def _vit_final(visual: Any) -> str:
    """Name the norm that acts on tokens before they are pooled: a pooler of CoCa's first kind reads them as they are."""
    if visual.attn_pool is not None:
        return "none" if visual.attn_pool_contrastive is None else "ln_post"
    return "none" if visual.final_ln_after_pool else "ln_post"


def _resnet_tokens(visual: Any, image_BCHW: torch.Tensor, block: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    last = RESNET_STAGES - 1
    indices = sorted({last if block is None else block % RESNET_STAGES, last})  # without the last stage open_clip would pool an earlier one
    out = visual.forward_intermediates(image_BCHW, indices=indices)
    return out["image_features"], _rows(out["image_intermediates"][0])


def _timm_tokens(visual: Any, image_BCHW: torch.Tensor, block: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    trunk = visual.trunk
    if block is None:
        features = trunk.forward_features(image_BCHW)
        tokens_BTW = _patches(trunk, features)
    else:
        features, (grid_BWHW,) = trunk.forward_intermediates(image_BCHW, indices=[block], output_fmt="NCHW")
        tokens_BTW = _rows(grid_BWHW)
    return visual.head(trunk.forward_head(features)), tokens_BTW


def _patches(trunk: Any, features: torch.Tensor) -> torch.Tensor:
    """Take the patches out of what a trunk gives: a sequence behind its prefix, or a grid with channels first or last (Swin)."""
    if features.ndim == 3:
        return features[:, _timm_prefix(trunk) :].contiguous()
    return features.flatten(1, 2).contiguous() if getattr(trunk, "output_fmt", "NCHW") == "NHWC" else _rows(features)


def _timm_prefix(trunk: Any) -> int:
    return int(getattr(trunk, "num_prefix_tokens", 0))


def _stages(resnet: Any) -> list[torch.nn.Module]:
    return [resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4]


def _timm_blocks(trunk: Any) -> list[torch.nn.Module]:
    """Find what timm calls blocks, stages or layers: a list by one of these names, or the four layers of a ResNet."""
    for name in ("blocks", "stages", "layers"):
        if isinstance(found := getattr(trunk, name, None), torch.nn.ModuleList | torch.nn.Sequential):
            return list(found)
    return _stages(trunk) if hasattr(trunk, "layer4") else []


def _timm_form(visual: Any, image_1CHW: torch.Tensor) -> tuple[int, str]:
    """Count the blocks, and name what changes the last one's output before it is pooled: found by looking, since trunks carry norms that do nothing."""
    features, blocks = visual.trunk.forward_intermediates(image_1CHW, output_fmt="NCHW")
    pooled, last = _patches(visual.trunk, features), _rows(blocks[-1])
    if pooled.shape == last.shape and torch.equal(pooled, last):
        return len(blocks), "none"
    names = (name for name in BEFORE_POOLING if not isinstance(getattr(visual.trunk, name, torch.nn.Identity()), torch.nn.Identity))
    return len(blocks), next(names, "unnamed")


@dataclass(frozen=True)
class _Tower:
    """How one class of image towers gives tokens: `form` counts blocks and names what follows the last, `prefix` counts tokens that are no patches.

    `blocks` are the modules of which the last ones can be trained apart from the rest, in the order of the forward pass.
    """

    tokens: Callable[[Any, torch.Tensor, int | None], tuple[torch.Tensor, torch.Tensor]]
    form: Callable[[Any, torch.Tensor], tuple[int, str]]
    prefix: Callable[[Any], int]
    blocks: Callable[[Any], list[torch.nn.Module]]


TOWERS: dict[type, _Tower] = {
    VisionTransformer: _Tower(
        _vit_tokens, lambda visual, _: (len(visual.transformer.resblocks), _vit_final(visual)), lambda _: 1, lambda visual: list(visual.transformer.resblocks)
    ),
    ModifiedResNet: _Tower(_resnet_tokens, lambda *_: (RESNET_STAGES, "none"), lambda _: 0, lambda visual: _stages(visual)),
    TimmModel: _Tower(_timm_tokens, _timm_form, lambda visual: _timm_prefix(visual.trunk), lambda visual: _timm_blocks(visual.trunk)),
}
