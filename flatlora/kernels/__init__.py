"""Autograd functions, each beside its plain reference."""
