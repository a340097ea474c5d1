"""How good generated texts are: likeness to a reference, variety, and what a judge model thinks of them."""

from evaluation.generation_quality.scores import distinct_n, judge_perplexity, score_generations

__all__ = ["distinct_n", "judge_perplexity", "score_generations"]
