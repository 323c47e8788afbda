"""Debian packages, unpacked into a cache outside the repository: for the tests that need programs this system lacks."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgekd-tests"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"


def unpacked(name: str, suite: str, architecture: str, packages: Sequence[str]) -> Path:
    """Packages with all that they need, in a folder of that name; downloaded and checked by apt where not there yet.

    Nothing is installed, and the system's own apt is left alone.

    Raises:
        OSError, subprocess.SubprocessError: They cannot be had here.
    """
    root = CACHE / name
    if root.is_dir():
        return root
    mirror = _mirror()
    work, partial = CACHE / f"{name}.{os.getpid()}.apt", CACHE / f"{name}.{os.getpid()}"
    for folder in ("state/lists/partial", "cache/archives/partial"):
        (work / folder).mkdir(parents=True, exist_ok=True)
    (work / "status").touch()
    (work / "sources.list").write_text(f"deb [signed-by={KEYRING}] {mirror} {suite} main\n")
    (work / "apt.conf").write_text(
        f'Dir::Etc::SourceList "{work}/sources.list";\nDir::Etc::SourceParts "/dev/null";\nDir::State "{work}/state";\n'
        f'Dir::State::status "{work}/status";\nDir::Cache "{work}/cache";\nAPT::Install-Recommends "false";\n'
        f'APT::Architecture "{architecture}";\nAPT::Architectures "{architecture}";\nAPT::Sandbox::User "root";\n'
    )
    environment = {**os.environ, "APT_CONFIG": str(work / "apt.conf")}
    try:
        for command in (["update"], ["--yes", "--download-only", "install", *packages]):
            subprocess.run(["apt-get", "-qq", *command], env=environment, check=True, capture_output=True, timeout=300)
        for package in sorted((work / "cache" / "archives").glob("*.deb")):
            subprocess.run(["dpkg-deb", "-x", str(package), str(partial)], check=True)
        with contextlib.suppress(OSError):  # another process was faster
            partial.rename(root)
    finally:
        for path in (work, partial):
            shutil.rmtree(path, ignore_errors=True)
    return root


def arm64() -> Path:
    """An aarch64 Debian with Python, for qemu-user; raises as ``unpacked``."""
    packages = ("python3-minimal", "libpython3-stdlib", "libstdc++6", "libgcc-s1")
    root = unpacked("python-arm64", "bookworm", "arm64", packages)
    # Runtimes look their processor up there, and crash on what an x86 kernel tells.
    for name in ("possible", "present"):
        (root / "sys/devices/system/cpu").mkdir(parents=True, exist_ok=True)
        (root / "sys/devices/system/cpu" / name).write_text("0\n")
    (root / "proc").mkdir(exist_ok=True)
    (root / "proc" / "cpuinfo").write_text(
        "processor\t: 0\nBogoMIPS\t: 108.00\nFeatures\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid\n"
        "CPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x0\nCPU part\t: 0xd08\nCPU revision\t: 3\n"
    )
    return root


def _mirror() -> str:
    """Where this system has its own Debian packages from, however its sources are written.

    Raises:
        OSError, subprocess.SubprocessError: It is no Debian, or its apt was never updated.
    """
    asked = ["apt-get", "indextargets", "--format", "$(SITE)", "Label: Debian", "Identifier: Packages"]
    sites = subprocess.run(asked, check=True, capture_output=True, text=True).stdout.split()
    if not sites:
        raise OSError("apt has no sources of Debian; run apt-get update first")
    return sites[0]
