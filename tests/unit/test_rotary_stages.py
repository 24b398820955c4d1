"""Base and factor of a stage reach Megatron's modules: in its first forward pass, only then."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_skyladder.errors import UsageError
from megatron_skyladder.ladder import clock
from megatron_skyladder.ladder.config import SkyLadderConfig
from megatron_skyladder.ladder.schedules import WindowSchedule
from megatron_skyladder.ladder.sequence_layout import Kind
from megatron_skyladder.testing import requires_megatron

pytestmark = requires_megatron

LENGTH = 48
STAGES = "48:0.25 48:0.5,rope=20000 48:0.25,rope=500000"  # of 8 steps
BASES = {0: 10_000, 1: 10_000, 2: 20_000, 5: 20_000, 6: 500_000, 9: 500_000}


class Now:
    """The trainer's consumed samples."""

    samples = 0


def clock_of(stages: str) -> Iterator[Now]:
    """Let the clock follow these stages."""
    schedule = WindowSchedule("staged", final_window=LENGTH, stages=stages, total_steps=8)
    current = Now()
    clock.install(SkyLadderConfig(schedule, LENGTH, step_samples=1), lambda: current.samples)
    yield current
    clock.uninstall()


@pytest.fixture
def now() -> Iterator[Now]:
    yield from clock_of(STAGES)


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns Megatron's plain module of a base."""
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")

    def rotary(base: int = 10_000, **options: Any) -> Any:
        return RotaryEmbedding(16, 0.5, rotary_base=base, **options)  # half of each head turns

    return rotary


class Model(torch.nn.Module):
    """What is asked of a GPTModel: its rotary embedding, its configuration, its attentions."""

    def __init__(self, rotary: Any, concentration: float | None = None, **config: Any) -> None:
        super().__init__()
        self.rotary_pos_emb = rotary
        self.config = SimpleNamespace(**config)
        self.layers = torch.nn.ModuleList(torch.nn.Module() for _ in range(2))
        if concentration is not None:
            for layer in self.layers:
                layer._yarn_concentration_factor = concentration

    def forward(self, *_: Any) -> Any:
        return self.rotary_pos_emb(LENGTH, packed_seq=False)


def follow(model: Any, base: int = 10_000, moves: str = "rope") -> Any:
    """Let a model or a rotary embedding follow the stages; returns it."""
    from megatron_skyladder.attention.rotary_stages import follow_stages

    follow_stages(model if isinstance(model, Model) else Model(model), base, set(moves.split()))
    return model


@pytest.mark.parametrize("options", [{}, {"seq_len_interpolation_factor": 4.0}], ids=str)
def test_it_is_the_module_of_that_base(now: Now, make: Any, options: dict[str, Any]) -> None:
    rotary = follow(make(**options))
    for now.samples, base in BASES.items():
        for _ in range(2):
            assert torch.equal(rotary(LENGTH), make(base, **options)(LENGTH)), now.samples
        assert torch.equal(rotary.inv_freq, make(base).inv_freq)


def test_nothing_is_made_within_a_stage(now: Now, make: Any) -> None:
    rotary = follow(make())
    kept: dict[int, set[int]] = {}
    for now.samples, base in BASES.items():
        kept.setdefault(base, set()).update({id(rotary(LENGTH)), id(rotary.inv_freq)})
    assert [len(each) for each in kept.values()] == [2, 2, 2]  # an embedding and its frequencies


def test_evaluation_and_what_is_run_again(now: Now, make: Any) -> None:
    """A batch of an earlier stage (a replay, the probe) has its own base again."""
    rotary = follow(make())
    for samples, training, base in (
        (6, True, 500_000),
        (2, True, 20_000),
        (2, False, 10_000),  # the batch before it was the first stage's
        (3, False, 20_000),
        (0, True, 10_000),
    ):
        now.samples = samples
        rotary.train(training)
        assert torch.equal(rotary(LENGTH), make(base)(LENGTH)), (samples, training)


