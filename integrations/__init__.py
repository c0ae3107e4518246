"""Thin plugins for vLLM, verl, TRL and Ray; the only code here that knows a trainer."""
