"""Pareto tables and figures of finished and running sweeps."""
