"""The profiles' schema, and that every figure of those in data/devices has a source."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tasks.algorithms.device_fit.verdict import judge
from tasks.algorithms.errors import InputError
from tasks.device_profiles import profiles
from tests.algorithms.device_fit.test_footprint import BLOCK_WEIGHTS, WORK, two_layers
from tests.support.paths import ROOT

PROFILES = ROOT / "data" / "devices"
NAMES = sorted(path.stem for path in PROFILES.glob("*.yaml") if path.stem != profiles.HOST)


def raw(name: str) -> dict:
    return yaml.safe_load((PROFILES / f"{name}.yaml").read_text(encoding="utf-8"))


def figures(node: object) -> list[dict]:
    """Every mapping of a profile that holds a number, or a list of what a device can do."""
    if isinstance(node, list):
        return [found for item in node for found in figures(item)]
    if not isinstance(node, dict):
        return []
    own = [node] if {"value", "values", "saves"} & node.keys() else []
    return own + [found for item in node.values() for found in figures(item)]


def test_the_devices_asked_for_are_there() -> None:
    asked = {"siracusa", "esp32-s3", "raspberry-pi-4", "raspberry-pi-5", "jetson-orin-nano", "phone", "browser-tab"}
    assert asked | {"oneplus-12"} <= set(NAMES) == set(profiles.load_all(PROFILES))


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_has_a_source(name: str) -> None:
    found, profile = figures(raw(name)), profiles.load_all(PROFILES)[name]
    assert len(found) == len(profile.sources()) >= 10
    assert all(len(figure["source"]) > 12 for figure in found)
    assert sorted(row["source"] for row in profile.sources()) == sorted(figure["source"] for figure in found)


GROUPS = 2 * BLOCK_WEIGHTS // 2 + 2 * BLOCK_WEIGHTS // 4 * 2 + 80 + 320
"""Bytes of `two_layers` where int4 in groups is held: codes, fp16 scales, norms, fp16 embedding."""
ROWS = 2 * BLOCK_WEIGHTS + 2 * 56 * 2 + 80
"""Bytes of its int8 codes, fp16 scales of its 56 rows a block, and norms, where int8 with a scale per row is held."""
KV = 320
SECONDS = {
    "browser-tab": (GROUPS + KV) / 172.8e9,
    "esp32-s3": (ROWS + 20 * 8 * 4) / 160e6 + KV / 7.68e9,  # an fp32 embedding; the cache lies in the SRAM
    "jetson-orin-nano": (GROUPS + KV) / 320e9,
    "oneplus-12": (GROUPS + KV) / 460.8e9,
    "phone": (GROUPS + KV) / 460.8e9,
    "raspberry-pi-4": (4 * BLOCK_WEIGHTS + 640) / 115.2e9 + 2 * 160 / 57.6e9,  # int8 and attention; the head in fp32
    "raspberry-pi-5": (GROUPS + KV) / 153.6e9,
    "siracusa": (ROWS + 320) / 11.5e9 + KV / 11.5e9,
}
"""Least time of a token of `two_layers`, by hand: bytes by the bandwidths that the profiles state.

