"""Engine: many requests share one model. A step is schedule, run, commit over one flat batch of tokens."""

from halve.engine.config import EngineConfig, EngineMetrics
from halve.engine.core import EngineCore, StepError
from halve.engine.engine import Engine, Prompt, Stream
from halve.engine.offline import OfflineRun, run_file
from halve.engine.request import Candidate, Completion, Request, SamplingParams, StepOutput, TokenLogprobs
from halve.engine.runner import AheadModelRunner, AheadRunner, Handle, ModelRunner, Runner, blocks_for, blocks_within

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
    "Prompt",
    "Request",
    "Runner",
    "SamplingParams",
    "StepError",
    "StepOutput",
    "Stream",
    "TokenLogprobs",
    "blocks_for",
    "blocks_within",
    "run_file",
]
