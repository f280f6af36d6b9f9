"""`python scripts/train_tiny VERB ...`."""

import sys
from importlib import import_module
from pathlib import Path

# Python puts this folder first; the package is found one above.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

sys.exit(import_module("train_tiny.cli").main())
