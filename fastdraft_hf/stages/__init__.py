"""A recipe and its stages: which run, in what order, and how they resume."""
