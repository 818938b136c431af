"""Classic papers, one module each, that read from top to bottom like the paper."""

from pyzoo.models._registry import Entry, create_model, list_models, model_entry, register_model

__all__ = ["Entry", "create_model", "list_models", "model_entry", "register_model"]
