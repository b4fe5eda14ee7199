"""What is worth training on."""
