"""What distillation costs: bytes a view, and what several views of one decoding save. Ratios of steps are measured by
``python -m edgekd.benchmarks.distill_speed``; its results are held to be complete."""

import json
from pathlib import Path

import pytest

from edgekd.benchmarks import distill_speed


def test_a_view_at_ten_classes_takes_sixty_bytes_with_its_partner_and_little_more_on_disk() -> None:
    found = distill_speed.sizes()

    assert found["record"] == 56
    assert found["record_with_partner"] == distill_speed.BARS["bytes a view at k = 10, at most"] == 60
    assert found["on_disk_with_partner_8_views"] < 62  # 8 bytes of id a sample, and the manifest


def test_views_that_share_a_decoding_cost_less(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    pytest.importorskip("sklearn")
    found = distill_speed.decoding(tmp_path, images=64, rounds=3)

    assert list(found) == ["1", "2", "4", "8"]
    assert found["8"] < found["4"] < found["1"]
    assert found["8"] < 0.6 * found["1"]


def test_the_results_tell_how_they_were_measured() -> None:
    result = json.loads(distill_speed.RESULTS.read_text())

    assert [case["batch"] for case in result["cases"]] == [distill_speed.BATCH] * 2
    for case in result["cases"]:
        assert case["cache_to_plain"]["of_medians"] > 0
        assert len(case["samples_ms"]["cache"]) == len(case["samples_ms"]["plain"]) >= 5
        assert any(name.startswith("torchdistill") for name in case["live_to_cache"])
    assert "CPU time" in result["conditions"]
    assert {"torch", "torchdistill"} <= set(result["environment"])
