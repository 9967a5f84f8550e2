"""Places that are up to no good: nothing is written outside the target, nothing secret is sent on or shown."""

from __future__ import annotations

import base64
import functools
import json
import shutil

import pytest

from kdstore.errors import DamagedStore, DiskFull, IdentityMismatch, KdstoreError, TransferError
from kdstore.jsonfile import digest_of, write_json
from kdstore.store import open_store
from kdstore.store.share import pull_store, push_store
from kdstore.store.share.transport import redacted, without_secrets

SHARD = "image/embedding/c/1/0/0"


def rewrite(store, change):
    content = json.loads((store / "manifest.json").read_text())
    change(content)
    write_json(store / "manifest.json", content)


@pytest.mark.parametrize(
    "path", ["../outside", "/outside", "a/../../outside", "image\\..\\outside", "Image/zarr.json", "manifest.json", "part.json", "_build/x", "a//b", "e\u0301"]
)
def test_a_path_that_leaves_the_store_or_means_two_files_is_refused(copied, tmp_path, path):
    rewrite(copied, lambda content: content["files"].update({path: {"size": 1, "sha256": "0" * 64}}))
    with pytest.raises(DamagedStore, match="path inside"):
        pull_store(str(copied), tmp_path / "below/target")
    assert not (tmp_path / "below").exists()


def test_sizes_that_lie_are_refused_before_anything_is_written(copied, tmp_path, patience):
    rewrite(copied, lambda content: content["files"][SHARD].update(size=1 << 60))
    with pytest.raises(DiskFull, match="free"):
        pull_store(str(copied), tmp_path / "target")
    assert not (tmp_path / "target").exists()
    rewrite(copied, lambda content: content["files"][SHARD].update(size=5))
    with pytest.raises(TransferError, match=SHARD):
        pull_store(str(copied), tmp_path / "other", patience=patience)


def test_a_manifest_of_ten_gigabytes_is_not_read(copied, tmp_path):
    with open(copied / "manifest.json", "r+b") as f:
        f.truncate(10 << 30)
    with pytest.raises(KdstoreError, match="larger than"):
        pull_store(str(copied), tmp_path / "target")


def test_a_folder_of_the_target_that_is_a_link_is_not_written_through(pristine, tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "target/_build").mkdir(parents=True)
    (tmp_path / "target/image").symlink_to(tmp_path / "outside")
    with pytest.raises(DamagedStore, match="link"):
        pull_store(str(pristine), tmp_path / "target")
    assert not any((tmp_path / "outside").iterdir())


def test_credentials_stay_with_their_host_and_out_of_messages(web, mirror, pristine, tmp_path, patience):
    place = web.url.replace("http://", "http://me:secret@") + "/?signature=hidden"
    web.faults[SHARD] = [f"redirect:{mirror.url}/{SHARD}"]
    told = []
    pulled = pull_store(place, tmp_path / "target", patience=patience, on_progress=lambda *said: told.append(said))
    asked = {path: headers for path, _, headers in web.asked}
    assert asked[SHARD]["Authorization"] == "Basic " + base64.b64encode(b"me:secret").decode()
    assert [headers.get("Authorization") for path, _, headers in mirror.asked] == [None]
    shutil.rmtree(tmp_path / "target")
    web.faults[SHARD], web.forever = ["403"], True
    with pytest.raises(TransferError) as refused:
        pull_store(place, tmp_path / "target", patience=patience)
    written = [file.read_bytes() for file in tmp_path.rglob("*.json")]
    for secret in ("secret", "hidden"):
        assert secret not in f"{refused.value} {pulled} {told}"
        assert not any(secret.encode() in content for content in written)


@pytest.mark.parametrize("to", ["file:///etc/passwd", "ftp://127.0.0.1/x", "http://user:word@127.0.0.1:1/x", "http://[", "{here}"])
def test_a_redirect_that_is_not_safe_is_not_followed(web, tmp_path, patience, to):
    web.faults["manifest.json"], web.forever = [f"redirect:{to.format(here=web.url + '/manifest.json')}"], True
    with pytest.raises(TransferError, match="redirected") as refused:
        pull_store(web.url, tmp_path / "target", patience=patience)
    assert "word" not in str(refused.value)


def test_what_lies_beside_the_manifest_is_bounded_and_cannot_end_a_pull(copied, tmp_path):
    (copied / "run.json").write_text('{"digest": "sha256:0"}')
    with open(copied / "README.md", "wb") as f:
        f.truncate(1 << 30)
    told = []
    pull_store(str(copied), tmp_path / "target", on_progress=lambda stage, done, total, note="": told.append(note))
    assert {"run.json", "README.md"} == {note.partition(",")[0] for note in told if "beside" in note}
    assert open_store(tmp_path / "target")


def test_a_card_that_unfolds_without_end_is_read_in_no_time(copied, pristine, tmp_path):
    folded = "\n".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}" for i in range(1, 12))
    (copied / "README.md").write_text(f"---\na0: &a0 {{k: v}}\n{folded}\n---\n")
    assert pull_store(str(copied), tmp_path / "target").whole


def test_a_manifest_that_lists_no_shard_of_an_array_is_damage(copied, tmp_path):
    rewrite(copied, lambda content: content["files"].pop(SHARD))
    with pytest.raises(DamagedStore, match=SHARD):
        pull_store(str(copied), tmp_path / "target")


def test_what_a_link_leads_to_is_neither_pulled_nor_sent_on(copied, tmp_path):
    (tmp_path / "private").write_text("my key")
    (copied / "README.md").symlink_to(tmp_path / "private")
    told = []
    pull_store(str(copied), tmp_path / "target", on_progress=lambda stage, done, total, note="": told.append(note))
    assert not (tmp_path / "target/README.md").exists()
    assert any("README.md" in note and "is a link" in note for note in told)


def test_an_identity_nested_deeper_than_any_is_refused_in_words(copied, pristine, tmp_path):
    pull_store(str(pristine), tmp_path / "target")
    deep = functools.reduce(lambda inside, _: {"a": inside}, range(800), {"a": "b"})

    def change(content):
        content["identity"] = deep
        content["identity_digest"] = digest_of(deep)

    rewrite(copied, change)
    with pytest.raises(IdentityMismatch):
        pull_store(str(copied), tmp_path / "target")


def test_a_web_server_takes_no_store(pristine, web):
    with pytest.raises(KdstoreError, match="read only"):
        push_store(pristine, web.url)


def test_what_is_shown_of_a_url_holds_no_secret():
    assert redacted("https://me:secret@host:8/a/b?key=hidden#more") == "https://host:8/a/b"
    for cut in "/?#":
        assert "se" not in redacted(f"https://me:se{cut}cret@host/a").replace("read", "")
    said = without_secrets("cannot GET https://me:secret@host/a?X-Amz-Signature=hidden: no")
    assert said == "cannot GET https://host/a no"
