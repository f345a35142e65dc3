"""What is measured, and the tables and figures that show it: `python -m benchmarks`."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))  # `python -m benchmarks.exact` then imports as `python benchmarks/exact.py` does
