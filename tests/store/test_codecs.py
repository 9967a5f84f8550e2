"""Value codecs: what they promise of any features, and a stranger who decodes them from docs/format.md alone."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdstore.errors import ConfigError, DamagedStore, IdentityMismatch, MissingFeature, StoreError, UnknownName
from kdstore.jsonfile import digest_of, write_json
from kdstore.store import (
    StoreWriter,
    codec_files,
    codec_identity,
    concat_stores,
    embedding_array,
    fit_chain,
    kept_codec,
    open_store,
    parse_chain,
    recode_store,
    scalar_array,
    subset_store,
    token_array,
    verify_store,
)
from kdstore.store.codecs import CODECS
from kdstore.store.recode import Encoding

DOCS = Path(__file__).parents[2] / "docs" / "format.md"
UNDECODABLE = 20
CODED = {"image/embedding": "pca6+int8", "image/tokens": "pool2+pq2", "text/embedding": "int8", "text/tokens": "pca3"}
SHAPES = {"image/embedding": (8,), "image/tokens": (9, 6), "text/embedding": (8,), "text/tokens": (5, 6)}


def features(shape, seed=0, rows=300):
    """Correlated channels of many scales, one of them massive."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(rows, *shape)) @ rng.normal(size=(shape[-1], shape[-1])) * np.geomspace(1, 0.01, shape[-1]) + rng.normal(size=shape[-1])
    mixed[..., 1] *= 1000
    return mixed.astype(np.float32)


def fitted(text, shape, rows):
    chain = parse_chain(text)
    pooled = chain.pooled(rows)
    return fit_chain(chain, shape, pooled.reshape(-1, pooled.shape[-1]))


def test_a_chain_is_read_as_it_is_written():
    assert [str(parse_chain(text)) for text in ("int8", "pool7", "pca256 + int8", "pool7+pq64", "float32")] == [
        "int8",
        "pool7+float16",
        "pca256+int8",
        "pool7+pq64",
        "float32",
    ]
    assert str(parse_chain("pca3", "float32")) == "pca3+float32"
    assert parse_chain("float16").plain
    assert not parse_chain("pca3").plain


@pytest.mark.parametrize("text", ["", "int9", "pool", "pca0", "int8+pca4", "int8+float16", "pca4+pca2", "pq", "pca9999999", "float16x"])
def test_what_is_no_chain_is_refused(text):
    with pytest.raises(ConfigError):
        parse_chain(text)


def test_an_unknown_codec_names_those_that_are_known():
    with pytest.raises(UnknownName, match="pca"):
        parse_chain("pcb16")


@pytest.mark.parametrize(
    ("text", "shape", "said"),
    [
        ("pool2", (8,), "square grid"),
        ("pool2", (6, 8), "square grid"),
        ("pool4", (9, 8), "square grid"),
        ("pca9", (4, 8), "pca8"),
        ("pq3", (8,), "pq2"),
        ("pca6+pq4", (8,), "pq3"),
    ],
)
def test_a_chain_that_does_not_fit_the_rows_says_what_would(text, shape, said):
    with pytest.raises(ConfigError, match=said):
        parse_chain(text).shapes(shape)


def test_a_sample_that_is_too_small_is_refused():
    for text, rows in (("pca4", 4), ("pq2", 255), ("int8", 1)):
        with pytest.raises(ConfigError, match="vectors to be fitted"):
            fit_chain(parse_chain(text), (8,), features((8,), rows=rows))


