"""Sessions of everything that is measured: built in children side by side, but for what is known from before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import ExitStack
from dataclasses import dataclass, field

from derc.engine import Session
from derc.errors import BuildError, DercError, MissingDependencyError
from derc.measure import MeasureOptions
from derc.pipeline import Context
from derc.reuse import Timed, key_of, links

Part = Callable[[], bytes]
"""Makes the ONNX model of something that is measured."""


@dataclass
class Opened:
    """By kind and name (``block resnet[0:3]``): sessions, latencies known from before, and the keys of those kept.

    `failed` says why a part has no session, by its own name.
    """

    context: Context
    stack: ExitStack
    failed: dict[str, str]
    sessions: dict[str, Session] = field(default_factory=dict)
    known: dict[str, Timed] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)

    def build(self, models: Iterable[tuple[str, bytes]]) -> None:
        """Add a session for each of the named models, or why there is none."""
        for name, session in self.context.builder.sessions(models):
            if isinstance(session, MissingDependencyError):
                raise session
            if isinstance(session, DercError):
                self.failed[name.partition(" ")[2]] = str(session)
                self.context.console.say(f"{name} is left out: {session}")
            else:
                self.sessions[name] = session
                self.stack.callback(session.close)


def open_parts(
    context: Context,
    stack: ExitStack,
    parts: Mapping[str, Part],
    failed: dict[str, str],
    options: MeasureOptions | None,
    compared: Set[str] = frozenset(),
) -> Opened:
    """A session for each part whose latency is not known, and for some that are, as links.

    Nothing counts as known without `options`, those of the measurement, nor what is `compared`. Raises BuildError where
    no donor is left.
    """
    opened = Opened(context, stack, failed)
    opened.build(_unknown(opened, parts, options, compared))
    opened.build((name, parts[name]()) for name in links(opened.known))
    if not any(name.startswith("donor ") for name in {**opened.sessions, **opened.known}):
        raise BuildError(f"no donor could be built: {next(iter(failed.values()))}")
    return opened


def _unknown(
    opened: Opened, parts: Mapping[str, Part], options: MeasureOptions | None, compared: Set[str]
) -> Iterator[tuple[str, bytes]]:
    """The model of each part whose latency is not known; the others' latencies go to `opened.known`."""
    context = opened.context
    for name in context.console.track(parts, "build", len(parts)):
        model = parts[name]()
        opened.keys[name] = key_of(context, model, options) if options and name not in compared else ""
        timed = context.store.get(opened.keys[name], Timed) if opened.keys[name] else None
        if timed is not None:
            opened.known[name] = timed
        else:
            yield name, model
