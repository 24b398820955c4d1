"""The document mask on its way from the tensor-parallel rank that reads the row to the others."""

from pathlib import Path

from megatron_skyladder.testing import ProcessPool, requires_megatron

pytestmark = requires_megatron


def test_offsets_of_any_number_reach_every_rank(pool: ProcessPool, tmp_path: Path) -> None:
    pool.run("batch_bodies:send_offsets", num_processes=3, folder=tmp_path)
