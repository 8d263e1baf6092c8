"""What a draft looks like, where its first weights come from, whether vocabularies match."""
