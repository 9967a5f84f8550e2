"""Runs with several stores, child stores, tokens, two kinds of captions and students that a loss asks something of."""

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

from kdstore.data.scenes import Scenes
from kdstore.data.source import Caption, Source
from kdstore.distill.batches import BatchPlan, Maker
from kdstore.distill.config import DistillConfig
from kdstore.distill.pairs import pairs_of_source, pairs_of_stores
from kdstore.distill.targets import StoreTargets, check_views, open_stores, views_to_show
from kdstore.distill.train import distill
from kdstore.errors import ConfigError, IdentityMismatch, JoinError, MissingFeature
from kdstore.extract.config import ExtractConfig
from kdstore.extract.run import extract
from kdstore.jsonfile import read_json
from kdstore.models.pixels import Kept
from kdstore.store import Store, open_store

EMBEDDINGS = ("image/embedding", "text/embedding")


@pytest.fixture
def config(student: str, store: Path, tmp_path: Path) -> DistillConfig:
    """Three steps of eight pairs."""
    return DistillConfig(cache=str(store), student=student, out=str(tmp_path / "run"), samples=24, batch_size=8, log_every=1, device="cpu")


def logged(path: Path | str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (Path(path) / "log.jsonl").read_text().splitlines()]


def maker(stores: list[Store], source: Source, **options: Any) -> Maker:
    pairs = pairs_of_stores(stores, source, **options)
    targets = tuple(StoreTargets(store, EMBEDDINGS) for store in stores)
    return Maker(BatchPlan(len(pairs), 8, 3), pairs, source, targets, EMBEDDINGS, None, None, Kept(0))  # type: ignore[arg-type]


# Joining stores


def test_every_teachers_rows_are_those_of_the_image_and_caption_and_missing_ones_are_told(store: Path, part: Path, source: Scenes) -> None:
    stores = [open_store(store), open_store(part)]
    make = maker(stores, source)
    assert len(make.pairs) == 40
    assert [make.pairs.lacking(k) for k in range(2)] == [{}, {"images": 10}]
    captions = [opened.captions() for opened in stores]
    seen = 0
    for step in range(5):
        first, second = make.teachers(step)
        assert first.valid_B is None
        assert second.valid_B is not None
        for i, (pair, text) in enumerate(zip(make.plan.batch(step), make.texts(step), strict=True)):
            row = int(make.pairs.source_rows[pair])
            assert bool(second.valid_B[i]) == (row >= 10)
            for opened, rows, theirs, k in zip(stores, (first, second), captions, range(2), strict=True):
                if k == 1 and row < 10:
                    assert (rows.image_BD[i] == 0).all()  # type: ignore[index]
                    continue
                at = int(np.flatnonzero(opened.keys() == source.key(row))[0])
                np.testing.assert_array_equal(rows.image_BD[i], opened.gather("image/embedding", [at])[0])  # type: ignore[index]
                caption = make.pairs.captions[int(make.pairs.texts.ids[text])].as_py()
                its = [t for t in range(opened.offsets[at], opened.offsets[at + 1]) if theirs[t] == caption]
                np.testing.assert_array_equal(rows.text_BD[i], opened.gather("text/embedding", [its[0]])[0])  # type: ignore[index]
                seen += 1
    assert seen > 60


def test_the_order_of_the_first_store_stays_and_rows_that_only_others_have_come_behind(store: Path, part: Path, source: Scenes) -> None:
    one, both = (pairs_of_stores([open_store(p) for p in paths], source) for paths in ([store], [store, part]))
    assert both.source_rows.tolist() == one.source_rows.tolist()
    for a, b in ((one.texts.ids, both.texts.ids), (one.texts.rows[0], both.texts.rows[0]), (one.texts.offsets, both.texts.offsets)):
        np.testing.assert_array_equal(a, b)
    assert pairs_of_stores([open_store(part), open_store(store)], source).source_rows.tolist() == [*range(10, 40), *range(10)]


def test_a_loss_of_all_teachers_at_once_leaves_out_what_one_of_them_lacks(config: DistillConfig, store: Path, part: Path) -> None:
    notes: list[str] = []
    both = dataclasses.replace(config, cache=(str(store), str(part)), loss="clip + crd")
    assert distill(both, on_progress=lambda stage, *said: notes.append(said[2]) if stage == "warning" else None).pairs == 40
    assert read_json(Path(config.out or "") / "run.json")["pairs"]["lacking"] == {str(part): {"images": 10}}
    assert notes == [f"{part} lacks 10 of 40 images; they are no rows of this teacher's terms"]
    whole = distill(dataclasses.replace(both, loss="reinforced", out=config.out + "-whole"))  # type: ignore[operator]
    assert (whole.pairs, whole.left_out) == (30, {"not in every store": 10})


