"""From human answers to what a head is trained on: answer vocabulary, soft targets, question words; and the scores that need no model.

Answers are normalised before they are counted and, by default, before they are looked up (the published recipes look up raw answers in a normalised
vocabulary, which loses some). A label is spoken in its most frequent spelling of the training split, since unanimous answers are compared unnormalised (2021).
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from kdstore.errors import EvaluationError
from kdstore.evaluate.datasets.form import VqaQuestion
from kdstore.metrics.scores import Scores
from kdstore.metrics.vqa import clean_answer, normalize_answer

PADDING, UNKNOWN, START = 0, 1, 2
"""Word ids that are no words: nothing, a word unseen in training, and the start whose state stands for the whole question."""

_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")


@dataclass(frozen=True)
class AnswerVocabulary:
    """Answers a head can give: normalised `labels` in order of frequency, and the spelling in which each is spoken."""

    labels: tuple[str, ...]
    spellings: tuple[str, ...]
    index_of: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "index_of", {label: i for i, label in enumerate(self.labels)})

    def __len__(self) -> int:
        return len(self.labels)


def answer_vocabulary(questions: Iterable[VqaQuestion], min_count: int = 1) -> AnswerVocabulary:
    """Collect the labels that are the most frequent answer of at least `min_count` of these (training) questions."""
    counts: Counter[str] = Counter()
    spellings: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for question in questions:
        texts = [clean_answer(a["answer"]) for a in question.answers]
        counts[Counter(map(normalize_answer, texts)).most_common(1)[0][0]] += 1
        for text in texts:
            spellings[normalize_answer(text)][text] += 1
    labels = tuple(label for label, count in sorted(counts.items(), key=lambda c: (-c[1], c[0])) if count >= min_count)
    if not labels:
        raise EvaluationError(f"No answer is the most frequent one of {min_count} or more training questions.", "Lower min_answer_count.")
    return AnswerVocabulary(labels, tuple(spellings[label].most_common(1)[0][0] for label in labels))


def soft_target(question: VqaQuestion, vocabulary: AnswerVocabulary, lookup: str = "normalised") -> dict[int, float]:
    """Return label index -> target in (0, 1]: 0.3, 0.6, 0.9, 1 for one, two, three, four or more of ten annotators.

    It is the accuracy of the label with each annotator left out in turn, so other numbers of annotators have their own steps. With `lookup` "raw" an
    answer counts only where it is written as its label is.
    """
    normalised = lookup == "normalised"
    counts = Counter(normalize_answer(clean_answer(a["answer"])) if normalised else a["answer"] for a in question.answers)
    total = len(question.answers)
    targets = {
        vocabulary.index_of[a]: (n * min(1.0, (n - 1) / 3) + (total - n) * min(1.0, n / 3)) / total for a, n in counts.items() if a in vocabulary.index_of
    }
    return {i: score for i, score in targets.items() if score > 0}


def word_vocabulary(questions: Iterable[VqaQuestion]) -> dict[str, int]:
    """Number the words of these (training) questions, in alphabetical order, after the ids that are no words."""
    words = sorted({word for question in questions for word in split_words(question.question)})
    return {word: i for i, word in enumerate(words, start=START + 1)}


def split_words(text: str) -> list[str]:
    """Split a question into lower-case words; punctuation is dropped, an apostrophe inside a word kept."""
    return _WORD.findall(text.lower())


def label_scores(questions: Sequence[VqaQuestion], vocabulary: AnswerVocabulary, score: Callable[[list[str]], Scores]) -> list[dict[str, float] | None]:
    """Return the score, in percent, of each label that some annotator of a question gave: no other can score. None where a question does not count.

    `score` scores one answer to every question; it is called as often as the question with most such labels has labels.
    """
    given = [
        [vocabulary.spellings[i] for i in sorted({vocabulary.index_of.get(normalize_answer(clean_answer(a["answer"])), -1) for a in q.answers} - {-1})]
        for q in questions
    ]
    found: list[dict[str, float]] = [{} for _ in questions]
    for k in range(max(1, *map(len, given))):
        per_question = score([labels[k] if k < len(labels) else vocabulary.spellings[0] for labels in given]).per_question
        for question, labels, scores in zip(questions, given, found, strict=True):
            if k < len(labels) and question.question_id in per_question:
                scores[labels[k]] = per_question[question.question_id]
    return [scores if question.question_id in per_question else None for question, scores in zip(questions, found, strict=True)]


def best_answers(scores: Iterable[dict[str, float] | None], vocabulary: AnswerVocabulary) -> list[str]:
    """Return the vocabulary's best answer to each question: the vocabulary oracle."""
    return [max(of_question, key=lambda a: of_question[a]) if of_question else vocabulary.spellings[0] for of_question in scores]


def chance_per_type(questions: Iterable[VqaQuestion], scores: Iterable[dict[str, float] | None]) -> dict[str, float]:
    """Return the score, in percent, of the best constant answer of the vocabulary per question type and, as `overall`, for all of them.

    Questions of None do not count in the metric.
    """
    totals: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
    num_questions: Counter[str] = Counter()
    for question, of_question in zip(questions, scores, strict=True):
        if of_question is None:
            continue
        for kind in ("overall", question.question_type):
            num_questions[kind] += 1
            for answer, score in of_question.items():
                totals[kind][answer] += score
    return {kind: round(max(totals[kind].values(), default=0) / n, 2) for kind, n in num_questions.items()}
