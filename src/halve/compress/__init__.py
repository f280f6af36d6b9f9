"""Weights change by calibrated transform: measure inputs, round, write a smaller checkpoint."""

from halve.compress.apply import ModuleReport, apply_plan
from halve.compress.calibrate import Energies, Hessians, Statistics, calibrate
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
from halve.compress.upcycle import upcycle, upcycle_refusal

__all__ = [
    "ActivationChoice",
    "Assignment",
    "Choice",
    "Energies",
    "Hessians",
    "KVChoice",
    "ModuleReport",
    "Statistics",
    "apply_plan",
    "calibrate",
    "grouped_plan",
    "resolve",
    "rounded_format",
    "uniform_plan",
    "upcycle",
    "upcycle_refusal",
]
