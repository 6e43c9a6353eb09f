"""The worker: claims jobs and runs them. torch is imported under trainer/ and evaluate/ alone."""
