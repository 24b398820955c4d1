"""Peak rates of GPUs, from their vendors' data sheets: dense, without structured sparsity.

Where a sheet prints the figure "with sparsity", half of it stands here. Figures of a whole board or
rack are divided by its GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_skyladder.terminal import table


@dataclass(frozen=True)
class Device:
    """One GPU.

    Args:
        bf16: peak TFLOP/s of bf16 matrix products.
        fp8: the same in FP8, or None where it has none.
        memory_gb: of the GPU.
        source: the sheet that the figures stand in.
    """

    bf16: float
    fp8: float | None
    memory_gb: int
    source: str


_A100 = "NVIDIA A100 Tensor Core GPU data sheet"
_H100 = "NVIDIA H100 Tensor Core GPU data sheet"
DEVICES = {
    "a100-40g": Device(312.0, None, 40, _A100),
    "a100-80g": Device(312.0, None, 80, _A100),
    "h100": Device(989.0, 1979.0, 80, f"{_H100}, SXM"),
    "h100-pcie": Device(756.0, 1513.0, 80, f"{_H100}, PCIe"),
    "h200": Device(989.0, 1979.0, 141, "NVIDIA H200 Tensor Core GPU data sheet, SXM"),
    "gh200": Device(989.0, 1979.0, 96, "NVIDIA GH200 Grace Hopper Superchip data sheet"),
    "b200": Device(2250.0, 4500.0, 180, "NVIDIA HGX B200 data sheet, 8 GPUs"),
    "gb200": Device(2500.0, 5000.0, 186, "NVIDIA GB200 NVL72 data sheet, 72 GPUs"),
    "l40s": Device(362.0, 733.0, 48, "NVIDIA L40S data sheet"),
    "mi300x": Device(1307.0, 2615.0, 192, "AMD Instinct MI300X data sheet"),
}


def device(name: str) -> Device:
    """Return a device by name.

    Raises:
        ValueError: it is not in the table.
    """
    found = DEVICES.get(name.lower())
    if found is None:
        raise ValueError(
            f"--device {name} is unknown. Known are {', '.join(DEVICES)} (skyladder plan "
            "--list-devices); for any other give the achieved rate: --tflops RATE."
        )
    return found


def list_devices() -> str:
    """Return the table as text."""
    rows = [["device", "bf16", "fp8", "GB", "peak dense TFLOP/s, from"]]
    for name, each in DEVICES.items():
        fp8 = "-" if each.fp8 is None else f"{each.fp8:g}"
        rows.append([name, f"{each.bf16:g}", fp8, str(each.memory_gb), each.source])
    return f"{table(rows, left=(0, 4))}\nany other: --tflops RATE, as Megatron's log prints it"
