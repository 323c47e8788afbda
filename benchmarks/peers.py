"""edgekd's int8 beside each runtime's own quantizer, from the same weights and the same calibration data.

``python -m edgekd.benchmarks.peers`` prints a table of ratios and writes ``benchmarks/results/peers.json``. Peers: ONNX
Runtime's ``quantize_static`` (after ``quant_pre_process``; QDQ, per channel, uint8 activations, int8 weights,
min-max) and ai-edge-quantizer's ``static_wi8_ai8``, both with float inputs and outputs as edgekd's files have, and
both made from edgekd's fp32 files. All files of one model take turns on one core, with one thread; where edgekd's
sessions of ONNX Runtime have options (x86 without VNNI), those files are measured once more without them. Cosine and
agreement are with the fp32 program, on held-out samples.

Every model is built and measured on its own (``python -m edgekd.benchmarks.peers minilm --files folder``), and its part
of the results is replaced. With ``--files``, files that are there are not built again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.benchmarks.peer_models import MODELS, TRAINED, Case, NotInstalled
from edgekd.benchmarks.session import flags_of, timed_only
from edgekd.benchmarks.stats import ratio
from edgekd.compression.compress import compress
from edgekd.devices.agent.runtimes import session_config
from edgekd.devices.host import HostDevice
from edgekd.errors import EdgekdError
from edgekd.exporting.parity import compare
from edgekd.measurement import Block, Plan
from edgekd.plugins import load_exporter
from edgekd.programs.models import run_program
from edgekd.protocols import Arrays, Side
from edgekd.quiet import quiet
from edgekd.store import hash_path, write_json
from edgekd.types import Artifact, Card, Parity, Tolerance

RESULTS = Path(__file__).parent / "results" / "peers.json"
PEER = "peer"
PRECISIONS = ("fp32", "w8d8", "w8a8")  # of edgekd; the bar is about the last
TARGETS = ("onnx", "tflite")
PLAN = Plan(blocks=8, warmup_s=0.3, min_runs=30, min_s=0.7, max_s=5.0)
OUTPUTS_ONLY = Plan(blocks=1, warmup_runs=0, warmup_s=0.0, min_runs=1, min_s=0.0)

LATENCY_BAR, SIZE_BAR = 1.05, 1.03
"""Largest latency and size of edgekd's w8a8, as a multiple of the peer's."""


@dataclass(frozen=True)
class Row:
    """One file.

    Attributes:
        side: ``peer``, or the precision of edgekd's file.
        session: ``edgekd`` with its session options, ``plain`` without, where there are any.
        latency_ms: Median of the block medians; None where the runtime cannot load the file, which ``reason`` tells.
        ratio, low, high: Latency as a multiple of the peer's in the same turns, with the 95 % interval.
        cosine, agreement: With the fp32 program; the share of held-out samples with the same largest output.
        blocks_ms: Median of each block.
    """

    model: str
    target: str
    side: str
    session: str
    size_bytes: int
    latency_ms: float | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    cosine: float | None = None
    agreement: float | None = None
    reason: str = ""
    flags: tuple[str, ...] = ()
    blocks_ms: tuple[float, ...] = ()


def build(case: Case, folder: Path) -> None:
    """Write every file of one model, and the held-out samples with the fp32 program's outputs."""
    folder.mkdir(parents=True, exist_ok=True)
    students = {
        precision: compress(case.student, precision, case.calibration) if precision == "w8a8" else case.student
        for precision in PRECISIONS
    }
    for target in TARGETS:
        exporter = load_exporter(target)
        for precision, student in students.items():
            path = folder / f"{precision}{exporter.suffix}"
            exporter.write(student, path, precision, exporter.options())
        with quiet():
            PEERS[target](folder / f"fp32{exporter.suffix}", folder / f"{PEER}{exporter.suffix}", case.calibration)
    np.savez(folder / "held_out.npz", allow_pickle=False, **dict(case.held_out))
    reference = run_program(case.student.program, case.held_out, batch=32)
    np.savez(folder / "reference.npz", allow_pickle=False, **reference)


