"""Visual question answering on frozen image features: one protocol for students and teachers, with the controls that give a score its meaning.

Rows beside the model's own, under the same head, schedule and seed:
- `question-only`: every image is one and the same token of zeros, so that nothing but the question can tell the answer;
- `untrained`: the same architecture with random weights;
- `vocabulary-oracle`: the best answer of the vocabulary to each question, the most that any head can reach.

All questions of the evaluated split count, whether or not the vocabulary can answer them; nothing is chosen by looking at that split.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from kdstore.config import as_dict, config_digest
from kdstore.errors import EvaluationError, UnknownName
from kdstore.evaluate.answers import (
    START,
    UNKNOWN,
    AnswerVocabulary,
    answer_vocabulary,
    best_answer,
    chance_per_type,
    soft_target,
    split_words,
    word_vocabulary,
)
from kdstore.evaluate.datasets import VQA_DATASETS, VqaQuestion, VqaSplit, open_vqa
from kdstore.evaluate.features import image_features, question_states, without_image
from kdstore.evaluate.fit import answer_questions, build_head, fit_head, pack_questions
from kdstore.evaluate.heads import HEADS, head_parameters
from kdstore.evaluate.outcomes import Outcomes, Run
from kdstore.evaluate.protocol import NOT_IN_DIGEST, VqaConfig
from kdstore.evaluate.results import check_out, made_record, model_record, write_result
from kdstore.jsonfile import digest_of
from kdstore.metrics.vqa import VERSIONS, vqa_scores
from kdstore.models.load import Model, load_model
from kdstore.models.names import architecture_of
from kdstore.progress import OnProgress, silent


@dataclass(frozen=True)
class VqaRow:
    """One row of the result: official `accuracy` in percent (`overall`, `perQuestionType`, `perAnswerType`), and the head behind it."""

    name: str
    accuracy: dict[str, Any]
    run: Run  # the answers behind it
    head: dict[str, Any] | None = None  # kind, parameters, last training loss
    seconds: float = 0.0


@dataclass(frozen=True)
class VqaResult:
    """All rows, the model's first; the best constant answer's accuracy per question type; and the whole result as it was written."""

    rows: tuple[VqaRow, ...]
    chance: dict[str, float]
    content: dict[str, Any]


@dataclass(frozen=True, eq=False)
class _Task:
    """Both splits and what follows from the training questions alone; `targets` and `asked` leave out questions that no label answers."""

    train: VqaSplit
    evaluated: VqaSplit
    vocabulary: AnswerVocabulary
    words: dict[str, int]
    asked: tuple[VqaQuestion, ...]
    targets: tuple[dict[int, float], ...]


def evaluate_vqa(config: VqaConfig, *, on_progress: OnProgress = silent) -> VqaResult:
    """Train a head on a model's frozen features and score its answers; writes the result file if one is named.

    Raises UnknownName, ConfigError, ModelError and EvaluationError before any head is trained.
    """
    _check(config)
    started = time.perf_counter()
    model = load_model(config.model, config.pretrained, device=config.device, precision=config.precision)
    if model.name.notice:
        on_progress("notice", 0, 0, model.name.notice)
    task = _task(config, on_progress)
    models = {"model": model}
    if config.controls:
        models["untrained"] = load_model(architecture_of(config.model), device=config.device, precision=config.precision, untrained=True, seed=config.seed)
    rows = _scored_rows(config, task, models, on_progress)
    if config.controls:
        oracle = [best_answer(q, task.vocabulary, config.metric_version) for q in task.evaluated.questions]
        rows.append(VqaRow("vocabulary-oracle", *_scored("vocabulary-oracle", None, task, oracle, config)))
    chance = chance_per_type(task.evaluated.questions, task.vocabulary, config.metric_version)
    content = {
        "stage": "evaluate vqa",
        "model": model_record(model),
        "data": _data_record(task),
        "metric": {"name": "vqa accuracy", "version": config.metric_version},
        "config": as_dict(config),
        "config_digest": config_digest(config, leave_out=NOT_IN_DIGEST),
        "seed": config.seed,
        "chance": chance,
        "rows": [{"row": row.name, "scores": _flat(row.accuracy), "accuracy": row.accuracy, "head": row.head} for row in rows],
        "made": {**made_record(model.device, time.perf_counter() - started), "head_seconds": {row.name: round(row.seconds, 1) for row in rows if row.head}},
    }
    return VqaResult(tuple(rows), chance, write_result(config.out, content, _outcomes(task, rows)))


def _check(config: VqaConfig) -> None:
    check_out(config.out)
    for what, name, known in (
        ("VQA data set", config.dataset, VQA_DATASETS),
        ("head", config.head, HEADS),
        ("version of the VQA accuracy", config.metric_version, VERSIONS),
    ):
        if name not in known:
            raise UnknownName.of(what, name, known)


def _task(config: VqaConfig, on_progress: OnProgress) -> _Task:
    on_progress("questions", 0, 2, f"{config.dataset}/{config.train_split}")
    train = open_vqa(config.dataset, config.train_split, folder=config.folder, num_images=config.train_images)
    on_progress("questions", 1, 2, f"{config.dataset}/{config.eval_split}")
    evaluated = open_vqa(config.dataset, config.eval_split, folder=config.folder, num_images=config.eval_images)
    on_progress("questions", 2, 2, f"{len(train.questions)} to train on, {len(evaluated.questions)} to answer")
    vocabulary = answer_vocabulary(train.questions, config.min_answer_count)
    pairs = [(question, target) for question in train.questions if (target := soft_target(question, vocabulary))]
    if not pairs:
        raise EvaluationError(f"No training question of {train.name} has an answer that scores.", "Give questions on whose answers annotators agree.")
    asked, targets = zip(*pairs, strict=True)
    return _Task(train, evaluated, vocabulary, word_vocabulary(train.questions), asked, targets)


def _scored_rows(config: VqaConfig, task: _Task, models: dict[str, Model], on_progress: OnProgress) -> list[VqaRow]:
    """Train and score one head per model, and the question-only one second."""
    reads = HEADS[config.head].reads
    encoded = [
        image_features(
            list(models.values()), split.image, split.num_images, reads=reads, batch=config.encode_batch, on_progress=on_progress, stage=f"encode {split.name}"
        )
        for split in (task.train, task.evaluated)
    ]
    rows = []
    for name, model, train_NTW, evaluated_NTW in zip(models, models.values(), *encoded, strict=True):
        rows.append(_scored_row(name, config, task, model, train_NTW, evaluated_NTW, on_progress))
        if name == "model" and config.controls:
            rows.append(_scored_row("question-only", config, task, model, without_image(train_NTW), without_image(evaluated_NTW), on_progress))
    return rows


def _scored_row(name: str, config: VqaConfig, task: _Task, model: Model, train_NTW: np.ndarray, evaluated_NTW: np.ndarray, on_progress: OnProgress) -> VqaRow:
    started = time.perf_counter()
    questions = task.evaluated.questions
    states, words = _words(config, task, model)
    head = _fresh_head(config, task, train_NTW.shape[2], states)
    train_rows = pack_questions([words[q.question] for q in task.asked], [q.images[0] for q in task.asked])
    loss = fit_head(head, train_NTW, train_rows, task.targets, config, model.device, on_progress=on_progress, stage=f"head: {name}")
    rows = pack_questions([words[q.question] for q in questions], [q.images[0] for q in questions])
    answers = [task.vocabulary.spellings[i] for i in answer_questions(head, evaluated_NTW, rows, model.device)]
    record = {"name": config.head, "parameters": head_parameters(head), "loss": loss}
    return VqaRow(name, *_scored(name, config.seed, task, answers, config), record, time.perf_counter() - started)


def _words(config: VqaConfig, task: _Task, model: Model) -> tuple[torch.Tensor | None, dict[str, Sequence[int]]]:
    """Return the word ids of every question text and, in the protocol of the model's own text tower, the states that they stand for."""
    texts = [q.question for q in (*task.asked, *task.evaluated.questions)]
    if config.question_encoder == "scratch":
        return None, {text: [task.words.get(word, UNKNOWN) for word in split_words(text)] for text in texts}
    states, rows = question_states(model, texts, config.encode_batch)
    return states, {text: range(START + 1 + r.start, START + 1 + r.stop) for text, r in rows.items()}


