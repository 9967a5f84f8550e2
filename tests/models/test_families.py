"""Every family of open_clip's models, shrunk to a few thousand weights: its real configuration with small numbers in it.

What is compared with is what hooks see inside the plain forward pass of open_clip: another way to the tokens than ours.
"""

import functools
import json
import sys
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace

import open_clip
import pytest
import timm
import torch
from timm.layers import LayerNorm2d
from timm.models.fastvit import RepConditionalPosEnc

from kdstore.errors import ModelError
from kdstore.models import encode
from kdstore.models.encode import (
    encode_image,
    encode_image_tokens,
    encode_text,
    encode_text_and_tokens,
    encode_text_tokens,
    image_token_form,
    text_lengths,
    text_token_form,
)
from kdstore.models.load import load_model
from kdstore.models.names import resolve

VIT = {"img_size": 32, "embed_dim": 32, "depth": 3, "num_heads": 2}
POSITIONS = (None, None, None, partial(RepConditionalPosEnc, spatial_shape=(7, 7)))
SMALL_TRUNKS = {  # what makes timm's own constructors build a small one
    "vit_base_patch16_siglip_224": {**VIT, "patch_size": 8},
    "vit_base_patch16_siglip_256": {**VIT, "patch_size": 8},
    "eva02_base_patch16_clip_224": {**VIT, "patch_size": 8, "ref_feat_shape": (4, 4)},
    "eva_giant_patch14_224": {**VIT, "patch_size": 8, "mlp_ratio": 2},
    "vit_pe_core_base_patch16_224": {**VIT, "patch_size": 8, "ref_feat_shape": (4, 4), "attn_pool_num_heads": 2},
    "vit_base_mci_224": {"img_size": 64, "depth": 2},
    "vit_large_patch14_clip_224": {**VIT, "patch_size": 8},
    "fastvit_mci0": {"layers": (1, 1, 1, 1), "embed_dims": (32, 32, 64, 64), "pos_embs": POSITIONS},
    "fastvit_mci3": {
        "layers": (1, 1, 1, 1, 1),
        "embed_dims": (32, 32, 32, 64, 64),
        "pos_embs": (*POSITIONS, POSITIONS[3]),
        "norm_layer": partial(LayerNorm2d, eps=1e-5),
    },
    "convnext_base": {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)},
    "convnext_large": {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)},
    "vitamin_small_224": {"img_size": 64, "depth": 3},
    "swin_base_patch4_window7_224": {"img_size": 64, "window_size": 2, "embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)},
    "vit_medium_patch16_gap_256": {**VIT, "patch_size": 8},
    "vit_relpos_medium_patch16_cls_224": {**VIT, "patch_size": 8},
}


def _register(name, small):
    def build(pretrained=False, **kwargs):
        return timm.model_entrypoint(name)(pretrained=False, **small, **kwargs)

    build.__name__, build.__module__ = f"small_{name}", __name__
    timm.models.register_model(build)


@pytest.fixture(scope="module", autouse=True)
def small_trunks():
    sys.modules.setdefault(__name__, SimpleNamespace(__name__=__name__))
    for name, small in SMALL_TRUNKS.items():
        _register(name, small)


def small_config(arch):
    """The family's own configuration with small numbers: its switches stay as they are."""
    config = open_clip.get_model_config(arch)
    config["embed_dim"] = 32
    vision, text = config["vision_cfg"], config["text_cfg"]
    trunk = vision.get("timm_model_name")
    if trunk:
        vision["timm_model_name"] = f"small_{trunk}"
        vision["image_size"] = SMALL_TRUNKS[trunk].get("img_size", 64)
    elif isinstance(vision["layers"], list):
        vision.update(layers=[1, 1, 1, 1], width=8, head_width=64, image_size=64)
    else:
        vision.update(layers=3, width=32, head_width=16, patch_size=8, image_size=32)
    text.update(layers=2, width=32, heads=2, context_length=16, vocab_size=49408)
    text.pop("hf_tokenizer_name", None)
    text.pop("tokenizer_kwargs", None)
    if "multimodal_cfg" in config:
        config["multimodal_cfg"].update(layers=1, width=32, heads=2, context_length=16, vocab_size=49408)
    return config


