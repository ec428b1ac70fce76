"""TensorRT engines: what keeps this machine from building one, and how to get one all the same."""

import importlib.util

import torch


def explain_tensorrt(input_size: tuple[int, int]) -> str:
    """Say in one sentence why no TensorRT engine is built here, and what to do instead.

    TensorRT builds only for the GPU at hand, so an engine is made on the machine that runs it, from the ONNX bundle.

    Args:
        input_size: (height, width) of the network input, px.
    """
    missing = []
    if importlib.util.find_spec("tensorrt") is None:
        missing.append("tensorrt is not installed (pip install 'cl4wsis[trt]')")
    if not torch.cuda.is_available():
        missing.append("no NVIDIA GPU is usable, and TensorRT builds engines only for the GPU at hand")
    found = "; ".join(missing) or "tensorrt and a GPU are here, but this version of cl4wsis does not drive them"
    frame = "x".join(map(str, (*input_size, 3)))
    return (
        f"cannot build a TensorRT engine: {found}. Export with --format onnx (runs with ONNX Runtime on CPU and GPU) "
        "or --format trt-rtx (engines for RTX GPUs, built on any machine), or build one from that bundle on the GPU's "
        f"machine: trtexec --onnx=model.onnx --minShapes=images:1x{frame} --optShapes=images:1x{frame} "
        f"--maxShapes=images:8x{frame} --saveEngine=model.engine"
    )