def test_the_positions_of_a_layout_have_the_base(now: Now, make: Any) -> None:
    """Under context parallelism the embedding is made behind Megatron's cache, and kept as well."""
    from megatron_skyladder.attention.rotary import RotaryPositions

    group = SimpleNamespace(size=lambda: 2, rank=lambda: 1)
    clock.current().layout_kind = Kind.WINDOW

    model = Model(follow(make()))
    RotaryPositions(model, group, checks_ids=False)
    clock.current().config = clock.current().config
    with clock.current().override(12):  # windows of 12 tokens: no zigzag
        rule = clock.current().layout_rule(LENGTH, 2, training=True)
        (layout,) = rule.layouts(1)
        assert not layout.is_zigzag
        positions = torch.from_numpy(layout.positions(1))
        for now.samples, base in BASES.items():
            found = model(None, None, None)
            assert torch.equal(found[:, 0, 0], make(base)(LENGTH)[positions, 0, 0])


# --- YaRN ---------------------------------------------------------------------------------------

YARN_STAGES = "48:0.25 48:0.25,yarn=4,rope=20000 48:0.25,yarn=1 48:rest,yarn=32.5,rope=500000"
OWN = 10_000, 2.0
YARN = {0: OWN, 1: OWN, 2: (20_000, 4.0), 4: (20_000, 1.0), 5: (20_000, 1.0), 6: (500_000, 32.5)}
KINDS: list[dict[str, Any]] = [
    {},
    {"mscale": 0.7, "mscale_all_dim": 0.3, "beta_fast": 16.0, "beta_slow": 2.0},
    {"correction_range_round_to_int": False, "original_max_position_embeddings": 300},
    {"use_cpu_initialization": True, "rotary_percent": 0.5},
]


@pytest.fixture
def yarn_now() -> Iterator[Now]:
    yield from clock_of(YARN_STAGES)


