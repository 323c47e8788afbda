"""Stands in for LiteRT's benchmark_model where that cannot be had: the same flags and log, the real LiteRT runtime.

The tests of the log's parser do not use it: they read logs that the real program printed.
"""

import statistics
import sys
import time
from pathlib import Path

import numpy as np
from ai_edge_litert.interpreter import Interpreter


def main(arguments: list[str]) -> int:
    flags = dict(argument.removeprefix("--").split("=", 1) for argument in arguments)
    print("INFO: STARTING!")
    began = time.perf_counter()
    try:
        interpreter = Interpreter(model_path=flags["graph"], num_threads=int(flags["num_threads"]))
        interpreter.allocate_tensors()
    except ValueError as error:
        print(f"ERROR: {error}\nERROR: Benchmarking failed.")
        return 1
    init = time.perf_counter() - began
    names = flags["input_layer"].split(",")
    shapes = [tuple(map(int, shape.split(","))) for shape in flags["input_layer_shape"].split(":")]
    files = [item.replace("::", "\0").rpartition(":") for item in flags["input_layer_value_files"].split(",")]
    details = interpreter.get_input_details()
    for detail, name, shape, (called, _, file) in zip(details, names, shapes, files, strict=True):
        assert (detail["name"], called.replace("\0", ":"), tuple(detail["shape"])) == (name, name, shape)
        interpreter.set_tensor(detail["index"], np.fromfile(file, detail["dtype"]).reshape(shape))

    def phase(runs: str, least_s: str) -> list[float]:
        times: list[float] = []
        spent = 0.0
        while (len(times) < int(runs) or spent < float(least_s)) and spent <= float(flags["max_secs"]):
            start = time.perf_counter()
            interpreter.invoke()
            times.append(time.perf_counter() - start)
            spent += times[-1]
        us = sorted(1e6 * one for one in times)
        numbers = f"first={1e6 * times[0]:.0f} curr={1e6 * times[-1]:.0f} min={us[0]:.0f} max={us[-1]:.0f}"
        print(
            f"INFO: count={len(us)} {numbers} avg={statistics.fmean(us):g} std={statistics.pstdev(us):.0f} "
            f"p5={us[len(us) // 20]:.0f} median={statistics.median(us):.0f} p95={us[len(us) * 95 // 100]:.0f}\n"
        )
        return times

    warmup = phase(flags["warmup_runs"], flags["warmup_min_secs"])
    timed = phase(flags["num_runs"], flags["min_secs"])
    print(
        f"INFO: Inference timings in us: Init: {1e6 * init:.0f}, First inference: {1e6 * warmup[0]:.0f}, "
        f"Warmup (avg): {1e6 * statistics.fmean(warmup):g}, Inference (avg): {1e6 * statistics.fmean(timed):g}"
    )
    if "output_filepath" in flags:
        with Path(flags["output_filepath"]).open("wb") as out:
            for detail in interpreter.get_output_details():
                out.write(interpreter.get_tensor(detail["index"]).tobytes())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
