"""Losses as functions; each docstring names the formula and how it is reduced."""
