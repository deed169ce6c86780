"""The registered cases, a module for each operator."""
