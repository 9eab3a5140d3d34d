"""The contract, held by every engine in the registry that this machine can load."""

from __future__ import annotations

import pytest

from derc.registry import ENGINES, load
from tests.backends.contract import SPECS, Contract, built, missing, session  # noqa: F401


def pytest_generate_tests(metafunc):
    """Every test of the contract with every engine that is here; the others are skipped once each."""
    if "built" in metafunc.fixturenames:
        metafunc.parametrize("built", [spec for spec in SPECS if not missing(spec)], indirect=True, scope="module")


class TestEngines(Contract):
    pass


@pytest.mark.parametrize("spec", SPECS)
def test_an_engine_is_here_or_says_what_is_missing(spec):
    if reason := missing(spec):
        assert "\n" not in reason and ": " in reason
        pytest.skip(reason)


@pytest.mark.parametrize("name", [name for name in ENGINES if not missing(name)])
def test_an_engine_is_called_as_it_is_registered(name):
    made = load(ENGINES, name)
    assert made.name == name and made.suffix.startswith(".")
