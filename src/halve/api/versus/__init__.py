"""Engines beside each other on one machine: each in a process of its own, one at a time, beside the machine's ceilings.

`engines.py`, `servers.py` and `worker.py` also run in the Python of a peer's environment, where there is no Halve: they
import the standard library and each other, and the engine that they are for.
"""
