"""The cases and checks are those of tests/te, where they run on CPU stubs."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "te"))
