"""Make a virtual environment with Transformer Engine and flash-attn, on a machine without a GPU.

    python tests/te/build_te.py --python PATH_OF_THE_TEST_PYTHON --venv .venv-te

The new environment sees every package of the given one, 5.5 GB of torch included, through one
.pth file, and adds about 0.6 GB of its own; the given environment stays as it was. Transformer
Engine's torch extension has no wheel on the package index and is compiled here (C++ only, no nvcc,
a minute or two). The wheel fits one torch and one Python and is kept in the user's cache, so the
next environment on this machine takes seconds. Safe to run again: an environment that is already
right is left alone.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

logger = logging.getLogger("build_te")
HERE = Path(__file__).resolve().parent

# NVTE_PLUGIN and the te_attention custom ops, which the stubs hook into, are missing in
# 2.14 to 2.19; the flash-attn release is the last 2.x.
TE_VERSION = "2.20.2"
FLASH_ATTN_VERSION = "2.8.3.post2"
CUDA_MAJOR = 13
BUILD_TOOLS = ("wheel", "pybind11", "ninja", "setuptools", "packaging")
# nvcc's header folder crt/ and the random number library, which torch stopped bringing along.
CUDA_PARTS = "crt,curand"
# What `import transformer_engine.pytorch` needs and a Megatron environment lacks. Everything is
# installed without dependencies, or pip would bring a second torch.
TE_IMPORTS = ("onnx", "onnx_ir", "onnxscript", "ml_dtypes", "einops", "pydantic")
STAMP = "te-environment.json"
BASE_FACTS = """
import json, sys, sysconfig, torch
print(json.dumps({"executable": sys.executable, "purelib": sysconfig.get_path("purelib"),
    "python": "cp%d%d" % sys.version_info[:2], "torch": torch.__version__,
    "cuda": torch.version.cuda}))
"""


@dataclass(frozen=True)
class Base:
    """The environment to build on, and what a compiled wheel depends on in it."""

    executable: str
    purelib: str
    python: str  # such as cp312
    torch: str
    cuda: str | None

    @property
    def wheel_folder_name(self) -> str:
        return f"te-{TE_VERSION}-torch{self.torch}-{self.python}"


def describe_base(python: str) -> Base:
    """Ask the given interpreter for its torch, CUDA and folders.

    Raises:
        ValueError: it has no torch, or a torch that is not built for CUDA 13.
    """
    answer = subprocess.run([python, "-c", BASE_FACTS], capture_output=True, text=True)
    if answer.returncode:
        raise ValueError(
            f"--python {python} cannot import torch:\n{answer.stderr.strip()}\n"
            "Give the Python of an environment with torch and megatron-core."
        )
    base = Base(**json.loads(answer.stdout))
    if base.cuda is None or int(base.cuda.split(".")[0]) != CUDA_MAJOR:
        raise ValueError(
            f"--python {python} has torch {base.torch} for CUDA {base.cuda}, but Transformer "
            f"Engine is built against the headers that come with torch for CUDA {CUDA_MAJOR}. "
            f"Install the default Linux wheel of torch there (no GPU is needed to import it)."
        )
    return base


def run(command: list[str], *, log: Path | None = None, **environment: str) -> None:
    """Run a command at low priority; its output goes to `log` and is shown if it fails."""
    logger.info("%s", " ".join(command))
    sink = log.open("a") if log else subprocess.DEVNULL
    try:
        subprocess.run(
            ["nice", *command],
            env=os.environ | environment,
            stdout=sink,
            stderr=subprocess.STDOUT if log else None,
            check=True,
        )
    except subprocess.CalledProcessError:
        if log:
            logger.error("failed; the end of %s:\n%s", log, tail(log))
        raise


def tail(path: Path, num_lines: int = 40) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-num_lines:])


def create_venv(base: Base, venv: Path) -> tuple[str, Path]:
    """Create an environment that looks into itself first and into the base after that.

    Returns:
        Its interpreter and its folder of CUDA libraries and headers.
    """
    shutil.rmtree(venv, ignore_errors=True)
    run([base.executable, "-m", "venv", "--without-pip", str(venv)])
    site_packages = next(venv.glob("lib/python3*/site-packages"))
    # addsitedir rather than a bare path: the base's own .pth files count too (editable installs).
    (site_packages / "base.pth").write_text(f"import site; site.addsitedir({base.purelib!r})\n")
    # Transformer Engine looks for CUDA's libraries in its own site-packages: folders of links,
    # so that pip can add to them without touching the base.
    nvidia = site_packages / "nvidia"
    shutil.copytree(Path(base.purelib) / "nvidia", nvidia, copy_function=os.symlink)
    return str(venv / "bin" / "python"), nvidia


def pip(base: Base, python: str, *arguments: str, log: Path, **environment: str) -> None:
    """Run the base's pip on the new environment, which has none."""
    head = [base.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    run([*head, *arguments], log=log, **environment)


def build_environment(venv: Path, nvidia: Path) -> dict[str, str]:
    """Return the variables under which both packages build without a CUDA toolkit."""
    includes = [str(nvidia / part / "include") for part in (f"cu{CUDA_MAJOR}", "cudnn", "nccl")]
    return {
        "PATH": f"{venv / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "CPATH": os.pathsep.join(includes),
        "NVTE_BUILD_USE_NVIDIA_WHEELS": "1",  # a toolkit on the machine may be of another CUDA
        "NVTE_NO_LOCAL_VERSION": "1",  # or the wheel's name has the commit of a folder around it
        "CUDNN_PATH": str(nvidia / "cudnn"),
        "NVTE_FRAMEWORK": "pytorch",
        "NVTE_PYTORCH_FORCE_BUILD": "TRUE",
        "FLASH_ATTENTION_FORCE_BUILD": "TRUE",
        "FLASH_ATTENTION_SKIP_CUDA_BUILD": "TRUE",
    }


def cached_wheel(
    base: Base,
    requirement: str,
    python: str,
    folder: Path,
    log: Path,
    prepare: Callable[[Path], None] | None = None,
    **environment: str,
) -> Path:
    """Return the wheel of `name==version` that fits the base, building it where it is missing.

    Args:
        prepare: changes the unpacked source before it is built.
    """
    name, version = requirement.split("==")
    stem = f"{name.replace('-', '_')}-{version}"
    if not any(folder.glob(f"{stem}-*.whl")):
        logger.info("building %s against torch %s; the log is %s", requirement, base.torch, log)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".building-") as scratch:
            options = ["--no-deps", "--no-build-isolation", "--no-cache-dir"]
            source = requirement
            if prepare is not None:
                download = ["download", *options, "--no-binary", name, "-d", scratch, requirement]
                pip(base, python, *download, log=log, **environment)
                with tarfile.open(Path(scratch, f"{stem}.tar.gz")) as archive:
                    archive.extractall(scratch, filter="data")
                source = str(Path(scratch, stem))
                prepare(Path(source))
            wheel = ["wheel", *options, "--verbose", "-w", scratch, source]
            pip(base, python, *wheel, log=log, **environment)
            built = next(Path(scratch).glob(f"{stem}-*.whl"))
            os.replace(built, folder / built.name)
    return next(folder.glob(f"{stem}-*.whl"))


