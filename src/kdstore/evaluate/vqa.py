"""Visual question answering on image features: one protocol for students and teachers, with the controls that give a score its meaning.

Rows beside the model's own, under the same head, schedule and seeds:
- `question-only`: every image is one and the same token of zeros, so that nothing but the question can tell the answer;
- `untrained`: the same architecture with random weights, in the same mode;
- `vocabulary-oracle`: the best answer of the vocabulary to each question, the most that any head can reach.

All questions of the evaluated split count, whether or not the vocabulary can answer them; nothing is chosen by looking at that split.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdstore.config import as_dict, config_digest
from kdstore.errors import ConfigError
from kdstore.evaluate.answers import START, UNKNOWN, split_words
from kdstore.evaluate.datasets import write_submission
from kdstore.evaluate.datasets.form import VqaQuestion
from kdstore.evaluate.features import question_states, without_image
from kdstore.evaluate.fit import Lessons, answer_questions, build_head, fit_head
from kdstore.evaluate.heads import head_parameters
from kdstore.evaluate.outcomes import Outcomes
from kdstore.evaluate.packing import QuestionRows, pack_questions
from kdstore.evaluate.protocol import NOT_IN_DIGEST, VqaConfig
from kdstore.evaluate.results import check_out, made_record, write_result
from kdstore.evaluate.rows import Row, checkpoint_of, keep_answers, keep_model, kept_answers, row_of
from kdstore.evaluate.score import outcomes_of, score_record
from kdstore.evaluate.sights import Sight, Subject, check_names, frozen_sights, open_subject, tuned_sight
from kdstore.evaluate.task import Asked, VqaTask, open_task
from kdstore.jsonfile import make_folders
from kdstore.metrics.scores import Scores
from kdstore.progress import OnProgress, silent

ROWS = ("model", "question-only", "untrained")


@dataclass(frozen=True)
class VqaRow:
    """A row of the result under one seed: its answers in the order of the questions, their scores where there are answers, and the head behind it."""

    name: str
    seed: int | None  # None where nothing is drawn
    answers: tuple[str, ...]
    scores: Scores | None
    head: dict[str, Any] | None = None  # kind, parameters, training loss, ...
    seconds: float = 0.0


@dataclass(frozen=True)
class VqaResult:
    """All rows, the model's first; the best constant answer's accuracy per question type; and the whole result as it was written."""

    rows: tuple[VqaRow, ...]
    chance: dict[str, float]
    content: dict[str, Any]


def evaluate_vqa(config: VqaConfig, *, on_progress: OnProgress = silent) -> VqaResult:
    """Train a head, by its mode with the image tower, and score its answers; writes the result file if one is named.

    What is finished is kept beside that file: the same command goes on from there. Raises UnknownName, ConfigError, ModelError, StoreError and
    EvaluationError before any head is trained, and Interrupted for Ctrl-C or SIGTERM.
    """
    check_out(config.out)
    started = time.perf_counter()
    check_names(config)
    task = open_task(config, on_progress)
    if config.out is None and not task.evaluated.answered:
        raise ConfigError(f"{task.evaluated.name} has no answers to score with, and no file for its predictions was named.", "Give --out FILE.")
    subject = open_subject(config, on_progress)
    rows = _trained_rows(config, task, subject, on_progress)
    chance: dict[str, float] = {}
    if task.evaluated.answered:
        chance = task.chance
        if config.controls:
            rows.append(VqaRow("vocabulary-oracle", None, tuple(task.oracle), task.score(task.oracle)))
    else:
        _write_submissions(config, task, rows)
    seconds = {f"{row.name}, seed {row.seed}": round(row.seconds, 1) for row in rows if row.head}
    content = {
        "stage": "evaluate vqa",
        "model": subject.record,
        "data": task.record(),
        "metric": {"name": task.evaluated.metric, "version": task.version},
        "config": as_dict(config),
        "config_digest": config_digest(config, leave_out=NOT_IN_DIGEST),
        "chance": chance,
        "rows": [_row_record(row, task) for row in rows],
        "made": {**made_record(subject.device, time.perf_counter() - started), "head_seconds": seconds},
    }
    return VqaResult(tuple(rows), chance, write_result(config.out, content, _outcomes(task, rows)))


def _trained_rows(config: VqaConfig, task: VqaTask, subject: Subject, on_progress: OnProgress) -> list[VqaRow]:
    """Train and score a head for each row and seed, those of a row behind each other; finished ones are read."""
    names = ROWS if config.controls and task.evaluated.answered else ROWS[:1]
    rows = [row_of(name, seed, config, task, _identity(name, seed, subject)) for name in names for seed in config.seeds]
    answered = {row: found for row in rows if (found := kept_answers(row, config.out)) is not None}
    missing = [row for row in rows if row not in answered]
    if missing:
        task.check_images()
    sights = {} if config.tuned or not missing else frozen_sights(config, task, subject, list(dict.fromkeys(map(_twin, missing))), on_progress)
    for row in missing:
        sight = sights[_twin(row)] if sights else tuned_sight(config, task, subject, _twin(row))
        answered[row] = _answered(row, config, task, sight, subject.device, on_progress)
        keep_answers(row, config.out, answered[row])
    return [
        VqaRow(row.name, row.seed, tuple(a["answers"]), task.score(a["answers"]) if task.evaluated.answered else None, a["head"], a["seconds"])
        for row in rows
        for a in (answered[row],)
    ]


def _identity(name: str, seed: int, subject: Subject) -> dict[str, Any]:
    return subject.untrained(seed) if name == "untrained" else subject.identity


def _twin(row: Row) -> int | None:
    """Return the seed of the untrained weights that a row sees through, None for the subject's own."""
    return row.seed if row.name == "untrained" else None


