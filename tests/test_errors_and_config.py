"""The base layer: errors that travel, configuration that suggests, JSON that proves itself."""

import dataclasses
import inspect
import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdstore import errors
from kdstore.config import config_digest, make_config, parse_set, read_recipe
from kdstore.errors import CannotWrite, ConfigError, DamagedStore, KdstoreError, UnknownName
from kdstore.jsonfile import canonical_json, digest_of, read_json, write_json

ALL_ERRORS = [e for _, e in inspect.getmembers(errors, inspect.isclass) if issubclass(e, KdstoreError)]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    rate: float = 0.1
    rows: int = 4
    name: str | None = None
    seeds: tuple[int, ...] = (0,)
    on: bool = False


@pytest.mark.parametrize("error", ALL_ERRORS)
def test_errors_cross_processes_with_message_and_hint(error):
    found = pickle.loads(pickle.dumps(error("Expected a, found b.", "Try c.")))
    assert (type(found), found.message, found.hint, str(found)) == (error, "Expected a, found b.", "Try c.", "Expected a, found b. Try c.")


def test_an_unknown_name_suggests_near_ones_or_lists_few():
    assert "Did you mean scenes" in str(UnknownName.of("source", "scnes", ["scenes", "hf"]))
    assert "Known: hf, scenes" in str(UnknownName.of("source", "zzz", ["scenes", "hf", "scenes"]))
    assert "Did you mean" not in str(UnknownName.of("setting", "nonsense", ["tokens", "views"]))


def test_later_layers_win_and_none_leaves_a_setting_alone():
    found = make_config(Settings, {"rate": 1, "rows": 2}, {"rows": 3, "seeds": [1, 2]}, {"rows": None, "name": "x"})
    assert found == Settings(rate=1.0, rows=3, name="x", seeds=(1, 2))


@pytest.mark.parametrize("wrong", [{"rate": "fast"}, {"rows": 1.5}, {"rows": True}, {"on": 1}, {"seeds": 3}, {"seeds": ["a"]}, {"name": 3}])
def test_a_value_of_another_type_is_named(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        make_config(Settings, wrong)


def test_a_number_where_a_text_is_wanted_says_how_to_quote_it():
    with pytest.raises(ConfigError) as e:
        make_config(Settings, parse_set(["name=2016"]))
    assert """--set 'name="2016"'""" in e.value.hint
    assert make_config(Settings, parse_set(['name="2016"'])).name == "2016"


def test_an_unknown_setting_gets_a_suggestion():
    with pytest.raises(UnknownName, match="Did you mean rate"):
        make_config(Settings, {"ratee": 1})


def test_a_setting_that_is_needed_is_named_as_an_option():
    needing = dataclasses.make_dataclass("Needing", [("the_model", str), ("rows", int, 4)])
    with pytest.raises(ConfigError, match="--the-model is needed"):
        make_config(needing, {"rows": 1})


def test_set_reads_toml_values_and_falls_back_to_text():
    assert parse_set(["a=1", "b=[1, 2]", "c=true", "d=some/path", "e = 1e-3"]) == {"a": 1, "b": [1, 2], "c": True, "d": "some/path", "e": 1e-3}
    with pytest.raises(ConfigError, match="no '='"):
        parse_set(["oops"])


def test_a_recipe_has_known_tables_only(tmp_path):
    (tmp_path / "r.toml").write_text("[distill]\nlr = 1\n")
    assert read_recipe(tmp_path / "r.toml", {"distill"}) == {"distill": {"lr": 1}}
    with pytest.raises(UnknownName):
        read_recipe(tmp_path / "r.toml", {"extract"})
    with pytest.raises(ConfigError, match="Cannot read"):
        read_recipe(tmp_path / "missing.toml", {"distill"})


@pytest.mark.parametrize("name", ["missing/f.json", "file/f.json", "folder"])
def test_every_file_that_cannot_be_written_is_an_error_of_ours(name, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(CannotWrite, match="Cannot write"):
        write_json(tmp_path / name, {})
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "folder"]


def test_a_digest_ignores_what_is_left_out():
    assert config_digest(Settings(rows=1), leave_out=("rows",)) == config_digest(Settings(rows=2), leave_out=("rows",))
    assert config_digest(Settings(rows=1)) != config_digest(Settings(rows=2))


@given(json_values)
def test_the_canonical_form_survives_a_round_trip(value):
    assert canonical_json(json.loads(canonical_json(value))) == canonical_json(value)


@given(st.dictionaries(st.text().filter(lambda k: k != "digest"), json_values, min_size=1, max_size=4))
def test_a_json_file_comes_back_with_its_digest(tmp_path, content):
    digest = write_json(tmp_path / "f.json", content)
    assert read_json(tmp_path / "f.json") == {**content, "digest": digest}
    assert digest == digest_of(content)


def test_every_flipped_bit_of_a_json_file_is_found(tmp_path):
    write_json(tmp_path / "f.json", {"a": [1, 2.5, None], "b": "text"})
    whole = (tmp_path / "f.json").read_bytes()
    content = json.loads(whole)
    for place in range(len(whole)):
        for bit in range(8):
            changed = bytearray(whole)
            changed[place] ^= 1 << bit
            (tmp_path / "f.json").write_bytes(changed)
            try:
                found = read_json(tmp_path / "f.json")
            except DamagedStore:
                continue
            assert found == content, "white space may change, content may not"
