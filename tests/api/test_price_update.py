"""`halve price update`: offers as gpuhunt gives them become a file that the catalogue reads."""

from dataclasses import dataclass
from datetime import date
from decimal import Decimal

import pytest

from halve.api.price_update import MISSING, update_prices
from halve.core.errors import ConfigError, OutputError
from halve.economics.catalogue import load_catalogue

DAY = date(2026, 11, 26)


@dataclass
class Offer:
    """What gpuhunt's CatalogItem has of it."""

    gpu_name: str | None = "L40S"
    price: float = 1.25
    provider: str = "runpod"
    instance_name: str = "NVIDIA L40S"
    location: str = "US-1"
    gpu_count: int = 1
    gpu_memory: float | None = 48
    spot: bool = False


@pytest.fixture(autouse=True)
def own(monkeypatch, tmp_path):
    path = tmp_path / "settings" / "prices.toml"
    monkeypatch.setenv("HALVE_PRICES", str(path))
    return path


def updated(*offers):
    return update_prices(query=lambda: offers, day=DAY)


def test_offers_of_known_devices_lie_between_what_ships_and_ones_own(own):
    offers = [Offer(price=0.3 + i / 10, location=f"US-{i}") for i in range(9)]
    offers += [
        Offer(gpu_name="H100", spot=True, price=2.5),
        Offer(gpu_name="RTX4090", price=0.4, instance_name='4"09\\0'),
    ]
    unknown = [
        Offer(gpu_name="K80"),
        Offer(gpu_name=None, gpu_count=0),
        Offer(price=0),
        Offer(gpu_name="A100", gpu_memory=40),
    ]
    found = updated(*offers, *unknown)
    assert (found.num_offers, found.num_devices, found.num_skipped) == (7, 3, 4)  # the five cheapest of a device
    catalogue = load_catalogue()
    cheapest = catalogue.machines("L40S")[0]
    assert (cheapest.usd_per_hour, cheapest.as_of, cheapest.cloud) == (Decimal("0.3"), DAY, "runpod")
    assert catalogue.machines('4"09\\0')[0].device == "RTX-4090"
    own.write_text(
        '[[price]]\ncloud = "runpod"\ninstance = "NVIDIA L40S"\ndevice = "L40S"\nregion = "US-0"\n'
        'usd_per_hour = "0.2"\nkind = "on_demand"\nsource = "my bill"\n'
    )
    assert load_catalogue().machines("L40S")[0].source == "my bill"
    updated(Offer(price=0.9))
    assert [p.usd_per_hour for p in load_catalogue().prices if p.cloud == "runpod" and p.source == "given"] == [
        Decimal("0.9")
    ]


def test_what_fails_leaves_the_file_as_it_was(own):
    updated(Offer())
    path = own.with_name("prices.update.toml")
    before = path.read_bytes()

    def breaks():
        raise OSError("no network")

    with pytest.raises(ConfigError, match=r"no network; .*is as it was"):
        update_prices(query=breaks)
    with pytest.raises(ConfigError, match="1 offers, none of a device"):
        updated(Offer(gpu_name="K80"))
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    with pytest.raises(OutputError, match="can't be written"):
        update_prices(path / "below" / "a file.toml", query=lambda: [Offer()])


def test_without_gpuhunt_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gpuhunt", None)
    with pytest.raises(ConfigError) as error:
        update_prices()
    assert str(error.value) == MISSING
