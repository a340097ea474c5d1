"""lm-evaluation-harness's own tasks for a model of this suite; the work behind ``eval.py recipe=lm_eval``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation.arithmetic import arithmetic, versions
from evaluation.harness.adapter import Harness, import_lm_eval, lm_eval_model
from evaluation.model_sources import single_model
from evaluation.processes import Process
from evaluation.results import text_table, write_json
from evaluation.runner.identity import describe_patch
from evaluation.weights import Backend, Dtype, Quantization, Weights
from patches.parallel_context import ParallelContext


class LmEvalTask:
    """Evaluate a model, patched or as it is, on tasks of lm-eval.

    Args:
        model: model folder, ``hub:NAME``, or a function that builds one.
        tasks: lm-eval's names.
        patch: how contexts are read; None: as the model is.
        include_path: folder with task files of one's own.
        num_fewshot: demonstrations; None: each task's own.
        limit: examples of a task at most.
        batch_size: requests answered together.
        query_tokens: under a patch, last tokens of a context that are the query.
        tokenizer: instead of the model folder's.
        quantization: int8 or int4 weights.
        quantization_backend: bitsandbytes or torchao.
        rope: rotary positions beyond the trained length (`models.rope_scaling.scale_rope`); None: the model's own.
        dtype: of weights and arithmetic.
        device: ``auto`` (CUDA when there is one), ``cpu``, ``cuda``, ``cuda:1``.

    Raises:
        ValueError: lm-eval is not installed, or no task is named.
        FileNotFoundError: the model does not exist.
    """

    def __init__(
        self,
        model: Any,
        tasks: Sequence[str],
        *,
        patch: ParallelContext | None = None,
        include_path: str | None = None,
        num_fewshot: int | None = None,
        limit: int | None = None,
        batch_size: int = 1,
        query_tokens: int = 64,
        tokenizer: Any = None,
        quantization: Quantization | None = None,
        quantization_backend: Backend = "bitsandbytes",
        rope: Mapping[str, Any] | None = None,
        dtype: Dtype = "float32",
        device: str = "auto",
    ) -> None:
        if not tasks:
            raise ValueError("tasks is empty: name tasks of lm-eval, tasks=[lambada_openai] say")
        import_lm_eval()
        if include_path is not None and not Path(include_path).is_dir():
            raise FileNotFoundError(f"data.include_path={include_path} is no folder")
        self.model = single_model(model, tokenizer)
        self.tasks, self.patch, self.include_path = list(tasks), patch, include_path
        self.num_fewshot, self.limit = num_fewshot, limit
        self.batch_size, self.query_tokens = batch_size, query_tokens
        found = Process.current().device(device, dtype)
        self.weights = Weights(dtype, found, quantization, quantization_backend, rope)
        self.weights.check(patch, batch_size)

    def run(self, output: Path) -> dict[str, Any]:
        """Evaluate; write ``metrics.json`` with lm-eval's results and the protocol; return them and a table.

        Raises:
            ValueError: lm-eval knows no such task.
        """
        lm_eval = import_lm_eval()
        from lm_eval.tasks import TaskManager

        # The index of lm-eval's own tasks takes minutes on a slow disk: only where one of them is named.
        manager = TaskManager(include_path=self.include_path, include_defaults=self.include_path is None)
        if self.include_path is not None and not set(self.tasks) <= set(manager.all_tasks):
            manager = TaskManager(include_path=self.include_path)
        unknown = [task for task in self.tasks if task not in manager.all_tasks]
        if unknown:
            raise ValueError(f"lm-eval has no task {', '.join(unknown)}: see lm_eval ls tasks")
        found = lm_eval.simple_evaluate(
            model=lm_eval_model(self._harness()),
            tasks=self.tasks,
            num_fewshot=self.num_fewshot,
            limit=self.limit,
            task_manager=manager,
            bootstrap_iters=0,
        )
        rows = [
            {"task": task, "metric": name.removesuffix(",none"), "value": float(value)}
            for task, values in found["results"].items()
            for name, value in values.items()
            if isinstance(value, int | float) and "stderr" not in name and name != "sample_len"
        ]
        protocol = {
            "model": self.model.identity,
            "patch": None if self.patch is None else describe_patch(self.patch),
            "num_fewshot": self.num_fewshot,
            "limit": self.limit,
            "query_tokens": self.query_tokens,
            **arithmetic(self.weights.device, self.weights.dtype),
            "quantization": self.weights.quantization,
            "rope": None if self.weights.rope is None else dict(self.weights.rope),
            "versions": versions() | {"lm_eval": getattr(lm_eval, "__version__", None)},
        }
        metrics = {"task": "lm_eval", "protocol": protocol, "results": rows}
        write_json(output / "metrics.json", metrics)
        return metrics | {"table": text_table(rows, ("task", "metric", "value"))}

    def _harness(self) -> Harness:
        model, tokenizer = self.weights.load(self.model), self.model.tokenizer
        return Harness(model, tokenizer, self.patch, batch_size=self.batch_size, query_tokens=self.query_tokens)
