"""Pulling what was signed, and moving to a version with images withdrawn."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from kdstore.errors import IdentityMismatch, SignatureError
from kdstore.store import open_store, sign_store, verify_store, withdraw_rows
from kdstore.store.share import Choice, pull_store, push_store


def test_only_what_an_allowed_signer_has_signed_is_pulled(copied, tmp_path):
    for name in ("lab", "other"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", tmp_path / name], check=True)
        (tmp_path / f"{name}.allowed").write_text(f"{name}@lab.org {(tmp_path / f'{name}.pub').read_text()}")
    with pytest.raises(SignatureError, match="not shown to be signed"):
        pull_store(str(copied), tmp_path / "pulled", signed_by=tmp_path / "lab.allowed")
    sign_store(copied, tmp_path / "lab")
    with pytest.raises(SignatureError):
        pull_store(str(copied), tmp_path / "pulled", signed_by=tmp_path / "other.allowed")
    assert not (tmp_path / "pulled").exists()
    shutil.copytree(copied, tmp_path / "unsigned", ignore=lambda folder, names: {"manifest.json.sig"} & {*names})
    pull_store(str(tmp_path / "unsigned"), tmp_path / "pulled", mirrors=[str(copied)], signed_by=tmp_path / "lab.allowed")
    assert (tmp_path / "pulled/manifest.json.sig").read_bytes() == (copied / "manifest.json.sig").read_bytes()


@pytest.mark.parametrize("choice", [Choice(), Choice(("image/embedding",), slice(0, 10))])
def test_a_pull_moves_to_the_version_without_withdrawn_images(copied, sample, tmp_path, choice):
    place, target = tmp_path / "place", tmp_path / "target"
    push_store(copied, str(place))
    pull_store(str(place), target, choice=choice)
    old_bytes = (target / "image/embedding/c/0/0/0").read_bytes()
    new = withdraw_rows(copied, tmp_path / "new", keys=[sample.rows[3][0]])
    push_store(tmp_path / "new", str(place))
    pulled = pull_store(str(place), target, choice=choice)
    assert pulled.digest == new.digest
    assert verify_store(target).ok
    assert (target / "image/embedding/c/0/0/0").read_bytes() != old_bytes
    assert open_store(target).withdrawn.tolist() == [3]
    assert 0 < pulled.kept_bytes < pulled.bytes  # what both have alike stays
    with pytest.raises(IdentityMismatch):  # and nothing brings the images back
        pull_store(str(copied), target, choice=choice)
    with pytest.raises(IdentityMismatch):
        push_store(copied, str(place))


def test_a_store_that_lost_its_manifest_is_pulled_anew_by_force_alone(copied, pristine, tmp_path):
    (copied / "manifest.json").write_text("{}")
    with pytest.raises(Exception, match="--force"):
        pull_store(str(pristine), copied)
    assert pull_store(str(pristine), copied, force=True).kept_bytes > 0
    assert verify_store(copied).ok
    shutil.rmtree(copied)
