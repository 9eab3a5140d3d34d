"""What passes hand on: frozen values that are stored as JSON (scalars) and safetensors (arrays), never pickled."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, TypeVar

import cattrs
import numpy as np
from cattrs.gen import make_dict_unstructure_fn, override

from derc.analysed import Array as Array
from derc.analysed import BlockParts as BlockParts
from derc.analysed import CutDonor as CutDonor
from derc.analysed import CutId as CutId
from derc.analysed import CutZoo as CutZoo
from derc.analysed import EmbeddedZoo as EmbeddedZoo
from derc.analysed import LoweredZoo as LoweredZoo
from derc.analysed import StitchLosses as StitchLosses
from derc.analysed import Unit as Unit
from derc.errors import IntegrityError
from derc.paired import ahead
from derc.partitioned import BlockRef as BlockRef
from derc.partitioned import NearTie as NearTie
from derc.partitioned import Partition as Partition
from derc.stitching import PLAIN, Form

T = TypeVar("T")


@dataclass(frozen=True)
class Latency:
    """Median latency with its 95% interval; `provenance` is measured, recorded or predicted."""

    ms: float
    low_ms: float
    high_ms: float
    provenance: str = "measured"
    samples: int = 0
    stable: bool = True


@dataclass(frozen=True)
class LatencyTable:
    """Latencies on one target.

    Keys of `donors` are names (the intact network, as shipped), of `blocks` `str(BlockRef)`, of `stitches`
    `stitching.key(source, target)`. A block that could not be built is not among them. `noise` is the A/A control's
    relative difference. `distortion` is, for a block in a lower precision, the share of its output's variance over the
    probe set by which that differs from float32, `weights` the bytes of its weights. `failed` says why a part has no
    latency. `networks` are assemblies measured whole, and `errors` (by `str(Assembly)`) those of the prediction for
    each network measured whole, by all others: predicted ÷ measured − 1. `samples` are the raw seconds, in order of
    time, by kind and name (``block resnet[0:3]``). `timed_s` of the `measured_s` seconds of measuring were spent inside
    runs.
    """

    target: str
    engine: dict[str, str]
    donors: dict[str, Latency]
    blocks: dict[str, Latency]
    stitches: dict[str, Latency]
    noise: float
    distortion: dict[str, float] = field(default_factory=dict)
    weights: dict[str, int] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    networks: tuple[Evaluated, ...] = ()
    errors: dict[str, float] = field(default_factory=dict)
    samples: dict[str, Array] = field(default_factory=dict)
    timed_s: float = 0.0
    measured_s: float = 0.0


@dataclass(frozen=True)
class Joint:
    """A stitch in front of a block; `form` is that of a linear one, `stride` that of another's convolution."""

    kind: str = "linear"
    stride: int = 1
    form: Form = PLAIN

    @property
    def weighed(self) -> bool:
        """Whether it has weights."""
        return self.form.map != "identity"


DEFAULT = Joint()
"""The stitch where nothing is said of it."""


@dataclass(frozen=True)
class Stem:
    """A fresh stem for images of shape `image` (C, H, W), normalised with `mean` and `std` per channel."""

    channels: int
    image: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __str__(self) -> str:
        return f"conv7x7({self.channels})"


@dataclass(frozen=True)
class Head:
    """A fresh linear head on the mean over all positions."""

    classes: int

    def __str__(self) -> str:
        return f"linear({self.classes})"


@dataclass(frozen=True, eq=False)
class FittedHead:
    """What a donor's last linear map, the module at `path`, becomes: weight (classes, features) and bias (classes,).

    It was fitted to labelled `images` by `method` (ridge or logistic) with a penalty of `strength` times the mean
    squared feature; `accuracy` is that on images which were left out of the fit in turn.
    """

    path: str
    weight: Array
    bias: Array
    method: str
    strength: float
    images: int
    accuracy: float


@dataclass(frozen=True)
class DonorHeads:
    """A fitted head for each donor by name; those that are `lacking` end in no linear map."""

    heads: dict[str, FittedHead]
    lacking: tuple[str, ...] = ()


