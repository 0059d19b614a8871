"""Experiments on the method: the paper's alternatives, its claims at a small scale, and speed."""
