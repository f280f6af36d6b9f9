"""One tree of errors. A message holds the thing, the value, the rule and the way out."""


class HalveError(Exception):
    """Anything that Halve raises on purpose."""


class UserError(HalveError):
    """The user can mend it: printed without a traceback, exit code 1."""


class ConfigError(UserError):
    """A record or a model configuration that cannot be read as it stands."""


class CheckpointError(UserError):
    """Files of a model that are missing, broken or contradict each other."""


class FormatError(UserError):
    """A number format that does not exist or does not fit a tensor."""


class PlanError(UserError):
    """A plan that names what does not exist or contradicts itself."""


class TextError(UserError):
    """Text or a tokenizer that cannot be used as asked."""


class DataError(UserError):
    """A text file that cannot be read, or holds too little."""


class QualityError(UserError):
    """A quality limit that nothing meets, or figures that do not reproduce."""


class OutputError(UserError):
    """A result that cannot be written where it was asked for."""


class RequestError(UserError):
    """A generation request that this model or engine cannot serve."""


class KernelError(HalveError):
    """No kernel runs this operation here."""


class EngineError(HalveError):
    """A step of the engine that failed, or an engine that has stopped."""
