"""Rows of data sets, in any known format, as records."""
