"""Which cached tokens are worth reading, by a scan of keys in few bits."""
