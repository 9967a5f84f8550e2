"""Students that do not start from nothing: checkpoints, inheritance, and the teacher's text tower copied or frozen."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F

from kdstore.data.scenes import Scenes
from kdstore.distill.building import carry_text, config_with_text_of
from kdstore.distill.config import DistillConfig
from kdstore.distill.runfolder import AVERAGE
from kdstore.distill.train import distill
from kdstore.errors import ConfigError, KdstoreError, ModelError, RunError, UnknownName
from kdstore.jsonfile import read_json
from kdstore.models.checkpoint import export_model
from kdstore.models.encode import encode_text
from kdstore.models.load import Model, load_model, weights_sha256
from kdstore.store import open_store

TEXTS = ["a red circle", "two hollow stars and a blue square", ""]


@pytest.fixture(scope="session")
def teacher_folder(teacher: Model, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The session's teacher as a model folder: the name in its store leads to no weights."""
    folder = tmp_path_factory.mktemp("teacher")
    export_model(folder, teacher.clip, teacher.config)
    return str(folder)


@pytest.fixture
def config(student: str, store: Path, teacher_folder: str, tmp_path: Path) -> DistillConfig:
    """Three steps of eight pairs."""
    return DistillConfig(
        cache=str(store),
        student=student,
        loss="clip-kd",
        out=str(tmp_path / "run"),
        samples=24,
        batch_size=8,
        lr=2e-3,
        log_every=1,
        device="cpu",
        teacher_weights=teacher_folder,
    )


def plain(path: Path) -> Any:
    """The exported student, loaded by open_clip alone."""
    return open_clip.create_model(f"local-dir:{path}", require_pretrained=True).eval()


def texts_of(path: Path) -> torch.Tensor:
    """Embed `TEXTS` with the exported student and its tokenizer, by open_clip alone."""
    with torch.inference_mode():
        embedding: torch.Tensor = plain(path).encode_text(open_clip.get_tokenizer(f"local-dir:{path}")(TEXTS))
    return embedding


def logged(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]


def checkpoint(path: Path) -> dict[str, Any]:
    return torch.load(path / "checkpoint.pt", weights_only=True)  # type: ignore[no-any-return]


# The teacher's text tower


def test_a_frozen_text_tower_is_neither_run_nor_trained_and_its_export_is_one_open_clip_model(
    config: DistillConfig, teacher: Model, student: str, tmp_path: Path
) -> None:
    distill(dataclasses.replace(config, text_tower="frozen"))
    trained = checkpoint(tmp_path / "run")["clip"]
    assert {name.partition(".")[0] for name in trained} == {"visual", "logit_scale"}
    torch.testing.assert_close(texts_of(tmp_path / "run"), encode_text(teacher, TEXTS))
    exported = plain(tmp_path / "run")
    assert exported.visual.proj.shape == (32, teacher.embed_dim)
    assert all(torch.equal(exported.state_dict()[name], tensor) for name, tensor in trained.items())
    drawn = load_model(student, untrained=True, seed=config.seed, device="cpu", changed={"embed_dim": teacher.embed_dim}).clip.state_dict()
    assert not any(torch.equal(drawn[name], tensor) for name, tensor in trained.items()), "the whole image tower is trained, its projection too"
    assert not checkpoint(tmp_path / "run")["objective"].keys() & {"heads.0.image_projector.weight", "heads.0.text_projector.weight"}
    run = read_json(tmp_path / "run" / "run.json")
    assert run["student"]["started_from"]["text"]["weights_sha256"] == weights_sha256(teacher.clip)


@pytest.mark.parametrize("text_tower", ["frozen", "copied"])
def test_the_loss_of_a_run_is_that_of_the_exported_model_on_the_same_pairs(text_tower: str, config: DistillConfig, source: Scenes, tmp_path: Path) -> None:
    """Without learning, the model that trained and the one that open_clip loads are the same function: images, texts and temperature."""
    config = dataclasses.replace(config, text_tower=text_tower, loss="clip", lr=0.0, samples=40, batch_size=40)
    distill(dataclasses.replace(config, student=no_dropout(config.student, tmp_path)))
    clip, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'run'}", require_pretrained=True)
    tokenize = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'run'}")
    with torch.inference_mode():
        image_BD = clip.eval().encode_image(torch.stack([preprocess(source.image(i).image) for i in range(40)]), normalize=True)
        text = {c.text: F.normalize(clip.encode_text(tokenize([c.text])), dim=1)[0] for i in range(40) for c in source.captions(i)}
    found = [values["clip"] for values in logged(tmp_path / "run")]
    shown = shown_captions(config, source)
    text_BD = torch.stack([text[caption] for caption in shown])
    same_BB = torch.tensor([[a == b for b in shown] for a in shown]).float()
    target_BB = same_BB / same_BB.sum(1, keepdim=True)
    logits_BB = clip.logit_scale.exp().detach() * image_BD @ text_BD.T
    expected = (F.cross_entropy(logits_BB, target_BB) + F.cross_entropy(logits_BB.T, target_BB)) / 2
    assert found == pytest.approx([expected.item()], rel=1e-4)


