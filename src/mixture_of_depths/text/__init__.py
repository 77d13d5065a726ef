"""Text on its way to a model: documents, tokenizer, the prepared corpus, batches, and pieces of text."""
