"""Adapted linear layers in any model: finding them, and reading their adapters and base weights."""
