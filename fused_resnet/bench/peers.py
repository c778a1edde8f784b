"""The other inference engines: OpenVINO, ONNX Runtime, TensorRT.

Each gets as many threads as PyTorch has, one stream, and no spinning where it has such an option, for
a pool that spins while another provider is timed slows that one.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

Call = Callable[[Any], Any]


def to_numpy(batch: torch.Tensor) -> Any:
    """fp32 numpy array; a view where the batch is fp32 on the CPU already."""
    return batch.float().cpu().numpy()


def _missing(*packages: str) -> str | None:
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(absent)} (pip install 'fused_resnet[peers]')" if absent else None


def openvino_reason(device: str, dtype: str) -> str | None:
    """Why OpenVINO cannot run here, or None."""
    if device != "cpu":
        return "this package runs OpenVINO on the CPU only"
    reason = _missing("openvino")
    if reason is None and dtype not in ("fp32", "bf16"):
        return f"OpenVINO's CPU plugin has no {dtype} here"
    if reason is None and dtype == "bf16":
        import openvino

        if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            return "OpenVINO reports no bf16 on this CPU"
    return reason


def build_openvino(model: nn.Module, sample: torch.Tensor) -> Call:
    """Converts the traced model; `INFERENCE_PRECISION_HINT` forces the row's dtype (its default on this path is bf16).

    OpenVINO has a TBB pool of its own: it is bounded to PyTorch's thread count; TBB workers sleep when idle, and
    the plugin has no spinning option.
    """
    import openvino

    network = openvino.convert_model(copy.deepcopy(model).float(), example_input=sample.float())
    network.reshape(list(sample.shape))
    return _compiled(network, "bf16" if sample.dtype == torch.bfloat16 else "f32")


def openvino_int8_reason(device: str, dtype: str) -> str | None:
    """Why OpenVINO cannot run what ONNX Runtime has quantised, or None."""
    return openvino_reason(device, "fp32") or _missing("onnxruntime", "onnx")


def build_openvino_int8(model: nn.Module, sample: torch.Tensor) -> Call:
    """The network that ONNX Runtime has quantised; what is left in float stays fp32."""
    import openvino

    return _compiled(openvino.Core().read_model(_quantised_onnx(model, sample)), "f32")


def _compiled(network: Any, precision: str) -> Call:
    import openvino

    compiled = openvino.Core().compile_model(network, "CPU", {
        "INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads(), "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY"})
    request = compiled.create_infer_request()
    output = compiled.output(0)

    def call(batch: Any) -> torch.Tensor:
        return torch.from_numpy(request.infer([batch], share_inputs=True)[output])

    return call


def onnxruntime_reason(device: str, dtype: str) -> str | None:
    """Why ONNX Runtime cannot run here, or None."""
    reason = _missing("onnxruntime", "onnx")
    if reason is not None:
        return reason
    import onnxruntime

    if device == "cuda" and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return "this build of onnxruntime has no CUDA provider"
    if device == "cpu" and dtype not in ("fp32", "int8"):
        return f"ONNX Runtime's CPU provider has no {dtype} convolution"
    return None


def build_onnxruntime(model: nn.Module, sample: torch.Tensor) -> Call:
    """Exports to ONNX in memory and opens a session with all graph optimisations."""
    return _session(_onnx(model, sample), sample)


def build_onnxruntime_int8(model: nn.Module, sample: torch.Tensor) -> Call:
    """The same, quantised by ONNX Runtime."""
    return _session(_quantised_onnx(model, sample), sample)


def _session(network: bytes, sample: torch.Tensor) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    kind = "CUDAExecutionProvider" if sample.is_cuda else "CPUExecutionProvider"
    session = onnxruntime.InferenceSession(network, options, providers=[kind])
    name = session.get_inputs()[0].name

    def call(batch: Any) -> torch.Tensor:
        return torch.from_numpy(session.run(None, {name: batch})[0])

    return call


def _quantised_onnx(model: nn.Module, sample: torch.Tensor) -> bytes:
    """QDQ by ONNX Runtime's static quantisation: uint8 activations, int8 weights by channel, calibrated on `sample`."""
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):
        batches = iter([{"x": to_numpy(sample)}])

        def get_next(self) -> Any:
            return next(self.batches, None)

    quiet = logging.getLogger()
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        with tempfile.TemporaryDirectory() as folder:
            stock, ready, done = (Path(folder) / name for name in ("stock.onnx", "ready.onnx", "int8.onnx"))
            stock.write_bytes(_onnx(model, sample))
            quant_pre_process(str(stock), str(ready))
            quantization.quantize_static(
                str(ready), str(done), Reader(), quant_format=quantization.QuantFormat.QDQ, per_channel=True,
                activation_type=quantization.QuantType.QUInt8, weight_type=quantization.QuantType.QInt8)
            return done.read_bytes()
    finally:
        quiet.setLevel(level)


