"""The core-attention module: against Megatron's own, and what it refuses."""

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("megatron.core")

from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.transformer.enums import AttnMaskType  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from megatron_skyladder.attention import core_attention, segments  # noqa: E402
from megatron_skyladder.attention.core_attention import SkyLadderAttention  # noqa: E402
from megatron_skyladder.ladder import clock  # noqa: E402
from megatron_skyladder.ladder.config import SkyLadderConfig  # noqa: E402
from megatron_skyladder.ladder.fragments import dense_mask, fragment_cu_seqlens  # noqa: E402
from megatron_skyladder.ladder.local_layers import LocalLayers  # noqa: E402
from megatron_skyladder.ladder.schedules import WindowSchedule  # noqa: E402

LENGTH, ROWS, HEADS, GROUPS, DIM = 48, 2, 4, 2, 8


@pytest.fixture
def samples():
    """A clock under a schedule of 8 + 8 per step; the list holds the consumed samples."""
    consumed = [0]
    config = SkyLadderConfig(
        schedule=WindowSchedule(start_window=8, final_window=LENGTH, alpha=8),
        seq_length=LENGTH,
        step_samples=4,
        attention_backend="sdpa",
    )
    clock.install(config, lambda: consumed[0])
    yield consumed
    clock.uninstall()


def transformer_config(**changes):
    values = {
        "num_layers": 1,
        "hidden_size": HEADS * DIM,
        "num_attention_heads": HEADS,
        "num_query_groups": GROUPS,
        "attention_dropout": 0.0,
        **changes,
    }
    return TransformerConfig(**values)


def build(config=None, mask_type=AttnMaskType.causal, attention_type="self", **arguments):
    return SkyLadderAttention(
        config or transformer_config(),
        layer_number=1,
        attn_mask_type=mask_type,
        attention_type=attention_type,
        **arguments,
    )


def random_qkv():
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(LENGTH, ROWS, heads, DIM, generator=generator, requires_grad=True)
        for heads in (HEADS, GROUPS, GROUPS)
    ]


