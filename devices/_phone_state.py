"""What a phone says of its heat, battery and clocks, and whether a block taken meanwhile counts."""

from __future__ import annotations

import re
from collections.abc import Mapping

__all__ = ["ASK", "is_hot", "parse_state", "void_reason"]

# One script, so that it costs one call; whatever the phone does not have or does not allow is left out.
ASK = """
echo @thermal; dumpsys thermalservice 2>/dev/null
echo @battery; dumpsys battery 2>/dev/null
echo @clocks; for f in /sys/devices/system/cpu/cpu*/cpufreq/scaling_cur_freq; do cat $f 2>/dev/null; done
echo @governor; cat /sys/devices/system/cpu/cpu0/cpufreq/scaling_governor 2>/dev/null
echo @fingerprint; getprop ro.build.fingerprint 2>/dev/null
echo @load; cat /proc/loadavg 2>/dev/null
"""

# https://developer.android.com/reference/android/os/PowerManager#getCurrentThermalStatus()
STATUS = ("none", "light", "moderate", "severe", "critical", "emergency", "shutdown")
TEMPERATURE = re.compile(r"Temperature\{mValue=(-?[\d.]+), mType=(\d+), mName=([^,}]+)")
CPU, SKIN = "0", "3"  # android.os.Temperature


def parse_state(text: str) -> dict[str, str]:
    """What ``ASK`` printed, as conditions: thermal_status, temperature_c (hottest processor), skin_c, battery …"""
    parts = {part.partition("\n")[0].strip(): part.partition("\n")[2] for part in text.split("@")[1:]}
    thermal = parts.get("thermal", "")
    status = re.search(r"^Thermal Status: (\d+)", thermal, re.MULTILINE)
    # Cached temperatures may be old; those of the hardware layer follow their own heading.
    current = thermal.partition("Current temperatures from HAL:")[2].partition("Current cooling devices")[0]
    heat: dict[str, list[float]] = {}
    for value, kind, _ in TEMPERATURE.findall(current):
        heat.setdefault(kind, []).append(float(value))
    battery = dict(re.findall(r"^\s+([\w ]+): (.+)$", parts.get("battery", ""), re.MULTILINE))
    clocks = [int(line) // 1000 for line in parts.get("clocks", "").split() if line.isdigit()]
    powered = [key.removesuffix(" powered") for key, value in battery.items() if value == "true" and "powered" in key]
    found = {
        "thermal_status": status[1] if status else "",
        "temperature_c": f"{max(heat[CPU]):.1f}" if CPU in heat else "",
        "skin_c": f"{max(heat[SKIN]):.1f}" if SKIN in heat else "",
        "battery_percent": battery.get("level", ""),
        "battery_c": f"{int(battery['temperature']) / 10:.1f}" if battery.get("temperature", "").isdigit() else "",
        "power": ", ".join(powered),
        "clock_mhz": str(max(clocks)) if clocks else "",
        "clocks_mhz": " ".join(map(str, clocks)),
        "governor": parts.get("governor", "").strip(),
        "fingerprint": parts.get("fingerprint", "").strip(),
        "load_average": parts.get("load", "").partition(" ")[0].strip(),
    }
    return {key: value for key, value in found.items() if value}


def is_hot(state: Mapping[str, str]) -> bool:
    """As androidx.benchmark has it, only status 0 counts: even 1 was seen to change times."""
    return state.get("thermal_status", "0") != "0"


def void_reason(before: Mapping[str, str], after: Mapping[str, str]) -> str:
    """Why a block between these two states says nothing; empty when it counts."""
    if not is_hot(before) and not is_hot(after):
        return ""
    was, is_now = before.get("thermal_status", "0"), after.get("thermal_status", "0")
    return f"the phone is hot: thermal status {_word(was)} before and {_word(is_now)} after the block"


def _word(status: str) -> str:
    number = int(status)
    return f"{number} ({STATUS[number]})" if number < len(STATUS) else status
