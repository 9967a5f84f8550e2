"""Do stronger teachers make better students? One student, three teachers, two forms of one loss, two lengths, paired seeds; on the built-in scenes.

    python scripts/inversion_scenes.py --recipe recipes/inversion-scenes.toml [--set samples=[8000]] [--report] [--json]

The third teacher has the student's own size: a student that was trained alone, whose store is extracted from its run folder. It tells what softer labels do
from what strength does. A projector is always there, so that no teacher has one for its width alone. Seeds are paired: equal first weights, batches and
captions for every teacher. What is finished is not computed again, and seeds come one after the other, so that half a run has a table too.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kdstore.config import make_config, parse_set, read_recipe
from kdstore.demo.run import Scored, half_width, kept_result, place_of
from kdstore.distill.config import DistillConfig
from kdstore.distill.train import distill
from kdstore.errors import ConfigError, KdstoreError, RunError
from kdstore.evaluate.protocol import RetrievalConfig
from kdstore.evaluate.retrieval import evaluate_retrieval
from kdstore.extract.config import ExtractConfig
from kdstore.extract.run import extract
from kdstore.jsonfile import read_json

ALONE, OWN = "no teacher", "own size"
UNIT_ROWS = 1024  # what an interrupted extraction does again at most
RECALLS = {"T→I": "image_retrieval_recall@1", "I→T": "text_retrieval_recall@1"}

Scores = dict[str, float]  # direction -> recall@1 in percent


@dataclass(frozen=True, kw_only=True)
class InversionConfig:
    """The grid; `teachers` ascend in strength, and the one of the student's own size joins them."""

    out: str = "inversion"
    teachers: tuple[str, ...] = ("scenes-S", "scenes-L")
    losses: tuple[str, ...] = ("clip-kd", "clip-kd-free")
    samples: tuple[int, ...] = (8_000, 16_000)
    seeds: tuple[int, ...] = (0, 1, 2)
    student: str = "scenes-T"
    images: int = 10_000
    batch_size: int = 64
    lr: float = 2e-3
    own_samples: int = 48_000  # that the teacher of the student's own size saw
    own_seed: int = 1_000
    retrieval_images: int = 1_000
    device: str = "auto"

    def __post_init__(self) -> None:
        if not (self.teachers and self.losses and self.samples and self.seeds):
            raise ConfigError("The grid is empty.", "Give at least one of teachers, losses, samples and seeds.")
        if self.own_seed in self.seeds:
            raise ConfigError(f"own_seed {self.own_seed} is a student's seed, too: they would begin with equal weights.", "Choose another own_seed.")


@dataclass(frozen=True)
class Cell:
    """One student: `loss` is "none" without a teacher."""

    teacher: str
    loss: str
    samples: int
    seed: int


def cells(config: InversionConfig) -> list[Cell]:
    """Return all students in the order in which they are trained."""
    arms = [(ALONE, "none"), *((teacher, loss) for loss in config.losses for teacher in (*config.teachers, OWN))]
    return [Cell(teacher, loss, samples, seed) for seed in config.seeds for samples in config.samples for teacher, loss in arms]


def run_of(config: InversionConfig, cell: Cell) -> DistillConfig:
    """Return the settings of a student."""
    name = f"{place_of(cell.teacher)}_{place_of(cell.loss)}_{cell.samples}_seed{cell.seed}"
    return DistillConfig(
        cache=str(store_path(config, cell.teacher)) if cell.teacher != ALONE else None,
        data=f"scenes/train:{config.images}",
        student=config.student,
        loss=cell.loss,
        out=str(Path(config.out) / "runs" / name),
        resume=True,
        samples=cell.samples,
        batch_size=config.batch_size,
        lr=config.lr,
        seed=cell.seed,
        projector="always",
        device=config.device,
    )


def own_run(config: InversionConfig) -> DistillConfig:
    """Return the settings of the teacher of the student's own size."""
    return run_of(config, Cell(ALONE, "none", config.own_samples, config.own_seed))


def store_path(config: InversionConfig, teacher: str) -> Path:
    """Where the features of a teacher lie."""
    return Path(config.out) / "store" / place_of(teacher)


def make_store(config: InversionConfig, teacher: str) -> None:
    """Extract a teacher's store where there is none yet; the teacher of the student's own size is trained first."""
    model = str(distill(own_run(config)).path) if teacher == OWN else teacher
    data, out = f"scenes/train:{config.images}", str(store_path(config, teacher))
    extract(ExtractConfig(teacher=model, data=data, out=out, device=config.device, unit_rows=UNIT_ROWS))


def recalls(config: InversionConfig, model: str, digest: str, *, only_kept: bool = False) -> Scores | None:
    """Return the recall@1 of a model, kept or measured; None if `only_kept` and there is none."""
    result = Path(config.out) / "results" / f"{Path(model).name}.json"
    wanted = RetrievalConfig(model=model, data=f"scenes/retrieval:{config.retrieval_images}", device=config.device, out=str(result))
    found = kept_result(wanted, Scored(model, result.stem, digest))
    if found is None and only_kept:
        return None
    content = found or evaluate_retrieval(wanted).content
    return {direction: content["rows"][0]["scores"][name] for direction, name in RECALLS.items()}


