"""A store in another lab: the images there are fewer, in another order, renamed and encoded again, and what joins is what the teacher saw."""

import shutil

import numpy as np
import pytest
from PIL import Image

from kdstore.data.sources import open_source
from kdstore.distill.config import DistillConfig
from kdstore.distill.train import distill
from kdstore.errors import JoinError
from kdstore.extract.config import ExtractConfig
from kdstore.extract.run import extract
from kdstore.store import join_sources, open_store, report_join
from kdstore.store.share import Choice, pull_store

IMAGES = 12
CAPTIONS = [f"picture number {k}" for k in range(IMAGES)]


def picture(k):
    return Image.fromarray(np.random.default_rng(k).integers(0, 256, (64, 70, 3), dtype=np.uint8))


def write_table(folder, names):
    rows = "".join(f"{name},{CAPTIONS[k]}\n" for name, k in names)
    (folder / "metadata.csv").write_text("file_name,caption\n" + rows)


def test_a_store_joins_with_the_images_that_another_lab_still_has(tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    theirs.mkdir()
    for k in range(IMAGES):
        picture(k).save(ours / f"{k:02}.png")
    write_table(ours, [(f"{k:02}.png", k) for k in range(IMAGES)])
    extract(ExtractConfig(teacher="scenes-T", untrained_seed=0, data=str(ours), out=str(tmp_path / "published"), unit_rows=8, device="cpu"))
    pull_store(str(tmp_path / "published"), tmp_path / "pulled")

    gone, again, renamed = {1, 7}, {3, 8}, {5, 10}
    names = []
    for k in sorted(set(range(IMAGES)) - gone, reverse=True):  # another order
        name = f"photo-{k}.png" if k in renamed else f"{k:02}.png"
        if k in again:
            picture(k).save(theirs / name, compress_level=0)  # the same pixels in other bytes
        else:
            shutil.copyfile(ours / f"{k:02}.png", theirs / name)
        names.append((name, k))
    picture(99).save(theirs / "new.png")
    write_table(theirs, [*names, ("new.png", 0)])

    store, source = open_store(tmp_path / "pulled"), open_source(str(theirs))
    report = report_join(store, source)
    assert (report.images, report.pairs, report.by) == (IMAGES, len(names) + 1, "key")
    assert (report.matched, report.matched_by_content) == (IMAGES - len(gone | renamed), len(renamed))
    assert (report.missing_in_source, report.missing_in_store) == (len(gone), 1)
    assert (report.content_differs, set(report.differing_keys)) == (len(again), {f"{k:02}.png" for k in again})

    by_key, by_content = join_sources(store, source), join_sources(store, source, by_content=True)
    for join, joined in ((by_key, set(range(IMAGES)) - gone - renamed), (by_content, set(range(IMAGES)) - gone)):
        assert set(np.flatnonzero(join.source_row_of_store >= 0).tolist()) == joined
        for row in joined:
            assert names[join.source_row_of_store[row]][1] == row
            assert join.store_row_of_source[join.source_row_of_store[row]] == row

    settings = {"cache": str(tmp_path / "pulled"), "data": str(theirs), "student": "scenes-T", "loss": "crd", "batch_size": 8, "epochs": 1, "device": "cpu"}
    with pytest.raises(JoinError, match="not the one the store was extracted from"):
        distill(DistillConfig(**settings, out=str(tmp_path / "refused")))
    result = distill(DistillConfig(**settings, join="content", changed_images="allow", out=str(tmp_path / "run")))
    assert result.pairs == IMAGES - len(gone)
    assert result.left_out == {"not in the source": len(gone), "not in the store": 1}

    pull_store(str(tmp_path / "published"), tmp_path / "part", choice=Choice(rows=slice(0, 8)))
    of_part = settings | {"cache": str(tmp_path / "part"), "batch_size": 4, "out": str(tmp_path / "of-part")}
    result = distill(DistillConfig(**of_part, join="content", changed_images="allow"))
    assert result.pairs == 8 - len(gone)
    assert result.left_out == {"not in the source": len(gone), "not in the store": 1, "not in this part of the store": IMAGES - 8}
