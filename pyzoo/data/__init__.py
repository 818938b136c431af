"""Data: real and small, made on the spot, or in folders that you have."""

from pyzoo.data.digits import digit_scenes, digits

__all__ = ["digit_scenes", "digits"]