def run_digest(path: Path) -> str:
    """Return the digest of a finished run; raises RunError if it is none."""
    digest: str = read_json(path / "run.json", RunError)["digest"]
    return digest


def run_grid(config: InversionConfig) -> None:
    """Compute whatever of the grid is not there yet."""
    for teacher in (*config.teachers, OWN):
        make_store(config, teacher)
        recalls(config, *model_of(config, teacher))
    every = cells(config)
    for i, cell in enumerate(every):
        print(f"{i + 1}/{len(every)}: {cell}", file=sys.stderr, flush=True)
        path = distill(run_of(config, cell)).path
        recalls(config, str(path), run_digest(path))


def model_of(config: InversionConfig, teacher: str) -> tuple[str, str]:
    """Return a teacher's model and the digest of what it is."""
    if teacher == OWN:
        return str(own_run(config).run_path), run_digest(own_run(config).run_path)
    return teacher, read_json(store_path(config, teacher) / "manifest.json", RunError)["identity"]["teacher"]["digest"]


def teacher_scores(config: InversionConfig) -> dict[str, Scores]:
    """Return the scores of the teachers whose stores are finished."""
    there = [teacher for teacher in (OWN, *config.teachers) if (store_path(config, teacher) / "manifest.json").exists()]
    found = {teacher: recalls(config, *model_of(config, teacher), only_kept=True) for teacher in there}
    return {teacher: scores for teacher, scores in found.items() if scores is not None}


def student_scores(config: InversionConfig) -> dict[Cell, Scores]:
    """Return the scores of all students that are finished."""
    paths = {cell: run_of(config, cell).run_path for cell in cells(config)}
    there = {cell: path for cell, path in paths.items() if (path / "run.json").exists()}
    found = {cell: recalls(config, str(path), run_digest(path), only_kept=True) for cell, path in there.items()}
    return {cell: scores for cell, scores in found.items() if scores is not None}


def interval(values: list[float]) -> str:
    """Write a mean and half of its 95 % t interval, where there are several values."""
    return f"{np.mean(values):.1f}" + (f" ± {half_width(values):.1f}" if len(values) > 1 else "")


def lines(config: InversionConfig, scores: dict[Cell, Scores], of_teachers: dict[str, Scores]) -> Iterator[str]:
    """Write three tables: recall@1 of every teacher and of its students, and what the students of one teacher have over another's, seed by seed."""
    directions = " | ".join(f"{direction} R@1" for direction in RECALLS)
    yield f"| teacher itself | {directions} |"
    yield "| --- | ---: | ---: |"
    for teacher, found in of_teachers.items():
        yield f"| {teacher} | {' | '.join(interval([found[direction]]) for direction in RECALLS)} |"
    yield ""
    yield f"| loss | samples | teacher | seeds | {directions} |"
    yield "| --- | ---: | --- | ---: | ---: | ---: |"
    arms = dict.fromkeys((cell.loss, cell.samples, cell.teacher) for cell in sorted(scores, key=lambda cell: (cell.loss != "none", cell.samples)))
    for loss, samples, teacher in arms:
        of_arm = [scores[cell] for cell in scores if (cell.loss, cell.samples, cell.teacher) == (loss, samples, teacher)]
        means = " | ".join(interval([one[direction] for one in of_arm]) for direction in RECALLS)
        yield f"| {loss} | {samples:,} | {teacher} | {len(of_arm)} | {means} |"
    yield ""
    yield f"| loss | samples | difference of students | seeds | {directions} |"
    yield "| --- | ---: | --- | ---: | ---: | ---: |"
    ladder = (OWN, *config.teachers)
    compared = [(b, a) for i, a in enumerate(ladder) for b in ladder[i + 1 :]] + [(teacher, ALONE) for teacher in ladder]
    for loss in config.losses:
        for samples in config.samples:
            for better, than in compared:
                pairs = [(Cell(better, loss, samples, s), Cell(than, "none" if than == ALONE else loss, samples, s)) for s in config.seeds]
                both = [(scores[a], scores[b]) for a, b in pairs if a in scores and b in scores]
                if both:
                    gains = " | ".join(interval([a[direction] - b[direction] for a, b in both]) for direction in RECALLS)
                    yield f"| {loss} | {samples:,} | {better} - {than} | {len(both)} | {gains} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", help="a TOML file with a table [inversion]")
    parser.add_argument("--set", action="append", metavar="KEY=VALUE", help="any setting of the grid")
    parser.add_argument("--report", action="store_true", help="compute nothing: only tell what is there")
    parser.add_argument("--json", action="store_true", help="print the scores of every student instead of tables")
    args = parser.parse_args()
    try:
        config = make_config(InversionConfig, read_recipe(args.recipe, {"inversion"}).get("inversion", {}), parse_set(args.set))
        if not args.report:
            run_grid(config)
        scores, of_teachers = student_scores(config), teacher_scores(config)
    except KdstoreError as e:
        sys.exit(f"error: {e}")
    print(json.dumps([{**vars(cell), **found} for cell, found in scores.items()]) if args.json else "\n".join(lines(config, scores, of_teachers)))


if __name__ == "__main__":
    main()