On the raspberry-pi-4 computing takes longer: operations by its peaks.
"""


@pytest.mark.parametrize("name", NAMES)
def test_a_tiny_model_fits_every_device_at_the_speed_of_what_it_reads(name: str) -> None:
    result = judge(profiles.load_all(PROFILES)[name].device(), two_layers(), WORK)
    assert result.verdict == "FITS"
    assert result.tokens_per_second.bound == pytest.approx(1 / SECONDS[name])


def test_the_default_device_is_the_one_described() -> None:
    device = profiles.load_all(PROFILES)["siracusa"].device()
    tiers = {tier.name: tier for tier in device.tiers}
    assert tiers["mram"].bytes == tiers["tile_sram"].bytes == 4 * 2**20
    assert tiers["l1"].bytes == 256 * 2**10
    assert tiers["mram"].bandwidth * 8 == 92 * 10**9
    assert tiers["mram"].holds == {"weights", "lookup"} and device.storage is None
    assert (device.unit.rates, device.margin) == ({"int8": 1_950_000_000_000}, 0.1)
    assert not device.unit.saves_bytes | device.unit.saves_time


def test_figures_reach_the_arithmetic() -> None:
    device = profiles.load_all(PROFILES)["jetson-orin-nano"].device()
    assert device.unit.saves_bytes == device.unit.saves_time == {(2, 4)}
    assert device.storage.tier.holds == {"weights", "lookup"} and device.storage.buffer == 131_072
    assert device.cache.bytes == 2**21
    assert device.unit.formats["int4-group"] == "fp16"


def spoil(profile: dict, key: str, value: object) -> dict:
    *path, last = key.split(".")
    place = profile
    for part in path:
        place = place[int(part) if part.isdigit() else part]
    place[last] = value
    return profile


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("tiers.0.bytes.value", -1, "greater than 0"),
        ("tiers.0.bytes.value", "4 MiB", "valid integer"),
        ("tiers.0.reserved.value", 2**40, "leaves nothing"),
        ("tiers.0.holds", ["scratch"], "no tier holds weights"),
        ("tiers.0.holds", ["weight"], "holds"),
        ("tiers.0.bandwidth", {"value": 5}, "bandwidth.source"),
        ("tiers.0.bandwidth.value", 5, "not listed from the highest bandwidth"),
        ("tiers.1.name", "mram", "not unique"),
        ("weight_formats.values", {"int4-channel": "fp16"}, "compute states no peak"),
        ("weight_formats.values", {"int9-channel": "int8"}, "weight_formats"),
        ("compute.0.precision", "int7", "compute.0.precision"),
        ("safety_margin.value", 1.0, "less than 1"),
        ("storage", {"name": "flash"}, "storage.bytes"),
        ("name", "other", "must be the file's name"),
        ("colour", "red", "colour"),
    ],
)
def test_a_broken_profile_is_refused_in_a_sentence(tmp_path: Path, key: str, value: object, said: str) -> None:
    profile = raw("siracusa")
    (tmp_path / "siracusa.yaml").write_text(yaml.safe_dump(spoil(profile, key, value)), encoding="utf-8")
    with pytest.raises(InputError, match="siracusa.yaml") as caught:
        profiles.load_all(tmp_path)
    assert said in str(caught.value)


def test_a_precision_stated_twice(tmp_path: Path) -> None:
    profile = raw("siracusa")
    profile["compute"] *= 2
    (tmp_path / "siracusa.yaml").write_text(yaml.safe_dump(profile), encoding="utf-8")
    with pytest.raises(InputError, match="states a precision twice"):
        profiles.load_all(tmp_path)


def test_no_profile_and_no_yaml(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no device profile"):
        profiles.load_all(tmp_path)
    (tmp_path / "bad.yaml").write_text("a: [", encoding="utf-8")
    with pytest.raises(InputError, match="bad.yaml is not valid YAML"):
        profiles.load_all(tmp_path)


def test_an_unknown_device_lists_those_known() -> None:
    with pytest.raises(InputError, match="'abacus'.*siracusa"):
        profiles.pick(profiles.load_all(PROFILES), "abacus")


def test_the_measured_profile_is_read_only_when_asked_for(tmp_path: Path) -> None:
    (tmp_path / "siracusa.yaml").write_text((PROFILES / "siracusa.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(InputError, match="edgepress profile measures"):
        profiles.load_host(tmp_path)
    (tmp_path / "host.yaml").write_text(yaml.safe_dump(raw("siracusa") | {"name": "host"}), encoding="utf-8")
    assert list(profiles.load_all(tmp_path)) == ["siracusa"]
    assert profiles.load_host(tmp_path).name == "host"
    ignored = [(PROFILES.parents[1] / name).read_text(encoding="utf-8") for name in (".gitignore", ".dvcignore")]
    assert all("data/devices/host.yaml\n" in text for text in ignored)
