"""Pulling from a web server that fails in every way: the digest is right in the end, or the error names the file."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest

from kdstore.errors import DamagedStore, DiskFull, IdentityMismatch, IncompleteStore, StoreError, StoreNotFound, TransferError
from kdstore.store import open_store, verify_store
from kdstore.store.layout import BESIDE
from kdstore.store.share import pull_store

SHARD = "image/embedding/c/1/0/0"
PASSING = ("429:0", "429:\xb2", "500", "503:0", "reset", "short", "hang", "slow", "trickle", "lines", "trailers")
PASSING += ("html", "wrong", "encoded", "other-range", "twice", "norange", "digits")
LASTING = ("404", "403", "429:0", "500", "hang", "html", "wrong", "redirect:file:///etc/passwd", "redirect:http://user:word@127.0.0.1/x")


def whole(path, pristine):
    report = verify_store(path)
    return report.ok and report.digest == open_store(pristine).digest and not report.absent and not (path / "_build").exists()


def test_what_passes_is_waited_for(web, pristine, tmp_path, patience):
    shards = sorted(path for path in open_store(pristine).manifest["files"] if "/c/" in path)
    for shard, fault in zip(shards, PASSING, strict=False):
        web.faults[shard] = ["short", fault]  # of an answer to a range, too
    pulled = pull_store(web.url, tmp_path / "pulled", patience=patience)
    assert pulled.whole
    assert whole(tmp_path / "pulled", pristine)
    assert not any(web.faults.values())  # all of them came


def test_what_lasts_names_the_files_and_the_mirror_has_them(web, mirror, pristine, tmp_path, patience):
    target, shards = tmp_path / "pulled", sorted(path for path in open_store(pristine).manifest["files"] if "/c/" in path)
    failing = dict(zip(shards, LASTING, strict=False))
    web.faults.update({path: [fault] for path, fault in failing.items()})
    web.forever = True
    with pytest.raises(TransferError, match=f"{len(LASTING)} of 57 files") as refused:
        pull_store(web.url, target, patience=patience)
    assert all(path in str(refused.value) for path in shards[:4])
    assert "word" not in str(refused.value)
    with pytest.raises(IncompleteStore, match="pull"):
        open_store(target)
    web.asked.clear()
    pulled = pull_store(web.url, target, mirrors=[mirror.url], patience=patience)
    assert whole(target, pristine)
    assert {path for path, *_ in web.asked} == {*failing, "manifest.json", *BESIDE}  # no file twice
    assert pulled.kept_bytes + sum((pristine / path).stat().st_size for path in failing) == pulled.bytes


def test_a_full_disk_is_one_error_and_what_came_stays(web, pristine, tmp_path, patience, monkeypatch):
    left, write = [20], os.write

    def fill(fd, content):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, content)

    monkeypatch.setattr(os, "write", fill)
    with pytest.raises(DiskFull):
        pull_store(web.url, tmp_path / "pulled", patience=patience, parallel=2)
    monkeypatch.setattr(os, "write", write)
    assert pull_store(web.url, tmp_path / "pulled", patience=patience).kept_bytes > 0
    assert whole(tmp_path / "pulled", pristine)


def test_mirrors_that_the_card_lists_are_used_and_no_files_of_ours(web, mirror, copied, pristine, tmp_path, patience):
    (copied / "README.md").write_text(f"---\nlicense: cc0-1.0\nmirrors:\n- {pristine}\n- file://{pristine}\n- {mirror.url}\n---\n# A store\n")
    web.root = copied
    (copied / SHARD).unlink()
    pull_store(web.url, tmp_path / "pulled", patience=patience)
    assert [path for path, *_ in mirror.asked] == [SHARD]
    assert whole(tmp_path / "pulled", pristine)


def test_a_broken_transfer_goes_on_inside_the_file(web, pristine, tmp_path, patience):
    size = (pristine / SHARD).stat().st_size
    web.faults[SHARD] = ["short", "short", "short", "short"]
    pulled = pull_store(web.url, tmp_path / "pulled", patience=patience)
    asked = [(range_, headers.get("If-Range")) for path, range_, headers in web.asked if path == SHARD]
    assert len(asked) == 5
    assert asked[0] == (None, None)
    assert all(range_ and tag for range_, tag in asked[1:])
    assert pulled.received_bytes < pulled.bytes + size / 4 + 2**17  # what lies beside the manifest counts too
    assert whole(tmp_path / "pulled", pristine)


def test_a_server_that_forgets_what_it_sent_is_given_up(web, tmp_path, patience):
    web.faults[SHARD] = ["short", "short", "norange-short"] * 20
    with pytest.raises(TransferError, match=SHARD):
        pull_store(web.url, tmp_path / "pulled", patience=patience)
    assert len(web.faults[SHARD]) > 40


def test_answers_in_chunks_take_one_request_each(web, pristine, tmp_path, patience):
    web.faults["*"], web.forever = ["chunked"], True
    pull_store(web.url, tmp_path / "pulled", patience=patience, parallel=2)
    assert whole(tmp_path / "pulled", pristine)
    assert sum("/c/" in path for path, *_ in web.asked) == len({path for path, *_ in web.asked if "/c/" in path})


def test_a_file_that_changed_meanwhile_comes_anew(web, pristine, tmp_path, patience):
    web.faults[SHARD] = ["short", "other-tag"]
    pull_store(web.url, tmp_path / "pulled", patience=patience)
    assert whole(tmp_path / "pulled", pristine)


def test_a_pull_stops_when_it_is_interrupted_and_goes_on(web, pristine, tmp_path, patience):
    def interrupt(stage, done, total, note=""):
        if stage == "bytes" and done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull_store(web.url, tmp_path / "pulled", patience=patience, parallel=1, on_progress=interrupt)
    pulled = pull_store(web.url, tmp_path / "pulled", patience=patience)
    assert pulled.kept_bytes > 0
    assert whole(tmp_path / "pulled", pristine)


def test_a_pinned_digest_is_the_one_that_comes(web, mirror, pristine, tmp_path, patience):
    digest, other = open_store(pristine).digest, "sha256:" + "0" * 64
    with pytest.raises(IdentityMismatch, match=other):
        pull_store(web.url, tmp_path / "refused", expect=other, patience=patience)
    assert not (tmp_path / "refused").exists()
    web.faults["manifest.json"], web.forever = ["html"], True
    with pytest.raises(DamagedStore, match="no manifest"):
        pull_store(web.url, tmp_path / "refused", patience=patience)
    assert pull_store(web.url, tmp_path / "pulled", expect=digest, mirrors=[mirror.url], patience=patience).digest == digest


def test_where_there_is_no_store_nothing_is_made(web, tmp_path, patience):
    with pytest.raises(StoreNotFound, match="404"):
        pull_store(web.url + "/elsewhere", tmp_path / "pulled", patience=patience)
    with pytest.raises(TransferError, match="no connection"):
        pull_store("http://127.0.0.1:1/x", tmp_path / "pulled", patience=patience)
    assert not (tmp_path / "pulled").exists()


def test_a_pull_onto_a_damaged_store_repairs_it(web, pristine, copied, patience):
    content = bytearray((copied / SHARD).read_bytes())
    content[100] ^= 1
    (copied / SHARD).write_bytes(content)
    (copied / "text/embedding/c/0/0").unlink()
    pulled = pull_store(web.url, copied, patience=patience)
    assert whole(copied, pristine)
    assert {path for path, *_ in web.asked if "/c/" in path} == {SHARD, "text/embedding/c/0/0"}
    assert pulled.kept_bytes < pulled.bytes


def test_another_store_is_replaced_only_by_force_and_then_wholly(web, sample, pristine, tmp_path, patience):
    other = sample.of_images(20)
    rows = [(f"other {key}", captions) for key, captions in other.rows]
    from dataclasses import replace

    from kdstore.store import Plan

    other = replace(other, rows=rows, plan=Plan.freeze(rows, unit_rows=16), identity={"teacher": {"name": "another"}})
    other.write(tmp_path / "target")
    (tmp_path / "target/notes.txt").write_text("mine")
    digest = open_store(tmp_path / "target").digest
    with pytest.raises(IdentityMismatch, match="another"):
        pull_store(web.url, tmp_path / "target", patience=patience)
    assert open_store(tmp_path / "target").digest == digest

    def looks(stage, done, total, note=""):  # a reader sees the old store all the time
        assert open_store(tmp_path / "target").gather("image/embedding", [3], [1]).shape == (1, 6)

    pull_store(web.url, tmp_path / "target", force=True, patience=patience, on_progress=looks)
    assert (tmp_path / "target/notes.txt").read_text() == "mine"
    (tmp_path / "target/notes.txt").unlink()
    assert whole(tmp_path / "target", pristine)


def test_the_rows_are_those_that_were_published(web, pristine, tmp_path, patience):
    pull_store(web.url, tmp_path / "pulled", patience=patience)
    ours, theirs = open_store(pristine), open_store(tmp_path / "pulled")
    for name in ours.arrays:
        np.testing.assert_array_equal(theirs.gather(name, np.arange(ours.arrays[name].shape[0])), ours.gather(name, np.arange(ours.arrays[name].shape[0])))


def test_a_place_that_is_none_is_refused(tmp_path, patience):
    for source, said in (("ftp://host/x", "ftp"), ("hf://datasets/x", "dataset"), ("https:///x", "host"), ("s3://", "bucket")):
        with pytest.raises((StoreError, ValueError), match=said):
            pull_store(source, tmp_path / "pulled", patience=patience)
