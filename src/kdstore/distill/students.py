"""The students that kdstore knows: ready architectures and what each costs.

The numbers stand here so that they are listed at once and without torch; a test counts each of them again. An architecture is a JSON config of open_clip,
its own or one in models/configs; any other config, also in a file, is a student just as well, and `count` counts it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class KnownStudent:
    """Parameters in millions: all, without the token embedding, of the image tower. GMACs of one image and of one text. Pixels of an image's side."""

    parameters: float
    without_token_embedding: float
    image_parameters: float
    image_gmacs: float
    text_gmacs: float
    pixels: int
    about: str = ""


def count(name: str) -> KnownStudent:
    """Count what any architecture or config file would cost as a student; raises UnknownName and ModelError."""
    from kdstore.models.cost import cost_of

    cost = cost_of(name)
    whole, without, image = (round(n / 1e6, 2) for n in (cost.parameters, cost.without_token_embedding, cost.image_parameters))
    return KnownStudent(whole, without, image, round(cost.image_gmacs, 3), round(cost.text_gmacs, 3), cost.pixels)


def table(students: dict[str, KnownStudent]) -> str:
    """Return students as a table for a terminal."""
    row = "{:16} {:>8} {:>9} {:>9} {:>11} {:>10} {:>6}  {}"
    lines = [row.format("", "params M", "no tokens", "image", "image GMACs", "text GMACs", "pixels", "")]
    for name, s in students.items():
        millions = [f"{number:.2f}" for number in (s.parameters, s.without_token_embedding, s.image_parameters)]
        lines.append(row.format(name, *millions, f"{s.image_gmacs:.3g}", f"{s.text_gmacs:.3g}", s.pixels, s.about))
    return "\n".join(line.rstrip() for line in lines)


CLIP_KD = "CLIP-KD's text tower (384 wide)"

STUDENTS = {
    "ViT-T-16": KnownStudent(46.12, 27.14, 5.62, 1.254, 1.690, 224, f"{CLIP_KD}; the default"),
    "ViT-S-16": KnownStudent(62.26, 43.28, 21.81, 4.599, 1.690, 224, "open_clip's; embeddings 384 wide"),
    "ViT-B-32": KnownStudent(151.28, 125.98, 87.85, 4.409, 2.980, 224, "open_clip's"),
    "ViT-B-16": KnownStudent(149.62, 124.32, 86.19, 17.563, 2.980, 224, "open_clip's, and CLIP-KD's"),
    "RN50": KnownStudent(102.01, 76.71, 38.32, 6.111, 2.980, 224, "open_clip's; embeddings 1024 wide"),
    "MobileCLIP2-S0": KnownStudent(74.84, 49.54, 11.41, 2.393, 2.980, 256, "open_clip's"),
    "MobileCLIP2-S2": KnownStudent(99.24, 73.95, 35.82, 7.846, 2.980, 256, "open_clip's"),
    "TinyViT-5M": KnownStudent(45.73, 26.76, 5.24, 1.255, 1.690, 224, CLIP_KD),
    "FastViT-T8": KnownStudent(44.14, 25.17, 3.65, 0.690, 1.690, 256, CLIP_KD),
    "EfficientNet-B0": KnownStudent(45.16, 26.18, 4.66, 0.385, 1.690, 224, CLIP_KD),
    "MobileNetV3-S": KnownStudent(42.54, 23.56, 2.04, 0.056, 1.690, 224, f"{CLIP_KD}; its MobileNetV3"),
    "MobileViT-S": KnownStudent(45.76, 26.79, 5.27, 1.521, 1.690, 224, CLIP_KD),
    "Swin-T": KnownStudent(68.41, 49.43, 27.91, 4.490, 1.690, 224, CLIP_KD),
    "ResNet-18": KnownStudent(51.93, 32.96, 11.44, 1.814, 1.690, 224, CLIP_KD),
    "scenes-T": KnownStudent(3.61, 0.45, 0.35, 0.018, 0.003, 128, "of the demo"),
}
