"""Whole runs: a store equals the live teacher, resuming equals never stopping, and what is in the run folder."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdstore.data.scenes import Scenes
from kdstore.distill.config import DistillConfig
from kdstore.distill.losses import LOSSES, needs_of, parse_loss, parts_of
from kdstore.distill.optimiser import learning_rate, make_optimiser
from kdstore.distill.runfolder import Log
from kdstore.distill.train import DistillResult, distill
from kdstore.errors import ConfigError, DiskFull, Interrupted, KdstoreError, MissingFeature, RunError, SourceError, UnknownName
from kdstore.jsonfile import read_json, write_json
from kdstore.models.load import load_model
from kdstore.store import open_store

STEPS = 7


@pytest.fixture
def config(student: str, store: Path, tmp_path: Path) -> DistillConfig:
    """Seven steps of eight pairs, over one epoch of five."""
    return DistillConfig(
        cache=str(store),
        student=student,
        loss="clip-kd",
        out=str(tmp_path / "run"),
        samples=STEPS * 8,
        batch_size=8,
        lr=2e-3,
        warmup=0.3,
        log_every=1,
        device="cpu",
    )


def logged(path: Path | str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (Path(path) / "log.jsonl").read_text().splitlines()]


def losses(path: Path | str) -> list[float]:
    return [line["loss"] for line in logged(path)]


def checkpoint(path: Path | str) -> dict[str, Any]:
    return torch.load(Path(path) / "checkpoint.pt", weights_only=True)  # type: ignore[no-any-return]


def same(a: Any, b: Any) -> bool:
    """Whether two checkpoints hold the same bits."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def stop_at(step: int) -> Callable[..., None]:
    """Press Ctrl-C while this step is reported."""

    def on_progress(stage: str, done: int, total: int, note: str = "") -> None:
        if stage == "distill" and done == step:
            signal.raise_signal(signal.SIGINT)

    return on_progress


# The teacher in the store and the live teacher


OF_EMBEDDINGS = [name for name in LOSSES if "image/tokens" not in needs_of(parse_loss(name))]


@pytest.mark.parametrize("loss", [name for name in OF_EMBEDDINGS if needs_of(parse_loss(name))])
def test_distilling_from_the_store_gives_the_loss_curve_of_the_live_teacher(
    loss: str, config: DistillConfig, source: Scenes, sigmoid_store: Path, live_teacher: Callable[..., Any], tmp_path: Path
) -> None:
    bias = open_store(sigmoid_store).identity["teacher"]["logit_bias"] if "logit_bias" in needs_of(parse_loss(loss)) else None
    config = dataclasses.replace(config, loss=loss, samples=3 * 8, cache=config.cache if bias is None else str(sigmoid_store))
    distill(config)
    live = dataclasses.replace(config, cache=None, out=str(tmp_path / "live"))
    distill(live, source=source, targets=live_teacher(logit_bias=bias))
    assert len(losses(tmp_path / "run")) == 3
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(tmp_path / "live"), rtol=1e-4)


def test_a_half_precision_store_gives_the_curve_of_the_live_teacher_in_half_precision_and_nearly_that_in_full(
    config: DistillConfig, source: Scenes, live_teacher: Callable[..., Any], make_store: Callable[..., Path], tmp_path: Path
) -> None:
    distill(dataclasses.replace(config, cache=str(make_store("float16"))))
    for name, dtype, rtol in (("half", np.float16, 1e-4), ("full", np.float32, 2e-3)):
        distill(dataclasses.replace(config, cache=None, out=str(tmp_path / name)), source=source, targets=live_teacher(dtype))
        np.testing.assert_allclose(losses(tmp_path / "run"), losses(tmp_path / name), rtol=rtol)


def test_a_store_that_does_not_say_its_source_asks_for_it(config: DistillConfig, store: Path, source: Scenes, tmp_path: Path) -> None:
    shutil.copytree(store, tmp_path / "bare")
    (tmp_path / "bare" / "run.json").unlink()
    bare = dataclasses.replace(config, cache=str(tmp_path / "bare"), samples=8)
    with pytest.raises(SourceError, match="Give --data"):
        distill(bare)
    assert distill(dataclasses.replace(bare, data=source.spec)).steps == 1


