"""The settings of an import: what the folder does not say, and a user may know."""

from __future__ import annotations

from dataclasses import dataclass

from kdstore.errors import ConfigError, UnknownName

DTYPES = ("float16", "float32")


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """What a user says of features that were computed elsewhere; what is None is unknown, and the store says so."""

    format: str
    teacher: str | None = None  # a name, which is recorded and not looked up
    logit_scale: float | None = None
    logit_bias: float | str | None = None  # "none": trained with a softmax
    key: str | None = None  # column or json field of the key; default: the format's own
    sha256: str | None = None  # column or json field with the sha256 of the encoded image; default: unknown
    augmentation: str = "mean"  # of datacompdr: of which augmented view the image embedding is, or the mean of all
    embedding: str | None = None  # of theia: the tensor that is the image's embedding; default: pooled_cls_token or cls_token, where there is one
    dtype: str = "float16"
    unit_rows: int = 16_384
    max_invalid: float = 0.1  # share of images without finite features beyond which nothing is sealed

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UnknownName.of("dtype", self.dtype, DTYPES)
        if not (self.augmentation == "mean" or self.augmentation.isdecimal()):
            raise ConfigError(f"'{self.augmentation}' is no augmentation.", "Give mean, or the number of one, from 0.")
        if isinstance(self.logit_bias, str) and self.logit_bias != "none":
            raise ConfigError(f"'{self.logit_bias}' is no logit bias.", 'Give a number, or "none" for a teacher that was trained with a softmax.')
        if not 0 <= self.max_invalid <= 1:
            raise ConfigError(f"max_invalid is a share from 0 to 1, found {self.max_invalid}.", "Correct max_invalid.")
