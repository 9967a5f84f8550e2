"""A study written by hand: six teachers, two losses, three seeds, every control, of which one fails; what collect.py would return of it."""

import math
from typing import Any

import pytest

SEEDS = [0, 1, 2]
LOSSES = ["clip + 1*crd", "clip + 1*fd"]
STUDENT, SAMPLES = "scenes-XS", 24_000
KINDS = ["exist", "count", "relation"]
TEACHERS = {"S, 20k": 31.2, "S, 40k": 42.8, "M, 40k": 55.1, "M, 80k": 63.9, "L, 80k": 74.6, "L, 80k, twins": 73.1}
MEASURES = {
    "modality gap": "Distance between the mean image and the mean text embedding; smaller is closer.",
    "effective rank": "Directions that the image embeddings use, as the exponential of the spectrum's entropy; larger is more.",
    "target entropy": "Entropy of the soft targets at the teacher's own temperature, in nats; larger is softer.",
    "hubness": "Skewness of how often an image is among the ten nearest; larger is worse.",
}


def interval(mean: float, k: int = 0, spread: float = 0.6) -> dict[str, Any]:
    seeds = [round(mean + spread * math.sin(7 * k + 2.3 * s), 3) for s in range(3)]
    middle = sum(seeds) / 3
    half = 4.303 * math.sqrt(sum((x - middle) ** 2 for x in seeds) / 2 / 3)
    return {"mean": round(middle, 3), "low": round(middle - half, 3), "high": round(middle + half, 3), "by_seed": seeds}


def scores(vqa: float, recall: float | None, k: int) -> dict[str, Any]:
    found = {"vqa/scenes/overall": interval(vqa, k)}
    found |= {f"vqa/scenes/{kind}": interval(vqa + 6 * math.sin(3 * j) + 2 * math.cos(k * j), k + j, 1.1) for j, kind in enumerate(KINDS)}
    if recall is not None:
        found |= {"retrieval/t2i@1": interval(recall, k + 1, 0.8), "retrieval/i2t@1": interval(recall + 3, k + 2, 0.9)}
    return found


def arm(kind: str, id: str, vqa: float | None, recall: float | None, k: int, **fields: Any) -> dict[str, Any]:
    files = [
        {
            "path": f"results/{part}-{abs(hash_of(id + part)):08x}.json",
            "digest": f"sha256:{hash_of(id + part + 'd'):064x}",
            "command": f"kdstore evaluate {part} --model 'runs/{id}' --seeds 0,1,2",
        }
        for part in ("vqa", "retrieval")
    ]
    measured = {} if vqa is None else scores(vqa, recall, k)
    if kind == "teacher":
        measured = {name: {"mean": s["mean"]} if name.startswith("retrieval") else s for name, s in measured.items()}
    cost = (
        {"samples": SAMPLES, "seconds": 61.0 + 0.8 * (k % 9), "teacher_seconds": 0.0 if "|no teacher" in id else 20.0 + 9 * (k % 9)}
        if kind != "teacher"
        else {"samples": 0, "seconds": 30.0 + k}
    )
    base = {"id": id, "kind": kind, "teacher": None, "student": None, "loss": None, "samples": None, "seeds": SEEDS, "parameters": None, "scores": measured}
    return base | {"cost": cost, "files": files} | fields


def hash_of(text: str) -> int:
    value = 5381
    for c in text:
        value = (value * 33 + ord(c)) % 2**32
    return value


@pytest.fixture(scope="session")
def study() -> dict[str, Any]:
    """The whole study."""
    return written_study()


