"""One prompt and its answers, token by token: what every head looks at, untouched and with heads masked."""
