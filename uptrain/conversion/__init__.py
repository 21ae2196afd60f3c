"""Merge key/value heads: plan, pool, write, verify."""