def _answered(row: Row, config: VqaConfig, task: VqaTask, sight: Sight, device: torch.device, on_progress: OnProgress) -> dict[str, Any]:
    """Train a row's head and answer the evaluated questions; returns what is kept of it."""
    started = time.perf_counter()
    blind = row.name == "question-only"
    train, evaluated = (without_image(images) if blind else images for images in (sight.train, sight.evaluated))
    states, words = _words(config, task, sight)
    head = _fresh_head(config, task, train.width, states, row.seed)
    parts = nn.ModuleDict({"head": head} if sight.tower is None or blind else {"head": head, "tower": sight.tower})

    def lessons(asked: Asked) -> Lessons:
        return Lessons(train, _packed(asked.questions, words), asked.targets)

    held = None if task.held is None else lessons(task.held)
    fitted = fit_head(
        parts,
        lessons(task.trained),
        config,
        row.seed,
        device,
        held=held,
        kept=checkpoint_of(row, config.out),
        on_progress=on_progress,
        stage=f"{row.name}, seed {row.seed}",
    )
    if "tower" in parts and sight.model is not None:
        keep_model(row, config.out, sight.model, head)
    numbers = answer_questions(parts, evaluated, _packed(task.evaluated.questions, words), device)
    return {
        "answers": [task.vocabulary.spellings[i] for i in numbers],
        "head": {"name": config.head, "parameters": head_parameters(head), "tuned": _tuned(parts), **fitted},
        "seconds": round(time.perf_counter() - started, 1),
    }


def _tuned(parts: nn.ModuleDict) -> int:
    """Count the parameters that were trained beside the head's."""
    return sum(p.numel() for p in parts["tower"].parameters() if p.requires_grad) if "tower" in parts else 0


def _packed(questions: Sequence[VqaQuestion], words: dict[str, Sequence[int]]) -> QuestionRows:
    return pack_questions([words[q.question] for q in questions], [q.images for q in questions])


def _words(config: VqaConfig, task: VqaTask, sight: Sight) -> tuple[torch.Tensor | None, dict[str, Sequence[int]]]:
    """Return the word ids of every question text and, in the protocol of the model's own text tower, the states that they stand for."""
    texts = [q.question for q in (*task.train.questions, *task.evaluated.questions)]
    if config.question_encoder == "scratch" or sight.model is None:
        return None, {text: [task.words.get(word, UNKNOWN) for word in split_words(text)] for text in texts}
    states, rows = question_states(sight.model, texts, config.encode_batch)
    return states, {text: range(START + 1 + r.start, START + 1 + r.stop) for text, r in rows.items()}


def _fresh_head(config: VqaConfig, task: VqaTask, image_width: int, states: torch.Tensor | None, seed: int) -> nn.Module:
    """Draw a head's weights from the seed and leave the global random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_head(config, image_width, len(task.vocabulary), num_words=len(task.words), states=states, num_images=task.num_images)


def _write_submissions(config: VqaConfig, task: VqaTask, rows: Sequence[VqaRow]) -> None:
    """Write the model's answers as the owner's server takes them, a file per seed beside the result."""
    for row in rows:
        if row.name == "model" and config.out is not None:
            path = Path(config.out).with_suffix(f".seed{row.seed}.predictions{task.evaluated.submission.suffix}")
            make_folders(path.parent)
            answers: dict[Hashable, Any] = {q.question_id: answer for q, answer in zip(task.evaluated.questions, row.answers, strict=True)}
            write_submission(path, task.evaluated, answers)


def _outcomes(task: VqaTask, rows: Sequence[VqaRow]) -> Outcomes | None:
    """Put every answer beside its score; None where nothing is scored."""
    scored = [(row.name, row.seed, row.answers, row.scores) for row in rows if row.scores is not None]
    return outcomes_of(task.evaluated.questions, scored) if scored else None


def _row_record(row: VqaRow, task: VqaTask) -> dict[str, Any]:
    scores = {"scores": {}} if row.scores is None else score_record(row.scores, task.evaluated.questions)
    return {"row": row.name, "seed": row.seed, "head": row.head, **scores}
