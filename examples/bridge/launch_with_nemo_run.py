"""Launch a run of Megatron Bridge with SkyLadder through NeMo-Run, here or on a SLURM cluster.

    pip install nemo-run "leptonai<0.30"      # newer ones of leptonai do not import with 0.11.1
    python examples/bridge/launch_with_nemo_run.py local --gpus 8 -- \
        --recipe examples/bridge/recipes.py:pretrain_1b_8k skyladder.preset=1b-8k \
        dataset.data_path=/data/cc_text_document
    python examples/bridge/launch_with_nemo_run.py slurm --account me --nodes 2 --gpus 8 -- ...

What stands after -- is the command line of ``-m megatron_skyladder.megatron_bridge``.
"""

from __future__ import annotations

import argparse
import os
import sys

import nemo_run as run

from megatron_skyladder.megatron_bridge import command_line

MODULE = "megatron_skyladder.megatron_bridge"
VARIABLES = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}


def script(words: list[str]) -> run.Script:
    """Return what every rank runs; what is misspelt is refused here, before it is queued."""
    line = command_line.read(words)
    # a rank may begin in another folder
    recipe = os.path.abspath(line.recipe) if ".py:" in line.recipe else line.recipe
    rest = [word for word in words if word not in ("--recipe", line.recipe)]
    return run.Script(path=MODULE, m=True, entrypoint="python", args=["--recipe", recipe, *rest])


def executor(options: argparse.Namespace) -> run.Executor:
    """Return where it runs; torchrun starts the ranks."""
    shared = {"nodes": options.nodes, "launcher": "torchrun", "env_vars": VARIABLES}
    if options.where == "local":
        return run.LocalExecutor(ntasks_per_node=options.gpus, **shared)
    return run.SlurmExecutor(
        account=options.account,
        partition=options.partition,
        time=options.time,
        ntasks_per_node=options.gpus,
        gpus_per_node=options.gpus,
        exclusive=True,
        mem="0",
        container_image=options.container_image,
        container_mounts=options.container_mounts,
        tunnel=run.LocalTunnel(job_dir=os.path.abspath(options.job_dir)),
        **shared,
    )


def main(words: list[str]) -> None:
    own, theirs = words, []
    if "--" in words:
        own, theirs = words[: words.index("--")], words[words.index("--") + 1 :]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("where", choices=("local", "slurm"))
    parser.add_argument("--gpus", type=int, default=8, help="of a node, and ranks on it")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--account")
    parser.add_argument("--partition")
    parser.add_argument("--time", default="24:00:00")
    parser.add_argument("--container-image")
    parser.add_argument("--container-mounts", nargs="*", default=[])
    parser.add_argument("--job-dir", default="runs/nemo-run", help="of NeMo-Run, under SLURM")
    parser.add_argument("--dryrun", action="store_true", help="show it, start nothing")
    options = parser.parse_args(own)
    run.run(script(theirs), executor=executor(options), name="skyladder", dryrun=options.dryrun)


if __name__ == "__main__":
    main(sys.argv[1:])
