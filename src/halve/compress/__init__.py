"""Weights change by calibrated transform: measure inputs, round, write a smaller checkpoint."""

from halve.compress.apply import ModuleReport, apply_plan
from halve.compress.calibrate import Energies, Hessians, Statistics, calibrate
from halve.compress.clusters import cluster_routers
from halve.compress.distil import Recovery, recover
from halve.compress.resolve import (
    ActivationChoice,
    Assignment,
    Choice,
    KVChoice,
    grouped_plan,
    resolve,
    rounded_format,
    uniform_plan,
)
from halve.compress.sparsify import (
    CALIBRATION_TOKENS,
    LayerFacts,
    sparsify_refusal,
    split_layers,
    split_of,
    target_of,
    trained_gains,
    write_sparse,
)
from halve.compress.upcycle import Upcycling, upcycle, upcycle_refusal

__all__ = [
    "CALIBRATION_TOKENS",
    "ActivationChoice",
    "Assignment",
    "Choice",
    "Energies",
    "Hessians",
    "KVChoice",
    "LayerFacts",
    "ModuleReport",
    "Recovery",
    "Statistics",
    "Upcycling",
    "apply_plan",
    "calibrate",
    "cluster_routers",
    "grouped_plan",
    "recover",
    "resolve",
    "rounded_format",
    "sparsify_refusal",
    "split_layers",
    "split_of",
    "target_of",
    "trained_gains",
    "uniform_plan",
    "upcycle",
    "upcycle_refusal",
    "write_sparse",
]