def test_stores_of_other_data_are_refused(config: DistillConfig, store: Path, tmp_path: Path, source: Scenes) -> None:
    extract(ExtractConfig(teacher="scenes-S", data="scenes/test:8", out=str(tmp_path / "s"), device="cpu"))
    with pytest.raises(JoinError, match="No key of"):
        distill(dataclasses.replace(config, cache=(str(store), str(tmp_path / "s"))))
    with pytest.raises(ConfigError, match="given twice"):
        distill(dataclasses.replace(config, cache=(str(store), str(store))))


def test_stores_with_other_views_are_refused_and_their_plain_views_are_not(store: Path, source: Scenes, tmp_path: Path) -> None:
    said: dict[str, Any] = {"teacher": "scenes-S", "data": source.spec, "device": "cpu", "views": 1}
    for name, seed in (("a", 0), ("b", 1)):
        extract(ExtractConfig(out=str(tmp_path / name), view_seed=seed, **said))
    a, b, plain = open_store(tmp_path / "a"), open_store(tmp_path / "b"), open_store(store)
    for stores in ([a, b], [a, plain]):
        with pytest.raises(IdentityMismatch, match="other views than each other"):
            views_to_show("auto", stores, EMBEDDINGS)
        assert views_to_show("plain", stores, EMBEDDINGS) == ()
    assert len(views_to_show("auto", [a, a], EMBEDDINGS)) == 2


def test_views_that_were_drawn_for_other_keys_are_refused_before_the_first_step(
    config: DistillConfig, source: Scenes, select: Callable[..., Source], tmp_path: Path
) -> None:
    said: dict[str, Any] = {"teacher": "scenes-S", "device": "cpu", "views": 1}
    renamed = dataclasses.replace(select(list(range(len(source)))), prefix="again/")  # type: ignore[type-var]
    extract(ExtractConfig(data=source.spec, out=str(tmp_path / "a"), **said))
    extract(ExtractConfig(data=source.spec, out=str(tmp_path / "b"), untrained_seed=1, **said), source=renamed)
    both = dataclasses.replace(config, cache=(str(tmp_path / "a"), str(tmp_path / "b")), join="content", loss="fd", samples=8)
    with pytest.raises(IdentityMismatch, match="other views of the same images"):
        distill(both, source=source)
    assert not Path(config.out or "").exists()
    assert distill(dataclasses.replace(both, views="plain"), source=source).pairs == 40
    a = open_store(tmp_path / "a")
    check_views(views_to_show("auto", [a, a], EMBEDDINGS), pairs_of_stores([a, a], source))


def test_captions_that_a_teacher_lacks_are_counted_and_hide_nothing_from_a_loss_of_images(
    config: DistillConfig, store: Path, source: Scenes, select: Callable[..., Source], tmp_path: Path
) -> None:
    """The second store knows the last caption of five images under another text."""

    def reworded(i: int) -> tuple[Caption, ...]:
        *others, last = source.captions(i)
        return (*others, dataclasses.replace(last, text=f"another text {i}")) if i < 5 else (*others, last)

    there = select(list(range(len(source))), captions=reworded)
    extract(ExtractConfig(teacher="scenes-S", data=source.spec, out=str(tmp_path / "s"), device="cpu"), source=there)
    both = dataclasses.replace(config, cache=(str(store), str(tmp_path / "s")))
    for loss, warned in (("clip + crd", 2), ("clip + pvl", 0)):
        notes: list[str] = []
        distill(
            dataclasses.replace(both, loss=loss, out=str(tmp_path / loss)),
            source=source,
            on_progress=lambda *said, to=notes: to.append(f"{said[0]}: {said[-1]}"),
        )
        assert sum(note.startswith("warning") and "lacks 5 of" in note and "captions; they are no rows" in note for note in notes) == warned
    opened = [open_store(path) for path in (store, tmp_path / "s")]
    make = maker(opened, source)
    assert [make.pairs.lacking(k) for k in range(2)] == [{"captions": 5}] * 2
    images = dataclasses.replace(make, needs=("image/embedding",))
    assert all(rows.valid_B is None and rows.image_BD is not None and rows.image_BD.any(dim=1).all() for step in range(5) for rows in images.teachers(step))
    assert any(not rows.valid_B.all() for step in range(5) for rows in make.teachers(step))  # type: ignore[union-attr]
    assert len(pairs_of_stores(opened, source, whole=("image",)).texts.ids) > len(pairs_of_stores(opened, source, whole=("image", "text")).texts.ids)


