"""The draft for other engines."""
