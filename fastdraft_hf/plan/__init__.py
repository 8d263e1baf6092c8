"""Estimate what a recipe costs before it is run, and what its draft should bring."""
