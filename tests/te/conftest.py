"""Install the stand-ins once per session; without Transformer Engine nothing here is collected.

`make test-te` runs this folder in an environment of its own (build_te.py). The stand-ins change
torch for the whole process, so other tests must not share it.
"""

from __future__ import annotations

import importlib.util

if importlib.util.find_spec("transformer_engine") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    import stand_ins

    stand_ins.install()
