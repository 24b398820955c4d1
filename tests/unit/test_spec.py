"""How the attention enters a model's spec, and how ``--spec`` is set up from the environment."""

import argparse
import dataclasses
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_skyladder.megatron_lm import from_environment
from megatron_skyladder.testing import requires_megatron


@dataclasses.dataclass
class Part:
    """A node of a spec, as Megatron's dataclasses are."""

    module: object = None
    submodules: object = None


@dataclasses.dataclass
class Attention:
    """The parts of a self-attention."""

    core_attention: object = None
    linear: object = None


# --- with_skyladder ----------------------------------------------------------------------------


@requires_megatron
def test_core_attention_is_replaced_wherever_it_is_and_nothing_else():
    from megatron_skyladder.attention.core_attention import SkyLadderAttention
    from megatron_skyladder.layer_specs import with_skyladder

    inner = Attention(core_attention="stock", linear="linear")
    spec = Part(module="block", submodules=[Part(submodules={"a": inner}), (Part(module="mlp"),)])
    replaced = with_skyladder(spec)
    attention = replaced.submodules[0].submodules["a"]
    assert attention == Attention(SkyLadderAttention, "linear")
    assert replaced.submodules[1] == (Part(module="mlp"),) and replaced.module == "block"
    assert inner.core_attention == "stock"  # specs are shared between models: a copy is changed


@requires_megatron
def test_a_partial_and_a_function_that_makes_the_spec():
    from megatron_skyladder.attention.core_attention import SkyLadderAttention
    from megatron_skyladder.layer_specs import with_skyladder

    spec = Part(submodules=partial(Attention, core_attention="stock"))
    assert with_skyladder(spec).submodules.keywords == {"core_attention": SkyLadderAttention}
    made = with_skyladder(lambda config, vp_stage: Attention(1, linear=(config, vp_stage)))
    assert made("c", vp_stage=1) == Attention(SkyLadderAttention, linear=("c", 1))


@requires_megatron
def test_a_spec_without_attention_is_refused():
    from megatron_skyladder.layer_specs import with_skyladder

    with pytest.raises(ValueError, match=r"no core_attention was found in the layer spec Part\("):
        with_skyladder(Part(module="mamba"))


@requires_megatron
def test_megatrons_own_specs_get_ours_in_every_layer():
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from megatron_skyladder.attention.core_attention import SkyLadderAttention
    from megatron_skyladder.layer_specs import with_skyladder

    stock = get_gpt_layer_local_spec(normalization="RMSNorm")
    ours = with_skyladder(stock)
    attention = ours.submodules.self_attention
    attention = attention.keywords if isinstance(attention, partial) else vars(attention)
    assert attention["submodules"].core_attention is SkyLadderAttention
    assert ours.submodules.mlp == stock.submodules.mlp


@requires_megatron
@pytest.mark.parametrize(
    "flag", ["heterogeneous_layers_config_path", "experimental_attention_variant"]
)
def test_layers_our_model_provider_does_not_build(flag):
    from megatron_skyladder.megatron_lm.spec import gpt_layer_spec

    with pytest.raises(ValueError, match=f"--{flag.replace('_', '-')} is not built by SkyLadder"):
        gpt_layer_spec(SimpleNamespace(spec=None, **{flag: "x"}), None)


# --- --spec ------------------------------------------------------------------------------------


