"""The settings of an extraction; apart from the code that uses them, so that reading a recipe imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from kdstore.errors import ConfigError, UnknownName
from kdstore.threads import MOST_DECODERS, available_cores

TOKENS = ("none", "image", "text", "both")
DTYPES = ("float16", "float32")
BAD_VALUES = ("refuse", "invalid")
CHUNK_ROWS, MOST_CHUNKS = 16, 2**20  # rows of embeddings in a chunk, chunks in a shard (docs/format.md)


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """What to extract from where; batch, device, threads, compile, channels_last and who computes what do not enter the identity (docs/models.md)."""

    teacher: str
    pretrained: str | None = None
    untrained_seed: int | None = None  # random weights of the architecture instead: a control
    data: str | None = None  # default: what the parent was made from, or scenes
    parent: str | None = None  # a store, to whose rows arrays are added, in a store beside it
    keys: str | None = None  # a file with the keys of those rows of the parent that get them; default: all
    out: str | None = None  # default: store/<short name of the teacher>
    tokens: str = "none"
    token_layer: str = "last"  # or last-before-norm, or a block's number, from the end if negative
    encode: str | None = None  # value codec of embeddings, such as int8 or pca256+int8; default: dtype
    reduce: str | None = None  # value codec of tokens, such as pool7+pq64; default: dtype
    codec_sample: int = 4096  # images and texts that codecs are fitted and measured on
    views: int = 0  # augmented views of each image beside the plain one (docs/views.md); tokens are of the plain one
    view_scale: tuple[float, ...] = (0.08, 1.0)  # share of the image that a crop takes
    view_ratio: tuple[float, ...] = (3 / 4, 4 / 3)  # its width to its height
    view_flip: float = 0.0  # probability; captions tell left from right
    view_operations: int = 2  # of RandAugment
    view_strength: float = 0.3  # of these, 1 the strongest
    view_seed: int = 0
    view_side: int | None = None  # pixels of the picture that operations work on; default: the teacher's
    dtype: str = "float16"
    zstd: bool = False  # compress chunks
    unit_rows: int = 16_384
    precision: str = "fp32"
    compile: bool = False
    channels_last: bool = False
    batch: int = 64
    device: str = "auto"
    threads: int | None = None  # decoding, in each process; default: as many as there are cores for it, at most MOST_DECODERS
    workers: int = 0  # processes of a cluster on this machine; 0: all in this one
    scheduler: str | None = None  # of a dask cluster, tcp://HOST:PORT
    part: str | None = None  # I/N: only every N-th unit, from the I-th (1 to N)
    max_invalid: float = 0.1  # share of images, and of texts, that are not valid beyond which the run stops
    bad_values: str = "refuse"  # NaN, infinity and floats beyond dtype; invalid: such a row is marked as not valid, with the reason

    def __post_init__(self) -> None:
        for name, known in (("tokens", TOKENS), ("dtype", DTYPES), ("precision", ("fp32", "bf16", "fp16")), ("bad_values", BAD_VALUES)):
            if getattr(self, name) not in known:
                raise UnknownName.of(name, getattr(self, name), known)
        if not re.fullmatch(r"last|last-before-norm|-?[0-9]{1,4}", self.token_layer):
            raise ConfigError(f"Unknown token layer '{self.token_layer}'.", "Known: last, last-before-norm, or a block's number (-1 the last one's).")
        for name in ("unit_rows", "batch", "threads", "codec_sample"):
            if (given := getattr(self, name)) is not None and given < 1:
                raise ConfigError(f"{name} must be at least 1, found {given}.", f"Correct {name}.")
        if self.part is not None and self.part_of is None:
            raise ConfigError(f"A part is I/N with I from 1 to N, found '{self.part}'.", "For the first of four: --part 1/4.")
        if (self.workers > 0) + (self.scheduler is not None) + (self.part is not None) > 1:
            raise ConfigError("Workers, a scheduler and parts are three ways of sharing the work.", "Give one of --workers, --scheduler and --part.")
        if self.workers < 0:
            raise ConfigError(f"workers must not be negative, found {self.workers}.", "Give --workers N, one for a GPU or a few cores.")
        if self.keys and not self.parent:
            raise ConfigError("Keys choose rows of a parent.", "Name the store with --parent.")
        if self.parent and self.encode and not self.views:
            raise ConfigError("The embeddings are the parent's, as it has encoded them.", "Leave --encode out; --reduce is for tokens.")
        if self.parent and ((self.tokens == "none" and not self.views) or not self.out):
            raise ConfigError("A store that adds to a parent needs arrays and a path.", "Give --tokens image or --views 2, and --out beside the parent.")
        if self.unit_rows & (self.unit_rows - 1):
            near = 1 << self.unit_rows.bit_length() - 1
            raise ConfigError(f"unit_rows must be a power of two, so that units end with shards; found {self.unit_rows}.", f"Take {near} or {2 * near}.")
        if self.views < 0:
            raise ConfigError(f"views must not be negative, found {self.views}.", "Give --views K, or leave it out.")
        if not self.views < MOST_CHUNKS // max(1, self.unit_rows // CHUNK_ROWS):
            raise ConfigError(f"A unit of {self.unit_rows} rows cannot hold {self.views} augmented views.", "Take fewer of either.")
        if self.views:
            from kdstore.data.views import Augmentation  # needs NumPy and Pillow, which few recipes that are only read do

            Augmentation(side=self.view_side or 1, interpolation="bicubic", **self.sampling)
        if self.encode or self.reduce:
            from kdstore.store import parse_chain  # needs NumPy and Zarr, which few recipes that are only read do

            for text in (self.encode, self.reduce):
                parse_chain(text or self.dtype, self.dtype)
        if not 0 <= self.max_invalid <= 1:
            raise ConfigError(f"max_invalid is a share from 0 to 1, found {self.max_invalid}.", "Correct max_invalid.")

    @property
    def part_of(self) -> tuple[int, int] | None:
        """Return (I, N) of `part`, None if there is none or it is not I/N."""
        found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", self.part or "")
        number, count = (int(text) for text in found.groups()) if found else (0, 0)
        return (number, count) if 1 <= number <= count else None

    @property
    def decoders(self) -> int:
        """How many threads decode in a process: `threads`, or the cores that it may use, shared among the workers of this machine."""
        return self.threads or max(1, min(MOST_DECODERS, available_cores() // max(1, self.workers)))

    @property
    def sampling(self) -> dict[str, Any]:
        """How augmented views are sampled, whatever the teacher."""
        return {name: getattr(self, f"view_{name}") for name in ("scale", "ratio", "flip", "operations", "strength", "seed")}

    @property
    def embedded_sides(self) -> tuple[str, ...]:
        """The sides whose embeddings a run computes: a parent has both, of the plain view."""
        return ("image", "text") if self.parent is None else ("image",) if self.views else ()

    @property
    def reads_images(self) -> bool:
        """Whether a run computes anything of images."""
        return "image" in self.embedded_sides or self.tokens in ("image", "both")
