"""What an extension is worth, measured on the runtime that will serve it."""
