"""Keys, certificates, signed documents and device tokens."""
