"""Money: exact arithmetic over seconds, tokens and prices. Imports no torch."""

from halve.economics.api_prices import ApiPrice, api_price
from halve.economics.currency import Currency, read_currency
from halve.economics.ledger import LedgerEntry, Meter
from halve.economics.margin import demand_response, scenario_rows, statement, tornado
from halve.economics.product import Product, read_product

__all__ = [
    "ApiPrice",
    "Currency",
    "LedgerEntry",
    "Meter",
    "Product",
    "api_price",
    "demand_response",
    "read_currency",
    "read_product",
    "scenario_rows",
    "statement",
    "tornado",
]