def test_a_student_without_a_teacher_sees_the_same_batches(config: DistillConfig, source: Scenes, tmp_path: Path) -> None:
    distill(dataclasses.replace(config, loss="none"))
    distill(dataclasses.replace(config, loss="clip", cache=None, data=source.spec, out=str(tmp_path / "alone")))
    assert losses(tmp_path / "run") == losses(tmp_path / "alone")


# Stopping and going on


@pytest.mark.parametrize("stop", [1, 5, 6])
def test_a_stopped_and_resumed_run_is_bit_equal_to_one_that_never_stopped(stop: int, config: DistillConfig, tmp_path: Path) -> None:
    whole = distill(dataclasses.replace(config, out=str(tmp_path / "whole")))
    with pytest.raises(Interrupted, match=f"Stopped at step {stop} of {STEPS}") as stopped:
        distill(config, on_progress=stop_at(stop))
    assert "--resume" in stopped.value.hint
    result = distill(dataclasses.replace(config, resume=True, threads=1, memory_gib=0.0))

    assert logged(tmp_path / "run") == logged(tmp_path / "whole")
    assert result.losses == whole.losses
    a, b = checkpoint(tmp_path / "run"), checkpoint(tmp_path / "whole")
    for part in ("clip", "objective", "optimiser", "scaler", "average"):
        assert same(a[part], b[part]), part
    name = "open_clip_model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_killed_run_goes_on_from_its_last_checkpoint(config: DistillConfig, tmp_path: Path) -> None:
    def killed(stage: str, done: int, total: int, note: str = "") -> None:
        if done == 5:
            raise MemoryError

    config = dataclasses.replace(config, save_every=3)
    distill(dataclasses.replace(config, out=str(tmp_path / "whole")))
    with pytest.raises(MemoryError):
        distill(config, on_progress=killed)
    with open(tmp_path / "run" / "log.jsonl", "a") as log:
        log.write('{"step": 5, "lo')  # the line that was being written
    distill(dataclasses.replace(config, resume=True))
    assert logged(tmp_path / "run") == logged(tmp_path / "whole")


def test_an_unfinished_run_is_not_continued_unasked(config: DistillConfig) -> None:
    with pytest.raises(Interrupted):
        distill(config, on_progress=stop_at(2))
    with pytest.raises(RunError, match="unfinished run") as refused:
        distill(config)
    assert "--resume" in refused.value.hint


def test_a_run_that_ignores_interrupts_is_not_stopped_by_one(config: DistillConfig) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert distill(config, on_progress=stop_at(2)).steps == STEPS
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_finished_run_is_left_as_it_is_and_says_so(config: DistillConfig) -> None:
    notes: list[str] = []
    first = distill(config)
    before = {p: p.stat().st_mtime_ns for p in first.path.rglob("*")}
    again = distill(config, on_progress=lambda stage, done, total, note: notes.append(note))
    assert again == dataclasses.replace(first, already_done=True)
    assert "finished already" in notes[-1]
    assert {p: p.stat().st_mtime_ns for p in first.path.rglob("*")} == before


def test_a_run_folder_of_other_settings_is_refused_with_the_differences(config: DistillConfig, make_store: Callable[..., Path]) -> None:
    distill(config)
    with pytest.raises(RunError, match=r"another run: lr is 0.002 there and 0.001 here; seed is 0 there and 1 here\."):
        distill(dataclasses.replace(config, lr=1e-3, seed=1))
    with pytest.raises(RunError, match="stores is \\['sha256"):
        distill(dataclasses.replace(config, cache=str(make_store("float16"))))


def test_a_run_of_a_version_that_lacked_a_setting_is_told_by_it(config: DistillConfig) -> None:
    distill(config)
    kept = Path(config.out) / "config.json"
    write_json(kept, {name: value for name, value in json.loads(kept.read_text()).items() if name not in ("permute_targets", "digest")})
    with pytest.raises(RunError, match=r"another run: permute_targets is unknown there and None here\."):
        distill(config)


def test_a_store_may_move_without_changing_the_run(config: DistillConfig, store: Path, tmp_path: Path) -> None:
    distill(config)
    shutil.copytree(store, tmp_path / "moved")
    assert distill(dataclasses.replace(config, cache=str(tmp_path / "moved"))).already_done


