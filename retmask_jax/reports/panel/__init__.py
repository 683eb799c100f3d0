"""Several models side by side: results read from other runs, findings and gains over them, their pictures and page."""
