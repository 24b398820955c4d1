"""Packaging. The base install needs only numpy, so that it can go into a container as it is."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
# folders beside the package whose files go into it
BESIDE = {"megatron_skyladder.patches": "patches", "megatron_skyladder.slurm.template": "slurm"}

setup(
    name="megatron-skyladder",
    version="0.1.0",
    description="Context-window scheduling (SkyLadder) for Megatron-LM pretraining",
    long_description=(HERE / "README.md").read_text() if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*find_packages(include=["megatron_skyladder", "megatron_skyladder.*"]), *BESIDE],
    package_dir=BESIDE,
    package_data={
        "megatron_skyladder": ["py.typed"],
        "megatron_skyladder.megatron_lm": ["flag_names.txt"],
        "megatron_skyladder.patches": ["*.ini"],
        "megatron_skyladder.slurm.template": ["*.sbatch"],
    },
    install_requires=["numpy"],
    extras_require={
        # Megatron >= 0.17 needs Python >= 3.12. Leave this out where Megatron is installed already.
        "training": ["megatron-core[training]==0.19.2", "tensorboard"],
        # Kernels for the backends te and flash; both need a CUDA toolkit. apex is not on the index.
        "gpu": ["transformer-engine[pytorch]", "flash-attn"],
        # Reading text: prepare, inspect, the demo. Drawing: plan --plot, report, the demo.
        "data": ["tokenizers>=0.20", "sentencepiece", "pyarrow"],
        "plot": ["matplotlib"],
        # pybind11: checkouts build their dataset helpers with it
        "dev": [
            "pybind11",
            "pytest",
            "pytest-timeout",
            "hypothesis",
            "ruff",
            "mypy",
            "import-linter>=2.17",
        ],
    },
    entry_points={"console_scripts": ["skyladder=megatron_skyladder.cli:main"]},
)
