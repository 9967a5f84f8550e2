"""What extraction costs beyond the teacher's forward pass: `extract` beside the same model on tensors that lie in memory, in one run.

Images are pictures in memory, so that reading is no limit but preprocessing is paid; each has one caption of its own. The forward pass gets the same images
preprocessed, the captions as texts, in the same batches, and its results come back to the host. Where decoding is the limit (a small teacher, `--jpeg SIDE`
with large pictures) the other thing to compare with is decoding alone, in as many threads. The ways take turns; a ratio is the median over the repeats of
forward (or decoding) seconds over extract seconds: 1 is no overhead. Loading of the teacher and planning are left out of all.

    python benchmarks/extract.py [--teacher ViT-B-32] [--images 128] [--batch 32] [--tokens none|image] [--reduce int8] [--jpeg SIDE] [--device cpu] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from pictures import Pictures

from kdstore.extract.config import ExtractConfig
from kdstore.extract.job import prepare
from kdstore.extract.rates import rates_of
from kdstore.extract.units import Tally
from kdstore.models.encode import encode_image, encode_image_tokens, encode_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="ViT-B-32", help="an architecture; its weights are random")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tokens", default="none", choices=("none", "image"))
    parser.add_argument("--reduce", help="codec of tokens")
    parser.add_argument("--jpeg", type=int, metavar="SIDE", help="decode JPEGs of this side instead of taking pictures that are decoded")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--threads", type=int, help="that decode; default: as many as there are cores, at most 16")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    source = Pictures(args.images, args.jpeg)
    taken: dict[str, list[float]] = {"extract": [], "forward": [], "decode": []}
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {name: getattr(args, name) for name in ("teacher", "batch", "tokens", "reduce", "device", "precision", "threads")}
        config = ExtractConfig(**settings, untrained_seed=0, unit_rows=1 << 20, codec_sample=64, out=str(Path(folder) / "store"))
        job = prepare(config, lambda notice: None, source=source)
        model, done = job.extractor.model, {"image": Tally(), "text": Tally()}
        pixels = [torch.stack([job.extractor.decode(i)[0] for i in range(s, min(s + args.batch, args.images))]) for s in range(0, args.images, args.batch)]
        texts = [source.captions(i)[0].text for i in range(args.images)]

        def forward() -> None:
            for part in pixels:
                found = encode_image_tokens(model, part) if args.tokens == "image" else (encode_image(model, part),)
                for features in found:
                    features.cpu()
            for start in range(0, len(texts), 4 * args.batch):
                encode_text(model, texts[start : start + 4 * args.batch]).cpu()

        def extract() -> None:
            with job.open_writer() as writer:
                for unit in writer.pending():
                    with writer.attempt(unit) as attempt:
                        done[unit.side] += job.extractor.write(attempt, unit, lambda tally: None)

        def decode() -> None:
            for start in range(0, args.images, args.batch):
                job.extractor.decode_all(range(start, min(start + args.batch, args.images)))

        forward()
        for repeat in range(args.repeats):
            for way in (forward, extract, decode) if repeat % 2 else (decode, extract, forward):
                started = time.perf_counter()
                way()
                taken[way.__name__].append(time.perf_counter() - started)
            for unit in (job.out / "_build" / "units").glob("*.json"):
                unit.unlink()  # the next repeat writes it again
        rates = rates_of(config, model, done["image"], done["text"], sum(taken["extract"]))
        job.extractor.close()
    found = {
        **settings,
        "device": str(model.device),
        "cores": len(os.sched_getaffinity(0)),
        "threads": config.decoders,
        "images": args.images,
        **{f"of_{way}": statistics.median(a / b for a, b in zip(taken[way], taken["extract"], strict=True)) for way in ("forward", "decode")},
        "seconds": {name: statistics.median(values) for name, values in taken.items()},
        "images_per_second": args.images / statistics.median(taken["extract"]),
        "reading": rates.reading,
        "model": rates.model,
        "writing": rates.writing,
        "share_of_peak": rates.share_of_peak,
    }
    print(json.dumps(found) if args.json else "\n".join(f"{name:>20}  {value}" for name, value in found.items()))


if __name__ == "__main__":
    main()
