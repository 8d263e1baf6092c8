"""What a recipe costs before it is run: tokens, FLOPs, hours, memory, disk, and what it brings.

On accelerators by roofline, from a table of data sheets and assumed utilisations; on a CPU by a
calibration that runs the recipe's own steps for a few seconds. Every assumption is printed.
"""
