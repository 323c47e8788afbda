"""What a block is told and what it gives back: JSON, and arrays in .npz files."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

from .errors import AgentError, first_line
from .runtimes import DECODERS, RUNTIMES, check_names

KEYS = {
    "target": "onnx, ort, tflite, executorch or coreml",
    "model": "the model file",
    "input_names": "names of the file's inputs",
    "output_names": "names of the file's outputs",
    "sample": ".npz with the input that is timed, by the file's names",
    "inputs": ".npz with all inputs whose outputs are wanted, samples on the first axis; null for none",
    "outputs": ".npz to write these outputs to; null for none",
    "result": "JSON file to write the block to",
    "plan": "threads, warmup_runs, warmup_s, min_runs, min_s, max_s: see edgekd.measurement.Plan",
}


def read_job(path: Path) -> dict[str, Any]:
    """The job, checked.

    Raises:
        ValueError: It is not JSON, lacks a key, or names an unknown target.
    """
    job = json.loads(path.read_text(encoding="utf-8"))
    lacking = [f"{key} ({meaning})" for key, meaning in KEYS.items() if key not in job]
    if lacking:
        raise ValueError(f"the job lacks {', '.join(lacking)}")
    known = DECODERS if job.get("decoder") else RUNTIMES
    if job["target"] not in known:
        what = "a language model with caches" if job.get("decoder") else "target"
        raise ValueError(f"no runtime for {what} {job['target']!r}; there are {', '.join(known)}")
    if not job["input_names"] or job["plan"]["threads"] < 1 or job["plan"]["min_runs"] < 1:
        raise ValueError("a job needs an input, a thread and a timed run")
    if (job["inputs"] is None) != (job["outputs"] is None):
        raise ValueError("inputs and outputs are both paths or both null")
    return job


def read_arrays(path: str, names: list[str]) -> dict[str, Any]:
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as file:
            check_names("input", names, file.files)
            return {name: np.ascontiguousarray(file[name]) for name in names}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise AgentError(f"{path} cannot be read as .npz: {first_line(error)}") from error


class Replaced:
    """A path to write to, which takes the place of the wanted one only when all was written."""

    def __init__(self, path: Path) -> None:
        self._path, self._partial = path, path.with_name(f"{path.name}.{os.getpid()}.partial")

    def __enter__(self) -> Path:
        return self._partial

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._partial.replace(self._path)
        else:
            self._partial.unlink(missing_ok=True)
