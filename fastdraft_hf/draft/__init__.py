"""What a draft looks like, where its initialization come from, whether vocabularies match."""
