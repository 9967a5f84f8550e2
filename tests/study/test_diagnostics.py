"""Diagnostics of teachers from their stores, and of students beside them, on real extractions of small models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kdstore.data.sources import open_source
from kdstore.errors import EvaluationError, IdentityMismatch
from kdstore.extract.config import ExtractConfig
from kdstore.extract.run import extract
from kdstore.models.load import load_model, parameter_counts
from kdstore.store import open_store
from kdstore.study.diagnostics import EXPLAINED, diagnose_pair, diagnose_student, diagnose_teacher, draw

WORDS = ("binding", "relation", "color", "shape", "count")
PROBES = f"scenes/retrieval:36?swapped={','.join(WORDS)}"


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stores `trained` of a demo teacher and `random` of an untrained model of other width, over probes; `other` of the latter over other scenes."""
    folder = tmp_path_factory.mktemp("stores")
    for name, teacher, seed, data in (("trained", "scenes-S", None, PROBES), ("random", "scenes-T", 0, PROBES), ("other", "scenes-T", 0, "scenes:20")):
        extract(ExtractConfig(teacher=teacher, untrained_seed=seed, data=data, out=str(folder / name), device="cpu", unit_rows=32))
    return folder


def test_a_trained_teacher_prefers_true_captions_and_every_measure_is_explained(stores: Path) -> None:
    found = diagnose_teacher(stores / "trained", samples=32, words=WORDS)
    assert {"parameters", *(name for name in EXPLAINED if name.startswith(("swapped_", "margin_")))} <= set(found["measures"]) <= set(EXPLAINED)
    assert found["measures"]["swapped_color"] > 80
    assert found["measures"]["margin_color"] > 1
    assert found["measures"]["parameters"] == parameter_counts(load_model("scenes-S", device="cpu").clip)["without_token_embedding"]
    assert sum(found["spectrum"]) == pytest.approx(1)
    assert found["spectrum"] == sorted(found["spectrum"], reverse=True)


def test_sensitivity_is_counted_over_the_images_that_have_a_pair(stores: Path) -> None:
    """Against the definition: caption texts found in the source, rows found by their text, cosines in float64."""
    store, source = open_store(stores / "trained"), open_source(PROBES)
    drawn = draw(store, 32, WORDS)
    texts = [caption.text for i in range(36) for caption in source.captions(i)]
    rows = {text: store.features("text/embedding", [m])[0].astype(np.float64) for m, text in enumerate(texts)}
    leads = []
    for i in drawn.image_N.tolist():
        image = store.features("image/embedding", [i])[0].astype(np.float64)
        true, false = (caption.text for caption in source.captions(i)[-2:])
        if true != false:
            leads.append(
                image @ rows[true] / np.linalg.norm(image) / np.linalg.norm(rows[true])
                - image @ rows[false] / np.linalg.norm(image) / np.linalg.norm(rows[false])
            )
    measures = diagnose_teacher(stores / "trained", samples=32, words=WORDS)["measures"]
    assert 10 < len(leads) < 32
    assert measures["swapped_count"] == pytest.approx(100 * np.mean(np.array(leads) > 0))
    assert measures["margin_count"] == pytest.approx(store.identity["teacher"]["logit_scale"] * np.mean(leads), rel=1e-4)


def test_a_student_that_is_its_teacher_has_taken_over_everything(stores: Path) -> None:
    store = stores / "trained", open_source(PROBES)
    student = diagnose_student("scenes-S", store, store, samples=32, words=WORDS)["measures"]
    teacher = diagnose_teacher(stores / "trained", samples=32, words=WORDS)["measures"]
    assert student["capacity_gap"] == 1
    for rows in ("probes", "seen"):
        assert student[f"{rows}/image_cka"] == pytest.approx(1, abs=1e-3)
        assert student[f"{rows}/image_neighbours"] > 0.95
        assert student[f"{rows}/text_top1"] > 0.95
    assert {name: student[name] for name in teacher} == pytest.approx(teacher, rel=0.05, abs=0.02)


def test_teachers_of_other_widths_agree_less_with_each_other_than_with_themselves(stores: Path) -> None:
    same = diagnose_pair(stores / "trained", stores / "trained", samples=32)["measures"]
    other = diagnose_pair(stores / "trained", stores / "random", samples=32)["measures"]
    assert same.keys() == other.keys() <= EXPLAINED.keys()
    assert same == pytest.approx(dict.fromkeys(same, 1))
    assert all(other[name] < 0.9 * same[name] for name in same)


def test_what_cannot_be_compared_is_refused(stores: Path) -> None:
    with pytest.raises(IdentityMismatch, match="different rows"):
        diagnose_pair(stores / "trained", stores / "other", samples=20)
    with pytest.raises(EvaluationError, match="36 images"):
        diagnose_teacher(stores / "trained", samples=37)
    with pytest.raises(EvaluationError, match="two for each of color"):
        diagnose_teacher(stores / "trained", samples=20, words=("color",))
    with pytest.raises(IdentityMismatch, match="is not what"):
        diagnose_student("scenes-S", *[(stores / "trained", open_source("scenes/retrieval:36"))] * 2, samples=20)
