"""Pushing to and pulling from an S3 server (moto's) and one that speaks Google's storage API (gcp-storage-emulator)."""

from __future__ import annotations

import socket
import sys

import pytest

from kdstore.errors import ConfigError, DamagedStore, IdentityMismatch, TransferError
from kdstore.store import Cache, open_store, verify_store
from kdstore.store.share import bucket, pull_store, push_store

SECRET = "not-to-be-shown"
# all of these are of packages below: a response that botocore leaves open, and dates in moto
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    from moto.moto_server.threaded_moto_server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (
            ("AWS_ENDPOINT_URL", f"http://{host}:{port}"),
            ("AWS_ACCESS_KEY_ID", "key"),
            ("AWS_SECRET_ACCESS_KEY", SECRET),
            ("AWS_DEFAULT_REGION", "us-east-1"),
        ):
            patch.setenv(name, value)
        import fsspec

        system = fsspec.filesystem("s3")
        system.mkdir("lab")
        yield system
    server.stop()


def test_a_store_goes_to_a_bucket_and_comes_back(s3, pristine, tmp_path, monkeypatch):
    monkeypatch.setattr(bucket, "RANGE_BYTES", 500)  # several ranges of a file
    pushed = push_store(pristine, "s3://lab/whole")
    assert pushed.files_sent == pushed.files
    pulled = pull_store("s3://lab/whole", tmp_path / "pulled", expect=pushed.digest)
    assert pulled.digest == open_store(pristine).digest
    assert verify_store(tmp_path / "pulled").ok
    assert push_store(pristine, "s3://lab/whole").files_sent == 0
    in_place = open_store(f"s3://lab/whole#{pushed.digest}", Cache(tmp_path / "cache", 2**30))
    assert in_place.gather("image/embedding", [20, 3]).tobytes() == open_store(pristine).gather("image/embedding", [20, 3]).tobytes()


def test_an_interrupted_push_shows_no_store_and_goes_on(s3, pristine, tmp_path, monkeypatch):
    commit, left = bucket.Bucket.commit, [20]

    def cut(self, add, remove=()):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        commit(self, add, remove)

    monkeypatch.setattr(bucket.Bucket, "commit", cut)
    with pytest.raises(KeyboardInterrupt):
        push_store(pristine, "s3://lab/cut")
    monkeypatch.undo()
    with pytest.raises(Exception, match="no store"):
        pull_store("s3://lab/cut", tmp_path / "pulled")
    s3.pipe_file("lab/cut/notes.txt", b"of somebody")
    s3.pipe_file("lab/cut/zarr.json", b"{}")  # of another size
    pushed = push_store(pristine, "s3://lab/cut")
    assert 57 - 20 <= pushed.files_sent <= 57 - 20 + 5
    assert pull_store("s3://lab/cut", tmp_path / "pulled").whole
    assert s3.cat_file("lab/cut/notes.txt") == b"of somebody"


def test_another_store_is_replaced_by_force_and_only_what_it_lists_is_removed(s3, pristine, sample, tmp_path):
    push_store(pristine, "s3://lab/other")
    s3.pipe_file("lab/other/notes.txt", b"of somebody")
    s3.pipe_file("lab/other/manifest.json.sig", b"of the old store, as this is")
    s3.pipe_file("lab/other/stats.json", b"{}")
    import dataclasses

    dataclasses.replace(sample.of_images(20), identity={"teacher": {"name": "another"}}).write(tmp_path / "other")
    with pytest.raises(IdentityMismatch, match="another"):
        push_store(tmp_path / "other", "s3://lab/other")
    assert pull_store("s3://lab/other", tmp_path / "before").digest == open_store(pristine).digest
    push_store(tmp_path / "other", "s3://lab/other", force=True)
    assert pull_store("s3://lab/other", tmp_path / "after").digest == open_store(tmp_path / "other").digest
    listed = {"manifest.json", "run.json", "notes.txt", *open_store(tmp_path / "other").manifest["files"]}
    assert {name.removeprefix("lab/other/") for name in s3.find("lab/other")} == listed


def test_what_is_no_store_is_not_overwritten(s3, pristine):
    s3.pipe_file("lab/array/zarr.json", b"an array of somebody")
    with pytest.raises(IdentityMismatch, match=r"zarr\.json"):
        push_store(pristine, "s3://lab/array")
    s3.pipe_file("lab/site/manifest.json", b'{"name": "a web page"}')
    with pytest.raises(DamagedStore, match="--force"):
        push_store(pristine, "s3://lab/site")
    assert s3.find("lab/site") == ["lab/site/manifest.json"]
    assert push_store(pristine, "s3://lab/site", force=True).files_sent == 57


def test_large_objects_go_in_parts_whose_hash_is_known(s3, tmp_path, monkeypatch):
    from kdstore.store.share.places import matches, open_place
    from kdstore.store.share.transport import Patience

    monkeypatch.setattr("kdstore.store.share.places.PART_BYTES", 5 << 20)
    monkeypatch.setattr(bucket, "PART_BYTES", 5 << 20)
    (tmp_path / "large").write_bytes(bytes(range(256)) * (11 << 12))
    place = open_place("s3://lab/large", Patience())
    place.commit([("large", tmp_path / "large")])
    stored = place.listing()["large"]
    assert stored.algorithm == "s3"
    assert matches(stored, tmp_path / "large", "")
    (tmp_path / "large").write_bytes(bytes(reversed(range(256))) * (11 << 12))
    assert not matches(stored, tmp_path / "large", "")


def test_damage_in_a_bucket_is_named_and_mended_from_a_mirror(s3, pristine, tmp_path, patience):
    push_store(pristine, "s3://lab/damaged")
    path = "image/embedding/c/1/0/0"
    s3.pipe_file(f"lab/damaged/{path}", bytes((pristine / path).stat().st_size))
    s3.rm_file("lab/damaged/text/zarr.json")
    with pytest.raises(TransferError, match=path) as refused:
        pull_store("s3://lab/damaged", tmp_path / "pulled")
    assert "text/zarr.json is not there" in str(refused.value)
    assert SECRET not in str(refused.value)
    assert pull_store("s3://lab/damaged", tmp_path / "pulled", mirrors=[str(pristine)]).whole
    assert verify_store(tmp_path / "pulled").ok


def test_what_a_bucket_refuses_is_named(s3, pristine, patience, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(TransferError, match="s3://lab/nowhere") as refused:
        push_store(pristine, "s3://lab/nowhere", patience=patience)
    assert SECRET not in str(refused.value)
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_store_goes_to_googles_storage_and_comes_back(sample, tmp_path, monkeypatch):
    from gcp_storage_emulator.server import create_server

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = create_server("localhost", port, in_memory=True, default_bucket="lab")
    server.start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://localhost:{port}")
    sample.of_images(20).write(tmp_path / "few")
    try:
        pushed = push_store(tmp_path / "few", "gs://lab/store")
        assert pushed.files_sent == pushed.files
        assert push_store(tmp_path / "few", "gs://lab/store").files_sent == 0
        assert pull_store("gs://lab/store", tmp_path / "pulled").digest == pushed.digest
    finally:
        server.stop()
    assert verify_store(tmp_path / "pulled").ok


def test_without_its_package_a_bucket_names_the_command(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ConfigError, match=r"pip install 'kdstore\[s3\]'"):
        pull_store("s3://lab/whole", tmp_path / "pulled")
