"""Ten thousand photographs' worth of files, one in a hundred of every odd kind: which are read, which are marked, and in how much memory.

The files are drawn from a seed, written as a tar, and extracted by a demo teacher. Prints a line per kind, as the store's index says what became of each
image, and the peak of resident memory above that at the start (teacher and batches included).

    python benchmarks/broken_images.py [--images 10000] [--teacher scenes-S] [--threads 2] [--json]
"""

from __future__ import annotations

import argparse
import io
import json
import struct
import tarfile
import tempfile
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from kdstore.extract.config import ExtractConfig
from kdstore.extract.run import extract
from kdstore.store import open_store

SIDE = 256


Make = Callable[[Image.Image, np.random.Generator], bytes]
"""From an RGB picture to the bytes of a file."""


def picture(rng: np.random.Generator) -> Image.Image:
    """Draw coarse noise: compresses like a photograph, and no two are equal."""
    coarse = Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8))
    return coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    sink = io.BytesIO()
    image.save(sink, form, **options)
    return sink.getvalue()


def in_mode(mode: str, form: str, **options: object) -> Make:
    return lambda image, rng: encoded(image.convert(mode), form, **options)


def grey16(form: str) -> Make:
    return lambda image, rng: encoded(Image.fromarray(np.asarray(image.convert("L"), np.uint16) * 257), form)


def png(width: int, height: int, bits: int, color: int, rows: bytes) -> bytes:
    """Write a PNG by hand, which can say what Pillow does not write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def rgb16(image: Image.Image, rng: np.random.Generator) -> bytes:
    values = np.asarray(image, np.uint16) * 257
    return png(image.width, image.height, 16, 2, b"".join(b"\0" + row.astype(">u2").tobytes() for row in values))


def bomb(image: Image.Image, rng: np.random.Generator) -> bytes:
    """A file of some kilobytes that says 50,000 x 50,000 pixels and holds the first of them."""
    return png(50_000, 50_000, 8, 2, bytes(2**20) + rng.bytes(8))


def animation(form: str) -> Make:
    return lambda image, rng: encoded(image, form, save_all=True, append_images=[picture(rng) for _ in range(3)])


def rotated(image: Image.Image, rng: np.random.Generator) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = int(rng.integers(2, 9))
    return encoded(image, "JPEG", exif=exif)


READ: dict[str, Make] = {
    "CMYK": in_mode("CMYK", "JPEG"),
    "grey": in_mode("L", "JPEG"),
    "16-bit grey": grey16("PNG"),
    "16-bit grey TIFF": grey16("TIFF"),
    "16-bit RGB": rgb16,
    "animated GIF": animation("GIF"),
    "animated WebP": animation("WEBP"),
    "animated PNG": animation("PNG"),
    "EXIF-rotated": rotated,
    "broken EXIF": lambda image, rng: encoded(image, "JPEG", exif=b"Exif\0\0" + rng.bytes(64)),
    "palette with transparency": lambda image, rng: encoded(image.quantize(64), "PNG", transparency=bytes(range(128, 256, 2))),
    "RGBA": in_mode("RGBA", "PNG"),
    "grey with alpha": in_mode("LA", "PNG"),
    "1-bit": in_mode("1", "PNG"),
    "WebP called jpg": in_mode("RGB", "WEBP"),
    "2 MB colour profile": lambda image, rng: encoded(image, "JPEG", icc_profile=rng.bytes(2 * 2**20)),
    "progressive": in_mode("RGB", "JPEG", progressive=True),
}
MARKED: dict[str, tuple[Make, str]] = {
    "truncated JPEG": (lambda image, rng: encoded(image, "JPEG")[:-1000], "image file is truncated"),
    "truncated PNG": (lambda image, rng: encoded(image, "PNG")[:20_000], "image file is truncated"),
    "zero bytes": (lambda image, rng: b"", "the file is empty"),
    "only zeros": (lambda image, rng: bytes(int(rng.integers(1, 9999))), "not an image of a known format"),
    "text": (lambda image, rng: b"<html>404 " + rng.bytes(8).hex().encode(), "not an image of a known format"),
    "PostScript": (lambda image, rng: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%" + rng.bytes(8).hex().encode(), "not an image of a known format"),
    "bomb of 50,000 x 50,000": (bomb, "2500000000 pixels"),
    "32-bit float TIFF": (in_mode("F", "TIFF"), "32 bits per channel"),
}
KINDS = {**READ, **{name: make for name, (make, _) in MARKED.items()}}


def write(path: Path, images: int) -> list[str]:
    """Write the tar; every hundred images hold one of each odd kind. Returns the kind of each image."""
    rng, plain = np.random.default_rng(0), in_mode("RGB", "JPEG")
    kinds = []
    with tarfile.open(path, "w") as tar:
        for i in range(images):
            kind = (list(KINDS) + ["JPEG"] * (100 - len(KINDS)))[i % 100]
            for suffix, content in (("jpg", KINDS.get(kind, plain)(picture(rng), rng)), ("txt", f"picture {i}".encode())):
                info = tarfile.TarInfo(f"{i:09d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            kinds.append(kind)
    return kinds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--teacher", default="scenes-S", help="small: most of the time goes into reading")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "images.tar"
        kinds = write(path, args.images)
        before = _memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
        started = time.perf_counter()
        extract(ExtractConfig(teacher=args.teacher, data=str(path), out=str(Path(folder) / "store"), max_invalid=0.5, threads=args.threads, device="cpu"))
        seconds = time.perf_counter() - started
        peak = _memory("VmHWM") - before
        results = [reason or "read" for reason in open_store(Path(folder) / "store").index("image", "reason").to_pylist()]
    table: dict[str, Counter[str]] = defaultdict(Counter)
    for kind, result in zip(kinds, results, strict=True):
        table[kind][result] += 1
    report = {
        "images": args.images,
        "threads": args.threads,
        "images_per_second": round(args.images / seconds),
        "peak_mb_above_start": round(peak / 1e6),
        "read": results.count("read"),
        "kinds": {kind: dict(counts.most_common(3)) for kind, counts in table.items()},
    }
    if args.json:
        print(json.dumps(report))
        return
    for kind, counts in table.items():
        print(f"{kind:28} {sum(counts.values()):6}  " + "; ".join(f"{n} {reason}" for reason, n in counts.most_common(3)))
    print(f"{report['read']} of {args.images} read, {report['images_per_second']} images/s, peak {report['peak_mb_above_start']} MB above the start")


def _memory(name: str) -> int:
    """Return a line of /proc/self/status in bytes."""
    line = next(text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith(name))
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    main()
