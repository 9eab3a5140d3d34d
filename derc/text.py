"""Print and parse the IR in one canonical form.

    // key: value
    graph resnet (input: float32[3x32x32] NCHW) {
      conv1 = call_module @conv1(input) : float32[16x32x32] NCHW {params=432, macs=442368, bytes=65536}
      tokens = call_method @flatten(conv1) : float32[65x48] NLC(prefix=1, grid=8x8, stride=4)
      return tokens
    }

Costs of zero are left out, notes are sorted by key. A name or target that is no plain word is written as a JSON string.
"""

from __future__ import annotations

import json
import re

from derc.errors import UsageError, suggest
from derc.ir import KINDS, Graph, Layout, Op, TensorType, Tie, Value

STRING = r'"(?:[^"\\\x00-\x1f]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*"'
NAME = rf"(?:[\w.\-/]+|{STRING})"
TARGET = rf"(?:[\w.\-/:<>+\[\]@]+|{STRING})"
TYPE = r"[\w.]+\[[\dx]*\] \w+(?:\([^)]*\))?"

NOTE = re.compile(rf"// ({NAME}): ({STRING}|[^\"].*)")
HEAD = re.compile(rf"graph ({NAME}) \(({NAME}): ({TYPE})\) {{")
LINE = re.compile(rf"  ({NAME}) = (\w+) @({TARGET})\(((?:{NAME}(?:, {NAME})*)?)\) : ({TYPE})(?: {{([^}}]*)}})?")
TIE = re.compile(rf"  tie ({TARGET})\(({NAME}(?:, {NAME})*)\)")
RETURN = re.compile(rf"  return ({NAME})")
NUMBER = r"\d+(?:\.\d+)?(?:e[+-]\d+)?"
DETAILS = rf"(?:prefix=(\d+))?(?:, )?(?:grid=(\d+)x(\d+))?(?:, )?(?:stride=({NUMBER})(?:x({NUMBER}))?)?"
SHAPE = re.compile(rf"([\w.]+)\[((?:\d+(?:x\d+)*)?)\] (\w+)(?:\({DETAILS}\))?")
COSTS = ("params", "macs", "bytes")


def print_graph(graph: Graph) -> str:
    """Canonical text of a graph, ending in a newline; `parse_graph` gives the graph back."""
    lines = [f"// {_word(key, NAME)}: {_note(value)}" for key, value in sorted(graph.notes.items())]
    entry = f"{_word(graph.input.name, NAME)}: {type_text(graph.input.type)}"
    lines.append(f"graph {_word(graph.name, NAME)} ({entry}) {{")
    lines += [_op_text(op) for op in graph.ops]
    for tie in graph.ties:
        lines.append(f"  tie {_word(tie.weight, TARGET)}({', '.join(_word(name, NAME) for name in tie.ops)})")
    return "\n".join([*lines, f"  return {_word(graph.output, NAME)}", "}", ""])


def type_text(kind: TensorType) -> str:
    """A type such as ``float32[16x32x32] NCHW`` or ``float32[65x48] NLC(prefix=1, grid=8x8, stride=4)``.

    A stride that is not the same down and across is written as ``stride=4x2``.
    """
    details = [f"prefix={kind.prefix}"] if kind.prefix else []
    details += [f"grid={kind.grid[0]}x{kind.grid[1]}"] if kind.grid else []
    details += [f"stride={_stride(*kind.stride)}"] if kind.stride else []
    suffix = f"({', '.join(details)})" if details else ""
    return f"{kind.dtype}[{'x'.join(map(str, kind.shape))}] {kind.layout}{suffix}"


def _stride(down: float, across: float) -> str:
    """Both numbers in the shortest form that gives the same floats again, once where they are equal."""
    texts = [repr(float(value)).removesuffix(".0") for value in (down, across)]
    return texts[0] if down == across else "x".join(texts)


def _op_text(op: Op) -> str:
    inputs = ", ".join(_word(name, NAME) for name in op.inputs)
    costs = ", ".join(f"{name}={getattr(op, name)}" for name in COSTS if getattr(op, name))
    line = f"  {_word(op.name, NAME)} = {op.kind} @{_word(op.target, TARGET)}({inputs}) : {type_text(op.type)}"
    return f"{line} {{{costs}}}" if costs else line


