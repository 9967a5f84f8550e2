"""The folder of a run: what is in it, whether it may be continued, its checkpoint and its logs.

- `config.json`: the settings that decide the result, written first
- `checkpoint.pt`: everything that a run needs to go on as if never stopped
- `log.jsonl`, and `validation.jsonl` where there is validation: the numbers of both are in `tensorboard/` too
- `open_clip_config.json`, `open_clip_model.safetensors`: the student, as open_clip's `local-dir:` reads it
- `ema/`: the average of the student's weights as another student, if asked for
- `run.json`: provenance, written last, so that a folder with it holds a finished run
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.tensorboard import SummaryWriter

from kdstore.errors import RunError
from kdstore.jsonfile import digest_of, disk_error, read_json, write_bytes, write_json
from kdstore.models.checkpoint import parse_checkpoint

CONFIG, CHECKPOINT, RUN, AVERAGE = "config.json", "checkpoint.pt", "run.json", "ema"
LOG, VALIDATION, TENSORBOARD = "log.jsonl", "validation.jsonl", "tensorboard"


def run_state(path: Path, settings: dict[str, Any], *, resume: bool) -> Literal["new", "unfinished", "finished"]:
    """Say what the folder of a run holds; raises RunError for another run, something else, or an unfinished run without `resume`. Writes nothing."""
    if not (path / CONFIG).is_file():
        if path.exists() and (not path.is_dir() or any(found.suffix != ".tmp" for found in path.iterdir())):  # .tmp: killed as it began
            raise RunError(f"{path} is neither empty nor a run.", "Choose another --out.")
        return "new"
    found = read_json(path / CONFIG, RunError)
    if found.pop("digest") != digest_of(settings):
        there, here = ({name: repr(value) for name, value in side.items()} for side in (found, settings))
        differing = [name for name in sorted(there.keys() | here.keys()) if there.get(name) != here.get(name)]
        said = "; ".join(f"{name} is {there.get(name, 'unknown')} there and {here.get(name, 'unknown')} here" for name in differing)
        raise RunError(f"{path} holds another run: {said}.", "Choose another --out, or the settings of that run.")
    if (path / RUN).is_file():
        return "finished"
    if not (path / CHECKPOINT).is_file():
        return "new"
    if not resume:
        raise RunError(f"{path} holds an unfinished run.", "Add --resume to continue it, or choose another --out.")
    return "unfinished"


def begin_run(path: Path, settings: dict[str, Any]) -> None:
    """Create the folder of a run and write its settings."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise disk_error(e, path) from e
    write_json(path / CONFIG, settings)


def save_checkpoint(path: Path, content: bytes) -> None:
    """Write the checkpoint so that a crash leaves the old or the new one."""
    write_bytes(path / CHECKPOINT, content)


def read_checkpoint(path: Path) -> bytes:
    """Read what a checkpoint file holds; raises RunError."""
    try:
        return (path / CHECKPOINT).read_bytes()
    except OSError as e:
        raise RunError(f"{path / CHECKPOINT} cannot be read ({e.strerror}).", "Remove it to start this run again.") from e


def load_checkpoint(content: bytes, path: Path, settings: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Understand a checkpoint without running code from it; raises RunError if it is damaged or of another run."""
    return parse_checkpoint(content, path / CHECKPOINT, digest_of(settings), device)


class Log:
    """The numbers of a run, as JSON lines and for TensorBoard; opened at step k it forgets what an interrupted run wrote after k.

    One that `writes` not touches nothing: that of a process other than the first.
    """

    def __init__(self, path: Path, step: int, *, writes: bool = True) -> None:
        self._path = path
        self._board: SummaryWriter | None = None
        if not writes:
            return
        for file in (path / LOG, path / VALIDATION):
            if file.is_file():
                lines = file.read_bytes().splitlines(keepends=True) if step else []
                write_bytes(file, b"".join(line for line in lines if line.endswith(b"\n") and json.loads(line)["step"] <= step))
        with self._mapped_errors(path / TENSORBOARD):
            self._board = SummaryWriter(str(path / TENSORBOARD), purge_step=step + 1)
            self._board.flush()

    def write(self, name: str, values: dict[str, float]) -> None:
        """Append the numbers of `values["step"]` to the file of this name; raises DiskFull."""
        if self._board is None:
            return
        with self._mapped_errors(self._path / name):
            with open(self._path / name, "a") as lines:
                lines.write(json.dumps(values) + "\n")
            for number, value in values.items():
                if number != "step":
                    self._board.add_scalar(number, value, int(values["step"]))

    def close(self) -> None:
        with self._mapped_errors(self._path / TENSORBOARD):
            if self._board is not None:
                self._board.close()

    @contextmanager
    def _mapped_errors(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            raise disk_error(e, path) from e
