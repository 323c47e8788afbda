"""Real adbd daemons of Debian, in a network of their own: for the tests of what talks to phones. Not Android."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

import debian
from elsewhere import lay_cable, running_in, wait_for

PORTS = (7555, 7556)

# adbd alone knows neither Android's properties nor its services. These programs answer as a phone does, in the format
# of the sources named; what they say is read from files, so that a test can let the phone get hot.
SHIMS = {
    "getprop": """[ $# = 0 ] && exec cat "$EDGEKD_PHONE/properties"
sed -n "s|^.$1.: .\\(.*\\).$|\\1|p" "$EDGEKD_PHONE/properties" """,
    # frameworks/base, ThermalManagerService.java and BatteryService.java, dump()
    "dumpsys": 'cat "$EDGEKD_PHONE/$1" 2>/dev/null || echo "Can\'t find service: $1" >&2',
    "cmd": 'echo "$@" >>"$EDGEKD_PHONE/commands"',
}
BATTERY = "Current Battery Service state:\n  AC powered: false\n  USB powered: true\n  level: 87\n  temperature: 251\n"


def thermal(status: int) -> str:
    return (
        f"IsStatusOverride: false\nThermal Status: {status}\nCached temperatures:\n"
        "\tTemperature{mValue=99.0, mType=0, mName=CPU0, mStatus=0}\nHAL Ready: true\n"
        "Current temperatures from HAL:\n\tTemperature{mValue=41.5, mType=0, mName=CPU0, mStatus=0}\n"
        "\tTemperature{mValue=43.2, mType=0, mName=CPU1, mStatus=0}\n"
        "\tTemperature{mValue=33.1, mType=3, mName=VIRTUAL-SKIN, mStatus=0}\n"
        "Current cooling devices from HAL:\n\tCoolingDevice{mValue=0, mType=2, mName=cpu_cooling}\n"
    )


def unpacked() -> Path:
    """Debian trixie's adbd and all it needs; see ``debian.unpacked``."""
    return debian.unpacked("adbd-trixie", "trixie", "amd64", ("adbd",))


@dataclass
class Phones:
    """Running adbd daemons and an adb server that has them, all in one network of their own.

    Attributes:
        folder: Holds a folder of state for each phone, and one that stands for its /data/local/tmp.
        environment: What an adb client needs to find the server.
    """

    process: subprocess.Popen[bytes]
    folder: Path
    environment: dict[str, str]
    serials: tuple[str, ...]

    def state(self, index: int = 0) -> Path:
        return self.folder / f"phone{index}"

    def storage(self, index: int = 0) -> Path:
        return self.folder / f"storage{index}"

    def daemon(self, index: int = 0) -> psutil.Process:
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                named = process.environ().get("ADBD_PORT") == str(PORTS[index])
                if named and any(word.endswith("platform-tools/adbd") for word in process.cmdline()):
                    return process
        raise AssertionError("no adbd runs")

    def running(self) -> list[psutil.Process]:
        """Processes that run in a phone's storage."""
        return running_in(self.folder / "storage")

    def left(self, index: int = 0) -> list[str]:
        return sorted(path.name for path in self.storage(index).iterdir())

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(60)


def start_phones(
    folder: Path,
    root: Path,
    count: int = 1,
    small: bool = False,
    shims: Mapping[str, str] | None = None,
    wire: str = "",
) -> Phones:
    """Start daemons and their server.

    Args:
        small: The storage of the first has room for 300 kB.
        shims: More of the phone's programs.
        wire: First three numbers of an address: the phone is then at ``.2`` of it for this machine, which is at ``.1``,
            and no server is started.
    """
    programs = folder / "bin"
    programs.mkdir()
    for name, body in {**SHIMS, **(shims or {})}.items():
        (programs / name).write_text(f"#!/bin/sh\n{body}\n")
        (programs / name).chmod(0o755)
    for index in range(count):
        (folder / f"phone{index}").mkdir()
        (folder / f"storage{index}").mkdir()
        properties = {
            "ro.product.model": f"Debian adbd {index} (not Android)",
            "ro.soc.model": "the test's own machine",
            "ro.build.fingerprint": f"debian/trixie/adbd{index}",
        }
        lines = [f"[{key}]: [{value}]\n" for key, value in properties.items()]
        (folder / f"phone{index}" / "properties").write_text("".join(lines))
        (folder / f"phone{index}" / "thermalservice").write_text(thermal(0))
        (folder / f"phone{index}" / "battery").write_text(BATTERY)
    libraries = sorted({str(path.parent) for path in root.rglob("*.so*")})
    loader = next(root.rglob("ld-linux-x86-64.so.2"))
    daemon = f"{loader} --library-path {':'.join(libraries)} {root}/usr/lib/android-sdk/platform-tools/adbd"
    serials = tuple(f"localhost:{port}" for port in PORTS[:count])
    lines = ["ip link set lo up"]
    lines += [f"mount -t tmpfs -o size=300k none {folder}/storage0"] if small else []
    lines += [
        f"EDGEKD_PHONE={folder}/phone{index} ADBD_PORT={PORTS[index]} {daemon} >{folder}/adbd{index}.log 2>&1 &"
        for index in range(count)
    ]
    socket = f"localfilesystem:{folder}/s"
    if not wire:
        lines.append(f"adb -L {socket} nodaemon server >{folder}/server.log 2>&1 &")
        lines.append(f"for i in 1 2 3 4 5 6 7 8 9 10; do sleep 0.3; [ -S {folder}/s ] && break; done")
        tries = "for i in 1 2 3 4 5 6 7 8 9 10; do adb connect {} | grep connected && break; sleep 0.3; done"
        lines += [tries.format(serial) for serial in serials]
    lines.append(f"touch {folder}/started; wait")
    environment = {**os.environ, "ADB_SERVER_SOCKET": socket, "HOME": str(folder), "TMPDIR": str(folder)}
    spaces = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child"]
    if os.geteuid() != 0:
        spaces.insert(1, "--map-root-user")
    with (folder / "start.log").open("wb") as log:
        process = subprocess.Popen(
            [*spaces, "sh", "-c", "\n".join(lines)],
            env={**environment, "PATH": f"{programs}:{os.environ['PATH']}:/usr/sbin:/sbin"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    phones = Phones(process, folder, environment, serials)
    try:
        wait_for((folder / "started").exists, 30)
    except AssertionError:
        phones.stop()
        raise OSError(f"adbd did not start: {(folder / 'start.log').read_text()[-300:]}") from None
    if wire:
        inner = psutil.Process(process.pid).children()[0].pid
        lay_cable(f"/proc/{inner}/ns/net", wire)
    return phones
