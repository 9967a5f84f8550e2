"""Weights that move between models: whole towers, and the front part of larger ones."""

from __future__ import annotations

import itertools
from typing import Any

import open_clip
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdstore.errors import ModelError
from kdstore.models.transplant import even_layers, inherit, put_tower, tower_weights


def vit(
    width: int = 32, layers: int = 4, *, head: int = 16, patch: int = 8, embed: int = 24, vocabulary: int = 100, size: int = 16, seed: int = 0, **other: Any
) -> Any:
    """A small CLIP of two transformers, every weight drawn."""
    vision = {"image_size": size, "layers": layers, "width": width, "head_width": head, "patch_size": patch}
    text = {"context_length": 8, "vocab_size": vocabulary, "width": width, "heads": width // head, "layers": layers}
    torch.manual_seed(seed)
    clip = open_clip.CustomTextCLIP(embed, vision, text) if other.get("custom") else open_clip.CLIP(embed, vision, text)
    with torch.no_grad():
        for weight in clip.parameters():
            weight.normal_()
    return clip


def inherit_both(student: Any, source: Any, origin: str, layers: str) -> None:
    with torch.no_grad():
        inherit(student, "image", source, origin, layers)
        inherit(student, "text", source, origin, layers)


def test_a_narrower_and_shallower_tower_gets_the_front_of_each_matrix_and_of_queries_keys_and_values_apart() -> None:
    large, small = vit(64, 4, embed=40, seed=1), vit(32, 2, embed=24, seed=2)
    inherit_both(small, large, "large", "even")
    for tower, source in ((small.visual, large.visual), (small, large)):
        for here, there in ((0, 0), (1, 3)):
            block, old = tower.transformer.resblocks[here], source.transformer.resblocks[there]
            for part in range(3):
                mine = block.attn.in_proj_weight[32 * part : 32 * part + 32]
                assert torch.equal(mine, old.attn.in_proj_weight[64 * part : 64 * part + 32, :32])
                assert torch.equal(block.attn.in_proj_bias[32 * part : 32 * part + 32], old.attn.in_proj_bias[64 * part : 64 * part + 32])
            assert torch.equal(block.attn.out_proj.weight, old.attn.out_proj.weight[:32, :32])
            assert torch.equal(block.mlp.c_fc.weight, old.mlp.c_fc.weight[:128, :32])
            assert torch.equal(block.mlp.c_proj.weight, old.mlp.c_proj.weight[:32, :128])
            assert torch.equal(block.ln_1.bias, old.ln_1.bias[:32])
    assert torch.equal(small.visual.conv1.weight, large.visual.conv1.weight[:32])
    assert torch.equal(small.visual.positional_embedding, large.visual.positional_embedding[:, :32])
    assert torch.equal(small.visual.proj, large.visual.proj[:32, :24])
    assert torch.equal(small.token_embedding.weight, large.token_embedding.weight[:, :32])
    assert torch.equal(small.text_projection, large.text_projection[:32, :24])


def test_what_a_head_attends_to_is_inherited_whole() -> None:
    """A check that knows no layout: with the other half of the width silent, the first heads of the large block attend as those of the small one."""
    large, small = vit(64, 1, seed=1), vit(32, 1, seed=2)
    inherit_both(small, large, "large", "even")
    x = torch.randn(1, 5, 32)
    wide = torch.cat([x, torch.zeros(1, 5, 32)], dim=2)
    _, attention = large.visual.transformer.resblocks[0].attn(wide, wide, wide, average_attn_weights=False)
    _, inherited = small.visual.transformer.resblocks[0].attn(x, x, x, average_attn_weights=False)
    torch.testing.assert_close(inherited, attention[:, :2])


@pytest.mark.parametrize("layers", ["even", "first"])
def test_inheriting_all_of_a_model_is_copying_it_whatever_class_holds_its_text_tower(layers: str) -> None:
    source = vit(seed=1)
    for custom in (False, True):
        student = vit(seed=2, custom=custom)
        inherit_both(student, source, "source", layers)
        tokens_BL = torch.randint(1, 100, (3, 8))
        image_BCHW = torch.randn(2, 3, 16, 16)
        torch.testing.assert_close(student.encode_text(tokens_BL), source.encode_text(tokens_BL))
        torch.testing.assert_close(student.encode_image(image_BCHW), source.encode_image(image_BCHW))


def test_the_first_layers_are_taken_where_they_are_asked_for() -> None:
    large, small = vit(layers=4, seed=1), vit(layers=2, seed=2)
    with torch.no_grad():
        inherit(small, "text", large, "large", "first")
    for layer in (0, 1):
        assert torch.equal(small.transformer.resblocks[layer].ln_2.weight, large.transformer.resblocks[layer].ln_2.weight)


@given(st.integers(1, 40).flatmap(lambda of: st.tuples(st.integers(1, of), st.just(of))))
def test_even_layers_hold_both_ends_and_leave_gaps_that_differ_by_one_at_most(sizes: tuple[int, int]) -> None:
    count, of = sizes
    taken = even_layers(count, of)
    assert len(taken) == count
    assert taken[0] == 0
    assert count == 1 or taken[-1] == of - 1
    gaps = [b - a for a, b in itertools.pairwise(taken)]
    assert all(gap >= 1 for gap in gaps)
    assert not gaps or max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize(
    ("student", "source", "said"),
    [
        (vit(64), vit(32), "class_embedding of the image tower cannot be inherited: it is 32 in big and 64"),
        (vit(layers=6), vit(layers=4), "4 layers in big, and the student has 6"),
        (vit(32, head=16), vit(32, head=32), "Heads of the image tower are 32 wide in big and 16"),
        (vit(patch=4, size=8), vit(patch=8), "conv1.weight of the image tower cannot be inherited"),
        (vit(size=16), vit(size=32), "positional_embedding of the image tower cannot be inherited: it is 17 x 32 in big and 5 x 32"),
        (vit(vocabulary=90), vit(vocabulary=100), "token_embedding.weight of the text tower cannot be inherited"),
        (vit(embed=48), vit(embed=24), "proj of the image tower cannot be inherited: it is 32 x 24 in big and 32 x 48"),
    ],
)
def test_what_cannot_be_inherited_is_named(student: Any, source: Any, said: str) -> None:
    with pytest.raises(ModelError) as refused:
        inherit_both(student, source, "big", "even")
    assert said in refused.value.message
    assert "\n" not in str(refused.value)


def test_a_tower_of_other_shape_does_not_fit_and_its_first_weight_is_named() -> None:
    weights = tower_weights(vit(64), "text")
    with pytest.raises(ModelError, match="positional_embedding is 8 x 64 in there and 8 x 32 in the student"), torch.no_grad():
        put_tower(vit(32), "text", weights, "there")
