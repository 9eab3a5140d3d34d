"""Why a network cannot be cut: which values of which modules stand in the way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import fx

from derc.ir import NORMALIZE, Graph, Layout
from derc.proxies import is_batched


def reason(graph: Graph, nodes: Mapping[str, fx.Node]) -> str:
    """A clause that names what no single value gets past."""
    for tie in graph.ties:
        first, last = (_named(nodes[name]) for name in (tie.ops[0], tie.ops[-1]))
        return f"its weight {tie.weight} is used from {first} to {last}, so that no cut may lie between"
    images = nodes.get(NORMALIZE, nodes[graph.input.name])
    users = [user for user in images.users if is_batched(user)]
    if len(users) > 1:
        places = " and ".join(_named(user) for user in users[:2])
        return f"its input goes into {places}, and what they give is only joined in {_named(nodes[graph.output])}"
    for name, kind in graph.types.items():
        if kind.layout is not Layout.OTHER and not kind.dtype.startswith("float"):
            return f"{_named(nodes[name])} gives {kind.dtype} values, which no block can be stitched to"
    widest = max(nodes.values(), key=lambda node: len(node.users))
    return f"what {_named(widest)} gives is used in {len(widest.users)} places, past every value in between"


def edits(nodes: Iterable[fx.Node]) -> str:
    """A clause that names the first edit in place among the nodes."""
    for node in nodes:
        if node.meta.get("edits"):
            return f": {_named(node)}"
    return ""


def _named(node: fx.Node) -> str:
    """A node by its operation and the line of the donor's code that it comes from."""
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    where = node.meta.get("where")
    return f"{target} ({where})" if where else str(target)
