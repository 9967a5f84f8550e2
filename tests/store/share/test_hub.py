"""Pushing to and pulling from a server that speaks the Hub's file API: tree, preupload, LFS batch, commit, resolve with a redirect to another host."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import re
import threading
from collections import Counter
from types import SimpleNamespace

import huggingface_hub.constants
import pytest

from kdstore.errors import DamagedStore, IdentityMismatch, TransferError
from kdstore.store import Cache, open_store, verify_store
from kdstore.store.layout import BESIDE
from kdstore.store.share import Patience, hub, pull_store, push_store, transport
from kdstore.store.share.fetch import Stopped, Transfer
from kdstore.store.share.hub import Hub
from kdstore.store.share.transport import Pace

PLACE = "hf://datasets/lab/store"
TOKEN = "hf_secret"
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's own


class FakeHub:
    """One dataset repository: commits as {path: sha256 of its bytes}, a store of blobs, and what was asked for."""

    def __init__(self):
        self.commits = [{}]
        self.blobs = {}
        self.asked = Counter()
        self.uploaded = Counter()
        self.refuse = Counter()
        self.tokens_at_cdn = []
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def reply(self, status, body=b"", **headers):
                content = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                self.wfile.write(content)

            def answer(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                path = self.path.partition("?")[0]
                for pattern, work in hub.routes.items():
                    if found := re.fullmatch(pattern, path):
                        hub.asked[work.__name__] += 1
                        if hub.refuse[work.__name__]:
                            hub.refuse[work.__name__] -= 1
                            return self.reply(429, {"error": "too many"}, Retry_After="0")
                        if "cdn" not in path and "lfs/" not in path and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                            return self.reply(401, {"error": "no"})
                        return work(self, body, *found.groups())
                return self.reply(404, {"error": path})

            do_GET = do_POST = do_PUT = do_HEAD = answer

        api, data = "/api/datasets/lab/store", "/datasets/lab/store"
        self.routes = {
            api + "(?:/revision/([^/]+))?": self.info,
            api + "/tree/([^/]+)": self.tree,
            api + "/preupload/([^/]+)": self.preupload,
            api + "/commit/([^/]+)": self.commit,
            data + r"\.git/info/lfs/objects/batch": self.batch,
            "/lfs/([0-9a-f]+)": self.upload,
            data + "/resolve/([^/]+)/(.+)": self.resolve,
            "/cdn/([0-9a-f]+)": self.cdn,
        }
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def at(self, revision):
        return self.commits[-1] if revision in (None, "main") else self.commits[int(revision, 16)]

    def info(self, to, body, revision):
        sha = f"{len(self.commits) - 1 if revision in (None, 'main') else int(revision, 16):040x}"
        to.reply(
            200, {"id": "lab/store", "sha": sha, "private": False, "disabled": False, "gated": False, "tags": [], "siblings": [], "likes": 0, "downloads": 0}
        )

    def tree(self, to, body, revision):
        def entry(path, oid):
            blob = self.blobs[oid]
            said = {"type": "file", "path": path, "size": len(blob), "oid": hashlib.sha1(f"blob {len(blob)}\0".encode() + blob).hexdigest()}
            return said | ({} if path.endswith(".json") else {"lfs": {"oid": oid, "size": len(blob), "pointerSize": 130}})

        to.reply(200, [entry(path, oid) for path, oid in self.at(revision).items()])

    def preupload(self, to, body, revision):
        files = json.loads(body)["files"]
        modes = [{"path": f["path"], "uploadMode": "regular" if f["path"].endswith(".json") else "lfs", "shouldIgnore": False} for f in files]
        to.reply(200, {"files": modes})

    def batch(self, to, body):
        objects = []
        for wanted in json.loads(body)["objects"]:
            actions = {} if wanted["oid"] in self.blobs else {"actions": {"upload": {"href": f"{self.url}/lfs/{wanted['oid']}"}}}
            objects.append({**wanted, **actions})
        to.reply(200, {"transfer": "basic", "objects": objects})

    def upload(self, to, body, oid):
        assert hashlib.sha256(body).hexdigest() == oid
        self.uploaded[oid] += 1
        self.blobs[oid] = body
        to.reply(200)

    def commit(self, to, body, revision):
        files = dict(self.commits[-1])
        for line in body.splitlines():
            said = json.loads(line)
            value = said["value"]
            if said["key"] == "file":
                content = base64.b64decode(value["content"])
                oid = hashlib.sha256(content).hexdigest()
                self.blobs[oid] = content
                files[value["path"]] = oid
            elif said["key"] == "lfsFile":
                assert value["oid"] in self.blobs
                files[value["path"]] = value["oid"]
            elif said["key"] == "deletedFile":
                del files[value["path"]]
        self.commits.append(files)
        to.reply(200, {"commitUrl": f"{self.url}/datasets/lab/store/commit/1", "commitOid": f"{len(self.commits) - 1:040x}", "success": True})

    def resolve(self, to, body, revision, path):
        oid = self.at(revision).get(path)
        if oid is None:
            return to.reply(404)
        if path.endswith(".json"):
            return to.reply(200, self.blobs[oid])
        return to.reply(302, Location=f"http://localhost:{self.server.server_port}/cdn/{oid}?signature=secret")

    def cdn(self, to, body, oid):
        self.tokens_at_cdn.append(to.headers.get("Authorization"))
        to.reply(200, self.blobs[oid])


@pytest.fixture
def patience():
    """Patience that never ends on a slow machine: requests are counted."""
    return Patience(backoff=0.01)


@pytest.fixture
def fake(monkeypatch):
    made = FakeHub()
    constants = huggingface_hub.constants
    for name, value in (("ENDPOINT", made.url), ("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True)):
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(Hub, "endpoint", made.url)
    yield made
    made.server.shutdown()
    made.server.server_close()


def test_a_store_goes_to_the_hub_in_bounded_commits_and_comes_back(fake, pristine, tmp_path, patience, monkeypatch):
    monkeypatch.setattr(hub, "COMMIT_FILES", 20)
    monkeypatch.setattr(Hub, "files_at_once", 20)
    pushed = push_store(pristine, PLACE, patience=patience)
    assert pushed.files_sent == pushed.files == 57
    assert len(fake.commits) == 1 + 3 + 1  # three of data, then what lies beside the manifest and the manifest
    assert ["manifest.json" in files for files in fake.commits] == [False] * 4 + [True]
    told = []
    pulled = pull_store(PLACE, tmp_path / "pulled", patience=patience, on_progress=lambda *said: told.append(said))
    assert pulled.digest == open_store(pristine).digest
    assert verify_store(tmp_path / "pulled").ok
    assert set(fake.tokens_at_cdn) == {None}  # the token stays with the Hub
    assert fake.asked["info"] == 1  # the revision is resolved once
    assert fake.asked["resolve"] <= pulled.files + 7
    assert TOKEN not in str(told)
    in_place = open_store(PLACE, Cache(tmp_path / "cache", 2**30))
    assert in_place.gather("image/embedding", [20, 3]).tobytes() == open_store(pristine).gather("image/embedding", [20, 3]).tobytes()


def test_a_push_goes_on_where_it_broke_off_and_a_store_of_few_files_is_one_commit(fake, pristine, sample, tmp_path, patience, monkeypatch):
    monkeypatch.setattr(Hub, "files_at_once", 20)
    fake.refuse["commit"] = 1
    fake.refuse["upload"] = 1
    push_store(pristine, PLACE, patience=patience)
    fake.commits = fake.commits[:3]  # the rest was never committed
    sent = sum(fake.uploaded.values())
    pushed = push_store(pristine, PLACE, patience=patience)
    assert sum(fake.uploaded.values()) == sent  # the data are there: nothing is sent again
    assert pushed.files_sent == pushed.files - 40
    assert push_store(pristine, PLACE, patience=patience).files_sent == 0
    commits = len(fake.commits)
    few = sample.of_images(20)
    few.write(tmp_path / "few")
    monkeypatch.setattr(Hub, "files_at_once", 100)
    with pytest.raises(IdentityMismatch):
        push_store(_other(few, tmp_path), PLACE, patience=patience)
    assert len(fake.commits) == commits
    fake.commits[-1]["notes.txt"] = next(iter(fake.blobs))
    push_store(tmp_path / "few", PLACE, patience=patience)
    assert len(fake.commits) == commits + 1
    listed = set(json.loads((tmp_path / "few/manifest.json").read_text())["files"])
    assert set(fake.commits[-1]) == listed | {"manifest.json", "run.json", "notes.txt"}


def _other(sample, tmp_path):
    import dataclasses

    dataclasses.replace(sample, identity={"teacher": {"name": "another"}}).write(tmp_path / "other")
    return tmp_path / "other"


def test_a_revision_is_one_version_whatever_is_pushed(fake, pristine, sample, tmp_path, patience):
    push_store(pristine, PLACE, patience=patience)
    first = f"{len(fake.commits) - 1:040x}"
    sample.of_images(20).write(tmp_path / "few")
    push_store(tmp_path / "few", PLACE, force=True, patience=patience)
    assert pull_store(f"{PLACE}@{first}", tmp_path / "pulled", patience=patience).digest == open_store(pristine).digest
    assert pull_store(PLACE, tmp_path / "now", patience=patience).digest == open_store(tmp_path / "few").digest


def test_a_damaged_file_is_not_pushed_and_a_refusal_names_no_token(fake, copied, patience, monkeypatch):
    content = bytearray((copied / "image/embedding/c/1/0/0").read_bytes())
    content[5] ^= 1
    (copied / "image/embedding/c/1/0/0").write_bytes(content)
    with pytest.raises(DamagedStore, match="image/embedding/c/1/0/0"):
        push_store(copied, PLACE, patience=patience)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(TransferError, match=r"401|not for you") as refused:
        push_store(copied, PLACE, patience=patience)
    assert "hf_wrong" not in str(refused.value)


def test_every_request_that_the_hub_counts_waits_its_turn(fake, pristine, tmp_path, patience, monkeypatch):
    push_store(pristine, PLACE, patience=patience)
    turns = []
    monkeypatch.setattr(Pace, "wait", lambda pace, pause: turns.append(pace))
    assert pull_store(PLACE, tmp_path / "pulled", patience=patience).whole
    assert len(turns) == fake.asked["resolve"] == 57 + 1 + len(BESIDE)  # the files, the manifest, and what lies beside it
    assert len(set(turns)) == 1


def test_no_more_than_the_limit_begin_in_any_window(monkeypatch):
    now, begun = [100.0], []
    monkeypatch.setattr(transport, "time", SimpleNamespace(monotonic=lambda: now[0]))
    pace = Pace(10, 300.0)
    for i in range(64):
        now[0] += i % 7
        pace.wait(lambda seconds: now.__setitem__(0, now[0] + seconds))
        begun.append(now[0])
    assert all(later - first >= 300.0 for first, later in zip(begun, begun[10:], strict=False))
    assert begun[-1] < 100.0 + 7 * 300.0 + 7 * 7  # and nobody waits longer than that asks for


def test_a_pull_that_is_stopped_does_not_wait_for_its_turn():
    transfer = Transfer([Hub("hf://datasets/lab/store", Patience(), Pace(1, 300.0))], Patience())
    transfer.wait_for(transfer.places[0])
    threading.Timer(0.1, transfer.stop).start()
    with pytest.raises(Stopped):
        transfer.wait_for(transfer.places[0])
