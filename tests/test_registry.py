"""Every registered name loads, and unknown ones are refused with a suggestion."""

from __future__ import annotations

import pytest

from derc import registry
from derc.errors import MissingDependencyError, UsageError


@pytest.mark.parametrize("name", registry.PASSES)
def test_every_pass_loads_and_is_a_frozen_dataclass(name):
    kind = registry.load(registry.PASSES, name, "derc.passes")
    assert kind.name == name
    assert kind.__dataclass_params__.frozen
    assert isinstance(kind.produces, type)


@pytest.mark.parametrize(("table", "name"), [(t, n) for t in (registry.ENGINES, registry.SOLVERS) for n in t])
def test_every_backend_loads(table, name):
    assert registry.load(table, name).name == name


@pytest.mark.parametrize("name", registry.PROXIES)
def test_every_proxy_loads_and_is_a_frozen_dataclass(name):
    kind = registry.load(registry.PROXIES, name, "derc.proxies")
    assert kind.name == name
    assert kind.__dataclass_params__.frozen


def test_unknown_names_and_missing_packages():
    with pytest.raises(UsageError, match="did you mean 'highs'"):
        registry.load(registry.SOLVERS, "highss")
    with pytest.raises(MissingDependencyError, match="no_such_package"):
        registry.load({"x": "no_such_package.x:Y"}, "x")


def test_variants_are_those_that_the_engines_have():
    from derc.backends import inductor, openvino
    from derc.providers import PROVIDERS

    assert set(registry.VARIANTS) == set(registry.ENGINES)
    assert set(registry.VARIANTS["onnxruntime"]) == set(PROVIDERS) - {""}
    assert set(registry.VARIANTS["openvino"]) == set(openvino.HINTS) - {""}
    assert set(registry.VARIANTS["inductor"]) == set(inductor.VARIANTS) - {""}


def test_an_engine_that_is_not_here_is_known_by_name_and_variant():
    for spec in ("tensorrt", "onnxruntime:cuda", "openvino:bf16"):
        registry.known_engine(spec)
    with pytest.raises(UsageError, match=r"unknown variant tensorrt:nonsense, known: tensorrt$"):
        registry.known_engine("tensorrt:nonsense")
    with pytest.raises(UsageError, match=r"unknown variant onnxruntime:cdua.*did you mean 'cuda'"):
        registry.known_engine("onnxruntime:cdua")
