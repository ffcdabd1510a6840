"""The bundled model: a GPT-2 of 5.9 M parameters and its tokenizer; README.md is its card."""
