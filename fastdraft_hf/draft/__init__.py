"""The draft: its shape, its initialization, and its vocabulary."""
