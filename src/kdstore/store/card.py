"""The card of a published store: README.md with the header that the Hugging Face Hub reads, and croissant.json.

Both lie beside the manifest: the store's digest does not change, and the card names it. Licences and the citation are asked for and never guessed; nothing of
the machine that made the store is in them.
"""

from __future__ import annotations

import datetime
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdstore.errors import ConfigError, UnknownName
from kdstore.jsonfile import read_json, write_bytes
from kdstore.store.croissant import croissant_of
from kdstore.store.reader import Store, open_store

_LISTED = (  # at https://huggingface.co/docs/hub/repositories-licenses, but for `other`, in whose place a link is given
    "afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0 bigscience-openrail-m bsd bsd-2-clause "
    "bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 "
    "cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 cdla-permissive-2.0 "
    "cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 fair-noncommercial-research-license "
    "gemma gfdl gpl gpl-2.0 gpl-3.0 grok2-community h-research intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 "
    "llama4 lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openmdw-1.0 openrail openrail++ osl-3.0 pddl postgresql unknown unlicense wtfpl zlib"
)
LICENCES = frozenset(_LISTED.split())
_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"), (10**8, "10M<n<100M"), (10**9, "100M<n<1B"))
TAGS = ["kdstore", "knowledge-distillation", "clip", "embeddings", "zarr"]


@dataclass(frozen=True, kw_only=True)
class CardConfig:
    """What a store cannot know: `licence` is an identifier of the Hub's list or a link, the others are texts; `citation` is BibTeX, `mirrors` are copies."""

    licence: str | None = None
    teacher_licence: str | None = None
    source_licence: str | None = None
    citation: str | None = None
    name: str | None = None  # default: that of the folder
    mirrors: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        needed = {"licence": self.licence, "teacher-licence": self.teacher_licence, "source-licence": self.source_licence, "citation": self.citation}
        if missing := [f"--{name}" for name, given in needed.items() if not (given or "").strip()]:
            found = f"The card needs {', '.join(missing)}, which no store knows."
            raise ConfigError(found, "Licences are words (cc-by-4.0, or what is known of the source's), --citation names a file with BibTeX.")
        if self.licence not in LICENCES and not str(self.licence).startswith("https://"):
            raise UnknownName.of("licence of the Hub", str(self.licence), LICENCES, "For another one, give an https:// link to its text.")
        if wrong := [url for url in self.mirrors if "://" not in url or "?" in url or "@" in url.partition("://")[2].partition("/")[0]]:
            raise ConfigError(f"'{wrong[0]}' is no public address of a copy.", "Give URLs as 'kdstore store pull' takes them, without a password or a query.")


@dataclass(frozen=True)
class Card:
    """The files written, and what a publisher should know; `digest` is the store's, as before."""

    readme: str
    croissant: str
    digest: str
    notices: tuple[str, ...]


def write_card(path: str | Path, config: CardConfig) -> Card:
    """Write README.md and croissant.json of a complete store; raises what `open_store` raises, DiskFull, CannotWrite."""
    store = open_store(path)
    store.require_whole()
    name = config.name or store.path.resolve().name
    readme, croissant = store.path / "README.md", store.path / "croissant.json"
    today = datetime.datetime.now(datetime.UTC).date()
    said = croissant_of(store, name, _abstract(store), str(config.licence), str(config.citation), config.mirrors, today)
    write_bytes(croissant, json.dumps(said, indent=1, ensure_ascii=False).encode() + b"\n")
    write_bytes(readme, readme_of(store, name, config).encode())
    return Card(str(readme), str(croissant), store.digest, tuple(_notices(store)))


