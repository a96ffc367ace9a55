"""Actors: environments, the acting loop beside them, and the fleet that keeps them alive."""
