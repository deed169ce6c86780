"""What recipes and their parts come to on the demo model: quality, and the time and memory of single steps."""
