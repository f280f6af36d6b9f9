"""Money: exact arithmetic over seconds, tokens and prices. Imports no torch."""

from halve.economics.api_prices import ApiPrice, api_price
from halve.economics.ledger import LedgerEntry, Meter

__all__ = ["ApiPrice", "LedgerEntry", "Meter", "api_price"]
