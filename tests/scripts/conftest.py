import sys
from pathlib import Path

# The scripts are no package of the wheel: their folder is put where Python looks.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