def dense(qkv, mask):
    """[s, b, h * d] of a softmax over the visible keys."""
    query, key, value = qkv
    key, value = (x.repeat_interleave(HEADS // GROUPS, 2) for x in (key, value))
    logits = torch.einsum("qbhd,kbhd->bhqk", query, key) / DIM**0.5
    weights = logits.masked_fill(~torch.from_numpy(mask), float("-inf")).softmax(-1)
    return torch.einsum("bhqk,kbhd->qbhd", weights, value).flatten(2)


@pytest.mark.parametrize(("consumed", "window"), [(0, 8), (3, 8), (4, 16), (12, 32), (400, LENGTH)])
def test_the_window_follows_the_consumed_samples(samples, consumed, window):
    attention = build()
    samples[0] = consumed
    qkv = random_qkv()
    expected = dense(qkv, dense_mask(LENGTH, window_len=window))
    torch.testing.assert_close(attention(*qkv, None), expected)


@pytest.mark.parametrize(("scale", "of_a_head"), [(None, DIM**-0.5), (0.125, 0.125)])
def test_logits_are_scaled_by_the_heads_width_or_as_asked(samples, scale, of_a_head):
    """A head's width is --kv-channels, which need not be the hidden size divided by the heads."""
    config = transformer_config(hidden_size=4 * HEADS * DIM, kv_channels=DIM)
    attention = build(config, softmax_scale=scale)
    qkv = random_qkv()
    scaled = [qkv[0] * (of_a_head * DIM**0.5), *qkv[1:]]  # the dense one divides by sqrt(DIM)
    expected = dense(scaled, dense_mask(LENGTH, window_len=8))
    torch.testing.assert_close(attention(*qkv, None), expected)


def test_evaluation_sees_the_whole_row(samples):
    attention = build().eval()
    qkv = random_qkv()
    expected = dense(qkv, dense_mask(LENGTH, window_len=LENGTH))
    torch.testing.assert_close(attention(*qkv, None), expected)


@pytest.mark.parametrize("sliding", [False, True])
@pytest.mark.parametrize("own_window", [1, 5, 8, 9, 24, 48, 60])
@pytest.mark.parametrize("window", [8, 32, LENGTH])
def test_a_local_layer_sees_its_own_window_within_the_ladders(samples, window, own_window, sliding):
    """Values and gradients; documents or not; in evaluation its own window alone."""
    clock.current().config = replace(clock.current().config, mask="sliding" if sliding else "local")
    samples[0] = 4 * (window // 8 - 1)
    attention = build(transformer_config(window_size=(own_window - 1, 0)))
    qkv = random_qkv()
    seen = {"sliding": sliding, "own_window": own_window}
    ends = np.array([5, 11, 40], np.int32)
    cut = LENGTH if sliding else window
    row = fragment_cu_seqlens(ends, seq_length=LENGTH, window_len=cut)
    mask = torch.from_numpy(np.concatenate((row, row[1:] + np.int32(LENGTH))))
    for given, document_ends in ((None, None), (mask, ends)):
        hidden = dense_mask(LENGTH, window_len=window, document_ends=document_ends, **seen)
        expected, out = dense(qkv, hidden), attention(*qkv, given)
        torch.testing.assert_close(out, expected)
        direction = torch.randn_like(out)
        found = torch.autograd.grad(out, qkv, direction)
        torch.testing.assert_close(found, torch.autograd.grad(expected, qkv, direction))
    expected = dense(qkv, dense_mask(LENGTH, window_len=LENGTH, own_window=own_window))
    torch.testing.assert_close(attention.eval()(*qkv, None), expected)


@pytest.mark.parametrize("sliding", [False, True])
def test_a_second_ladder_holds_local_layers_back(samples, sliding):
    """Values and gradients at each of its windows; its full own window is evaluation's.

    Global windows 8, 16, ... 48 every four samples; own ones 1, 5, 10, 15, 20 and 20.
    """
    settings = clock.current().config
    own_ladder = WindowSchedule("linear", 1, 20, expand_fraction=1, total_steps=4)
    clock.current().config = replace(
        settings,
        mask="sliding" if sliding else "local",
        local_layers=LocalLayers(20, 1, 2),
        local_schedule=own_ladder,
    )
    attention = build(transformer_config(window_size=(19, 0)))
    global_layer, qkv = build(), random_qkv()
    ends = np.array([5, 11, 40], np.int32)
    for step, own_window in enumerate((1, 5, 10, 15, 20, 20)):
        samples[0], window = 4 * step, 8 * (step + 1)
        row = fragment_cu_seqlens(ends, seq_length=LENGTH, window_len=LENGTH if sliding else window)
        mask = torch.from_numpy(np.concatenate((row, row[1:] + np.int32(LENGTH))))
        for layer, at_most in ((attention, own_window), (global_layer, None)):
            for given, document_ends in ((None, None), (mask, ends)):
                hidden = dense_mask(
                    LENGTH,
                    window_len=window,
                    document_ends=document_ends,
                    sliding=sliding,
                    own_window=at_most,
                )
                expected, out = dense(qkv, hidden), layer(*qkv, given)
                torch.testing.assert_close(out, expected)
                direction = torch.randn_like(out)
                found = torch.autograd.grad(out, qkv, direction)
                torch.testing.assert_close(found, torch.autograd.grad(expected, qkv, direction))
    samples[0] = 0
    expected = dense(qkv, dense_mask(LENGTH, window_len=LENGTH, own_window=20))
    torch.testing.assert_close(attention.eval()(*qkv, None), expected)


def test_windows_that_move_at_every_step_fill_no_cache(samples):
    """Each step has offsets of its own, for both kinds of layers; only the latest are kept."""
    own_ladder = WindowSchedule("linear", 1, 40, expand_fraction=1, total_steps=300)
    clock.current().config = replace(
        clock.current().config,
        local_layers=LocalLayers(40, 1, 2),
        local_schedule=own_ladder,
        schedule=WindowSchedule("linear", 40, LENGTH, expand_fraction=1, total_steps=300),
    )
    layers = build(transformer_config(window_size=(39, 0))), build()
    query, _, _ = random_qkv()
    seen = []
    for step in range(300):
        samples[0] = 4 * step
        mask = torch.tensor([0, LENGTH, 2 * LENGTH], dtype=torch.int32)
        found = [layer._segments(query, given) for layer in layers for given in (None, mask)]
        assert layers[0]._segments(query, mask) is found[1]  # another layer, or once more
        seen.append(found[0].sliding_window)
        assert found[1].sliding_window == seen[-1] and found[2].sliding_window is None
    assert seen == [1 + 39 * step // 300 for step in range(300)]
    assert segments.grid_segments.cache_info().currsize <= 16
    assert len(core_attention._masks._entries) <= segments._KEPT_MASKS < 600


class OneRank:
    def size(self):
        return 1

    def rank(self):
        return 0


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """Megatron puts what it makes on the current device."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")


def tensor_parallel_alone():
    groups = ProcessGroupCollection()
    groups.tp = OneRank()
    return groups


def dense_with_sink(qkv, mask, sink):
    """The same as `dense`, with a key whose value is nothing and whose logit is the sink."""
    query, key, value = qkv
    key, value = (x.repeat_interleave(HEADS // GROUPS, 2) for x in (key, value))
    logits = torch.einsum("qbhd,kbhd->bhqk", query, key) / DIM**0.5
    terms = logits.masked_fill(~torch.from_numpy(mask), float("-inf")).exp()
    weights = terms / (terms.sum(-1, keepdim=True) + sink.exp().view(1, -1, 1, 1))
    return torch.einsum("bhqk,kbhd->qbhd", weights, value).flatten(2)


@pytest.mark.parametrize("kind", ["off-by-one", "learnable"])
@pytest.mark.parametrize(
    ("window", "sliding", "own_window", "documents"),
    [
        (8, False, None, False),
        (32, False, 5, False),
        (32, False, None, True),
        (32, True, 12, True),
        (LENGTH, False, None, False),
    ],
)
def test_sinks_take_weight_and_give_no_value(samples, kind, window, sliding, own_window, documents):
    """Values, and gradients of the sinks too, in all kinds of call."""
    clock.current().config = replace(clock.current().config, mask="sliding" if sliding else "local")
    samples[0] = 4 * (window // 8 - 1)
    own = None if own_window is None else (own_window - 1, 0)
    config = transformer_config(softmax_type=kind, window_size=own)
    attention = build(config, pg_collection=tensor_parallel_alone())
    sink = torch.zeros(HEADS)
    if kind == "learnable":
        with torch.no_grad():
            attention.softmax_offset.copy_(torch.tensor([-3.0, 0.0, 1.0, 4.0]))
        sink = attention.softmax_offset
    ends = np.array([5, 11, 40], np.int32) if documents else None
    given = None
    if documents:
        cut = LENGTH if sliding else window
        row = fragment_cu_seqlens(ends, seq_length=LENGTH, window_len=cut)
        given = torch.from_numpy(np.concatenate((row, row[1:] + np.int32(LENGTH))))
    seen = dense_mask(
        LENGTH, window_len=window, document_ends=ends, sliding=sliding, own_window=own_window
    )
    qkv = random_qkv()
    out, expected = attention(*qkv, given), dense_with_sink(qkv, seen, sink)
    torch.testing.assert_close(out, expected)
    wanted = [*qkv, *attention.parameters()]
    direction = torch.randn_like(out)
    found = torch.autograd.grad(out, wanted, direction)
    torch.testing.assert_close(found, torch.autograd.grad(expected, wanted, direction))


def test_local_layers_share_what_global_ones_made_where_they_see_the_same(samples):
    """So a step makes two kinds of segments at most, whatever the number of layers."""
    layers = [build(transformer_config(window_size=(size, 0))) for size in (6, 7, 100)]
    layers.append(build())
    query, _, _ = random_qkv()
    narrow, *same = [layer._segments(query, None) for layer in layers]
    assert narrow.sliding_window == 7 and narrow.grid == 8
    assert all(each is same[0] for each in same) and same[0].sliding_window is None


def test_documents_of_each_row(samples):
    attention = build()
    ends = [np.array([5, 11], np.int32), np.array([20], np.int32)]
    rows = [fragment_cu_seqlens(e, seq_length=LENGTH, window_len=8) for e in ends]
    mask = torch.from_numpy(np.concatenate((rows[0], rows[1][1:] + np.int32(LENGTH))))
    qkv = random_qkv()
    out = attention(*qkv, mask)
    for row, row_ends in enumerate(ends):
        expected = dense(qkv, dense_mask(LENGTH, window_len=8, document_ends=row_ends))
        torch.testing.assert_close(out[:, row], expected[:, row])


def test_the_full_window_is_megatrons_own_attention(samples, monkeypatch):
    """Values and gradients to rounding, grouped queries included."""
    from megatron.core import parallel_state
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    class Buffer:  # Megatron's sits on the GPU
        def get_tensor(self, shape, dtype, _):
            return torch.zeros(shape, dtype=dtype)

    monkeypatch.setattr(parallel_state, "get_global_memory_buffer", Buffer)
    groups = tensor_parallel_alone()
    config = transformer_config()
    stock = DotProductAttention(config, 1, AttnMaskType.causal, "self", pg_collection=groups)
    stock.config.sequence_parallel = True  # keeps dropout (0) from asking for Megatron's RNG state
    samples[0] = 10_000
    qkv = random_qkv()
    hidden = ~torch.from_numpy(dense_mask(LENGTH, window_len=LENGTH))
    expected = stock(*qkv, hidden[None, None])
    got = build()(*qkv, None)
    torch.testing.assert_close(got, expected)
    direction = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad(got, qkv, direction),
        torch.autograd.grad(expected, qkv, direction),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool), "int32 cu_seqlens on the host"),
        (torch.tensor([0, 96]), "int32 cu_seqlens on the host"),
        (torch.tensor([0, 48], dtype=torch.int32), "belongs to another micro-batch"),
    ],
)
def test_other_masks_are_refused(samples, mask, message):
    with pytest.raises(ValueError, match=message):
        build()(*random_qkv(), mask)


def test_packed_sequences_and_inference_are_refused(samples):
    query, key, value = random_qkv()
    with pytest.raises(ValueError, match="--skyladder-intra-document"):
        build()(query, key, value, None, packed_seq_params=object())
    with pytest.raises(ValueError, match="for generation build the model without it"):
        build()(query[:1], key, value, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_dropout": 0.1}, "--attention-dropout 0"),
        ({"window_size": (7, 1)}, "what comes after it"),
        ({"cuda_graph_impl": "local"}, "replay the window"),
        ({"fp8_dot_product_attention": True}, "runs in 16 bits"),
        ({"qk_clip": True}, "Drop --qk-clip"),
    ],
)
def test_models_that_windows_do_not_fit_are_refused(samples, changes, message):
    with pytest.raises(ValueError, match=message):
        build(transformer_config(**changes))


def test_only_causal_self_attention(samples):
    with pytest.raises(ValueError, match="cross attention"):
        build(attention_type="cross")
    with pytest.raises(ValueError, match="no_mask"):
        build(mask_type=AttnMaskType.no_mask)


def test_without_a_schedule_it_is_not_built():
    clock.uninstall()
    with pytest.raises(RuntimeError, match="no schedule is installed"):
        build()