def onnx_peer(source: Path, path: Path, calibration: Arrays) -> None:
    """ONNX Runtime's static quantization, as its documentation advises for x86."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.samples = iter(_one_by_one(calibration))

        def get_next(self) -> Any:
            return next(self.samples, None)

    with tempfile.TemporaryDirectory() as temporary:
        prepared = Path(temporary) / "prepared.onnx"
        try:
            quant_pre_process(source, prepared)
        except Exception:  # noqa: BLE001 - of many types: its symbolic shape inference refuses some masks; it can be left out
            quant_pre_process(source, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            path,
            Reader(),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            calibrate_method=CalibrationMethod.MinMax,
        )


def tflite_peer(source: Path, path: Path, calibration: Arrays) -> None:
    """ai-edge-quantizer's static recipe, but for the inputs and outputs, which stay float."""
    from ai_edge_quantizer import quantizer, recipe
    from ai_edge_quantizer.algorithm_manager import AlgorithmName
    from ai_edge_quantizer.qtyping import TFLOperationName

    from edgekd.exporters._tflite_convert import quiet_native

    work = quantizer.Quantizer(str(source))
    work.load_quantization_recipe(recipe.static_wi8_ai8())
    for edge in (TFLOperationName.INPUT, TFLOperationName.OUTPUT):
        work.update_quantization_recipe(regex=".*", operation_name=edge, algorithm_key=AlgorithmName.NO_QUANTIZE)
    with quiet_native():
        found = work.calibrate({"serving_default": list(_one_by_one(calibration))})
        work.quantize(found).export_model(str(path), overwrite=True)


PEERS: Mapping[str, Callable[[Path, Path, Arrays], None]] = {"onnx": onnx_peer, "tflite": tflite_peer}


def measure(model: str, folder: Path, plan: Plan) -> list[Row]:
    """Every file of one model in turns, then those of ONNX Runtime without session options."""
    with np.load(folder / "held_out.npz") as held_out, np.load(folder / "reference.npz") as reference:
        samples, wanted = dict(held_out), list(dict(reference).values())
    rows = []
    sessions: list[tuple[str, Sequence[str], Sequence[str]]] = [("edgekd", TARGETS, PRECISIONS)]
    if session_config():
        sessions.append(("plain", ("onnx",), ("w8a8",)))
    for session, targets, precisions in sessions:
        device = HostDevice(session_config=None if session == "edgekd" else {})
        artifacts = {
            (target, side): _artifact(target, side, folder) for target in targets for side in (*precisions, PEER)
        }
        quality: dict[tuple[str, str], Parity | str] = {}
        for key, artifact in artifacts.items():
            try:
                _, outputs = device.run(artifact, folder, samples, OUTPUTS_ONLY)
            except EdgekdError as error:
                quality[key] = str(error)
                continue
            quality[key] = compare(artifact.outputs, wanted, list(outputs.values()), Tolerance(None, 0, 0), "")
        runnable = {key: artifact for key, artifact in artifacts.items() if isinstance(quality[key], Parity)}
        sides = [Side(artifact, folder, timed_only(artifact, samples)) for artifact in runnable.values()]
        rounds = [device.run_in_turns(sides, plan, seed) for seed in range(plan.blocks)]
        measured = {key: [block for block, _ in blocks] for key, *blocks in zip(runnable, *rounds, strict=True)}
        for (target, side), artifact in artifacts.items():
            row = Row(model, target, side, session, artifact.size_bytes)
            own, peer = measured.get((target, side)), measured.get((target, PEER))
            rows.append(_filled(row, quality[target, side], own, peer, plan))
    return rows


def faults(ours: Row, peer: Row) -> list[str]:
    """Where edgekd's w8a8 misses the bar."""
    found = []
    if ours.latency_ms is None or ours.cosine is None or ours.agreement is None:
        return [ours.reason]
    if ours.size_bytes > SIZE_BAR * peer.size_bytes:
        found.append("larger")
    if ours.ratio is not None and ours.ratio > LATENCY_BAR:
        found.append("slower")
    if peer.cosine is not None and ours.cosine < peer.cosine:
        found.append("lower cosine")
    if peer.agreement is not None and ours.agreement < peer.agreement:
        found.append("lower agreement")
    return found


def table(rows: list[Row]) -> str:
    """For people: one line for each w8a8 file of edgekd, then the other precisions beside fp32."""
    by_key = {(row.model, row.target, row.session, row.side): row for row in rows}
    lines = [f"{'':36} {'ours':>9} {'peer':>9} {'ratio':>21} {'size':>6} {'cosine':>17} {'agreement':>13}"]
    for (model, target, session, side), ours in by_key.items():
        peer = by_key[model, target, session, PEER]
        if side != "w8a8":
            continue
        name = f"{model} {target}" + ("" if session == "edgekd" else " (plain session)")
        span = f"{ours.ratio:.3f} [{ours.low or 0:.3f}, {ours.high or 0:.3f}]" if ours.ratio else "not comparable"
        lines.append(
            f"{name:36} {_ms(ours):>9} {_ms(peer):>9} {span:>21} {ours.size_bytes / peer.size_bytes:6.3f} "
            f"{_pair(ours.cosine, peer.cosine, 5):>17} {_pair(ours.agreement, peer.agreement, 3):>13}"
            f"  {', '.join(faults(ours, peer)) or 'meets the bar'}"
        )
        if peer.reason:
            lines.append(f"    the peer was not run: {peer.reason}")
    lines.append("")
    for (model, target, session, side), row in by_key.items():
        base = by_key.get((model, target, session, "fp32"))
        if session == "edgekd" and side in ("w8d8", "w8a8") and base and base.latency_ms and row.latency_ms:
            lines.append(
                f"{model} {target} {side}: {row.latency_ms / base.latency_ms:.2f} of fp32's {base.latency_ms:.2f} ms, "
                f"cosine {row.cosine:.5f}, agreement {row.agreement:.3f}"
            )
    return "\n".join(lines)


