from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from derc.config import BUDGETS, KEYS, LOWER_BUDGETS, TEMPLATE, CompileSettings, resolve
from derc.errors import UsageError
from derc.workspace import lower_precisions


def test_defaults(tmp_path):
    settings = resolve({}, {}, tmp_path)
    assert (settings.zoo, settings.data, settings.target) == ("digits", "digits", "cpu")
    assert settings.embedded_zoo and settings.budgets == {} and settings.output == Path("out/derc")


def test_flag_over_environment_over_file(tmp_path):
    (tmp_path / "derc.toml").write_text("latency_ms = 1.0\nparams_m = 2\nblocks = 6\nseed = 7\n")
    environ = {"DERC_LATENCY_MS": "3", "DERC_BLOCKS": "5", "HOME": "/", "DERC_TOP": ""}
    settings = resolve({"latency_ms": 4.0, "zoo": None}, environ, tmp_path)
    assert (settings.latency_ms, settings.blocks, settings.seed) == (4.0, 5, 7)
    assert settings.budgets == {"latency_ms": 4.0, "params_m": 2.0}
    assert settings.embedded_zoo and "blocks" not in settings.defaulted


def test_a_zoo_that_was_given_is_not_the_default(tmp_path):
    assert not resolve({}, {"DERC_ZOO": "digits"}, tmp_path).embedded_zoo


@given(
    value=st.one_of(st.floats(max_value=0), st.sampled_from([float("nan"), float("inf")])), key=st.sampled_from(BUDGETS)
)
def test_budgets_that_are_not_positive_and_finite_are_refused_by_name(value, key):
    with pytest.raises(UsageError, match="--" + key.replace("_", "-") + ".*positive"):
        resolve({key: value}, {}, Path("/nonexistent"))


@given(value=st.floats(min_value=1e-6, max_value=1e6), key=st.sampled_from(BUDGETS))
def test_other_budgets_are_kept(value, key):
    assert resolve({}, {f"DERC_{key.upper()}": repr(value)}, Path("/nonexistent")).budgets == {key: value}


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("input_size = 224", (224, 224)),
        ('input_size = "192x256"', (192, 256)),
        ('input_size = "3,192,256"', (3, 192, 256)),
        ("input_size = [1, 28, 28]", (1, 28, 28)),
        ("", None),
    ],
)
def test_input_size_in_every_form(tmp_path, text, size):
    (tmp_path / "derc.toml").write_text(text)
    settings = resolve({}, {}, tmp_path)
    assert settings.size == size
    assert resolve({"input_size": settings.input_size}, {}, None).size == size


def test_offline_from_file_variable_and_flag(tmp_path):
    assert not resolve({}, {}, tmp_path).offline
    assert resolve({}, {"DERC_OFFLINE": "1"}, tmp_path).offline
    (tmp_path / "derc.toml").write_text("offline = true\n")
    assert resolve({"offline": None}, {}, tmp_path).offline
    assert not resolve({}, {"DERC_OFFLINE": "0"}, tmp_path).offline


@pytest.mark.parametrize(
    ("flags", "environ", "file", "words"),
    [
        ({"latncy_ms": 1}, {}, "", "'latncy_ms'.*'latency_ms'"),
        ({"defaulted": 1}, {}, "", "unknown"),
        ({}, {"DERC_LATENCY": "1"}, "", "DERC_LATENCY.*'DERC_LATENCY_MS'"),
        ({}, {}, "latency = 1", "derc.toml.*'latency'.*'latency_ms'"),
        ({}, {}, "latency_ms = ", "not valid TOML"),
        ({}, {}, "latency_ms = -1", "latency_ms in .*derc.toml.*positive.*-1"),
        ({}, {"DERC_LATENCY_MS": "fast"}, "", "DERC_LATENCY_MS.*number.*fast"),
        ({"blocks": 0}, {}, "", "--blocks.*greater"),
        ({"epsilon": float("nan")}, {}, "", "--epsilon.*finite"),
        ({"solver": "cplex"}, {}, "", "--solver.*highs"),
        ({"probe": 3}, {}, "", "--probe"),
        ({"input_size": "large"}, {}, "", "--input-size.*positive integers.*large"),
        ({}, {"DERC_INPUT_SIZE": "1x2x3x4"}, "", "DERC_INPUT_SIZE.*positive integers"),
        ({}, {}, "input_size = [224, 0]", "input_size in .*derc.toml.*positive"),
        ({}, {"DERC_OFFLINE": "perhaps"}, "", "DERC_OFFLINE.*boolean"),
    ],
)
def test_bad_settings(tmp_path, flags, environ, file, words):
    (tmp_path / "derc.toml").write_text(file)
    with pytest.raises(UsageError) as caught:
        resolve(flags, environ, tmp_path)
    assert re.search(words, str(caught.value)), caught.value


