"""The science: which heads copy from context, and what happens without them or their rotary pairs."""
