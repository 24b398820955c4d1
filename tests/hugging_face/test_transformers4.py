"""transformers 4 computes and encodes what transformers 5 does, from the same folder.

``make test-evaluate`` unpacks one into a folder of its own and names it in the environment.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import prepare_inputs as tiny
import pytest
import torch
from random_models import LLAMA, write_model

from megatron_skyladder.hugging_face import checking, tokenizer
from megatron_skyladder.hugging_face.architecture import Architecture, Rope, Yarn
from megatron_skyladder.hugging_face.exporting import export
from megatron_skyladder.hugging_face.importing import import_model

FOLDER = Path(os.environ.get("SKYLADDER_TRANSFORMERS4") or "nowhere").resolve()
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="make test-evaluate runs these")

KINDS = {
    "llama, base 1e6": {"rope": Rope(1_000_000)},
    "llama, linear, tied": {"rope": Rope(10_000, "linear", 4.0), "tied": True},
    "qwen2, llama3": {"rope": Rope(500_000, "llama3", 8.0), "qkv_bias": True, "head_dim": 12},
    "llama, yarn": {"rope": Rope(50_000, "yarn", 2.5, Yarn(300, 8.0, 2.0, False, 1.3))},
    "qwen3, bias": {
        "rope": Rope(1_000_000),
        "qkv_bias": True,
        "output_bias": True,
        "qk_norm": True,
        "head_dim": 12,
    },
}
SCRIPT = """
import json, sys, torch, transformers
from pathlib import Path
assert transformers.__version__.startswith("4."), transformers.__version__
folder = Path(sys.argv[1])
texts = json.loads((folder / "texts.json").read_text())
for model in sorted(folder.glob("out-*")):
    network = transformers.AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        logits = network(torch.load(folder / "tokens.pt")).logits
    torch.save(logits, model / "logits4.pt")
    words = transformers.AutoTokenizer.from_pretrained(model, model_max_length=10**9)
    facts = {"ids": [words(text).input_ids for text in texts], "eos": words.eos_token_id}
    facts["generation"] = network.generation_config.eos_token_id
    (model / "facts4.json").write_text(json.dumps(facts))
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder ``out-0``, ``out-1``, ... for each kind; what version 4 makes of it lies within."""
    folder = tmp_path_factory.mktemp("exported")
    model = tiny.make_sentencepiece(folder / "tokenizer.model", normalization_rule_name="identity")
    hf = tiny.make_hf_folder(folder / "words", bos=True, bos_token="<s>")
    for number, changes in enumerate(KINDS.values()):
        source = write_model(folder / f"hf-{number}", Architecture(**{**vars(LLAMA), **changes}))
        checkpoint = import_model(source, folder / f"megatron-{number}").folder
        flags = {"tokenizer_type": "Llama2Tokenizer", "tokenizer_model": str(model)}
        if number % 2:
            flags = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(hf)}
        export(checkpoint, folder / f"out-{number}", tokenizer=Namespace(**flags), vocab_size=330)
    (folder / "texts.json").write_text(json.dumps(tokenizer.sample_texts()))
    torch.save(
        checking.sample_tokens({"max_position_embeddings": 64, "vocab_size": 330}),
        folder / "tokens.pt",
    )
    environment = {**os.environ, "PYTHONPATH": str(FOLDER), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", KINDS)
def test_logits_and_ids_are_the_same(exported: Path, name: str) -> None:
    import transformers

    assert not transformers.__version__.startswith("4.")
    model = exported / f"out-{list(KINDS).index(name)}"
    tokens = torch.load(exported / "tokens.pt", weights_only=True)
    older = torch.load(model / "logits4.pt", weights_only=True)
    newer = checking.hugging_face_logits(model, tokens)
    assert checking.difference(newer, older).difference < 1e-5
    facts = json.loads((model / "facts4.json").read_text())
    words = transformers.AutoTokenizer.from_pretrained(model, model_max_length=10**9)
    texts = json.loads((exported / "texts.json").read_text())
    assert facts["ids"] == [words(text).input_ids for text in texts]
    assert facts["eos"] == facts["generation"] == words.eos_token_id
