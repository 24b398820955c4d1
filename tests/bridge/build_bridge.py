"""Make a virtual environment with Megatron Bridge, on a machine without a GPU.

    python tests/bridge/build_bridge.py --python PATH_OF_THE_TEST_PYTHON --venv .venv-bridge

The new environment sees every package of the given one, 5.5 GB of torch included, through one
.pth file, and adds about 0.7 GB of its own; the given environment stays as it was. Safe to run
again: an environment that is already right is left alone.

Bridge itself and energon are installed without their dependencies, because those ask for packages
that only GPUs can use; what an import of Bridge really needs is named here, and transformers as
Bridge asks for it, which is older than the given environment's. Transformer Engine and
nvidia-resiliency-ext are left out on purpose: what of Bridge imports them is served by
`megatron_skyladder.cpu.bridge`.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

logger = logging.getLogger("build_bridge")
ROOT = Path(__file__).resolve().parents[2]

PYTHON = (3, 12)  # Bridge's own limit: >=3.12,<3.13
WITHOUT_DEPENDENCIES = (
    *("megatron-bridge==0.6.2", "megatron-energon==7.4.1"),
    *("transformers==5.12.1", "tokenizers==0.22.2", "huggingface-hub==1.33.0"),
)
NEEDED_AT_IMPORT = (
    *("nvidia-modelopt==0.47.0", "hydra-core>=1.3.4,<1.4", "einops", "tensorboard", "datasets"),
    *("diffusers", "webdataset", "multi-storage-client", "pillow", "filetype", "braceexpand"),
    *("rapidyaml", "mlflow-skinny==3.17.2"),
)
STAMP = "bridge-environment.json"
BASE_FACTS = """
import json, sys, sysconfig, torch
from megatron.core import package_info
print(json.dumps({"purelib": sysconfig.get_path("purelib"), "python": sys.version_info[:2],
    "torch": torch.__version__, "megatron-core": package_info.__version__}))
"""
IMPORT_BRIDGE = """
from megatron_skyladder.cpu import bridge, engine
engine.install(); bridge.install()
import megatron.bridge.training.pretrain, megatron.bridge.recipes.llama
"""


def describe_base(python: str) -> dict[str, object]:
    """Ask the given interpreter what it has.

    Raises:
        ValueError: it cannot import torch and Megatron, or is a Python that Bridge does not take.
    """
    answer = subprocess.run([python, "-c", BASE_FACTS], capture_output=True, text=True)
    if answer.returncode:
        raise ValueError(
            f"--python {python} cannot import torch and megatron.core:\n{answer.stderr.strip()}\n"
            "Give the Python of an environment that has them (make install)."
        )
    facts: dict[str, object] = json.loads(answer.stdout)
    if facts["python"] != list(PYTHON):
        raise ValueError(
            f"--python {python} is Python {facts['python']}, but Megatron Bridge needs 3.12."
        )
    return facts


def run(command: list[str], **environment: str) -> None:
    """Run a command at low priority; its output is shown if it fails."""
    logger.info("%s", " ".join(command))
    done = subprocess.run(
        ["nice", *command],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        logger.error("%s", done.stdout[-4000:])
        raise subprocess.CalledProcessError(done.returncode, command)


def build(python: str, facts: dict[str, object], venv: Path) -> None:
    """Create the environment, or leave it alone where it is the one that is wanted."""
    wanted = {**facts, "packages": [*WITHOUT_DEPENDENCIES, *NEEDED_AT_IMPORT]}
    stamp = venv / STAMP
    if stamp.exists() and json.loads(stamp.read_text()) == wanted:
        logger.info("%s is up to date", venv)
        return
    shutil.rmtree(venv, ignore_errors=True)
    run([python, "-m", "venv", "--without-pip", str(venv)])
    site_packages = next(venv.glob("lib/python3*/site-packages"))
    # addsitedir rather than a bare path: the base's own .pth files count too (editable installs).
    purelib = facts["purelib"]
    (site_packages / "base.pth").write_text(f"import site; site.addsitedir({purelib!r})\n")
    own = str(venv / "bin" / "python")
    pip = [python, "-m", "pip", "--python", own, "--disable-pip-version-check", "install"]
    run([*pip, "--no-deps", *WITHOUT_DEPENDENCIES])
    run([*pip, "--constraint", str(ROOT / "constraints.txt"), *NEEDED_AT_IMPORT])
    # what is missing or broken is found here, not in the middle of the tests
    run([own, "-c", IMPORT_BRIDGE], PYTHONPATH=str(ROOT), CUDA_VISIBLE_DEVICES="")
    stamp.write_text(json.dumps(wanted, indent=1))
    logger.info("%s is ready", venv)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", default=sys.executable, help="environment to build on")
    parser.add_argument("--venv", type=Path, default=Path(".venv-bridge"), help="what to make")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        facts = describe_base(options.python)
    except ValueError as error:
        parser.error(str(error))
    try:
        build(options.python, facts, options.venv.absolute())
    except subprocess.CalledProcessError:  # already shown, with the end of its output
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
