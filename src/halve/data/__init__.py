"""Text in, documents out: what a file holds as documents, and which of them calibrate, select and certify."""

from halve.data.sources import Document, Tokenizer, documents_sha256, encode, read_documents, write_documents
from halve.data.split import Splits, split

__all__ = [
    "Document",
    "Splits",
    "Tokenizer",
    "documents_sha256",
    "encode",
    "read_documents",
    "split",
    "write_documents",
]
