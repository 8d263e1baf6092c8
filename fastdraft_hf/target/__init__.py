"""The model a draft is made for: found by id or path, or embedded for use without a Hub."""
