"""`yan demo geometry`: points -> flows -> distances -> pictures."""
