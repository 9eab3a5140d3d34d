"""The text form of the IR: printing and parsing are inverse, and errors name their line."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from derc.errors import UsageError
from derc.ir import KINDS, Graph, Layout, Op, TensorType, Value
from derc.text import parse_graph, print_graph, type_text

CASES = sorted((Path(__file__).parent / "cases" / "text").glob("*.txt"))

sizes = st.integers(1, 999)
strides = st.builds(lambda image, grid: image / grid, sizes, sizes) | st.floats(1e-9, 1e20)
names = st.text(max_size=8) | st.sampled_from(["x", "layer.0", "a-b/c", "a b", '"', "resnet[0:5]", "\u2028", "ü"])
types = st.builds(
    TensorType,
    shape=st.lists(sizes, max_size=4).map(tuple),
    layout=st.sampled_from(Layout),
    dtype=st.sampled_from(["float32", "int64", "tuple"]),
    prefix=st.integers(0, 5),
    grid=st.none() | st.tuples(sizes, sizes),
    stride=st.none() | st.tuples(strides, strides),
)
costs = st.integers(0, 10**12)
ops = st.builds(
    Op, names, st.sampled_from(KINDS), names, st.lists(names, max_size=3).map(tuple), types, costs, costs, costs
)
graphs = st.builds(
    Graph,
    name=names,
    input=st.builds(Value, names, types),
    ops=st.lists(ops, max_size=4).map(tuple),
    output=names,
    notes=st.dictionaries(names, names, max_size=3),
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(graph=graphs)
def test_parse_inverts_print(graph: Graph) -> None:
    assert parse_graph(print_graph(graph)) == graph


@settings(max_examples=300, deadline=None, derandomize=True)
@given(kind=types)
def test_types_are_told_apart_by_their_text(kind: TensorType) -> None:
    assert parse_graph(f"graph g (x: {type_text(kind)}) {{\n  return x\n}}\n").input.type == kind


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.stem)
def test_print_inverts_parse(case: Path) -> None:
    graph = parse_graph(case.read_text())
    graph.verify()
    assert print_graph(graph) == case.read_text()


def test_there_are_cases() -> None:
    assert len(CASES) >= 3


def test_what_the_donor_case_means() -> None:
    graph = parse_graph(next(case for case in CASES if case.stem == "donor").read_text())
    assert graph.input == Value("input", TensorType((3, 32, 32), Layout.NCHW, stride=(1, 1)))
    assert graph.ops[0] == Op("conv1", "call_module", "conv1", ("input",), graph.ops[0].type, 432, 442368, 65536)
    assert graph.ops[1].type == TensorType((65, 48), Layout.NLC, "float32", 1, (8, 8), (4, 4))
    assert graph.output == "tokens"


def test_notes_have_one_order() -> None:
    entry = Value("x", TensorType((1,), Layout.NC))
    one, two = Graph("g", entry, (), "x", {"b": "1", "a": "2"}), Graph("g", entry, (), "x", {"a": "2", "b": "1"})
    assert print_graph(one) == print_graph(two)


def test_type_text_of_a_plain_type() -> None:
    assert type_text(TensorType((10,), Layout.NC)) == "float32[10] NC"


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (TensorType((16, 8, 8), Layout.NCHW, stride=(4.0, 4.0)), "float32[16x8x8] NCHW(stride=4)"),
        (TensorType((8, 4, 3), Layout.NHWC, stride=(4.0, 8.5)), "float32[8x4x3] NHWC(stride=4x8.5)"),
        (
            TensorType((65, 48), Layout.NLC, "float32", 1, (8, 8), (28 / 15, 28 / 15)),
            "float32[65x48] NLC(prefix=1, grid=8x8, stride=1.8666666666666667)",
        ),
    ],
)
def test_type_text_of_a_scale(kind: TensorType, text: str) -> None:
    assert type_text(kind) == text


GOOD = """graph g (x: float32[3] NC) {
  y = block @a(x) : float32[4] NC {params=1}
  return y
}
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("graph g", "grpah g", r"line 1: expected graph NAME .* found 'grpah g"),
        ("block", "blok", r"line 2: unknown kind 'blok'; did you mean 'block'\?"),
        ("[4] NC", "[4] NCWH", r"line 2: unknown layout 'NCWH'"),
        ("[4] NC", "[4x] NC", r"line 2: 'float32\[4x\] NC' is not a type"),
        ("[3] NC", "[3] NC(pre=1)", r"line 1: .* is not a type"),
        ("[3] NC", "[3] NC(stride=4.0)", r"line 1: .* is not a type"),
        ("[3] NC", "[3] NC(stride=4x4)", r"line 1: .* is not a type"),
        ("[3] NC", "[3] NC(stride=1, prefix=1)", r"line 1: .* is not a type"),
        ("[3] NC", "[3] NC()", r"line 1: .* is not a type"),
        ("params=1", "parms=1", r"line 2: 'parms=1' is not a cost such as params=432; did you mean 'params'\?"),
        ("params=1", "params=-1", r"line 2: 'params=-1' is not a cost"),
        ("params=1", "macs=1, macs=2", r"line 2: 'macs=2' is not a cost"),
        ("@a(x)", "@a(x", r"line 3|line 2: expected NAME = KIND"),
        ("  return y\n", "", r"line 3: expected NAME = KIND .* return NAME, found '}'"),
        ("}\n", "", r"expected }"),
        ("}\n", "}\nmore\n", r"line 5: expected the end, found 'more'"),
    ],
)
def test_errors_name_the_line(old: str, new: str, message: str) -> None:
    assert parse_graph(GOOD).output == "y"
    with pytest.raises(UsageError, match=message):
        parse_graph(new.join(GOOD.rsplit(old, 1)))


@pytest.mark.parametrize("note", ['// k: "open', '// k: "bad \\q"', '// "k\\q": v', "// k:", "/ k: v"])
def test_a_broken_note_is_an_error(note: str) -> None:
    with pytest.raises(UsageError, match="line 1: expected graph"):
        parse_graph(f"{note}\n{GOOD}")


def test_an_empty_text_is_an_error() -> None:
    with pytest.raises(UsageError, match="line 1: expected graph"):
        parse_graph("")
