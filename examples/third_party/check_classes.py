"""Run every exported EfficientNet on the photographs and say whether its top class is right."""

from __future__ import annotations

import json
import pathlib
import sys

import numpy as np
from prepare import HERE, PHOTOGRAPHS

from edgekd.exporting.parity import run_file
from edgekd.plugins import load_exporter


def main(folder: pathlib.Path) -> int:
    """Print a line for each file; returns how many photographs were named wrongly."""
    images = np.load(HERE / "photographs.npz")
    wrong = 0
    for manifest in sorted(folder.glob("*/manifest.json")):
        facts = json.loads(manifest.read_text())
        runner = load_exporter(facts["target"]).load(manifest.parent / facts["path"])
        top = run_file(runner, {"image": images["image"]})[0].argmax(axis=1)
        right = [found in classes for found, classes in zip(top.tolist(), PHOTOGRAPHS.values(), strict=True)]
        wrong += right.count(False)
        named = ", ".join(f"{name} {found}" for name, found in zip(PHOTOGRAPHS, top.tolist(), strict=True))
        print(f"{manifest.parent.name:<12} {sum(right)} of {len(right)} right: {named}")
    return wrong


if __name__ == "__main__":
    sys.exit(main(pathlib.Path(sys.argv[1])) > 0)
