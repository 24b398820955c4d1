"""Where the packages lie; everything else is in pyproject.toml.

Two of them are folders beside the package, which a table in pyproject.toml cannot say together with
a search for the others.
"""

from setuptools import find_packages, setup

BESIDE = {"megatron_skyladder.patches": "patches", "megatron_skyladder.slurm.template": "slurm"}

setup(
    packages=[*find_packages(include=["megatron_skyladder", "megatron_skyladder.*"]), *BESIDE],
    package_dir=BESIDE,
)
