"""Models of the suite, patched or not, in lm-eval (EleutherAI's harness)."""
