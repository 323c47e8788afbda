"""What LiteRT's benchmark_model prints, read from logs of the real program; the source of each stands beside it."""

import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

from edgekd.benchmarks.cells import delegation_of
from edgekd.devices import _benchmark_model as tool
from edgekd.devices import _phone_state
from edgekd.errors import DataError, DeviceError, UsageError
from edgekd.measurement import Plan
from edgekd.types import Artifact

# The nightly android_aarch64_benchmark_model in Termux on a phone, 2024-06; a public log of a user's.
FULL = """
INFO: STARTING!
INFO: Log parameter values verbosely: [0]
INFO: Min num runs: [1000]
INFO: Graph: [./models/tiny_float32.tflite]
INFO: Initialized TensorFlow Lite runtime.
INFO: Created TensorFlow Lite XNNPACK delegate for CPU.
VERBOSE: Replacing 2168 out of 2168 node(s) with delegate (TfLiteXNNPackDelegate) node, yielding 1 partitions for \
subgraph 0.
INFO: The input model file size (MB): 24.6229
INFO: Initialized session in 119.515ms.
INFO: Running benchmark for at least 5 iterations and at least 0.5 seconds but terminate if exceeding 150 seconds.
INFO: count=9 first=87112 curr=51629 min=51629 max=87112 avg=58147.4 std=11478 p5=51629 median=51962 p95=87112

INFO: Running benchmark for at least 1000 iterations and at least 1 seconds but terminate if exceeding 150 seconds.
INFO: count=1000 first=52162 curr=49785 min=49088 max=686105 avg=63743.2 std=60716 p5=49620 median=51891 p95=68628

INFO: Inference timings in us: Init: 119515, First inference: 87112, Warmup (avg): 58147.4, Inference (avg): 63743.2
INFO: Memory footprint delta from the start of the tool (MB): init=55.4961 overall=55.4961
"""
# The same program and phone, a file that XNNPACK takes in part and the interpreter cannot run.
REFUSED = """
INFO: Created TensorFlow Lite XNNPACK delegate for CPU.
VERBOSE: Replacing 2136 out of 2168 node(s) with delegate (TfLiteXNNPackDelegate) node, yielding 65 partitions for \
subgraph 0.
ERROR: tensorflow/lite/kernels/batch_matmul.cc:353 lhs_data->type == rhs_data->type was not true.
ERROR: Node number 57 (BATCH_MATMUL) failed to prepare.
ERROR: Failed to allocate tensors!
ERROR: Benchmarking failed.
"""
# tensorflow/tensorflow#42507 (2020): no percentiles, no level before the lines, other words for memory.
OLD = """
Loaded model /data/local/tmp/espcn_harmonic_2x_slim_w_cl.tflite
Initialized session in 0.855ms.
count=15 first=49060 curr=33682 min=32825 max=49060 avg=34825.1 std=3930

count=50 first=32891 curr=33978 min=32641 max=34005 avg=33209.4 std=450

Inference timings in us: Init: 855, First inference: 49060, Warmup (avg): 34825.1, Inference (avg): 33209.4
Peak memory footprint (MB): init=0 overall=12.8672
"""
# Printed here by the program of tests/android_program.py: a phase that has room for one inference tells less of it.
SINGLE = """
VERBOSE: Replacing 44 out of 44 node(s) with delegate (TfLiteXNNPackDelegate) node, yielding 1 partitions for \
subgraph 0.
INFO: Initialized session in 1736.09ms.
INFO: Running benchmark for at least 2 iterations and at least 0 seconds but terminate if exceeding 5 seconds.
INFO: count=1 curr=6037002 p5=6037002 median=6037002 p95=6037002

INFO: Running benchmark for at least 5 iterations and at least 0 seconds but terminate if exceeding 5 seconds.
INFO: count=1 curr=4666827 p5=4666827 median=4666827 p95=4666827

INFO: Inference timings in us: Init: 1736088, First inference: 6037002, Warmup (avg): 6e+06, Inference (avg): 4.7e+06
"""