def make_one_source(source: Path) -> None:
    """Turn Transformer Engine's 33 source files into one, to be compiled without optimisation.

    Nearly all of the time goes into torch's headers, which each file reads anew: half a minute on
    one core, 17 minutes in all. None of the compiled code is slow on the CPU, or much in use: it
    checks arguments and launches what the stubs replace.
    """
    csrc, options = source / "csrc", source / "build_tools" / "pytorch.py"
    includes = []
    for path in sorted(csrc.rglob("*.cpp")):
        path = path.rename(path.with_suffix(".inc"))  # setup.py compiles what ends in .cpp
        includes.append(f'#include "{path.relative_to(csrc)}"\n')
    (csrc / "all.cpp").write_text("".join(includes))
    options.write_text(options.read_text().replace('"-O3"', '"-O0"'))


def wanted_stamp(base: Base) -> dict[str, object]:
    """Return what the finished environment records about itself, to recognise it next time."""
    return asdict(base) | {"transformer-engine": TE_VERSION, "flash-attn": FLASH_ATTN_VERSION}


def build(base: Base, venv: Path, cache: Path) -> None:
    """Create the environment at `venv`, with the compiled wheels taken from or put into cache."""
    stamp = venv / STAMP
    if stamp.exists() and json.loads(stamp.read_text()) == wanted_stamp(base):
        logger.info("%s is up to date", venv)
        return
    wheels = cache / base.wheel_folder_name
    wheels.mkdir(parents=True, exist_ok=True)
    log = wheels / "build.log"
    python, nvidia = create_venv(base, venv)
    pip(base, python, "install", "--no-deps", *BUILD_TOOLS, log=log)
    toolkit = f"cuda-toolkit[{CUDA_PARTS}]=={base.cuda}.*"
    pip(base, python, "install", toolkit, log=log)
    environment = build_environment(venv, nvidia)
    te_torch, flash = (
        cached_wheel(base, requirement, python, wheels, log, prepare, **environment)
        for requirement, prepare in (
            (f"transformer-engine-torch=={TE_VERSION}", make_one_source),
            (f"flash-attn=={FLASH_ATTN_VERSION}", None),
        )
    )
    te = [f"transformer-engine=={TE_VERSION}", f"transformer-engine-cu{CUDA_MAJOR}=={TE_VERSION}"]
    pip(base, python, "install", "--no-deps", *te, *TE_IMPORTS, str(te_torch), str(flash), log=log)
    # A half-installed Transformer Engine crashes Megatron, which catches only ImportError: so
    # find out here. It needs the stub for flash-attn's kernels, which were not built.
    paths = os.pathsep.join((str(HERE), str(HERE.parents[1])))
    run([python, "-c", "import stubs; stubs.install()"], log=log, PYTHONPATH=paths)
    stamp.write_text(json.dumps(wanted_stamp(base), indent=1))
    logger.info("%s is ready", venv)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", default=sys.executable, help="environment to build on")
    parser.add_argument("--venv", type=Path, default=Path(".venv-te"), help="environment to make")
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    parser.add_argument(
        "--cache", type=Path, default=user_cache / "megatron-skyladder", help="kept wheels"
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        base = describe_base(options.python)
    except ValueError as error:
        parser.error(str(error))
    try:
        build(base, options.venv.absolute(), options.cache.absolute())
    except subprocess.CalledProcessError:  # already shown, with the end of its log
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
