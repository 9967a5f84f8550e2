"""Models: names, the exact identity of weights, and encoders that give what open_clip gives."""

import json

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from kdstore.errors import ConfigError, ModelError, UnknownName
from kdstore.models.encode import encode_image, encode_image_tokens, encode_text, encode_text_tokens, image_token_form, in_batches, text_lengths
from kdstore.models.load import load_model, parameter_counts, weights_sha256
from kdstore.models.names import DEFAULT_TAGS, architecture_of, demo_teachers, resolve, short_name


@pytest.fixture(scope="module")
def model():
    return load_model("scenes-T", untrained=True, seed=1, device="cpu")


@pytest.fixture
def checkpoint(model, tmp_path):
    torch.save(model.clip.state_dict(), tmp_path / "weights.pt")
    return tmp_path / "weights.pt"


@pytest.mark.parametrize(
    ("name", "short"),
    [("ViT-bigG-14", "bigG"), ("ViT-B-16", "B-16"), ("ViT-L-14", "L"), ("RN50", "RN50"), ("ViT-B-16-SigLIP2", "B-16-SigLIP2")],
)
def test_the_short_name_drops_what_papers_drop(name, short):
    assert short_name(name) == short


@pytest.mark.parametrize("arch", DEFAULT_TAGS)
def test_every_default_tag_exists_and_fits_its_activation(arch):
    assert DEFAULT_TAGS[arch] in open_clip.list_pretrained_tags_by_model(arch)
    assert resolve(arch).pretrained == DEFAULT_TAGS[arch]


@pytest.mark.parametrize(("name", "weights"), [("ViT-B-32:openai", None), ("ViT-B-32", "openai"), ("ViT-B/32", "weights.pt")])
def test_weights_that_are_named_are_never_left_out_in_silence(name, weights):
    with pytest.raises(ModelError, match="untrained, but the weights"):
        resolve(name, weights, untrained=True)
    assert resolve(architecture_of(name), untrained=True).open_clip_name == "ViT-B-32"


@pytest.mark.parametrize("name", demo_teachers())
def test_every_built_in_teacher_has_an_untrained_twin_of_its_architecture(name):
    trained, twin = load_model(name, device="cpu"), load_model(architecture_of(name), untrained=True, seed=0, device="cpu")
    assert twin.config["model_cfg"] == trained.config["model_cfg"]
    assert twin.identity["teacher"]["name"] == f"{name} (untrained)"
    assert twin.identity["teacher"]["weights_sha256"] != trained.identity["teacher"]["weights_sha256"]


@pytest.mark.parametrize(("holds", "said"), [("config.json", "unfinished run"), ("checkpoint.pt", "unfinished run"), ("notes.txt", "not a model folder")])
def test_a_folder_without_a_model_says_what_it_is_by_the_name_that_was_typed(in_tmp, holds, said):
    (in_tmp / "run").mkdir()
    (in_tmp / "run" / holds).touch()
    for name in ("run", "./run/", "local-dir:run"):
        with pytest.raises(ModelError, match=said) as e:
            resolve(name)
        assert e.value.message.startswith(f"{name} ")


def test_a_finished_run_is_found_by_its_bare_name(in_tmp, model):
    (in_tmp / "run").mkdir()
    (in_tmp / "run" / "open_clip_config.json").write_text(json.dumps(model.config))
    (in_tmp / "run" / "open_clip_model.safetensors").touch()
    assert resolve("run").open_clip_name == "local-dir:run"
    assert architecture_of("run") == "run"


def test_bigg_without_a_tag_gets_the_laion_weights_and_says_so():
    found = resolve("ViT-bigG-14")
    assert found.pretrained == "laion2b_s39b_b160k"
    assert "laion2b_s39b_b160k" in found.notice


@pytest.mark.parametrize(
    ("name", "tag", "error", "said"),
    [
        ("ViT-bigG-15", None, UnknownName, "ViT-bigG-14"),
        ("ViT-B-32", "laion2b", UnknownName, "laion2b_s34b_b79k"),
        ("RN101", None, ModelError, "openai"),
        ("ViT-T-16", None, ModelError, "--pretrained FILE"),
        ("ViT-H-14", "dfn5b", ModelError, "ViT-H-14-quickgelu:dfn5b"),
        ("ViT-bigG-14", "metaclip_fullcc", ModelError, "ViT-bigG-14-quickgelu:metaclip_fullcc"),
        ("local-dir:/no/such/folder", None, ModelError, "open_clip_config.json"),
    ],
)
def test_a_model_that_cannot_be_named_so_is_one_line_with_the_way_out(name, tag, error, said):
    with pytest.raises(error) as e:
        resolve(name, tag)
    assert said in str(e.value)
    assert "\n" not in str(e.value)


def test_a_checkpoint_file_loads_and_its_identity_names_the_tensors_not_the_file(model, checkpoint, tmp_path):
    one = load_model("scenes-T", str(checkpoint), device="cpu")
    save_file(model.clip.state_dict(), tmp_path / "other.safetensors")
    other = load_model("scenes-T", str(tmp_path / "other.safetensors"), device="cpu")
    assert one.identity["teacher"] == other.identity["teacher"]
    assert one.identity["teacher"]["weights_sha256"] == weights_sha256(model.clip)
    image = torch.rand(2, 3, 128, 128)
    assert torch.equal(encode_image(one, image), encode_image(model, image))


