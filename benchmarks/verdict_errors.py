"""How often the verdict of a study is wrong, and how often it is reached, on tables whose truth is known.

Teachers lie 10 points apart with a standard error of 1, the margin is 1 point. Students' scores have a spread of 0.5 points over seeds; "unequal": that of
the strongest teacher's 1.5; "middle": that of the middle one's 3; "wide": as "unequal", four times as much, so that the margin is no help; "heavy": of
Student's t with 3 degrees of freedom; "images": 0.3, and 400 images of 1 to 9 questions beside it, whose draw alone gives what is each teacher's own a standard
error of 0.4. Numbers are percentages of tables.

    python benchmarks/verdict_errors.py [--tables 1000] [--only verdicts|methods|headline|prediction] [--noise NAME]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
from scipy import stats

from kdstore.study.correlation import spearman
from kdstore.study.prediction import exchange_p
from kdstore.study.verdict import MONOTONE, NOT_MONOTONE, Cell, Images, headline, judge

MARGIN = 1.0
SIZES = [(teachers, seeds) for teachers in (3, 5, 8) for seeds in (2, 3, 5)]
SPREAD = {"equal": 0.5, "unequal": 0.5, "middle": 0.5, "wide": 2.0, "heavy": 0.5, "images": 0.3}


def errors(num: int) -> dict[str, tuple[np.ndarray, dict[str, str]]]:
    """Return by name of a truth: the true scores, and the verdicts that are wrong there with how a column calls them."""
    steps = np.arange(num, dtype=float)
    dented = np.append(3 * steps[:-1], 3 * steps[-2] - MARGIN)
    return {
        "flat": (0 * steps, {MONOTONE: "flat: monotone", NOT_MONOTONE: "flat: not mon."}),
        "levels off": (2 * np.minimum(steps, 1), {NOT_MONOTONE: "levels off: not mon."}),
        "dented": (dented, {MONOTONE: "dented by 1: monotone"}),
    }


def reached(num: int) -> dict[str, tuple[np.ndarray, dict[str, str]]]:
    """Return the same of verdicts that are right."""
    steps = np.arange(num, dtype=float)
    dented = np.append(3 * steps[:-1], 3 * steps[-2] - 3)
    return {
        "rises by 1": (steps, {MONOTONE: "rises by 1: monotone"}),
        "rises by 2": (2 * steps, {MONOTONE: "rises by 2: monotone"}),
        "dented by 3": (dented, {NOT_MONOTONE: "dented by 3: not mon."}),
        "falls by 1": (-steps, {NOT_MONOTONE: "falls by 1: not mon."}),
    }


def table(rng: np.random.Generator, truth_T: np.ndarray, num_seeds: int, noise: str) -> Cell:
    """Draw a cell."""
    num = len(truth_T)
    spread_T1 = np.full((num, 1), SPREAD[noise])
    spread_T1[-1] *= 3 if noise in ("unequal", "wide") else 1
    spread_T1[num // 2] *= 6 if noise == "middle" else 1
    drawn_TS = rng.standard_t(3, (num, num_seeds)) / np.sqrt(3) if noise == "heavy" else rng.standard_normal((num, num_seeds))
    score_TS = 50 + truth_T[:, None] + rng.standard_normal(num_seeds) + spread_T1 * drawn_TS
    images = None
    if noise == "images":
        count_G = 1.0 + np.arange(400) % 9
        of_image = 20 * rng.standard_normal(400) + 7 * rng.standard_normal((num, 1, 400)) + 15 * rng.standard_normal((num, num_seeds, 400)) / np.sqrt(count_G)
        sum_TSG = (score_TS[:, :, None] + of_image) * count_G
        score_TS, images = sum_TSG.sum(axis=2) / count_G.sum(), Images(sum_TSG, count_G)
    strength_T = 40 + 10 * np.arange(num) + rng.standard_normal(num)
    return Cell([f"teacher {t}" for t in range(num)], strength_T, np.ones(num), score_TS, images)


def verdicts(tables: int, noises: Sequence[str]) -> None:
    """Print one table of errors, and from a quarter as many draws one of verdicts that are right."""
    for truths, draws in ((errors, tables), (reached, tables // 4)):
        names = [name for _, columns in truths(3).values() for name in columns.values()]
        print("| noise | teachers | seeds |", " | ".join(names), "|\n|" + " --- |" * (3 + len(names)))
        for noise in noises:
            for num, num_seeds in SIZES:
                shares = []
                for truth_T, columns in truths(num).values():
                    rng = np.random.default_rng((num, num_seeds))
                    found = [judge(table(rng, truth_T, num_seeds, noise), MARGIN).verdict for _ in range(draws)]
                    shares += [percent(found.count(verdict) / draws) for verdict in columns]
                print(f"| {noise} | {num} | {num_seeds} |", " | ".join(shares), "|", flush=True)
        print()


def methods(tables: int, noises: Sequence[str]) -> None:
    """Print how often a flat truth gets a rising trend (2.5 % are due) from the verdict's test, one with the pooled variance alone, and Page's L."""
    print("| noise | teachers | seeds | verdict's trend | pooled variance, no images | Page's L |\n|" + " --- |" * 6)
    for noise in noises:
        for num, num_seeds in ((5, 3), (8, 5)):
            rng = np.random.default_rng(0)
            rising = np.zeros(3)
            for _ in range(tables):
                cell = table(rng, np.zeros(num), num_seeds, noise)
                trend = judge(cell, MARGIN).trend
                page = stats.page_trend_test(cell.score_TS.T, method="exact" if num < 8 else "asymptotic").pvalue
                rising += (trend is not None and trend.low > 0, pooled_p(cell.score_TS) <= 0.025, page <= 0.025)
            print(f"| {noise} | {num} | {num_seeds} |", " | ".join(percent(share) for share in rising / tables), "|", flush=True)


def pooled_p(score_TS: np.ndarray) -> float:
    """Return the one-sided p of a rise that takes all teachers to vary alike over seeds."""
    num, num_seeds = score_TS.shape
    residual_TS = score_TS - score_TS.mean(axis=1, keepdims=True) - score_TS.mean(axis=0) + score_TS.mean()
    df, weight_T = (num - 1) * (num_seeds - 1), np.arange(num) - (num - 1) / 2
    error = np.sqrt((residual_TS**2).sum() / df / num_seeds * (weight_T @ weight_T))
    return float(stats.t.sf(weight_T @ score_TS.mean(axis=1) / error, df))


def headlines(tables: int) -> None:
    print("| truth in 4 cells, 5 teachers, 3 seeds | monotone | not monotone |\n| --- | --- | --- |")
    flat, rising, dented = np.zeros(5), 2.0 * np.arange(5), np.array([0, 3, 6, 9, 8.0])
    for name, truth_T4 in {"flat": [flat] * 4, "dented by 1 in one, rising by 2": [dented, *[rising] * 3], "rising by 2": [rising] * 4}.items():
        rng = np.random.default_rng(0)
        found = []
        for _ in range(tables):
            found.append(headline({str(i): judge(table(rng, truth_T, 3, "equal"), MARGIN) for i, truth_T in enumerate(truth_T4)}).verdict)
        print(f"| {name} |", " | ".join(percent(np.mean([one == verdict for one in found])) for verdict in (MONOTONE, NOT_MONOTONE)), "|")


def prediction(tables: int) -> None:
    """Print how often a measure as good as the strength is called better or worse, one far better is, and an interval holds the true correlation."""
    print("| teachers | as good, called different | perfect against noise, called different | Spearman's interval holds 0 | ... holds 0.9 |\n|" + " --- |" * 5)
    for num in (5, 6, 8, 12):
        rng = np.random.default_rng(0)
        hits = np.zeros(4)
        for _ in range(tables):
            score_T, a_T, b_T = rng.standard_normal((3, num))
            rank_T = stats.rankdata(score_T)
            hits[0] += exchange_p(stats.rankdata(score_T + a_T), stats.rankdata(score_T + b_T), score_T) <= 0.05
            hits[1] += exchange_p(rank_T, stats.rankdata(a_T), score_T) <= 0.05
            latent = 2 * np.sin(0.9 * np.pi / 6)
            for column, (other_T, truth) in enumerate([(a_T, 0.0), (latent * score_T + np.sqrt(1 - latent**2) * a_T, 0.9)], start=2):
                found = spearman(score_T, other_T)
                hits[column] += found.low <= truth <= found.high
        print(f"| {num} |", " | ".join(percent(share) for share in hits / tables), "|", flush=True)


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=int, default=1000)
    parser.add_argument("--only", choices=("verdicts", "methods", "headline", "prediction"))
    parser.add_argument("--noise", choices=SPREAD, help="of verdicts and methods; default: all")
    args = parser.parse_args()
    noises = [args.noise] if args.noise else list(SPREAD)
    parts = {
        "verdicts": lambda: verdicts(args.tables, noises),
        "methods": lambda: methods(args.tables, noises),
        "headline": lambda: headlines(args.tables),
        "prediction": lambda: prediction(args.tables),
    }
    for name in [args.only] if args.only else parts:
        parts[name]()
        print(flush=True)


if __name__ == "__main__":
    main()