def add_config(folder, name, config):
    path = folder / f"small-{name}.json"
    path.write_text(json.dumps(config))
    open_clip.add_model_config(path)
    return path.stem


@dataclass(frozen=True)
class Family:
    """Where open_clip's own forward pass has the tokens (module, tokens before the patches) and block 1, and what is to be recorded."""

    module: str
    shape: tuple[int, int]
    layers: int
    final: str = "none"
    prefix: int = 0
    block: str = "trunk.stages.1"
    text_final: str = "ln_final"


OPEN_CLIP = {"layers": 3, "prefix": 1, "block": "transformer.resblocks.1"}
TIMM_VIT = {"layers": 3, "final": "norm", "block": "trunk.blocks.1"}
FAMILIES = {
    "ViT-B-16": Family("ln_post", (16, 32), final="ln_post", **OPEN_CLIP),
    "ViT-H-14-quickgelu": Family("ln_post", (16, 32), final="ln_post", **OPEN_CLIP),  # DFN
    "ViT-L-14-worldwide-quickgelu": Family("ln_post", (16, 32), final="ln_post", **OPEN_CLIP),  # MetaCLIP 2
    "ViT-L-14-CLIPA": Family("transformer.resblocks.2", (16, 32), **OPEN_CLIP),
    "coca_ViT-B-32": Family("transformer.resblocks.2", (16, 32), text_final="none", **OPEN_CLIP),
    "RN50": Family("layer4", (4, 256), 5, block="layer1"),
    "ViT-B-16-SigLIP": Family("trunk.norm", (16, 32), **TIMM_VIT),
    "ViT-B-16-SigLIP2-256": Family("trunk.norm", (16, 32), **TIMM_VIT),
    "EVA01-g-14": Family("trunk.norm", (16, 32), prefix=1, **TIMM_VIT),
    "EVA02-B-16": Family("trunk.norm", (16, 32), prefix=1, **TIMM_VIT),
    "PE-Core-B-16": Family("trunk.norm", (16, 32), prefix=1, **TIMM_VIT),
    "MobileCLIP2-B": Family("trunk.norm", (16, 768), prefix=1, **{**TIMM_VIT, "layers": 2}),
    "MobileCLIP2-L-14": Family("trunk.norm", (16, 32), prefix=1, **TIMM_VIT),
    "MobileCLIP2-S0": Family("trunk.final_conv", (4, 128), 4, final="final_conv"),
    "MobileCLIP2-S3": Family("trunk.final_conv", (1, 128), 5, final="final_conv"),
    "convnext_base": Family("trunk.stages", (4, 32), 4),
    "convnext_large_d": Family("trunk.stages", (4, 32), 4),
    "ViTamin-S": Family("trunk.blocks", (16, 384), **{**TIMM_VIT, "final": "none"}),
    "swin_base_patch4_window7_224": Family("trunk.norm", (4, 64), 4, final="norm", block="trunk.layers.1"),
    "vit_medium_patch16_gap_256": Family("trunk.norm", (16, 32), **TIMM_VIT),
    "vit_relpos_medium_patch16_cls_224": Family("trunk.norm", (16, 32), prefix=1, **TIMM_VIT),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder, loaded = tmp_path_factory.mktemp("configs"), {}

    def get(arch):
        if arch not in loaded:
            name = add_config(folder, arch.replace("SigLIP", "Sig-LIP"), small_config(arch))  # the whole word would ask for a tokenizer from the net
            loaded[arch] = load_model(name, untrained=True, device="cpu")
        return loaded[arch]

    return get


def seen_inside(clip, module, image_BCHW):
    """Run open_clip's own forward pass; returns its embedding, and what the module gave as [B, T, W]."""
    seen = []
    handle = clip.visual.get_submodule(module).register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    with torch.inference_mode():
        embedding = clip.encode_image(image_BCHW, normalize=False)
    handle.remove()
    if seen[0].ndim == 3:
        return embedding, seen[0]
    channels_last = type(getattr(clip.visual, "trunk", None)).__name__ == "SwinTransformer"
    return embedding, seen[0].flatten(1, 2) if channels_last else seen[0].flatten(2).mT


@pytest.mark.parametrize("arch", FAMILIES)
def test_embedding_and_tokens_are_those_of_open_clips_own_forward_pass(models, arch):
    model, family = models(arch), FAMILIES[arch]
    image = torch.rand(2, 3, *model.image_size)
    embedding, tokens = encode_image_tokens(model, image)
    theirs, features = seen_inside(model.clip, family.module, image)
    assert torch.allclose(embedding, theirs, atol=1e-5)
    assert torch.equal(encode_image(model, image), theirs)
    assert torch.allclose(tokens, features[:, family.prefix :], atol=1e-5)
    form = image_token_form(model)
    assert tuple(tokens.shape[1:]) == family.shape == form.shape
    assert form.encoding == {"layer": family.layers - 1, "layers": family.layers, "final": family.final, "prefix_stripped": family.prefix}


@pytest.mark.parametrize("arch", FAMILIES)
def test_an_earlier_layer_is_that_blocks_output_and_leaves_the_embedding_as_it_is(models, arch):
    model, family = models(arch), FAMILIES[arch]
    image = torch.rand(2, 3, *model.image_size)
    theirs, features = seen_inside(model.clip, family.block, image)
    for layer in ("1", str(1 - family.layers)):
        embedding, tokens = encode_image_tokens(model, image, layer)
        assert torch.allclose(embedding, theirs, atol=1e-5)
        assert torch.allclose(tokens, features[:, family.prefix :], atol=1e-5)
        form = image_token_form(model, layer)
        assert form.shape == tuple(tokens.shape[1:])
        assert form.encoding == {"layer": 1, "layers": family.layers, "final": "none", "prefix_stripped": family.prefix}


@pytest.mark.parametrize("arch", FAMILIES)
def test_before_the_norm_is_recorded_as_something_else_exactly_where_the_tower_norms_before_it_pools(models, arch):
    model, family = models(arch), FAMILIES[arch]
    image = torch.rand(1, 3, *model.image_size)
    last, before = (encode_image_tokens(model, image, layer)[1] for layer in ("last", "last-before-norm"))
    assert image_token_form(model, "last-before-norm").encoding == image_token_form(model, "-1").encoding
    same = image_token_form(model, "last-before-norm").encoding == image_token_form(model).encoding
    assert same == (family.final == "none") == (last.shape == before.shape and torch.equal(last, before))


@pytest.mark.parametrize("arch", FAMILIES)
def test_text_states_are_those_of_open_clips_own_forward_pass(models, arch):
    model, family = models(arch), FAMILIES[arch]
    texts = ["a red circle", "two stars ! and a blue square !"]
    text = getattr(model.clip, "text", model.clip)
    seen = []
    module = text.ln_final if family.text_final == "ln_final" else text.transformer
    handle = module.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    with torch.inference_mode():
        theirs = model.clip.encode_text(model.tokenizer(texts), normalize=False)
    handle.remove()
    assert torch.equal(encode_text(model, texts), theirs)
    embedding, hidden, lengths = encode_text_and_tokens(model, texts)
    assert torch.equal(embedding, theirs)
    assert lengths.tolist() == [5, 10]
    for i, n in enumerate(lengths.tolist()):
        assert torch.allclose(hidden[i, :n], seen[0][i, :n], atol=1e-5)
        assert not hidden[i, n:].any()
    form = text_token_form(model)
    assert form.shape == tuple(hidden.shape[1:]) == (16, 32)
    assert form.encoding == {"layer": 1, "layers": 2, "final": family.text_final, "pad_id": 0}
    assert text_token_form(model, "0").encoding == {"layer": 0, "layers": 2, "final": "none", "pad_id": 0}


def test_cocas_tokens_are_patches_and_not_its_queries(models):
    clip, (tokens, _) = models("coca_ViT-B-32").clip, FAMILIES["coca_ViT-B-32"].shape
    _, queries = clip.visual(torch.rand(1, 3, 32, 32))
    assert queries.shape[1] == 255 != tokens


@pytest.mark.parametrize("arch", ["ViT-B-16-SigLIP", "ViT-B-16-SigLIP2-256"])
def test_siglips_logits_follow_from_the_scale_and_the_bias_of_the_identity(models, arch):
    model = models(arch)
    image, texts = torch.rand(3, 3, *model.image_size), ["a star", "a cross"]
    with torch.inference_mode():
        theirs, _ = model.clip.get_logits(image, model.tokenizer(texts))
    image_ND, text_ND = (torch.nn.functional.normalize(x, dim=-1) for x in (encode_image(model, image), encode_text(model, texts)))
    said = model.identity["teacher"]
    assert said["logit_bias"] == -10
    assert torch.allclose(said["logit_scale"] * image_ND @ text_ND.T + said["logit_bias"], theirs, atol=1e-4)


def test_dfn_and_metaclip_are_built_with_quickgelu_and_say_so(models):
    assert models("ViT-H-14-quickgelu").identity["teacher"]["activation"] == "quick_gelu"
    assert models("ViT-B-16").identity["teacher"]["activation"] == "gelu"


@pytest.mark.parametrize("layer", ["3", "-4"])
def test_a_layer_that_the_tower_lacks_is_named_with_those_it_has(models, layer):
    with pytest.raises(ModelError, match="3 layers"):
        image_token_form(models("ViT-B-16"), layer)
    with pytest.raises(ModelError, match="2 layers"):
        text_token_form(models("ViT-B-16"), layer)


def test_naflex_is_refused_before_it_is_built(tmp_path):
    config = small_config("ViT-B-16")
    config["vision_cfg"] = {"timm_model_name": "naflexvit_base_patch16_siglip", "image_size": 32}
    with pytest.raises(ModelError, match="rows of a store are of one size"):
        load_model(add_config(tmp_path, "naflex", config), untrained=True, device="cpu")


@pytest.mark.parametrize("arch", ["ViT-B-16", "ViT-B-16-SigLIP", "EVA02-B-16", "convnext_base", "RN50"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_stays_close_and_leaves_as_float32(models, arch, precision):
    model = models(arch)
    image = torch.rand(2, 3, *model.image_size)
    whole, half = encode_image_tokens(model, image), encode_image_tokens(replace(model, precision=precision), image)
    for a, b in zip(whole, half, strict=True):
        assert b.dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(a, b, dim=-1).min() > 0.99
    assert not torch.equal(whole[1], half[1])


@pytest.mark.parametrize("arch", ["convnext_base", "MobileCLIP2-S0", "ViT-B-16"])
def test_channels_last_changes_rounding_alone(models, arch):
    model = models(arch)
    image = torch.rand(2, 3, *model.image_size)
    other = load_model(model.name.name, untrained=True, device="cpu", channels_last=True)
    assert other.identity == model.identity
    assert next(p for p in other.clip.visual.parameters() if p.ndim == 4 and min(p.shape[1:]) > 1).is_contiguous(memory_format=torch.channels_last)
    for a, b in zip(encode_image_tokens(model, image), encode_image_tokens(other, image), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("arch", ["ViT-B-16", "ViT-B-16-SigLIP"])
def test_every_tower_is_traced_whole_and_gives_the_same_when_compiled(models, arch, monkeypatch):
    """With the compiler's tracing but without its C++, which takes most of a minute."""
    monkeypatch.setattr(encode, "_compile", functools.cache(partial(torch.compile, backend="aot_eager", fullgraph=True)))
    model = models(arch)
    compiled = load_model(model.name.name, untrained=True, device="cpu", compile=True)
    assert compiled.identity == model.identity
    image, texts = torch.rand(2, 3, *model.image_size), ["a star"]
    for a, b in zip(encode_image_tokens(model, image), encode_image_tokens(compiled, image), strict=True):
        assert torch.allclose(a, b, atol=1e-4)
    assert torch.allclose(encode_text(model, texts), encode_text(compiled, texts), atol=1e-4)
    for a, b in zip(encode_text_and_tokens(model, texts), encode_text_and_tokens(compiled, texts), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_a_length_counts_the_end_of_a_text_also_where_its_id_pads():
    ids = torch.tensor([[5, 6, 1, 1], [5, 6, 7, 1], [1, 1, 1, 1]])
    assert text_lengths(ids, 1, ends_padded=True).tolist() == [3, 4, 1]
    assert text_lengths(torch.tensor([[0, 9, 2, 1], [0, 9, 9, 2]]), 1).tolist() == [3, 4]


@pytest.mark.parametrize(("pad", "pad_id"), [("</s>", 1), ("<pad>", 0)], ids=["SigLIP", "SigLIP2"])
def test_siglips_own_tokenizers_load_from_a_folder_and_lengths_are_what_they_attend_to(tmp_path, pad, pad_id):
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", "a", "star", "cross"])}, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token=pad, eos_token="</s>", unk_token="<unk>").save_pretrained(tmp_path / "words")
    config = small_config("ViT-B-16-SigLIP")
    config["text_cfg"].update(hf_tokenizer_name=str(tmp_path / "words"), tokenizer_kwargs={"clean": "canonicalize"})
    model = load_model(add_config(tmp_path, f"words-{pad_id}", config), untrained=True, device="cpu")
    assert model.pad_id == pad_id
    texts = ["A star!", "a cross a cross a", "star " * 40]
    attended = model.tokenizer.tokenizer([model.tokenizer.clean_fn(t) for t in texts], padding="max_length", max_length=16, truncation=True)["attention_mask"]
    hidden, lengths = encode_text_tokens(model, texts)
    assert lengths.tolist() == [sum(row) for row in attended] == [3, 6, 16]
    assert hidden[0, 2].any()
    assert not hidden[0, 3:].any()
    assert text_token_form(model).encoding["pad_id"] == pad_id


def test_hugging_face_text_towers_give_their_last_states(tmp_path):
    transformers = pytest.importorskip("transformers")
    size = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 49408}
    transformers.RobertaConfig(**size, pad_token_id=0).save_pretrained(tmp_path / "roberta")
    config = small_config("ViT-B-16")
    config["text_cfg"] = {"hf_model_name": str(tmp_path / "roberta"), "hf_model_pretrained": False, "context_length": 16}
    model = load_model(add_config(tmp_path, "roberta", config), untrained=True, device="cpu")
    texts = ["a star", "two crosses and a star"]
    with torch.inference_mode():
        model.clip.text.output_tokens = True
        pooled, states = model.clip.text(model.tokenizer(texts))
        model.clip.text.output_tokens = False
    embedding, hidden, lengths = encode_text_and_tokens(model, texts)
    assert torch.equal(encode_text(model, texts), embedding)
    assert torch.allclose(embedding, pooled, atol=1e-5)
    assert all(torch.allclose(hidden[i, :n], states[i, :n], atol=1e-5) for i, n in enumerate(lengths.tolist()))
    assert text_token_form(model).encoding == {"layer": "last_hidden_state", "pad_id": 0}
    with pytest.raises(ModelError, match="last layer alone"):
        text_token_form(model, "-2")


@pytest.mark.parametrize(("arch", "twin"), [("ViT-H-14", "ViT-H-14-quickgelu"), ("ViT-B-32-quickgelu", "ViT-B-32"), ("EVA02-B-16", None)])
def test_a_checkpoint_file_is_doubted_where_a_twin_has_the_other_activation(tmp_path, arch, twin):
    (tmp_path / "weights.pt").touch()
    notice = resolve(arch, str(tmp_path / "weights.pt")).notice
    assert f"take {twin}, or the features are wrong" in notice if twin else notice == ""