def written_study() -> dict[str, Any]:
    small, large = {"total": 1_043_712, "without_token_embedding": 912_640}, {"total": 5_213_440, "without_token_embedding": 4_951_296}
    arms = [arm("teacher", f"teacher|{t}", 47 + r / 5, r, k, teacher=t, parameters=large if k > 2 else small) for k, (t, r) in enumerate(TEACHERS.items())]
    cell = {"student": STUDENT, "samples": SAMPLES, "parameters": small}
    gain = [2.1, 4.6, 6.9, 7.4, 6.2, 8.3]
    students: dict[str, list[dict[str, Any]]] = {}
    for j, loss in enumerate(LOSSES):
        values = [46 + g * (1.0 if j == 0 else 0.55) for g in gain]
        students[loss] = [
            arm("student", f"student|{STUDENT}|{t}|{loss}|{SAMPLES}", v, v / 2 - 4, k + 9 * j, teacher=t, loss=loss, **cell)
            for k, (t, v) in enumerate(zip(TEACHERS, values, strict=True))
        ]
        taught = [("random teacher", "random", 46.3), ("born-again", "own size", 47.6), ("permuted targets", "S, 20k", 47.9)]
        controls = [
            arm("control", f"control|{name}|{STUDENT}|{loss}|{SAMPLES}", v, v / 2 - 5, 40 + k + j, teacher=t, loss=loss, **cell)
            for k, (name, t, v) in enumerate(taught)
        ]
        arms += students[loss] + controls
    none = arm("control", f"control|no teacher|{STUDENT}|{SAMPLES}", 46.0, 19.0, 40, teacher="no teacher", **cell)
    own = arm("control", f"control|born-again|{STUDENT}", 47.3, 24.5, 49, teacher="own size", student=STUDENT, parameters=small)
    rows = [("untrained student", 36.0), ("question-only", 33.5), ("vocabulary oracle", 99.2)]
    arms += [none, own, *(arm("control", f"control|{name}|{STUDENT}", v, None, 50 + k, student=STUDENT) for k, (name, v) in enumerate(rows))]
    return {
        "stage": "study report",
        "name": "study-scenes",
        "recipe": {
            "study": {"name": "study-scenes", "losses": LOSSES, "samples": [SAMPLES], "seeds": SEEDS, "margin": 1.0},
            "teachers": {t: t for t in TEACHERS},
        },
        "study_digest": f"sha256:{hash_of('study'):064x}",
        "made": {"seconds": 8_640.0, "device": "cpu", "versions": {"kdstore": "0.1.0", "torch": "2.15.0"}},
        "finished": {"done": 96, "failed": 1, "missing": 3},
        "failures": [
            {
                "task": f"sha256:{hash_of('x'):064x}",
                "label": f"{STUDENT} from L, 80k by clip + 1*crd, seed 2",
                "reason": "DiskFull: no space left in runs/.",
                "log": "logs/distill-1a2b3c4d.txt",
            }
        ],
        "headline": {
            "verdict": "not monotone",
            "sentence": "With clip + 1*crd the student of M, 80k beats that of L, 80k, 10.7 points stronger, by 1.2 [0.6, 1.8] points (p 0.004 after Holm).",
            "scope": "conditional on these 6 checkpoints, one student and one schedule",
        },
        "arms": arms,
        "verdicts": [verdict(loss, students[loss], j) for j, loss in enumerate(LOSSES)],
        "gains": [
            {"arm": a["id"], "against": against, "score": "vqa/scenes/overall"}
            | {("difference" if key == "mean" else key): value for key, value in interval(a["scores"]["vqa/scenes/overall"]["mean"] - base, k, 0.5).items()}
            for loss in LOSSES
            for k, a in enumerate(students[loss])
            for against, base in ((none["id"], 46.0), (f"control|born-again|{STUDENT}|{loss}|{SAMPLES}", 47.6))
        ],
        "controls": [
            {"name": name, "expected": expected, "tolerance": tolerance, "found": found, "verdict": judged, "why": why}
            for name, expected, tolerance, found, judged, why in [
                ("no teacher", "The baseline: nothing is expected of it.", "none", "46.0 [45.1, 46.9] points.", "holds", ""),
                ("untrained student", "At least 5 points below no teacher.", "5 points", "10.0 points below.", "holds", ""),
                ("question-only", "At chance in every kind.", "3 points", "At most 1.2 points from chance.", "holds", ""),
                ("random teacher", "Not above no teacher.", "1 point", "0.3 points above.", "holds", ""),
                (
                    "permuted targets",
                    "Not above no teacher.",
                    "1 point",
                    "1.9 [1.1, 2.7] points above.",
                    "fails",
                    "Something other than the pairing of targets helps.",
                ),
                ("born-again", "Tells regularisation from strength.", "none", "1.6 points above no teacher.", "holds", ""),
                ("vocabulary oracle", "Above 95 points.", "5 points", "", "not run", "The recipe leaves it out."),
            ]
        ],
        "curves": [
            {
                "arm": a["id"],
                "seed": s,
                "points": [
                    {"samples": n, "loss": 2.1 * math.exp(-n / 9_000) + 1.9 - 0.05 * k + 0.03 * math.sin(n / 700 + s)} for n in range(800, SAMPLES + 1, 800)
                ],
            }
            for arms in ([none], *(students[loss] for loss in LOSSES))
            for k, a in enumerate(arms)
            for s in SEEDS
        ],
        "diagnostics": {
            "teachers": {t: {m: round(0.9 - 0.07 * k + 0.3 * j * math.sin(k + j), 4) for j, m in enumerate(MEASURES)} for k, t in enumerate(TEACHERS)},
            "spectra": {t: [math.exp(-i / (3 + k)) for i in range(64)] for k, t in enumerate(TEACHERS)},
            "students": {
                a["id"]: {"share of the gap taken over": 0.4 + 0.05 * k, "agreement with the teacher": 0.5 + 0.06 * k}
                for k, a in enumerate(students[LOSSES[0]])
            },
            "agreement": {
                measure: {"names": list(TEACHERS), "matrix": [[round(math.exp(-abs(i - j) / 4) - slip * (i != j), 3) for j in range(6)] for i in range(6)]}
                for measure, slip in (("debiased CKA", 0.02), ("mutual k-nearest neighbours", 0.3))
            },
            "explained": MEASURES,
        },
        "prediction": [
            {
                "measure": m,
                "rho": rho,
                "low": low,
                "high": high,
                "p": p,
                "p_holm": min(1.0, 4 * p),
                "left_out_error": error,
                "beats_strength": beats,
                "sentence": sentence,
            }
            for m, rho, low, high, p, error, beats, sentence in [
                ("strength", 0.77, 0.02, 0.98, 0.07, 1.62, None, "The teacher's own recall."),
                ("effective rank", 0.94, 0.55, 1.0, 0.005, 0.84, True, "Orders the students better than the teachers' recall does."),
                ("target entropy", -0.6, -0.96, 0.42, 0.21, 2.31, False, "Says less than the teachers' recall."),
                ("modality gap", 0.14, -0.78, 0.85, 0.79, 2.95, False, "Says nothing here."),
            ]
        ],
        "threats": [
            {"title": "Few teachers", "text": "Six checkpoints, some of one run: what is said holds for these and not for teachers in general."},
            {"title": "One world", "text": "All images are drawn by one program; real images may order the teachers otherwise."},
            {"title": "A control misbehaves", "text": "Permuted targets help by 1.9 points, so part of the gain is no knowledge of the teacher."},
        ],
    }