@given(st.integers(0, 2**32 - 1), st.integers(2, 90), st.floats(0, 4), st.integers(2, 80))
@settings(max_examples=60, deadline=None)
def test_int8_is_off_by_half_a_step_at_most_in_every_channel(seed, width, spread, rows):
    rng = np.random.default_rng(seed)
    scale = 10 ** rng.uniform(-spread, spread, width)
    sample = ((rng.standard_t(3, (rows, width)) + rng.normal(size=width)) * scale).astype(np.float32)
    sample[:, 0] = 3.5  # constant
    codec = fit_chain(parse_chain("int8"), (width,), sample)
    step, mean = codec.parameters["int8-scale"], codec.parameters["int8-mean"]
    inside = np.abs(sample - mean) <= 127 * step
    error = np.abs(codec.decode(codec.encode(sample)) - sample)
    assert (error <= 0.5 * step + 4e-7 * np.maximum(np.abs(sample), 127 * step))[inside].all()
    assert inside.mean() > 0.5
    assert (codec.decode(codec.encode(sample))[:, 0] == 3.5).all()
    alone = fit_chain(parse_chain("int8"), (width - 1,), sample[:, 1:])  # a channel changes nothing in the others
    assert (alone.parameters["int8-scale"] == step[1:]).all()


def test_int8_clips_a_massive_value_only_where_that_serves_the_rest():
    rng = np.random.default_rng(0)
    sample = rng.normal(size=(20_000, 2)).astype(np.float32)
    sample[0] = 12, 100_000
    codec = fit_chain(parse_chain("int8"), (2,), sample)
    assert codec.parameters["int8-scale"][0] < 11 / 127
    assert codec.parameters["int8-scale"][1] == pytest.approx(100_000 / 127, rel=0.01)


@given(st.integers(1, 9), st.integers(1, 9), st.floats(-1e4, 1e4, width=32), st.integers(1, 3))
def test_the_pool_of_a_constant_grid_is_that_constant(side, cells, value, batch):
    cells = min(side, cells)
    pooled = parse_chain(f"pool{cells}").pooled(np.full((batch, side * side, 2), value, np.float32))
    assert pooled.shape == (batch, cells * cells, 2)
    assert (pooled == np.float32(value)).all()


@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_pooling_is_that_of_torch(side, cells, seed):
    import torch

    cells = min(side, cells)
    rows = np.random.default_rng(seed).normal(size=(2, side * side, 3)).astype(np.float32)
    grid = torch.from_numpy(rows).reshape(2, side, side, 3).permute(0, 3, 1, 2)
    expected = torch.nn.functional.adaptive_avg_pool2d(grid, cells).permute(0, 2, 3, 1).reshape(2, cells * cells, 3)
    np.testing.assert_allclose(parse_chain(f"pool{cells}").pooled(rows), expected.numpy(), rtol=1e-5, atol=1e-6)


def test_pca_of_all_channels_is_exact_to_rounding_and_of_fewer_the_best():
    rows = features((8,))
    exact = fitted("pca8+float32", (8,), rows)
    np.testing.assert_allclose(exact.decode(exact.encode(rows)), rows, rtol=0, atol=1e-6 * np.abs(rows).max())
    basis = exact.parameters["pca-basis"]
    np.testing.assert_allclose(basis @ basis.T, np.eye(8), atol=1e-6)
    fewer = fitted("pca3+float32", (8,), rows)
    lost = np.square(fewer.decode(fewer.encode(rows)).astype(float) - rows).sum()
    variances = np.sort(np.linalg.svd(rows - rows.mean(0, dtype=float), compute_uv=False) ** 2)
    assert lost == pytest.approx(variances[:5].sum(), rel=1e-3)


