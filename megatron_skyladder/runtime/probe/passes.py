"""Through the real model: two micro-batches, in which every attention is asked instead of run.

The trainer's own forward step reads the batch, makes the mask and calls the model, which hands it
down to each core attention; there the questions are put, to the very module and with the very mask.
What the layers around compute does not matter.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_skyladder.attention import recurrent
from megatron_skyladder.attention.core_attention import SkyLadderAttention
from megatron_skyladder.attention.rotary import is_rotary, whole_embedding
from megatron_skyladder.ladder.clock import Clock
from megatron_skyladder.runtime import document_mask, pipeline
from megatron_skyladder.runtime.probe import gradients, questions, statement, states, words
from megatron_skyladder.runtime.probe.gradients import Attend
from megatron_skyladder.runtime.probe.moments import Moment, Moments
from megatron_skyladder.runtime.probe.sequences import Replay
from megatron_skyladder.runtime.trainer import Trainer

logger = logging.getLogger(__name__)


@dataclass
class Findings:
    """What this rank found.

    Args:
        faults: of the mask, each a sentence.
        lost: of gradients, the same.
        not_finite: the first layer whose own queries, keys or values are not finite, if any.
        num_layers: attention layers that were asked.
        num_states: layers that were asked for their state.
        num_answers: what they were asked, over all queries.
        own_windows: tokens that local layers see at most, as text; empty: there are none.
    """

    faults: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    not_finite: str | None = None
    num_layers: int = 0
    num_states: int = 0
    num_answers: int = 0
    own_windows: str = ""


class Passes:
    """Asks all attention layers of a model.

    Args:
        model: this rank's model chunks, as the trainer wraps them.
        trainer: whoever trains.
        clock: the process's clock.
        forward_step: the trainer's own, ``(data_iterator, model) -> (output, loss function)``.
        times: what is asked about.
        reads: for each chunk, whether this rank reads its sequences.
    """

    def __init__(
        self,
        model: list[Any],
        trainer: Trainer,
        clock: Clock,
        forward_step: Callable[..., Any],
        times: Moments,
        reads: list[bool],
    ) -> None:
        self.findings = Findings()
        self._model = model
        self._trainer = trainer
        self._clock = clock
        self._forward_step = forward_step
        self._times = times
        self._reads = reads
        self._now = times.begins
        self._asked: Counter[str] = Counter()
        self._masks: dict[str, Any] = {}  # of training, by layer
        self._attentions: list[dict[str, SkyLadderAttention]] = []
        self._states: list[dict[str, torch.nn.Module]] = []
        for index, chunk in enumerate(model):
            where = f" of chunk {index}" * (len(model) > 1)
            self._attentions.append(self._find(chunk, where))
            self._states.append(_find_states(chunk, where))

    def _find(self, chunk: Any, where: str) -> dict[str, SkyLadderAttention]:
        found = {}
        for path, module in chunk.named_modules():
            attention = getattr(module, "core_attention", None)
            if attention is None:
                continue
            kind_of_layer = "prediction head" if "mtp" in path.split(".") else "layer"
            name = f"{kind_of_layer} {getattr(module, 'layer_number', '?')}{where}"
            if isinstance(attention, SkyLadderAttention):
                found[name] = attention
            else:
                kind = type(attention)
                self.findings.faults.append(
                    f"the core attention of {name} is {kind.__module__}.{kind.__name__}, which "
                    "knows nothing of windows"
                )
        return found

    def run(self) -> Findings:
        """Ask; all ranks have to call this.

        Every attention answers in the place of what it computes; see `traces` for the rest.
        """
        moments = [self._times.begins, self._times.evaluates]
        missing = pipeline.num_microbatches(self._model, len(moments)) - len(moments)
        moments += moments[-1:] * missing
        chunks = range(len(self._model))
        iterators = [iter([(chunk, moment) for moment in moments]) for chunk in chunks]
        with self._asking(), torch.no_grad():
            get_forward_backward_func()(
                forward_step_func=self._step,
                data_iterator=iterators if len(self._model) > 1 else iterators[0],
                model=self._model if len(self._model) > 1 else self._model[0],
                num_microbatches=len(moments),
                seq_length=self._trainer.seq_length,
                micro_batch_size=self._trainer.micro_batch_size,
                decoder_seq_length=self._trainer.seq_length,
                forward_only=True,
                collect_non_loss_data=True,
            )
        for what, chunks_of in (("core attention", self._attentions), ("state", self._states)):
            for name in (name for layers in chunks_of for name in layers):
                if not self._asked[name]:
                    self.findings.faults.append(f"the {what} of {name} is never called")
        self.findings.num_states = sum(map(len, self._states))
        self.findings.num_layers = sum(map(len, self._attentions))
        layers = [layer for each in self._attentions for layer in each.values()]
        windows = {layer.own_window for layer in layers if layer.own_window is not None}
        times = [self._times.begins, *self._times.later]
        held = {each.own_window(window) for window in windows for each in times}
        self.findings.own_windows = ", ".join(map(str, sorted(filter(None, held))))
        return self.findings

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        """Let every attention put the questions to itself when it is called."""
        with contextlib.ExitStack() as undo:
            for attentions in self._attentions:
                # the first global layer and the first local one
                thorough: dict[int | None, str] = {}
                for name, attention in attentions.items():
                    thorough.setdefault(attention.own_window, name)
                for name, attention in attentions.items():
                    before = vars(attention).get("forward")
                    undo.callback(_set_or_delete, attention, "forward", before)
                    undo.callback(setattr, attention, "sink_is_off", False)
                    attention.sink_is_off = True
                    attention.forward = partial(  # type: ignore[method-assign]
                        self._answer,
                        name,
                        attention,
                        attention.forward,
                        thorough[attention.own_window] == name,
                    )
            for layers in self._states:
                for name, layer in layers.items():
                    undo.callback(_set_or_delete, layer, "forward", vars(layer).get("forward"))
                    layer.forward = partial(self._ask_state, name, layer, layer.forward)
            yield

    def _step(self, iterator: Any, chunk: Any, *_: Any, **__: Any) -> tuple[Any, Any]:
        """Run the trainer's forward step at a moment; Megatron's ``forward_step_func``."""
        index, moment = next(iterator)
        self._now = moment
        attentions = self._attentions[index]
        chunk.training = moment.training  # of the outermost module alone: the step asks for it
        asked = (*attentions.values(), *self._states[index].values(), *self._rotaries(chunk))
        for module in asked:
            module.train(moment.training)
        batch = Replay(moment.batch) if moment.batch is not None and self._reads[index] else None
        handles = [chunk.register_forward_pre_hook(self._check_tokens, with_kwargs=True)]
        for rotary in self._rotaries(chunk):  # after those that change what it returns
            handles.append(rotary.register_forward_hook(self._check_rotary))
        with self._trainer.at_samples(moment.samples):
            output, _ = self._forward_step(batch, chunk)
        for handle in handles:
            handle.remove()
        chunk.training = False
        return output, lambda *_, **__: None

    def _check_tokens(self, chunk: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """See that the model trains on the sequences whose documents are masked."""
        batch = self._now.batch
        tokens = args[0] if args else kwargs.get("input_ids")
        sequences = None if batch is None else batch.get("tokens")
        if sequences is None or not isinstance(tokens, torch.Tensor):
            return
        own = self._now.sight.own_in_sequence
        expected = sequences.to(tokens.device).gather(1, own.to(tokens.device))
        if not torch.equal(tokens, expected):
            self.findings.faults.append(
                f"in {self._now.name} the model gets other tokens than those of the sequences that "
                "were read, or not those at the positions that this context-parallel rank holds"
            )

    def _rotaries(self, chunk: Any) -> list[Any]:
        """Return the rotary embeddings of a chunk."""
        found = (getattr(module, "rotary_pos_emb", None) for module in chunk.modules())
        return [each for each in found if is_rotary(each)]

    def _check_rotary(self, rotary: Any, args: tuple[Any, ...], output: Any) -> None:
        """See that the rotary embedding is that of the positions that this rank holds."""
        whole, *_ = whole_embedding(rotary, args[0])
        found = output[0] if isinstance(output, tuple) else output
        expected = whole[:, 0, 0][self._now.sight.own_in_sequence].transpose(0, 1)
        if found.shape[0] != len(expected) or not torch.equal(
            found[:, :, 0].expand_as(expected), expected
        ):
            self.findings.faults.append(
                f"in {self._now.name} the rotary embedding is that of other positions than those "
                "that this context-parallel rank holds"
            )

    def _answer(
        self,
        name: str,
        attention: SkyLadderAttention,
        forward: Callable[..., torch.Tensor],
        thorough: bool,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Stand for an attention's forward: put the questions to it, and return an output of them.

        Args:
            name: of the layer.
            attention: the module.
            forward: its own.
            thorough: whether backward passes and later moments are asked about too.
            query: as the layer made it; so key and value. Their numbers are not used.
            mask: as it came along.
        """
        if not all(tensor.isfinite().all() for tensor in (query, key, value)):
            self.findings.not_finite = self.findings.not_finite or name
        self._asked[name] += 1
        moment = self._now
        own_window = statement.own_window(attention.config, attention.layer_number)
        ask = partial(self._ask, name, attention.softmax_scale, (query, key, value), own_window)

        def attend_with(mask: torch.Tensor | None) -> Attend:
            return lambda q, k, v: forward(q, k, v, mask, *args, **kwargs)

        out = ask(moment, attend_with(mask), backward=thorough and moment.training)
        if not thorough:
            return out
        if moment is self._times.begins:
            self._masks[name] = mask
            for later in self._times.later:
                with self._trainer.at_samples(later.samples):
                    ask(later, attend_with(self._mask_of(later)), backward=True)
        elif self._asked[name] == 2:
            attention.train()
            with self._trainer.at_samples(self._times.begins.samples):
                ask(
                    self._times.begins,
                    attend_with(self._masks[name]),
                    again=" once more, after another micro-batch, as recomputation does",
                )
            attention.eval()
        return out

    def _ask_state(
        self,
        name: str,
        layer: torch.nn.Module,
        forward: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Stand for a recurrent layer's forward: run it with other inputs, too.

        Args:
            name: of the layer.
            layer: the module.
            forward: its own.
        """
        self._asked[name] += 1
        moment, kind = self._now, recurrent.kind_of(layer)
        hidden = kwargs.pop("hidden_states") if "hidden_states" in kwargs else args[0]

        def run(hidden: torch.Tensor) -> torch.Tensor:
            out = forward(hidden, *args[1:], **kwargs)
            return out[0] if isinstance(out, tuple) else out

        assert moment.state_sight is not None and kind is not None
        groups = self._trainer.groups
        with states.without_dropout(layer):
            fault = states.faults(kind, moment.state_sight, groups, hidden, run)
            if fault:
                self.findings.faults.append(f"in {moment.name} the state of {name}: {fault}")
            return forward(hidden, *args[1:], **kwargs)

    def _mask_of(self, moment: Moment) -> torch.Tensor | None:
        if not self._clock.config.intra_document:
            return None
        return document_mask.training_mask(moment.batch)

    def _ask(
        self,
        name: str,
        scale: float,
        tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        own_window: int | None,
        moment: Moment,
        attend: Attend,
        *,
        backward: bool = False,
        again: str = "",
    ) -> torch.Tensor:
        """Put all questions; returns the output of the first call."""
        outputs = []
        own_window = moment.own_window(own_window)
        own = "" if own_window is None else f" (it sees {own_window} tokens at most)"
        where = f"{name}{own}, in {moment.name}{again}"
        sight = moment.sight.of_layer(own_window)
        for call in questions.calls(sight, *tensors, scale):
            with _named(where):
                if backward:
                    with torch.enable_grad():
                        out, lost = gradients.wrong_values(sight, call, attend)
                    self.findings.lost += [words.of_gradient(where, sight, it) for it in lost]
                else:
                    out = attend(call.query, call.key, call.value)
            wrong = questions.wrong_answers(sight, call, out)
            self.findings.faults += [words.of_answer(where, sight, it) for it in wrong]
            self.findings.num_answers += call.query.shape[:3].numel()
            outputs.append(out)
        if backward:
            with _named(where), torch.enable_grad():
                lost = gradients.wrong_softmax(sight, *tensors, scale, attend)
            self.findings.lost += [words.of_gradient(where, sight, it) for it in lost]
        return outputs[0]


@contextlib.contextmanager
def _named(where: str) -> Iterator[None]:
    """Within, let an error of the attention's kernel be preceded by the layer and the moment."""
    try:
        yield
    except Exception:
        logger.error("the attention fails at the mask probe's questions to %s:", where)
        raise


def _find_states(chunk: Any, where: str) -> dict[str, torch.nn.Module]:
    """Return the layers of a model chunk whose state is cut, by name."""
    modules = [module for module in chunk.modules() if recurrent.kind_of(module) is not None]
    return {f"layer {getattr(it, 'layer_number', '?')}{where}": it for it in modules}


def _set_or_delete(owner: Any, name: str, value: Any) -> None:
    if value is None:
        delattr(owner, name)
    else:
        setattr(owner, name, value)
