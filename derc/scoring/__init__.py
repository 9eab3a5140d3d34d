"""Proxies: training-free estimates of how good an assembled network will be, one family a file.

`derc.registry.PROXIES` names them; docs/proxies.md says where each comes from, what it costs and what it is worth.
"""

from __future__ import annotations

import hashlib
import inspect
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from derc import registry

if TYPE_CHECKING:
    from derc.scoring.evidence import Proxy

GROUP = "derc.proxies"
"""The entry points by which an installed package adds proxies."""


@cache
def open_proxy(name: str) -> Proxy:
    """The proxy registered as `name`, with its default options; raises UsageError for an unknown name."""
    proxy: Proxy = registry.load(registry.PROXIES, name, GROUP)()
    return proxy


@cache
def version(kind: type) -> str:
    """SHA-256 of the source of this package and of the file that the proxy `kind` is in."""
    sources = {*Path(__file__).parent.glob("*.py"), Path(inspect.getfile(kind))}
    return hashlib.sha256(b"".join(source.read_bytes() for source in sorted(sources))).hexdigest()
