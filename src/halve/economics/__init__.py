"""Money: exact arithmetic over seconds, tokens and prices. Imports no torch."""

from halve.economics.ledger import LedgerEntry, Meter

__all__ = ["LedgerEntry", "Meter"]
