"""Faults on purpose: processes killed, stopped and cut off, and a proof that nothing was lost."""
