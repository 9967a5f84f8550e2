"""Train a head on frozen features, and answer with it: a fixed schedule, no look at the evaluated split, the same result for the same seed.

Loss: binary cross-entropy with logits against soft targets, averaged over everything and multiplied by the number of answers, which is the sum
over answers and the mean over questions. Batches are of images, since all questions of an image share its keys and values; small ones, since a head learns
to bind attributes to objects by the number of steps more than by the number of questions.

Shape suffixes as in `heads`; N images, Q questions, K labels of a question.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from kdstore.evaluate.answers import PADDING, START
from kdstore.evaluate.heads import HEADS, MAX_WORDS, PackedQuestions, QuestionEncoder, TowerQuestions, WordQuestions
from kdstore.evaluate.protocol import VqaConfig
from kdstore.progress import OnProgress, silent

QUESTIONS_PER_ROW = 8


@dataclass(frozen=True)
class QuestionRows:
    """Questions packed into rows, each of one image: `PackedQuestions` as arrays, and `question_RP`, the number of each question (-1 pads)."""

    image_R: np.ndarray
    word_RS: np.ndarray
    place_RS: np.ndarray
    segment_RS: np.ndarray
    start_RP: np.ndarray
    question_RP: np.ndarray

    def __len__(self) -> int:
        return len(self.image_R)


def pack_questions(words: Sequence[Sequence[int]], images: Sequence[int]) -> QuestionRows:
    """Pack questions (their word ids, without start) into rows of at most QUESTIONS_PER_ROW questions on the same image, by image."""
    order = sorted(range(len(words)), key=lambda q: images[q])  # stable: questions keep their order
    groups: list[list[int]] = []
    for q in order:
        if groups and images[groups[-1][0]] == images[q] and len(groups[-1]) < QUESTIONS_PER_ROW:
            groups[-1].append(q)
        else:
            groups.append([q])
    num_words = max(sum(1 + min(len(words[q]), MAX_WORDS - 1) for q in group) for group in groups)
    num_questions = max(map(len, groups))
    shape = (len(groups), num_words)
    rows = QuestionRows(
        image_R=np.array([images[group[0]] for group in groups], np.int64),
        word_RS=np.full(shape, PADDING, np.int64),
        place_RS=np.zeros(shape, np.int64),
        segment_RS=np.full(shape, -1, np.int64),
        start_RP=np.full((len(groups), num_questions), -1, np.int64),
        question_RP=np.full((len(groups), num_questions), -1, np.int64),
    )
    for r, group in enumerate(groups):
        end = 0
        for p, q in enumerate(group):
            ids = [START, *words[q]][:MAX_WORDS]
            span = slice(end, end + len(ids))
            rows.word_RS[r, span], rows.place_RS[r, span], rows.segment_RS[r, span] = ids, range(len(ids)), p
            rows.start_RP[r, p], rows.question_RP[r, p] = end, q
            end += len(ids)
    return rows


def packed_batch(rows: QuestionRows, chosen: np.ndarray, device: torch.device) -> PackedQuestions:
    """Take the chosen rows, without columns that are padding in all of them."""
    length = int((rows.segment_RS[chosen] >= 0).sum(axis=1).max())
    num_questions = int((rows.start_RP[chosen] >= 0).sum(axis=1).max())

    def take(array: np.ndarray, columns: int) -> torch.Tensor:
        return torch.from_numpy(array[chosen, :columns]).to(device)

    return PackedQuestions(take(rows.word_RS, length), take(rows.place_RS, length), take(rows.segment_RS, length), take(rows.start_RP, num_questions))


def build_head(config: VqaConfig, image_width: int, num_answers: int, *, num_words: int, states: torch.Tensor | None = None) -> nn.Module:
    """Build an untrained head; with `states` [words of all distinct questions, tower width] it reads these instead of learning words."""
    words = WordQuestions(START + 1 + num_words, config.width) if states is None else TowerQuestions(states, config.width)
    encoder = QuestionEncoder(words, config.width, config.attention_heads)
    return HEADS[config.head].build(image_width, encoder, num_answers, config.width, config.layers, config.attention_heads)


def fit_head(
    head: nn.Module,
    image_NTW: np.ndarray,
    rows: QuestionRows,
    targets: Sequence[dict[int, float]],
    config: VqaConfig,
    device: torch.device,
    *,
    on_progress: OnProgress = silent,
    stage: str = "head",
) -> float:
    """Train a head in place; `targets[q]` are the soft targets of question q by label. Returns the mean loss of the last tenth of the steps."""
    label_QK, score_QK = _padded_targets(targets)
    head.to(device).train()
    decayed = [p for p in head.parameters() if p.ndim > 1]
    plain = [p for p in head.parameters() if p.ndim <= 1]
    optimiser = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=config.learning_rate,
        betas=(0.9, 0.98),
        fused=True,
    )
    order = np.random.default_rng(config.seed)
    per_epoch = math.ceil(len(rows) / config.batch_images)
    num_steps = config.epochs * per_epoch
    losses = []
    for step in range(num_steps):
        if step % per_epoch == 0:
            shuffled = order.permutation(len(rows))
        chosen = shuffled[step % per_epoch * config.batch_images :][: config.batch_images]
        for group in optimiser.param_groups:
            group["lr"] = config.learning_rate * _schedule(step, num_steps, config.warmup)
        question_RP = rows.question_RP[chosen]
        logits_QA = _logits(head, image_NTW, rows, chosen, device)
        target_QA = torch.zeros_like(logits_QA)
        asked = question_RP[question_RP >= 0]
        target_QA.scatter_add_(1, label_QK[asked].to(device), score_QK[asked].to(device))
        loss = F.binary_cross_entropy_with_logits(logits_QA, target_QA) * logits_QA.shape[1]
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(head.parameters(), config.gradient_clip)
        optimiser.step()
        losses.append(loss.detach())
        if (step + 1) % 20 == 0 or step + 1 == num_steps:
            on_progress(stage, step + 1, num_steps, f"loss {loss.item():.3f}")
    return float(torch.stack(losses[-max(1, num_steps // 10) :]).mean())


@torch.inference_mode()
def answer_questions(head: nn.Module, image_NTW: np.ndarray, rows: QuestionRows, device: torch.device, *, batch_images: int = 64) -> np.ndarray:
    """Return the number of the most likely answer of each question, int64 [Q]."""
    head.to(device).eval()
    answer_Q = np.empty(int(rows.question_RP.max()) + 1, np.int64)
    for chosen in _consecutive(len(rows), batch_images):
        question_RP = rows.question_RP[chosen]
        answer_Q[question_RP[question_RP >= 0]] = _logits(head, image_NTW, rows, chosen, device).argmax(dim=1).cpu().numpy()
    return answer_Q


def _logits(head: nn.Module, image_NTW: np.ndarray, rows: QuestionRows, chosen: np.ndarray, device: torch.device) -> torch.Tensor:
    """Return logits [Q, A] of the questions in the chosen rows, in their order."""
    image_RTW = torch.from_numpy(image_NTW[rows.image_R[chosen]]).to(device).float()
    questions = packed_batch(rows, chosen, device)
    return head(image_RTW, questions)[questions.start_RP >= 0]


def _padded_targets(targets: Sequence[dict[int, float]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return labels int64 and scores float32 [Q, K]; padding is label 0 with score 0."""
    num_labels = max(map(len, targets))
    label_QK = torch.zeros(len(targets), num_labels, dtype=torch.int64)
    score_QK = torch.zeros(len(targets), num_labels)
    for q, target in enumerate(targets):
        label_QK[q, : len(target)] = torch.tensor(list(target), dtype=torch.int64)
        score_QK[q, : len(target)] = torch.tensor(list(target.values()))
    return label_QK, score_QK


def _schedule(step: int, num_steps: int, warmup: float) -> float:
    """Rise linearly over the warm-up, times half a cosine to zero."""
    return min(1.0, (step + 1) / (warmup * num_steps + 1)) * 0.5 * (1 + math.cos(math.pi * step / num_steps))


def _consecutive(total: int, size: int) -> Iterator[np.ndarray]:
    for start in range(0, total, size):
        yield np.arange(start, min(total, start + size))
