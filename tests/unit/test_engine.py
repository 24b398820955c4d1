"""The CPU engine: never loaded by accident, and what it turns CUDA calls into."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("torch")
pytest.importorskip("megatron.core")


def run(code, **environment):
    """Run code in a fresh Python without a visible GPU."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "SKYLADDER_DEVICE": "", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_importing_the_package_loads_and_changes_nothing():
    code = """
import sys
import megatron_skyladder, megatron_skyladder.cli
assert not {"torch", "numpy", "megatron"} & set(sys.modules), sorted(sys.modules)
import megatron_skyladder.ladder.config
assert not {"torch", "megatron"} & set(sys.modules), sorted(sys.modules)
"""
    assert run(code).returncode == 0


def test_without_a_gpu_the_error_names_the_variable():
    result = run("from megatron_skyladder.pretrain_gpt import main; main()")
    assert result.returncode == 2
    assert "SKYLADDER_DEVICE=cpu" in result.stderr
    assert "Traceback" not in result.stderr


def test_an_unknown_device_is_refused():
    result = run("from megatron_skyladder.pretrain_gpt import main; main()", SKYLADDER_DEVICE="tpu")
    assert result.returncode == 2
    assert "SKYLADDER_DEVICE=tpu is unknown" in result.stderr


def test_it_does_not_load_where_cuda_is_visible_or_megatron_is_imported():
    code = """
import torch
from megatron_skyladder.cpu import engine as cpu_engine
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 8
try:
    cpu_engine.install()
except ValueError as error:
    assert "sees 8 CUDA device(s)" in str(error), error
else:
    raise AssertionError("installed over a GPU")
torch.cuda.is_available = lambda: False
import megatron.core
try:
    cpu_engine.install()
except ValueError as error:
    assert "before megatron is imported" in str(error), error
else:
    raise AssertionError("installed after megatron")
assert not cpu_engine.is_installed()
"""
    result = run(code, SKYLADDER_DEVICE="cpu")
    assert result.returncode == 0, result.stderr


def test_cuda_calls_land_on_the_cpu():
    code = """
import torch
from megatron_skyladder.cpu import engine as cpu_engine
cpu_engine.install()
cpu_engine.install()
cpu = torch.device("cpu")
for tensor in (
    torch.zeros(2, device="cuda"),
    torch.zeros(2, device=torch.device("cuda", 0)),
    torch.zeros(2, device=torch.cuda.current_device()),
    torch.zeros(2).cuda(non_blocking=True),
    torch.zeros(2).to("cuda"),
    torch.zeros(2, pin_memory=True),
    torch.zeros(2).pin_memory(),
    torch.nn.Linear(2, 2).cuda().weight,
):
    assert tensor.device == cpu
assert torch.zeros(2).to(torch.float64).dtype == torch.float64
assert torch.zeros(2).type() == "torch.cuda.FloatTensor"
assert torch.zeros(2).type(torch.int32).dtype == torch.int32
start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
start.record(); end.record()
assert start.elapsed_time(end) >= 0
state = torch.cuda.get_rng_state()
first = torch.rand(3)
torch.cuda.set_rng_state(state)
assert torch.equal(first, torch.rand(3))
torch.zeros(2).record_stream(torch.cuda.current_stream())
with torch.cuda.stream(torch.cuda.Stream()):
    torch.cuda.current_stream().wait_stream(torch.cuda.Stream())
assert torch.compile(lambda x: x + 1)(1) == 2
assert torch.compile(dynamic=True)(lambda x: x + 1)(1) == 2
"""
    result = run(code, SKYLADDER_DEVICE="cpu")
    assert result.returncode == 0, result.stderr


def test_cuda_calls_land_on_the_cpu_in_nested_backward_passes():
    """As in sequence parallelism under full recompute: a backward inside a backward allocates."""
    code = """
import torch
from megatron_skyladder.cpu import engine as cpu_engine
cpu_engine.install()

class Inner(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, grad):
        return grad + torch.ones(2, device=torch.cuda.current_device())

class Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * 1

    @staticmethod
    def backward(ctx, grad):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = Inner.apply(x)
        torch.autograd.backward((y,), (grad,))
        return x.grad

x = torch.zeros(2, requires_grad=True)
Recompute.apply(x).sum().backward()
assert x.grad.tolist() == [2, 2]
"""
    result = run(code, SKYLADDER_DEVICE="cpu")
    assert result.returncode == 0, result.stderr


def test_bfloat16_products_round_once():
    """Small integers: float32 holds every sum, so one rounding is all that may happen."""
    code = """
import torch
from torch.nn.functional import scaled_dot_product_attention as attend
from megatron_skyladder.cpu import engine as cpu_engine
cpu_engine.install()
torch.manual_seed(1)

def whole(*shape):
    return torch.randint(-8, 9, shape).float()

def check(function, *wide):
    narrow = function(*(tensor.bfloat16() for tensor in wide))
    assert narrow.dtype == torch.bfloat16
    assert torch.equal(narrow, function(*wide).bfloat16()), function

a, b, c = whole(33, 65), whole(65, 17), whole(33, 17)
check(torch.mm, a, b)
check(lambda a, b: a.t() @ b, a, c)
check(lambda a, b: torch.mm(input=a, mat2=b), a, b)
check(lambda a, b, c: torch.addmm(c, a, b, beta=2, alpha=3), a, b, c)
check(lambda a, b, c: torch.addmm(c[0], a, b), a, b, c)
a, b, c = whole(5, 33, 65), whole(5, 65, 17), whole(5, 33, 17)
check(torch.bmm, a, b)
check(lambda a, b, c: torch.baddbmm(c, a, b, beta=0.0, alpha=0.5), a, b, c)

def gradients(dtype, mask):
    torch.manual_seed(2)
    leaves = [torch.randn(2, 3, 70, 16).to(dtype).requires_grad_() for _ in range(3)]
    torch.manual_seed(3)
    ahead = torch.randn(2, 3, 70, 16).to(dtype)
    attend(*leaves, attn_mask=mask, is_causal=mask is None).backward(ahead)
    return [leaf.grad for leaf in leaves]

for mask in (None, torch.ones(70, 70, dtype=torch.bool).tril().triu(-9)):
    for narrow, wide in zip(gradients(torch.bfloat16, mask), gradients(torch.float32, mask)):
        assert narrow.dtype == torch.bfloat16
        assert (narrow - wide).abs().max() < 0.03 * wide.abs().max()

try:
    torch.mm(torch.ones(2, 2), torch.ones(2, 2).bfloat16())
except RuntimeError as error:
    assert "dtype" in str(error), error
else:
    raise AssertionError("a mixture of types was multiplied")
"""
    result = run(code)
    assert result.returncode == 0, result.stderr
