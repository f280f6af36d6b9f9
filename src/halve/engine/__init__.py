"""Engine: many requests share one model. A step is schedule, run, sample over one flat batch of tokens."""

from halve.engine.engine import Engine, EngineConfig
from halve.engine.request import Completion, Request, SamplingParams, StepOutput
from halve.engine.runner import ModelRunner, Runner, block_bytes, blocks_for, blocks_within

__all__ = [
    "Completion",
    "Engine",
    "EngineConfig",
    "ModelRunner",
    "Request",
    "Runner",
    "SamplingParams",
    "StepOutput",
    "block_bytes",
    "blocks_for",
    "blocks_within",
]
