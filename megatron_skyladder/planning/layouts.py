"""How the paper's models are spread over GPUs: our choice, with the memory it is expected to take.

The paper trained with FSDP; it names no layout that Megatron could take over.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_skyladder.ladder.costs import DecoderShape
from megatron_skyladder.ladder.presets import PAPER_RUNS, PaperRun

GPU_MEMORY_GIB = {"a100-40g": 40, "h100": 80}
GPUS_PER_NODE = 8


@dataclass(frozen=True)
class Layout:
    """How one replica of a model is cut, and how many sequences it takes at a time."""

    micro_batch_size: int
    tensor: int = 1
    context: int = 1

    @property
    def gpus_per_replica(self) -> int:
        """GPUs that hold one copy of the model."""
        return self.tensor * self.context


# No activation recompute anywhere. 1b-32k cuts its rows by four on 40 GB (by two on 80 GB), so that
# a GPU has about as many tokens as at 8K; 3b-8k does not fit on 40 GB in one piece.
LAYOUTS = {
    ("120m-8k", "a100-40g"): Layout(micro_batch_size=4),
    ("120m-8k", "h100"): Layout(micro_batch_size=4),
    ("360m-8k", "a100-40g"): Layout(micro_batch_size=2),
    ("360m-8k", "h100"): Layout(micro_batch_size=4),
    ("1b-8k", "a100-40g"): Layout(micro_batch_size=1),
    ("1b-8k", "h100"): Layout(micro_batch_size=2),
    ("1b-32k", "a100-40g"): Layout(micro_batch_size=1, context=4),
    ("1b-32k", "h100"): Layout(micro_batch_size=1, context=2),
    ("3b-8k", "a100-40g"): Layout(micro_batch_size=1, tensor=2),
    ("3b-8k", "h100"): Layout(micro_batch_size=1),
}


def layout_of(run_name: str, gpu: str) -> Layout:
    """Return the layout of a run of the paper on a kind of GPU.

    Raises:
        ValueError: there is none.
    """
    if (run_name, gpu) not in LAYOUTS:
        raise ValueError(
            f"there is no layout for {run_name} on {gpu}. Known are the runs "
            f"{', '.join(PAPER_RUNS)} on {', '.join(GPU_MEMORY_GIB)}."
        )
    return LAYOUTS[run_name, gpu]


def estimated_gib(run: PaperRun, layout: Layout, num_gpus: int) -> float:
    """Return the memory a GPU needs, by arithmetic; allocator and kernels come on top.

    Bytes in bf16 training with the distributed optimizer and sequence parallelism:

    * per parameter 2 (weight) + 4 (gradient), and 12 (fp32 weight, two moments) over all replicas;
    * per token and layer 12 hidden + 4 key/value + 6 ffn: the inputs of two norms, of the four
      matrices, of the attention and of SwiGLU, each in two bytes;
    * per token 10 vocabulary: logits in bf16, and twice in fp32 inside the loss.
    """
    model = run.model
    shape = DecoderShape.of_paper(model)
    data_parallel = num_gpus // layout.tensor
    parameters = shape.num_parameters / layout.tensor
    tokens = layout.micro_batch_size * run.seq_length / layout.gpus_per_replica
    key_value = shape.num_query_groups * shape.kv_channels
    layer = 12 * model.hidden_size + 4 * key_value + 6 * model.ffn_hidden_size
    activations = tokens * (model.num_layers * layer + 10 * model.vocab_size)
    return (parameters * (6 + 12 / data_parallel) + activations) / 2**30
