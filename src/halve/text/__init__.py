"""Text: tokenizer and chat template of a checkpoint."""

from halve.text.tokenizer import DecodeStream, Tokenizer

__all__ = ["DecodeStream", "Tokenizer"]
