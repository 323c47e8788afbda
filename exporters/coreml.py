"""Core ML: an ML Program in a ``.mlpackage``, by default for iOS 17 and macOS 14 and later.

Off macOS there is no Core ML, so a package is proven by edgekd's reference evaluator (``_mil.py``), which reads the
saved file. coremltools' ``predict`` is never called.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.export import ExportedProgram

from edgekd.contents import Contents
from edgekd.errors import ExportError, UsageError
from edgekd.exporting.parity import conversions
from edgekd.precisions import STATIC
from edgekd.programs.models import input_specs, output_specs
from edgekd.programs.tracing import at_batch
from edgekd.protocols import Runner
from edgekd.quiet import quiet
from edgekd.types import Conversion, Precision, Student, Tolerance

from ._mil import load_package
from ._mil_compress import Scheme, compress_weights
from ._mil_contents import read_contents
from ._mil_convert import convert, describe, input_types, label_output, without_bars
from ._mil_decoder import CONTEXT, CoreMLDecoder, decoder_input_types, lengths_of, stateful_program
from ._mil_fold import fold_pads
from ._mil_options import SYSTEMS, CoreMLOptions, probabilities
from ._mil_prepare import is_quantized, prepare_program, within_half
from ._mil_runner import ProgramRunner
from ._mil_write import rename_features, write_package
from ._sizes import sizes

__all__ = ["EXPORTER", "CoreMLExporter", "load"]


load = load_package
"""Any ``.mlpackage`` with an ML Program in the reference evaluator, whoever made it: see docs/coreml-evaluator.md."""


_LOSSY = {
    "p8": Tolerance(None, 0.999, 0.97),
    "p6": Tolerance(None, 0.99, 0.93),
    "p4": Tolerance(None, 0.95, 0.8),
    "p2": Tolerance(None, 0.5, 0.3),
    "w4": Tolerance(None, 0.95, 0.8),
}
"""Precisions of Core ML alone: palettes of 2 to 8 bits, and int4 with a scale per block, made from fp32.

Their proof says that the file holds the model in few bits, not how good those bits are: the task's accuracy does.
"""

_SINCE = {**dict.fromkeys(("w8", *STATIC), "iOS17"), "w4": "iOS18", **dict.fromkeys(("p2", "p4", "p6", "p8"), "iOS16")}


_DEFAULTS = CoreMLOptions()


class CoreMLExporter:
    """See ``edgekd.protocols.Exporter``."""

    suffix = ".mlpackage"
    requires: tuple[str, ...] = ("coremltools",)
    extra = "coreml"
    precisions: Mapping[Precision, Conversion] = {
        **conversions("fp32", "fp16", "w8", "w8a8", "w4a8", "auto"),
        **{word: Conversion("fp32", tolerance) for word, tolerance in _LOSSY.items()},
    }
    cached_precisions: tuple[Precision, ...] = ("fp16",)
    options = CoreMLOptions

    def write(self, student: Student, path: Path, precision: Precision, options: CoreMLOptions = _DEFAULTS) -> None:
        """Write the package; the same program and options give the same bytes.

        Raises:
            ExportError: The converter refuses; the message names the operator.
            UsageError: The program or the options do not go with the precision or with the system.
        """
        _check(student, precision, options)
        student, _ = options.applied(student, {})
        with quiet() as complaints, without_bars():
            program, settings = _sized(student, options)
            inputs, outputs = input_specs(program), output_specs(program)
            for spec in inputs:
                if spec.dtype == "bool":
                    raise ExportError(f"input {spec.name!r} is bool; Core ML takes float32 and int32 inputs")
            names = [s.name for s in outputs]
            half = precision == "fp16" or options.half
            program = prepare_program(program)
            if half:
                program = within_half(program)
            _check_states(program, precision, options, student.card.decoder is not None)
            if options.classifier:
                place = names.index(probabilities(student).name)
                settings["classifier_config"] = label_output(program, student.card, place)
            with tempfile.TemporaryDirectory() as folder:
                converted = Path(folder) / "converted.mlpackage"
                model = convert(program, outputs, half, options, settings, converted, complaints)
                spec = model.get_spec()
                if options.classifier:
                    names.pop(place)
                rename_features(spec, [s.name for s in inputs], names)
                describe(spec, student.card, precision, probabilities(student) if options.classifier else None)
                fold_pads(spec)
                weights = Path(model.weights_dir) if model.weights_dir else None
                scheme = _scheme(precision, options)
                if scheme is not None:
                    rewritten = Path(folder) / "rewritten"
                    rewritten.mkdir()
                    compress_weights(spec, weights, scheme, rewritten)
                    weights = rewritten
                write_package(spec, weights, path)

    def load(self, path: Path) -> Runner:
        """The package in the reference evaluator (see :func:`load`), with the inputs and outputs of its program.

        That of a language model fulfils :class:`edgekd.protocols.Decoding` too.
        """
        runner = ProgramRunner(load(path))
        return CoreMLDecoder(runner) if CONTEXT in runner.program.metadata else runner

    def contents(self, path: Path) -> Contents:
        """Operators and constants of the package's program."""
        return read_contents(path)


