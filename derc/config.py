"""Settings of a compile: a flag wins over the environment (``DERC_LATENCY_MS``), which wins over derc.toml."""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from derc import registry
from derc.amounts import Amount, amount
from derc.engine import PRECISIONS
from derc.errors import UsageError, suggest
from derc.zoo import PRESETS

FILE = "derc.toml"
PREFIX = "DERC_"
BUDGETS = ("latency_ms", "params_m", "macs_g", "memory_mb")
LOWER_BUDGETS = ("min_latency_ms", "min_params_m", "min_macs_g")
OTHER_VARIABLES = ("DERC_CACHE", "DERC_DEBUG")


class CompileSettings(BaseModel):
    """What a compile is asked for; `defaulted` names the settings that nobody gave."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    zoo: str = "digits"
    checkpoint: Path | None = None
    offline: bool = False
    input_size: str | None = None
    data: str = "digits"
    target: str = "cpu"
    latency_ms: float | None = None
    params_m: float | None = None
    macs_g: float | None = None
    memory_mb: float | None = None
    min_latency_ms: float | None = None
    min_params_m: float | None = None
    min_macs_g: float | None = None
    max_blocks: int | None = Field(None, ge=1)
    interval: bool = False
    output: Path = Path("out/derc")
    blocks: Annotated[int, Field(ge=1)] | Literal["auto"] = 4
    epsilon: float = Field(0.2, ge=0, allow_inf_nan=False)
    similarity: Literal["cka", "cka-debiased", "rbf", "r2"] = "cka"
    pool: bool = False
    sets: Literal["pairs", "centres"] = "pairs"
    exact: bool = False
    solver: Literal["auto", "derc", "highs", "gurobi"] = "auto"
    head: Literal["auto", "fit", "donor"] = "auto"
    match: str = "0"
    match_teacher: str = "tail"
    probe: int = Field(512, ge=8)
    top: int = Field(8, ge=1)
    evaluations: int = Field(24, ge=1)
    objective: str = "accuracy"
    profile_s: float | None = Field(None, gt=0, allow_inf_nan=False)
    seed: int = Field(0, ge=0)
    threads: int = Field(0, ge=0)
    batch: int = Field(1, ge=1)
    engine: str | None = None
    precision: str = "fp32"
    emit: str | None = None
    defaulted: frozenset[str] = frozenset()

    @field_validator("input_size", mode="before")
    @classmethod
    def _plain_size(cls, value: object) -> str | None:
        """224, "224x320", "3,224,224" and [3, 224, 224] as HxW or CxHxW."""
        if value is None:
            return None
        parts = value if isinstance(value, (list, tuple)) else re.split(r"[x,]", str(value).lower())
        try:
            sizes = [int(str(part).strip()) for part in parts]
        except ValueError:
            sizes = []
        if not 1 <= len(sizes) <= 3 or min(sizes) < 1:
            raise ValueError("must be positive integers: 224, HEIGHTxWIDTH or CHANNELSxHEIGHTxWIDTH")
        return "x".join(map(str, sizes * 2 if len(sizes) == 1 else sizes))

    @field_validator("precision", mode="before")
    @classmethod
    def _known_precisions(cls, value: object) -> str:
        """A comma list, or a list, of precisions; float32 comes first, whether named or not."""
        parts = value if isinstance(value, (list, tuple)) else str(value).lower().split(",")
        names = [str(part).strip() for part in parts]
        for name in names:
            if name not in PRECISIONS:
                raise ValueError(f"{name!r} is none of {', '.join(PRECISIONS)}{suggest(name, PRECISIONS)}")
        return ",".join(name for name in PRECISIONS if name == "fp32" or name in names)

    @field_validator("engine", mode="before")
    @classmethod
    def _named_engines(cls, value: object) -> str | None:
        """A comma list, or a list, of engines."""
        parts = value if isinstance(value, (list, tuple)) else str(value).split(",") if value is not None else []
        names = [str(part).strip() for part in parts]
        if value is not None and not all(names):
            raise ValueError("must name engines: onnxruntime, or onnxruntime,openvino:bf16")
        return ",".join(names) or None

    @field_validator("match", mode="before")
    @classmethod
    def _amount_of_matching(cls, value: object) -> str:
        """A number of images, or of seconds with an s behind it."""
        amount(str(value))
        return str(value).strip()

    @field_validator("objective")
    @classmethod
    def _known_proxy(cls, value: str) -> str:
        """A proxy of ours, or of an installed package."""
        if value not in registry.PROXIES:
            known = registry.entries(registry.PROXIES, "derc.proxies")
            if value not in known:
                raise ValueError(f"{value!r} is none of {', '.join(known)}{suggest(value, known)}")
        return value

    @field_validator("emit")
    @classmethod
    def _known_form(cls, value: str | None) -> str | None:
        if value not in (None, "triton"):
            raise ValueError("must be triton, a model repository for Triton Inference Server")
        return value

    @field_validator(*BUDGETS, *LOWER_BUDGETS)
    @classmethod
    def _positive_budget(cls, value: float | None) -> float | None:
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"must be a positive finite number, not {value:g}")
        return value

    @property
    def size(self) -> tuple[int, ...] | None:
        """The input size asked for, (H, W) or (C, H, W)."""
        return None if self.input_size is None else tuple(map(int, self.input_size.split("x")))

    @property
    def match_amount(self) -> Amount:
        """How long stitches are matched, as images shown or seconds."""
        return amount(self.match)

    @property
    def engines(self) -> tuple[str, ...]:
        """The engines asked for, none where the target's own is meant."""
        return tuple(dict.fromkeys(filter(None, (self.engine or "").split(","))))

    @property
    def precisions(self) -> tuple[str, ...]:
        """What a block may be computed in, float32 first."""
        return tuple(self.precision.split(","))

    @property
    def embedded_zoo(self) -> bool:
        """Whether the embedded zoo is used because none was given."""
        return "zoo" in self.defaulted

    @property
    def lacks_data(self) -> bool:
        """Whether no images were named for a zoo of one's own."""
        own = ":" in self.zoo or Path(self.zoo).suffix == ".toml" or self.zoo in PRESETS.keys() - {"digits"}
        return own and "data" in self.defaulted

    @property
    def budgets(self) -> dict[str, float]:
        """The budgets that were given, by option name."""
        return {name: value for name in BUDGETS if (value := getattr(self, name)) is not None}


