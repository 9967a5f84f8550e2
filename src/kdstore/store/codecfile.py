"""The files of a value codec: `codecs/<array>.json` and flat float32 arrays beside it, written once and read with a stranger's store in mind.

The digest inside the JSON file covers the sha256 of every array of parameters, and the store's identity holds that digest. So stores are put
together only if their codes mean the same, and parameters that were exchanged for others are found before anything is decoded.
"""

from __future__ import annotations

import hashlib
import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kdstore.errors import ConfigError, DamagedStore, StoreError
from kdstore.jsonfile import encode_json, parse_json, read_json
from kdstore.store.codecs import Chain, Codec, Shape, parse_chain
from kdstore.store.layout import MAX_CHUNK_BYTES, ArraySpec
from kdstore.store.manifest import MAX_METADATA_BYTES, NPY_HEADER_BYTES, RESTORE, Manifest

MAX_NUMBERS = 1 << 26  # parameters of one codec: 256 MiB
MAX_WIDTH = 1 << 16
_OWN = ("codec", "row_shape", "parameters", "digest")


@dataclass(frozen=True, eq=False)
class StoredCodec:
    """A codec whose description was checked against its array; what it learned is read by `load`."""

    name: str
    chain: Chain
    row_shape: Shape
    record: dict[str, Any]

    @property
    def feature_shape(self) -> Shape:
        return self.chain.feature_shape(self.row_shape)

    def load(self, manifest: Manifest) -> Codec:
        """Read the parameters; raises DamagedStore, CannotRead."""
        parameters = {}
        for parameter, shape in self.chain.parameters(self.row_shape).items():
            path = parameter_path(self.name, parameter)
            parameters[parameter] = manifest.load(path, math.prod(shape), "<f4").reshape(shape)
            if not np.isfinite(parameters[parameter]).all():
                raise DamagedStore(f"{manifest.where(path)} holds numbers that are not finite.", RESTORE)
        return Codec(self.chain, self.row_shape, parameters, self.record)


def description_path(name: str) -> str:
    return f"codecs/{name}.json"


def parameter_path(name: str, parameter: str) -> str:
    return f"codecs/{name}/{parameter}.npy"


def npy_bytes(array: npt.NDArray[Any]) -> bytes:
    """Return an array as a .npy file."""
    sink = io.BytesIO()
    np.save(sink, array, allow_pickle=False)
    return sink.getvalue()


def codec_files(name: str, codec: Codec) -> dict[str, bytes]:
    """Return the files of an array's codec by their paths in the store, the description last."""
    files = {parameter_path(name, parameter): npy_bytes(value.astype("<f4").reshape(-1)) for parameter, value in codec.parameters.items()}
    return {**files, description_path(name): encode_json(_description(codec))[0]}


def codec_identity(codec: Codec) -> dict[str, str]:
    """Return what `identity.arrays` says of an array's codec."""
    return {"name": str(codec.chain), "digest": encode_json(_description(codec))[1]}


def kept_codec(folder: Path, name: str, chain: Chain, row_shape: Shape) -> Codec | None:
    """Return the codec that an earlier process left in a build folder, or None unless it is this one and whole."""
    try:
        said = read_json(folder / description_path(name))
        if (said["codec"], said["row_shape"]) != (str(chain), list(row_shape)):
            return None
        parameters = {}
        for parameter, shape in chain.parameters(row_shape).items():
            content = (folder / parameter_path(name, parameter)).read_bytes()
            if hashlib.sha256(content).hexdigest() != said["parameters"][parameter]["sha256"]:
                return None
            parameters[parameter] = np.load(io.BytesIO(content), allow_pickle=False).reshape(shape)
    except (OSError, DamagedStore):
        return None
    return Codec(chain, row_shape, parameters, _record(said))


def stored_codecs(manifest: Manifest, arrays: dict[str, ArraySpec]) -> dict[str, StoredCodec]:
    """Return the codecs of a store's arrays by name, of which only the descriptions are read.

    Raises DamagedStore for a description or parameters that are not what the identity, the array and its name ask for, StoreError for an unknown codec.
    """
    identity = manifest.content["identity"]
    said = identity.get("arrays", {})
    coded = {name: encoding["codec"] for name, encoding in said.items() if isinstance(encoding, dict) and "codec" in encoding} if isinstance(said, dict) else {}
    return {name: _stored(manifest, arrays[name], codec) for name, codec in coded.items() if name in arrays}


def _stored(manifest: Manifest, spec: ArraySpec, codec: Any) -> StoredCodec:
    path = description_path(spec.name)
    where = manifest.where(path)
    said = parse_json(manifest.read(path, MAX_METADATA_BYTES), where)
    try:
        if codec != {"name": said["codec"], "digest": said["digest"]}:
            raise ValueError("it is not the codec of the identity")
        row_shape = tuple(said["row_shape"])
        if len(row_shape) != len(spec.row_shape) or not all(type(n) is int and 1 <= n <= MAX_WIDTH for n in row_shape):
            raise ValueError(f"row_shape is {str(row_shape)[:80]}")
        chain = parse_chain(said["codec"][:80])
        wanted = chain.parameters(row_shape)
        if chain.shapes(row_shape)[-1] != spec.row_shape or not (chain.dtype == spec.dtype or (chain.dtype[:5], spec.dtype[:5]) == ("float", "float")):
            raise ValueError(f"it leaves {chain.shapes(row_shape)[-1]} {chain.dtype}, the array holds {spec.row_shape} {spec.dtype}")
        if sum(map(math.prod, wanted.values())) > MAX_NUMBERS or 4 * math.prod(chain.feature_shape(row_shape)) > MAX_CHUNK_BYTES:
            raise ValueError("it is larger than any codec")
        listed = {parameter: manifest.entry(parameter_path(spec.name, parameter)) for parameter in wanted}
        if said["parameters"] != {p: {"shape": list(shape), "sha256": listed[p].sha256} for p, shape in wanted.items()}:
            raise ValueError("its parameters are not those that the manifest lists")
        for parameter, shape in wanted.items():
            if not 4 * math.prod(shape) < listed[parameter].size <= 4 * math.prod(shape) + NPY_HEADER_BYTES:
                raise ValueError(f"{parameter} has {listed[parameter].size} bytes, its shape is {shape}")
    except ConfigError as e:
        raise StoreError(f"{where}: {e.message}", "Read it with the version of kdstore that wrote it.") from e
    except (LookupError, TypeError, ValueError, AttributeError) as e:
        raise DamagedStore(f"{where} does not describe the codec of {spec.name} ({type(e).__name__}: {str(e)[:200]}).", RESTORE) from e
    return StoredCodec(spec.name, chain, row_shape, _record(said))


def _description(codec: Codec) -> dict[str, Any]:
    values = {parameter: value.astype("<f4") for parameter, value in codec.parameters.items()}
    parameters = {p: {"shape": list(value.shape), "sha256": hashlib.sha256(npy_bytes(value.reshape(-1))).hexdigest()} for p, value in values.items()}
    return {"codec": str(codec.chain), "row_shape": list(codec.row_shape), "parameters": parameters, **codec.record}


def _record(said: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in said.items() if name not in _OWN}
