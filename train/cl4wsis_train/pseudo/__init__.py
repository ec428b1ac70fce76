"""Pseudo labels: what takes the place of masks in later steps."""
