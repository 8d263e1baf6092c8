"""What is best on this machine: the draft's shape, γ, and a reduced vocabulary."""
