"""Two labs, end to end, on a folder of photographs: one extracts and publishes, the other trains from it on the images that it still has.

    python scripts/two_labs.py --photos DIR --out DIR [--teacher scenes-L] [--json]

Lab A extracts its folder and pushes the store to an S3 server (moto's, on this machine). Lab B has 80 % of the images in another order: some under their names,
some under other names, some encoded anew, and some both, which nothing can recognise. It pulls what joins with its folder (`--for`, `--content`), joins by key
and by content, and distils. It also runs the teacher itself over what could be joined, in lab A's order (pairs are numbered in a store's order, and these
numbers make the batches), and distils from that with the same seed. The two runs must agree: exactly without the images that were encoded anew, and nearly
with them, as the teacher of the store saw other bytes. Exit code 1 if they do not.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from PIL import Image

SHARES = {"same": 0.5, "renamed": 0.3, "encoded anew": 0.15, "both": 0.05}  # of lab B's images
Photo = tuple[str, bytes, str]  # file name, content, captions
ALLOW = {"unchanged": (), "changed": ("--set", "changed_images=allow")}
NEAR = 0.02  # relative difference of a step's loss that other bytes of 15 % of the images may make


def kdstore(*arguments: object) -> dict[str, Any]:
    """Run a command as a user would; returns what it prints as JSON."""
    print(f"kdstore {' '.join(map(str, arguments))}", file=sys.stderr, flush=True)
    done = subprocess.run([sys.executable, "-m", "kdstore", *map(str, arguments), "--json"], stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def read_captions(folder: Path) -> dict[str, str]:
    """Return the captions of an image folder, as its metadata.csv has them, by file name."""
    with open(folder / "metadata.csv", newline="") as file:
        return {row["file_name"]: row["captions"] for row in csv.DictReader(file)}


def write_folder(folder: Path, images: list[Photo]) -> Path:
    """Write an image folder of (file name, bytes, captions) in this order."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "metadata.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "captions"])
        for name, content, captions in images:
            (folder / name).write_bytes(content)
            table.writerow([name, captions])
    return folder


def read_folder(folder: Path) -> list[Photo]:
    return [(name, (folder / name).read_bytes(), captions) for name, captions in read_captions(folder).items()]


def encoded_anew(content: bytes) -> bytes:
    sink = io.BytesIO()
    Image.open(io.BytesIO(content)).convert("RGB").save(sink, "JPEG", quality=88)
    return sink.getvalue()


def images_of_lab_b(photos: Path, seed: int) -> list[tuple[str, Photo]]:
    """Draw 80 % of the photographs, in the order of the folder: what was done to each, and what became of it."""
    dice, captions = random.Random(seed), read_captions(photos)
    chosen = set(dice.sample(sorted(captions), round(0.8 * len(captions))))
    drawn = []
    for i, name in enumerate(name for name in captions if name in chosen):
        fate = dice.choices(list(SHARES), list(SHARES.values()))[0]
        content = (photos / name).read_bytes()
        here = f"lab-b-{i:05}.jpg" if fate in ("renamed", "both") else name
        drawn.append((fate, (here, encoded_anew(content) if fate in ("encoded anew", "both") else content, captions[name])))
    return drawn


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


def distilled(data: Path, store: Path, out: Path, *options: object) -> dict[str, Any]:
    settings = ("--student", "scenes-T", "--loss", "clip-kd-free", "--batch-size", 50, "--set", "epochs=4", "--set", "log_every=1", "--set", "projector=always")
    return kdstore("distill", "--cache", store, "--data", data, "--out", out, "--set", "join=content", *settings, *options)


def recall(run: Path, data: Path, out: Path) -> dict[str, float]:
    scores: dict[str, float] = kdstore("evaluate", "retrieval", "--model", run, "--data", data, "--out", out)["rows"][0]["scores"]
    return {name: scores[name] for name in ("image_retrieval_recall@10", "text_retrieval_recall@10")}


def run_labs(photos: Path, out: Path, teacher: str, seed: int) -> dict[str, Any]:
    lab_a, lab_b = out / "a", out / "b"
    published = kdstore("extract", "--teacher", teacher, "--data", photos, "--out", lab_a / "store")
    pushed = kdstore("store", "push", lab_a / "store", "s3://labs/a")

    images = images_of_lab_b(photos, seed)
    data = write_folder(lab_b / "photos", random.Random(seed).sample([photo for _, photo in images], len(images)))
    pulled = kdstore("store", "pull", "s3://labs/a", lab_b / "store", "--for", data, "--content", "--expect", pushed["digest"])
    verified = kdstore("store", "verify", lab_b / "store")

    compared = {}
    for place, fates in (("unchanged", ("same", "renamed")), ("changed", ("same", "renamed", "encoded anew"))):
        own = write_folder(lab_b / place, [photo for fate, photo in images if fate in fates])
        shuffled = (
            data if place == "changed" else write_folder(lab_b / f"{place}-shuffled", random.Random(seed).sample(read_folder(own), len(read_folder(own))))
        )
        kdstore("extract", "--teacher", teacher, "--data", own, "--out", lab_b / f"store-{place}")
        runs = [
            distilled(shuffled, lab_b / "store", lab_b / f"run-{place}", *ALLOW[place]),
            distilled(own, lab_b / f"store-{place}", lab_b / f"run-own-{place}"),
        ]
        steps = list(zip(*(losses(Path(run["path"])) for run in runs), strict=True))
        compared[place] = {
            "pairs": [run["pairs"] for run in runs],
            "left_out": runs[0]["left_out"],
            "steps": len(steps),
            "largest_difference": max(abs(a - b) for a, b in steps),
            "largest_relative": max(abs(a - b) / b for a, b in steps),
            "last_losses": steps[-1],
            "recall": [recall(Path(run["path"]), own, lab_b / f"recall-{place}-{i}.json") for i, run in enumerate(runs)],
        }
    return {
        "published": {name: published[name] for name in ("images", "bytes") if name in published},
        "lab_b": {fate: sum(found == fate for found, _ in images) for fate in SHARES},
        "pulled": pulled,
        "whole": not (verified["damaged"] or verified["unreadable"]),
        "compared": compared,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, help="an image folder with metadata.csv: file_name, captions")
    parser.add_argument("--out", type=Path, required=True, help="an empty folder")
    parser.add_argument("--teacher", default="scenes-L")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    from moto.moto_server.threaded_moto_server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    import fsspec

    fsspec.filesystem("s3").mkdir("labs")
    found = run_labs(args.photos, args.out, args.teacher, args.seed)
    server.stop()
    print(json.dumps(found, indent=1))
    exact = found["compared"]["unchanged"]["largest_difference"] == 0
    near = found["compared"]["changed"]["largest_relative"] < NEAR
    sys.exit(0 if exact and near and found["whole"] else 1)


if __name__ == "__main__":
    main()