@pytest.mark.parametrize(("text", "shape"), [*((text, SHAPES[name]) for name, text in CODED.items()), ("pool2+pca4+int8", (9, 6)), ("pca4+pq2", (8,))])
def test_a_chain_is_its_steps_one_after_the_other(text, shape):
    rows = features(shape)
    codec = fitted(text, shape, rows)
    codes = codec.encode(rows)
    assert codes.shape[1:] == codec.chain.shapes(shape)[-1]
    assert codes.dtype == codec.chain.dtype
    values = codec.chain.pooled(rows)
    for k, step in enumerate(codec.chain.steps):
        if step.kind != "pool":
            head = parse_chain("+".join([*(str(s) for s in codec.chain.steps[:k] if s.kind != "pool"), str(step)]), "float32")
            parameters = {name: value for name, value in codec.parameters.items() if name.partition("-")[0] in {s.kind for s in head.steps}}
            values_to_here = dataclasses.replace(codec, chain=head, row_shape=values.shape[1:], parameters=parameters)
    assert (values_to_here.encode(values) == codes).all()
    decoded = codec.decode(codes)
    assert (decoded.shape, decoded.dtype) == ((len(rows), *codec.feature_shape), np.float32)
    assert (values_to_here.decode(codes) == decoded).all()
    unit = [x.reshape(-1, x.shape[-1]) / np.linalg.norm(x.reshape(-1, x.shape[-1]), axis=1, keepdims=True) for x in (values, decoded)]
    assert (unit[0] * unit[1]).sum(1).mean() > 0.9


@given(
    st.sampled_from([*CODED.items(), ("image/tokens", "pca4+int8"), ("text/embedding", "pca5")]), st.lists(st.integers(0, 90), max_size=4), st.integers(0, 9)
)
@settings(max_examples=40, deadline=None)
def test_codes_do_not_depend_on_how_rows_come_in_batches(case, cuts, seed):
    name, text = case
    rows = features(SHAPES[name], seed, rows=90 if name == "image/tokens" else 300)
    codec = fitted(text, SHAPES[name], rows)
    whole = codec.encode(rows)
    parts = np.split(rows, sorted(cuts))
    assert np.concatenate([codec.encode(part) for part in parts]).tobytes() == whole.tobytes()
    assert (fitted(text, SHAPES[name], rows).encode(rows) == whole).all()


def test_every_codec_has_its_heading_in_the_docs():
    lines = DOCS.read_text(encoding="utf-8").splitlines()
    assert {f"### `{name}`" for name in CODECS} <= set(lines)


@dataclasses.dataclass(frozen=True)
class Coded:
    """How a store of codes is written, and from which features."""

    sample: object
    codecs: dict
    values: dict
    lengths: np.ndarray
    arrays: list
    identity: dict
    constants: dict

    def write(self, path, step=5, units=None):
        with StoreWriter.open(path, plan=self.sample.plan, arrays=self.arrays, identity=self.identity, constants=self.constants) as writer:
            for unit in writer.pending()[:units]:
                with writer.attempt(unit) as attempt:
                    for start in range(unit.start, unit.stop, step):
                        rows = slice(start, min(start + step, unit.stop))
                        for spec in self.arrays:
                            if spec.side == unit.side:
                                attempt.append(spec.name, self.lengths[rows] if spec.name == "text/length" else self.block(spec, rows))
                        if unit.side == "image":
                            attempt.index([self.sample.index_row(i) for i in range(rows.start, rows.stop)])
            return writer.finalise({}) if units is None else None

    def block(self, spec, rows):
        codes = self.codecs[spec.name].encode(self.values[spec.name][rows])
        if spec.side == "image":
            codes[np.arange(rows.start, rows.stop) == UNDECODABLE] = 0
        elif len(spec.shape) == 3:
            codes[np.arange(codes.shape[1]) >= self.lengths[rows][:, None]] = 0
        return codes.reshape(-1, *spec.shape[1:])


@pytest.fixture(scope="module")
def coded(sample):
    plan = sample.plan
    codecs = {name: dataclasses.replace(fitted(text, SHAPES[name], features(SHAPES[name])), record={"fit": {"rows": 300}}) for name, text in CODED.items()}
    values = {name: features(shape, 1, plan.num_images if name.startswith("image") else plan.num_texts) for name, shape in SHAPES.items()}
    arrays = [scalar_array(plan, "text/length", "int64")]
    for name, codec in codecs.items():
        kind = embedding_array if name.endswith("embedding") else token_array
        arrays.append(kind(plan, name.partition("/")[0], *codec.chain.shapes(SHAPES[name])[-1], dtype=codec.chain.dtype))
    identity = {**sample.identity, "arrays": {name: {"codec": codec_identity(codec)} for name, codec in codecs.items()}}
    constants = {path: content for name, codec in codecs.items() for path, content in codec_files(name, codec).items()}
    lengths = np.random.default_rng(0).integers(1, 6, plan.num_texts)
    return Coded(sample, codecs, values, lengths, arrays, identity, constants)