def test_data_may_move_but_not_change_under_a_run(config: DistillConfig, source: Scenes, select: Callable[..., Any]) -> None:
    rows = list(range(len(source)))
    moved = select(rows)
    moved.spec = "/elsewhere/selected"
    distill(config, source=select(rows))
    assert distill(config, source=moved).already_done
    with pytest.raises(RunError, match=r"another run: source is 'sha256:\w+' there and 'sha256:\w+' here\."):
        distill(config, source=select(rows, captions=lambda i: source.captions(i)[:1]))
    with pytest.raises(RunError, match="source_pairs is 40 there and 39 here"):
        distill(config, source=select(rows[1:]))


def test_a_folder_that_is_no_run_is_refused_and_not_touched(config: DistillConfig) -> None:
    path = Path(config.out or "")
    path.mkdir()
    (path / "thesis.txt").write_text("mine")
    with pytest.raises(RunError, match="neither empty nor a run"):
        distill(config)
    assert [p.name for p in path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("damage", [b"", b"not a checkpoint", None])
def test_a_damaged_checkpoint_is_named(damage: bytes | None, config: DistillConfig) -> None:
    with pytest.raises(Interrupted):
        distill(config, on_progress=stop_at(2))
    path = Path(config.out or "") / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:5000] if damage is None else damage)
    with pytest.raises(RunError, match=r"checkpoint\.pt cannot be read"):
        distill(dataclasses.replace(config, resume=True))


# What is trained


@pytest.mark.parametrize("loss", OF_EMBEDDINGS)
def test_after_one_step_every_parameter_of_student_and_loss_has_changed(loss: str, config: DistillConfig, sigmoid_store: Path) -> None:
    store = sigmoid_store if "logit_bias" in needs_of(parse_loss(loss)) else config.cache
    distill(dataclasses.replace(config, loss=loss, samples=8, projector="always", cache=str(store)))
    state = checkpoint(config.out or "")
    before = load_model(config.student, untrained=True, seed=config.seed, device="cpu").clip.state_dict()
    if "bias" in parts_of(parse_loss(loss)):
        before |= {"logit_bias": torch.tensor(-10.0), "logit_scale": torch.tensor(10.0).log()}
    still = {name for name, value in state["clip"].items() if torch.equal(value, before[name])}
    if set(parse_loss(loss)) <= {"vl", "pvl", "udist"}:
        assert all(name.startswith("visual") == (name not in still) for name in before), "terms of images alone leave the texts alone"
    else:
        own_scale = set(parse_loss(loss)) <= {"icl", "icl-exp", "cross-kd", "afd", "fd", "mfd", "fd-cos", "affinity", "rkd-d", "rkd-a", "logit-std"}
        assert still == ({"logit_scale"} if own_scale else set()), "a term that brings its own scale leaves the student's alone"
    moments = state["optimiser"]["state"]
    assert len(moments) == len(before) + len(state["objective"]) - len(still), "every parameter is in the optimiser"
    assert any("projector" in name for name in state["objective"]) == ("image projector" in parts_of(parse_loss(loss)))


def test_projectors_start_from_the_seed_and_are_trained(config: DistillConfig, tmp_path: Path) -> None:
    for seed in (0, 1):
        distill(dataclasses.replace(config, samples=8, lr=0.0, seed=seed, out=str(tmp_path / f"start{seed}")))
    distill(config)
    starts = [checkpoint(tmp_path / f"start{seed}")["objective"]["heads.0.image_projector.weight"] for seed in (0, 1)]
    assert starts[0].shape == (64, 24)
    assert not torch.equal(starts[0], starts[1])
    assert not torch.equal(checkpoint(tmp_path / "run")["objective"]["heads.0.image_projector.weight"], starts[0])


def test_the_loss_falls(config: DistillConfig) -> None:
    distill(dataclasses.replace(config, samples=40 * 8, loss="clip-kd-free"))
    curve = losses(config.out or "")
    assert np.mean(curve[-5:]) < 0.8 * np.mean(curve[:5])


