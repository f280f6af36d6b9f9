"""Weights change by calibrated transform: measure inputs, round, write a smaller checkpoint."""

from halve.compress.apply import ModuleReport, apply_plan
from halve.compress.calibrate import Energies, Hessians, Statistics, calibrate
from halve.compress.resolve import ActivationChoice, Assignment, KVChoice, resolve, uniform_plan

__all__ = [
    "ActivationChoice",
    "Assignment",
    "Energies",
    "Hessians",
    "KVChoice",
    "ModuleReport",
    "Statistics",
    "apply_plan",
    "calibrate",
    "resolve",
    "uniform_plan",
]
