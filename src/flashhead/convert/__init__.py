"""Model in, model folder out."""
