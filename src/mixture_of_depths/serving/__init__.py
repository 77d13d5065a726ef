"""Answering others: OpenAI's protocol, and a page to sample from."""
