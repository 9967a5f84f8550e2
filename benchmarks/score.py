"""Scoring a split of the size of VQA v2's validation: seconds for each version of the official accuracy, each with empty caches.

The questions are synthetic in the shape of VQA v2: ten answers each, a third of them unanimous, half of them yes, no or a number, others from a long tail
(45,000 different ones in all), a quarter of which have capitals, articles, punctuation or number words; 65 question types, three answer types.

    python benchmarks/score.py [--questions 214354] [--json]
"""

from __future__ import annotations

import argparse
import json
import random
import time
from typing import Any

from kdstore.evaluate import METRICS, score_answers
from kdstore.metrics.vqa import normalize_answer, normalize_m4c, remove_punctuation

FREQUENT = ("yes", "no", "2")
SPELLINGS = ("{}",) * 9 + ("{}.", "The {}", "{}, two")


def synthetic_questions(num_questions: int) -> tuple[list[dict[str, Any]], dict[int, str]]:
    """Return questions and a prediction for each, always the same ones."""
    draw = random.Random(0)
    questions, predictions = [], {}
    for question_id in range(num_questions):
        common = draw.choice(FREQUENT) if draw.random() < 0.5 else rare_answer(draw)
        num_agreed = 10 if draw.random() < 1 / 3 else draw.randint(2, 9)
        texts = [common] * num_agreed + [rare_answer(draw) for _ in range(10 - num_agreed)]
        answers = [{"answer": text, "answer_id": i, "answer_confidence": "yes"} for i, text in enumerate(texts, start=1)]
        types = {"question_type": f"type {question_id % 65}", "answer_type": ("yes/no", "number", "other")[question_id % 3]}
        questions.append({"question_id": question_id, **types, "answers": answers})
        predictions[question_id] = draw.choice(texts)
    return questions, predictions


def rare_answer(draw: random.Random) -> str:
    """Draw an answer of the long tail."""
    return draw.choice(SPELLINGS).format(f"red cat {int(draw.paretovariate(0.3)) % 30_000}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=214_354)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    questions, predictions = synthetic_questions(args.questions)
    seconds = {}
    for version in METRICS["vqa"].versions:
        for cached in (remove_punctuation, normalize_answer, normalize_m4c):
            cached.cache_clear()
        started = time.perf_counter()
        score_answers("vqa", questions, predictions, version=version)
        seconds[version] = round(time.perf_counter() - started, 2)
    different = len({answer["answer"] for question in questions for answer in question["answers"]})
    if args.json:
        print(json.dumps({"questions": args.questions, "different_answers": different, "seconds": seconds}))
    else:
        print(f"{args.questions:,} questions, {different:,} different answers: " + ", ".join(f"{version} {s:.2f} s" for version, s in seconds.items()))


if __name__ == "__main__":
    main()
