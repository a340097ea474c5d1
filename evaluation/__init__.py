"""Scoring of finished models: numbers with their protocol, tables and figures. No training code.

A folder for each thing that is evaluated, with the task behind its recipe in ``task.py`` (or one file per command):

- losses: ``perplexity`` (over context lengths), ``long_ppl`` (tokens that need the far context), ``kv_compression``
  (sweep and generation under a shortened past), ``parallel_context`` (contexts cut in pieces)
- needles: ``passkey``
- answers: ``suite`` (LongBench, InfiniteBench, HELMET, generated tasks), which runs ``tasks`` (their definitions, with
  ``templates``, ``ruler`` generators and ``metrics``) by means of ``runner``; ``harness`` (lm-eval)
- texts: ``summarization``, ``text_generation`` (the command), with ``rouge`` and ``generation_quality``

Files beside the folders are what several of them need: models (``loading``, ``weights``, ``model_paths``,
``model_sources``, ``compatibility``), losses (``scoring``, ``positions``, ``position_loss``), processes and what they
have finished (``processes``, ``gathering``, ``rank_journal``, ``cell_journal``, ``prediction_log``), protocols, files,
tables and figures (``arithmetic``, ``results``, ``figures``), memory (``cache_memory``, ``peak_memory``), patches
(``context_patch``).
"""
