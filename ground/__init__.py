"""What every stage stands on; imports nothing above it."""