@pytest.fixture(scope="module")
def written(coded, tmp_path_factory):
    path = tmp_path_factory.mktemp("coded") / "store"
    coded.write(path)
    return path


def expected(coded, name):
    """Features as float32, decoded by the codec that wrote them."""
    codec = coded.codecs[name]
    found = codec.decode(codec.encode(coded.values[name]))
    if name.startswith("image/"):
        found[UNDECODABLE] = np.nan
    if name == "text/tokens":
        found[np.arange(5) >= coded.lengths[:, None]] = 0
    return found


def test_features_are_decoded_and_gather_returns_what_is_stored(coded, written):
    store = open_store(written)
    assert verify_store(written).ok
    for name in CODED:
        whole = expected(coded, name)
        rows = [3, 0, UNDECODABLE, -1, 3]
        found = store.features(name, rows)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, whole[rows])
        assert store.feature_shape(name) == whole.shape[1:]
        out = np.empty_like(found)
        assert store.features(name, rows, out=out) is out
        np.testing.assert_array_equal(out, found)
        assert store.gather(name, rows).dtype == store.arrays[name].dtype
    assert (store.gather("image/embedding", [UNDECODABLE]) == 0).all()
    assert store.features("text/embedding", []).shape == (0, 8)
    with pytest.raises(ValueError, match="float32"):
        store.features("image/embedding", [0], out=np.empty((1, 8)))


def test_features_of_floats_are_themselves_and_numbers_without_a_codec_are_refused(pristine, written):
    store = open_store(pristine)
    rows, views = [4, 1], [1, 0]
    np.testing.assert_array_equal(store.features("image/embedding", rows, views), store.gather("image/embedding", rows, views).astype(np.float32))
    with pytest.raises(MissingFeature, match="without a codec"):
        store.features("text/length", rows)
    with pytest.raises(MissingFeature):
        store.features("text/tokens", rows)


def test_a_stranger_decodes_from_the_page(coded, written):
    """NumPy and json alone, after docs/format.md; the arrays themselves any Zarr reader gives."""
    identity, store = json.loads((written / "manifest.json").read_text(encoding="utf-8"))["identity"], open_store(written)
    for name in CODED:
        said = json.loads((written / f"codecs/{name}.json").read_text(encoding="utf-8"))
        assert identity["arrays"][name]["codec"] == {"name": said["codec"], "digest": said["digest"]}
        numbers = {p: np.load(written / f"codecs/{name}/{p}.npy").reshape(of["shape"]) for p, of in said["parameters"].items()}
        codes = store.gather(name, np.arange(store.arrays[name].shape[0]))
        values = codes
        for step in reversed(said["codec"].split("+")):
            if step == "int8":
                values = numbers["int8-mean"] + values.astype("f4") * numbers["int8-scale"]
            elif step.startswith("pq"):
                values = np.concatenate([numbers["pq-codebooks"][m][values[..., m]] for m in range(values.shape[-1])], -1)
            elif step.startswith("pca"):
                values = numbers["pca-mean"] + values.astype("f4") @ numbers["pca-basis"]
            else:
                assert step in ("pool2", "float16")
        if name == "text/tokens":
            values[np.arange(values.shape[1]) >= store.gather("text/length", np.arange(len(values)))[:, None]] = 0
        valid = store.image_valid if name.startswith("image/") else store.text_valid
        np.testing.assert_allclose(values[valid], expected(coded, name)[valid], rtol=1e-4, atol=1e-4)
        grid = math.isqrt(said["row_shape"][0]) if "pool" in said["codec"] else None
        assert grid in (None, 3)


