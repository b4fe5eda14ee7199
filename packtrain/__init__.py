"""The packtrain command: runs the stages of a recipe in order."""