def test_teachers_stand_in_the_order_in_which_their_stores_are_given(store: Path, other: Path, part: Path) -> None:
    child = other.with_name("tokens")
    for paths in ([child, store], [child, store, other], [other, store, child]):
        assert [opened.path for opened in open_stores([str(path) for path in paths])] == [other, store]
    assert [opened.path for opened in open_stores([str(store), str(child)])] == [store, other]
    with pytest.raises(ConfigError, match="features of one teacher") as refused:
        open_stores([str(store), str(other), str(part)])
    assert "kdstore store concat" in refused.value.hint


# Two kinds of captions


def test_a_pair_shows_a_caption_of_each_kind_where_there_are_both(select: Callable[..., Source]) -> None:
    captions = [(Caption(f"real {i}"), Caption(f"made {i}", "synthetic"), Caption(f"made again {i}", "synthetic")) for i in range(10)]
    captions[4] = (Caption("real alone"),)
    mixed = select(list(range(10)), captions=lambda i: captions[i])
    pairs = pairs_of_source(mixed, both_kinds=True)
    assert pairs.left_out == {"without a caption of each kind": 1}
    make = Maker(BatchPlan(len(pairs), 3, 0), pairs, mixed, (), (), None, None, Kept(0))  # type: ignore[arg-type]
    assert pairs.synthetic is not None
    for step in range(9):
        for pair, real, made in zip(make.plan.batch(step), make.texts(step), make.synthetic_texts(step), strict=True):
            row = int(pairs.source_rows[pair])
            assert pairs.captions[int(pairs.texts.ids[real])].as_py() == f"real {row}"
            assert pairs.captions[int(pairs.synthetic.ids[made])].as_py() in (f"made {row}", f"made again {row}")
    assert pairs_of_source(mixed).synthetic is None
    assert len(pairs_of_source(mixed)) == 10


def test_a_run_with_captions_of_each_kind_goes_through_and_one_without_says_so(
    config: DistillConfig, source: Scenes, select: Callable[..., Source], live_teacher: Callable[..., Any], tmp_path: Path
) -> None:
    def kinds(i: int) -> tuple[Caption, ...]:
        first, *others = source.captions(i)
        return (dataclasses.replace(first, kind="human"), *others)

    mixed = select(list(range(len(source))), captions=kinds)
    live = dataclasses.replace(config, cache=None, loss="mobileclip-b")
    notes: list[str] = []
    distill(live, source=mixed, targets=live_teacher(), on_progress=lambda stage, *said: notes.append(said[2]) if stage == "warning" else None)
    both = logged(config.out or "")
    assert notes == []
    distill(dataclasses.replace(config, loss="mobileclip-b", out=str(tmp_path / "one")), on_progress=lambda stage, *said: notes.append(str(said[2])))
    assert any("all captions are of one kind" in note for note in notes)
    assert both[0]["clip-both"] > 1.5 * logged(tmp_path / "one")[0]["clip-both"], "a sum over two captions"


# Temperatures, biases, weights


def test_a_matched_temperature_is_recorded_and_one_for_each_teacher(config: DistillConfig, store: Path, other: Path) -> None:
    run = distill(dataclasses.replace(config, cache=(str(store), str(other)), loss="clip + crd", teacher_temperature="entropy:1.0")).path
    first, second = read_json(run / "run.json")["loss"]["teachers"]
    assert first["softmax_scale"] != second["softmax_scale"]
    assert all(0 < taught["softmax_scale"] < 1e6 and taught["softmax_scale"] != taught["logit_scale"] for taught in (first, second))
    assert [taught["name"] for taught in (first, second)] == ["scenes-T", "s"]


def test_weights_of_teachers_change_the_loss_as_they_say(config: DistillConfig, store: Path, other: Path, tmp_path: Path) -> None:
    both = dataclasses.replace(config, cache=(str(store), str(other)), loss="fd-cos", samples=8)
    curves = {}
    for weights in ((1.0, 1e-9), (1e-9, 1.0), (2.0, 3.0)):
        run = dataclasses.replace(both, cache_weights=weights, out=str(tmp_path / str(weights)))
        curves[weights] = logged(distill(run).path)[0]["loss"]
    assert curves[2.0, 3.0] == pytest.approx(2 * curves[1.0, 1e-9] + 3 * curves[1e-9, 1.0], rel=1e-5)