# The same program with --enable_op_profiling=true, 3 inferences; rows and the padding of columns left out.
DELEGATED = """
VERBOSE: Replacing 24 out of 24 node(s) with delegate (TfLiteXNNPackDelegate) node, yielding 1 partitions for \
subgraph 0.
INFO: Initialized session in 110.684ms.
INFO: count=1 curr=222716 p5=222716 median=222716 p95=222716

INFO: count=3 first=229598 curr=259412 min=221052 max=259412 avg=236687 std=16443 p5=221052 median=229598 p95=259412

INFO: Inference timings in us: Init: 110684, First inference: 222716, Warmup (avg): 222716, Inference (avg): 236687
INFO: Profiling Info for Benchmark Initialization:
============================== Run Order ==============================
\t[node type]\t[first]\t[avg ms]\t[%]\t[cdf%]\t[mem KB]\t[times called]\t[Name]
\tModifyGraphWithDelegate\t29.488\t29.488\t67.344%\t67.344%\t768.000\t1\tModifyGraphWithDelegate/0
\tAllocateTensors\t14.299\t14.299\t32.656%\t100.000%\t1280.000\t1\tAllocateTensors/0

INFO: Operator-wise Profiling Info for Regular Benchmark Runs:
============================== Run Order ==============================
\t[node type]\t[first]\t[avg ms]\t[%]\t[cdf%]\t[mem KB]\t[times called]\t[Name]
\tTranspose (ND, X32) Transpose\t0.010\t0.010\t0.004%\t0.004%\t0.000\t1\tDelegate/Transpose (ND, X32) Transpose:0
\tConvolution (NHWC, F32) IGEMM\t0.982\t2.333\t1.004%\t1.008%\t0.000\t1\tDelegate/Convolution (NHWC, F32) IGEMM:1
\tConvolution (NHWC, F32) IGEMM\t4.927\t7.539\t3.243%\t4.251%\t0.000\t1\tDelegate/Convolution (NHWC, F32) IGEMM:2
\tMean (ND) Mean\t0.044\t0.047\t0.020%\t99.416%\t0.000\t1\tDelegate/Mean (ND) Mean:22
\tFully Connected (NC, F32) GEMM\t0.008\t1.359\t0.584%\t100.000%\t0.000\t1\tDelegate/Fully Connected (NC, F32) GEMM:23

============================== Top by Computation Time ==============================
\t[node type]\t[first]\t[avg ms]\t[%]\t[cdf%]\t[mem KB]\t[times called]\t[Name]
\tConvolution (NHWC, F32) IGEMM\t12.506\t14.421\t6.203%\t6.203%\t0.000\t1\tDelegate/Convolution (NHWC, F32) IGEMM:8

Timings (microseconds): count=3 first=221498 curr=255077 min=220863 max=255077 avg=232479 std=15981
Memory (bytes): count=0
"""
# The same with --use_xnnpack=false.
PLAIN = """
INFO: Initialized session in 60.734ms.
INFO: count=1 curr=226098 p5=226098 median=226098 p95=226098

INFO: count=3 first=244607 curr=251956 min=244607 max=254291 avg=250285 std=4126 p5=244607 median=251956 p95=254291

INFO: Inference timings in us: Init: 60734, First inference: 226098, Warmup (avg): 226098, Inference (avg): 250285
INFO: Profiling Info for Benchmark Initialization:
============================== Run Order ==============================
\t[node type]\t[first]\t[avg ms]\t[%]\t[cdf%]\t[mem KB]\t[times called]\t[Name]
\tAllocateTensors\t4.674\t4.674\t100.000%\t100.000%\t384.000\t1\tAllocateTensors/0


INFO: Operator-wise Profiling Info for Regular Benchmark Runs:
============================== Run Order ==============================
\t[node type]\t[first]\t[avg ms]\t[%]\t[cdf%]\t[mem KB]\t[times called]\t[Name]
\tTRANSPOSE\t0.039\t0.026\t0.011%\t0.011%\t0.000\t1\t[conv2d;1]:0
\tCONV_2D\t1.424\t1.380\t0.560%\t0.570%\t0.000\t1\t[relu;;conv2d;1]:1
\tFULLY_CONNECTED\t0.032\t0.033\t0.013%\t100.000%\t0.000\t1\t[serving_default_linear_output]:23

============================== Top by Computation Time ==============================
\t[node type]\t[first]\t[avg ms]\t[%]\t[cdf%]\t[mem KB]\t[times called]\t[Name]
\tCONV_2D\t18.354\t17.598\t7.138%\t7.138%\t0.000\t1\t[relu_4;;relu;;conv2d_4;1]:5

Timings (microseconds): count=3 first=239984 curr=251811 min=239984 max=251811 avg=246538 std=4912
Memory (bytes): count=0
"""


