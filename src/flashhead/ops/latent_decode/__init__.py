"""One token a row attends over cached latents (see `api`)."""
