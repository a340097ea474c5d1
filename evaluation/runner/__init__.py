"""Runs one task: examples to prompts, prompts to answers, answers to scores; resumable, by any number of processes."""

from evaluation.runner.prompts import PromptOptions, truncate
from evaluation.runner.run import evaluate_task, run_share
from evaluation.runner.task_run import AnswerOptions, TaskRun, answer_ids

__all__ = ["AnswerOptions", "PromptOptions", "TaskRun", "answer_ids", "evaluate_task", "run_share", "truncate"]