def test_a_log_is_read_by_its_keys() -> None:
    log = tool.parse_log(FULL)
    assert (log.init, log.first) == (119515, 87112)
    assert log.counts == (9, 1000)
    assert log.timed["median"] == 51891
    assert log.units == {"TfLiteXNNPackDelegate": 2168, "CPU": 0}
    assert log.footprint_mb == 55.4961


def test_the_median_decides_not_the_mean_that_outliers_moved() -> None:
    block = tool.block_of([tool.parse_log(FULL)], {"model": "x"})
    assert block.latency_ms == (51.891,)
    assert block.first_inference_ms == 87.112
    assert block.model_load_ms == 119.515
    assert block.converged
    assert block.conditions["inferences"] == "1000"
    assert block.conditions["statistic"].startswith("median of 1000")


def test_an_old_log_has_only_a_mean_and_says_so() -> None:
    block = tool.block_of([tool.parse_log(OLD)], {})
    assert block.latency_ms == (33.2094,)
    assert block.conditions["statistic"].startswith("avg of 50")
    assert "delegation" not in block.conditions


def test_a_phase_of_one_inference_is_read_too() -> None:
    assert tool.block_of([tool.parse_log(SINGLE)], {}).latency_ms == (4666.827,)
    old = re.sub(r" p5=\d+ median=\d+ p95=\d+", "", SINGLE)  # as builds without percentiles have it
    assert tool.block_of([tool.parse_log(old)], {}).latency_ms == (4666.827,)


def test_a_failed_launch_is_told_by_its_first_error() -> None:
    with pytest.raises(DeviceError, match=r"gave no timings: ERROR: tensorflow/lite/kernels/batch_matmul.cc:353"):
        tool.parse_log(REFUSED)
    with pytest.raises(DeviceError, match="it said nothing"):
        tool.parse_log("")


def test_nodes_that_stayed_behind_are_told_in_the_words_that_the_gate_compares() -> None:
    text = FULL.replace("2168 out of", "2136 out of").replace("yielding 1 ", "yielding 65 ")
    block = tool.block_of([tool.parse_log(text)], {})
    assert block.conditions["delegation"] == "TfLiteXNNPackDelegate=2136 CPU=32"
    assert block.conditions["partial_delegation"] == block.conditions["delegation"]
    assert block.conditions["partitions"] == "65"
    assert delegation_of(block) == {"TfLiteXNNPackDelegate": 2136, "CPU": 32}
    whole = tool.block_of([tool.parse_log(FULL)], {})
    assert whole.conditions["delegation"] == "TfLiteXNNPackDelegate=2168 CPU=0"
    assert "partial_delegation" not in whole.conditions


def test_what_a_second_delegate_takes_is_taken_from_what_the_first_left() -> None:
    """The form of the line: tensorflow/lite/core/subgraph.cc; the later delegate sees one node for each part."""
    line = "VERBOSE: Replacing {} out of {} node(s) with delegate ({}) node, yielding {} partitions for subgraph 0.\n"
    told = line.format(30, 41, "TfLiteGpuDelegateV2", 3) + line.format(9, 13, "TfLiteXNNPackDelegate", 2)
    log = tool.parse_log(told + FULL[FULL.index("INFO: The input") :])
    assert log.units == {"TfLiteGpuDelegateV2": 30, "TfLiteXNNPackDelegate": 9, "CPU": 2}
    assert log.partitions == 5