def verdict(loss: str, students: list[dict[str, Any]], j: int) -> dict[str, Any]:
    """Return the verdict of a cell, its points ascending in strength."""
    points = []
    for a in sorted(students, key=lambda a: TEACHERS[a["teacher"]]):
        s = a["scores"]["vqa/scenes/overall"]
        points.append(
            {"teacher": a["teacher"], "strength": TEACHERS[a["teacher"]], "score": s["mean"], "low": s["low"], "high": s["high"], "by_seed": s["by_seed"]}
        )
    inversions = [{"better": "M, 80k", "worse": "L, 80k", "difference": 1.2, "low": 0.6, "high": 1.8, "p": 0.001, "p_holm": 0.004}]
    return {
        "student": STUDENT, "loss": loss, "samples": SAMPLES, "vqa": "scenes", "strength": "retrieval/t2i@1",
        "verdict": ["not monotone", "not decidable"][j],
        "sentence": ["A stronger teacher makes a worse student at least once.", "The intervals leave both answers open."][j],
        "points": points,
        "spearman": {"rho": [0.83, 0.89][j], "p": [0.04, 0.02][j], "low": [0.1, 0.2][j], "high": [0.98, 0.99][j]},
        "in_general": "Six teachers can carry no more.",
        "trend": {"difference": 2.1, "low": 0.2, "high": 4.0, "p": 0.03, "pairs": 15},
        "inversions": inversions if j == 0 else [],
    }  # fmt: skip
