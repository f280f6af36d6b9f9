"""Engine: many requests share one model. A step is schedule, run, commit over one flat batch of tokens."""

from halve.engine.config import EngineConfig, EngineMetrics
from halve.engine.core import EngineCore, StepError
from halve.engine.engine import Engine, Prompt, Stream
from halve.engine.offline import OfflineRun, run_file
from halve.engine.request import Candidate, Completion, Request, SamplingParams, StepOutput, TokenLogprobs
from halve.engine.runner import AheadModelRunner, AheadRunner, Handle, ModelRunner, Runner, blocks_for, blocks_within
from halve.engine.simulate import Percentiles, Simulation, simulate
from halve.engine.step_times import StepTimes, measure_steps

__all__ = [
    "AheadModelRunner",
    "AheadRunner",
    "Candidate",
    "Completion",
    "Engine",
    "EngineConfig",
    "EngineCore",
    "EngineMetrics",
    "Handle",
    "ModelRunner",
    "OfflineRun",
    "Percentiles",
    "Prompt",
    "Request",
    "Runner",
    "SamplingParams",
    "Simulation",
    "StepError",
    "StepOutput",
    "StepTimes",
    "Stream",
    "TokenLogprobs",
    "blocks_for",
    "blocks_within",
    "measure_steps",
    "run_file",
    "simulate",
]
