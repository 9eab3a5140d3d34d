"""ONNX Runtime's execution providers as derc uses them: their options, what they compute in, where buffers lie."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from derc.errors import UsageError, suggest


@dataclass(frozen=True)
class Provider:
    """One execution provider and the wheel that brings it.

    `memory` is where the session's input and output lie. A `compiled` provider turns the graph into an engine of its
    own, which ONNX Runtime cannot write as a model: it is built anew at each load.
    """

    name: str
    wheel: str
    precisions: tuple[str, ...] = ("fp32",)
    memory: str = "cpu"
    compiled: bool = False

    @property
    def accelerator(self) -> bool:
        """Whether nodes could fall back to the CPU provider, which derc forbids."""
        return self.name != CPU

    def options(self, threads: int, cache: Path | None = None) -> dict[str, str]:
        """Provider options; `cache` is a folder for what TensorRT has timed before."""
        if self.name == CUDA:
            return {"device_id": "0", "enable_cuda_graph": "1", "use_tf32": "0"}
        if self.name == OPENVINO:
            return {"device_type": "CPU", "precision": "FP32", "num_of_threads": str(threads)}
        if self.name == TENSORRT:
            return _tensorrt(cache)
        return {}


CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"
OPENVINO = "OpenVINOExecutionProvider"

PROVIDERS = {
    "": Provider(CPU, "onnxruntime", ("fp32", "int8")),
    "cuda": Provider(CUDA, "onnxruntime-gpu", ("fp32", "fp16"), memory="cuda"),
    "tensorrt": Provider(TENSORRT, "onnxruntime-gpu", ("fp32", "fp16", "int8"), memory="cuda", compiled=True),
    "openvino": Provider(OPENVINO, "onnxruntime-openvino", ("fp32", "int8"), compiled=True),
}
"""By variant. CUDA has no integer convolution: int8 would be computed in float32 between two roundings."""


def provider(variant: str) -> Provider:
    """The provider of a variant of the engine; raises UsageError for an unknown one."""
    if variant not in PROVIDERS:
        known = [name for name in PROVIDERS if name]
        raise UsageError(f"unknown variant onnxruntime:{variant}, known: {', '.join(known)}{suggest(variant, known)}")
    return PROVIDERS[variant]


def _tensorrt(cache: Path | None) -> dict[str, str]:
    """No precision flags: without them the network is strongly typed, and the model alone says what is computed how.

    No engine cache: its key knows neither weights nor shapes, so that one network would run as another (microsoft/
    onnxruntime issues 6455 and 32254). Timings of layers may be kept.
    """
    found = {"device_id": "0", "trt_cuda_graph_enable": "1", "trt_builder_optimization_level": "3"}
    if cache is not None:
        found |= {"trt_timing_cache_enable": "1", "trt_timing_cache_path": str(cache)}
    return found
