"""The verbs, as Python: each checks its input, composes the rooms below, and returns a record.

Verbs live in modules of their own and are reached as `halve.optimize`, `halve.load` ...: importing this package loads
nothing, so that running a model on CPU never loads torch, which optimizing it needs.
"""
