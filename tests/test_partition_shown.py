"""What `derc partition` says of a partition."""

from __future__ import annotations

from derc.artifacts import BlockRef, NearTie, Partition
from derc.inspection import _partition_lines


def test_bound_sets_centres_and_near_ties_are_told() -> None:
    blocks = {name: (BlockRef(name, 0, 2, 0), BlockRef(name, 2, 5, 1)) for name in ("a", "b")}
    found = Partition(
        blocks, 4.0, 5.0, {"a": 0.2, "b": 0.2}, ("a", "b"), 0.5, (NearTie("b", 0, 2, 3, 1e-5),), {"2": 1.0, "3": 0.5}
    )
    assert _partition_lines(found) == [
        "summed similarity 4.0000, at most 5.0000 (gap 25.00%)",
        "blocks that belong in their set, in the worst set, by number of blocks: 2: 100%, 3: 50%",
        "equivalence set 0 (centre a): a[0:2]  b[0:2]",
        "equivalence set 1 (centre b): a[2:5]  b[2:5]",
        "50% of the cuts lie elsewhere by one half of the probe images alone",
        "near-tie: b could end set 0 at cut 3 in place of 2 (loses 0.00100%)",
    ]
    plain = _partition_lines(Partition(blocks, 4.0, None, {}))
    assert plain[0] == "summed similarity 4.0000"
    assert len(plain) == 3
