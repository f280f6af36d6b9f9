"""Text in, documents out: what a file holds as documents, and which of them calibrate, select and certify.

Traces of requests in, workloads out.
"""

from halve.data.sources import Document, Tokenizer, documents_sha256, encode, read_documents, write_documents
from halve.data.split import Splits, split
from halve.data.traces import read_trace

__all__ = [
    "Document",
    "Splits",
    "Tokenizer",
    "documents_sha256",
    "encode",
    "read_documents",
    "read_trace",
    "split",
    "write_documents",
]