def _onnx(model: nn.Module, sample: torch.Tensor) -> bytes:
    """The model as ONNX bytes, by the tracing exporter: it folds the batch norms, and needs no onnxscript."""
    quiet = logging.getLogger("torch.onnx")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
            warnings.simplefilter("ignore")
            path = Path(folder) / "model.onnx"
            torch.onnx.export(copy.deepcopy(model), (sample,), path, dynamo=False, input_names=["x"])
            return path.read_bytes()
    finally:
        quiet.setLevel(level)


def tensorrt_reason(device: str, dtype: str) -> str | None:
    """Why TensorRT cannot run here, or None."""
    if device != "cuda":
        return "runs on CUDA only"
    if importlib.util.find_spec("tensorrt") is None:
        return "not installed: tensorrt (pip install tensorrt)"
    if importlib.util.find_spec("torch_tensorrt") is None and importlib.util.find_spec("onnx") is None:
        return "not installed: torch_tensorrt, or onnx to give tensorrt the model"
    return None


def build_tensorrt(model: nn.Module, sample: torch.Tensor) -> Call:
    """An engine in the model's own dtype, by torch_tensorrt where it is installed, else from ONNX; NCHW.

    Both take TF32 for fp32 unless told otherwise.
    """
    tf32 = torch.backends.cudnn.allow_tf32
    if importlib.util.find_spec("torch_tensorrt") is None:
        return _tensorrt_engine(model, sample, tf32)
    import torch_tensorrt

    return torch_tensorrt.compile(copy.deepcopy(model), ir="dynamo", inputs=[sample], min_block_size=1,
                                  use_explicit_typing=True, disable_tf32=not tf32)


def _tensorrt_engine(model: nn.Module, sample: torch.Tensor, tf32: bool) -> Call:
    """TensorRT's Python API (10.x): a strongly typed network of one input and one output, on the current stream."""
    import tensorrt

    logger = tensorrt.Logger(tensorrt.Logger.ERROR)
    builder = tensorrt.Builder(logger)
    network = builder.create_network(1 << int(tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = tensorrt.OnnxParser(network, logger)
    if not parser.parse(_onnx(model, sample)):
        raise RuntimeError(f"TensorRT cannot parse the model: {parser.get_error(0)}")
    config = builder.create_builder_config()
    if not tf32:
        config.clear_flag(tensorrt.BuilderFlag.TF32)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RuntimeError("TensorRT built no engine")
    runtime = tensorrt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(plan)
    context = engine.create_execution_context()
    given, taken = (engine.get_tensor_name(i) for i in range(2))
    shape = tuple(engine.get_tensor_shape(taken))

    def call(batch: torch.Tensor) -> torch.Tensor:
        result = torch.empty(shape, dtype=batch.dtype, device=batch.device)
        context.set_tensor_address(given, batch.data_ptr())
        context.set_tensor_address(taken, result.data_ptr())
        if not context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise RuntimeError("TensorRT could not run the engine")
        return result

    call.keeps = runtime  # type: ignore[attr-defined]  # an engine does not outlive its runtime
    return call
