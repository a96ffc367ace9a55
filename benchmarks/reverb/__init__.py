"""Ours beside dm-reverb, in one run."""