def test_a_resumed_run_writes_the_same_store_in_other_batches(coded, written, tmp_path):
    coded.write(tmp_path / "s", step=16, units=3)
    kept = {name: kept_codec(tmp_path / "s" / "_build", name, codec.chain, codec.row_shape) for name, codec in coded.codecs.items()}
    assert {path: content for name, codec in kept.items() for path, content in codec_files(name, codec).items()} == coded.constants
    assert dataclasses.replace(coded, codecs=kept).write(tmp_path / "s", step=7) == open_store(written).digest


def test_a_kept_codec_of_another_name_or_with_lost_parameters_is_none(coded, tmp_path):
    coded.write(tmp_path / "s", units=1)
    build, codec = tmp_path / "s" / "_build", coded.codecs["text/tokens"]
    assert kept_codec(build, "text/tokens", parse_chain("pca2"), codec.row_shape) is None
    assert kept_codec(build, "text/tokens", codec.chain, (7, 6)) is None
    (build / "codecs/text/tokens/pca-basis.npy").write_bytes(b"")
    assert kept_codec(build, "text/tokens", codec.chain, codec.row_shape) is None
    assert kept_codec(build, "text/nothing", codec.chain, codec.row_shape) is None


def test_stores_made_of_a_coded_one_keep_its_codecs(coded, written, tmp_path):
    subset_store(written, tmp_path / "a", rows=slice(0, 10))
    subset_store(written, tmp_path / "b", rows=slice(10, None), arrays=["image/tokens", "text/embedding"])
    recode_store(written, tmp_path / "c", Encoding(codec="zstd"))
    recode_store(written, tmp_path / "d", Encoding(dtype="float32"), arrays=["text/tokens"])
    for path, rows in (("a", slice(0, 10)), ("b", slice(10, 45)), ("c", slice(0, 45)), ("d", slice(0, 45))):
        store = open_store(tmp_path / path)
        assert verify_store(tmp_path / path).ok
        np.testing.assert_array_equal(store.features("image/tokens", np.arange(store.num_images)), expected(coded, "image/tokens")[rows])
    np.testing.assert_array_equal(open_store(tmp_path / "d").features("text/tokens", np.arange(66)), expected(coded, "text/tokens"))
    assert not (tmp_path / "b" / "codecs" / "image" / "embedding.json").exists()
    subset_store(written, tmp_path / "e", rows=slice(10, None))
    concat_stores([tmp_path / "a", tmp_path / "e"], tmp_path / "f")
    np.testing.assert_array_equal(open_store(tmp_path / "f").features("image/embedding", np.arange(45)), expected(coded, "image/embedding"))


def test_stores_whose_codes_mean_other_values_are_not_put_together(coded, written, tmp_path):
    other = fitted("int8", (8,), features((8,), seed=5))
    identity = {**coded.identity, "arrays": {**coded.identity["arrays"], "text/embedding": {"codec": codec_identity(other)}}}
    constants = {**coded.constants, **codec_files("text/embedding", other)}
    changed = dataclasses.replace(coded, codecs={**coded.codecs, "text/embedding": other}, identity=identity, constants=constants)
    changed.write(tmp_path / "other")
    with pytest.raises(IdentityMismatch, match=r"text/embedding\.codec"):
        concat_stores([written, tmp_path / "other"], tmp_path / "both")