def readme_of(store: Store, name: str, config: CardConfig) -> str:
    """Return the text of README.md, with the Hub's YAML header."""
    from huggingface_hub import DatasetCardData  # half a second

    linked = (config.licence or "").startswith("https://")
    header = DatasetCardData(
        license="other" if linked else config.licence,
        license_name="see-link" if linked else None,
        license_link=config.licence if linked else None,
        pretty_name=name,
        tags=TAGS,
        task_categories=["image-feature-extraction"],
        size_categories=[_size(store.num_images)],
        configs=[
            {"config_name": f"{side}s", "data_files": f"index/{side}/*.parquet"} | ({"default": True} if side == "image" else {})
            for side, rows in (("image", store.num_images), ("text", store.num_texts))
            if rows
        ],
        mirrors=list(config.mirrors) or None,  # where a pull looks for files that do not come
    ).to_yaml()
    where = config.mirrors[0] if config.mirrors else "ADDRESS"
    parts = [
        f"---\n{header}\n---\n\n# {name}\n\n{_abstract(store)} The tables that are shown here are its index; the features are Zarr v3 arrays beside it.",
        f"Digest: `{store.digest}`  \nFingerprint of the rows: `{store.fingerprint}`",
        f"## Use\n\n    pip install kdstore\n    kdstore store pull {where} store/{name} --expect {store.digest}\n"
        f"    kdstore store join store/{name} DATA                 # how many of your images it has: by key, and by the sha256 of the encoded image\n"
        f"    kdstore distill --cache store/{name} --data DATA\n\n"
        "Rows join with images by key (or `--set join=content`), never by order. Any Zarr v3 reader opens the arrays; row i of them is row i of the index.",
        "## Arrays\n\n| array | shape | type | features |\n| --- | --- | --- | --- |\n" + "\n".join(_array_rows(store)),
        "## Teacher\n\n" + "\n".join(_teacher(store)),
        f"## Licences\n\n- these features: {config.licence}\n- the teacher's weights: {config.teacher_licence}\n- images and captions: {config.source_licence}",
        "## Copies\n\n" + ("\n".join(f"- {url}" for url in config.mirrors) or "None is known."),
        f"## Citation\n\n```bibtex\n{str(config.citation).strip()}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _abstract(store: Store) -> str:
    teacher = store.identity.get("teacher", {}).get("name") or "an unknown teacher"
    valid, gone = int(store.image_valid.sum()), len(store.withdrawn)
    said = f"Precomputed features of {teacher} for {valid:,} images and {int(store.text_valid.sum()):,} captions, for distillation."
    left_out = [f"{store.num_images - valid - gone:,} could not be decoded"] if store.num_images - valid - gone else []
    left_out += [f"{gone:,} were withdrawn"] if gone else []
    return f"{said} Of {store.num_images:,} images {' and '.join(left_out)}: their rows are not valid." if left_out else said


def _size(images: int) -> str:
    return next((said for limit, said in _SIZES if images < limit), "n>1B")


def _array_rows(store: Store) -> list[str]:
    specs = [spec for name, spec in store.arrays.items() if not name.endswith("/valid")]
    return [f"| `{spec.name}` | {list(spec.shape)} | {spec.dtype} | {_fidelity(store, spec.name)} |" for spec in specs]


def _fidelity(store: Store, name: str) -> str:
    """Say what an array's numbers are, and how far they are off where that was measured."""
    encoding = store.identity.get("arrays", {}).get(name, {})
    known = {what: encoding[what] for what in ("layer", "precision", "norm") if encoding.get(what, "unknown") != "unknown"}
    words = [f"layer {known['layer']}"] if "layer" in known else []
    words += [f"computed in {known['precision']}"] if "precision" in known else []
    if name in store.codecs:
        coded = store.codecs[name]
        held = coded.record.get("held_out", {})
        words.append(f"codec `{coded.chain}`")
        if "cosine" in held:
            words.append("cosine of rows held out with their decoded ones {mean} on average, {p01} at the first percentile".format(**held["cosine"]))
        if "top1_agreement_image_to_text" in held:
            words.append(f"the best caption stays the best for {100 * held['top1_agreement_image_to_text']:.1f} % of images")
    elif store.arrays[name].dtype.startswith("float") and name != "image/view":
        words.append("values as the tower returned them, before normalisation" if known.get("norm") == "none" else f"norm: {known.get('norm', 'unknown')}")
    return "; ".join(words) or "-"


def _teacher(store: Store) -> list[str]:
    said = store.identity.get("teacher", {})
    known = {"name": said.get("name"), "weights (sha256 of the tensors)": said.get("weights_sha256"), "activation": said.get("activation")}
    known |= {"logit scale": said.get("logit_scale"), "logit bias": said.get("logit_bias")}
    lines = [f"- {what}: {value}" for what, value in known.items() if value is not None]
    preprocessing = {name: value for name, value in store.identity.get("preprocessing", {}).items() if name != "digest"}
    lines += [f"- preprocessing: `{json.dumps(preprocessing, sort_keys=True)}`"] if preprocessing else []
    unknown = [*said.get("unknown", []), *store.identity.get("unknown", [])]
    return [*lines, f"- unknown, because the features were imported: {', '.join(unknown)}"] if unknown else lines


def _notices(store: Store) -> list[str]:
    """Say what lies beside the manifest, is published with the store, and tells of the machine that made it."""
    record = store.path / "run.json"
    paths = sorted({text for text in _texts(read_json(record)) if text.startswith(("/", "~"))}) if record.is_file() else []
    return [f"{record} names {', '.join(paths[:3])}: remove it before you publish the store, if that is nobody's business."] if paths else []


def _texts(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for part in (*value, *value.values()) for text in _texts(part)]
    if isinstance(value, list):
        return [text for part in value for text in _texts(part)]
    return [value] if isinstance(value, str) else []
