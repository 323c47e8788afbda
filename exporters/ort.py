"""ONNX Runtime's own format (``.ort``): what ``onnx`` writes, with the optimizations of loading done beforehand.

For ONNX Runtime's builds for phones, which cannot read ONNX and optimize nothing: such a file is ready to run. Only
what suits every processor is optimized, so the file is the same wherever it is written.

Integer products have uint8 weights. With int8 ones they saturate on x86 processors without VNNI; ``onnx`` leaves that
to a session option (``SESSION_CONFIG_WITHOUT_VNNI``), which does nothing for a file that is optimized already.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from edgekd.contents import Contents
from edgekd.precisions import STATIC
from edgekd.protocols import Runner
from edgekd.quiet import quiet
from edgekd.types import Conversion, Precision, Student

from . import onnx
from ._onnx_options import OnnxOptions
from ._ort_contents import read_contents

__all__ = ["EXPORTER", "OrtExporter"]


class OrtExporter:
    """See :class:`edgekd.protocols.Exporter`; options are those of ``onnx``, and precisions but for ``w4``.

    The schema of ONNX Runtime 1.32 has no 4-bit numbers, and the tables of ``w4`` have zero points of 4 bits.
    """

    suffix = ".ort"
    requires: tuple[str, ...] = ("onnx", "onnxruntime", "onnxscript", "flatbuffers")
    extra = "onnx"
    precisions: Mapping[Precision, Conversion] = {
        word: conversion for word, conversion in onnx.EXPORTER.precisions.items() if word != "w4"
    }
    options = OnnxOptions

    def write(self, student: Student, path: Path, precision: Precision, options: OnnxOptions = onnx.DEFAULTS) -> None:
        """See :meth:`edgekd.exporters.onnx.OnnxExporter.write`.

        Raises:
            ExportError: ``onnx`` cannot be written, or ONNX Runtime does not save it in its own format.
        """
        from ._ort_format import to_ort_format, with_unsigned_weights

        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "model.onnx"
            onnx.EXPORTER.write(student, source, precision, options)
            content = source.read_bytes()
        with quiet():
            if precision in ("w8d8", *STATIC):
                content = with_unsigned_weights(content)
            path.write_bytes(to_ort_format(content, fold=precision != "w8"))

    def load(self, path: Path) -> Runner:
        return onnx.load_onnx(path)

    def contents(self, path: Path) -> Contents:
        return read_contents(path)


EXPORTER = OrtExporter()
