"""Experiments over data sets, protocols and dtypes, cell by cell."""
