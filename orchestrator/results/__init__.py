"""What a point of a sweep leaves behind, and how theta is scored."""
