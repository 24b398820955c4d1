"""One fork server with Bridge imported, one set of weights and data, for all tests here.

`make test-bridge` runs this folder in an environment of its own (build_bridge.py); in any other
nothing is collected.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import build_bridge
import pytest
from bridge_runs import BridgeRuns, new_pool

if not Path(sys.prefix, build_bridge.STAMP).exists():
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BridgeRuns]:
    """Starts runs of Bridge and of the entry point, from the same weights."""
    folder = tmp_path_factory.mktemp("bridge")
    with pytest.MonkeyPatch.context() as environment:
        # read when the fork server imports transformers
        environment.setenv("HF_HOME", str(tiny_llama_cache(folder / "hugging-face")))
        environment.setenv("HF_HUB_OFFLINE", "1")
        with new_pool() as pool:
            yield BridgeRuns(pool, folder)


def tiny_llama_cache(folder: Path) -> Path:
    """Write a cache in which the (gated) Llama 3.2 1B has four small layers."""
    model = folder / "hub" / "models--meta-llama--Llama-3.2-1B"
    snapshot = model / "snapshots" / "0000"
    snapshot.mkdir(parents=True)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("0000")
    (snapshot / "config.json").write_text(json.dumps(TINY_LLAMA))
    return folder


TINY_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
