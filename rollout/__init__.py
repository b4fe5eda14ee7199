"""Where tokens come from and what they are worth."""
