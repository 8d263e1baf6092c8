"""Estimate what a recipe costs before it is run, and what its draft should bring.

`machines` holds the devices and the arithmetic of a step, `estimate` goes through a recipe's
stages. Every assumption is printed with the plan.
"""
