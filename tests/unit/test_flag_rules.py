"""The table of Megatron's flags that matter: every row is needed, and says what it has to.

A row is tried in what a user meets: ``skyladder plan`` with the flag, training with Megatron's real
parser, and the attention of a model that was built with it. Then the row is taken out, and the same
has to go wrong: a test that only loops over the table could not see a row that is missing.
"""

from __future__ import annotations

import json
import shlex
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flag_cases import CASES, FITS, Case

from megatron_skyladder.attention import limits
from megatron_skyladder.cli import main
from megatron_skyladder.errors import UsageError
from megatron_skyladder.megatron_lm import flag_names, flag_rules
from megatron_skyladder.testing import ProcessPool, requires_megatron


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPool]:
    """Processes that have Megatron imported."""
    with ProcessPool() as processes:
        yield processes


@pytest.fixture(scope="module")
def found(pool: ProcessPool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What training and attention say to each case, from one process with Megatron in it."""
    folder = tmp_path_factory.mktemp("flags")
    arguments = {"results": str(folder / "found")}
    pool.run("flag_bodies:try_all", num_processes=1, folder=folder, arguments=arguments)
    result: dict[str, Any] = json.loads((folder / "found").read_text())
    return result


def planned(capsys: pytest.CaptureFixture[str], case: Case) -> tuple[bool, str]:
    """Return whether ``skyladder plan`` says that a launch fits, and all that it says."""
    if main(["plan", "--json", *shlex.split(f"{FITS} {case.flags}")]):
        return False, capsys.readouterr().err
    plan = json.loads(capsys.readouterr().out)
    said = " ".join([*plan["verdict"]["change"], *plan["notes"]])
    return plan["verdict"]["fits"], said


def test_every_row_has_a_case_and_every_case_a_row() -> None:
    assert sorted(rule.flag for rule in flag_rules.RULES) == sorted(CASES)


@pytest.mark.parametrize("flag", CASES)
def test_plan_says_it_with_the_row_and_not_without(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    case = CASES[flag]
    fits, said = planned(capsys, case)
    assert fits != case.stops and case.says in said
    left_out = said.partition("Left out, as they change nothing here: ")[2].rstrip(".").split(", ")
    assert "--lr" in left_out and flag not in left_out
    rows = tuple(rule for rule in flag_rules.RULES if rule.flag != flag)
    monkeypatch.setattr(flag_rules, "RULES", rows)
    _, said = planned(capsys, case)
    assert case.says not in said


@pytest.mark.parametrize(
    ("modules", "fits"),
    [
        ("mlp", True),
        ("moe_router moe_preprocess", True),
        ("moe_router,moe_preprocess", True),
        ("attn", False),
        ("mlp attn", False),
        ("full", False),
        ("full_iteration", False),
    ],
)
@pytest.mark.parametrize("impl", ["--cuda-graph-impl local", "--external-cuda-graph"])
@pytest.mark.parametrize("flag", ["--cuda-graph-modules", "--cuda-graph-scope"])
def test_cuda_graphs_without_attention_fit(
    capsys: pytest.CaptureFixture[str], flag: str, impl: str, modules: str, fits: bool
) -> None:
    found, said = planned(capsys, Case(f"{impl} {flag} {modules}", ""))
    assert found == fits
    assert ("would replay the window" in said) != fits


def test_a_model_with_graphs_beside_attention_is_built() -> None:
    """As Megatron's configuration has them: a list of its enumeration, empty for whole layers."""

    def config(*modules: str) -> Namespace:
        members = [Namespace(name=name) for name in modules]
        return Namespace(cuda_graph_impl="local", cuda_graph_modules=members)

    limits.check_model(config("mlp"))
    limits.check_model(config("moe_router", "moe_preprocess"))
    for modules in ((), ("attn",), ("mlp", "attn")):
        with pytest.raises(UsageError, match="--cuda-graph-impl=local cannot be combined"):
            limits.check_model(config(*modules))


@requires_megatron
@pytest.mark.parametrize("flag", [flag for flag in CASES if CASES[flag].parser != "unknown"])
def test_training_says_it_with_the_row_and_not_without(found: dict[str, Any], flag: str) -> None:
    case = CASES[flag]
    training = found[flag]["with"]["training"]
    assert training["starts"] != case.stops
    harmless = flag_rules.Effect.HARMLESS
    quiet = next(rule for rule in flag_rules.RULES if rule.flag == flag).effect is harmless
    assert (case.says in training["says"]) != quiet
    training = found[flag]["without"]["training"]
    assert training["starts"] and case.says not in training["says"]


@requires_megatron
@pytest.mark.parametrize("flag", [flag for flag in CASES if CASES[flag].model])
def test_the_attention_says_it_with_the_row_and_not_without(
    found: dict[str, Any], flag: str
) -> None:
    assert CASES[flag].says in found[flag]["with"]["model"]
    assert found[flag]["without"]["model"] == ""


@requires_megatron
def test_a_real_launch_ends_before_anything_is_built(pool: ProcessPool, tmp_path: Path) -> None:
    """All that has to change is said once, on rank 0, without a traceback."""
    flags = {"flags": "--reset-attention-mask --window-size 8,1 --attention-dropout 0.1"}
    pool.run(
        "flag_bodies:launch", num_processes=1, folder=tmp_path, arguments=flags, exit_codes=(2,)
    )
    log = (tmp_path / "log.0.txt").read_text()
    assert "Traceback" not in log and "building GPT model" not in log
    for flag in ("--reset-attention-mask", "--window-size=8,1", "--attention-dropout=0.1"):
        assert log.count(f"{flag} ") == 1 or f"{flag} (Megatron's default) cannot" in log


@requires_megatron
def test_a_launch_that_fits_meets_no_rule(capsys: pytest.CaptureFixture[str]) -> None:
    assert planned(capsys, Case("", "")) == (True, planned(capsys, Case("", ""))[1])
    assert list(flag_rules.findings(flag_rules.given_values(FITS.split()))) == []


def test_all_that_stops_a_run_is_named_at_once() -> None:
    options = Namespace(attention_dropout=0.1, qk_clip=True, sft=False)
    with pytest.raises(UsageError) as refused:
        flag_rules.check(options)
    first, second = str(refused.value).splitlines()
    assert first.startswith("--attention-dropout=0.1 (Megatron's default) cannot")
    assert second.startswith("--qk-clip cannot be combined with SkyLadder")


@pytest.mark.parametrize(
    ("words", "values"),
    [
        ("--qk-clip --lr 1", {"qk_clip": True}),
        ("--window-size 16,0", {"window_size": "16,0"}),
        ("--window-size=16,0 --window-size 8,0", {"window_size": "8,0"}),
        ("--fp8-format hybrid", {"fp8": "hybrid"}),
        ("--rampup-batch-size 1 2 3 --sft", {"rampup_batch_size": "1 2 3", "sft": True}),
        ("a --lr --qk 1", {}),
    ],
)
def test_flags_of_a_launch(words: str, values: dict[str, Any]) -> None:
    assert flag_rules.given_values(words.split()) == values


@pytest.mark.parametrize(
    "flags",
    [
        "--softmax-type vanilla",
        "--cuda-graph-impl none",
        "--attention-dropout 0.0",
        "--cp-comm-type p2p",
        "--attention-backend auto",
        "--cp-partition-mode zigzag",
    ],
)
def test_values_that_fit(flags: str) -> None:
    words = [*FITS.split(), *flags.split()]
    assert list(flag_rules.findings(flag_rules.given_values(words))) == []


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("*-+-", "+ is multi-latent attention"),
        ("*-D-", "D is sparse attention: its indexer"),
        ("*-M-", "M is a Mamba layer"),
        ("*-G-", "G is a gated delta net"),
        ("*-/*-/*-", "after / are heads of multi-token prediction"),
        ("--", "it has no attention (*) whose window"),
        ("-|-/*-", "it has no attention (*) whose window"),
    ],
)
def test_a_pattern_is_refused_by_symbol(pattern: str, says: str) -> None:
    """Megatron has set two flags by then, for the symbols: nobody has given them."""
    options = Namespace(
        hybrid_layer_pattern=pattern,
        multi_latent_attention="+" in pattern or "D" in pattern,
        mtp_num_layers=pattern.count("/") or None,
    )
    with pytest.raises(UsageError) as refused:
        flag_rules.check(options)
    (line,) = str(refused.value).splitlines()
    assert line.startswith(f"--hybrid-layer-pattern={pattern} cannot be combined") and says in line