def _ms(row: Row) -> str:
    return f"{row.latency_ms:.2f} ms" if row.latency_ms else "-"


def _pair(first: float | None, second: float | None, digits: int) -> str:
    return " / ".join("-" if value is None else f"{value:.{digits}f}" for value in (first, second))


def _filled(
    row: Row, quality: Parity | str, own: Sequence[Block] | None, peer: Sequence[Block] | None, plan: Plan
) -> Row:
    if isinstance(quality, str) or own is None:
        return dataclasses.replace(row, reason=str(quality))
    blocks_ms = _medians(own)
    beside = ratio(_medians(peer), blocks_ms) if peer is not None else None
    return dataclasses.replace(
        row,
        latency_ms=float(np.median(blocks_ms)),
        ratio=beside.estimate if beside else None,
        low=beside.low if beside else None,
        high=beside.high if beside else None,
        cosine=quality.cosine,
        agreement=quality.agreement,
        flags=tuple(flags_of(own, plan)),
        blocks_ms=blocks_ms,
    )


def _medians(blocks: Sequence[Block]) -> tuple[float, ...]:
    return tuple(float(np.median(block.latency_ms)) for block in blocks)


def _artifact(target: str, side: str, folder: Path) -> Artifact:
    """A file as the session takes it; its inputs and outputs are those of the fp32 file."""
    exporter = load_exporter(target)
    path = folder / f"{side}{exporter.suffix}"
    runner = exporter.load(folder / f"fp32{exporter.suffix}")
    return Artifact(
        target=target,
        precision=side,
        path=path.name,
        sha256=hash_path(path),
        size_bytes=path.stat().st_size,
        card=Card(side, runner.inputs, runner.outputs),
        inputs=runner.inputs,
        outputs=runner.outputs,
        toolchain={},
        source="",
        parity=Parity("not_run", "compared with fp32 here"),
    )


def _one_by_one(samples: Arrays) -> list[dict[str, np.ndarray]]:
    count = len(next(iter(samples.values())))
    return [{name: array[index : index + 1] for name, array in samples.items()} for index in range(count)]


def _stored() -> dict[str, Any]:
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {"models": {}}


def _conditions(plan: Plan) -> dict[str, Any]:
    packages = ("torch", "onnxruntime", "ai-edge-litert", "ai-edge-quantizer", "litert-torch", "edgekd")
    return {
        "device": HostDevice().probe().facts,
        "plan": dataclasses.asdict(plan),
        "versions": {name: version(name) for name in packages},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="model", help=f"of {', '.join(MODELS)}; all of them by default")
    parser.add_argument("--files", type=Path, help="keep the files in this folder, and take those that are there")
    parser.add_argument("--only", choices=("build", "measure", "show"), help="leave out the other half, or only print")
    parser.add_argument(
        "--blocks", type=int, default=PLAN.blocks, help="fresh processes for each file, all of them in turns"
    )
    given = parser.parse_args()
    unknown = [name for name in given.models if name not in MODELS]
    if unknown:
        parser.error(f"no model called {unknown[0]!r}; there are {', '.join(MODELS)}")
    plan = dataclasses.replace(PLAN, blocks=given.blocks)
    results = _stored()
    with tempfile.TemporaryDirectory() as temporary:
        for name in given.models or MODELS:
            folder = (given.files or Path(temporary)) / name
            if given.only in (None, "build") and not (folder / "reference.npz").is_file():
                try:
                    case = MODELS[name]()
                except NotInstalled as lacking:
                    print(f"{name} SKIPPED: {lacking}", file=sys.stderr)
                    continue
                print(f"{name}: writing its files", file=sys.stderr)
                shutil.rmtree(folder, ignore_errors=True)
                build(case, folder)
            if given.only in (None, "measure"):
                if not (folder / "reference.npz").is_file():
                    parser.error(f"{folder} has no files of {name}; leave out --only")
                print(f"{name}: measuring", file=sys.stderr)
                rows = measure(name, folder, plan)
                results["models"][name] = {
                    "trained": name in TRAINED,
                    "conditions": _conditions(plan),
                    "rows": [dataclasses.asdict(row) for row in rows],
                }
                write_json(RESULTS, results)
    rows = [Row(**row) for name in MODELS for row in results["models"].get(name, {"rows": ()})["rows"]]
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
