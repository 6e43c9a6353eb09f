"""What can be known of a job before it runs: what workers count of its data and model, and what the server makes of it."""
