"""lm-eval as the engine: our rows as its tasks, its models and batching, its samples back.

One class for the nine standard tasks and one for generated answers. Rows come from memory, so
lm-eval loads no data set; what a model answers is scored in `scoring`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.task import Task, TaskConfig
from lm_eval.tasks import TaskManager

from megatron_skyladder.cpu import bfloat16
from megatron_skyladder.evaluation import scoring
from megatron_skyladder.evaluation.data import Prompt, Question
from megatron_skyladder.evaluation.tasks import (
    UNCONDITIONAL_CONTEXT,
    GenerativeTask,
    Normalization,
)

SCORE = "score"


class _Rows(Task):
    """A task of lm-eval over rows in memory, each of which is a whole prompt."""

    VERSION = 1

    def __init__(self, name: str, rows: Sequence[Any]) -> None:
        self._rows = list(rows)
        super().__init__()
        self._config = TaskConfig(task=name, num_fewshot=0, output_type=self.OUTPUT_TYPE)

    def download(self, *_: Any, **__: Any) -> None:
        """Nothing is downloaded."""
        self.dataset = None

    def has_training_docs(self) -> bool:
        return False

    def has_validation_docs(self) -> bool:
        return False

    def has_test_docs(self) -> bool:
        return True

    def test_docs(self) -> list[Any]:
        return [{"place": place} for place in range(len(self._rows))]

    def row(self, doc: dict[str, int]) -> Any:
        """Return the row of one of lm-eval's documents."""
        return self._rows[doc["place"]]

    def fewshot_context(self, *_: Any, **__: Any) -> str:
        """Shots are part of the rows."""
        return ""

    def doc_to_text(self, doc: dict[str, int]) -> str:
        return ""

    def doc_to_target(self, doc: dict[str, int]) -> str:
        return ""

    def aggregation(self) -> dict[str, Any]:
        return {SCORE: np.mean}

    def higher_is_better(self) -> dict[str, bool]:
        return {SCORE: True}


class OlmesTask(_Rows):
    """A standard task in one formulation.

    Args:
        name: for lm-eval's messages.
        questions: the rows.
        normalization: how likelihoods are compared.
    """

    OUTPUT_TYPE = "loglikelihood"

    def __init__(
        self, name: str, questions: Sequence[Question], normalization: Normalization
    ) -> None:
        self._normalization = normalization
        super().__init__(name, questions)

    def construct_requests(
        self, doc: dict[str, int], ctx: str, *, metadata: Any, **_: Any
    ) -> list[Instance]:
        """Ask for each choice after its context, and after "Answer:" where that is compared."""
        question: Question = self.row(doc)
        texts = question.continuations
        asked = [(question.context(place), text) for place, text in enumerate(texts)]
        if self._normalization is Normalization.UNCONDITIONAL:
            asked += [(UNCONDITIONAL_CONTEXT, text) for text in texts]
        return [
            Instance(
                request_type="loglikelihood", doc=doc, arguments=pair, idx=place, metadata=metadata
            )
            for place, pair in enumerate(asked)
        ]

    def process_results(self, doc: dict[str, int], results: list[Any]) -> dict[str, float]:
        """Return 1 where the best choice is the right one."""
        question: Question = self.row(doc)
        values = [float(value) for value, _ in results]
        count = len(question.continuations)
        best = scoring.choice(
            values[:count], question.continuations, self._normalization, values[count:]
        )
        return {SCORE: float(best == question.gold)}


class GeneratedTask(_Rows):
    """A task whose answers are generated, greedily.

    Args:
        task: how long, until when, and how it is scored.
        prompts: the rows.
    """

    OUTPUT_TYPE = "generate_until"

    def __init__(self, task: GenerativeTask, prompts: Sequence[Prompt]) -> None:
        self._task = task
        super().__init__(task.name, prompts)

    def construct_requests(
        self, doc: dict[str, int], ctx: str, *, metadata: Any, **_: Any
    ) -> list[Instance]:
        """Ask for one answer."""
        settings = {
            "until": list(self._task.stop),
            "max_gen_toks": self._task.max_new_tokens,
            "do_sample": False,
            "temperature": 0.0,
        }
        asked = (self.row(doc).prompt, settings)
        return [
            Instance(
                request_type="generate_until", doc=doc, arguments=asked, idx=0, metadata=metadata
            )
        ]

    def process_results(self, doc: dict[str, int], results: list[str]) -> dict[str, float]:
        """Score the answer."""
        return {SCORE: scoring.generated(results[0], self.row(doc).answers, self._task.metric)}


def load(folder: Path, backend: str, *, max_length: int, batch_size: str, device: str) -> Any:
    """Load a Hugging Face folder as a model of lm-eval.

    Args:
        folder: weights and tokenizer.
        backend: of `tasks.BACKENDS`.
        max_length: tokens; longer input is cut on the left.
        batch_size: a number, or auto.
        device: cuda, cpu, ...

    No token begins a text: training data has none.
    """
    from lm_eval.api.registry import get_model

    arguments: dict[str, Any] = {
        "pretrained": str(folder),
        "max_length": max_length,
        "batch_size": batch_size,
        "add_bos_token": False,
    }
    if backend == "hf":
        arguments |= {"device": device, "backend": "causal"}
        if device == "cpu":
            bfloat16.install()  # six times as fast where the processor has no bfloat16
    else:
        arguments |= {"max_model_len": arguments.pop("max_length")}
    return get_model(backend)(**arguments)


def scores(model: Any, task: _Rows) -> list[float]:
    """Run one task; return the score of each row, in order."""
    found = simple_evaluate(
        model=model,
        tasks=[task],
        task_manager=TaskManager(include_defaults=False),  # or it reads 10,000 files each time
        log_samples=True,
        bootstrap_iters=0,
    )
    (samples,) = found["samples"].values()
    by_place = {sample["doc"]["place"]: float(sample[SCORE]) for sample in samples}
    return [by_place[place] for place in range(len(by_place))]