def rewritten(path, name, **changes):
    """Change a codec's description and let identity and manifest agree with it: what a hostile author would do."""
    where = path / f"codecs/{name}.json"
    said = {**json.loads(where.read_text(encoding="utf-8")), **changes}
    digest = write_json(where, said)
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    import hashlib

    content = where.read_bytes()
    manifest["files"][f"codecs/{name}.json"] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest["identity"]["arrays"][name]["codec"] = {"name": said["codec"], "digest": digest}
    manifest["identity_digest"] = digest_of(manifest["identity"])
    write_json(path / "manifest.json", manifest)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"codec": "pca5+int8"}, "it leaves"),
        ({"codec": "pq6"}, "fit rows|it leaves"),
        ({"codec": "pca6+float16"}, "it leaves"),
        ({"codec": "lz77"}, "Unknown codec"),
        ({"codec": 3}, "does not describe"),
        ({"codec": "pca6+int8+" * 1000}, "no chain|Unknown"),
        ({"row_shape": [9]}, "parameters"),
        ({"row_shape": [2**62]}, "row_shape"),
        ({"row_shape": [True]}, "row_shape"),
        ({"row_shape": [8, 8]}, "row_shape"),
        ({"row_shape": None}, "does not describe"),
        ({"row_shape": [65536]}, "parameters"),
        ({"parameters": {}}, "parameters"),
        ({"parameters": [["pca-mean"]]}, "parameters"),
    ],
)
def test_a_hostile_description_is_refused_when_the_store_is_opened(changes, said, written, tmp_path):
    path = Path(shutil.copytree(written, tmp_path / "s"))
    rewritten(path, "image/embedding", **changes)
    with pytest.raises(StoreError, match=said):
        open_store(path)
    assert not verify_store(path).ok


def test_a_row_that_would_decode_to_gigabytes_is_refused(tmp_path, sample):
    codec = fitted("pq1", (9, 8), features((9, 8)))
    large = dataclasses.replace(codec, row_shape=(16384, 65536), parameters={"pq-codebooks": np.zeros((1, 256, 65536), np.float32)})
    arrays = [token_array(sample.plan, "image", 16384, 1, dtype="uint8")]
    identity = {**sample.identity, "arrays": {"image/tokens": {"codec": codec_identity(large)}}}
    with StoreWriter.open(tmp_path / "s", plan=sample.plan, arrays=arrays, identity=identity, constants=codec_files("image/tokens", large)) as writer:
        for unit in writer.pending():
            with writer.attempt(unit) as attempt:
                if unit.side == "image":
                    attempt.append("image/tokens", np.zeros((len(unit), 1, 16384, 1), np.uint8))
                    attempt.index([sample.index_row(i) for i in range(unit.start, unit.stop)])
        writer.finalise({})
    with pytest.raises(DamagedStore, match="larger than any codec"):
        open_store(tmp_path / "s")


def test_parameters_that_are_missing_cut_or_not_finite_are_refused(coded, written, tmp_path):
    path = Path(shutil.copytree(written, tmp_path / "s"))
    mean = path / "codecs/text/embedding/int8-mean.npy"
    content = bytearray(mean.read_bytes())
    content[-1] ^= 1
    mean.write_bytes(content)
    store = open_store(path)
    with pytest.raises(DamagedStore, match="int8-mean"):
        store.features("text/embedding", [0])
    assert [damage.path for damage in verify_store(path).damaged] == ["codecs/text/embedding/int8-mean.npy"]
    mean.unlink()
    with pytest.raises(DamagedStore, match="missing"):
        open_store(path).features("text/embedding", [0])
    broken = dataclasses.replace(
        coded.codecs["text/embedding"], parameters={**coded.codecs["text/embedding"].parameters, "int8-mean": np.full(8, np.nan, "f4")}
    )
    identity = {**coded.identity, "arrays": {**coded.identity["arrays"], "text/embedding": {"codec": codec_identity(broken)}}}
    dataclasses.replace(coded, identity=identity, constants={**coded.constants, **codec_files("text/embedding", broken)}).write(tmp_path / "nan")
    with pytest.raises(DamagedStore, match="not finite"):
        open_store(tmp_path / "nan").features("text/embedding", [0])
