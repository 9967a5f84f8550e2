"""Signatures by real keys and the real ssh-keygen: who signed what, and nothing else, is believed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from kdstore.errors import ConfigError, DamagedStore, SignatureError
from kdstore.jsonfile import read_json, write_json
from kdstore.store import check_signature, check_store_signature, open_store, sign_store, verify_store


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys `lab` and `other`, and lists of allowed signers that name one of them each."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("lab", "other"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", folder / name], check=True)
        public = (folder / f"{name}.pub").read_text()
        (folder / f"{name}.allowed").write_text(f'# signers\n!guest@{name}.edu,release@{name}.org,*@{name}.edu namespaces="kdstore" {public}')
    return folder


def test_a_signature_says_who_signed_and_changes_neither_the_digest_nor_what_verify_says(copied: Path, keys: Path) -> None:
    digest = open_store(copied).digest
    sign_store(copied, keys / "lab")
    assert "lab.org" in check_store_signature(copied, keys / "lab.allowed")
    assert open_store(copied).digest == digest
    assert verify_store(copied).ok
    by_hand = ["ssh-keygen", "-Y", "verify", "-f", keys / "lab.allowed", "-I", "release@lab.org", "-n", "kdstore", "-s", copied / "manifest.json.sig"]
    assert subprocess.run(by_hand, input=f"{digest}\n".encode(), capture_output=True).returncode == 0


def test_another_key_another_store_and_another_use_of_the_key_are_refused(copied: Path, keys: Path, tmp_path: Path) -> None:
    sign_store(copied, keys / "lab")
    with pytest.raises(SignatureError, match="signed by nobody in"):
        check_store_signature(copied, keys / "other.allowed")
    signature = (copied / "manifest.json.sig").read_bytes()
    with pytest.raises(SignatureError, match="is not one of sha256:00"):
        check_signature(f"sha256:{0:064x}", signature, keys / "lab.allowed")
    for_mail = subprocess.run(
        ["ssh-keygen", "-Y", "sign", "-f", keys / "lab", "-n", "mail"], input=f"{open_store(copied).digest}\n".encode(), capture_output=True, check=True
    )
    (tmp_path / "any").write_text(f"lab@lab.org {(keys / 'lab.pub').read_text()}")
    with pytest.raises(SignatureError, match="for kdstore"):
        check_signature(open_store(copied).digest, for_mail.stdout, tmp_path / "any")


def test_a_changed_manifest_is_no_longer_signed(copied: Path, keys: Path) -> None:
    sign_store(copied, keys / "lab")
    manifest = copied / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b"scenes-S", b"scenes-L"))
    with pytest.raises(DamagedStore):
        check_store_signature(copied, keys / "lab.allowed")
    write_json(manifest, {**read_json_without_digest(copied), "note": "forged"})  # with a digest that fits
    with pytest.raises(SignatureError, match="is not one of"):
        check_store_signature(copied, keys / "lab.allowed")


def read_json_without_digest(store: Path) -> dict[str, object]:
    shutil.copy(store / "manifest.json", store / "copy.json")
    (store / "copy.json").write_bytes((store / "copy.json").read_bytes().replace(b"scenes-L", b"scenes-S"))
    return read_json(store / "copy.json")


def test_what_is_missing_is_named(copied: Path, keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SignatureError, match=r"has no manifest\.json\.sig"):
        check_store_signature(copied, keys / "lab.allowed")
    (copied / "manifest.json.sig").write_bytes(b"no signature")
    with pytest.raises(SignatureError, match="signed by nobody"):
        check_store_signature(copied, keys / "lab.allowed")
    with pytest.raises(ConfigError, match="no list of allowed signers"):
        check_store_signature(copied, keys / "nowhere")
    with pytest.raises(ConfigError, match="no key at"):
        sign_store(copied, keys / "nowhere")
    with pytest.raises(SignatureError, match="did not sign"):
        sign_store(copied, keys / "lab.allowed")
    assert (copied / "manifest.json.sig").read_bytes() == b"no signature"
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="no ssh-keygen"):
        check_store_signature(copied, keys / "lab.allowed")
