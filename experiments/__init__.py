"""Experiments on the method: what the paper compares it with, its claims at a small scale, and speed."""
