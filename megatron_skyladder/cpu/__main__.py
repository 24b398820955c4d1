"""``python -m megatron_skyladder.cpu SCRIPT ...``: run a script of Megatron's on the CPU."""

import sys

from megatron_skyladder.cpu import engine

if __name__ == "__main__":
    engine.run_script(sys.argv[1:])