def test_the_logit_scale_stays_between_1_and_100(config: DistillConfig, tmp_path: Path) -> None:
    distill(dataclasses.replace(config, loss="clip", lr=2.0, grad_clip=0.0, warmup=0.0))
    scales = [math.exp(checkpoint(tmp_path / "run")["clip"]["logit_scale"].item()), *(line["logit_scale"] for line in logged(tmp_path / "run"))]
    assert all(0.999 <= scale <= 100.001 for scale in scales)
    assert min(scales) < 1.001 or max(scales) > 99.9


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_follows_full_precision(precision: str, config: DistillConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(config, loss="1e-3*clip + 1e-3*crd")  # small, so that no scaled gradient overflows in fp16
    distill(config)
    distill(dataclasses.replace(config, precision=precision, out=str(tmp_path / precision)))
    np.testing.assert_allclose(losses(tmp_path / precision), losses(tmp_path / "run"), rtol=0.03)
    assert losses(tmp_path / precision) != losses(tmp_path / "run")
    assert checkpoint(tmp_path / precision)["clip"]["visual.conv1.weight"].dtype == torch.float32


def test_a_gradient_that_overflows_in_fp16_skips_its_step_and_the_run_goes_on(config: DistillConfig) -> None:
    distill(dataclasses.replace(config, precision="fp16", loss="clip + 1e7*fd", samples=25 * 8))
    lines = logged(config.out or "")
    assert "grad_norm" not in lines[0]
    assert math.isfinite(lines[-1]["grad_norm"])
    assert lines[-1]["fd"] < lines[0]["fd"]
    assert checkpoint(config.out or "")["scaler"]["scale"] < 65536


def test_matrices_decay_and_gains_biases_and_scales_do_not(student: str) -> None:
    clip = load_model(student, untrained=True, device="cpu").clip
    decayed, others = make_optimiser(clip.parameters(), lr=1e-3, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2).param_groups
    assert decayed["weight_decay"] == 0.2
    assert others["weight_decay"] == 0.0
    names = {id(p): name for name, p in clip.named_parameters()}
    found = {names[id(p)] for p in others["params"]}
    assert "logit_scale" in found
    assert all("bias" in name or "ln_" in name or name in ("logit_scale", "visual.class_embedding") for name in found)
    assert len(decayed["params"]) + len(found) == len(names)


@given(st.integers(1, 500), st.floats(0, 0.99), st.floats(1e-6, 1))
def test_the_learning_rate_rises_to_its_peak_and_falls_towards_zero(steps: int, warmup: float, peak: float) -> None:
    first = round(warmup * steps)
    rates = [learning_rate(step, steps=steps, warmup_steps=first, peak=peak) for step in range(steps)]
    assert max(rates) == pytest.approx(peak)
    assert min(rates) >= 0
    assert all(a < b for a, b in itertools.pairwise(rates[:first]))
    assert all(a > b for a, b in itertools.pairwise(rates[first:]))


# What a run leaves behind


def test_the_run_folder_loads_in_open_clip_with_its_preprocessing(config: DistillConfig, source: Scenes, tmp_path: Path) -> None:
    distill(config)
    clip, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'run'}", require_pretrained=True)
    trained = checkpoint(tmp_path / "run")["clip"]
    assert all(torch.equal(value, trained[name]) for name, value in clip.state_dict().items())
    student = load_model(config.student, untrained=True, device="cpu")
    image = source.image(0).image
    assert torch.equal(preprocess(image), student.preprocess(image))
    loaded = load_model(str(tmp_path / "run"), device="cpu")
    assert loaded.embed_dim == 24
    assert loaded.logit_scale == pytest.approx(trained["logit_scale"].exp().item())


def test_run_json_says_where_the_student_comes_from(
    config: DistillConfig, store: Path, make_store: Callable[..., Path], source: Scenes, tmp_path: Path
) -> None:
    result = distill(config)
    run = read_json(tmp_path / "run" / "run.json")
    assert run["stores"][0]["digests"] == [open_store(store).digest]
    assert run["stores"][0]["identity"]["teacher"]["name"] == "scenes-T"
    assert run["settings"]["seed"] == 0
    assert run["settings"]["precision"] == "fp32"
    assert run["settings"]["source"] == open_store(store).fingerprint
    assert run["source"] == source.spec
    assert run["loss"]["terms"] == {"clip": 1.0, "crd": 1.0, "icl": 1.0, "fd": 2000.0}
    (taught,) = run["loss"]["teachers"]
    assert taught["weight_on_one_minus_cos"] == 4000 / 64
    assert taught["projector"] == [24, 64]
    assert taught["softmax_scale"] == taught["logit_scale"]
    assert run["pairs"] == {"used": 40, "left_out": {}, "lacking": {}, "dropped_per_epoch": 0, "epochs": 7 / 5}
    assert run["result"]["samples_per_second"] > 0
    assert 0 <= run["result"]["waiting"] <= 1
    assert run["versions"]["torch"]
    assert isinstance(result, DistillResult)
    assert result.samples == 56
    assert set(result.losses) == {"loss", "clip", "crd", "icl", "fd", "grad_norm", "logit_scale"}
    damaged = make_store(invalid=[1, 2, 3])
    distill(dataclasses.replace(config, cache=str(damaged), out=str(tmp_path / "fewer"), samples=None, epochs=1))
    fewer = read_json(tmp_path / "fewer" / "run.json")
    assert fewer["pairs"] == {"used": 37, "left_out": {"not valid in the store": 3}, "lacking": {}, "dropped_per_epoch": 5, "epochs": 1.0}
    assert fewer["result"]["steps"] == 4


