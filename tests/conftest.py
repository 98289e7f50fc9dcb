"""Imported before every test module."""

# Before geoopt, whose import warns: the package keeps that warning from its users, and warnings are errors here.
import manifold_nets  # noqa: F401
