"""Suites written here, one file each, and the table of them."""
