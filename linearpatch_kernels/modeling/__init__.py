"""Transformers models with patched joints."""
