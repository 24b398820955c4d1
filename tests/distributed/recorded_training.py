"""What each rank of a recorded run does: train through pretrain_gpt and write down what happened.

Runs in the processes of `megatron_skyladder.testing.ProcessPool`; `runs.py` starts it and reads
what it writes. Nothing in the package knows of it: it wraps functions where the trainer looks them
up. Every event is one JSON line, flushed at once, so that a killed run leaves its record.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import runpy
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import numpy
import torch

SIGNATURE_BITS = 40
STOPPED_SECONDS = 1e-6  # what timers show when time stands still: rates then have digits


def train(
    folder: str,
    flags: list[str],
    gradients: bool = False,
    dense: dict[str, Any] | None = None,
    kill: dict[str, Any] | None = None,
    script: str | None = None,
    prefetch: int | None = None,
    replay: bool = False,
    broken: str | None = None,
    stop_time: bool = False,
    dropped_among: list[list[list[int]]] | None = None,
) -> None:
    """Train as one rank and record.

    Args:
        folder: gets ``events.<rank>.jsonl``, and ``gradients`` as a checkpoint.
        flags: the command line.
        gradients: whether to write the first step's gradients.
        dense: hand stock Megatron a dense mask, see `_hand_over_dense_masks`.
        kill: send this process a signal, see `_Killer`.
        script: run this ``pretrain_gpt.py`` of a Megatron checkout instead of ours.
        prefetch: batches that each worker of the data loader reads ahead.
        replay: let Megatron's rerun state machine run every step twice.
        broken: a function of `breakages` to call: a bug that a test has to notice.
        stop_time: let every timer of Megatron's show the same, so that rates can be compared.
        dropped_among: let experts with a capacity drop tokens as several ranks would, see
            `_drop_as_ranks_do`.
    """
    recorder = _Recorder(Path(folder), _Killer(**kill) if kill else None)
    recorder.wrap_train_step(gradients)
    _note_probe()
    recorder.wrap_replays()
    recorder.wrap_checkpoints()
    if broken is not None:
        import breakages

        getattr(breakages, broken)()
    if prefetch is not None:
        _read_ahead(prefetch)
    if replay:
        _replay_every_step()
    if stop_time:
        _stop_time()
    if dropped_among is not None:
        _drop_as_ranks_do(dropped_among)
    if script is not None:
        _run_script(script, flags)
        return
    sys.argv = ["pretrain_gpt", *flags]
    from megatron_skyladder import pretrain_gpt

    if dense is not None:
        _hand_over_dense_masks(**dense)
    recorder.wrap_forward()
    _compare_positions_at_every_step()
    pretrain_gpt.main()


_probing = False


def probing() -> bool:
    """Return whether the probe at start-up runs: what it does is no part of training."""
    return _probing


def _note_probe() -> None:
    from megatron_skyladder.runtime import probe

    original = probe.probe_mask

    def probe_mask(*args: Any) -> Any:
        global _probing
        _probing = True
        result = original(*args)
        _probing = False
        return result

    probe.probe_mask = probe_mask


def _compare_positions_at_every_step() -> None:
    from megatron_skyladder.attention.rotary import RotaryPositions

    RotaryPositions.compares_always = True


class _Killer:
    """Sends this process a signal at one moment of the batch that begins after ``samples``.

    Args:
        samples: consumed samples before the batch.
        when: ``forward`` (of ``micro_batch``), ``step`` (before the optimizer's), ``stepped``
            (after it), ``saving`` (a checkpoint begins) or ``saved`` (it is complete).
        micro_batch: which forward.
        delay_seconds: wait that long while training goes on.
        name: of the signal.
    """

    def __init__(
        self,
        samples: int,
        when: str,
        micro_batch: int = 0,
        delay_seconds: float = 0,
        name: str = "SIGKILL",
    ) -> None:
        self.moment = (samples, when, micro_batch)
        self.delay_seconds = delay_seconds
        self.signal = signal.Signals[name]

    def reached(self, samples: int, when: str, micro_batch: int = 0) -> None:
        if (samples, when, micro_batch) != self.moment:
            return
        if self.delay_seconds:
            threading.Timer(self.delay_seconds, os.kill, (os.getpid(), self.signal)).start()
        else:
            os.kill(os.getpid(), self.signal)


class _Recorder:
    """Writes events; each has the consumed samples before the batch it belongs to."""

    def __init__(self, folder: Path, killer: _Killer | None) -> None:
        self.folder = folder
        rank = os.environ["RANK"]
        self.file = (folder / f"events.{rank}.jsonl").open("a", buffering=1)
        self.killer = killer
        self.training = True
        self.forwards: dict[Any, int] = {}
        self.watched: set[int] = set()
        self.losses = 0

    def write(self, event: str, **values: Any) -> None:
        if probing():
            return
        self.file.write(json.dumps({"event": event, "samples": _consumed_samples(), **values}))
        self.file.write("\n")

    def reached(self, when: str, micro_batch: int = 0) -> None:
        if self.killer is not None and not probing():
            self.killer.reached(_consumed_samples(), when, micro_batch)

    def wrap_train_step(self, gradients: bool) -> None:
        from megatron.training import training

        original = training.train_step
        wanted = gradients

        def train_step(forward: Any, data: Any, model: Any, optimizer: Any, *args: Any, **kw: Any):
            nonlocal wanted
            rate = optimizer.param_groups[0]["lr"]
            step = optimizer.step

            def recorded_step() -> Any:
                nonlocal wanted
                if wanted:
                    _save_gradients(model, self.folder / "gradients")
                    wanted = False
                self.reached("step")
                return step()

            optimizer.step = recorded_step
            result = original(forward, data, model, optimizer, *args, **kw)
            del optimizer.step
            losses, *_, grad_norm, _, _ = result
            self.write(
                "step",
                learning_rate=rate,
                grad_norm=None if grad_norm is None else float(grad_norm),
                loss=float(losses["lm loss"]) if losses else None,
                window=_window(),
            )
            self.reached("stepped")
            return result

        training.train_step = train_step

    def wrap_replays(self) -> None:
        """Count micro-batches anew whenever a step begins, or is run again."""
        from megatron.core.rerun_state_machine import RerunStateMachine

        original = RerunStateMachine.should_run_forward_backward

        def should_run_forward_backward(*args: Any) -> bool:
            self.forwards.clear()
            self.losses = 0
            return original(*args)

        RerunStateMachine.should_run_forward_backward = should_run_forward_backward

    def wrap_checkpoints(self) -> None:
        from megatron.training import training

        original = training.save_checkpoint

        def save_checkpoint(*args: Any, **kwargs: Any) -> Any:
            self.reached("saving")
            result = original(*args, **kwargs)
            self.write("saved")
            self.reached("saved")
            return result

        training.save_checkpoint = save_checkpoint

    def wrap_forward(self) -> None:
        """Record every micro-batch: what was read, which window was seen, each row's loss."""
        from megatron_skyladder import pretrain_gpt
        from megatron_skyladder.megatron_lm import batches

        forward_step, loss_func = pretrain_gpt.forward_step, pretrain_gpt.loss_func
        get_batch = batches.get_batch
        chunk: Any = None

        def recorded_get_batch(data_iterator: Any, **kwargs: Any) -> Any:
            counted = None if data_iterator is None else _Counting(data_iterator)
            batch, mask = get_batch(counted, **kwargs)
            self.write(
                "batch",
                chunk=chunk,
                training=self.training,
                micro_batch=self.forwards[chunk, self.training],
                **_place(),
                tokens=_signatures(batch["tokens"], batch["position_ids"], mask, self.training),
                labels=_signatures(batch["labels"], batch["position_ids"], mask, self.training),
                reads=None if counted is None else counted.reads,
                documents_masked=mask is not None,
                window=_window(training=self.training),
            )
            return batch, mask

        @functools.wraps(forward_step)
        def recorded_forward_step(data_iterator: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal chunk
            self.training = model.training
            chunk = kwargs.get("vp_stage", getattr(_unwrapped(model), "vp_stage", None))
            key = chunk, self.training
            self.forwards[key] = self.forwards.get(key, -1) + 1
            self.watch_rotary(_unwrapped(model))
            if self.training:
                self.reached("forward", self.forwards[key])
            return forward_step(data_iterator, model, *args, **kwargs)

        def recorded_loss_func(loss_mask: torch.Tensor, losses: torch.Tensor, **kwargs: Any) -> Any:
            rows = (losses.detach().double() * loss_mask.double()).sum(dim=1)
            self.write(
                "loss",
                training=self.training,
                micro_batch=self.losses,
                **_place(),
                rows=rows.tolist(),
            )
            self.losses += 1
            return loss_func(loss_mask, losses, **kwargs)

        pretrain_gpt.forward_step = recorded_forward_step
        pretrain_gpt.loss_func = recorded_loss_func
        batches.get_batch = recorded_get_batch

    def watch_rotary(self, model: Any) -> None:
        """Record what the layers get from a model's rotary embedding, where stages move it."""
        rotary = getattr(model, "rotary_pos_emb", None)
        if rotary is None or id(model) in self.watched or not _moved() & {"rope", "yarn"}:
            return
        self.watched.add(id(model))
        if hasattr(rotary, "scaling_factor"):
            self.watch_turning()

        def note(_: Any, __: Any, output: Any) -> None:
            angles, *concentration = output if isinstance(output, tuple) else (output,)
            self.write(
                "rotary",
                training=rotary.training,
                frequency=rotary.inv_freq[1].item(),
                frequencies=rotary.get_emb(2)[0][1, 0, 0].tolist() if concentration else [],
                **_place(),
                angles=angles.double().sum().item(),
            )

        rotary.register_forward_hook(note)

    def watch_turning(self) -> None:
        """Record the concentration with which layers turn queries and keys, recomputed ones too."""
        from megatron.core.transformer import attention

        original = attention.apply_rotary_pos_emb
        if hasattr(original, "__wrapped__"):  # by another chunk of the model
            return

        @functools.wraps(original)
        def apply_rotary_pos_emb(*args: Any, mscale: float, **kwargs: Any) -> Any:
            self.write(
                "turned",
                training=self.training,
                with_gradients=torch.is_grad_enabled(),
                concentration=mscale,
            )
            return original(*args, mscale=mscale, **kwargs)

        attention.apply_rotary_pos_emb = apply_rotary_pos_emb


class _Counting:
    """An iterator that counts what is read from it."""

    def __init__(self, iterator: Any) -> None:
        self.iterator = iterator
        self.reads = 0

    def __iter__(self) -> _Counting:
        return self

    def __next__(self) -> Any:
        self.reads += 1
        return next(self.iterator)


def _consumed_samples() -> int:
    from megatron.training import get_args

    return get_args().consumed_train_samples


def _place() -> dict[str, int]:
    from megatron.core import mpu

    return {
        "data_rank": mpu.get_data_parallel_rank(),
        "context_rank": mpu.get_context_parallel_rank(),
    }


def _window(training: bool = True) -> int | None:
    from megatron_skyladder.ladder import clock

    active = clock.installed()
    return None if active is None else _copied(active).window(training=training)


def _copied(active: Any) -> Any:
    """Return a clock that may be asked: one remembers what was looked up last, to log it."""
    return copy.copy(active)


def _moved() -> set[str]:
    """Return what stages move, by the field of `StageValues`."""
    from megatron_skyladder.ladder import clock

    active = clock.installed()
    return set() if active is None else active.config.schedule.moves()


def _unwrapped(model: Any) -> Any:
    while hasattr(model, "module"):
        model = model.module
    return model


def _signatures(
    rows: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    mask: torch.Tensor | None,
    training: bool,
) -> list[int] | None:
    """Return a number per row that depends on every token and its position.

    Sums over the positions, so that the parts of a row on the context-parallel ranks add up to it.
    """
    if rows is None:
        return None
    from megatron.training import get_args

    length = get_args().seq_length
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(1 << SIGNATURE_BITS, (length,), generator=generator)
    if position_ids is None:  # a last stage has labels and no positions
        position_ids = _positions(len(rows), length, mask, training)
    return ((rows + 1) * weights[position_ids]).sum(dim=1).tolist()


def _positions(
    num_rows: int, length: int, mask: torch.Tensor | None, training: bool
) -> torch.Tensor:
    """Return the positions of this context-parallel rank's tokens, by the layout in effect."""
    from megatron.core import mpu

    from megatron_skyladder.ladder import clock
    from megatron_skyladder.megatron_lm import compat

    active = clock.installed()
    if active is None:
        whole = torch.arange(length).expand(num_rows, -1)
        return compat.cp_batch({"positions": whole})["positions"]
    cp_size, rank = mpu.get_context_parallel_world_size(), mpu.get_context_parallel_rank()
    rule = _copied(active).layout_rule(length, cp_size, training=training)
    layouts = rule.layouts(num_rows, None if mask is None else mask.numpy())
    return torch.from_numpy(numpy.stack([layout.positions(rank) for layout in layouts]))


def _save_gradients(model: list[Any], folder: Path) -> None:
    """Write all gradients as a checkpoint: Megatron gathers the shards of any layout for us."""
    from megatron.core import dist_checkpointing

    parameters = [parameter for chunk in model for parameter in chunk.parameters()]
    weights = [parameter.data for parameter in parameters]
    for chunk in model:
        _gather_reduced_shards(chunk)
    for parameter in parameters:
        parameter.data = parameter.main_grad
    folder.mkdir(exist_ok=True)
    torch.distributed.barrier()
    dist_checkpointing.save(
        {f"chunk{i}": _unwrapped(chunk).sharded_state_dict() for i, chunk in enumerate(model)},
        str(folder),
    )
    for parameter, weight in zip(parameters, weights, strict=True):
        parameter.data = weight


def _gather_reduced_shards(chunk: Any) -> None:
    """With the distributed optimizer each data rank has reduced only its part of each bucket."""
    if not chunk.ddp_config.use_distributed_optimizer:
        return
    for buffer in chunk.buffers:
        group = buffer.data_parallel_group
        for bucket in buffer.buckets:
            part = bucket.grad_data.view(group.size(), -1)[group.rank()].clone()
            parts = list(bucket.grad_data.view(group.size(), -1).unbind())
            torch.distributed.all_gather(parts, part, group=group)


def _hand_over_dense_masks(
    windows: list[int],
    eod: int | None,
    sliding: bool,
    shifts_within_it: bool = False,
    local: dict[str, Any] | None = None,
) -> None:
    """Give stock Megatron's own attention a dense mask made pair by pair from the definition.

    Args:
        windows: tokens, of each step in turn.
        eod: the token that ends a document; None: documents are not masked.
        sliding: whether the window slides.
        shifts_within_it: whether heads of multi-token prediction get no token that does not see
            the one before it.
        local: ``layers``, the numbers of those with a sliding window of their own, and ``tokens``,
            which a query of theirs sees at most, of each step in turn.
    """
    if local is not None:
        _narrow(**local)
    from megatron.core.transformer import multi_token_prediction
    from megatron.training import get_args

    from megatron_skyladder.megatron_lm import batches
    from megatron_skyladder.testing import megatron_dense_mask

    get_batch = batches.get_batch

    def get_batch_with_mask(data_iterator: Any, *, training: bool, **kwargs: Any) -> Any:
        batch, _ = get_batch(data_iterator, training=training, **kwargs)
        if not training:
            return batch, None
        step = _consumed_samples() // get_args().global_batch_size
        mask = megatron_dense_mask(
            batch["tokens"].numpy(), window_len=windows[step], eod=eod, sliding=sliding
        )

        def roll_tensor(tensor: torch.Tensor, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
            rolled = torch.zeros_like(tensor)
            for row, at in numpy.ndindex(tensor.shape[0], tensor.shape[1] - 1):
                if not mask[row, 0, at + 1, at]:  # True is hidden
                    rolled[row, at] = tensor[row, at + 1]
            return rolled, rolled.sum()

        if shifts_within_it:
            multi_token_prediction.roll_tensor = roll_tensor
        return batch, mask

    batches.get_batch = get_batch_with_mask


def _narrow(layers: list[int], tokens: list[int]) -> None:
    """Let some layers of stock Megatron see less of the mask that all are given, pair by pair."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.training import get_args

    forward = DotProductAttention.forward

    def narrowed(self: Any, query: Any, key: Any, value: Any, mask: Any, *args: Any, **kw: Any):
        if self.layer_number in layers and mask is not None:
            length = mask.shape[-1]
            own = tokens[_consumed_samples() // get_args().global_batch_size]
            hidden = [[i - j >= own for j in range(length)] for i in range(length)]
            mask = mask | torch.tensor(hidden)
        return forward(self, query, key, value, mask, *args, **kw)

    DotProductAttention.forward = narrowed


def _read_ahead(depth: int) -> None:
    """Set how far the data loader's workers read ahead; Megatron has no flag for it."""
    loader = torch.utils.data.DataLoader
    original = loader.__init__

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, prefetch_factor=depth, **kwargs)

    loader.__init__ = __init__


def _replay_every_step() -> None:
    """Choose the mode of --rerun-mode report_stats, whose name Megatron's own enumeration lacks."""
    from megatron.core.rerun_state_machine import RerunMode
    from megatron.training import initialize

    initialize.RerunMode = lambda _: RerunMode.REPORT_DETERMINISM_STATS


def _stop_time() -> None:
    from megatron.core.timers import Timer

    Timer.elapsed = lambda self, reset=True, barrier=False: STOPPED_SECONDS


def _drop_as_ranks_do(held: list[list[list[int]]]) -> None:
    """Let one process drop the tokens that several would: each rank drops among its own.

    Args:
        held: for each step, for each rank the positions that it holds of a sequence, in its order;
            micro-batches are of one sequence.
    """
    from megatron.core.transformer.moe import router
    from megatron.training import get_args

    drop = router.apply_router_token_dropping

    def dropping(probs: Any, routing_map: Any, *args: Any, **kwargs: Any) -> Any:
        ranks = held[_consumed_samples() // get_args().global_batch_size]
        probs_after, map_after = torch.zeros_like(probs), torch.zeros_like(routing_map)
        for positions in ranks:
            kept = drop(probs[positions], routing_map[positions], *args, **kwargs)
            probs_after[positions], map_after[positions] = kept
        assert bool((map_after != routing_map).any()), "no token was dropped or padded"
        return probs_after, map_after

    router.apply_router_token_dropping = dropping


def _run_script(script: str, flags: list[str]) -> None:
    """Run a checkout's ``pretrain_gpt.py`` with the Megatron that is installed."""
    sys.argv = [script, *flags]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")


def build_documents(prefix: str, lengths: list[int], vocab_size: int, eod: int) -> None:
    """Write a Megatron dataset of random documents, each with its end-of-document token."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    generator = torch.Generator().manual_seed(0)
    builder = IndexedDatasetBuilder(prefix + ".bin", dtype=numpy.int32)
    for length in lengths:
        tokens = torch.randint(vocab_size, (length,), generator=generator)
        tokens[-1] = eod
        builder.add_document(tokens, [length])
    builder.finalize(prefix + ".idx")
