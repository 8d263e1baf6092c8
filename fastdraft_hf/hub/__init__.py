"""A draft's repository: its files, its card, push and pull."""
