"""Widths of rows that the cases of the operators go through, and the operators' tests with them."""

LISTED = [
    *(512, 576, 640, 768, 896, 960, 1024, 1152, 1280, 1536, 1600, 1792, 2048, 2304, 2560, 2688, 2816, 2880, 3072, 3200),
    *(3584, 3840, 4096, 4544, 4608, 5120, 5376, 5632, 6144, 6656, 7168, 8192, 12288, 16384),
]
