"""The suites that are part of this package, one file each, and the table of them."""