@requires_megatron
def test_megatron_finds_the_lazy_name_and_no_other():
    program = (
        "from megatron.core.transformer.spec_utils import import_module\n"
        "from megatron_skyladder import layer_specs\n"
        "layer_specs.spec_from_environment = lambda: 'made'\n"
        "assert 'skyladder' not in vars(layer_specs)\n"
        "print(import_module(('megatron_skyladder.layer_specs', 'skyladder')))\n"
        "try:\n"
        "    import_module(('megatron_skyladder.layer_specs', 'sky'))\n"
        "except KeyError as error:\n"
        "    print(error)\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["made", "'sky'"]


@requires_megatron
def test_a_mixture_of_experts_is_refused(monkeypatch):
    import megatron.training

    from megatron_skyladder.megatron_lm import spec

    monkeypatch.setattr(megatron.training, "get_args", lambda: SimpleNamespace(num_experts=8))
    with pytest.raises(ValueError, match="builds dense models, not --num-experts=8"):
        spec.spec_from_environment()


def given(**environment):
    """Return the flags that an environment sets, without the rest."""
    flags = vars(from_environment.flags({f"SKYLADDER_{k}": v for k, v in environment.items()}))
    return {name.removeprefix("skyladder_"): v for name, v in flags.items() if v is not None}


def test_flags_from_variables():
    assert given() == {}
    assert given(START_WINDOW="8", SCHEDULE="sinusoidal", DEVICE="cpu") == {
        "start_window": 8,
        "schedule": "sinusoidal",
    }
    assert given(NO_PROBE="1", ALLOW_UNFINISHED="0") == {"no_probe": True}
    assert given(STAGES="128:0.5 2048:0.5")["stages"] == ["128:0.5", "2048:0.5"]


def test_flags_from_a_file_and_a_variable_that_overrides_it(tmp_path):
    path = tmp_path / "flags.txt"
    path.write_text("# the ladder\n--skyladder-start-window 8\n--skyladder-alpha 1/8  # rate\n")
    assert given(CONFIG=str(path))["start_window"] == 8
    both = given(CONFIG=str(path), START_WINDOW="16")
    assert both["start_window"] == 16 and both["alpha"] == "1/8"


def test_a_variable_that_is_no_flag_is_pointed_out(caplog):
    given(STRT_WINDOW="8", TRACEBACK="1", RUN_DIR="/run", ATTEMPT_DIR="/run/1", MEASURED="a.json")
    assert [record.getMessage() for record in caplog.records] == [
        "SKYLADDER_STRT_WINDOW is set, but there is no such flag; it has no effect."
    ]


def test_no_variable_that_is_read_is_called_without_effect(caplog):
    package = Path(from_environment.__file__).parents[1]
    texts = [path.read_text() for path in package.rglob("*.py")]
    read = {name for text in texts for name in re.findall(r'"SKYLADDER_([A-Z_]+)"', text)}
    assert {"DEVICE", "MEASURED", "RUN_DIR"} < read
    flags = {name.removeprefix("skyladder_").upper() for name in vars(from_environment.flags({}))}
    given(**dict.fromkeys(read - flags - {"CONFIG"}, "1"))
    assert not caplog.messages


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"START_WINDOW": "eight"}, r"--skyladder-start-window: 'eight' is not a whole number"),
        ({"NO_PROBE": "perhaps"}, r"SKYLADDER_NO_PROBE=perhaps: set it to 1"),
        ({"CONFIG": "/nowhere.txt"}, r"SKYLADDER_CONFIG=/nowhere.txt cannot be read"),
    ],
)
def test_wrong_settings(environment, message):
    with pytest.raises(ValueError, match=message):
        given(**environment)


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "flags.txt"
    path.write_text("\ufeff--skyladder-start-window 8\n", encoding="utf-8")
    assert given(CONFIG=str(path))["start_window"] == 8


def test_a_file_with_an_unknown_flag(tmp_path):
    path = tmp_path / "flags.txt"
    path.write_text("--skyladder-strt-window 8\n")
    with pytest.raises(ValueError, match="unrecognized arguments: --skyladder-strt-window 8"):
        given(CONFIG=str(path))


class Recorder:
    """Stands in for the hooks: remembers what was installed."""

    FINGERPRINT = "skyladder_fingerprint"

    def __init__(self):
        self.installed = []

    def install(self, config, options):
        self.installed.append(config)


@pytest.fixture
def recorder(monkeypatch):
    from megatron_skyladder import megatron_lm

    recorder = Recorder()
    monkeypatch.setitem(sys.modules, "megatron_skyladder.megatron_lm.hooks", recorder)
    monkeypatch.setattr(megatron_lm, "hooks", recorder, raising=False)
    monkeypatch.setattr(from_environment, "log_to_console", lambda: None)  # caplog listens instead
    for name in list(from_environment.os.environ):
        if name.startswith("SKYLADDER_"):
            monkeypatch.delenv(name)
    return recorder


def options(**more):
    base = {"seq_length": 128, "global_batch_size": 8, "train_iters": 100, "train_samples": None}
    return argparse.Namespace(**{**base, **more})


def test_naming_the_spec_is_asking_for_the_ladder_and_warns_about_documents(recorder, caplog):
    from_environment.switch_on(options())
    (config,) = recorder.installed
    assert config.schedule.describe().startswith("linear 32 -> 128, fraction 0.64 of 100 steps")
    assert "documents are not masked: --spec brings the window alone" in caplog.text


def test_masking_documents_through_spec_is_refused(recorder, monkeypatch):
    monkeypatch.setenv("SKYLADDER_INTRA_DOCUMENT", "1")
    with pytest.raises(ValueError, match="documents cannot be masked through --spec alone"):
        from_environment.switch_on(options())
    assert not recorder.installed


def test_flags_of_a_patched_script_win(recorder, monkeypatch):
    monkeypatch.setenv("SKYLADDER_START_WINDOW", "8")
    from_environment.switch_on(options(skyladder_fingerprint="linear"))
    assert not recorder.installed
