"""The command: parsing, what each command does, `retmask doctor`."""
