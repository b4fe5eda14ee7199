"""The tiny herd: task families, tokenizer, student and teacher of the demo, made from nothing."""