def test_operators_are_read_in_their_order_with_what_ran_them() -> None:
    transpose, convolution, _, mean, linear = tool.operators_of(DELEGATED)
    assert (transpose.type, transpose.unit, transpose.ms) == (
        "Transpose (ND, X32) Transpose",
        "TfLiteXNNPackDelegate",
        0.01,
    )
    assert (convolution.name, convolution.ms) == ("Convolution (NHWC, F32) IGEMM:1", 2.333)
    assert (mean.ms, linear.ms) == (0.047, 1.359)
    plain = tool.operators_of(PLAIN)
    assert [(one.type, one.unit) for one in plain] == [
        ("TRANSPOSE", "CPU"),
        ("CONV_2D", "CPU"),
        ("FULLY_CONNECTED", "CPU"),
    ]
    assert plain[1].name == "[relu;;conv2d;1]:1"
    assert tool.operators_of(FULL) == ()


def test_the_counts_of_a_profile_are_not_taken_for_those_of_the_timing() -> None:
    """A user's own flags may ask for one."""
    assert tool.parse_log(DELEGATED).timed["median"] == 229598
    assert tool.parse_log(DELEGATED).counts == (1, 3)


def test_several_launches_are_one_block_with_the_median_of_each() -> None:
    slower = FULL.replace("median=51891", "median=61891").replace("Init: 119515", "Init: 219515")
    printed = f"@fixed\n{tool.MARK}\n{FULL}{tool.MARK}\n{slower}{tool.MARK}\n{FULL}"
    block = tool.block_of(tool.logs_of(printed), {})
    assert block.latency_ms == (51.891, 61.891, 51.891)
    assert block.model_load_ms == 119.515
    assert (block.conditions["inferences"], block.conditions["launches"]) == ("3000", "3")
    assert block.conditions["statistic"] == "median of 3000 inferences in 3 launches, as benchmark_model reports it"


def test_all_launches_together_do_what_the_plan_says() -> None:
    plan = Plan(warmup_runs=10, warmup_s=0.8, min_runs=100, min_s=0.4, max_s=8.0)
    share = tool.share_of(plan, 8)
    assert (share.min_runs, share.min_s, share.max_s, share.warmup_s, share.warmup_runs) == (13, 0.05, 1.0, 0.1, 10)