@pytest.fixture
def make_yarn(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns what Megatron builds of a base and a factor: a module, and its attentions' factor."""
    from megatron.core.models.common.embeddings import yarn_rotary_pos_embedding as yarn

    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")

    def model(base: int = OWN[0], factor: float = OWN[1], **options: Any) -> Any:
        rotary = yarn.YarnRotaryEmbedding(16, rotary_base=base, scaling_factor=factor, **options)
        config = {
            "yarn_rotary_scaling_factor": factor,
            "yarn_mscale": options.get("mscale", 1.0),
            "yarn_mscale_all_dim": options.get("mscale_all_dim", 0.0),
        }
        of_config = yarn._yarn_get_concentration_factor_from_config(SimpleNamespace(**config))
        return Model(rotary, of_config, **config)

    return model


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_yarn_is_the_module_of_that_base_and_factor(
    yarn_now: Now, make_yarn: Any, options: dict[str, Any]
) -> None:
    """Bit for bit what Megatron builds anew, its caches and its attentions' factor included."""
    anew = {values: make_yarn(*values, **options) for values in YARN.values()}  # clears a cache
    model = follow(make_yarn(**options), moves="rope yarn")
    rotary = model.rotary_pos_emb
    concentrations = set()
    for yarn_now.samples, values in YARN.items():
        for _ in range(2):
            angles, concentration = model()
        fresh = anew[values]
        expected, of_module = fresh()
        assert torch.equal(angles, expected), yarn_now.samples
        assert [layer._yarn_concentration_factor for layer in (*model.layers, *fresh.layers)] == [
            concentration
        ] * 4
        assert concentration == of_module
        for name in ("inv_freq", "inv_freq_extra", "inv_freq_inter"):
            assert torch.equal(getattr(rotary, name), getattr(fresh.rotary_pos_emb, name)), name
        for mine, of_fresh in zip(
            rotary.get_cached_cos_sin(LENGTH),
            fresh.rotary_pos_emb.get_cached_cos_sin(LENGTH),
            strict=True,
        ):
            assert torch.equal(mine, of_fresh)
        concentrations.add(concentration)
    assert len(concentrations) == 4


def test_a_factor_of_one_is_plain_rope(yarn_now: Now, make_yarn: Any, make: Any) -> None:
    """To rounding: Megatron takes a mean of two equal frequencies."""
    model = follow(make_yarn(), moves="rope yarn")
    yarn_now.samples = 4
    angles, concentration = model()
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    torch.testing.assert_close(angles, RotaryEmbedding(16, 1.0, rotary_base=20_000)(LENGTH))
    assert concentration == 1.0
    assert all(layer._yarn_concentration_factor == 1.0 for layer in model.layers)


def test_nothing_of_yarn_is_made_within_a_stage(yarn_now: Now, make_yarn: Any) -> None:
    model = follow(make_yarn(), moves="rope yarn")
    kept: dict[Any, set[int]] = {}
    alive = []
    for yarn_now.samples, values in YARN.items():
        alive += [model()[0], model.rotary_pos_emb.inv_freq_inter]
        kept.setdefault(values, set()).update(map(id, alive[-2:]))
    assert [len(each) for each in kept.values()] == [2, 2, 2, 2]


def test_evaluation_of_yarn_and_what_is_run_again(yarn_now: Now, make_yarn: Any) -> None:
    anew = {values: make_yarn(*values)() for values in YARN.values()}
    model = follow(make_yarn(), moves="rope yarn")
    for samples, training, values in (
        (6, True, (500_000, 32.5)),
        (2, True, (20_000, 4.0)),
        (2, False, OWN),  # the batch before it was the first stage's
        (3, False, (20_000, 4.0)),
        (0, True, OWN),
    ):
        yarn_now.samples = samples
        model.train(training)
        angles, concentration = model()
        expected, of_module = anew[values]
        assert torch.equal(angles, expected) and concentration == of_module, (samples, training)


def test_the_positions_of_a_layout_have_the_factor(yarn_now: Now, make_yarn: Any) -> None:
    from megatron_skyladder.attention.rotary import RotaryPositions

    group = SimpleNamespace(size=lambda: 2, rank=lambda: 1)
    clock.current().layout_kind = Kind.WINDOW
    anew = {values: make_yarn(*values)() for values in YARN.values()}
    model = follow(make_yarn(), moves="rope yarn")
    RotaryPositions(model, group, checks_ids=False)
    with clock.current().override(12):
        (layout,) = clock.current().layout_rule(LENGTH, 2, training=True).layouts(1)
        positions = torch.from_numpy(layout.positions(1))
        for yarn_now.samples, values in YARN.items():
            angles, concentration = model(None, None, None)
            expected, of_module = anew[values]
            assert torch.equal(angles[:, 0, 0], expected[positions, 0, 0])
            assert concentration == of_module


def test_a_base_alone_moves_under_yarn(now: Now, make_yarn: Any) -> None:
    anew = {base: make_yarn(base)()[0] for base in BASES.values()}
    model = follow(make_yarn())
    for now.samples, base in BASES.items():
        assert torch.equal(model()[0], anew[base]), now.samples


# --- what is refused ------------------------------------------------------------------------------


def test_other_frequencies_are_refused(now: Now, make: Any, make_yarn: Any) -> None:
    with pytest.raises(UsageError, match="are not what its base of 10000 makes of them: it has --"):
        follow(make(rope_scaling=True))
    with pytest.raises(UsageError, match="are not what its base of 30000 makes"):
        follow(make(), 30_000)
    with pytest.raises(UsageError, match="are not what its base of 30000 makes"):
        follow(make_yarn(), 30_000)
    model = make_yarn()
    model.rotary_pos_emb.inv_freq_inter = model.rotary_pos_emb.inv_freq_inter * 2
    with pytest.raises(UsageError, match="are not what its base of 10000 makes"):
        follow(model, moves="yarn")
    model = make_yarn()
    model.layers[1]._yarn_concentration_factor = 1.5
    with pytest.raises(UsageError, match="are not what its base of 10000 makes"):
        follow(model, moves="yarn")


def test_other_modules_are_refused(now: Now, make: Any, make_yarn: Any) -> None:
    with pytest.raises(UsageError, match="has RotaryEmbedding where YaRN's is needed"):
        follow(make(), moves="rope yarn")
    with pytest.raises(UsageError, match="this model has none where a plain one or YaRN's is need"):
        follow(None)
    model = make_yarn()
    model.config.multi_latent_attention = True
    with pytest.raises(UsageError, match="YarnRotaryEmbedding under multi-latent attention where"):
        follow(model, moves="yarn")


def test_releases_that_make_embeddings_in_one_function(
    now: Now, make: Any, make_yarn: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to 0.15: a plain base moves there as well."""
    from megatron.core.models.common.embeddings import rotary_pos_embedding as plain
    from megatron.core.models.common.embeddings import yarn_rotary_pos_embedding as yarn

    rotary, of_base, model = make(), make(20_000), make_yarn()
    monkeypatch.delattr(plain.RotaryEmbedding, "get_emb")
    monkeypatch.delattr(yarn.YarnRotaryEmbedding, "get_emb")
    follow(rotary)
    now.samples = 2
    for hook in rotary._forward_pre_hooks.values():
        hook(rotary, ())
    assert torch.equal(rotary.inv_freq, of_base.inv_freq)
    with pytest.raises(UsageError, match="has YarnRotaryEmbedding where a plain one or YaRN's is"):
        follow(model)


def test_a_release_without_the_flags_is_named(
    yarn_now: Now, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0.18 knows the name of the positions, and no model that it builds has them."""
    from megatron_skyladder.megatron_lm import hooks, releases

    monkeypatch.setattr(hooks.hybrid, "check", lambda options: None)
    monkeypatch.setattr(hooks.flag_rules, "check", lambda options: None)
    found = releases.Megatron("0.18.2", Path("nowhere"))
    monkeypatch.setattr(hooks.releases, "installed", lambda: found)
    options = SimpleNamespace(position_embedding_type="yarn")
    with pytest.raises(UsageError, match=r"Megatron 0\.18\.2 has no flags of YaRN.* from 0\.19 on"):
        hooks.check_options(clock.current().config, options)
    options.yarn_beta_fast = None
    hooks.check_options(clock.current().config, options)


# --- the learning rate ----------------------------------------------------------------------------


def test_rates_follow_samples_whatever_the_scheduler_missed() -> None:
    """Skipped steps, and a scheduler that was not loaded: the stage is that of the batch."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    from megatron_skyladder.megatron_lm.stage_rates import begin_step, with_factor

    class Scheduler(OptimizerParamScheduler):
        get_lr = with_factor(OptimizerParamScheduler.get_lr)

    stages = "8:0.5,lr=1 8:0.25,lr=0.5 8:rest,lr=2^0.5"
    schedule = WindowSchedule("staged", final_window=8, stages=stages, total_steps=8)
    clock.install(SkyLadderConfig(schedule, 8, step_samples=4), lambda: 0)
    groups = [{"lr": 0.0}, {"lr": 0.0, "max_lr": 3.0, "min_lr": 1.0}]
    optimizer: Any = SimpleNamespace(param_groups=groups)
    scheduler = Scheduler(
        optimizer, 0.0, 1.0, 0.0, 0, 32, "linear", 0.0, 0.0, 32, "constant",
    )  # fmt: skip
    try:
        for consumed, factor in ((0, 1.0), (12, 1.0), (16, 0.5), (20, 0.5), (24, 2**0.5)):
            scheduler.step(consumed - scheduler.num_steps)
            begin_step(scheduler, consumed)
            left = 1 - consumed / 32
            assert groups[0]["lr"] == left * factor
            assert groups[1]["lr"] == (1 + 2 * left) * factor
        begin_step(scheduler, 12)  # a scheduler that is 12 samples ahead of the batch
        assert groups[0]["lr"] == 0.25
        scheduler.step(4)  # the next batch begins at 16
        assert groups[0]["lr"] == 0.125 * 0.5
    finally:
        clock.uninstall()
