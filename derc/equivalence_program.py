"""The partition as an integer program, exact for small zoos: it proves how far the search is from the optimum.

Each donor is a path through its cuts, one step a block. A pair variable of two donors' cuts at the same place is worth
their similarity, twice; its sums over either donor's cuts equal that donor's choice, which makes the relaxation tight.
"""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np

from derc.artifacts import Array
from derc.equivalence import TIE, Menu, Zoo
from derc.errors import DercError
from derc.milp import Builder, Solver

Choice = list[dict[int, int]]
"""For each place j, the column of the binary variable that puts cut p there."""


def solve(zoo: Zoo, solver: Solver, time_limit_s: float) -> tuple[Array | None, float]:
    """The best choice (donors, blocks − 1), None where time ran out before one was found, and the objective's bound.

    Raises DercError where the solver claims that there is none, which cannot be.
    """
    builder = Builder()
    choices = [_choice(builder, menu, zoo.blocks) for menu in zoo.menus]
    for one, other in combinations(range(len(choices)), 2):
        for j in range(zoo.blocks - 1):
            _pair(builder, zoo, (one, choices[one][j]), (other, choices[other][j]))
    answer = solver.solve(builder.build(), time_limit_s=time_limit_s)
    if answer.status == "infeasible":
        raise DercError("the partition program has no solution although every donor can be cut")
    bound = zoo.fixed - answer.bound + TIE * len(zoo.menus) * (zoo.blocks - 1)
    if answer.x is None:
        return None, bound
    values = answer.x
    picked = [[max(place, key=lambda p: values[place[p]]) for place in choice] for choice in choices]
    return np.array(picked, np.int64).reshape(len(zoo.menus), zoo.blocks - 1), bound


def size(zoo: Zoo) -> int:
    """Number of pair variables of the program."""
    windows = np.array([menu.high - menu.low + 1 for menu in zoo.menus]).reshape(len(zoo.menus), -1)
    return int(((windows.sum(axis=0) ** 2 - (windows**2).sum(axis=0)) // 2).sum())


def _choice(builder: Builder, menu: Menu, blocks: int) -> Choice:
    """Variables and rows of one donor's path: one cut of each window, neighbours allowed by the size bound."""
    places = [_place(builder, menu, j) for j in range(blocks - 1)]
    for j, (here, there) in enumerate(pairwise(places)):
        for p, column in here.items():
            after = {there[q]: 1.0 for q in there if menu.allows(p, q)}
            _step(builder, f"{menu.name} from {p} at {j}", column, after, len(there))
        for q, column in there.items():
            before = {here[p]: 1.0 for p in here if menu.allows(p, q)}
            _step(builder, f"{menu.name} to {q} at {j + 1}", column, before, len(here))
    return places


def _place(builder: Builder, menu: Menu, j: int) -> dict[int, int]:
    window = range(int(menu.low[j]), int(menu.high[j]) + 1)
    columns = {p: builder.variable(f"{menu.name} cut {p} at {j}", TIE * menu.width[p]) for p in window}
    builder.row(f"{menu.name} one cut at {j}", dict.fromkeys(columns.values(), 1.0), lower=1, upper=1)
    return columns


def _step(builder: Builder, name: str, column: int, neighbours: dict[int, float], window: int) -> None:
    """A chosen cut needs one of its allowed neighbours, which says nothing where all of the window are."""
    if len(neighbours) < window:
        builder.row(name, neighbours | {column: -1.0}, lower=0)


def _pair(builder: Builder, zoo: Zoo, one: tuple[int, dict[int, int]], other: tuple[int, dict[int, int]]) -> None:
    (a, left), (b, right) = one, other
    start, begin = zoo.menus[a].start, zoo.menus[b].start
    both = {
        (p, q): builder.variable(f"{a}:{p} with {b}:{q}", -2 * zoo.similarity[start + p, begin + q], integer=False)
        for p in left
        for q in right
    }
    for p, column in left.items():
        builder.row(f"{a}:{p} with {b}", {both[p, q]: 1.0 for q in right} | {column: -1.0}, lower=0, upper=0)
    for q, column in right.items():
        builder.row(f"{b}:{q} with {a}", {both[p, q]: 1.0 for p in left} | {column: -1.0}, lower=0, upper=0)