EXPORTER = CoreMLExporter()


def _sized(student: Student, options: CoreMLOptions) -> tuple[ExportedProgram, dict[str, Any]]:
    """The program for the sizes that were asked for, and what coremltools must be told of its inputs."""
    if student.card.decoder is not None:
        types = decoder_input_types(lengths_of(student, options))
        return stateful_program(student.program, student.card.decoder.context), {"inputs": types}
    batch = sizes(options.batch, "coreml", "batch")
    length = sizes(options.length, "coreml", "length") if options.length else None
    flexible = batch != (1,) or length is not None
    program = student.program if flexible else at_batch(student.program)
    if not flexible and not options.image:
        return program, {}
    return program, {"inputs": input_types(student, input_specs(program), batch, length, options)}


def _check(student: Student, precision: Precision, options: CoreMLOptions) -> None:
    """Refuse, in one line, what does not go together.

    Raises:
        UsageError: With what would.
    """
    if precision not in CoreMLExporter.precisions:
        raise UsageError(f"coreml has no precision {precision!r}; it has {', '.join(CoreMLExporter.precisions)}")
    system = SYSTEMS.index(options.minimum_deployment_target)
    needs = [(f"coreml {precision}", _SINCE.get(precision, SYSTEMS[0]))]
    if student.card.decoder is not None:
        needs.append(("a language model with caches", "iOS18"))
    if options.sparse:
        joint = precision not in ("fp32", "fp16")
        needs.append((f"coreml {precision} with sparse weights", "iOS18" if joint else "iOS16"))
    for what, since in needs:
        if SYSTEMS.index(since) > system:
            raise UsageError(f"{what} needs {since}; minimum_deployment_target is {options.minimum_deployment_target}")
    if student.card.decoder is not None:
        lengths_of(student, options)
        if precision != "fp16":
            raise UsageError(f"coreml writes language models with caches in fp16, not in {precision}")
    if options.sparse and precision in STATIC:
        raise UsageError(f"coreml {precision} has no sparse weights; w8, w4, p2 to p8, fp16 and fp32 have")
    quantized = any(is_quantized(node) for node in student.program.graph.nodes)
    if CoreMLExporter.precisions[precision].source != "fp32" and not quantized:
        raise UsageError(f"coreml {precision} takes a program with int8 weights; edgekd.compression.compress makes one")
    if options.half and precision in ("fp32", *STATIC):
        raise UsageError(f"coreml half=true computes in half precision, which {precision} is not; ask for fp16")
    if options.classifier and options.batch != "1":
        raise UsageError(f"coreml classifier=true gives one label, so batch is 1; it is {options.batch}")


def _scheme(precision: Precision, options: CoreMLOptions) -> Scheme | None:
    """How the weights are rewritten; None where the converter's are right."""
    narrow = precision == "w4a8" and options.minimum_deployment_target == "iOS18"
    if precision not in _LOSSY and not options.sparse and not narrow:
        return None
    return Scheme(
        palette_bits=int(precision[1]) if precision.startswith("p") else None,
        block_bits=4 if precision == "w4" else None,
        sparse=options.sparse,
        typed=options.minimum_deployment_target == "iOS18",
        group_size=options.group_size,
        block_size=options.block_size,
        narrow=narrow,
    )


def _check_states(
    program: ExportedProgram, precision: Precision, options: CoreMLOptions, reads_any_length: bool
) -> None:
    """Buffers that a program writes become states, which Core ML has since iOS 18, in half precision, from zero."""
    buffers = list(dict.fromkeys(program.graph_signature.buffers_to_mutate.values()))
    if not buffers:
        return
    if options.minimum_deployment_target != "iOS18":
        raise UsageError(
            f"the program keeps {', '.join(buffers)} from call to call, which needs iOS18; "
            f"minimum_deployment_target is {options.minimum_deployment_target}"
        )
    if precision != "fp16" and not options.half:
        raise UsageError(f"Core ML keeps {', '.join(buffers)} in half precision; ask for fp16, or half=true")
    if options.batch != "1" or (options.length and not reads_any_length):
        raise UsageError(
            f"a program that keeps {', '.join(buffers)} from call to call has one shape; set no batch or length"
        )
    for name in buffers:
        value = program.state_dict.get(name, program.constants.get(name))
        if value is not None and bool((value != 0).any()):
            raise UsageError(
                f"state {name!r} does not start at zero, as Core ML's states do; reset it before the export"
            )
