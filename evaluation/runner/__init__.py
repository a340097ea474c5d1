"""Runs one task: examples to prompts, prompts to answers, answers to scores; resumable, by any number of processes."""

from evaluation.runner.prompts import truncate
from evaluation.runner.run import answer_ids, evaluate_task

__all__ = ["answer_ids", "evaluate_task", "truncate"]
