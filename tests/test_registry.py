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


def test_unknown_names_and_missing_packages():
    with pytest.raises(UsageError, match="did you mean 'highs'"):
        registry.load(registry.SOLVERS, "highss")
    with pytest.raises(MissingDependencyError, match="no_such_package"):
        registry.load({"x": "no_such_package.x:Y"}, "x")
