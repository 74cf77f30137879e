"""`python tools/audit.py` is `python -m tools.audit`: the package beside this file, which goes before it on import."""

import sys

import anywhere  # noqa: F401

from tools.audit.cli import main

if __name__ == "__main__":
    sys.exit(main())
