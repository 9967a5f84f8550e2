"""The demo: extract every teacher, distil the same student from each and from none, score them all alike, and show it.

Each stage keeps what it finished, so an interrupted demo goes on where it stopped and a second run only draws the report again.
"""

from __future__ import annotations

import contextlib
import functools
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t

import kdstore
from kdstore.config import as_dict, config_digest
from kdstore.demo.config import DemoConfig
from kdstore.demo.report import write_report
from kdstore.distill.config import DistillConfig
from kdstore.distill.train import distill
from kdstore.errors import EvaluationError, RunError
from kdstore.evaluate.datasets import open_vqa
from kdstore.evaluate.protocol import RetrievalConfig, VqaConfig
from kdstore.evaluate.results import read_result
from kdstore.evaluate.retrieval import evaluate_retrieval
from kdstore.evaluate.vqa import evaluate_vqa
from kdstore.extract.config import ExtractConfig
from kdstore.extract.run import extract
from kdstore.jsonfile import digest_of, read_json, write_json
from kdstore.progress import OnProgress, silent
from kdstore.store import open_store

ALONE = "no teacher"
RECALLS = ("image_retrieval_recall@1", "image_retrieval_recall@5", "text_retrieval_recall@1", "text_retrieval_recall@5")


@dataclass(frozen=True)
class DemoResult:
    """Where the report is, and what stands in it."""

    report: Path
    content: dict[str, Any]


@dataclass(frozen=True)
class _Evaluated:
    """One line of the table before seeds are put together; `group` names the line that it is a seed of."""

    group: str
    kind: str  # student, teacher, or control
    seed: int
    parameters: dict[str, int] | None
    scores: dict[str, float]


@dataclass(frozen=True)
class Scored:
    """A model to score: what load_model takes, the name of its results, and the digest of its run or of its identity."""

    name: str
    place: str
    digest: str


def run_demo(config: DemoConfig, *, on_progress: OnProgress = silent) -> DemoResult:
    """Run or continue the whole demo in `config.out`; writes demo.json and report.html there."""
    started = time.perf_counter()
    out = Path(config.out)
    data = f"scenes/train:{config.images}"
    timings: dict[str, float] = {}
    stores: dict[str, str] = {}
    for name in config.teachers:
        wanted = ExtractConfig(teacher=name, data=data, out=(path := str(store_path(config, name))), device=config.device)
        with _timed(timings, "extract"):
            extract(wanted, on_progress=_under(on_progress, f"extract {name}"))
        stores[name] = open_store(path).digest
    lines: list[_Evaluated] = []
    curves: dict[str, list[dict[str, float]]] = {}
    for seed in config.seeds:
        for teacher in (None, *config.teachers):
            with _timed(timings, "distill"):
                run = distill(_distill_config(config, teacher, seed, data), on_progress=_under(on_progress, f"distil from {teacher or ALONE}, seed {seed}"))
            group = f"student, {f'from {teacher}' if teacher else ALONE}"
            curves.setdefault(group, read_curve(run.path))
            with _timed(timings, "evaluate"):
                model = Scored(str(run.path), run.path.name, read_json(run.path / "run.json", RunError)["digest"])
                lines += _evaluate(config, model, group, "student", seed, on_progress, controls=teacher is None)
    for name in config.teachers:
        with _timed(timings, "evaluate"):
            model = Scored(name, place_of(name), open_store(store_path(config, name)).identity["teacher"]["digest"])
            lines += _evaluate(config, model, f"teacher {name}", "teacher", config.seeds[0], on_progress, controls=False)
    content = {
        "stage": "demo",
        "config": as_dict(config),
        "config_digest": config_digest(config, leave_out=("out", "device")),
        "stores": stores,
        "table": _put_together(lines),
        "differences": _paired_differences(lines, config),
        "chance": _chance(out, config.seeds[0]),
        "curves": curves,
        "seconds": {**{k: round(v, 1) for k, v in timings.items()}, "all": round(time.perf_counter() - started, 1)},
    }
    write_json(out / "demo.json", content)
    return DemoResult(write_report(out / "report.html", content), content)


def place_of(model: str) -> str:
    """Name the files of a model: by its name, or for a path by the last part and a hash of the whole, so that no two models share a place."""
    plain = "".join(c if c.isalnum() or c in "._-+" else "-" for c in Path(model).name)
    return plain if plain == model else f"{plain}-{digest_of(model).removeprefix('sha256:')[:8]}"


def store_path(config: DemoConfig, teacher: str) -> Path:
    """Where the features of a teacher lie."""
    return Path(config.out) / "store" / place_of(teacher)


def read_curve(run: Path) -> list[dict[str, float]]:
    """Read (samples, loss) of a run's log: the contrast of images and captions where the loss has it, which runs of different losses share."""
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{"samples": row["samples"], "loss": round(row.get("clip", row["loss"]), 4)} for row in rows]


def _distill_config(config: DemoConfig, teacher: str | None, seed: int, data: str) -> DistillConfig:
    return DistillConfig(
        cache=str(store_path(config, teacher)) if teacher else None,
        data=data,
        student=config.student,
        loss=config.loss if teacher else "none",
        out=str(Path(config.out) / "runs" / f"{place_of(teacher) if teacher else 'none'}-seed{seed}"),
        resume=True,
        samples=config.samples,
        batch_size=config.batch_size,
        lr=config.learning_rate,
        seed=seed,
        projector="always",
        device=config.device,
    )


