"""The stages together: their table and order, and what must hold before one runs; not what any of them does."""
