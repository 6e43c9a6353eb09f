"""Workers: leases, and what is reported under them."""
