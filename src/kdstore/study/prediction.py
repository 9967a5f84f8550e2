"""Which measure of a teacher tells how good its students will be, and does it tell more than the teacher's own score?

A measure is worth what it says of a teacher it has not seen: one teacher is left out, a line through the ranks of the others predicts its students.
Ranks rather than values, since a measure's scale is arbitrary and one odd teacher would carry the line. Against the teacher's own score an exact
test exchanges the ranks of the two measures, teacher by teacher: with fewer than six teachers no exchange can reach 5 %, so the answer is None.
T teachers, P exchanges.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats

from kdstore.metrics.statistics import holm
from kdstore.study.correlation import spearman
from kdstore.study.verdict import ALPHA, counted, said_p

STRENGTH = "strength"
_FEWEST = 3  # teachers: a line needs two beside the one left out
_EXACT_UP_TO = 12  # teachers of which all exchanges are listed
_SAMPLED = 4096


@dataclass(frozen=True)
class Prediction:
    """A measure's rank correlation with the students' score, and its mean error on teachers left out in points, None for fewer than three.

    `p` is exact, `low` and `high` are a 95 % interval. `beats_strength` is None where chance may be all, and for the strength itself.
    """

    measure: str
    rho: float | None
    low: float
    high: float
    p: float
    p_holm: float
    left_out_error: float | None
    beats_strength: bool | None
    sentence: str


def predict(measures: Mapping[str, np.ndarray], score_T: np.ndarray, strength_T: np.ndarray) -> list[Prediction]:
    """Return a record per measure, first the teacher's own score; Holm over all correlations, and over all comparisons with that score.

    Raises ValueError for values that are not finite.
    """
    values = {STRENGTH: strength_T, **measures}
    found = {name: spearman(value_T, score_T) for name, value_T in values.items()}
    p_holm = dict(zip(values, holm([one.p for one in found.values()]), strict=True))
    rank = {name: stats.rankdata(value_T) for name, value_T in values.items()}
    num = len(score_T)
    if num < _FEWEST:
        error, p_beats = dict.fromkeys(values), dict.fromkeys(values, 1.0)
    else:
        error = {name: float(left_out_error(rank_T, score_T)) for name, rank_T in rank.items()}
        p_beats = dict(zip(measures, holm([exchange_p(rank[name], rank[STRENGTH], score_T) for name in measures]), strict=True))
    records = []
    for name, one in found.items():
        rho = "undefined" if one.rho is None else f"{one.rho:.2f}"
        said = f"{name}: rank correlation {rho} [{one.low:.2f}, {one.high:.2f}], {said_p(one.p)}, {p_holm[name]:.2g} after Holm over {len(values)}"
        beats = None
        if (own := error[name]) is not None and (strength := error[STRENGTH]) is not None:
            by_mean = float(left_out_error(np.zeros(num), score_T))
            said += f"; students of a teacher left out are predicted to {own:.1f} points, to {by_mean:.1f} by the mean of the others"
            if name != STRENGTH:
                beats = own < strength if p_beats[name] <= ALPHA else None
                answer = {True: "better than", False: "worse than", None: "not decidably better or worse than"}[beats]
                said += f", {answer} by the teacher's own score ({strength:.1f})"
        records.append(Prediction(name, one.rho, one.low, one.high, one.p, p_holm[name], error[name], beats, f"{said}, over {counted(num, 'teacher')}."))
    return records


def left_out_error(x_PT: np.ndarray, y_T: np.ndarray) -> np.ndarray:
    """Return how far, in the mean over teachers, y lies from the line through the others; from their mean where their x are all equal. [..., T] -> [...]

    The residual of the line through all, over one minus the leverage, is that of the line through the others (Allen 1974).
    """
    num = len(y_T)
    x_PT, y_T = x_PT - x_PT.mean(axis=-1, keepdims=True), y_T - y_T.mean()
    square_P1 = (x_PT**2).sum(axis=-1, keepdims=True)
    square_P1 = np.where(square_P1 > 0, square_P1, 1.0)
    residual_PT = y_T - x_PT * (x_PT @ y_T)[..., None] / square_P1
    rest_PT = 1 - 1 / num - x_PT**2 / square_P1
    alone_PT = rest_PT < 1e-9
    left_out_PT = np.where(alone_PT, y_T * num / (num - 1), residual_PT / np.where(alone_PT, 1.0, rest_PT))
    return np.abs(left_out_PT).mean(axis=-1)


def exchange_p(first_T: np.ndarray, second_T: np.ndarray, y_T: np.ndarray) -> float:
    """Return the two-sided p of two predictors' left-out errors being this far apart, were it chance which value of a teacher is whose.

    All exchanges of values, teacher by teacher, are counted; beyond twelve teachers a sample of them and the values as they are.
    """
    num = len(y_T)
    if num <= _EXACT_UP_TO:
        exchanged_PT = (np.arange(1 << num)[:, None] >> np.arange(num)) & 1 == 1
    else:
        exchanged_PT = np.random.default_rng(0).random((_SAMPLED, num)) < 0.5
        exchanged_PT[0] = False
    apart_P = left_out_error(np.where(exchanged_PT, second_T, first_T), y_T) - left_out_error(np.where(exchanged_PT, first_T, second_T), y_T)
    return float((np.abs(apart_P) >= abs(apart_P[0]) - 1e-9 * np.ptp(y_T)).mean())
