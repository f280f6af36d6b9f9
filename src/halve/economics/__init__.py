"""Money: exact arithmetic over seconds, tokens and prices. Imports no torch."""

from halve.economics.api_prices import ApiPrice, api_price
from halve.economics.currency import Currency, read_currency
from halve.economics.ledger import LedgerEntry, Meter
from halve.economics.margin import scenario_rows, statement
from halve.economics.outlook import demand_response
from halve.economics.product import Product
from halve.economics.product_file import read_product
from halve.economics.sensitivity import tornado

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
