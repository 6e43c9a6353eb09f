"""OpenAI's fine-tuning and files surface at /v1: a translation over jobs/ and files/, no logic of its own."""
