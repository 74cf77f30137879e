"""Lets `python tools/NAME.py` find what `python -m tools.NAME` finds: `tools` and the scripts beside it.

The only place that touches `sys.path`. A command imports it where it runs as a file, before anything of the project.
"""

import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[1])
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)
