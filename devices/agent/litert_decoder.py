"""A language model with caches in LiteRT: ``exporters/_tflite_decoder.py`` says what such a file has in it."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from .errors import AgentError

DECODE, LOGITS, TOKENS, POSITIONS = "decode", "logits", "tokens", "input_pos"


class LiteRtDecoder:
    """LiteRT's compiled model on the CPU (with XNNPACK), all signatures over one set of caches, which stay in place.

    A prompt is read by the signatures of fixed lengths, but for its last token, which ``decode`` reads; where a
    signature is longer than what is left, zeros fill it up: no token sees what comes after it.
    """

    batch = 1

    def __init__(self, module: Any, job: dict[str, Any]) -> None:
        import numpy as np

        options = module.Options(
            hardware_accelerators=module.HardwareAccelerator.CPU,
            cpu_options=module.CpuOptions(num_threads=job["plan"]["threads"]),
        )
        self.name = f"ai-edge-litert {version('ai-edge-litert')}, compiled model"
        self._context = job["decoder"]["context"]
        self._model = model = module.CompiledModel.from_file(job["model"], options=options)
        signatures = model.get_signature_list()
        if DECODE not in signatures:
            raise AgentError(f"{job['model']} has no signature {DECODE!r}; there are {', '.join(signatures) or 'none'}")
        details = model.get_input_tensor_details(DECODE)
        caches = [name for name in details if name.startswith("kv_cache_")]
        self._caches = {name: model.create_input_buffer_by_name(DECODE, name) for name in caches}
        for name, buffer in self._caches.items():
            buffer.write(np.zeros(details[name]["shape"], details[name]["dtype"]))
        self._logits = model.create_output_buffer_by_name(DECODE, LOGITS)
        self._vocabulary = int(model.get_output_tensor_details(DECODE)[LOGITS]["shape"][-1])
        self._told = {
            key: {name: model.create_input_buffer_by_name(key, name) for name in (TOKENS, POSITIONS)}
            for key in signatures
        }
        lengths = {int(model.get_input_tensor_details(key)[TOKENS]["shape"][-1]): key for key in signatures}
        self._signatures = dict(sorted(lengths.items()))

    def prepare(self, arrays: dict[str, Any]) -> dict[str, Any]:
        return arrays  # tokens, which read() writes as the file wants them

    def read(self, tokens: Sequence[int], start: int) -> Any:
        """See :class:`.answers.Decoder`."""
        import numpy as np

        done = 0
        while done < len(tokens) - 1:
            done += self._step(tokens[done : len(tokens) - 1], start + done)
        self._step(tokens[-1:], start + done)
        return np.asarray(self._logits.read(self._vocabulary, np.float32))

    def _step(self, tokens: Sequence[int], start: int) -> int:
        """Have a signature read as many of the tokens as it takes; how many that were."""
        import numpy as np

        # A slice that goes beyond the caches would be written further to the front.
        fitting = [length for length in self._signatures if length <= self._context - start]
        length = next((length for length in fitting if length >= len(tokens)), fitting[-1])
        given = list(tokens[:length])
        key = self._signatures[length]
        told = self._told[key]
        told[TOKENS].write(np.array([given + [0] * (length - len(given))], np.int32))
        told[POSITIONS].write(np.arange(start, start + length, dtype=np.int32)[None])
        logits = {LOGITS: self._logits} if key == DECODE else {}
        self._model.run_by_name(key, told | self._caches, logits | self._caches)
        return len(given)

    def delegation(self) -> str:
        return ""  # the compiled model does not tell; edgekd lint reads what a delegate would take from the file