KEYS = tuple(name for name in CompileSettings.model_fields if name != "defaulted")


def resolve(flags: Mapping[str, object], environ: Mapping[str, str], directory: Path | None) -> CompileSettings:
    """Settings from `flags` (None: not given), `environ` and derc.toml in `directory` (None: no file), in this order.

    Raises UsageError for an unknown key, a value that is none of its kind, and a budget that is no positive number.
    """
    file = from_file(directory) if directory else {}
    variables = from_environment(environ)
    flags = {key: value for key, value in flags.items() if value is not None}
    for values, where in ((flags, "option"), (file, f"key in {FILE}:")):
        for key in values:
            if key not in KEYS:
                raise UsageError(f"unknown {where} {key!r}, known: {', '.join(KEYS)}{suggest(key, KEYS)}")
    given = file | variables | flags
    origin = {key: f"{key} in {FILE}" for key in file}
    origin |= {key: PREFIX + key.upper() for key in variables}
    origin |= {key: "--" + key.replace("_", "-") for key in flags}
    return _validated(given, origin)


def resolve_all(
    flags: Mapping[str, object], environ: Mapping[str, str], directory: Path | None
) -> tuple[CompileSettings, ...]:
    """Settings for each latency budget, which may be a list or have commas; of several, each has its own output folder.

    Raises as `resolve` does, and UsageError for a budget that is given twice.
    """
    file = from_file(directory) if directory else {}
    given = {key: value for key, value in flags.items() if value is not None}
    value = (file | from_environment(environ) | given).get("latency_ms")
    parts = list(value) if isinstance(value, (list, tuple)) else str(value).split(",") if value is not None else []
    if len(parts) < 2:
        return (resolve(flags, environ, directory),)
    every = [resolve({**flags, "latency_ms": str(part).strip()}, environ, directory) for part in parts]
    if len({one.latency_ms for one in every}) < len(every):
        raise UsageError("--latency-ms names a budget twice: give each once")
    return tuple(one.model_copy(update={"output": one.output / f"{one.latency_ms:g}ms"}) for one in every)


def _validated(given: Mapping[str, object], origin: Mapping[str, str]) -> CompileSettings:
    try:
        return CompileSettings.model_validate({**given, "defaulted": frozenset(KEYS) - given.keys()})
    except ValidationError as error:
        first = error.errors()[0]
        where = origin.get(str(first["loc"][0]), str(first["loc"][0]))
        message = first["msg"].removeprefix("Value error, ")
        raise UsageError(f"{where}: {message[0].lower()}{message[1:]} (got {first['input']!r})") from error


