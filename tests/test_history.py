"""The history in real databases: SQLite here, PostgreSQL where a server is installed; and what it tells."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgekd.benchmarks.history import Entry, History
from edgekd.benchmarks.history_page import html, lines, series_of
from edgekd.errors import StorageError, UsageError
from edgekd.measurement import Block, Measurement

pytest.importorskip("sqlalchemy", reason="pip install 'edgekd[history]'")
pytest.importorskip("ruptures", reason="pip install 'edgekd[history]'")


def measured(latency: float = 1.0, sha: str = "a" * 64, accuracy: float | None = 0.9) -> Measurement:
    block = Block(50.0, 5.0, 3.0, (2.0,), (latency,) * 20, 1000, True, {"runtime": "onnxruntime 1.32"})
    return Measurement(sha, "onnx", "fp32", "host (a chip)", "measured", blocks=(block,) * 3, size_bytes=5000,
                       accuracy=accuracy, samples=10)  # fmt: skip


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a server of its own, on a socket in a folder of its own; stopped at the end."""
    pytest.importorskip("psycopg", reason="pip install 'edgekd[postgres]'")
    places = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not places:
        pytest.skip("no PostgreSQL server is installed: apt-get install postgresql")
    folder = Path("/tmp") / f"edgekd-postgres-{os.getpid()}"  # a socket's path has at most 107 bytes
    folder.mkdir()
    user: dict[str, int] = {}
    if os.getuid() == 0:  # the server refuses to run as root
        import pwd

        account = pwd.getpwnam("postgres")
        os.chown(folder, account.pw_uid, account.pw_gid)
        user = {"user": account.pw_uid, "group": account.pw_gid}
    run = {"check": True, "cwd": folder, "stdout": subprocess.DEVNULL, **user}
    initdb, server = places[-1], places[-1].with_name("postgres")
    subprocess.run([initdb, "-D", folder / "data", "-U", "edgekd", "--auth=trust", "-N"], **run)  # type: ignore[call-overload]
    command = [server, "-D", folder / "data", "-k", folder, "-c", "listen_addresses="]
    process = subprocess.Popen(command, cwd=folder, stderr=subprocess.DEVNULL, **user)  # type: ignore[call-overload]
    try:
        end = time.monotonic() + 60
        # The socket is there before the server answers.
        ready = [str(places[-1].with_name("pg_isready")), "--quiet", f"--host={folder}"]
        while subprocess.run(ready, check=False).returncode:
            assert time.monotonic() < end, "the server did not start"
            time.sleep(0.05)
        yield f"postgresql+psycopg://edgekd@/postgres?host={folder}"
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)
        shutil.rmtree(folder)


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'kept' / 'history.db'}"
        return
    url = request.getfixturevalue("postgres")
    yield url
    import sqlalchemy as sql

    with sql.create_engine(url).begin() as connection:
        connection.execute(sql.text("DROP TABLE IF EXISTS edgekd_measurements_1"))


def test_what_is_written_is_read_back_with_its_raw_samples(url: str) -> None:
    store = History(url)
    not_run = replace(measured(), status="not_run", blocks=(), reason="no chip")
    assert store.add([("digits", measured()), ("digits", not_run)], "v1") == 1
    assert store.add([("spam", measured(2.0))], how="compare") == 1
    store.close()
    entries = History(url).entries()
    assert [entry.measurement for entry in entries] == [measured(), measured(2.0)]
    assert [(entry.model, entry.release, entry.how, entry.label) for entry in entries] == [
        ("digits", "v1", "bench", "v1"),
        ("spam", "", "compare", "aaaaaaa"),
    ]
    assert [entry.model for entry in History(url).entries(model="spam")] == ["spam"]
    assert len(History(url).entries(device="host")) == 2
    assert History(url).entries(device="ho%") == []


WRITER = """
import sys
sys.path[:0] = {path!r}
from edgekd.benchmarks.history import History
from edgekd.measurement import Block, Measurement
block = Block(1.0, 1.0, 1.0, (), (1.0,) * 2000, None, True)
one = Measurement("a" * 64, "onnx", "fp32", "host", "measured", blocks=(block,) * 6)
store = History({url!r})
print("ready", flush=True)
for turn in range({turns}):
    store.add([(f"{name}-{{turn}}", one)] * 5, release={name!r})
    print(turn, flush=True)
"""


def writer(url: str, name: str, turns: int) -> "subprocess.Popen[str]":
    program = WRITER.format(path=sys.path, url=url, turns=turns, name=name)
    return subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)


def test_two_writers_at_once_lose_nothing(url: str) -> None:
    writers = [writer(url, name, 10) for name in ("a", "b")]  # the first of them also makes the table
    try:
        assert [process.wait(120) for process in writers] == [0, 0]
    finally:
        for process in writers:
            process.kill()
    entries = History(url).entries()
    assert len(entries) == 2 * 10 * 5
    assert {entry.model for entry in entries} == {f"{name}-{turn}" for name in "ab" for turn in range(10)}