def _word(text: str, pattern: str) -> str:
    plain = not text.startswith('"') and re.fullmatch(pattern, text)
    return text if plain else json.dumps(text)


def _note(text: str) -> str:
    plain = text and text.isprintable() and text == text.strip() and not text.startswith('"')
    return text if plain else json.dumps(text)


def parse_graph(text: str) -> Graph:
    """The graph that `print_graph` printed. Raises UsageError, with the line's number, for any other text."""
    lines = _Lines(text)
    notes = {}
    while found := lines.take(NOTE):
        notes[_unquote(found[1])] = _unquote(found[2])
    head = lines.need(HEAD, "graph NAME (INPUT: TYPE) {")
    entry = Value(_unquote(head[2]), lines.type(head[3]))
    ops = []
    while found := lines.take(LINE):
        ops.append(lines.op(found))
    ties = []
    while found := lines.take(TIE):
        ties.append(Tie(_unquote(found[1]), tuple(_unquote(word) for word in re.findall(NAME, found[2]))))
    output = lines.need(RETURN, "NAME = KIND @TARGET(INPUTS) : TYPE, tie WEIGHT(NAMES), or return NAME")
    lines.need(re.compile("}"), "}")
    lines.need(re.compile(""), "the end")
    return Graph(_unquote(head[1]), entry, tuple(ops), _unquote(output[1]), notes, tuple(ties))


def _unquote(word: str) -> str:
    return str(json.loads(word)) if word.startswith('"') else word


def _type(found: re.Match[str]) -> TensorType:
    """The type of a match of `SHAPE`."""
    dtype, shape, layout, prefix, height, width, down, across = found.groups()
    sizes = tuple(int(size) for size in shape.split("x") if size)
    grid = (int(height), int(width)) if height else None
    stride = (float(down), float(across or down)) if down else None
    return TensorType(sizes, Layout(layout), dtype, int(prefix or 0), grid, stride)


class _Lines:
    """A text's lines and the place of the next one."""

    def __init__(self, text: str) -> None:
        self.lines = text.split("\n")
        self.next = 0

    def take(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        """The match of the next line, which is then used up; None where it does not match."""
        found = pattern.fullmatch(self.lines[self.next]) if self.next < len(self.lines) else None
        self.next += found is not None
        return found

    def need(self, pattern: re.Pattern[str], form: str) -> re.Match[str]:
        """The match of the next line. Raises UsageError where it does not have the `form`."""
        found = self.take(pattern)
        if found is None:
            line = self.lines[self.next] if self.next < len(self.lines) else "the end of the text"
            self.next += 1
            raise self.error(f"expected {form}, found {line!r}")
        return found

    def error(self, message: str) -> UsageError:
        """An error in the line that was used up last."""
        return UsageError(f"line {self.next}: {message}")

    def type(self, text: str) -> TensorType:
        """The type that `type_text` printed."""
        found = SHAPE.fullmatch(text)
        if found and found[3] not in set(Layout):
            raise self.error(f"unknown layout {found[3]!r}{suggest(found[3], list(Layout))}")
        kind = _type(found) if found else None
        if kind is None or type_text(kind) != text:
            raise self.error(f"{text!r} is not a type such as float32[65x48] NLC(prefix=1, grid=8x8, stride=4)")
        return kind

    def op(self, found: re.Match[str]) -> Op:
        """The operation of a matched line."""
        name, kind, target, inputs, type_, costs = found.groups()
        if kind not in KINDS:
            raise self.error(f"unknown kind {kind!r}{suggest(kind, KINDS)}")
        operands = tuple(_unquote(word) for word in re.findall(NAME, inputs))
        return Op(_unquote(name), kind, _unquote(target), operands, self.type(type_), **self.costs(costs))

    def costs(self, text: str | None) -> dict[str, int]:
        """Costs by name from the text between the braces."""
        found: dict[str, int] = {}
        for part in text.split(", ") if text else ():
            name, _, value = part.partition("=")
            if name not in COSTS or name in found or not value.isdecimal():
                raise self.error(f"{part!r} is not a cost such as params=432{suggest(name, COSTS)}")
            found[name] = int(value)
        return found
