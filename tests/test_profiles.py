"""Devices by name and by file."""

import tomllib
from importlib.resources import files
from pathlib import Path

import pytest

from edgekd import plugins
from edgekd.errors import UsageError
from edgekd.profiles import device_names, device_of, load_device, load_profile


@pytest.fixture(autouse=True)
def own_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGEKD_DEVICES", str(tmp_path / "devices"))
    (tmp_path / "devices").mkdir()
    return tmp_path / "devices"


def test_every_built_in_device_is_whole_and_each_of_its_facts_has_a_source() -> None:
    paths = [entry for entry in files("edgekd.devices").iterdir() if entry.name.endswith(".toml")]
    assert len(paths) >= 20
    for entry in paths:
        profile = load_profile(entry.name.removesuffix(".toml"))
        assert profile.kind in plugins.kind_names()
        device_of(profile)
        if profile.sources:
            assert set(profile.facts) <= set(profile.sources), entry.name
            assert all(source.startswith("https://") for source in profile.sources.values()), entry.name
        assert "settings" not in tomllib.loads(entry.read_text(encoding="utf-8")).get("facts", {})


def test_an_unknown_device_names_the_known() -> None:
    with pytest.raises(UsageError, match=r"no device 'pixel'; there are .*fake.*host.*, or the path of a .toml"):
        load_device("pixel")


@pytest.mark.parametrize("name", ["../host", "", ".", "a/b", "-x"])
def test_a_name_is_no_path(name: str) -> None:
    with pytest.raises(UsageError, match="no device"):
        load_profile(name)


def test_a_users_file_extends_a_device_and_goes_by_its_own_name(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('extends = "fake"\n[facts]\nowner = "me"\n[settings]\nseed = 3\n')
    profile = load_profile(str(path))
    assert (profile.name, profile.kind) == ("mine", "fake")
    assert profile.facts == {"model": "fake (no device; nothing was run)", "owner": "me"}
    assert profile.settings == {"seed": 3}


def test_ones_own_device_may_bear_the_name_of_its_model(own_devices: Path) -> None:
    (own_devices / "fake.toml").write_text('extends = "fake"\n[settings]\nseed = 4\n')
    assert load_profile("fake").settings == {"seed": 4}
    assert "fake" in device_names()


def test_a_circle_ends(own_devices: Path) -> None:
    (own_devices / "a.toml").write_text('extends = "b"\n')
    (own_devices / "b.toml").write_text('extends = "a"\n')
    with pytest.raises(UsageError, match="no device 'a'"):
        load_profile("a")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind = 'fake", "is no TOML"),
        ("kind = 'fake'\nkinds = 1", "nothing is called 'kinds'; a device has kind, extends, facts"),
        ("[facts]\nmodel = 'x'", "either a kind or another device"),
        ("kind = 'fake'\nextends = 'host'", "either a kind or another device"),
        ("kind = 'fake'\n[settings]\nnoice = 1", "settings.noice: Extra inputs are not permitted; fake has latency_ms"),
        ("kind = 'fake'\n[settings]\nnoise = -1", "settings.noise: Input should be greater than or equal to 0"),
        ("kind = 'toaster'", "no kind of device called 'toaster'; there are"),
    ],
)
def test_a_wrong_file_is_told_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        load_device(str(path))
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="no device file"):
        load_device(str(tmp_path / "absent.toml"))
