"""What tiny models give, kept from one version of the code to the next: `make` writes it, `test_recording` compares."""
