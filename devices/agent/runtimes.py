"""The runtimes of the targets: a file is loaded, arrays go in, arrays come out."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

from .errors import AgentError
from .litert_decoder import LiteRtDecoder
from .machine import integer_products_saturate
from .operators import operator_times

# x86 without VNNI adds pairs of uint8 × int8 products in 16 bits, which saturates (EfficientNet-Lite0: cosine 0.93 with
# its program in place of 0.999); this has ONNX Runtime multiply uint8 × uint8. With VNNI it would be three times slower
# for nothing. https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html
SESSION_CONFIG_WITHOUT_VNNI = {"session.x64quantprecision": "1"}
"""Entries that a session of ONNX Runtime for an int8 file should have on x86 processors that lack VNNI."""


class Runtime(Protocol):
    """A loaded model. A call hands the arrays over and gives the outputs back as arrays of its own."""

    name: str
    batch: int

    def prepare(self, arrays: dict[str, Any]) -> dict[str, Any]:
        """Arrays in the dtypes of the file."""

    def __call__(self, arrays: dict[str, Any]) -> list[Any]: ...

    def delegation(self) -> str:
        """Nodes by the unit that runs them, that which was asked for first: ``XNNPACK=41 CPU=3``; empty where it cannot
        be told."""


class OnnxRuntime:
    """ONNX Runtime on the CPU."""

    def __init__(self, module: Any, job: dict[str, Any]) -> None:
        options = module.SessionOptions()
        options.intra_op_num_threads = job["plan"]["threads"]
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        if profile := job.get("profile_to"):
            options.enable_profiling, options.profile_file_prefix = True, profile
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        config = job.get("session_config")
        for key, value in (session_config() if config is None else config).items():
            options.add_session_config_entry(key, value)
        self.name = f"onnxruntime {module.__version__}"
        self._session = module.InferenceSession(job["model"], options, providers=["CPUExecutionProvider"])
        self._outputs = job["output_names"]
        inputs = {value.name: value for value in self._session.get_inputs()}
        check_names("input", job["input_names"], list(inputs))
        check_names("output", job["output_names"], [value.name for value in self._session.get_outputs()])
        first = inputs[job["input_names"][0]].shape
        self.batch = first[0] if first and isinstance(first[0], int) else 1
        self._types = {name: _onnx_dtype(value.type) for name, value in inputs.items()}

    def prepare(self, arrays: dict[str, Any]) -> dict[str, Any]:
        return _cast(arrays, self._types)

    def __call__(self, arrays: dict[str, Any]) -> list[Any]:
        outputs: list[Any] = self._session.run(self._outputs, arrays)
        return outputs

    def delegation(self) -> str:
        """As the nodes were shared out among the providers, before each fuses those that it got."""
        if not hasattr(self._session, "get_provider_graph_assignment_info"):  # an older ONNX Runtime
            return ""
        nodes = dict.fromkeys(self._session.get_providers(), 0)
        for part in self._session.get_provider_graph_assignment_info():
            nodes[part.ep_name] = nodes.get(part.ep_name, 0) + len(part.get_nodes())
        return " ".join(f"{unit}={count}" for unit, count in nodes.items()) if any(nodes.values()) else ""

    def end_profile(self) -> list[dict[str, Any]]:
        """Operators since the session was made; see ``operator_times``."""
        path = Path(self._session.end_profiling())
        found = operator_times(json.loads(path.read_text()))
        path.unlink()
        return found


def session_config() -> dict[str, str]:
    """Entries for a session of ONNX Runtime on this processor, unless a job has others."""
    return SESSION_CONFIG_WITHOUT_VNNI if integer_products_saturate() else {}


class OnnxDecoder(OnnxRuntime):
    """A language model with caches, each bound as input and output in one: it stays where it is."""

    def __init__(self, module: Any, job: dict[str, Any]) -> None:
        super().__init__(module, job)
        import numpy as np

        self._tokens = job["input_names"][0]
        self._binding = self._session.io_binding()
        self._binding.bind_output(job["output_names"][0], "cpu")  # the logits: the first of its outputs
        for value in self._session.get_inputs():
            if value.name.startswith("kv_cache_"):
                cache = module.OrtValue.ortvalue_from_numpy(np.zeros(value.shape, _onnx_dtype(value.type)))
                self._binding.bind_ortvalue_input(value.name, cache)
                self._binding.bind_ortvalue_output(f"{value.name}_out", cache)

    def read(self, tokens: Sequence[int], start: int) -> Any:
        """See :class:`.answers.Decoder`."""
        import numpy as np

        self._binding.bind_cpu_input(self._tokens, np.array([tokens], np.int32))
        self._binding.bind_cpu_input("input_pos", np.arange(start, start + len(tokens), dtype=np.int32)[None])
        self._session.run_with_iobinding(self._binding)
        return self._binding.get_outputs()[0].numpy()[0, -1]


class LiteRt:
    """LiteRT's interpreter on the CPU (with XNNPACK, its default)."""

    def __init__(self, module: Any, job: dict[str, Any]) -> None:
        self.name = f"ai-edge-litert {_version('ai-edge-litert')}"
        self._interpreter = module.Interpreter(model_path=job["model"], num_threads=job["plan"]["threads"])
        inputs, outputs = self._tensors(job)
        self._inputs = {name: inputs[name]["index"] for name in job["input_names"]}
        self._outputs = [outputs[name]["index"] for name in job["output_names"]]
        self._types = {name: inputs[name]["dtype"] for name in self._inputs}
        self.batch = int(inputs[job["input_names"][0]]["shape"][0])
        self._interpreter.allocate_tensors()

    def _tensors(self, job: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Tensors by the names of a signature where the job uses these, else by the tensors' own names."""
        for key in self._interpreter.get_signature_list():
            signature = self._interpreter.get_signature_runner(key)
            inputs, outputs = signature.get_input_details(), signature.get_output_details()
            if set(job["input_names"]) == set(inputs) and set(job["output_names"]) <= set(outputs):
                return inputs, outputs
        inputs = {tensor["name"]: tensor for tensor in self._interpreter.get_input_details()}
        outputs = {tensor["name"]: tensor for tensor in self._interpreter.get_output_details()}
        check_names("input", job["input_names"], list(inputs))
        check_names("output", job["output_names"], list(outputs))
        return inputs, outputs

    def prepare(self, arrays: dict[str, Any]) -> dict[str, Any]:
        return _cast(arrays, self._types)

    def __call__(self, arrays: dict[str, Any]) -> list[Any]:
        for name, index in self._inputs.items():
            self._interpreter.set_tensor(index, arrays[name])
        self._interpreter.invoke()
        return [self._interpreter.get_tensor(index) for index in self._outputs]

    def delegation(self) -> str:
        """A delegate's nodes are those between its inputs and its outputs; the interpreter lists them all."""
        nodes = self._interpreter._get_ops_details()
        delegates = [node for node in nodes if node["op_name"] == "DELEGATE"]
        plain = [node for node in nodes if node["op_name"] != "DELEGATE"]
        makers = {int(tensor): index for index, node in enumerate(plain) for tensor in node["outputs"]}
        taken: set[int] = set()
        for delegate in delegates:
            ends = {int(tensor) for tensor in delegate["inputs"]}
            open_tensors = [int(tensor) for tensor in delegate["outputs"]]
            while open_tensors:
                tensor = open_tensors.pop()
                index = makers.get(tensor)
                if tensor not in ends and index is not None and index not in taken:
                    taken.add(index)
                    open_tensors += [int(needed) for needed in plain[index]["inputs"]]
        return f"XNNPACK={len(taken)} CPU={len(plain) - len(taken)}"


class ExecuTorch:
    """ExecuTorch on the CPU, with XNNPACK for what the file delegates to it."""

    def __init__(self, module: Any, job: dict[str, Any]) -> None:
        import torch
        from executorch.extension.pybindings import portable_lib

        portable_lib._unsafe_reset_threadpool(job["plan"]["threads"])
        self.name = f"executorch {_version('executorch')} (XNNPACK)"
        self._from_numpy = torch.from_numpy
        program = module.Runtime.get().load_program(job["model"])
        self._method = program.load_method("forward")
        meta = self._method.metadata
        # The format numbers inputs and outputs; edgekd's files tell their names in a method of their own.
        names = json.loads(program.load_method("edgekd").execute([])[0]) if "edgekd" in program.method_names else {}
        inputs = names.get("inputs") or [f"input_{index}" for index in range(meta.num_inputs())]
        outputs = names.get("outputs") or [f"output_{index}" for index in range(meta.num_outputs())]
        check_names("input", job["input_names"], inputs)
        check_names("output", job["output_names"], outputs)
        infos = [meta.input_tensor_meta(index) for index in range(meta.num_inputs())]
        self.batch = int(infos[inputs.index(job["input_names"][0])].sizes()[0])
        self._inputs = inputs
        self._outputs = [outputs.index(name) for name in job["output_names"]]
        self._types = {name: _EXECUTORCH_DTYPES[info.dtype()] for name, info in zip(inputs, infos, strict=True)}

    def prepare(self, arrays: dict[str, Any]) -> dict[str, Any]:
        return _cast(arrays, self._types)

    def __call__(self, arrays: dict[str, Any]) -> list[Any]:
        outputs = self._method.execute([self._from_numpy(arrays[name]) for name in self._inputs])
        return [outputs[index].numpy() for index in self._outputs]

    def delegation(self) -> str:
        return ""  # the runtime does not tell; edgekd lint reads it from the file


class CoreMl:
    """Core ML by coremltools, on a Mac; ``compute_units`` of the job say where (``ALL``, ``CPU_ONLY`` …)."""

    def __init__(self, module: Any, job: dict[str, Any]) -> None:
        units = getattr(module.ComputeUnit, job.get("compute_units", "ALL"))
        self.name = f"Core ML of macOS {platform.mac_ver()[0]} by coremltools {module.__version__} ({units.name})"
        description = module.utils.load_spec(job["model"]).description
        inputs = {value.name: value.type for value in description.input}
        check_names("input", job["input_names"], list(inputs))
        check_names("output", job["output_names"], [value.name for value in description.output])
        pictures = [name for name, kind in inputs.items() if kind.WhichOneof("Type") != "multiArrayType"]
        if pictures:
            raise AgentError(f"input {pictures[0]!r} is no array; measure a file with pictures in Xcode")
        self._outputs = job["output_names"]
        self._types = {name: _COREML_DTYPES[kind.multiArrayType.dataType] for name, kind in inputs.items()}
        shape = inputs[job["input_names"][0]].multiArrayType.shape
        self.batch = int(shape[0]) if len(shape) else 1
        self._model = module.models.MLModel(job["model"], compute_units=units)

    def prepare(self, arrays: dict[str, Any]) -> dict[str, Any]:
        return _cast(arrays, self._types)

    def __call__(self, arrays: dict[str, Any]) -> list[Any]:
        outputs = self._model.predict(arrays)
        return [outputs[name] for name in self._outputs]

    def delegation(self) -> str:
        return ""  # Core ML places its operators by itself; Xcode's report shows where


# By number, as mlmodel/format/FeatureTypes.proto of coremltools has it.
_COREML_DTYPES = {65552: "float16", 65568: "float32", 65600: "float64", 131104: "int32"}

# By number, as executorch/runtime/core/portable_type/scalar_type.h has it.
_EXECUTORCH_DTYPES = {0: "uint8", 1: "int8", 2: "int16", 3: "int32", 4: "int64", 5: "float16", 6: "float32", 11: "bool"}

RUNTIMES: dict[str, tuple[str, Callable[[Any, dict[str, Any]], Runtime]]] = {
    "onnx": ("onnxruntime", OnnxRuntime),
    "ort": ("onnxruntime", OnnxRuntime),
    "tflite": ("ai_edge_litert.interpreter", LiteRt),
    "executorch": ("executorch.runtime", ExecuTorch),
    "coreml": ("coremltools", CoreMl),
}

DECODERS: dict[str, tuple[str, Callable[[Any, dict[str, Any]], Any]]] = {
    "onnx": ("onnxruntime", OnnxDecoder),
    "tflite": ("ai_edge_litert.compiled_model", LiteRtDecoder),
}
"""Of language models with caches: runtimes that also fulfil :class:`.answers.Decoder`."""


def _cast(arrays: dict[str, Any], types: dict[str, Any]) -> dict[str, Any]:
    """Whole numbers to the file's whole numbers, floats to its floats; never one to the other."""
    import numpy as np

    for name, array in arrays.items():
        if np.issubdtype(array.dtype, np.floating) != np.issubdtype(types[name], np.floating):
            raise AgentError(f"input {name!r} takes {np.dtype(types[name]).name}; it got {array.dtype}")
    return {name: np.ascontiguousarray(array, dtype=types[name]) for name, array in arrays.items()}


def _onnx_dtype(name: str) -> Any:
    import numpy as np

    inner = name.removeprefix("tensor(").removesuffix(")")
    try:
        return np.dtype({"float": "float32", "double": "float64"}.get(inner, inner))
    except TypeError:
        raise AgentError(f"NumPy has no type for an input of {name}") from None


def check_names(what: str, wanted: list[str], found: list[str]) -> None:
    lacking = [name for name in wanted if name not in found]
    if lacking:
        raise AgentError(f"no {what} called {lacking[0]!r}; there are {', '.join(found) or 'none'}")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "of unknown version"