def from_environment(environ: Mapping[str, str]) -> dict[str, object]:
    """Settings among the variables; raises UsageError for a DERC_ variable that is one letter off a setting."""
    found: dict[str, object] = {}
    for variable, value in environ.items():
        key = variable.removeprefix(PREFIX).lower()
        if not variable.startswith(PREFIX) or variable in OTHER_VARIABLES or not value:
            continue
        near = suggest(key, KEYS)
        if key not in KEYS and near:
            raise UsageError(
                f"unknown environment variable {variable}{suggest(variable, [PREFIX + n.upper() for n in KEYS])}"
            )
        if key in KEYS:
            found[key] = value
    return found


def from_file(directory: Path) -> dict[str, object]:
    """Settings of derc.toml in `directory`, none where there is no such file.

    Raises UsageError where it cannot be read.
    """
    path = directory / FILE
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid TOML: {error}") from error
    return dict(tree)


TEMPLATE = """\
# Settings of `derc compile` in this folder. A flag wins over the environment (DERC_LATENCY_MS=5), which wins over this.
# Take the # away to set one; what stands there is the default, or an example where there is none.

# What to assemble from: digits (embedded), dery24 (the DeRy paper's zoo), timm:NAME[,NAME...], torchvision:...,
# transformers:..., or a TOML file with [[donor]] tables.
# zoo = "digits"
# Weights of a single library's network, where the hub is out of reach.
# checkpoint = "weights.safetensors"
# Take published weights from the local hub caches alone, without touching the network.
# offline = false
# The images' size that all donors are brought to: 224, HEIGHTxWIDTH or CHANNELSxHEIGHTxWIDTH.
# input_size = 224
# Images: digits (embedded), folder:PATH, npz:PATH or hf:PATH.
# data = "digits"
# The device to run on.
# target = "cpu"

# Budgets, alone or together. None by default.
# latency_ms = 5.0
# params_m = 10.0
# macs_g = 1.0
# memory_mb = 100.0
# The same from below.
# min_latency_ms = 1.0
# min_params_m = 1.0
# min_macs_g = 0.1

# Where the result goes.
# output = "out/derc"
# Blocks per donor (or "auto": as many as have distinct sets), and by which share one may be larger than an equal part.
# blocks = 4
# epsilon = 0.2
# How alike two values are: cka, cka-debiased, rbf or r2; pool takes means over all positions first.
# similarity = "cka"
# pool = false
# What is summed over an equivalence set: the likeness of all pairs, or of each block to the central one ("centres").
# sets = "pairs"
# Whether to prove how good the partition is; for small zoos.
# exact = false
# Whether blocks may begin and end at any cuts, and of how many pieces an assembly is at most.
# interval = false
# max_blocks = 4
# Who selects: derc (its own exact search), highs or gurobi; auto is derc, with gurobi for other integer programs where
# a licence is found.
# solver = "auto"
# Whether to fit new heads to the data's labels: fit, donor (never), or auto: where no donor's labels fit them.
# head = "auto"
# Train the stitches of the best networks without labels, for so many images shown (3000) or seconds (30s; then not the
# same network each time); 0: not. Whose answers they learn: tail (the last block's donor), best, or a donor's name.
# match = "0"
# match_teacher = "tail"
# Images that show what a network's values mean.
# probe = 512
# Assemblies that are scored per round, and in all.
# top = 8
# evaluations = 24
# The proxy that they are ranked by: accuracy (without labels agreement with the donors), kl, linear_probe, naswot,
# jacov, grad_norm, snip, synflow or fisher; docs/proxies.md says what each is worth.
# objective = "accuracy"
# Seconds that measuring all blocks may take together; what has not settled by then keeps a wider interval.
# profile_s = 40.0
# seed = 0
# Threads of the engine (0: the physical cores) and its batch size.
# threads = 0
# batch = 1
# What each block may be computed in; with "fp32,int8" whichever is the best for it. Also fp16 and bf16.
# precision = "fp32"
# Engines to choose from. By default the target's own.
# engine = "onnxruntime,openvino"
# Another form of the network in the bundle: triton, a model repository for Triton Inference Server.
# emit = "triton"
"""
