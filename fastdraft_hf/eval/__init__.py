"""Acceptance rate, block efficiency, MBSU, wall clock, the report."""
