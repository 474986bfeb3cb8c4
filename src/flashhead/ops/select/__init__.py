"""Select: the rows that can win, and the rows whose error the distribution would notice."""
