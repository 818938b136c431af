"""Data: real and small, made on the spot, or in folders that you have."""
