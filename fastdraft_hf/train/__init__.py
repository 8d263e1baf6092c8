"""`DraftDistillationTrainer`: pre-train, continue, align."""