def no_dropout(student: str, tmp_path: Path) -> str:
    """The session's student without patch dropout, as a config file; its name is this test's, as open_clip keeps names of the process and reads files anew."""
    config = json.loads((Path(student.removeprefix("local-dir:")) / "open_clip_config.json").read_text())["model_cfg"]
    config["vision_cfg"].pop("patch_dropout")
    path = tmp_path / f"{tmp_path.name}.json"
    path.write_text(json.dumps(config))
    return str(path)


def shown_captions(config: DistillConfig, source: Scenes) -> list[str]:
    """The caption of each image, by row, that the one batch of a run shows."""
    from kdstore.distill.batches import BatchPlan, Maker
    from kdstore.distill.pairs import pairs_of_stores
    from kdstore.models.pixels import Kept

    pairs, plan = pairs_of_stores([open_store(config.caches[0])], source), BatchPlan(40, 40, config.seed)
    texts = Maker(plan, pairs, source, (), (), None, None, Kept(0)).texts(0)  # type: ignore[arg-type]
    captions = {int(image): pairs.captions[int(i)].as_py() for image, i in zip(plan.batch(0), pairs.texts.ids[texts], strict=True)}
    return [captions[i] for i in range(40)]


def test_a_copied_text_tower_starts_as_the_teachers_and_is_trained_on(config: DistillConfig, teacher: Model, tmp_path: Path) -> None:
    distill(dataclasses.replace(config, text_tower="copied", lr=0.0, out=str(tmp_path / "start")))
    distill(dataclasses.replace(config, text_tower="copied"))
    torch.testing.assert_close(texts_of(tmp_path / "start"), encode_text(teacher, TEXTS))
    assert not torch.allclose(texts_of(tmp_path / "run"), encode_text(teacher, TEXTS), atol=1e-3)


VISION = {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
TEXT_TOWERS: dict[str, dict[str, Any]] = {
    "plain": {"text_cfg": TEXT},
    "DFN": {"text_cfg": TEXT, "quick_gelu": True},
    "MobileCLIP": {"text_cfg": {**TEXT, "no_causal_mask": True}, "custom_text": True},
    "sigmoid": {"text_cfg": {**TEXT, "no_causal_mask": True, "proj_bias": True, "pool_type": "last"}, "custom_text": True, "init_logit_bias": -10},
    "CoCa": {
        "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True},
        "vision_cfg": {**VISION, "attentional_pool": True, "output_tokens": True, "attn_pooler_heads": 2},
        "multimodal_cfg": TEXT,
        "custom_text": True,
    },
}


@pytest.mark.parametrize("custom", [False, True])
@pytest.mark.parametrize("family", TEXT_TOWERS)
def test_text_towers_of_every_family_give_the_same_embeddings_in_a_student_of_either_class(family: str, custom: bool, tmp_path: Path) -> None:
    (tmp_path / f"teacher-{family}.json").write_text(json.dumps({"embed_dim": 24, "vision_cfg": VISION, **TEXT_TOWERS[family]}))
    teacher = load_model(str(tmp_path / f"teacher-{family}.json"), untrained=True, seed=1, device="cpu")
    small = {"embed_dim": 8, "vision_cfg": VISION, "text_cfg": {**TEXT, "layers": 1, "context_length": 8}, "custom_text": custom}
    (tmp_path / f"student-{family}-{custom}.json").write_text(json.dumps(small))
    changed = config_with_text_of(teacher.config["model_cfg"])
    student = load_model(str(tmp_path / f"student-{family}-{custom}.json"), untrained=True, seed=2, device="cpu", changed=changed)
    carry_text(student, teacher)
    export_model(tmp_path, student.clip, student.config)
    torch.testing.assert_close(texts_of(tmp_path), encode_text(teacher, TEXTS))


def test_a_tokenizer_that_has_files_goes_with_the_text_tower(tmp_path: Path) -> None:
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", "a", "red", "circle"])}, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>").save_pretrained(tmp_path / "words")
    config = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": {**TEXT, "hf_tokenizer_name": str(tmp_path / "words")}, "custom_text": True}
    (tmp_path / "teacher-words.json").write_text(json.dumps(config))
    teacher = load_model(str(tmp_path / "teacher-words.json"), untrained=True, seed=1, device="cpu")
    student = load_model("scenes-T", untrained=True, device="cpu", changed=config_with_text_of(teacher.config["model_cfg"]))
    carry_text(student, teacher)
    (tmp_path / "run").mkdir()
    export_model(tmp_path / "run", student.clip, student.config, student.tokenizer)
    torch.testing.assert_close(texts_of(tmp_path / "run"), encode_text(teacher, TEXTS))


