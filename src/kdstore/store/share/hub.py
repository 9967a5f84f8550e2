"""Datasets of the Hugging Face Hub (`hf://datasets/ORG/NAME[@revision]`).

Reading resolves the revision to a commit once, so that a pull sees one version whatever is pushed meanwhile, and then asks for whole files, each one request
of those that the Hub counts. Writing goes through the commit API of huggingface_hub, which uploads data only where the Hub does not have it.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kdstore.address import redacted
from kdstore.errors import ConfigError
from kdstore.store.share.transport import Body, Failure, Pace, Patience, Stored
from kdstore.store.share.web import Web, retry_after

COMMIT_FILES = 64  # the Hub asks for about 100 in a commit
RESOLVES, RESOLVE_SECONDS = 2500, 300.0  # it answers 3,000 in five minutes to whoever has no account
_NAME = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@([\w./-]+))?/?")


class Hub:
    """The files of a dataset repository at one revision."""

    files_at_once = COMMIT_FILES
    parallel = 1
    endpoint: str | None = None
    """Of another server than the one that the environment names (HF_ENDPOINT)."""

    def __init__(self, url: str, patience: Patience, pace: Pace | None = None) -> None:
        found = _NAME.fullmatch(url)
        if not found:
            raise ConfigError(f"{redacted(url)} names no dataset of the Hub.", "Write hf://datasets/ORG/NAME or hf://datasets/ORG/NAME@REVISION.")
        self.name = url.rstrip("/")
        self._repo, self._revision = found[1], found[2] or "main"
        self._patience = patience
        self.pace = pace or Pace(RESOLVES, RESOLVE_SECONDS)

    @functools.cached_property
    def _api(self) -> Any:
        from huggingface_hub import HfApi

        return HfApi(endpoint=self.endpoint, library_name="kdstore")

    @functools.cached_property
    def _commit(self) -> str:
        """The commit that the revision names now."""
        with self._failures():
            return str(self._api.dataset_info(self._repo, revision=self._revision, timeout=self._patience.silence).sha)

    @functools.cached_property
    def _web(self) -> Web:
        from huggingface_hub import get_token

        token = get_token()
        url = f"{self._api.endpoint}/datasets/{self._repo}/resolve/{self._commit}"
        return Web(url, self._patience, name=self.name, headers={"Authorization": f"Bearer {token}"} if token else {})

    @contextlib.contextmanager
    def open(self, path: str, start: int = 0, tag: str | None = None) -> Iterator[Body]:
        """Ask for a file; see `Place.open`."""
        with self._web.open(path, start, tag) as body:
            yield body

    def listing(self) -> dict[str, Stored]:
        """Return the files at the revision with the sha256 of those in LFS and git's hash of the others; raises Failure."""
        with self._failures():
            tree = [*self._api.list_repo_tree(self._repo, recursive=True, revision=self._revision, repo_type="dataset")]
        files = [entry for entry in tree if hasattr(entry, "blob_id")]
        return {f.path: Stored(f.size, "sha256", f.lfs.sha256) if f.lfs else Stored(f.size, "git", f.blob_id) for f in files}

    def commit(self, add: Sequence[tuple[str, Path]], remove: Sequence[str] = ()) -> None:
        """Add and remove files in one commit; raises Failure."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete
        from huggingface_hub.utils import disable_progress_bars

        with self._failures():
            disable_progress_bars()  # ours is drawn already
            operations = [*(CommitOperationAdd(path, str(file)) for path, file in add), *map(CommitOperationDelete, remove)]
            message = f"kdstore: {len(add)} files"
            self._api.create_commit(self._repo, operations, commit_message=message, repo_type="dataset", revision=self._revision, num_threads=4)

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        """Turn what huggingface_hub raises into Failure."""
        try:
            yield
        except Failure:
            raise
        except Exception as e:
            found = _failure(e.__cause__ if type(e) is RuntimeError and e.__cause__ else e)  # an upload that failed is wrapped
            if found is None:
                raise
            raise found from e


def _failure(error: BaseException) -> Failure | None:
    """Say what an error of huggingface_hub or of its HTTP client means; None for one of another kind."""
    from huggingface_hub import errors

    if isinstance(error, errors.RepositoryNotFoundError | errors.RevisionNotFoundError):
        said = "is not there, or not for you: make it with 'hf repos create ORG/NAME --repo-type dataset', and log in with 'hf auth login'"
        return Failure(said, again=False, missing=True)
    if isinstance(error, errors.HfHubHTTPError):
        status, after = error.response.status_code, retry_after(error.response.headers.get("Retry-After", ""))
        return Failure(f"is answered with status {status}", again=status == 429 or status >= 500, after=after)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return Failure("is not asked for: HF_HUB_OFFLINE is set", again=False)
    if isinstance(error, OSError) or type(error).__module__.startswith("http"):  # its client's, whichever that is
        return Failure(f"is not answered ({type(error).__name__})")
    return None
