"""Our entry point takes all that Megatron's own script takes, or refuses it: by name, by release.

The tables are in `stock_script`; a name that is in a script and in none of them is a flag that the
entry point would accept and drop.
"""

import ast
import dataclasses
import inspect
from types import SimpleNamespace

import pytest
import stock_script
from launches import REPOSITORY

from megatron_skyladder import pretrain_gpt
from megatron_skyladder.megatron_lm import flag_rules
from megatron_skyladder.testing import requires_megatron

PACKAGE = REPOSITORY / "megatron_skyladder"
OURS = [PACKAGE / "pretrain_gpt.py"] + [
    PACKAGE / "megatron_lm" / name for name in ("batches.py", "compat.py", "launch.py", "spec.py")
]

pytestmark = requires_megatron


def read_by_us():
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

    from megatron_skyladder.megatron_lm.compat import RENAMED_FIELDS

    read = set().union(*(stock_script.names_read(path, "options") for path in OURS))
    fields = {field.name for field in dataclasses.fields(GPTDatasetConfig)}
    return read | {RENAMED_FIELDS.get(field, field) for field in fields}


@pytest.mark.parametrize("line", stock_script.READ)
def test_every_argument_of_the_script_has_its_effect_or_is_refused(line):
    partners = tuple(stock_script.ONLY_WITH.values())
    dropped = {
        name
        for name in stock_script.READ[line] - read_by_us()
        if name not in stock_script.REFUSED | stock_script.OTHERWISE.keys()
        and not name.startswith(partners)
    }
    assert not dropped


def test_what_is_refused_is_in_a_table_that_refuses():
    from megatron_skyladder.megatron_lm import spec

    refused = {rule.name for rule in flag_rules.RULES if rule.entry_point_always}
    refused |= {*spec.NOT_BUILT, "record_memory_history"}  # up to 0.18
    assert refused >= stock_script.REFUSED
    assert stock_script.ONLY_WITH.keys() <= stock_script.REFUSED


def parameters(function):
    return tuple(inspect.signature(function).parameters)


def test_signatures():
    from megatron_skyladder.megatron_lm import launch

    wanted = stock_script.SIGNATURES
    assert parameters(pretrain_gpt.forward_step) == wanted["forward_step"]
    assert parameters(launch.embedding_ranks) == wanted["get_embedding_ranks"]
    assert parameters(launch.gpt_model) == stock_script.MODEL_PROVIDER[1:]  # not the builder
    for function, name in (  # called by position: what counts is how many, and the last ones' names
        (pretrain_gpt.loss_func, "loss_func"),
        (pretrain_gpt.datasets_provider, "train_valid_test_datasets_provider"),
    ):
        assert len(parameters(function)) == len(wanted[name])
        assert parameters(function)[-1] == wanted[name][-1]


def test_keywords():
    launch = PACKAGE / "megatron_lm" / "launch.py"
    passed = stock_script.keywords(launch, "GPTModel")
    assert passed == stock_script.GPT_MODEL_KEYWORDS - {"mtp_block_spec"}  # with a flag we refuse
    tree = ast.parse(launch.read_text())
    names = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    assert names >= stock_script.PRETRAIN_KEYWORDS


def test_what_only_the_script_records_is_refused(monkeypatch):
    from megatron_skyladder.megatron_lm import launch

    options = SimpleNamespace(record_memory_history=True)
    monkeypatch.setattr(launch.compat, "args", lambda: options)
    with pytest.raises(ValueError, match="--record-memory-history has no effect in SkyLadder's"):
        launch.gpt_model()


def test_embedding_ranks(monkeypatch):
    from megatron_skyladder.megatron_lm import launch

    for untied, ranks in ((True, [4]), (False, [4, 12])):
        options = SimpleNamespace(untie_embeddings_and_output_weights=untied, mtp_num_layers=None)
        monkeypatch.setattr(launch.compat, "args", lambda options=options: options)
        assert launch.embedding_ranks([4, 8, 12]) == ranks
        assert launch.embedding_ranks([4]) == [4]