def test_a_run_that_cannot_use_all_pairs_warns_and_counts_them(config: DistillConfig, make_store: Callable[..., Path]) -> None:
    warnings: list[str] = []
    config = dataclasses.replace(config, cache=str(make_store(invalid=[1, 2])), samples=8)
    for source in (Scenes("train", 45), Scenes("train", 40)):
        result = distill(
            dataclasses.replace(config, out=f"{config.out}-{len(source)}"),
            source=source,
            on_progress=lambda stage, done, total, note: warnings.append(note) if stage == "warning" else None,
        )
        assert result.pairs == 38
    assert warnings == ["trains on 38 pairs; left out: 5 not in the store, 2 not valid in the store"]
    assert result.left_out == {"not valid in the store": 2}


def test_a_log_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    log = Log(tmp_path, 0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(DiskFull, match=r"log\.jsonl"):
            log.write("log.jsonl", {"step": 1, **dict.fromkeys(map(str, range(20)), 0.5)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    log.close()


def test_both_logs_hold_the_same_numbers(config: DistillConfig, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    distill(dataclasses.replace(config, log_every=3))
    assert [line["step"] for line in logged(tmp_path / "run")] == [3, 6, 7]
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    assert [(e.step, e.value) for e in board.Scalars("crd")] == [(line["step"], line["crd"]) for line in logged(tmp_path / "run")]


def test_training_leaves_the_random_numbers_of_the_caller_alone(config: DistillConfig) -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    distill(dataclasses.replace(config, samples=8))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_default_folder_is_named_after_student_loss_teacher_and_seed() -> None:
    assert str(DistillConfig(cache="store/bigG").run_path) == "runs/ViT-T-16_clip-kd_bigG_seed0"
    assert str(DistillConfig(loss="clip + 2*crd", student="local-dir:x/y", seed=4).run_path) == "runs/local-dir-x-y_clip+2-crd_no-teacher_seed4"


# Refusals before the first step


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"cache": None}, ConfigError, "needs a teacher's image/embedding, text/embedding, logit_scale"),
        ({"cache": None, "loss": "none"}, ConfigError, "where the images are"),
        ({"loss": "clip-kdd"}, UnknownName, "Did you mean clip-kd"),
        ({"loss": "clip +"}, ConfigError, "no sum of weighted names"),
        ({"student": "ViT-T-61"}, UnknownName, "ViT-T-16"),
        ({"batch_size": 41, "samples": 41}, ConfigError, "only 40 can be trained on"),
        ({"device": "cuda:99"}, ConfigError, "cuda:99"),
    ],
)
def test_a_wrong_setting_is_one_clear_error_and_nothing_is_written(
    changes: dict[str, Any], error: type[KdstoreError], said: str, config: DistillConfig
) -> None:
    with pytest.raises(error) as refused:
        distill(dataclasses.replace(config, **changes))
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not Path(config.out or "").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"projector": "never"}, "Unknown value of projector"),
        ({"precision": "fp8"}, "Unknown value of precision"),
        ({"samples": 512, "epochs": 2}, "Give one of them"),
        ({"samples": 100}, "less than one batch of 256"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"warmup": 1.0}, "warmup must be at least 0 and below 1"),
        ({"lr": math.nan}, "lr must be"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_a_value_out_of_its_range_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        DistillConfig(**settings)


def test_a_loss_that_needs_more_than_the_store_holds_is_refused_before_anything_is_written(config: DistillConfig, make_store: Callable[..., Path]) -> None:
    images_only = str(make_store(sides=("image",)))
    with pytest.raises(MissingFeature, match="holds no text/embedding"):
        distill(dataclasses.replace(config, cache=images_only))
    assert not Path(config.out or "").exists()
    assert distill(dataclasses.replace(config, cache=images_only, loss="none")).steps == STEPS
