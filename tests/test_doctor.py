"""doctor: what is missing and what is known to be bad, each with the line that mends it."""

import pytest

from edgekd import plugins
from edgekd.cli import doctor


def test_a_bad_pair_is_told_with_what_mends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"coremltools": "9.0", "numpy": "2.4.6", "torch": "2.13.0+cpu", "litert-torch": "0.10.0"}
    monkeypatch.setattr(doctor, "_version", versions.get)
    bad = [finding for finding in doctor.diagnose() if finding["what"] == "coremltools"]

    assert bad[0]["state"] == "bad"
    assert bad[0]["mend"] == "pip install 'numpy<2.4'"


@pytest.mark.parametrize("version", ["2.3.5", "2.3.9rc1", "1.26.4"])
def test_good_pairs_are_not_told(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(doctor, "_version", {"coremltools": "9.0", "numpy": version}.get)

    assert not [finding for finding in doctor.diagnose() if finding["what"] == "coremltools"]


def test_a_missing_toolchain_is_told_with_its_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins, "missing", lambda requires: tuple(requires))
    found = {fact["target"]: fact for fact in doctor.target_facts()}

    assert not found["coreml"]["ready"]
    assert found["coreml"]["reason"] == "coremltools not installed; pip install 'edgekd[coreml]'"