def test_one_changed_weight_is_another_teacher(model, checkpoint, tmp_path):
    state = torch.load(checkpoint, weights_only=True)
    state["visual.attnpool.c_proj.bias"][0] += 1e-6
    torch.save(state, checkpoint)
    assert load_model("scenes-T", str(checkpoint), device="cpu").identity["teacher"]["digest"] != model.identity["teacher"]["digest"]


def test_weights_of_another_architecture_and_pickles_are_refused(checkpoint, tmp_path):
    with pytest.raises(ModelError, match="Cannot load"):
        load_model("scenes-S", str(checkpoint), device="cpu")
    torch.save({"state_dict": Exploit()}, tmp_path / "evil.pt")
    with pytest.raises(ModelError):
        load_model("scenes-T", str(tmp_path / "evil.pt"), device="cpu")
    assert not EXPLODED


EXPLODED: list[int] = []


class Exploit:
    def __reduce__(self):
        return EXPLODED.append, (1,)


def test_a_folder_without_weights_is_an_error_not_a_random_model(tmp_path):
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": open_clip.get_model_config("scenes-T"), "preprocess_cfg": {}}))
    with pytest.raises(ModelError, match="holds no weights"):
        load_model(f"local-dir:{tmp_path}", device="cpu")


def test_untrained_models_follow_their_seed(model):
    again = load_model("scenes-T", untrained=True, seed=1, device="cpu")
    other = load_model("scenes-T", untrained=True, seed=2, device="cpu")
    assert weights_sha256(again.clip) == weights_sha256(model.clip) != weights_sha256(other.clip)


def test_wrong_devices_and_precisions_are_named():
    with pytest.raises(ConfigError, match="warp"):
        load_model("scenes-T", untrained=True, device="warp")
    with pytest.raises(ConfigError, match="fp8"):
        load_model("scenes-T", untrained=True, device="cpu", precision="fp8")


FAMILIES = {
    "scenes-T": (16, 256),
    "ViT-T-16": (196, 192),
    "RN50": (49, 2048),
    "MobileCLIP2-S0": (64, 1024),
    "coca_ViT-B-32": (49, 768),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_embeddings_equal_open_clips_and_tokens_have_the_grid_of_the_tower(name):
    model = load_model(name, untrained=True, device="cpu")
    image = torch.rand(2, 3, *model.image_size)
    embedding, tokens = encode_image_tokens(model, image)
    with torch.inference_mode():
        theirs = model.clip.encode_image(image, normalize=False)
    assert torch.allclose(embedding, theirs, atol=1e-5)
    assert torch.equal(encode_image(model, image), theirs)
    assert tuple(tokens.shape[1:]) == FAMILIES[name] == image_token_form(model).shape


def test_pooling_the_tokens_as_the_tower_does_gives_its_embedding(model):
    """An independent way to the same number: these are the tokens that the tower itself pools."""
    embedding, tokens_BTW = encode_image_tokens(model, torch.rand(2, 3, 128, 128))
    with torch.inference_mode():
        pooled = model.clip.visual.attnpool(tokens_BTW.transpose(1, 2).unflatten(2, (4, 4)))
    assert torch.allclose(pooled, embedding, atol=1e-5)


def test_text_tokens_end_with_the_text_and_hold_the_pooled_one(model):
    texts = ["a red circle", "two hollow stars and a blue square"]
    hidden, lengths = encode_text_tokens(model, texts)
    assert lengths.tolist() == [5, 9]
    assert all(torch.all(hidden[i, n:] == 0) and torch.any(hidden[i, n - 1] != 0) for i, n in enumerate(lengths))
    pooled = hidden[torch.arange(2), lengths - 1] @ model.clip.text_projection
    assert torch.allclose(pooled, encode_text(model, texts), atol=1e-5)


def test_lengths_count_to_the_last_token_that_is_not_padding():
    assert text_lengths(torch.tensor([[5, 0, 7, 0], [1, 2, 3, 4], [9, 0, 0, 0]]), 0).tolist() == [3, 4, 1]


def test_equal_texts_are_encoded_once(model):
    asked = []

    def encode(texts):
        asked.extend(texts)
        return encode_text(model, texts)

    texts = ["a star", "a cross", "a star", "a star"]
    found = in_batches(encode, texts, 2)
    assert asked == ["a star", "a cross"]
    assert torch.equal(found[0], found[3])
    assert torch.allclose(found, encode_text(model, texts), atol=1e-6)


def test_parameters_are_counted_with_and_without_the_token_embedding(model):
    counts = parameter_counts(model.clip)
    assert counts["total"] - counts["without_token_embedding"] == model.clip.token_embedding.weight.numel()


def test_the_demo_teachers_are_whole_and_larger_than_the_student(model):
    assert len(demo_teachers()) >= 2
    for name, folder in demo_teachers().items():
        card = json.loads((folder / "card.json").read_text())
        weights = load_file(folder / "open_clip_model.safetensors")
        assert all(w.dtype == torch.float16 or not w.is_floating_point() for w in weights.values())
        assert {"command", "seed", "minutes", "curve"} <= card.keys()
        teacher = load_model(name, device="cpu")
        assert parameter_counts(teacher.clip)["without_token_embedding"] > parameter_counts(model.clip)["without_token_embedding"]
