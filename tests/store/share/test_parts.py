"""Pulling a part: it joins, verifies and reads as what it is, and later pulls complete it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from kdstore.cli import app
from kdstore.data.source import Caption
from kdstore.errors import ConfigError, JoinError, MissingFeature, UnknownName
from kdstore.store import Encoding, join_sources, open_store, recode_store, subset_store, verify_store
from kdstore.store.share import Choice, pull_store


@dataclass
class Named:
    """A source of keys alone."""

    keys: list[str]
    spec: str = "named"
    notices: tuple[str, ...] = field(default=())

    def __len__(self):
        return len(self.keys)

    def key(self, i):
        return self.keys[i]

    def captions(self, i):
        return (Caption("other words"),)


def test_some_arrays_of_a_store_verify_and_say_what_they_lack(pristine, tmp_path):
    target = tmp_path / "part"
    pulled = pull_store(str(pristine), target, choice=Choice(("image/embedding",)))
    part = open_store(target)
    assert not pulled.whole
    assert pulled.bytes < pulled.of_bytes
    assert set(part.arrays) == {"image/embedding", "image/valid", "text/valid"}
    assert part.digest == open_store(pristine).digest
    assert part.summary()["part"]["of_files"] == pulled.of_files
    assert verify_store(target).ok
    assert verify_store(target, sample="50%").ok
    assert verify_store(target).absent == pulled.of_files - pulled.files
    with pytest.raises(MissingFeature, match=f"kdstore store pull {pristine} {target}"):
        part.gather("text/embedding", [0])
    (target / "image/embedding/c/1/0/0").unlink()
    assert [damage.path for damage in verify_store(target).damaged] == ["image/embedding/c/1/0/0"]


def test_rows_of_a_part_read_and_others_name_the_pull(pristine, tmp_path):
    target, whole = tmp_path / "part", open_store(pristine)
    pull_store(str(pristine), target, choice=Choice(("image/embedding", "text/embedding"), slice(18, 20)))
    part = open_store(target)
    assert np.flatnonzero(part.holds("image/embedding")).tolist() == list(range(16, 32))
    np.testing.assert_array_equal(part.gather("image/embedding", [18, 30]), whole.gather("image/embedding", [18, 30]))
    texts = np.arange(whole.offsets[18], whole.offsets[20])
    assert part.holds("text/embedding")[texts].all()
    with pytest.raises(MissingFeature, match=r"rows 0 to 15.*store pull"):
        part.gather("image/embedding", [18, 3])
    pull_store(str(pristine), target, choice=Choice(("image/embedding",), slice(0, 1)))
    assert np.flatnonzero(open_store(target).holds("image/embedding")).tolist() == list(range(32))
    pulled = pull_store(str(pristine), target)
    assert pulled.whole
    assert not (target / "part.json").exists()
    assert verify_store(target).ok
    assert verify_store(target).absent == 0


@settings(max_examples=5, deadline=None)
@given(st.lists(st.tuples(st.sets(st.sampled_from(["image/embedding", "image/tokens", "text/embedding"])), st.integers(0, 44), st.integers(1, 45)), max_size=3))
def test_parts_in_any_order_hold_what_was_asked_for_and_complete_each_other(pristine, tmp_path_factory, steps):
    target, whole, received = tmp_path_factory.mktemp("parts") / "store", open_store(pristine), 0
    for arrays, start, rows in steps:
        pulled = pull_store(str(pristine), target, choice=Choice(tuple(sorted(arrays)), slice(start, start + rows)))
        received += pulled.bytes - pulled.kept_bytes
        part = open_store(target)
        for name in arrays - {"text/embedding"}:
            asked = np.arange(start, min(start + rows, 45))
            np.testing.assert_array_equal(part.gather(name, asked), whole.gather(name, asked))
        assert verify_store(target).ok
    pulled = pull_store(str(pristine), target)
    assert received + pulled.bytes - pulled.kept_bytes == pulled.of_bytes  # nothing came twice
    assert verify_store(target).ok
    assert pulled.whole


def test_keys_and_sources_choose_the_rows_that_join(web, pristine, tmp_path, patience):
    keys = open_store(pristine).keys()
    told = []
    choice = Choice(("image/embedding",), keys=(str(keys[40]), "not there"))
    pull_store(web.url, tmp_path / "keys", choice=choice, patience=patience, on_progress=lambda stage, done, total, note="": told.append(note))
    assert np.flatnonzero(open_store(tmp_path / "keys").holds("image/embedding")).tolist() == list(range(32, 45))
    assert any("1 of 2 keys are not in the store" in note for note in told)
    web.asked.clear()
    source = Named([str(keys[1]), "new", str(keys[5])])
    pull_store(web.url, tmp_path / "for", choice=Choice(("image/embedding",), source=source), patience=patience)
    part = open_store(tmp_path / "for")
    joined = join_sources(part, source)
    assert part.holds("image/embedding")[joined.source_row_of_store >= 0].all()
    assert [path for path, *_ in web.asked if path.startswith("image/embedding/c/")] == ["image/embedding/c/0/0/0"]
    with pytest.raises(JoinError):
        pull_store(web.url, tmp_path / "none", choice=Choice(keys=("not there",)), patience=patience)


def test_a_dry_run_tells_the_bytes_and_writes_nothing(web, pristine, tmp_path, patience):
    choice = Choice(("image/embedding",), slice(0, 10))
    told = pull_store(web.url, tmp_path / "part", choice=choice, dry_run=True, patience=patience)
    assert not (tmp_path / "part").exists()
    came = pull_store(web.url, tmp_path / "part", choice=choice, patience=patience)
    assert (told.files, told.bytes, told.digest) == (came.files, came.bytes, came.digest)
    again = pull_store(web.url, tmp_path / "part", choice=choice, dry_run=True, patience=patience)
    assert again.kept_bytes == again.bytes


def test_what_cannot_be_chosen_is_refused(pristine, tmp_path):
    with pytest.raises(UnknownName, match="image/embedding"):
        pull_store(str(pristine), tmp_path / "x", choice=Choice(("image/embeding",)))
    with pytest.raises(ConfigError):
        Choice(rows=slice(0, 1), keys=("a",))
    with pytest.raises(ConfigError, match="45"):
        pull_store(str(pristine), tmp_path / "y", choice=Choice(rows=slice(100, 200)))
    with pytest.raises(ConfigError, match="push"):
        pull_store(str(pristine), "s3://bucket/x")


def test_a_part_is_made_into_another_store_only_of_rows_that_it_has(pristine, tmp_path):
    target = tmp_path / "part"
    pull_store(str(pristine), target, choice=Choice(rows=slice(0, 16)))
    with pytest.raises(MissingFeature, match="store pull"):
        recode_store(target, tmp_path / "recoded", Encoding(codec="zstd"))
    assert not (tmp_path / "recoded").exists()
    assert subset_store(target, tmp_path / "subset", rows=slice(2, 9)).images == 7
    assert "no damage in this part" in CliRunner().invoke(app, ["store", "verify", str(target)]).output


def test_a_part_json_that_lies_is_damage(pristine, tmp_path):
    target = tmp_path / "part"
    pull_store(str(pristine), target, choice=Choice(("image/embedding",)))
    said = json.loads((target / "part.json").read_text())
    said["files"].append("../outside")
    (target / "part.json").write_text(json.dumps(said))
    with pytest.raises(Exception, match=r"part\.json"):
        open_store(target)
