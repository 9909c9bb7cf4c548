"""Rows as tables: columns, filters, formats, terminals."""
