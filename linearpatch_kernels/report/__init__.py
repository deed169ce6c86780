"""What a run leaves for people: a page in Markdown, its tables and pictures."""
