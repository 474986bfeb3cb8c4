"""The byte ledger: what a token reads, from headers alone. Imports no torch."""