@dataclass(frozen=True)
class Assembly:
    """Blocks in order; a stitch joins neighbours unless they are consecutive blocks of one donor.

    Where a stitch is not of the default form, or a recipe says otherwise, `joints[i]` is the stitch in front of block
    i, None where there is none. A fresh `stem` comes before the blocks, a fresh `head` after them.
    """

    blocks: tuple[BlockRef, ...]
    joints: tuple[Joint | None, ...] = ()
    stem: Stem | None = None
    head: Head | None = None

    @property
    def donors(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(block.donor for block in self.blocks))

    @property
    def precisions(self) -> tuple[str, ...]:
        """Those of the blocks, each once."""
        return tuple(dict.fromkeys(block.precision for block in self.blocks))

    @property
    def intact(self) -> bool:
        """Whether this is a donor as it is: in float32, with nothing added."""
        return not any(self.stitched) and self.stem is None and self.head is None and self.plain is self

    @property
    def plain(self) -> Assembly:
        """The same network in float32."""
        blocks = tuple(block.plain for block in self.blocks)
        return self if blocks == self.blocks else replace(self, blocks=blocks)

    @property
    def stitched(self) -> tuple[bool, ...]:
        """For each pair of neighbours, whether a stitch joins them."""
        if self.joints:
            return tuple(joint is not None for joint in self.joints[1:])
        pairs = zip(self.blocks, self.blocks[1:], strict=False)
        return tuple(a.donor != b.donor or a.last != b.first for a, b in pairs)

    @property
    def learns(self) -> bool:
        """Whether a stitch of it, or its stem, has weights."""
        joints = (self.joint(index) for index in range(len(self.blocks)))
        return self.stem is not None or any(joint is not None and joint.weighed for joint in joints)

    def joint(self, index: int) -> Joint | None:
        """The stitch in front of block `index`, None where there is none."""
        if self.joints:
            return self.joints[index]
        return DEFAULT if index and self.stitched[index - 1] else None

    def __str__(self) -> str:
        ends = [self.stem] if self.stem else [], [self.head] if self.head else []
        return " | ".join(map(str, (*ends[0], *self.blocks, *ends[1])))


@dataclass(frozen=True)
class StitchedAssembly:
    """An assembly with the weights of what its donors do not give: one state dict for each such part, in order.

    `residual[i]` is the share of the target activation's variance that stitch i leaves unexplained on held-back probes.
    `head` takes the place of the last donor's last linear map; None where that stays as it is. `buffers`, where there
    are any, has for each block what takes the place of its donor's buffers, by path in the donor.
    """

    assembly: Assembly
    states: tuple[dict[str, Array], ...]
    residual: tuple[float, ...]
    head: FittedHead | None = None
    buffers: tuple[dict[str, Array], ...] = ()


@dataclass(frozen=True)
class Matched:
    """An assembly whose stitches were trained so that its outputs agree with those of a `teacher`, a donor.

    `images` were shown, without labels, of which `distinct` are different, in `seconds`. `before` and `after` are the
    agreement on the validation images, in [0, 1]: the share of equal answers, or, where answers cannot be compared
    (`features`), the share of the teacher's last features that is explained. `statistics` says whether the tail's batch
    norms were estimated anew; `note` says what went otherwise than asked, empty where nothing did.
    """

    stitched: StitchedAssembly
    teacher: str
    images: int
    distinct: int
    seconds: float
    before: float
    after: float
    features: bool = False
    statistics: bool = False
    note: str = ""


@dataclass(frozen=True)
class Scores:
    """What proxies say of one assembled network.

    `correct` marks the validation images that it answers right, or without labels (`labelled` False) as the task
    donors' mean prediction does. `estimate` is what the `objective`, a proxy's name, says in its own measure, `share`
    the same brought to [0, 1]; both are None where the objective is accuracy, which `correct` holds.
    """

    naswot: float
    labelled: bool
    correct: Array
    objective: str = "accuracy"
    estimate: float | None = None
    share: float | None = None

    @property
    def accuracy(self) -> float:
        """Share of right answers, or agreement with the task donors."""
        return float(self.correct.mean())

    @property
    def value(self) -> float:
        """What candidates are ranked by, in [0, 1], higher is better: accuracy, or the objective's share."""
        return self.accuracy if self.share is None else self.share

    def beats(self, other: Scores) -> bool:
        """Whether this network may replace the other: significantly more right answers, or a higher objective.

        Accuracies are compared in pairs: wins must exceed losses by one standard deviation of their difference.
        """
        if self.share is not None:
            return self.value > other.value
        return ahead(self.correct, other.correct)


@dataclass(frozen=True)
class Consensus:
    """What the task donors agree on: a class index for each validation image, and what they believe of the probes.

    `beliefs` is their mean softmax on the probe images, (n, classes); empty where the objective has no use for it.
    """

    answers: Array
    beliefs: Array = field(default_factory=lambda: np.zeros((0, 0), np.float32))


@dataclass(frozen=True)
class Emitted:
    """The text of model.py, its weights by state dict name, and the exported ONNX model's bytes (uint8).

    `precisions` are those of the blocks in ONNX; model.py is float32.
    """

    source: str
    weights: dict[str, Array]
    onnx: Array
    parity: float
    """Largest difference between the emitted module and the assembly in memory, on probe images."""
    precisions: tuple[str, ...] = ("fp32",)