def test_a_killed_writer_leaves_whole_sittings_only(url: str) -> None:
    process = writer(url, "killed", 10_000)
    assert process.stdout is not None
    try:
        assert any(line.strip() == "3" for line in process.stdout), "it ended by itself"
    finally:
        process.kill()
    process.communicate(timeout=60)
    entries = History(url).entries()
    counts = {model: sum(entry.model == model for entry in entries) for model in {entry.model for entry in entries}}
    assert len(counts) >= 4
    assert set(counts.values()) == {5}
    assert History(url).add([("after", measured())]) == 1, "and no lock"


def test_a_store_that_cannot_be_reached_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"history at sqlite:///.*unable to open database file"):
        History(f"sqlite:///{tmp_path}").add([("m", measured())])
    with pytest.raises(UsageError, match=r"works$"):
        History("no url")
    with pytest.raises(UsageError, match=r"sqlite:///history\.db or postgresql"):
        History("oracel://host/name")


def test_a_file_that_is_no_database_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "history.db"
    path.write_bytes(b"my own notes, not a database" * 100)
    with pytest.raises(StorageError, match="file is not a database"):
        History(f"sqlite:///{path}").add([("m", measured())])
    assert path.read_bytes() == b"my own notes, not a database" * 100


def entries_of(values: "np.ndarray") -> list[Entry]:
    from datetime import UTC, datetime, timedelta

    begin = datetime(2026, 1, 1, tzinfo=UTC)
    return [
        Entry(begin + timedelta(days=day), f"v{day}", "digits", "host (a chip)", "bench", measured(float(value)))
        for day, value in enumerate(values)
    ]


def test_what_was_imported_is_no_level_of_what_edgekd_measured() -> None:
    entries = entries_of(np.ones(3))
    names = [series.name for series in series_of([*entries, *(replace(entry, how="import") for entry in entries)])]
    assert names == ["digits onnx fp32 on host (a chip)", "digits onnx fp32 on host (a chip), imported"]


def test_a_creep_below_the_gates_margin_is_found_and_named() -> None:
    random = np.random.default_rng(0)
    values = np.exp(0.006 * random.standard_normal(30)) * np.where(np.arange(30) < 18, 1.0, 1.02)
    told = lines(entries_of(values))
    (sentence,) = [line for line in told if "changed by" in line]
    assert "latency changed by +2." in sentence or "latency changed by +1." in sentence
    assert "(worse) with v18, 2026-01-19, and stayed so" in sentence


def test_normal_noise_alone_is_rarely_called_a_change() -> None:
    from edgekd.benchmarks.changes import changes

    random = np.random.default_rng(1)
    for length in (12, 25, 40):
        found = [bool(changes(np.exp(0.01 * random.standard_normal(length)).tolist())) for _ in range(200)]
        assert sum(found) <= 0.06 * 200
    assert changes([1.0] * 30) == []
    assert changes([1.0, 2.0] * 3) == [], "too few"


def test_the_page_has_a_picture_for_each_metric_and_loads_nothing() -> None:
    values = np.where(np.arange(24) < 12, 1.0, 1.1) * np.exp(0.003 * np.random.default_rng(0).standard_normal(24))
    entries = entries_of(values)
    bad = [replace(entry, model="<script>x</script>", release="<b>") for entry in entries]
    page = html([*entries, *bad])
    assert len(series_of([*entries, *bad])) == 2
    assert page.count("<svg") == 6
    assert "latency changed by" in page
    assert "<script" not in page
    assert "<b>:" not in page
    assert "http://" not in page.replace("http://www.w3.org/", "")


def test_the_command_shows_what_was_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from edgekd.benchmarks.history import keep
    from edgekd.cli.app import app
    from edgekd.console import LineProgress

    monkeypatch.setenv("EDGEKD_HISTORY", f"sqlite:///{tmp_path / 'h.db'}")
    assert "nothing has been measured yet" in CliRunner().invoke(app, ["history"]).output
    keep([("digits", measured())], "v7", "compare", LineProgress(sys.stderr))
    shown = CliRunner().invoke(app, ["history", "--html", str(tmp_path / "history.html")])
    assert shown.exit_code == 0, shown.output
    assert "v7" in shown.output
    assert "compare" in shown.output
    assert "<svg" in (tmp_path / "history.html").read_text()
    (entry,) = json.loads(CliRunner().invoke(app, ["history", "--json"]).output)
    assert Measurement.from_json(entry["measurement"]) == measured()


def test_what_cannot_be_kept_is_said_and_costs_no_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from edgekd.benchmarks.history import keep
    from edgekd.console import LineProgress

    for url, fault in ((f"sqlite:///{tmp_path}", "history at sqlite:///"), ("no url", "no url…: Could not parse")):
        monkeypatch.setenv("EDGEKD_HISTORY", url)
        keep([("digits", measured())], "v7", "bench", LineProgress(sys.stderr))
        assert f"not kept in the history: {fault}" in capsys.readouterr().err
