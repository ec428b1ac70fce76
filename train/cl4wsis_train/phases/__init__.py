"""The three phases: each turns a batch into a dict of losses."""