@dataclass(frozen=True)
class Parity:
    """How much the outputs of the forms of one network differ on probe images, and what is allowed.

    The largest absolute difference where all is float32; else the norm of the difference over that of the outputs
    (`relative`), and the least `agreement` of two forms: the share of images that they answer alike, with what is asked
    at the least. None: ONNX has no answers to compare with.
    """

    module_onnx: float | None
    onnx_engine: float | None
    module_engine: float
    tolerance: float
    relative: bool = False
    agreement: float = 1.0
    least_agreement: float = 0.0
    engine_tolerance: float | None = None
    """What is allowed between ONNX and engine, where that is less than `tolerance`."""


@dataclass(frozen=True)
class Shipped:
    """A built engine (its file's bytes as uint8, and its lock's text) with what was verified and measured of it.

    `anchor` is the latency of an intact donor measured in the same rounds, which tells how the machine fares now.
    `noise` is the relative difference of the A/A control, `placement` the number of nodes by execution provider,
    `samples` the raw seconds of both. Where the device is not here, nothing is built: `engine` is empty, the latencies
    are recorded or predicted.
    """

    engine: Array
    parity: Parity
    latency: Latency
    anchor: Latency
    noise: float
    placement: dict[str, int]
    lock: str = ""
    samples: dict[str, Array] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluated:
    """What is known of one assembly: `score` in [0, 1], higher is better, and its latency measured as a whole."""

    assembly: Assembly
    score: float | None = None
    latency: Latency | None = None


@dataclass(frozen=True)
class Knowledge:
    """Everything learnt so far, which `select` refits its costs and latencies to.

    `accurate` says whether scores are accuracies, which the donors' known ones may stand beside.
    """

    evaluated: tuple[Evaluated, ...] = ()
    accurate: bool = True


@dataclass(frozen=True)
class Candidate:
    """One solution of the selection program.

    `predicted` holds latency_ms (None without a table), params, macs and memory_mb.
    """

    assembly: Assembly
    objective: float
    predicted: dict[str, float | None]


@dataclass(frozen=True)
class Selection:
    """Diverse solutions, best first; `bound` and `gap` belong to the first one's solve."""

    candidates: tuple[Candidate, ...]
    solver: str
    status: str
    objective: float
    bound: float
    gap: float


LATER: dict[type, str] = {Joint: "form", Partition: "forms", StitchLosses: "forms"}
"""Fields that were added later: at their defaults they are not written, so that digests stay as they were."""


@cache
def _converter() -> cattrs.Converter:
    converter = cattrs.Converter(forbid_extra_keys=True)
    sparse: dict[type, dict[str, Any]] = {
        BlockRef: {"_cattrs_omit_if_default": True},
        **{kind: {name: override(omit_if_default=True)} for kind, name in LATER.items()},
        Assembly: {"_cattrs_omit_if_default": True},
    }
    for kind, omitted in sparse.items():
        converter.register_unstructure_hook(kind, make_dict_unstructure_fn(kind, converter, **omitted))
    return converter


def encode(artifact: Any) -> tuple[str, dict[str, Array]]:
    """Split an artifact into canonical JSON text and named arrays, which the JSON refers to."""
    arrays: dict[str, Array] = {}
    converter = _converter().copy()

    def keep(array: Array) -> dict[str, str]:
        name = f"array{len(arrays)}"
        arrays[name] = np.ascontiguousarray(array)
        return {"$array": name}

    converter.register_unstructure_hook_func(lambda t: t is Array or getattr(t, "__origin__", t) is np.ndarray, keep)
    tree = converter.unstructure(artifact)
    return json.dumps(tree, sort_keys=True, separators=(",", ":")), arrays


def decode(kind: type[T], text: str, arrays: Mapping[str, Array]) -> T:
    """Inverse of `encode`; raises IntegrityError where the text is not an artifact of `kind`."""
    converter = _converter().copy()
    converter.register_structure_hook_func(
        lambda t: getattr(t, "__origin__", t) is np.ndarray, lambda tree, _: arrays[tree["$array"]]
    )
    try:
        return converter.structure(json.loads(text), kind)
    except (ValueError, KeyError, TypeError, cattrs.BaseValidationError) as error:
        raise IntegrityError(f"not a stored {kind.__name__}: {error}") from error


def digest(*parts: Any) -> str:
    """SHA-256 of artifacts, dataclasses, JSON values or bytes, in order; equal values have equal digests."""
    state = hashlib.sha256()
    for part in parts:
        if isinstance(part, bytes):
            state.update(b"bytes" + hashlib.sha256(part).digest())
            continue
        text, arrays = encode(part)
        state.update(b"json" + hashlib.sha256(text.encode()).digest())
        for name, array in arrays.items():
            state.update(f"{name}{array.dtype}{array.shape}".encode() + hashlib.sha256(array.tobytes()).digest())
    return state.hexdigest()
