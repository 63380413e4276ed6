"""Benchmarks: ``python -m benchmarks.losses``, ``.attention``, ``.topk_error``; see docs/benchmarks.md."""