def test_a_sigmoid_student_is_exported_with_its_bias(config: DistillConfig) -> None:
    run = distill(dataclasses.replace(config, loss="siglip")).path
    clip = open_clip.create_model(f"local-dir:{run}")
    trained = torch.load(run / "checkpoint.pt", weights_only=True)["clip"]
    assert clip.logit_bias.item() == trained["logit_bias"].item() != -10
    assert clip.logit_scale.item() == trained["logit_scale"].item() != math.log(10)


# Tokens


@pytest.mark.parametrize("loss", ["theia", "unic"])
@pytest.mark.parametrize("standard", ["channel", "phi-s"])
def test_tokens_of_a_child_store_teach_a_student_of_another_grid_and_width(loss: str, standard: str, config: DistillConfig, other: Path, gridded: str) -> None:
    """The student has 4 x 4 tokens of width 32, the teacher 8 x 8 of another."""
    config = dataclasses.replace(config, cache=str(other.with_name("tokens")), student=gridded, loss=f"clip + {loss}", token_standard=standard, samples=30 * 8)
    run = distill(dataclasses.replace(config, lr=2e-3)).path
    curve = [line[loss] for line in logged(run)]
    assert all(map(math.isfinite, curve))
    assert np.mean(curve[-5:]) < 0.97 * np.mean(curve[:5]), "in 30 steps"
    objective = torch.load(run / "checkpoint.pt", weights_only=True)["objective"]
    assert objective["heads.0.token_projector.weight"].shape[1] == 32
    assert objective["heads.0.token_standard.factor"].ndim == (1 if standard == "channel" else 2)
    assert len(read_json(run / "run.json")["stores"][0]["digests"]) == 2, "parent and child"


def test_a_child_is_found_beside_its_parent_or_given_with_it_and_is_nothing_alone(other: Path, tmp_path: Path) -> None:
    child = other.with_name("tokens")
    alone, given = open_stores([str(child)]), open_stores([str(other), str(child)])
    assert len(alone) == len(given) == 1
    assert alone[0].digests == given[0].digests
    assert alone[0].digest == open_store(other).digest
    (tmp_path / "lost").symlink_to(child, target_is_directory=True)
    with pytest.raises(IdentityMismatch, match="neither given nor beside it"):
        open_stores([str(tmp_path / "lost")])


def test_tokens_without_statistics_name_the_command_and_a_store_without_tokens_is_refused(config: DistillConfig, other: Path, gridded: str) -> None:
    stats = other.with_name("tokens") / "stats.json"
    kept = stats.read_bytes()
    stats.unlink()
    config = dataclasses.replace(config, cache=str(other.with_name("tokens")), student=gridded, loss="theia")
    try:
        with pytest.raises(MissingFeature, match="has no statistics") as refused:
            distill(config)
        assert f"kdstore store stats {stats.parent}" in refused.value.hint
        assert distill(dataclasses.replace(config, token_standard="phi-s", samples=8)).steps == 1
    finally:
        stats.write_bytes(kept)
    with pytest.raises(MissingFeature, match="holds no image/tokens"):
        distill(dataclasses.replace(config, cache=str(other)))


# What a loss asks of the student


def test_masked_patches_are_75_percent_of_a_vision_transformers_and_others_are_refused(config: DistillConfig, gridded: str, tmp_path: Path) -> None:
    distill(dataclasses.replace(config, loss="2000*mfd", student=gridded))
    distill(dataclasses.replace(config, loss="2000*fd", student=gridded, out=str(tmp_path / "fd")))
    assert [line["mfd"] for line in logged(config.out or "")] != [line["fd"] for line in logged(tmp_path / "fd")]
    with pytest.raises(ConfigError, match="mfd hides patches of open_clip's vision transformers; RN50 has a ModifiedResNet"):
        distill(dataclasses.replace(config, loss="mfd", student="RN50", out=str(tmp_path / "rn")))
    assert not (tmp_path / "rn").exists()


def test_tokens_of_a_student_that_drops_patches_are_refused(config: DistillConfig, other: Path, gridded: str) -> None:
    tokens = str(other.with_name("tokens"))
    for student, loss in ((config.student, "theia"), (gridded, "theia + mfd")):
        with pytest.raises(ConfigError, match="drops patches in training"):
            distill(dataclasses.replace(config, cache=tokens, student=student, loss=loss))
