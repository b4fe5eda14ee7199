"""Light preference optimisation, thin over TRL."""
