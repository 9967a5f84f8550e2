"""Detached signatures of a store with ordinary SSH keys, made and checked by `ssh-keygen -Y`.

What is signed is the manifest's digest as a line of text and not the file, so that a digest that was sent by mail or printed in a paper is signed too, and a
signature can be checked by hand. Keys, agents, passphrases and lists of allowed signers are OpenSSH's own: no key is ever read here.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from kdstore.errors import ConfigError, SignatureError
from kdstore.jsonfile import write_bytes
from kdstore.store.layout import SIGNATURE
from kdstore.store.manifest import cannot_read, read_manifest

NAMESPACE = "kdstore"
MAX_SIGNATURE_BYTES = 1 << 16


def signed_message(digest: str) -> bytes:
    """Return the bytes that are signed: the digest (`sha256:<hex>`) and a newline."""
    return f"{digest}\n".encode()


def sign_store(path: str | Path, key: str | Path) -> Path:
    """Sign a complete store with a private SSH key, or a public one whose private half an agent holds; returns the new `manifest.json.sig`.

    Raises what `read_manifest` raises, ConfigError where there is no ssh-keygen or no such key, SignatureError where ssh-keygen refuses, DiskFull, CannotWrite.
    """
    digest = read_manifest(Path(path)).digest
    if not Path(key).is_file():
        raise ConfigError(f"There is no key at {key}.", "Give the private key, or the public one if an agent holds it; ssh-keygen -t ed25519 makes one.")
    done = _ssh_keygen("sign", "-f", str(Path(key).absolute()), "-n", NAMESPACE, message=signed_message(digest))
    if done.returncode:
        raise SignatureError(f"ssh-keygen did not sign with {key} ({_reason(done)}).", "Check the key and its passphrase.")
    write_bytes(Path(path) / SIGNATURE, done.stdout)
    return Path(path) / SIGNATURE


def check_store_signature(path: str | Path, allowed_signers: str | Path) -> str:
    """Return which of the allowed signers has signed a store; raises SignatureError, ConfigError, CannotRead and what `read_manifest` raises."""
    digest, file = read_manifest(Path(path)).digest, Path(path) / SIGNATURE
    try:
        with open(file, "rb") as f:
            signature = f.read(MAX_SIGNATURE_BYTES + 1)
    except FileNotFoundError as e:
        raise SignatureError(f"{path} is not signed: it has no {SIGNATURE}.", "Ask its publisher for one: kdstore store sign.") from e
    except OSError as e:
        raise cannot_read(e, file) from e
    return check_signature(digest, signature, allowed_signers)


def check_signature(digest: str, signature: bytes, allowed_signers: str | Path) -> str:
    """Return which of the allowed signers (a file as ssh-keygen(1) describes it) has signed a digest.

    Raises SignatureError for a signature of another digest, by another key or by one whose time is over,
    ConfigError where there is no ssh-keygen or no such list.
    """
    if not Path(allowed_signers).is_file():
        raise ConfigError(f"There is no list of allowed signers at {allowed_signers}.", "Give a file of lines such as: name@lab.org ssh-ed25519 AAAA...")
    if len(signature) > MAX_SIGNATURE_BYTES:
        raise SignatureError(f"The signature has more than {MAX_SIGNATURE_BYTES} bytes, which none has.", "Fetch it again.")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "sig"
        file.write_bytes(signature)
        given = ("-s", str(file), "-f", str(Path(allowed_signers).absolute()))
        found = _ssh_keygen("find-principals", *given)
        for signer in found.stdout.decode(errors="replace").splitlines() if found.returncode == 0 else []:
            # a line's names are patterns, also of whom it leaves out
            if not signer.startswith("!") and _ssh_keygen("verify", *given, "-I", signer, "-n", NAMESPACE, message=signed_message(digest)).returncode == 0:
                return signer
    if found.returncode:
        raise SignatureError(f"{digest} is signed by nobody in {allowed_signers} ({_reason(found)}).", "Do not use it, or list the key of whom you trust.")
    raise SignatureError(f"The signature is not one of {digest} for kdstore, or its key's time is over.", "Fetch both again; do not use it as it is.")


def _ssh_keygen(action: str, *arguments: str, message: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(["ssh-keygen", "-Y", action, *arguments], input=message, capture_output=True, check=False)
    except FileNotFoundError as e:
        raise ConfigError("There is no ssh-keygen on this machine, which makes and checks signatures.", "Install openssh-client 8.2 or newer.") from e


def _reason(done: subprocess.CompletedProcess[bytes]) -> str:
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    return lines[-1].rstrip(".")[:200] if lines else f"code {done.returncode}"
