"""Layers merged into fewer of the same shape (CoMe, arXiv 2510.15304): sensitivity, scores, merge, plan."""
