"""A local page that decodes one prompt with the dense head and with FlashHead, side by side."""
