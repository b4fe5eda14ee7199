"""Asynchronous online reinforcement learning."""
