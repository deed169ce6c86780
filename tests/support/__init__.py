"""What tests of several rooms share: tiny models, files, the command in this process."""
