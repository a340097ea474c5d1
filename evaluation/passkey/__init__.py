"""Passkeys and chains of them in haystacks of any length."""

from evaluation.passkey.haystack import evaluate_passkey, read_haystack, summary

__all__ = ["evaluate_passkey", "read_haystack", "summary"]