def _evaluate(config: DemoConfig, model: Scored, group: str, kind: str, seed: int, on_progress: OnProgress, *, controls: bool) -> Iterator[_Evaluated]:
    """Score one model in retrieval and VQA; with `controls`, also what the same head makes of no image and of an untrained student."""
    place, results = model.place, Path(config.out) / "results"
    retrieval_config = RetrievalConfig(
        model=model.name, data=f"scenes/retrieval:{config.retrieval_images}", device=config.device, out=str(results / f"{place}-retrieval.json")
    )
    vqa_config = VqaConfig(
        model=model.name,
        train_images=config.vqa_train_images,
        eval_images=config.vqa_test_images,
        epochs=config.vqa_epochs,
        controls=controls,
        seeds=(seed,),
        device=config.device,
        out=str(results / f"{place}-vqa.json"),
    )
    retrieval = kept_result(retrieval_config, model) or evaluate_retrieval(retrieval_config, on_progress=_under(on_progress, f"retrieval {place}")).content
    vqa = kept_result(vqa_config, model) or evaluate_vqa(vqa_config, on_progress=_under(on_progress, f"vqa {place}")).content
    recall = {key: retrieval["rows"][0]["scores"][key] for key in RECALLS}
    for row in vqa["rows"]:
        scores = {f"vqa {name}": score for name, score in row["scores"].items()}
        if row["row"] == "model":
            yield _Evaluated(group, kind, seed, vqa["model"]["parameters"], {**recall, **scores})
        else:
            yield _Evaluated(row["row"].replace("untrained", "untrained student"), "control", seed, None, scores)


def kept_result(config: RetrievalConfig | VqaConfig, model: Scored) -> dict[str, Any] | None:
    """Return the result of an earlier demo if it is whole, and of these settings, this version, the questions of now and the weights that `model` names."""
    assert config.out is not None
    try:
        found = read_result(config.out)
    except EvaluationError:
        return None
    of = (found["model"]["identity"]["teacher"]["digest"], (found["model"]["run"] or {}).get("digest"))
    same = model.digest in of and found["made"]["versions"]["kdstore"] == kdstore.__version__ and found["config"] == as_dict(config)
    if same and isinstance(config, VqaConfig):
        asked = (config.train_split, config.train_images), (config.eval_split, config.eval_images)
        same = [found["data"][part]["digest"] for part in ("train", "evaluated")] == [_questions_digest(*split) for split in asked]
    return found if same else None


@functools.lru_cache
def _questions_digest(split: str, num_images: int) -> str:
    return open_vqa("scenes", split, num_images=num_images).digest


def _put_together(lines: list[_Evaluated]) -> list[dict[str, Any]]:
    """Average the seeds of every group; `spread` is the half-width of the 95 % t interval where there are several."""
    table = []
    for group in dict.fromkeys(line.group for line in lines):
        of_group = [line for line in lines if line.group == group]
        scores = {name: [line.scores[name] for line in of_group] for name in of_group[0].scores}
        table.append(
            {
                "group": group,
                "kind": of_group[0].kind,
                "seeds": [line.seed for line in of_group],
                "parameters": of_group[0].parameters,
                "scores": {name: round(float(np.mean(values)), 2) for name, values in scores.items()},
                "spread": {name: round(half_width(values), 2) for name, values in scores.items()} if len(of_group) > 1 else {},
            }
        )
    return sorted(table, key=lambda line: ("student", "teacher", "control").index(line["kind"]))


def _paired_differences(lines: list[_Evaluated], config: DemoConfig) -> list[dict[str, Any]]:
    """What each teacher adds to the student without one, seed by seed (equal initialisation and batch order)."""
    alone = {line.seed: line.scores for line in lines if line.group == f"student, {ALONE}"}
    found = []
    for teacher in config.teachers:
        taught = {line.seed: line.scores for line in lines if line.group == f"student, from {teacher}"}
        for score in ("image_retrieval_recall@1", "text_retrieval_recall@1", "vqa overall"):
            gains = [taught[seed][score] - alone[seed][score] for seed in config.seeds]
            spread = round(half_width(gains), 2) if len(gains) > 1 else None
            found.append({"teacher": teacher, "score": score, "gain": round(float(np.mean(gains)), 2), "spread": spread, "gains": [round(g, 2) for g in gains]})
    return found


def half_width(values: list[float]) -> float:
    """Half the width of the 95 % t interval of a mean."""
    return float(t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5)


def _chance(out: Path, seed: int) -> dict[str, float]:
    chance: dict[str, float] = read_result(out / "results" / f"none-seed{seed}-vqa.json")["chance"]
    return chance


@contextlib.contextmanager
def _timed(timings: dict[str, float], stage: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    timings[stage] = timings.get(stage, 0.0) + time.perf_counter() - started


def _under(on_progress: OnProgress, what: str) -> OnProgress:
    """Report a stage's steps as one line named `what`; short steps (loading, planning) are left out."""

    def report(stage: str, done: int, total: int, note: str = "") -> None:
        if stage in ("warning", "notice"):
            on_progress(stage, done, total, f"{what}: {note}")
        elif total > 1:
            on_progress(f"{what}: {stage}", done, total, note)

    return report