def test_the_template_is_commented_whole_and_its_settings_are_the_defaults(tmp_path):
    assert tomllib.loads(TEMPLATE) == {}
    bare = re.sub(r"^# (?=\w+ = )", "", TEMPLATE, flags=re.MULTILINE)
    (tmp_path / "derc.toml").write_text(bare)
    settings = resolve({}, {}, tmp_path)
    assert set(tomllib.loads(bare)) == set(KEYS)
    examples = {*BUDGETS, *LOWER_BUDGETS, "max_blocks", "checkpoint", "input_size", "profile_s", "engine", "emit"}
    defaults = CompileSettings()
    for key in set(KEYS) - examples:
        assert getattr(settings, key) == getattr(defaults, key), key


def test_importing_config_zoo_and_data_loads_neither_torch_nor_timm():
    code = "import sys, derc.config, derc.zoo, derc.data; print({'torch', 'timm', 'onnxruntime'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("given", "precisions"),
    [
        ("fp32", ("fp32",)),
        ("INT8, fp32", ("fp32", "int8")),
        ("int8,fp16", ("fp32", "fp16", "int8")),
        (["bf16"], ("fp32", "bf16")),
    ],
)
def test_precisions_in_every_form(given, precisions):
    assert resolve({"precision": given}, {}, None).precisions == precisions


def test_precisions_from_everywhere(tmp_path):
    (tmp_path / "derc.toml").write_text('precision = "fp16"')
    assert resolve({}, {}, tmp_path).precisions == ("fp32", "fp16")
    assert resolve({}, {"DERC_PRECISION": "int8"}, tmp_path).precisions == ("fp32", "int8")
    assert resolve({}, {}, None).precisions == ("fp32",)


def test_an_unknown_precision_is_refused_by_name():
    with pytest.raises(
        UsageError, match=r"--precision: 'int9' is none of fp32, bf16, fp16, int8; did you mean 'int8'\?"
    ):
        resolve({"precision": "fp32,int9"}, {}, None)


class Own:
    """An engine's name and precisions."""

    name, variant, precisions = "openvino", "bf16", ("bf16", "int8")


def test_precisions_are_the_engines():
    assert lower_precisions(Own(), ("fp32", "bf16", "int8")) == ("fp32", "int8")
    with pytest.raises(UsageError, match="--precision fp16: the engine openvino:bf16 computes in bf16, int8 here"):
        lower_precisions(Own(), ("fp32", "fp16", "int8"))


def test_blocks_are_a_number_or_auto(tmp_path):
    assert resolve({"blocks": "auto"}, {}, None).blocks == "auto"
    assert resolve({"blocks": "6"}, {}, None).blocks == 6
    (tmp_path / "derc.toml").write_text(
        'blocks = "auto"\nsimilarity = "rbf"\npool = true\nsets = "centres"\nexact = true\n'
    )
    settings = resolve({}, {}, tmp_path)
    assert (settings.blocks, settings.similarity, settings.sets) == ("auto", "rbf", "centres")
    assert settings.pool and settings.exact
    for flags, word in (
        ({"blocks": "many"}, "--blocks"),
        ({"similarity": "cca"}, "--similarity"),
        ({"sets": "x"}, "--sets"),
    ):
        with pytest.raises(UsageError, match=word):
            resolve(flags, {}, None)
