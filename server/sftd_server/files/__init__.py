"""Files: uploads, kept by the hash of their content."""
