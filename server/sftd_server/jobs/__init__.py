"""Jobs: what users post, watch and steer."""
