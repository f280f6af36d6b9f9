"""Money: exact arithmetic over seconds, tokens and prices. Imports no torch."""

from halve.economics.api_prices import ApiPrice, api_price, named_price
from halve.economics.catalogue import Catalogue, CatalogueDevice, HourlyPrice, load_catalogue
from halve.economics.costs import (
    BreakEven,
    Fleet,
    Mix,
    TokenCost,
    api_request_usd,
    break_even,
    fleet,
    token_cost,
    verdict,
)
from halve.economics.currency import Currency, read_currency
from halve.economics.days import Day, read_day
from halve.economics.ledger import LedgerEntry, Meter
from halve.economics.margin import scenario_rows, statement
from halve.economics.outlook import demand_response
from halve.economics.presets import PRESETS, Preset, find_preset, preset_of
from halve.economics.product import Product
from halve.economics.product_file import read_product
from halve.economics.roofline import Assumptions, Throughput, estimate, scaled
from halve.economics.sensitivity import tornado
from halve.economics.shapes import ModelShape, find_shape

__all__ = [
    "PRESETS",
    "ApiPrice",
    "Assumptions",
    "BreakEven",
    "Catalogue",
    "CatalogueDevice",
    "Currency",
    "Day",
    "Fleet",
    "HourlyPrice",
    "LedgerEntry",
    "Meter",
    "Mix",
    "ModelShape",
    "Preset",
    "Product",
    "Throughput",
    "TokenCost",
    "api_price",
    "api_request_usd",
    "break_even",
    "demand_response",
    "estimate",
    "find_preset",
    "find_shape",
    "fleet",
    "load_catalogue",
    "named_price",
    "preset_of",
    "read_currency",
    "read_day",
    "read_product",
    "scaled",
    "scenario_rows",
    "statement",
    "token_cost",
    "tornado",
    "verdict",
]