@pytest.mark.parametrize("how", ["exit 3", "kill -KILL $$"])
def test_the_first_launch_that_fails_ends_the_script_with_its_log(how: str, tmp_path: Path) -> None:
    script = tool.launches([["sh", "-c", "echo good"], ["sh", "-c", f"echo ERROR: bad; {how}"], ["touch", "third"]])
    done = subprocess.run(["sh", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (3 if how == "exit 3" else 128 + 9, "")
    assert "ERROR: bad" in done.stderr
    assert not (tmp_path / "third").exists()
    script = tool.launches([["echo", "a b"], ["echo", "c"]])
    done = subprocess.run(["sh", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == f"{tool.MARK}\na b\n{tool.MARK}\nc\n"
    assert not list(tmp_path.glob("log-*"))


def test_names_with_colons_are_doubled_and_those_with_commas_refused() -> None:
    tensors = tool.Tensors((("x", "serving_default_x:0", (1, 3), "float32"),), ())
    told = tool.flags(tensors, "model-00", Plan(threads=2), ["sample_0.bin"], "out.bin")
    assert "--input_layer=serving_default_x:0" in told
    assert "--input_layer_value_files=serving_default_x::0:sample_0.bin" in told
    assert {"--num_threads=2", "--input_layer_shape=1,3", "--output_filepath=out.bin"} <= set(told)
    with pytest.raises(UsageError, match="splits names at commas"):
        tool.flags(tool.Tensors((("x", "a,b", (1,), "float32"),), ()), "m", Plan(), ["f"])


def test_inputs_and_outputs_lie_in_files_as_raw_numbers(tmp_path: Path) -> None:
    tensors = tool.Tensors((("x", "x", (1, 2), "int32"),), (("a", "a", (1, 3), "float32"), ("b", "b", (1, 2), "int8")))
    assert tool.write_sample(tmp_path, tensors, {"x": np.array([[1, 2], [3, 4]])}, 1, "in") == ["in_0.bin"]
    assert (tmp_path / "in_0.bin").read_bytes() == np.array([3, 4], np.int32).tobytes()
    content = np.array([1.5, 2, 3], np.float32).tobytes() + bytes([255, 7])
    outputs = tool.read_outputs(content, tensors)
    assert outputs["a"].tolist() == [[1.5, 2, 3]]
    assert outputs["b"].tolist() == [[-1, 7]]
    with pytest.raises(DataError, match="the outputs have 14 bytes; benchmark_model wrote 13"):
        tool.read_outputs(content[:-1], tensors)
    with pytest.raises(DataError, match="takes int32; it got float64"):
        tool.write_sample(tmp_path, tensors, {"x": np.ones((1, 2))}, 0, "in")


def test_tensors_are_told_by_the_names_of_the_signature(tflite_file: tuple[Artifact, Path]) -> None:
    artifact, folder = tflite_file
    tensors = tool.tensors_of(folder / artifact.path, artifact)
    ((name, own, shape, dtype),) = tensors.inputs
    assert (name, shape, dtype) == ("args_0", (1, 1, 12, 12), "float32")
    assert own != name, "the tensor has a name of its own, which benchmark_model goes by"
    assert tensors.outputs[0][0] == "output_0"


# Format: frameworks/base, ThermalManagerService.dump and BatteryService.dump; values of a Pixel on a desk.
STATE = """@thermal
IsStatusOverride: false
Thermal Status: 2
Cached temperatures:
	Temperature{mValue=99.0, mType=0, mName=CPU0, mStatus=0}
Current temperatures from HAL:
	Temperature{mValue=62.500004, mType=0, mName=CPU0, mStatus=0}
	Temperature{mValue=61.000004, mType=1, mName=GPU, mStatus=0}
	Temperature{mValue=38.793081, mType=3, mName=VIRTUAL-SKIN, mStatus=0}
Current cooling devices from HAL:
	CoolingDevice{mValue=0, mType=5, mName=tpu_cooling}
@battery
Current Battery Service state:
  AC powered: false
  USB powered: true
  level: 87
  temperature: 251
@clocks
1803000
2914000
@governor
sched_pixel
@fingerprint
google/x/y
@load
3.01 2.5 2 1/900 1
"""


def test_a_phones_state_is_read_and_what_it_does_not_tell_is_left_out() -> None:
    state = _phone_state.parse_state(STATE)
    assert state["thermal_status"] == "2"
    assert state["temperature_c"] == "62.5", "cached temperatures may be old"
    assert state["skin_c"] == "38.8"
    assert (state["battery_percent"], state["battery_c"], state["power"]) == ("87", "25.1", "USB")
    assert (state["clock_mhz"], state["clocks_mhz"], state["governor"]) == ("2914", "1803 2914", "sched_pixel")
    assert state["fingerprint"] == "google/x/y"
    bare = _phone_state.parse_state("@thermal\n@battery\n@clocks\n@governor\n@fingerprint\n@load\n1.0 1 1 1/1 1\n")
    assert bare == {"load_average": "1.0"}


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        ("0", "0", ""),
        ("0", "1", "the phone is hot: thermal status 0 (none) before and 1 (light) after the block"),
        ("3", "3", "the phone is hot: thermal status 3 (severe) before and 3 (severe) after the block"),
        ("2", "0", "the phone is hot: thermal status 2 (moderate) before and 0 (none) after the block"),
    ],
)
def test_a_block_of_a_hot_phone_does_not_count(before: str, after: str, reason: str) -> None:
    assert _phone_state.void_reason({"thermal_status": before}, {"thermal_status": after}) == reason
