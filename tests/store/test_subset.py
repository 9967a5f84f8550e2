"""Subsets hold the chosen rows with their texts, and put together again they are the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdstore.errors import ConfigError, JoinError, UnknownName
from kdstore.jsonfile import read_json, write_json
from kdstore.store import Plan, open_store, subset_store, verify_store


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 44), min_size=1, unique=True), st.booleans())
def test_chosen_keys_keep_their_rows_their_texts_and_the_order_of_the_store(
    pristine: Path, sample: Any, tmp_path_factory: pytest.TempPathFactory, images: list[int], by_rows: bool
) -> None:
    out = tmp_path_factory.mktemp("subset") / "store"
    if by_rows:
        first, last = min(images), max(images)
        images, chosen = list(range(first, last + 1)), {"rows": slice(first, last + 1)}
    else:
        chosen = {"keys": [sample.rows[i][0] for i in images]}
    subset_store(pristine, out, **chosen)  # type: ignore[arg-type]
    rows = sorted(images)
    texts = [t for i in rows for t in range(*sample.plan.offsets[i : i + 2].tolist())]
    old, new = open_store(pristine), open_store(out)
    assert new.fingerprint == Plan.freeze([sample.rows[i] for i in rows]).fingerprint
    for name, spec in old.arrays.items():
        taken = np.array(rows if spec.side == "image" else texts, int)
        for view in range(spec.views):
            views = view if spec.has_views else None
            assert new.gather(name, np.arange(len(taken)), views).tobytes() == old.gather(name, taken, views).tobytes()
    assert new.image_sha256().tolist() == old.image_sha256()[rows].tolist()
    assert new.index("image", "reason").to_pylist() == old.index("image", "reason").take(rows).to_pylist()
    assert verify_store(out).ok


def test_arrays_bring_what_is_needed_to_read_them(pristine: Path, tmp_path: Path) -> None:
    made = subset_store(pristine, tmp_path / "out", arrays=["image/tokens"])
    store = open_store(tmp_path / "out")
    assert made.arrays == ("image/tokens",)
    assert sorted(store.arrays) == ["image/tokens", "image/valid", "text/valid"]
    assert (store.fingerprint, store.digest) == (open_store(pristine).fingerprint, made.digest)


def test_the_data_that_the_run_was_given_stays_known(copied: Path, tmp_path: Path) -> None:
    write_json(copied / "run.json", {"source": "scenes:45"})
    subset_store(copied, tmp_path / "out", rows=slice(-3, None))
    assert read_json(tmp_path / "out/run.json")["source"] == "scenes:45"
    assert open_store(tmp_path / "out").num_images == 3


def test_wrong_choices_are_refused_and_leave_nothing(pristine: Path, tmp_path: Path) -> None:
    for error, chosen in (
        (JoinError, {"keys": ["nobody"]}),
        (ConfigError, {"keys": []}),
        (ConfigError, {"rows": slice(50, 60)}),
        (ConfigError, {"rows": slice(0, 2), "keys": ["a"]}),
        (UnknownName, {"arrays": ["image/embeding"]}),
    ):
        with pytest.raises(error):
            subset_store(pristine, tmp_path / "out", **chosen)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