@pytest.mark.parametrize("pattern", ["*-*-", "*E|*E", "*-*", None])
def test_patterns_with_attention_alone_fit(pattern: str | None) -> None:
    flag_rules.check(Namespace(hybrid_layer_pattern=pattern))


def test_the_flags_that_a_symbol_sets_are_found_without_it() -> None:
    options = {"multi_latent_attention": True, "mtp_num_layers": 1}
    for pattern, flags in (("*-/*-", {"--multi-latent-attention"}), ("+-", {"--mtp-num-layers"})):
        found = flag_rules.findings({**options, "hybrid_layer_pattern": pattern})
        assert {each.rule.flag for each in found if each.rule.name in options} == flags


def test_flags_that_do_not_arrive_are_refused() -> None:
    """``--yaml-cfg`` replaces the arguments: ours are gone, and training would be stock's."""
    words = ["--skyladder-start-window=8", "--yaml-cfg", "run.yaml"]
    with pytest.raises(UsageError, match="--skyladder-start-window is not among the arguments"):
        flag_rules.check_arrival(Namespace(yaml_cfg=None), words)
    with pytest.raises(UsageError, match="reads no flag from the command line"):
        flag_rules.check_arrival(Namespace(yaml_cfg="run.yaml"), words)
    flag_rules.check_arrival(Namespace(skyladder_start_window=8), words)
    flag_rules.check_arrival(Namespace(), ["--lr", "1"])