def test_the_teachers_weights_are_asked_for_at_the_end_alone_and_the_run_is_kept(config: DistillConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(config, text_tower="frozen")
    with pytest.raises(ModelError, match="needs the teacher's text tower now") as asked:
        distill(dataclasses.replace(config, teacher_weights=None))
    assert "teacher_weights=" in asked.value.hint
    assert "--resume" in asked.value.hint
    before = logged(tmp_path / "run")
    assert len(before) == 3
    result = distill(dataclasses.replace(config, resume=True))
    assert logged(tmp_path / "run") == before
    assert result.steps == 3
    assert plain(tmp_path / "run")


def test_a_frozen_text_tower_trains_alike_in_pieces_and_is_averaged(config: DistillConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(config, text_tower="frozen", student=no_dropout(config.student, tmp_path), ema=0.5)
    distill(config)
    distill(dataclasses.replace(config, micro_batch=4, grad_checkpointing=True, out=str(tmp_path / "pieces")))
    whole, pieces = ([values["loss"] for values in logged(tmp_path / name)] for name in ("run", "pieces"))
    np.testing.assert_allclose(pieces, whole, rtol=1e-4)
    torch.testing.assert_close(texts_of(tmp_path / "run" / AVERAGE), texts_of(tmp_path / "run"))


def test_of_several_teachers_the_first_gives_the_text_tower(config: DistillConfig, teacher: Model, make_store: Callable[..., Path], tmp_path: Path) -> None:
    config = dataclasses.replace(
        config, cache=(str(config.cache), str(make_store("float16", invalid=[1], logit_scale=50.0))), loss="clip + teacher-ce", samples=8
    )
    for text_tower in ("frozen", "copied"):
        distill(dataclasses.replace(config, text_tower=text_tower, lr=0.0, out=str(tmp_path / text_tower)))
        torch.testing.assert_close(texts_of(tmp_path / text_tower), encode_text(teacher, TEXTS))


@pytest.mark.parametrize("text_tower", ["frozen", "copied"])
def test_weights_of_another_teacher_are_refused(text_tower: str, config: DistillConfig, teacher: Model, tmp_path: Path) -> None:
    other = load_model("scenes-T", untrained=True, seed=8, device="cpu")
    (tmp_path / "other").mkdir()
    export_model(tmp_path / "other", other.clip, other.config)
    with pytest.raises(ModelError, match="has not the weights of the store's teacher scenes-T"):
        distill(dataclasses.replace(config, text_tower=text_tower, teacher_weights=str(tmp_path / "other")))


# First weights


def test_a_config_file_that_was_edited_is_another_run(config: DistillConfig, student: str, tmp_path: Path) -> None:
    config = dataclasses.replace(config, student=no_dropout(student, tmp_path), samples=8)
    distill(config)
    assert distill(config).already_done
    path = Path(config.student)
    path.write_text(path.read_text().replace('"layers": 2', '"layers": 1'))
    with pytest.raises(RunError, match="another run: student_config is"):
        distill(config)


def test_a_run_that_starts_from_another_run_has_its_weights_and_temperature(config: DistillConfig, tmp_path: Path) -> None:
    distill(config)
    distill(dataclasses.replace(config, init=str(tmp_path / "run"), lr=0.0, out=str(tmp_path / "next")))
    first, second = plain(tmp_path / "run").state_dict(), plain(tmp_path / "next").state_dict()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    run = read_json(tmp_path / "next" / "run.json")
    assert run["student"]["started_from"]["image"]["weights_sha256"] == weights_sha256(plain(tmp_path / "run"))


def test_a_checkpoint_file_of_the_architecture_is_a_start_too(config: DistillConfig, teacher: Model, tmp_path: Path) -> None:
    weights = {**teacher.clip.state_dict(), "logit_scale": torch.tensor(math.log(117))}  # above 100, as published SigLIP models have it
    torch.save(weights, tmp_path / "weights.pt")
    for init in (str(tmp_path / "weights.pt"), f"scenes-T:{tmp_path / 'weights.pt'}"):
        out = tmp_path / f"run-{len(init)}"
        distill(dataclasses.replace(config, student="scenes-T", init=init, lr=0.0, samples=8, out=str(out)))
        assert all(
            torch.equal(tensor, weights[name]) for name, tensor in plain(out).state_dict().items() if "running" not in name and "num_batches" not in name
        )


def test_a_smaller_student_inherits_and_trains(config: DistillConfig, student: str, tmp_path: Path) -> None:
    large = json.loads((Path(student.removeprefix("local-dir:")) / "open_clip_config.json").read_text())
    large["model_cfg"].update(embed_dim=64)
    large["model_cfg"]["vision_cfg"].update(width=64, layers=3)
    large["model_cfg"]["text_cfg"].update(width=32, heads=4, layers=2)
    (tmp_path / "large").mkdir()
    clip = open_clip.CLIP(**large["model_cfg"])
    export_model(tmp_path / "large", clip, large)
    config = dataclasses.replace(config, init=f"inherit:{tmp_path / 'large'}")
    distill(dataclasses.replace(config, lr=0.0, out=str(tmp_path / "start")))
    start = plain(tmp_path / "start")
    assert torch.equal(start.visual.transformer.resblocks[1].mlp.c_fc.weight, clip.visual.transformer.resblocks[2].mlp.c_fc.weight[:128, :32])
    assert torch.equal(start.token_embedding.weight, clip.token_embedding.weight[:, :16])
    assert np.isfinite(distill(config).losses["loss"])
    distill(dataclasses.replace(config, text_tower="frozen", lr=0.0, out=str(tmp_path / "both")))
    assert torch.equal(plain(tmp_path / "both").visual.proj, clip.visual.proj[:32])


# Refusals before the first step


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"text_tower": "shared"}, UnknownName, "value of text_tower"),
        ({"inherit_layers": "last"}, UnknownName, "value of inherit_layers"),
        ({"text_tower": "frozen", "cache": None}, ConfigError, "takes it from the teacher of a store"),
        ({"text_tower": "frozen", "projector": "always"}, ConfigError, "nothing to project to"),
        ({"init": "inherit", "cache": None, "loss": "none", "data": "scenes:40"}, ConfigError, "takes the teacher of a store"),
        ({"init": "inherit"}, ModelError, "the image tower of"),
        ({"init": "inherit:no-such-model"}, UnknownName, "no-such-model"),
        ({"init": "weights.pt"}, ConfigError, "is a folder and no architecture"),
        ({"init": "laion2b", "student": "ViT-B-32"}, UnknownName, "laion2b_e16"),
        ({"student": "small.json"}, ModelError, "Cannot read the model config small.json"),
    ],
)
def test_what_does_not_fit_ends_before_the_first_step_with_one_line(
    changes: dict[str, Any], error: type[KdstoreError], said: str, config: DistillConfig, tmp_path: Path
) -> None:
    with pytest.raises(error) as refused:
        distill(dataclasses.replace(config, **changes))
    assert said in str(refused.value)
    assert refused.value.hint
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("written", "said"), [("{", "Cannot read the model config"), ('{"embed_dim": 8}', "has no vision_cfg, text_cfg"), ("[]", "is no model config")]
)
def test_a_file_that_is_no_config_is_named(written: str, said: str, config: DistillConfig, tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text(written)
    with pytest.raises(ModelError, match=said):
        distill(dataclasses.replace(config, student=str(tmp_path / "broken.json")))


def test_a_config_file_does_not_take_the_name_of_another_model(config: DistillConfig, tmp_path: Path) -> None:
    other = open_clip.get_model_config("ViT-B-32")
    (tmp_path / "RN50.json").write_text(json.dumps(other))
    with pytest.raises(ModelError, match="another model than the RN50 that is known already"):
        distill(dataclasses.replace(config, student=str(tmp_path / "RN50.json")))


def test_weights_of_another_shape_are_named_before_the_first_step(config: DistillConfig, teacher_folder: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="The image tower of the student has class_embedding, which"):
        distill(dataclasses.replace(config, init=teacher_folder))
    assert not (tmp_path / "run").exists()
