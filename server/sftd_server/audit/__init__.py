"""The audit log: every change that somebody made, written in the same transaction as the change."""
