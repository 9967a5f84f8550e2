"""What test_processes.py runs on each of two processes: `torchrun processes.py FOLDER`, with the settings of runs in FOLDER/configs.json."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch

from kdstore.config import make_config
from kdstore.data.source import LoadedImage, UndecodableImage
from kdstore.data.sources import open_source
from kdstore.distill.config import DistillConfig
from kdstore.distill.distributed import joined
from kdstore.distill.train import distill
from kdstore.errors import KdstoreError, RunError


class Troubled:
    """A source that ends or damages the second process when it reads its n-th image."""

    def __init__(self, spec: str, trouble: str, n: int) -> None:
        self.source, self.spec, self.trouble, self.left = open_source(spec), spec, trouble, n
        self.key, self.captions = self.source.key, self.source.captions

    def __len__(self) -> int:
        return len(self.source)

    def image(self, i: int) -> LoadedImage:
        self.left -= 1
        if self.left == 0 and os.environ["RANK"] == "1":
            if self.trouble == "undecodable":
                raise UndecodableImage("cut short")
            os.kill(os.getpid(), signal.SIGTERM)
        return self.source.image(i)


def main(folder: Path) -> None:
    """Take the runs one after the other, and write what each of them raised on this process."""
    torch.set_num_threads(1)
    ended: dict[str, str] = {}
    with joined("cpu") as (world, _):
        for name, settings in json.loads((folder / "configs.json").read_text()).items():
            config = make_config(DistillConfig, settings)
            source = Troubled(config.data, name, 20) if config.data else None
            try:
                distill(config, source=source)
                ended[name] = "finished"
            except KdstoreError as e:
                ended[name] = f"{type(e).__name__}: {e.message}"
        try:
            world.check_same([torch.ones(3), torch.tensor([1.0, world.rank])], "projectors")
        except RunError as e:
            ended["drift"] = e.message
    (folder / f"ended{world.rank}.json").write_text(json.dumps(ended))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
