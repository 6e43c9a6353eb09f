"""sftd-server: what remembers. Jobs, files, keys and the worker protocol over SQLite."""
