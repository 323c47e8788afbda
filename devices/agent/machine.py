"""What machine this is and how it is doing. Run alone on a board that is only looked at, so it imports no sibling."""

from __future__ import annotations

import os
import platform
import sys
import threading
from pathlib import Path


def describe_machine() -> dict[str, str]:
    """What does not change while a block runs: processor, cores, system, versions. Unreadable is left out."""
    info = _read("/proc/cpuinfo")
    facts = {
        "processor": processor_name(info),
        "cores": str(os.cpu_count() or ""),
        "system": f"{platform.system()} {platform.machine()}",
        "kernel": platform.release(),
        "python": platform.python_version(),
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "model": _device_tree_model(),
        "virtual_machine": "yes" if " hypervisor" in info else "",
        "vnni": ("yes" if has_vnni(info) else "no") if is_x86() else "",
        "emulated": emulated_by(),
    }
    return {key: value for key, value in facts.items() if value}


def integer_products_saturate() -> bool:
    """Whether ONNX Runtime's products of uint8 and int8 may saturate here, as they do on x86 without VNNI.

    There pairs of them are added in 16 bits. Where the processor cannot be told, it is taken to lack VNNI.
    """
    return is_x86() and not has_vnni(_read("/proc/cpuinfo"))


def is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64", "i386", "i686", "x86")


def has_vnni(info: str) -> bool:
    """Of x86 from /proc/cpuinfo: whether it adds products of 8 bits in 32 (AVX512-VNNI or AVX-VNNI)."""
    return any(
        {"avx512_vnni", "avx_vnni"} & set(line.split()) for line in info.splitlines() if line.startswith("flags")
    )


def emulated_by() -> str:
    """The emulator that runs this process, or this whole machine; empty on real hardware."""
    task = f"/proc/self/task/{threading.get_native_id()}/exe"  # qemu-user shows its guest's name in /proc/self/exe only
    try:
        if Path(task).readlink().name.startswith("qemu-"):
            return "qemu-user"
    except OSError:
        pass
    return "QEMU" if _device_tree_model() == "linux,dummy-virt" else ""


def _device_tree_model() -> str:
    """A board's name: ``Raspberry Pi 5 Model B Rev 1.0``; empty on a PC."""
    return _read("/proc/device-tree/model").rstrip("\0")


def processor_name(info: str) -> str:
    """Of x86 from /proc/cpuinfo, of a board from its device tree, else what Python knows."""
    for line in info.splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return _device_tree_model() or platform.processor() or platform.machine()


def read_state() -> dict[str, str]:
    """What changes while a block runs: clock, temperature, load. Unreadable is left out."""
    khz = _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq")
    hottest = max(
        (int(value) for zone in Path("/sys/class/thermal").glob("thermal_zone*/temp") if (value := _read(str(zone)))),
        default=None,
    )
    state = {
        "clock_mhz": str(int(khz) // 1000) if khz else "",
        "temperature_c": f"{hottest / 1000:.1f}" if hottest is not None else "",
        "load_average": f"{os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else "",
        "throttle": throttle_flags(Path("/sys")),
    }
    return {key: value for key, value in state.items() if value}


# https://www.raspberrypi.com/documentation/computers/os.html#get_throttled: what holds now; bits 16 to 19 are the past.
PI_FLAGS = {0: "under-voltage", 1: "clock capped", 2: "throttled", 3: "soft temperature limit"}


def throttle_flags(system: Path) -> str:
    """What the kernel says of a processor held below its speed, joined by ``; ``; unreadable is left out.

    A Raspberry Pi's firmware has flags; on Arm the thermal governor's coolers are at work when above 0; on Intel
    there is a count of throttlings per core.
    """
    found = []
    if bits := _read(str(system / "devices/platform/soc/soc:firmware/get_throttled")):
        found += [name for bit, name in PI_FLAGS.items() if int(bits, 16) >> bit & 1]
    for cooler in sorted(system.glob("class/thermal/cooling_device*")):
        kind, state = _read(str(cooler / "type")), _read(str(cooler / "cur_state"))
        if "cpufreq" in kind and state.isdigit() and int(state) > 0:
            found.append(f"{kind} cools at step {state}")
    counts = [_read(str(path)) for path in system.glob("devices/system/cpu/cpu*/thermal_throttle/core_throttle_count")]
    if any(counts):
        found.append(f"thermal_throttle_count={sum(int(count) for count in counts if count.isdigit())}")
    return "; ".join(found)


def throttled(before: str, after: str) -> str:
    """Why a block says nothing, from ``throttle_flags`` before and after it; empty when the machine did not slow down.

    A counter (``x=3``) counts when it rose; any other flag counts when it stands.
    """
    words, earlier = after.split("; ") if after else [], before.split("; ") if before else []
    standing = [word for word in dict.fromkeys(earlier + words) if word and "=" not in word]
    risen = [word for word in words if "=" in word and word not in earlier and before]
    return f"throttled: {'; '.join(standing + risen)}" if standing or risen else ""


def peak_memory_bytes() -> int | None:
    """Resident peak of this process.

    From /proc where there is one: on Linux ``ru_maxrss`` starts at the size of the process that started this one.
    """
    if high := status_field("VmHWM"):
        return int(high.split()[0]) * 1024
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None


def status_field(name: str) -> str:
    for line in _read("/proc/self/status").splitlines():
        if line.startswith(f"{name}:"):
            return line.partition(":")[2].strip()
    return ""


def _read(path: str) -> str:
    """A file of the kernel; empty where it is missing or not ours to read."""
    try:
        return Path(path).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""