def _fresh_head(config: VqaConfig, task: _Task, image_width: int, states: torch.Tensor | None) -> nn.Module:
    """Draw a head's weights from the seed and leave the global random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return build_head(config, image_width, len(task.vocabulary), num_words=len(task.words), states=states)


def _scored(name: str, seed: int | None, task: _Task, answers: Sequence[str], config: VqaConfig) -> tuple[dict[str, Any], Run]:
    """Return the official accuracies of a row's answers, and each answer with its score."""
    questions = task.evaluated.questions
    predictions = [{"question_id": q.question_id, "answer": a} for q, a in zip(questions, answers, strict=True)]
    scores = vqa_scores(predictions, (q.annotation() for q in questions), version=config.metric_version)
    return dict(scores["accuracy"]), Run(name, seed, np.array([scores["evalQA"][q.question_id] for q in questions]), answers)


def _outcomes(task: _Task, rows: Sequence[VqaRow]) -> Outcomes:
    questions = task.evaluated.questions
    columns = ([str(q.question_id) for q in questions], [" ".join(map(str, q.images)) for q in questions], [q.question_type for q in questions])
    return Outcomes(*columns, tuple(row.run for row in rows))


def _flat(accuracy: dict[str, Any]) -> dict[str, float]:
    """Put the overall accuracy and those of the question types side by side: the columns of a table."""
    return {"overall": accuracy["overall"], **accuracy["perQuestionType"]}


def _data_record(task: _Task) -> dict[str, Any]:
    """Say which questions these were, and how far the answer vocabulary reaches."""
    answerable = sum(bool(soft_target(q, task.vocabulary)) for q in task.evaluated.questions)
    return {
        "train": {**_split_record(task.train), "dropped": len(task.train.questions) - len(task.asked)},
        "evaluated": {**_split_record(task.evaluated), "answerable": answerable, "coverage": round(100 * answerable / len(task.evaluated.questions), 2)},
        "vocabulary": {"answers": len(task.vocabulary), "words": len(task.words), "digest": digest_of(list(task.vocabulary.labels))},
    }


def _split_record(split: VqaSplit) -> dict[str, Any]:
    annotations = [[q.question, q.annotation()] for q in split.questions]
    return {"name": split.name, "num_images": split.num_images, "num_questions": len(split.questions), "digest": digest_of(annotations)}