@pytest.mark.parametrize(
    "flag",
    [
        *("--intra-doc-masking", "--use-document-attention-mask", "--isolate-docs=true"),
        *("--intradoc", "--attention_per_document", "--no-shuffle --inter-document-masking"),
    ],
)
def test_a_forks_own_mask_of_documents_is_refused_beside_ours(flag: str) -> None:
    words = ["--skyladder-intra-document", "--lr", "1", *flag.split()]
    (found,) = flag_names.other_masks(words)
    said, name = str(found), flag.split()[-1].partition("=")[0]
    assert found.rule.effect.stops and said.startswith(f"{name} cannot be")
    assert "this Megatron's own mask of documents, and --skyladder-intra-document is Sky" in said


def test_other_flags_are_a_forks_own_affair() -> None:
    words = (
        "--skyladder-intra-document --reset-attention-mask --goldfish-loss --mask-doc-loss "
        "--doc-separator 1 --eod-mask-loss --trigger-path docs/attention --docs-per-interval 5 "
        "--document-pointer-file a --docs-interleave --no-intra-doc-masking "
        "--intra-document-mask false --isolate-docs=0 --disable-doc-mask"
    )
    assert flag_names.other_masks(words.split()) == []


@requires_megatron
def test_commands_refuse_two_masks_of_documents(capsys: pytest.CaptureFixture[str]) -> None:
    launch = shlex.split(
        "torchrun pretrain_gpt.py --num-layers 2 --hidden-size 64 --num-attention-heads 2 "
        "--seq-length 64 --global-batch-size 8 --train-iters 10 --vocab-size 100 "
        "--attention-dropout 0 --intra-doc-masking"
    )
    assert main(["plan", *launch]) == 0
    assert "--intra-doc-masking cannot stay" not in capsys.readouterr().out
    for command in ("plan", "doctor"):
        main([command, *launch, "--skyladder-intra-document"])
        assert "Change: --intra-doc-masking cannot stay: it seems to be" in capsys.readouterr().out


# --- names --------------------------------------------------------------------------------------


@requires_megatron
def test_the_table_of_names_is_that_of_megatrons_own_parser(found: dict[str, Any]) -> None:
    table = {flag for flag, lines in flag_names.names_by_release().items() if "0.19" in lines}
    assert table - {"--help"} == set(found["flags"]) - {"--help"}


def test_newer_flags_are_known_by_name() -> None:
    names = flag_names.names_by_release()
    newer = ("--sequence-packing-scheduler", "--use-varlen-dataset", "--dynamic-context-parallel")
    assert all(names[flag] == {"dev"} for flag in newer)


def test_a_forks_own_parser_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where a Megatron can be imported that is none of the wheels, it is asked for its flags."""
    from test_compat import write_megatron

    folder = write_megatron(tmp_path, "0.19.7")
    training = folder / "megatron" / "training"
    (training / "__init__.py").write_text("")
    (training / "arguments.py").write_text(
        "def add_megatron_arguments(parser):\n"
        "    parser.add_argument('--hiden-size')\n    return parser\n"
    )
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setattr(flag_names, "_installed", lambda: flag_names.releases.megatron_in(folder))
    flag_names.flags_of_installed.cache_clear()
    try:
        assert flag_names.unknown(["--hiden-size"]) == []
        (other,) = flag_names.unknown(["--hiden-sizes"], here=True)
        assert other.meant == "--hiden-size" and "0.19.7" in other.asked
        (training / "arguments.py").write_text("raise ImportError('no TE here')\n")
        flag_names.flags_of_installed.cache_clear()
        (other,) = flag_names.unknown(["--hiden-size"])
        assert other.meant == "--hidden-size"
    finally:
        flag_names.flags_of_installed.cache_clear()
